"""One interface to all vocabularies: Google's WordPiece (`vocab.txt`), SentencePiece (`*.model`), and either of them
in Hugging Face's `tokenizer.json`.

A vocabulary is one file, identified by the sha256 of its bytes, and has BERT's five special tokens. Text never becomes
a special token: a literal "[MASK]" in a document is spelled with ordinary pieces, as in google-research/bert.

WordPiece ids are those of Hugging Face's BertTokenizerFast: the same Rust code computes the ids of a new word, and a
bounded cache returns them afterwards, which is several times faster.
"""

import json
import re
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.files import sha256_file, write_json
from data_prep.text.vocab_files import (
    OLD_ADDED_FILE,
    PIPELINE_FILE,
    SETTINGS,
    SETTINGS_FILE,
    Folding,
    added_beside,
    added_tokens,
    find_folding,
    find_vocabularies,
    read_object,
    read_vocab_txt,
    special_ids,
    with_added,
)

CACHE_WORDS = 1 << 18  # at some 250 bytes per word, 65 MB
LONGEST_CACHED_WORD = 32  # longer ones are URLs and unspaced scripts, which do not repeat

# The characters that str.split() treats as white space and that BERT deletes as control characters.
_NOT_WHITE_SPACE_IN_BERT = re.compile("[\x0b\x0c\x1c-\x1f\x85]")
_CJK = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002fa1f]")

Span = tuple[int, int]


class Tokenizer:
    """The base class, whose subclasses define `encode` and `encode_with_offsets`. Made by `load_tokenizer`.

    .path, .sha256   the vocabulary file and its identity
    .kind            "wordpiece" or "sentencepiece"
    .folding         whether capital letters and accents are folded away
    .tokens          list[str] of length .vocab_size, by id
    .special_ids     ids of SPECIAL_TOKENS, in that order; also .pad_id .unk_id .cls_id .sep_id .mask_id
    .word_start      bool [V]: the token begins a word, so that whole words can be masked
    """

    kind: str
    folding: Folding

    def __init__(self, path: Path, tokens: list[str]) -> None:
        self.path, self.tokens, self.vocab_size = path, tokens, len(tokens)
        self.sha256 = sha256_file(path)
        begins_word = _begins_word if self.kind == "sentencepiece" else lambda token: not token.startswith("##")
        self.word_start = np.array([begins_word(token) for token in tokens], dtype=bool)
        self.special_ids = special_ids(path, tokens)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without [CLS] and [SEP]."""
        raise NotImplementedError

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        """The ids of `encode`, and for each id the span [begin, end) of its characters in `text`, without white space.

        A character that normalisation splits belongs to each resulting token; an accent that it removes, to its letter.
        """
        raise NotImplementedError

    def decode(self, ids: list[int]) -> str:
        """Readable text of token ids, special tokens by name. What normalisation removed is not restored."""
        if self.kind == "wordpiece":
            return " ".join([self.tokens[i] for i in ids]).replace(" ##", "")
        special = set(self.special_ids)
        pieces = [f"▁{self.tokens[i]}▁" if i in special else self.tokens[i] for i in ids]
        return " ".join("".join(pieces).replace("▁", " ").split())

    def settings(self) -> dict:
        """What `tokenizer_config.json` must add to the vocabulary file; {} if that file is complete."""
        return {}

    def describe(self) -> dict:
        """What manifests record about the vocabulary."""
        identity = {"file": self.path.name, "sha256": self.sha256, "size": self.vocab_size, "kind": self.kind}
        return identity | {"lower_case": self.folding.lower_case, "strip_accents": self.folding.strip_accents}

    def save(self, folder: str | Path) -> Path:
        """Copy the vocabulary file into `folder` under its own name, with its settings, and return the copy's path."""
        if settings := self.settings():
            write_json(Path(folder) / SETTINGS_FILE, settings)
        return Path(shutil.copyfile(self.path, Path(folder) / self.path.name))


class Pipeline(Tokenizer):
    """A vocabulary that the `tokenizers` library runs, as .pipeline. Special tokens are not recognised in text."""

    pipeline: Any

    def encode(self, text: str) -> list[int]:
        return self.pipeline.encode(text, add_special_tokens=False).ids

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self.pipeline.encode(text, add_special_tokens=False)
        begins = [begin for begin, _ in encoding.offsets]
        ends = [end for _, end in encoding.offsets]
        bounds = [*begins, len(text)][1:] if self.folding.strip_accents else ends
        return encoding.ids, list(map(partial(_surface, text), begins, ends, bounds))


