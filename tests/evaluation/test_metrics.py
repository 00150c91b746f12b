"""Metrics against values worked out by hand from their definitions, and on degenerate input."""

import math

import numpy as np
import pytest

from evaluation.tasks.metrics import METRICS, score, spread

LABELS = np.array([1, 1, 1, 0, 0])
PREDICTIONS = np.array([1, 1, 0, 1, 0])  # 2 true positives, 1 false negative, 1 false positive, 1 true negative


def test_classification_metrics_by_hand():
    scores = score(("accuracy", "f1", "macro_f1", "mcc"), LABELS, PREDICTIONS)
    assert scores["accuracy"] == pytest.approx(3 / 5)
    assert scores["f1"] == pytest.approx(2 / 3)
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["mcc"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2))


def test_correlations_by_hand_with_ties():
    scores = score(("pearson", "spearman"), np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.0, 2.0, 8.0]))
    assert scores["pearson"] == pytest.approx(11 / math.sqrt(5 * 34))
    assert scores["spearman"] == pytest.approx(4.5 / math.sqrt(5 * 4.5))


@pytest.mark.parametrize(
    ("name", "labels", "predictions", "expected"),
    [
        ("mcc", [0, 1, 1], [1, 1, 1], 0.0),
        ("mcc", [1, 1], [1, 1], 0.0),
        ("f1", [0, 0], [0, 0], 0.0),
        ("f1", [0, 1], [0, 0], 0.0),
        ("f1", [1, 1], [1, 1], 1.0),
        ("macro_f1", [2, 2], [2, 2], 1.0),
        ("accuracy", [0], [0], 1.0),
        ("pearson", [1.0, 2.0], [3.0, 3.0], math.nan),
        ("spearman", [1.0, 1.0], [3.0, 4.0], math.nan),
        ("pearson", [1.0], [1.0], math.nan),
    ],
)
def test_degenerate_input(name, labels, predictions, expected):
    assert METRICS[name](np.array(labels), np.array(predictions)) == pytest.approx(expected, nan_ok=True)


def test_spread_over_seeds():
    assert spread([0.5, 0.7, 0.9]) == pytest.approx({"mean": 0.7, "median": 0.7, "std": 0.2, "min": 0.5, "max": 0.9})
    assert spread([0.5])["std"] == 0.0
    assert set(spread([0.5, None]).values()) == {None}
