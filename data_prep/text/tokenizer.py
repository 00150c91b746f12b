"""One face for all vocabularies: Google's WordPiece (`vocab.txt`), SentencePiece (`*.model`), and either of them in
Hugging Face's `tokenizer.json`.

A vocabulary is one file, known by the sha256 of its bytes, and has the five special tokens of BERT. Text never becomes
a special token: a literal "[MASK]" in a document is spelled with ordinary pieces, as in google-research/bert.

WordPiece ids are those of Hugging Face's BertTokenizerFast. They come from the same Rust code on a word's first sight
and from a bounded cache afterwards: words repeat, so looking them up is several times faster than cutting them again.
"""

import argparse
import json
import re
import shutil
import unicodedata
from collections.abc import Sequence
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.files import read_json, sha256_file, write_json
from data_prep.text.vocab_files import (
    PIPELINE_FILE,
    SETTINGS_FILE,
    TOKEN_FLAGS,
    Folding,
    added_tokens,
    find_folding,
    find_vocabularies,
    is_special,
    lost_tokens,
    read_vocab_txt,
    special_ids,
    with_added,
)

CACHE_WORDS = 1 << 18  # at some 250 bytes a word, 65 MB
LONGEST_CACHED_WORD = 32  # longer ones are URLs and unspaced scripts, which do not repeat

# The characters that str.split() takes for white space and that BERT deletes as control characters.
_NOT_WHITE_SPACE_IN_BERT = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


class Tokenizer:
    """What all kinds share; `encode` and `decode` belong to the kind. Made by `load_tokenizer`.

    .path, .sha256   the vocabulary file and its identity
    .kind            "wordpiece" or "sentencepiece"
    .folding         whether capital letters and accents are folded away
    .tokens          list[str] of length .vocab_size, by id
    .special_ids     ids of SPECIAL_TOKENS, in that order; also .pad_id .unk_id .cls_id .sep_id .mask_id
    .word_start      bool [V]: the token begins a word, so that whole words can be masked
    """

    kind: str
    folding: Folding

    def __init__(self, path: Path, tokens: list[str], word_start: list[bool]) -> None:
        self.path, self.tokens, self.vocab_size = path, tokens, len(tokens)
        self.sha256 = sha256_file(path)
        self.word_start = np.array(word_start, dtype=bool)
        self.special_ids = special_ids(path, tokens)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids

    @property
    def lowercase(self) -> bool:
        """True when capital letters are folded away."""
        return self.folding.lower_case

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without [CLS] and [SEP]."""
        raise NotImplementedError

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `encode`, and for each the characters of `text` it stands for, [begin, end), without white space.

        A character that normalisation makes into several belongs to each of their tokens as a whole; an accent that
        it takes away belongs to its letter.
        """
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Readable text of token ids, special tokens by name. What normalisation folded away does not come back."""
        if self.kind == "wordpiece":
            return " ".join([self.tokens[i] for i in ids]).replace(" ##", "")
        special = set(self.special_ids)
        pieces = [f"▁{self.tokens[i]}▁" if i in special else self.tokens[i] for i in ids]
        return " ".join("".join(pieces).replace("▁", " ").split())

    def settings(self) -> dict:
        """What has to stand beside the file in `tokenizer_config.json`; {} where the file says it all."""
        return {}

    def describe(self) -> dict:
        """What manifests record of a vocabulary."""
        identity = {"file": self.path.name, "sha256": self.sha256, "size": self.vocab_size, "kind": self.kind}
        return identity | {"lower_case": self.folding.lower_case, "strip_accents": self.folding.strip_accents}

    def save(self, folder: str | Path) -> Path:
        """Copy the vocabulary file into `folder` under its own name, with its settings, and return the copy's path."""
        if settings := self.settings():
            write_json(Path(folder) / SETTINGS_FILE, settings)
        return Path(shutil.copyfile(self.path, Path(folder) / self.path.name))


