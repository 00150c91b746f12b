"""SQuAD's metric, as published (Rajpurkar et al. 2016, section 6.1; 2018, section 4.1): exact match and word F1 between
the plain forms of two answers, each the maximum over all right answers.

The plain form is lower case, without ASCII punctuation, without the articles a, an and the, and with single spaces.
Punctuation outside ASCII stays, as in the official evaluation. For a question without an answer, the empty string is
right.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence

import numpy as np

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """The plain form in which answers are compared."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def answer_scores(prediction: str, answers: Sequence[str], version: int) -> tuple[float, float]:
    """(exact match, F1) of one question. SQuAD 2.0 drops answers with plain form ""; if none is left, "" is right."""
    predicted, right = normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    if version == 2:
        right = [answer for answer in right if answer] or [""]
    return float(predicted in right), max(_word_f1(predicted.split(), answer.split(), version) for answer in right)


def _word_f1(predicted: list[str], right: list[str], version: int) -> float:
    """Word F1, where repeated words count repeatedly. Two empty answers match in SQuAD 2.0 only."""
    if not predicted or not right:
        return float(version == 2 and predicted == right)
    num_same = (Counter(predicted) & Counter(right)).total()
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(right)
    return 2 * precision * recall / (precision + recall)


def best_threshold(null_odds: np.ndarray, answered: np.ndarray, unanswered: np.ndarray) -> float:
    """The threshold with the highest mean score. Questions whose odds for no answer exceed it are left unanswered.

    All arguments are [E]; the last two are each question's score if it is answered and if it is not. On a tie the
    lowest threshold wins. If it is best to answer no question, the threshold is below all odds.
    """
    order = np.argsort(null_odds, kind="stable")
    odds, gain = null_odds[order], np.cumsum((answered - unanswered)[order])  # of answering the questions up to this
    is_last_of_equals = np.append(odds[1:] != odds[:-1], True)
    gain = np.where(is_last_of_equals, gain, -np.inf)
    best = int(np.argmax(gain))
    return float(odds[best]) if gain[best] > 0 else float(np.nextafter(odds[0], -np.inf))