class WordPiece(Pipeline):
    """Greedy longest-match pieces of a `vocab.txt` (Wu et al. 2016, arXiv 1609.08144; as in google-research/bert).

    `cased` overrides the files beside it. Without either, case is guessed on first use, with a warning.
    """

    kind = "wordpiece"

    def __init__(self, path: Path, cased: bool | None = None) -> None:
        self._base, self._cased = read_vocab_txt(path), cased
        self.added = added_beside(path, self._base)
        super().__init__(path, with_added(path, self._base, self.added))

    @cached_property
    def folding(self) -> Folding:
        return find_folding(self.path, self._base, self._cased)

    @cached_property
    def pipeline(self) -> Any:
        from tokenizers import AddedToken

        pipeline = bert_pipeline(self._base, self.folding)
        for _, token, flags in self.added:
            pipeline.add_tokens([AddedToken(token, **flags)])
        pipeline.encode_special_tokens = True
        return pipeline

    @cached_property
    def _cache(self) -> "_WordCache":
        return _WordCache(super().encode)

    def encode(self, text: str) -> list[int]:
        if self.added:  # added tokens may contain spaces and occur inside words
            return super().encode(text)
        if _NOT_WHITE_SPACE_IN_BERT.search(text):
            text = _NOT_WHITE_SPACE_IN_BERT.sub("", text)
        return list(chain.from_iterable(map(self._cache.__getitem__, text.split())))

    def settings(self) -> dict:
        added = {str(index): {"content": token, **flags} for index, token, flags in self.added}
        return dict(zip(SETTINGS, self.folding, strict=True)) | ({"added_tokens_decoder": added} if added else {})

    def describe(self) -> dict:
        added = {token: index for index, token, _ in self.added}
        return super().describe() | ({"added_tokens": added} if added else {})


class _WordCache(dict):
    """Word -> token ids, computed for a missing word. A full cache is emptied; frequent words soon return to it."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> list[int]:
        ids = self._encode(word)
        if len(word) <= LONGEST_CACHED_WORD:
            if len(self) >= CACHE_WORDS:
                self.clear()
            self[word] = ids
        return ids


class TokenizerJson(Pipeline):
    """A `tokenizer.json` of WordPiece or of SentencePiece's unigram model."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Library

        content = read_object(path)
        model, listed = content.get("model"), content.get("added_tokens") or []
        kinds = {"WordPiece": "wordpiece", "Unigram": "sentencepiece"}
        if not isinstance(model, dict) or model.get("type") not in kinds:
            raise ValueError(f"{path} is not a tokenizer.json of a WordPiece or Unigram model; give one of these")
        self.kind = kinds[model["type"]]
        is_unigram = self.kind == "sentencepiece"
        vocab = {piece: i for i, (piece, _) in enumerate(model["vocab"])} if is_unigram else dict(model["vocab"])
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"{path}: the ids of its tokens are not 0 to {len(vocab) - 1}, each of them once")
        added = added_tokens({token["id"]: token for token in listed})
        base = [token.removesuffix(" ") for token in sorted(vocab, key=vocab.__getitem__)]
        super().__init__(path, with_added(path, base, added))
        special = {token for _, token, flags in added if flags["special"]} | {self.tokens[i] for i in self.special_ids}

        def unfindable(piece: str) -> str:
            """A special piece ends with a space, so that the model never finds it: its input has no spaces."""
            return f"{piece} " if piece in special else piece

        if is_unigram:
            model["vocab"] = [[unfindable(piece), score] for piece, score in model["vocab"]]
        else:
            model["vocab"] = {unfindable(piece): index for piece, index in vocab.items()}
            model["unk_token"] = unfindable(model["unk_token"])
        content["added_tokens"] = [token for token in listed if not token["special"] or token["id"] >= len(vocab)]
        content |= {"post_processor": None, "truncation": None, "padding": None}
        try:
            self.pipeline = Library.from_str(json.dumps(content))
        except Exception as error:
            raise ValueError(f"{path} cannot be read by the installed tokenizers: {error}") from error
        self.pipeline.encode_special_tokens = True
        normalizer = self.pipeline.normalizer
        self.folding = _tried_folding(normalizer.normalize_str) if normalizer else Folding(False, False)


