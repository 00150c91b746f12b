"""SQuAD's metric: every expected value was worked out by hand from the published definition."""

import numpy as np
import pytest

from evaluation.tasks.squad_metric import answer_scores, best_threshold, normalize_answer


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Denver\tBroncos!", "denver broncos"),
        ("an apple a day", "apple day"),
        ("Theatre of the Anthem", "theatre of anthem"),  # articles are whole words
        ("the-a-an", "theaan"),  # punctuation goes first and is not a space
        ("Levi's", "levis"),
        ("U.S. $5,000.50", "us 500050"),
        ("24–10", "24–10"),  # no ASCII punctuation
        ("“Élan” a\u00a0b", "“élan” b"),
        ("ÅNGSTRÖM the ß", "ångström ß"),
        ("日本 the 語", "日本 語"),
        ("a", ""),
        ("", ""),
    ],
)
def test_the_plain_form(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("Denver Broncos", ["the denver broncos."], 1, 1),
        ("Denver Broncos", ["Denver"], 0, 2 / 3),  # precision 1/2, recall 1
        ("Denver", ["Denver Broncos team"], 0, 1 / 2),  # precision 1, recall 1/3
        ("one two two", ["two two two"], 0, 2 / 3),  # two of three on both sides
        ("in 1999", ["1998", "in 1999, May", "1999"], 0, 4 / 5),  # the best of 0, 2*1*(2/3)/(5/3) and 2/3
        ("Paris", ["London"], 0, 0),
        ("24–10", ["24-10"], 0, 0),  # 24–10 and 2410
        ("café", ["cafe\u0301"], 0, 0),  # composed and decomposed are two strings
        ("", ["Paris"], 0, 0),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_exact_match_and_f1(prediction, answers, exact, f1, version):
    assert answer_scores(prediction, answers, version) == (exact, pytest.approx(f1))


@pytest.mark.parametrize(
    ("prediction", "answers", "version", "expected"),
    [
        ("", [], 2, (1, 1)),
        ("Paris", [], 2, (0, 0)),
        ("the", [], 2, (1, 1)),  # its plain form is empty
        ("", ["the", "Paris"], 2, (0, 0)),  # an answer without a plain form does not count
        ("", ["the"], 2, (1, 1)),  # ... so there is none
        ("a", ["the"], 1, (1, 0)),  # both are empty: equal, and no word in common
    ],
)
def test_empty_answers(prediction, answers, version, expected):
    assert answer_scores(prediction, answers, version) == expected


@pytest.mark.parametrize(
    ("odds", "answered", "unanswered", "expected"),
    [
        ([-2, 1, 3], [1, 0.5, 0], [0, 0, 1], 1),  # answer the first two
        ([-2, 1, 3], [0, 0, 0], [1, 1, 0], -2),  # answer none: below all odds
        ([3, 1, -2], [1, 1, 1], [0, 0, 0], 3),  # answer all, whatever their order
        ([1, 1, 2], [1, 0, 0], [0, 0.5, 1], 1),  # equal odds are answered together: +1 - 0.5
        ([1, 1, 2], [1, 0, 0], [0, 1.5, 1], 1),  # ... or not at all
    ],
)
def test_the_best_threshold(odds, answered, unanswered, expected):
    threshold = best_threshold(np.array(odds, float), np.array(answered, float), np.array(unanswered, float))
    assert threshold == pytest.approx(expected)
    totals = {
        t: sum(a if o <= t else u for o, a, u in zip(odds, answered, unanswered, strict=True))
        for t in (*odds, min(odds) - 1, threshold)
    }
    assert totals[threshold] == max(totals.values())
