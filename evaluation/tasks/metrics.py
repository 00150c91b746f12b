"""Scores of predictions, as pure functions over scikit-learn and scipy: the library's value, also where the input is
degenerate. Those of rankings are written here: libraries differ on equal scores.

`f1` is that of class 1, as in GLUE's MRPC and QQP. A correlation with constant predictions is undefined and comes back
as nan; the Matthews coefficient and F1 are 0 there, by definition of the library.
"""

import statistics
import warnings
from collections.abc import Sequence

import numpy as np
from scipy.stats import ConstantInputWarning, pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Share of equal class indices. Both arguments: [B]."""
    return float(accuracy_score(labels, predictions))


def f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """F1 of class 1 against class 0. Both arguments: [B] of 0 and 1."""
    return float(f1_score(labels, predictions, labels=[0, 1], pos_label=1, average="binary", zero_division=0))


def macro_f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Unweighted mean of the F1 of each class that occurs. Both arguments: [B] class indices."""
    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def mcc(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Matthews correlation coefficient (CoLA's metric). Both arguments: [B] class indices."""
    return float(matthews_corrcoef(labels, predictions))


def pearson(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Pearson's linear correlation; nan if either side is constant. Both arguments: [B] scores."""
    return _correlation(pearsonr, labels, predictions)


def spearman(labels: np.ndarray, predictions: np.ndarray) -> float:
    """Spearman's rank correlation, ties sharing their mean rank; nan if either side is constant. Both arguments: [B]
    scores.
    """
    return _correlation(spearmanr, labels, predictions)


def _correlation(function, labels: np.ndarray, predictions: np.ndarray) -> float:
    if len(labels) < 2:
        return float("nan")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(function(labels, predictions)[0])


def average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Mean of the precision at each right answer's place, of one question. labels: [n] 0 and 1, scores: [n]."""
    places = right_places(labels, scores)
    return float(np.mean(np.arange(1, len(places) + 1) / places))


def reciprocal_rank(labels: np.ndarray, scores: np.ndarray) -> float:
    """1 / place of the first right answer, of one question. labels: [n] 0 and 1, scores: [n]."""
    return float(1 / right_places(labels, scores)[0])


def right_places(labels: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """The places, counted from 1, of the right answers of a question, by falling scores. Of equal scores the right
    answers come last: the "realistic" order of Cabanac et al. 2010 (Tie-Breaking Bias, CLEF), in which neither the
    order of a file nor a name earns anything. labels: [n] 0 and 1 with a 1, scores: [n].
    """
    return np.flatnonzero(labels[np.lexsort((labels, -scores))]) + 1


METRICS = {function.__name__: function for function in (accuracy, f1, macro_f1, mcc, pearson, spearman)}


def score(names: Sequence[str], labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Compute the named metrics over one data set: {name: value}. labels, predictions: [B] class indices, or scores."""
    return {name: METRICS[name](labels, predictions) for name in names}


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Summarise one score over seeds: mean, median, sample standard deviation (0 for one seed), minimum and maximum.

    All are None when the score of one seed is undefined: a mean of the others would flatter.
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
