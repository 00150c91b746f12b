"""A vocabulary as Hugging Face's tokenizer files, which give the same ids in transformers 4 and 5.

The `tokenizers` library already runs a WordPiece vocabulary, and a tokenizer.json is copied. Most of this module
converts a SentencePiece model. `tokenizers` reads the same map of characters, but applies it differently:

- SentencePiece replaces the longest sequence that is in the map: an "E" and its accent by an accented "e".
  `Precompiled` replaces the first match inside a grapheme, the "E", and loses the accent. Therefore sequences are
  composed first, by Unicode's NFKC, and `Precompiled` then gets one character at a time.
- NFKC reorders and joins marks that SentencePiece does not change, so a separator follows each sequence of the map.

`_exceptions` compares the result with the map, entry by entry. Models without an exact conversion are rejected.
"""

import struct
import unicodedata
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

import data_prep.text.tokenizer as vocabulary
from data_prep.files import finished_file, write_json
from data_prep.text.vocab_files import PIPELINE_FILE, SETTINGS_FILE, SPECIAL_TOKENS, is_special

# Unicode noncharacters, which a text should not contain; if it does, STRAY replaces them.
SEQUENCE_END, CHARACTER_START, STRAY = "\ufdd0", "\ufdd1", "\ufdef"
KEPT = ("\ufdd2", "\ufdd3", "\ufdd4")  # each replaces a character that NFKC would change and the map does not
MOST_EXCEPTIONS = 64
BYTES = np.arange(1, 256)
SPACE = "\u2581"  # SentencePiece's mark of a space