class SentencePiece(Tokenizer):
    """Pieces of a SentencePiece model (Kudo and Richardson 2018, arXiv 1808.06226)."""

    kind = "sentencepiece"

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            self._model = SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model; `python -m data_prep.vocab` makes one") from error
        super().__init__(path, self._model.id_to_piece(list(range(self._model.vocab_size()))))
        if lost := sorted(read_object(path.with_name(OLD_ADDED_FILE)).keys() - set(self.tokens)):
            raise ValueError(
                f"{path}: {OLD_ADDED_FILE} beside it adds {lost[0]!r}, which a SentencePiece model cannot hold; save "
                f"the tokenizer with transformers again, which writes {PIPELINE_FILE}, and give that"
            )
        self.unk_id = self.special_ids[1] = self._model.unk_id()
        self.folding = _tried_folding(self._model.normalize)

    def encode(self, text: str) -> list[int]:
        return self._model.encode(text)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[Span]]:
        encoding = self._model.encode(text, return_type="offset_mapping")
        spans = encoding["offsets"]
        if not unicodedata.is_normalized("NFKC", text):
            spans = [self._whole_span(text, piece, span) for piece, span in zip(encoding["pieces"], spans, strict=True)]
        return encoding["ids"], [_surface(text, begin, end, end) for begin, end in spans]

    def _whole_span(self, text: str, piece: str, span: Span) -> Span:
        """The span of a piece that ends inside a split character (the f of a ligature), with all of the character."""
        begin, end = span
        for stop in (end, end + 1):
            if piece.lstrip("▁") in self._model.normalize(text[begin:stop]):
                return begin, stop
        return span  # an unknown piece: its text was not normalised


def load_tokenizer(path: str | Path, cased: bool | None = None) -> Tokenizer:
    """Load a vocabulary: a `*.model` file, a `*.txt` file, a tokenizer.json, or a folder with exactly one of them.

    `cased` applies to a `*.txt`: whether it distinguishes capital letters. Raises ValueError if there is no vocabulary
    or more than one, and for a vocabulary that is damaged, lacks a special token or contradicts `cased`.
    """
    path = Path(path)
    found = find_vocabularies(path) if path.is_dir() else [path]
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        kinds = f"*.model, *vocab.txt or {PIPELINE_FILE}"
        raise ValueError(f"folder {path} must hold exactly one vocabulary ({kinds}), not {names}; name the file")
    path = found[0]
    if not path.is_file():
        raise ValueError(
            f"vocabulary {path} does not exist; give a *.txt, *.model, {PIPELINE_FILE} or a folder with one"
        )
    if path.suffix == ".txt":
        return WordPiece(path, cased)
    if path.suffix != ".model" and path.name != PIPELINE_FILE:
        raise ValueError(f"vocabulary {path} is neither *.txt (WordPiece), *.model (SentencePiece) nor {PIPELINE_FILE}")
    tokenizer = SentencePiece(path) if path.suffix == ".model" else TokenizerJson(path)
    if cased is not None and cased == tokenizer.folding.lower_case:
        asked, held = ("cased", "uncased") if cased else ("uncased", "cased")
        raise ValueError(f"--{asked}: {path} states that it is {held}; omit the option")
    return tokenizer


def same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether ids have the same meaning. Two *.txt or *.model are compared by bytes, other files by their tokens."""
    by_bytes = one.path.suffix == other.path.suffix != ".json"
    return one.tokens == other.tokens and (one.sha256 == other.sha256 or not by_bytes)


def bert_pipeline(tokens: Sequence[str], folding: Folding) -> Any:
    """The `tokenizers` pipeline behind BertTokenizerFast, without its special-token matching."""
    from tokenizers import Tokenizer as Library
    from tokenizers import models, normalizers, pre_tokenizers

    vocab = {token: i for i, token in enumerate(tokens)}
    pipeline = Library(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    lower, strip, cjk = folding
    pipeline.normalizer = normalizers.BertNormalizer(lowercase=lower, strip_accents=strip, handle_chinese_chars=cjk)
    pipeline.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return pipeline


def _tried_folding(normalise: Callable[[str], str]) -> Folding:
    """The folding of a normalisation, found by applying it to a capital letter and to an accent."""
    return Folding(*(normalise(text).strip(" ▁") == folded for text, folded in (("A", "a"), ("é", "e"))))


def _surface(text: str, begin: int, end: int, bound: int) -> Span:
    """The span, extended by the combining marks after it up to `bound`, without leading invisible characters."""
    while end < bound and unicodedata.category(text[end]).startswith("M"):
        end += 1
    while begin < end and (text[begin].isspace() or unicodedata.category(text[begin]) in ("Cc", "Cf")):
        begin += 1
    return begin, end


def _begins_word(piece: str) -> bool:
    """Whether a SentencePiece piece begins a word: it follows a space, or is punctuation or CJK (as in ALBERT)."""
    is_text = unicodedata.category(piece[0]).startswith(("L", "M", "N"))
    return piece.startswith("▁") or not is_text or bool(_CJK.match(piece))
