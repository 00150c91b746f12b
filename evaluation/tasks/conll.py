"""Files in CoNLL's format: one word per line, its tag in the last column, and a blank line after each sentence.

    -DOCSTART- -X- O O

    U.N. NNP I-NP I-ORG
    official NN I-NP O

Columns are separated by spaces or tabs; -DOCSTART- lines are skipped. A tag is O, or a prefix and a type in one of
three schemes:

    iob1    I- throughout, and B- where an entity directly follows another one of its type. The published CoNLL-2003
            has two more B- in 23,499 entities. They are unambiguous, so B- may begin any entity
    iob2    B- begins every entity, I- continues it
    bioes   B- begins and E- ends an entity of several words, I- is between them; S- is an entity of one word

All schemes are converted to IOB2 by seqeval's rules, which are those of CoNLL's official evaluation.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from seqeval.metrics.sequence_labeling import get_entities

from evaluation.tasks.rows import read_utf8

SCHEMES = ("iob1", "iob2", "bioes")
_TAG = re.compile(r"O|[BIES]-.+")


class Word(NamedTuple):
    """One line of a file: its number, from 1, and its first and last column."""

    line: int
    text: str
    tag: str


class Sentence(NamedTuple):
    """Words and their IOB2 tags, or None in a file without tags."""

    words: tuple[str, ...]
    tags: tuple[str, ...] | None


def read_conll(path: Path, labelled: bool, scheme: str) -> list[Sentence]:
    """All sentences of a file with tags of this scheme; ValueError as `read_words` and `as_iob2`."""
    return [
        Sentence(tuple(word.text for word in words), as_iob2(path, words, scheme) if labelled else None)
        for words in read_words(path, labelled)
    ]


def read_words(path: Path, labelled: bool) -> list[list[Word]]:
    """The sentences of a file, with their tags as written.

    Raises ValueError, with file and line, for bytes that are not UTF-8, a line without a tag or with another number of
    columns than the first one, a carriage return inside a line, an invalid tag, and a file without words.
    """
    sentences = list(_sentences(path, read_utf8(path), labelled))
    if not sentences:
        raise ValueError(f"{path} holds no words; write a word and its tag per line, and a blank line after a sentence")
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
            raise ValueError(f"{path}:{line}: {row!r} has no tag; write a word, other columns if any, and its tag")
        if len(columns) != num_columns:
            raise ValueError(f"{path}:{line}: {len(columns)} columns where the first line has {num_columns}: {row!r}")
        if labelled and not _TAG.fullmatch(columns[-1]):
            raise ValueError(f"{path}:{line}: {columns[-1]!r} is not a tag; write O, or B-, I-, E- or S- and a type")
        sentence.append(Word(line, columns[0], columns[-1]))


def guess_scheme(sentences: Sequence[Sequence[Word]]) -> str:
    """The scheme of a file: bioes if it has E- or S-, else iob1 or iob2 by the prefix that begins most entities."""
    tags = [["O", *(word.tag for word in words)] for words in sentences]
    if any(tag[:2] in ("E-", "S-") for sentence in tags for tag in sentence):
        return "bioes"
    begins = Counter(tag[0] for sentence in tags for before, tag in pairwise(sentence) if before[2:] != tag[2:])
    return "iob1" if begins["I"] > begins["B"] else "iob2"


def as_iob2(path: Path, words: Sequence[Word], scheme: str) -> tuple[str, ...]:
    """The tags of a sentence in IOB2; ValueError, with the line, for a tag that `scheme` does not allow there."""
    tags = [word.tag for word in words]
    iob2 = ["O"] * len(tags)
    for kind, first, last in get_entities(tags):
        iob2[first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
    # The tags are valid if `scheme` writes these entities with the same tags. In IOB1, I- and B- may begin an entity.
    if scheme == "iob1":
        valid = [tag[0] in "OBI" for tag in tags]
    else:
        written = iob2 if scheme == "iob2" else _as_bioes(iob2)
        valid = [tag == expected for tag, expected in zip(tags, written, strict=True)]
    if False in valid:
        index = valid.index(False)
        before, tag, after = ["O", *tags, "O"][index : index + 3]
        raise ValueError(
            f"{path}:{words[index].line}: {tag} between {before} and {after} is not {scheme.upper()}; correct the tag, "
            f"or name the scheme with --tag-scheme {' or '.join(other for other in SCHEMES if other != scheme)}"
        )
    return tuple(iob2)


def _as_bioes(iob2: Sequence[str]) -> list[str]:
    """An entity's last tag becomes E-, or S- if it is the only one."""
    last = {"B": "S", "I": "E", "O": "O"}
    return [
        tag if after.startswith("I") else last[tag[0]] + tag[1:]
        for tag, after in zip(iob2, [*iob2[1:], "O"], strict=True)
    ]