class CharacterMap:
    """The replacements of a SentencePiece model, stored as a trie of UTF-8 bytes in a double array (as in darts-clone).

    .root, .steps(node) -> [(character, replacement of the sequence that ends with it or None, next node), ...]
    """

    def __init__(self, content: bytes) -> None:
        (size,) = struct.unpack_from("<I", content)
        self._units = np.frombuffer(content, "<u4", size // 4, 4).astype(np.int64)
        self._values = content[4 + size :]
        self._nodes = np.arange(len(self._units)) ^ ((self._units >> 10) << ((self._units & 512) >> 6))
        self.root = int(self._nodes[0])
        self.steps = cache(self._steps)

    def _steps(self, node: int) -> list[tuple[str, str | None, int]]:
        found, pending = [], [(node, b"")]
        while pending:
            node, prefix = pending.pop()
            places = node ^ BYTES
            places = places[places < len(self._units)]
            for place in places[self._units[places] & 0x800000FF == places ^ node]:
                key, below = prefix + bytes([place ^ node]), int(self._nodes[place])
                if len(key) < (1 if key[0] < 0x80 else 2 if key[0] < 0xE0 else 3 if key[0] < 0xF0 else 4):
                    pending.append((below, key))
                else:
                    is_key = self._units[place] >> 8 & 1
                    found.append((key.decode(), self._value(below) if is_key else None, below))
        return found

    def _value(self, node: int) -> str:
        start = int(self._units[node]) & 0x7FFFFFFF
        return self._values[start : self._values.index(b"\0", start)].decode()


def _any_of(characters: list[str] | set[str]) -> str:
    return "[" + "".join(rf"\x{{{ord(c):x}}}" for c in sorted(characters)) + "]"


@lru_cache(maxsize=2)
def normalizer_steps(content: bytes) -> list[normalizers.Normalizer]:
    """`tokenizers` steps equivalent to a SentencePiece map. Raises ValueError unless it is based on Unicode's NFKC."""
    table = CharacterMap(content)
    inner: set[str] = set()  # characters that continue a sequence

    @cache
    def behind(node: int) -> str:
        """A regular expression for what may follow a character of a sequence."""
        ways: dict[str, list[str]] = {}
        for character, value, below in table.steps(node):
            rest = behind(below)
            ways.setdefault(f"{rest}?" if rest and value is not None else rest, []).append(character)
            inner.add(character)
        return f"(?>{'|'.join(_any_of(characters) + rest for rest, characters in ways.items())})" if ways else ""

    firsts: dict[str, list[str]] = {}
    for character, _, below in table.steps(table.root):
        if rest := behind(below):
            firsts.setdefault(rest, []).append(character)
    alone = [
        normalizers.Replace(Regex(r"(?<=(?m:.))(?=[^\x20-\x7e])"), CHARACTER_START),
        normalizers.Precompiled(content),
        normalizers.Replace(CHARACTER_START, ""),
    ]
    stray = normalizers.Replace(Regex(_any_of([SEQUENCE_END, CHARACTER_START, *KEPT])), STRAY)
    if not firsts:
        return [stray, *alone]
    sequences = "|".join(_any_of(characters) + rest for rest, characters in firsts.items())
    combining = rf"[\p{{M}}{_any_of(inner)}]"
    mark_ends = normalizers.Replace(Regex(rf"(?=(?m:.){combining})(?>{sequences}|(?m:.))\K"), SEQUENCE_END)
    before, after = _exceptions(table, inner)
    end = normalizers.Replace(SEQUENCE_END, "")
    return [stray, mark_ends, *before, normalizers.NFKC(), *alone, normalizers.NFC(), end, *after]


def _exceptions(table: CharacterMap, inner: set[str]) -> tuple[list, list]:
    """(steps before NFKC, steps after all others) for entries of the map that composition gets wrong.

    They are few: scripts newer than the Unicode version of `tokenizers`, and U+FF5E, which SentencePiece keeps.
    """
    nfkc, nfc = normalizers.NFKC(), normalizers.NFC()
    plain = cache(nfkc.normalize_str)
    singles = {character: value for character, value, _ in table.steps(table.root) if value is not None}

    def composed(text: str) -> str:
        return nfc.normalize_str("".join(singles.get(c, c) for c in nfkc.normalize_str(text)))

    @cache
    def entries(node: int) -> list[tuple[str, str]]:
        """The map's entries below a node, without those that NFKC turns into another entry."""
        steps = {character: (value, below) for character, value, below in table.steps(node)}
        found = []
        for character, (value, below) in steps.items():
            twin = steps.get(plain(character)) if plain(character) != character else None
            if twin and twin[1] == below and (node == table.root or twin[0] == value):
                continue
            found += [(character, value)] if value is not None else []
            found += [(character + rest, replacement) for rest, replacement in entries(below)]
        return found

    # NFKC changes no character above the supplementary planes of ideographs.
    changed = {c for c in map(chr, range(0x40000)) if not unicodedata.is_normalized("NFKC", c)}
    pairs = [(c, singles.get(c, c)) for c in changed | singles.keys()]
    pairs += [(text, value) for text, value in entries(table.root) if len(text) > 1]
    wrong = [(text, value) for text, value in sorted(pairs) if composed(text) != value]
    kept = iter(KEPT)
    before, after = [], []
    for text, value in wrong:
        if (code := value if composed(value) == value else next(kept, None)) is None or len(wrong) > MOST_EXCEPTIONS:
            raise ValueError("its normalisation rules are not those of SentencePiece's own NFKC")
        begin = f"(?:^|(?<={SEQUENCE_END}))" if text[0] in inner else ""
        end = f"(?={SEQUENCE_END})" if len(text) > 1 else ""
        before.append(normalizers.Replace(Regex(begin + text + end), code))
        after += [normalizers.Replace(code, value)] if code != value else []
    return before, after


def sentencepiece_json(path: Path) -> Tokenizer:
    """A SentencePiece unigram model as a `tokenizers` pipeline with the same ids. Raises ValueError if it has none."""
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    trained, rules, kinds = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    if trained.model_type != trained.UNIGRAM:
        raise ValueError(f"{path}: only unigram models convert to Hugging Face; train with --type sentencepiece")
    unsupported = {
        "byte_fallback": trained.byte_fallback,
        "treat_whitespace_as_suffix": trained.treat_whitespace_as_suffix,
        "add_dummy_prefix=False": not rules.add_dummy_prefix,
        "remove_extra_whitespaces=False": not rules.remove_extra_whitespaces,
        "escape_whitespaces=False": not rules.escape_whitespaces,
    }
    if used := [option for option, is_used in unsupported.items() if is_used]:
        raise ValueError(f"{path} was trained with {used[0]}, which does not convert to Hugging Face; train without it")
    content = rules.precompiled_charsmap
    try:
        steps = normalizer_steps(content) if content else []
        pieces = _scored_pieces(model.pieces, kinds, CharacterMap(content) if content else None)
    except ValueError as error:
        raise ValueError(f"{path} does not convert to Hugging Face: {error}") from error
    unknown = next(index for index, piece in enumerate(model.pieces) if piece.type == kinds.UNKNOWN)
    pipeline = Tokenizer(models.Unigram(pieces, unk_id=unknown))
    spaces = [(r" {2,}", " "), (rf"[ {SPACE}]+\z", ""), (rf"\A{SPACE}", f" {SPACE}")]
    pipeline.normalizer = normalizers.Sequence([*steps, *(normalizers.Replace(Regex(a), b) for a, b in spaces)])
    splits = not any(SPACE in piece.piece[1:] for piece in model.pieces)
    # "first": text after a [MASK] gets a space before it only if it has one.
    pipeline.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=splits)
    pipeline.decoder = decoders.Metaspace(prepend_scheme="first")
    return pipeline