class WordPiece(Tokenizer):
    """Greedy longest-match pieces of a `vocab.txt` (Wu et al. 2016, arXiv 1609.08144; as in google-research/bert).

    `cased` says what the files beside it do not, or contradicts them; without either it is guessed when it is needed.
    """

    kind = "wordpiece"

    def __init__(self, path: Path, cased: bool | None = None) -> None:
        self._base, self._cased = read_vocab_txt(path), cased
        self.added = added_tokens(path, self._base)
        tokens = with_added(path, self._base, self.added)
        super().__init__(path, tokens, [not token.startswith("##") for token in tokens])

    @cached_property
    def folding(self) -> Folding:
        return find_folding(self.path, self._base, self._cased)

    @cached_property
    def pipeline(self):
        """The same as a pipeline of the `tokenizers` library."""
        from tokenizers import AddedToken

        pipeline = bert_pipeline(self._base, self.folding)
        for _, token, flags in self.added:
            pipeline.add_tokens([AddedToken(token, **flags)])
        pipeline.encode_special_tokens = True
        return pipeline

    @cached_property
    def _cache(self) -> "_WordCache":
        return _WordCache(self.pipeline)

    def encode(self, text: str) -> list[int]:
        if self.added:  # they may have spaces in them, and stand inside words
            return self.pipeline.encode(text, add_special_tokens=False).ids
        if _NOT_WHITE_SPACE_IN_BERT.search(text):
            text = _NOT_WHITE_SPACE_IN_BERT.sub("", text)
        return list(chain.from_iterable(map(self._cache.__getitem__, text.split())))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.pipeline.encode(text, add_special_tokens=False)
        return encoding.ids, _with_marks(text, encoding.offsets) if self.folding.strip_accents else encoding.offsets

    def settings(self) -> dict:
        names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
        added = {str(index): {"content": token, **flags} for index, token, flags in self.added}
        return dict(zip(names, self.folding, strict=True)) | ({"added_tokens_decoder": added} if added else {})

    def describe(self) -> dict:
        added = {token: index for index, token, _ in self.added}
        return super().describe() | ({"added_tokens": added} if added else {})


class Pipeline(Tokenizer):
    """A `tokenizer.json` of WordPiece or of SentencePiece's unigram model, as the `tokenizers` library runs it."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        content = read_json(path)
        model = content.get("model") if isinstance(content, dict) else None
        kinds = {"WordPiece": "wordpiece", "Unigram": "sentencepiece"}
        if not isinstance(model, dict) or model.get("type") not in kinds:
            raise ValueError(
                f"{path} is no tokenizer.json of a WordPiece or Unigram model, which are what is read here"
            )
        self.kind = kinds[model["type"]]
        is_unigram = self.kind == "sentencepiece"
        vocab = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if is_unigram else dict(model["vocab"])
        added = [(t["id"], t["content"], {k: t[k] for k in TOKEN_FLAGS}) for t in content.get("added_tokens") or []]
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"{path}: the ids of its tokens are not 0 to {len(vocab) - 1}; each must be there once")
        tokens = with_added(path, [token.removesuffix(" ") for token in sorted(vocab, key=vocab.__getitem__)], added)
        if is_unigram:
            super().__init__(path, tokens, [is_special(token) or _begins_word(token) for token in tokens])
        else:
            super().__init__(path, tokens, [not token.startswith("##") for token in tokens])
        # The model sees no text with a space in it, so it never finds these names there.
        special = {token for _, token, flags in added if flags["special"]} | {tokens[i] for i in self.special_ids}
        hidden = {token: f"{token} " if token in special else token for token in vocab}
        if is_unigram:
            model["vocab"] = [[hidden[piece], score] for piece, score in model["vocab"]]
        else:
            model["vocab"] = {hidden[piece]: index for piece, index in vocab.items()}
            model["unk_token"] = hidden.get(model["unk_token"], model["unk_token"])
        held = [t for t in content.get("added_tokens") or [] if not t["special"] or t["id"] >= len(vocab)]
        content["added_tokens"] = held
        content |= {"post_processor": None, "truncation": None, "padding": None}
        try:
            self.pipeline = Library.from_str(json.dumps(content))
        except Exception as error:
            raise ValueError(f"{path} cannot be read by the installed tokenizers: {error}") from error
        self.pipeline.encode_special_tokens = True
        self.folding = Folding(self._becomes("A", "a"), self._becomes("é", "e"))

    def _becomes(self, text: str, folded: str) -> bool:
        normalizer = self.pipeline.normalizer
        return bool(normalizer) and normalizer.normalize_str(text).strip(" ▁") == folded

    def encode(self, text: str) -> list[int]:
        return self.pipeline.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self.pipeline.encode(text, add_special_tokens=False)
        offsets = _with_marks(text, encoding.offsets) if self.folding.strip_accents else encoding.offsets
        return encoding.ids, [_without_space(text, begin, end) for begin, end in offsets]


class SentencePiece(Tokenizer):
    """Pieces of a SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226)."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is no SentencePiece model; make one with `python -m data_prep.vocab`") from error
        tokens = self._model.id_to_piece(list(range(self._model.vocab_size())))
        if lost := lost_tokens(path, tokens):
            raise ValueError(
                f"{path}: added_tokens.json beside it adds {lost[0]!r}, which a SentencePiece model cannot hold; save "
                f"the tokenizer with transformers again, which writes {PIPELINE_FILE}, and give that"
            )
        special = [self._model.is_control(i) or self._model.is_unknown(i) for i in range(len(tokens))]
        super().__init__(path, tokens, [s or _begins_word(token) for s, token in zip(special, tokens, strict=True)])
        self.unk_id = self.special_ids[1] = self._model.unk_id()
        self.folding = Folding(*(self._model.normalize(text).strip("▁") == to for text, to in (("A", "a"), ("é", "e"))))

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._model.encode(text, return_type="offset_mapping")
        offsets = encoding["offsets"]
        if not unicodedata.is_normalized("NFKC", text):
            offsets = [self._whole_span(text, *span) for span in zip(encoding["pieces"], offsets, strict=True)]
        return encoding["ids"], [_without_space(text, begin, end) for begin, end in offsets]

    def _whole_span(self, text: str, piece: str, span: tuple[int, int]) -> tuple[int, int]:
        """A piece that ends inside what one character became (the f of a ligature) has all of that character."""
        begin, end = span
        for stop in (end, end + 1):
            if piece.lstrip("▁") in self._model.normalize(text[begin:stop]):
                return begin, stop
        return span  # an unknown piece: its text was not normalised


