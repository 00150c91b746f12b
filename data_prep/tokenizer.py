"""One face for both vocabulary kinds: Google's WordPiece (`vocab.txt`) and SentencePiece (`*.model`).

A vocabulary is one file, known by the sha256 of its bytes, and has the five special tokens of BERT. Text never becomes
a special token: a literal "[MASK]" in a document is spelled with ordinary pieces, as in google-research/bert.

WordPiece ids are those of Hugging Face's BertTokenizerFast. They come from the same Rust code on a word's first sight
and from a bounded cache afterwards: words repeat, so looking them up is several times faster than cutting them again.
"""

import re
import shutil
import unicodedata
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from data_prep.cli import sha256_file

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CACHE_WORDS = 1 << 18  # at some 250 bytes a word, 65 MB
LONGEST_CACHED_WORD = 32  # longer ones are URLs and unspaced scripts, which do not repeat

# The characters that str.split() takes for white space and that BERT deletes as control characters.
_NOT_WHITE_SPACE_IN_BERT = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")


class Tokenizer:
    """What both kinds share; `encode` and `decode` belong to the kind. Made by `load_tokenizer`.

    .path, .sha256   the vocabulary file and its identity
    .kind            "wordpiece" or "sentencepiece"
    .lowercase       True when capital letters are folded away
    .tokens          list[str] of length .vocab_size, by id
    .pad_id .unk_id .cls_id .sep_id .mask_id
    .word_start      bool [V]: the token begins a word, so that whole words can be masked
    """

    kind: str
    lowercase: bool

    def __init__(self, path: Path, tokens: list[str], word_start: list[bool]) -> None:
        self.path, self.tokens, self.vocab_size = path, tokens, len(tokens)
        self.sha256 = sha256_file(path)
        self.word_start = np.array(word_start, dtype=bool)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = _special_ids(path, tokens)

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
        raise NotImplementedError

    def save(self, folder: str | Path) -> Path:
        """Copy the vocabulary file into `folder` under its own name and return the copy's path."""
        return Path(shutil.copyfile(self.path, Path(folder) / self.path.name))


class WordPiece(Tokenizer):
    """Greedy longest-match pieces of a `vocab.txt` (Wu et al. 2016, arXiv 1609.08144; as in google-research/bert)."""

    kind = "wordpiece"

    def __init__(self, path: Path) -> None:
        tokens = _read_vocab_txt(path)
        super().__init__(path, tokens, [not token.startswith("##") for token in tokens])
        self.lowercase = not any(token != token.lower() for token in tokens if not re.fullmatch(r"\[.*\]|<.*>", token))
        self._pipeline = bert_pipeline(tokens, self.lowercase)
        self._cache = _WordCache(self._pipeline)

    def encode(self, text: str) -> list[int]:
        if _NOT_WHITE_SPACE_IN_BERT.search(text):
            text = _NOT_WHITE_SPACE_IN_BERT.sub("", text)
        return list(chain.from_iterable(map(self._cache.__getitem__, text.split())))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoding = self._pipeline.encode(text, add_special_tokens=False)
        offsets = encoding.offsets
        if self.lowercase and not text.isascii():
            bounds = [*(begin for begin, _ in offsets), len(text)][1:]
            offsets = [
                (begin, _end_of_marks(text, end, bound)) for (begin, end), bound in zip(offsets, bounds, strict=True)
            ]
        return encoding.ids, offsets

    def decode(self, ids: list[int]) -> str:
        return " ".join([self.tokens[i] for i in ids]).replace(" ##", "")


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
        special = [self._model.is_control(i) or self._model.is_unknown(i) for i in range(len(tokens))]
        super().__init__(path, tokens, [s or _begins_word(token) for s, token in zip(special, tokens, strict=True)])
        self.lowercase = self._model.normalize("A").strip("▁") == "a"
        self._special_ids = frozenset(i for i, s in enumerate(special) if s)

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

    def decode(self, ids: list[int]) -> str:
        pieces = [f"▁{self.tokens[i]}▁" if i in self._special_ids else self.tokens[i] for i in ids]
        return " ".join("".join(pieces).replace("▁", " ").split())


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


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Load a vocabulary: a `*.model` file, a `*.txt` file, or a folder with exactly one `*.model` or `*vocab.txt`.

    Raises ValueError where there is none, more than one, or one that is damaged or lacks a special token.
    """
    path = Path(path)
    if path.is_dir():
        found = sorted([*path.glob("*.model"), *path.glob("*vocab.txt")])
        if len(found) != 1:
            names = ", ".join(p.name for p in found) or "none"
            raise ValueError(
                f"folder {path} must hold exactly one vocabulary (*.model or *vocab.txt), not {names}; name the file"
            )
        path = found[0]
    if not path.is_file():
        raise ValueError(
            f"vocabulary {path} does not exist; give a vocab.txt, a SentencePiece *.model or a folder with one"
        )
    if path.suffix not in (".model", ".txt"):
        raise ValueError(f"vocabulary {path} ends in neither .txt (WordPiece) nor .model (SentencePiece); rename it")
    return SentencePiece(path) if path.suffix == ".model" else WordPiece(path)


def _special_ids(path: Path, tokens: list[str]) -> list[int]:
    """Ids of SPECIAL_TOKENS; ALBERT's public models call the first two <pad> and <unk>."""
    ids = {token: i for i, token in enumerate(tokens)}
    missing = [name for name in SPECIAL_TOKENS if name not in ids and _albert_name(name) not in ids]
    if missing:
        raise ValueError(
            f"vocabulary {path} has no {', '.join(missing)}; BERT needs {' '.join(SPECIAL_TOKENS)}: "
            "train one with `python -m data_prep.vocab` or take one of BERT's"
        )
    return [ids.get(name, ids.get(_albert_name(name))) for name in SPECIAL_TOKENS]


def _albert_name(name: str) -> str:
    return f"<{name[1:-1].lower()}>"


def _read_vocab_txt(path: Path) -> list[str]:
    try:
        tokens = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"vocabulary {path} is not UTF-8 text (byte {error.start}); a vocab.txt has one token a line"
        ) from error
    first_line: dict[str, int] = {}
    for line, token in enumerate(tokens, start=1):
        if first_line.setdefault(token, line) != line:
            raise ValueError(
                f"vocabulary {path} has token {token!r} on lines {first_line[token]} and {line}; "
                "every token must be unique: remove one"
            )
    return tokens


def bert_pipeline(tokens: Sequence[str], lowercase: bool):
    """The `tokenizers` pipeline behind BertTokenizerFast, without its special-token matching."""
    from tokenizers import Tokenizer as Pipeline
    from tokenizers import models, normalizers, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    pipeline = Pipeline(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return pipeline


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
