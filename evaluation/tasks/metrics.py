"""Metrics, computed by scikit-learn and scipy. With constant predictions a correlation is undefined and the Matthews
coefficient is 0. F1 is 0 where it would divide by zero.

The two ranking metrics are implemented here, because scikit-learn's average precision treats ties differently.
"""

import math
import statistics
import warnings
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def _correlation(function: Callable, labels: np.ndarray, predictions: np.ndarray) -> float:
    """The correlation of [E] scores; nan if it is undefined."""
    if len(labels) < 2:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return function(labels, predictions)[0]


METRICS = {  # (labels [E], predictions [E]) -> score
    "accuracy": accuracy_score,
    "f1": partial(f1_score, zero_division=0),  # of class 1, for the classes 0 and 1
    "macro_f1": partial(f1_score, average="macro", zero_division=0),  # unweighted mean over the classes that occur
    "mcc": matthews_corrcoef,
    "pearson": partial(_correlation, pearsonr),
    "spearman": partial(_correlation, spearmanr),  # ties share their mean rank
}


def score(names: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float | None]:
    """The named metrics; None for an undefined one. Both arrays: [E] class indices, or scores."""
    values = {name: float(METRICS[name](labels, predictions)) for name in names}
    return {name: None if math.isnan(value) else value for name, value in values.items()}


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean of the precisions at the ranks of a question's right answers. labels: [n] of 0 and 1, scores: [n]."""
    ranks = right_ranks(labels, scores)
    return float(np.mean(np.arange(1, len(ranks) + 1) / ranks))


def reciprocal_rank(labels: np.ndarray, scores: np.ndarray) -> float:
    """1 / rank of a question's first right answer. labels: [n] of 0 and 1, scores: [n]."""
    return float(1 / right_ranks(labels, scores)[0])


def right_ranks(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The ranks, from 1, of a question's right answers in the order of falling scores.

    Among equal scores the right answers come last, so that the order of a file cannot improve a score: the "realistic"
    order of Cabanac et al. 2010 (Tie-Breaking Bias, CLEF). labels: [n] of 0 and 1 with at least one 1, scores: [n].
    """
    return np.flatnonzero(labels[np.lexsort((labels, -scores))]) + 1


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """One score over several seeds: mean, median, sample standard deviation (0 for one seed), minimum and maximum.

    All are None if the score of one seed is undefined, because the mean of the others would be too high.
    """
    if None in values:
        return dict.fromkeys(("mean", "median", "std", "min", "max"))
    return {
        "mean": statistics.fmean(values),
        "median": statistics.median(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "min": min(values),
        "max": max(values),
    }
