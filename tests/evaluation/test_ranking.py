"""Rankings of WikiQA's shape, their scores worked out by hand."""

import itertools

import numpy as np
import pytest

from evaluation.tasks.by_name import restore_task
from evaluation.tasks.classification import Example, own_task
from evaluation.tasks.metrics import average_precision, reciprocal_rank
from evaluation.tasks.ranking import ranking_task, score_rankings

OFFICIAL = "QuestionID\tQuestion\tDocumentID\tDocumentTitle\tSentenceID\tSentence\tLabel\n"


def outputs(scores):
    """Probabilities of the classes 0 and 1."""
    return np.array([[1 - score, score] for score in scores])


def test_scores_by_hand():
    rows = [("how", 0, 0.9), ("how", 1, 0.8), ("how", 0, 0.7), ("how", 1, 0.1), ("who", 1, 0.6), ("who", 0, 0.2)]
    rows += [("none", 0, 0.9), ("none", 0, 0.1), ("all", 1, 0.1), ("how", 1, 0.05)]
    examples = [Example(question, "s", label) for question, label, _ in rows]
    scores = score_rankings(examples, outputs([score for *_, score in rows]))
    # how: right at places 2, 4 and 5 of 5; who: at place 1 of 2; none and all are not scored.
    assert scores["map"] == pytest.approx(((1 / 2 + 2 / 4 + 3 / 5) / 3 + 1) / 2)
    assert scores["mrr"] == pytest.approx((1 / 2 + 1) / 2)
    assert score_rankings(examples[6:9], outputs([0.5] * 3)) == {"map": None, "mrr": None}


def test_equal_scores_earn_nothing():
    labels, scores = np.array([1, 0, 0, 0]), np.full(4, 0.5)
    assert reciprocal_rank(labels, scores) == average_precision(labels, scores) == 1 / 4


@pytest.mark.parametrize(
    ("labels", "scores", "expected_map", "expected_mrr"),
    [
        ([1, 1, 0], [0.9, 0.9, 0.1], 1, 1),  # right in whatever order the first two come
        ([1, 1, 0], [0.5, 0.5, 0.5], (1 / 2 + 2 / 3) / 2, 1 / 2),
        ([1, 0, 1, 0, 1], [0.9, 0.5, 0.5, 0.5, 0.5], (1 + 2 / 4 + 3 / 5) / 3, 1),
        ([0, 1, 0, 1], [0.9, 0.2, 0.2, 0.1], (1 / 3 + 2 / 4) / 2, 1 / 3),
        ([0, 1, 1], [0.1, 0.5, 0.9], 1, 1),  # without a tie
    ],
)
def test_of_equal_scores_right_answers_come_last(labels, scores, expected_map, expected_mrr):
    for order in itertools.permutations(range(len(labels))):  # whatever the order of the file
        shuffled = np.array(labels)[list(order)], np.array(scores)[list(order)]
        assert average_precision(*shuffled) == pytest.approx(expected_map)
        assert reciprocal_rank(*shuffled) == pytest.approx(expected_mrr)


def test_white_space_does_not_make_another_question():
    examples = [Example("who?", "a", 1), Example("who? ", "b", 0)]
    assert score_rankings(examples, outputs([0.5, 0.9])) == {"map": 0.5, "mrr": 0.5}


@pytest.mark.parametrize(
    "content",
    [OFFICIAL + "Q0\thow?\tD0\tT\tD0-0\tso\t1\nQ0\thow?\tD0\tT\tD0-1\tno \"\t0\n",
     "question\tsentence\tlabel\nhow?\tso\t1\nhow?\tno \"\t0\n"],
)  # fmt: skip
def test_both_headers(tmp_path, content):
    (tmp_path / "train.tsv").write_text(content, encoding="utf-8")
    task = ranking_task(own_task("ranking", tmp_path, dev_file="train.tsv"))
    assert task.read(tmp_path / "train.tsv", True) == [Example("how?", "so", 1), Example("how?", 'no "', 0)]
    assert restore_task(task.settings, {}).metrics == ("map", "mrr")


def test_another_label_and_a_missing_column_are_named(tmp_path):
    for content, message in (
        ("question\tsentence\tlabel\na\tb\t2\n", r"train.tsv:2: label '2' is outside task ranking, .* '0', '1'"),
        ("question\tlabel\na\t1\n", r"train.tsv:2: column 'sentence' is missing"),
    ):
        (tmp_path / "train.tsv").write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            ranking_task(own_task("ranking", tmp_path, dev_file="train.tsv")).read(tmp_path / "train.tsv", True)
