"""Files in CoNLL's format: a word a line, its tag in the last column, a blank line after each sentence.

    -DOCSTART- -X- O O

    U.N. NNP I-NP I-ORG
    official NN I-NP O

Columns are separated by spaces or tabs; -DOCSTART- lines are passed over. Tags are O or a prefix and a type, in one of
three schemes, told apart by the file itself and then held against every line:

    IOB1    I- throughout; B- where an entity follows another one of its type. CoNLL-2003 as published is IOB1 and has
            two B- in 23,499 entities that are not needed; they are unambiguous, so B- may begin any entity
    IOB2    B- begins every entity, I- goes on
    BIOES   B- begins, I- goes on, E- ends an entity of several words; S- is one of a single word

They are read as IOB2.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from evaluation.tasks.rows import read_utf8

SCHEMES = ("iob1", "iob2", "bioes")
_PREFIXES = {"iob1": "BI", "iob2": "BI", "bioes": "BIES"}
_TAG = re.compile(r"O|[BIES]-.+")


class Word(NamedTuple):
    """One line: its number counted from 1, the first column, the last one (the word itself if there is no other)."""

    line: int
    text: str
    tag: str


class Sentence(NamedTuple):
    """Words and their IOB2 tags; None in a file without tags."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None


def read_words(path: Path, labelled: bool) -> list[list[Word]]:
    """The sentences of a file line by line. Raises ValueError, with file and line, for bytes that are no UTF-8, a line
    without a tag or with another number of columns than the first one, a carriage return inside a line, what is no tag,
    and a file without a word.
    """
    if not path.is_file():
        present = sorted(p.name for p in path.parent.glob("*") if p.is_file()) if path.parent.is_dir() else []
        raise ValueError(
            f"{path} does not exist; the folder holds {', '.join(present[:10]) or 'no file'}: name the right one"
        )
    sentences = list(_sentences(path, read_utf8(path), labelled))
    if not sentences:
        raise ValueError(f"{path} holds no word; a line is a word and its tag, a blank line ends a sentence")
    return sentences


def _sentences(path: Path, text: str, labelled: bool) -> Iterator[list[Word]]:
    sentence, num_columns = [], None
    for line, row in enumerate([*text.split("\n"), ""], 1):
        row = row.strip(" \t\r")
        if not row or row.startswith("-DOCSTART-"):
            if sentence:
                yield sentence
            sentence = []
            continue
        if "\r" in row:
            raise ValueError(f"{path}:{line}: a carriage return inside a line; end each line with a line feed")
        columns = re.split("[ \t]+", row)
        num_columns = num_columns or len(columns)
        if labelled and len(columns) < 2:
            raise ValueError(f"{path}:{line}: {row!r} has no tag; a line is a word, other columns if any, and its tag")
        if len(columns) != num_columns:
            raise ValueError(f"{path}:{line}: {len(columns)} columns where the first line has {num_columns}: {row!r}")
        if labelled and not _TAG.fullmatch(columns[-1]):
            raise ValueError(f"{path}:{line}: {columns[-1]!r} is no tag; O, or B-, I-, E- or S- and a type are due")
        sentence.append(Word(line, columns[0], columns[-1]))


def _split(tag: str) -> tuple[str, str]:
    """Prefix and type: ("B", "PER"), ("O", "")."""
    prefix, _, kind = tag.partition("-")
    return prefix, kind


def _neighbours(words: Sequence[Word]) -> Iterable[tuple[Word, str, str]]:
    """Each word with the tag before it and the one after it, O at the ends."""
    tags = ["O", *(word.tag for word in words), "O"]
    return zip(words, tags, tags[2:], strict=False)


def tell_scheme(sentences: Sequence[Sequence[Word]]) -> str:
    """The scheme of a file's tags, by what most of its entities begin with."""
    if any(word.tag[:2] in ("E-", "S-") for words in sentences for word in words):
        return "bioes"
    beginnings = [
        word.tag[0] for words in sentences for word, before, _ in _neighbours(words) if before[2:] != word.tag[2:]
    ]
    return "iob1" if beginnings.count("I") > beginnings.count("B") else "iob2"


def _is_allowed(scheme: str, tag: str, before: str, after: str) -> bool:
    """Whether `scheme` has this tag between these two."""
    prefix, kind = _split(tag)
    if scheme == "iob1":
        return True
    if scheme == "iob2":
        return prefix != "I" or _split(before)[1] == kind
    goes_on = after in (f"I-{kind}", f"E-{kind}")
    went_on = before in (f"B-{kind}", f"I-{kind}")
    return {"O": not goes_on, "S": not went_on and not goes_on, "B": goes_on, "I": went_on and goes_on,
            "E": went_on}[prefix]  # fmt: skip


def as_iob2(path: Path, words: Sequence[Word], scheme: str) -> tuple[str, ...]:
    """The tags of a sentence in IOB2. Raises ValueError, with the line, for one that the scheme does not have there."""
    tags = []
    for word, before, after in _neighbours(words):
        prefix, kind = _split(word.tag)
        if prefix != "O" and prefix not in _PREFIXES[scheme] or not _is_allowed(scheme, word.tag, before, after):
            raise ValueError(
                f"{path}:{word.line}: {word.tag} between {before} and {after} is no {scheme.upper()}; correct the tag, "
                f"or name the scheme with --tag-scheme {' or '.join(s for s in SCHEMES if s != scheme)}"
            )
        begins = prefix in "BS" or (scheme == "iob1" and _split(before)[1] != kind)
        tags.append("O" if prefix == "O" else f"{'B' if begins else 'I'}-{kind}")
    return tuple(tags)


def read_conll(path: Path, labelled: bool, scheme: str) -> list[Sentence]:
    """All sentences of a file whose tags are of this scheme, with IOB2 tags; ValueError as `read_words`, `as_iob2`."""
    return [
        Sentence(tuple(word.text for word in words), as_iob2(path, words, scheme) if labelled else None)
        for words in read_words(path, labelled)
    ]
