"""Filters that drop documents, and scrubbers that replace text in the others. They work on cleaned blocks of text.

By default only empty documents and exact duplicates are dropped. The rules use only letters and repetition, so they
apply to any language. Near-duplicates are found by MinHash (Broder 1997) with the `datasketch` library.
"""

import re
from collections import Counter
from typing import NamedTuple

import numpy as np

NUM_PERMUTATIONS = 128
SHINGLE_WORDS = 5
# A word, or a single Chinese or Japanese character, since these languages put no spaces between words.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]+")
SCRUBBERS = {
    "urls": (re.compile(r"\b(?:https?://|www\.)[^\s<>\"']+[^\s<>\"'.,;:!?)\]]"), "[URL]"),
    "emails": (re.compile(r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+"), "[EMAIL]"),
    # With an international prefix, an area code in brackets, or one kind of separator; bare numbers do not match.
    "phones": (
        re.compile(
            r"(?<![\w.-])(?:\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,4}"
            r"|\(\d{2,5}\) ?\d{2,4}(?:[ .-]\d{2,4}){1,2}|\d{3}([.-])\d{3}\1\d{4})(?![\w-])"
        ),
        "[PHONE]",
    ),
}


class Filters(NamedTuple):
    """Which documents a corpus keeps, and what is scrubbed from them; the defaults keep everything.

    min_characters   minimum number of characters
    min_letters      minimum share of letters among the visible characters (Rae et al. 2021, appendix A1.1, require that
                     80 % of the words contain a letter)
    max_repeated     maximum share of characters in paragraphs that repeat an earlier one (Rae et al.: 20 %)
    scrub            some of SCRUBBERS: "urls", "emails", "phones"
    near_duplicates  minimum Jaccard similarity at which the later of two documents is dropped; None: exact duplicates
    """

    min_characters: int = 1
    min_letters: float = 0.0
    max_repeated: float = 1.0
    scrub: tuple[str, ...] = ()
    near_duplicates: float | None = None


def scrub(blocks: list[str], kinds: tuple[str, ...], counts: Counter[str]) -> list[str]:
    """The blocks with placeholders for addresses and numbers; `counts` gets the replacements as `scrubbed_<kind>`."""
    for kind, (pattern, placeholder) in SCRUBBERS.items():  # URLs first, since they may contain an address
        if kind in kinds:
            replaced = [pattern.subn(placeholder, block) for block in blocks]
            blocks = [block for block, _ in replaced]
            counts[f"scrubbed_{kind}"] += sum(number for _, number in replaced)
    return blocks


def verdict(blocks: list[str], filters: Filters) -> str:
    """The name of the rule that drops a document, or "" to keep it."""
    num_characters = sum(map(len, blocks))
    if num_characters < filters.min_characters:
        return "shorter_than_min_characters"
    if filters.min_letters and _share_of_letters(blocks) < filters.min_letters:
        return "fewer_than_min_letters"
    if filters.max_repeated < 1 and _share_repeated(blocks) > filters.max_repeated:
        return "more_than_max_repeated"
    return ""


def _share_of_letters(blocks: list[str]) -> float:
    visible = sum(len(block) - block.count(" ") for block in blocks)
    return sum(map(str.isalpha, "".join(blocks))) / max(1, visible)


def _share_repeated(blocks: list[str]) -> float:
    total = sum(map(len, blocks))
    return (total - sum(map(len, set(blocks)))) / max(1, total)


def shingles(blocks: list[str]) -> set[str]:
    """All runs of SHINGLE_WORDS consecutive words of a document, in lower case; a shorter document is one run."""
    words = _WORD.findall(" ".join(blocks).lower())
    return {" ".join(words[at : at + SHINGLE_WORDS]) for at in range(max(1, len(words) - SHINGLE_WORDS + 1))}


def signature(blocks: list[str]) -> np.ndarray:
    """MinHash of a document's shingles, uint32 [NUM_PERMUTATIONS]: the share of equal entries estimates similarity."""
    from datasketch import MinHash

    sketch = MinHash(NUM_PERMUTATIONS, scheme="affine32")
    sketch.update_batch([shingle.encode() for shingle in shingles(blocks)])
    return sketch.hashvalues


def first_occurrences(fingerprints: np.ndarray) -> np.ndarray:
    """bool [D]: True for the first document with each of the fingerprints, uint64 [D, 2]."""
    order = np.lexsort((fingerprints[:, 1], fingerprints[:, 0]))  # stable: equal ones stay in order
    ranked = fingerprints[order]
    is_first = np.ones(len(order), bool)
    is_first[order[1:]] = (ranked[1:] != ranked[:-1]).any(axis=1)
    return is_first


class NearDuplicates:
    """The documents kept so far. Locality-sensitive hashing, tuned to miss few, finds candidates for a new document.
    The similarity that the signatures estimate (standard deviation 0.04) then decides.
    """

    def __init__(self, similarity: float) -> None:
        from datasketch import MinHashLSH

        self.similarity = similarity
        self.index = MinHashLSH(similarity, NUM_PERMUTATIONS, weights=(0.1, 0.9))
        self.signatures: list[np.ndarray] = []

    def is_new(self, signature: np.ndarray) -> bool:
        """True if no kept document is as similar to this one as `self.similarity`; this one is then kept, too."""
        from datasketch import MinHash

        sketch = MinHash(hashvalues=signature, scheme="affine32")
        candidates = self.index.query(sketch)
        if any((self.signatures[kept] == signature).mean() >= self.similarity for kept in candidates):
            return False
        self.index.insert(len(self.signatures), sketch, check_duplication=False)
        self.signatures.append(signature.copy())
        return True