def _scored_pieces(pieces: list, kinds: type, table: CharacterMap | None) -> list[tuple[str, float]]:
    """The pieces for `models.Unigram`, with the scores that SentencePiece uses.

    Control and unused pieces, which it never finds in a text, end with a space here, unless they are BERT's: by then
    the text has no spaces.
    """
    scores = [piece.score for piece in pieces if piece.type == kinds.NORMAL]
    mapped = {character for character, *_ in table.steps(table.root)} if table else set()
    scored = []
    for piece in pieces:
        text, score = piece.piece, piece.score
        if piece.type == kinds.USER_DEFINED and not is_special(text):
            score = len(text.encode()) * max(scores) - 0.1  # as in SentencePiece's unigram_model.cc
            if mapped & set(text) or score < min(scores):
                raise ValueError(f"the user-defined piece {text!r} does not convert; train without it")
        elif piece.type in (kinds.CONTROL, kinds.UNUSED) and not is_special(text):
            text += " "
        scored.append((text, score))
    return scored


def tokenizer_json(tokenizer: vocabulary.Tokenizer) -> Tokenizer:
    """A `tokenizers` pipeline that gives the same ids and adds [CLS] and [SEP]. Raises as `sentencepiece_json` does."""
    if tokenizer.path.suffix == ".json":
        return Tokenizer.from_file(str(tokenizer.path))
    is_sentencepiece = tokenizer.kind == "sentencepiece"
    if is_sentencepiece:
        pipeline = sentencepiece_json(tokenizer.path)
    else:
        pipeline = Tokenizer.from_str(tokenizer.pipeline.to_str())
        pipeline.decoder = decoders.WordPiece()
    # lstrip: the space before [MASK] belongs to the masked word and must not become a token.
    roles = _special_tokens(tokenizer)
    pipeline.add_special_tokens(
        [
            AddedToken(token, lstrip=is_sentencepiece and role == "mask_token", normalized=False)
            for role, token in roles.items()
        ]
    )
    cls, sep = roles["cls_token"], roles["sep_token"]
    pipeline.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, tokenizer.cls_id), (sep, tokenizer.sep_id)],
    )
    return pipeline


def _special_tokens(tokenizer: vocabulary.Tokenizer) -> dict[str, str]:
    """Hugging Face's names of SPECIAL_TOKENS, pad_token to mask_token, and how the vocabulary spells each."""
    roles = (f"{name[1:-1].lower()}_token" for name in SPECIAL_TOKENS)
    return {role: tokenizer.tokens[index] for role, index in zip(roles, tokenizer.special_ids, strict=True)}


def save_tokenizer(tokenizer: vocabulary.Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json and the vocabulary file itself, for inputs of `max_length` tokens.

    Raises ValueError as `tokenizer_json` does, before anything is written.
    """
    content = tokenizer_json(tokenizer).to_str(pretty=True)
    tokenizer.save(folder)
    if tokenizer.path.suffix != ".json":
        with finished_file(folder / PIPELINE_FILE, "w") as file:
            file.write(content)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # a name that transformers 4 and 5 both know
        "model_max_length": max_length,
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],  # else a pair would be one segment
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / SETTINGS_FILE, tokenizer.settings() | settings | _special_tokens(tokenizer))
