"""Filters on texts with an obvious verdict, MinHash against the true Jaccard similarity."""

from collections import Counter

import numpy as np
import pytest

from data_prep.text.filters import (
    NUM_PERMUTATIONS,
    Filters,
    NearDuplicates,
    first_occurrences,
    scrub,
    shingles,
    signature,
    verdict,
)

WORDS = [f"word{i}" for i in range(3_000)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see https://a.org/x?y=1#z, or www.b.com.", "see [URL], or [URL]."),
        ("write to jo.e+x@mail.example.org!", "write to [EMAIL]!"),
        ("call +49 30 1234567, (030) 123 4567 or 212-555-0199", "call [PHONE], [PHONE] or [PHONE]"),
        ("in 1914-1918, 3.14159 and 10,000 of ISBN 0-306-40615-2", None),
        ("电话 +86 10 6552 9988。", "电话 [PHONE]。"),
        ("version 1.2.3 of 2020-11-21 costs 1 234 567", None),
    ],
)
def test_scrubbing(text, expected):
    counts = Counter()
    (scrubbed,) = scrub([text], ("emails", "phones", "urls"), counts)
    assert scrubbed == (expected or text)
    assert sum(counts.values()) == sum(scrubbed.count(mark) for mark in ("[URL]", "[EMAIL]", "[PHONE]"))


def test_only_the_requested_kinds_are_scrubbed():
    assert scrub(["a@b.org www.c.org"], ("urls",), Counter()) == ["a@b.org [URL]"]
    assert scrub([], ("urls",), Counter()) == []


@pytest.mark.parametrize(
    ("blocks", "filters", "expected"),
    [
        (["short"], Filters(min_characters=6), "shorter_than_min_characters"),
        (["1 2 3 4 5 6 a"], Filters(min_letters=0.5), "fewer_than_min_letters"),
        (["日本語の文章"], Filters(min_letters=0.9), ""),
        (["menu", "text of its own", "menu", "menu"], Filters(max_repeated=0.2), "more_than_max_repeated"),
        (["menu", "text of its own", "menu"], Filters(max_repeated=0.2), ""),
        (["!!!", "!!!"], Filters(), ""),
    ],
)
def test_verdicts(blocks, filters, expected):
    assert verdict(blocks, filters) == expected


def test_the_first_of_equal_fingerprints_stays():
    random = np.random.default_rng(0)
    fingerprints = random.integers(0, 4, (500, 2)).astype(np.uint64)
    seen, expected = set(), []
    for row in fingerprints.tolist():
        expected.append(tuple(row) not in seen)
        seen.add(tuple(row))
    assert first_occurrences(fingerprints).tolist() == expected
    assert first_occurrences(fingerprints[:0]).tolist() == []


def test_signatures_estimate_similarity():
    """Against the true Jaccard similarity of the shingles; 128 permutations have a deviation of at most 0.044."""
    text = " ".join(WORDS[:400])
    for num_changed in (0, 40, 200):
        other = " ".join(WORDS[num_changed : 400 + num_changed])
        a, b = ({tuple(t.split()[i : i + 5]) for i in range(396)} for t in (text, other))
        estimate = (signature([text]) == signature([other])).mean()
        assert estimate == pytest.approx(len(a & b) / len(a | b), abs=0.13)


def test_shingles_are_words_or_characters():
    assert shingles(["Don't stop", "me now!"]) == {"don t stop me now"}
    assert shingles(["日本語の文章a1"]) == {"日 本 語 の 文", "本 語 の 文 章", "語 の 文 章 a1"}
    assert shingles(["two words"]) == {"two words"}


def test_near_duplicates_are_found_and_others_kept():
    random = np.random.default_rng(1)
    index = NearDuplicates(0.8)
    texts = [" ".join(random.choice(WORDS, 300)) for _ in range(20)]
    assert all(index.is_new(signature([text])) for text in texts)
    assert not any(index.is_new(signature([text + " and a line more"])) for text in texts)
    assert index.is_new(signature([" ".join(random.choice(WORDS, 300))]))


@pytest.mark.parametrize("similarity, share", [(0.7, (0, 0.02)), (0.9, (0.98, 1))])
def test_near_duplicates_are_distinguished_from_less_similar_documents(similarity, share):
    """At a threshold of 0.8, over 200 pairs of signatures of a known similarity."""
    random = np.random.default_rng(2)
    index, num_found = NearDuplicates(0.8), 0
    for _ in range(200):
        first = random.integers(0, 1 << 32, NUM_PERMUTATIONS, dtype=np.uint32)
        assert index.is_new(first)
        changed = random.permutation(NUM_PERMUTATIONS)[: round((1 - similarity) * NUM_PERMUTATIONS)]
        second = first.copy()
        second[changed] = random.integers(0, 1 << 32, len(changed), dtype=np.uint32)
        num_found += not index.is_new(second)
    assert share[0] <= num_found / 200 <= share[1]