class _WordCache(dict):
    """Word -> token ids; a missing word is encoded and kept. Emptied when full: frequent words are back at once."""

    def __init__(self, encoder) -> None:
        super().__init__()
        self._encoder = encoder

    def __missing__(self, word: str) -> list[int]:
        ids = self._encoder.encode(word, add_special_tokens=False).ids
        if len(word) <= LONGEST_CACHED_WORD:
            if len(self) >= CACHE_WORDS:
                self.clear()
            self[word] = ids
        return ids


def load_tokenizer(path: str | Path, cased: bool | None = None) -> Tokenizer:
    """Load a vocabulary: a `*.model` file, a `*.txt` file, a tokenizer.json, or a folder with exactly one of them.

    `cased` is for a `*.txt`: whether capital letters mean something in it, where no file beside it says so; a warning
    tells what is guessed without either. Raises ValueError where there is no vocabulary, more than one, or one that is
    damaged or lacks a special token.
    """
    path = Path(path)
    if path.is_dir():
        found = find_vocabularies(path)
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise ValueError(
                f"folder {path} must hold exactly one vocabulary (*.model, *vocab.txt or tokenizer.json), not {names}; "
                "name the file"
            )
        path = found[0]
    if not path.is_file():
        raise ValueError(
            f"vocabulary {path} does not exist; give a vocab.txt, a SentencePiece *.model, a tokenizer.json or a folder"
        )
    if path.suffix not in (".model", ".txt") and path.name != PIPELINE_FILE:
        raise ValueError(
            f"vocabulary {path} ends in neither .txt (WordPiece) nor .model (SentencePiece), and is no {PIPELINE_FILE};"
            " rename it"
        )
    if path.suffix == ".txt":
        return WordPiece(path, cased)
    tokenizer = SentencePiece(path) if path.suffix == ".model" else Pipeline(path)
    if cased is not None and cased == tokenizer.folding.lower_case:
        raise ValueError(
            f"--{'cased' if cased else 'uncased'}: {path} itself says that it is {'un' if cased else ''}cased; "
            "leave the option out"
        )
    return tokenizer


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether ids mean the same: two *.txt or *.model by their bytes, other kinds of files by their tokens."""
    one_kind = one.path.suffix == other.path.suffix != ".json"
    return one.tokens == other.tokens and (one.sha256 == other.sha256 or not one_kind)


def add_case_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """--cased and --uncased, as args.cased: True, False, or None where neither is given."""
    options = parser.add_mutually_exclusive_group()
    text = "a vocab.txt {}; default: what tokenizer_config.json beside it says, else a guess with a warning"
    options.add_argument(
        "--cased", action="store_true", default=None, help=text.format("tells capital letters from small ones")
    )
    options.add_argument("--uncased", dest="cased", action="store_false", default=None, help="it does not")


def bert_pipeline(tokens: Sequence[str], folding: Folding):
    """The `tokenizers` pipeline behind BertTokenizerFast, without its special-token matching."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    pipeline = Library(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    lower, strip, cjk = folding
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip, handle_chinese_chars=cjk)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return pipeline


def _with_marks(text: str, offsets: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans, each with the combining marks behind it, up to the next."""
    if text.isascii():
        return offsets
    bounds = [*(begin for begin, _ in offsets), len(text)][1:]
    return [(begin, _end_of_marks(text, end, bound)) for (begin, end), bound in zip(offsets, bounds, strict=True)]


def _end_of_marks(text: str, end: int, bound: int) -> int:
    """`end`, moved over combining marks up to `bound`."""
    while end < bound and unicodedata.category(text[end]).startswith("M"):
        end += 1
    return end


def _without_space(text: str, begin: int, end: int) -> tuple[int, int]:
    """The span without white space and invisible characters in front."""
    while begin < end and (text[begin].isspace() or unicodedata.category(text[begin]) in ("Cc", "Cf")):
        begin += 1
    return begin, end


def _begins_word(piece: str) -> bool:
    """A SentencePiece piece begins a word after a space; punctuation and CJK stand for themselves (as in ALBERT)."""
    return (
        piece.startswith("▁")
        or not unicodedata.category(piece[0]).startswith(("L", "M", "N"))
        or bool(_CJK.match(piece))
    )
