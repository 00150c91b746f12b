"""SQuAD's metric from its published definition (Rajpurkar et al. 2016, section 6.1; 2018, section 4.1): exact match and
F1 of words, after both answers are put into a plain form; the maximum over all right answers.

The plain form is in small letters, without ASCII punctuation, without the articles a, an and the, and with single
spaces. Punctuation outside ASCII stays, as in the official evaluation. The right answer to a question that has none is
the empty string.
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


def exact_match(prediction: str, answer: str) -> float:
    """1 if both plain forms are the same, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def word_f1(prediction: str, answer: str, empty_can_match: bool) -> float:
    """F1 of the words that both have, counted as often as they occur.

    Two empty plain forms give 1 in SQuAD 2.0 (`empty_can_match`) and 0 in SQuAD 1.1, which knows no empty answer.
    """
    predicted, right = normalize_answer(prediction).split(), normalize_answer(answer).split()
    if not predicted or not right:
        return float(empty_can_match and predicted == right)
    num_same = (Counter(predicted) & Counter(right)).total()
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(right)
    return 2 * precision * recall / (precision + recall)


def answer_scores(prediction: str, answers: Sequence[str], version: int) -> tuple[float, float]:
    """(exact match, F1) of one question. In SQuAD 2.0 answers whose plain form is empty do not count; where none is
    left, as in a question without an answer, the empty string is right.
    """
    if version == 2:
        answers = [answer for answer in answers if normalize_answer(answer)] or [""]
    return (
        max(exact_match(prediction, answer) for answer in answers),
        max(word_f1(prediction, answer, empty_can_match=version == 2) for answer in answers),
    )


def best_threshold(null_odds: np.ndarray, answered: np.ndarray, unanswered: np.ndarray) -> float:
    """The threshold with the highest mean score when a question is left without an answer if its odds are above it.

    All arguments: [N], the scores of each question with its answer and without. On a tie the lowest threshold is taken;
    it may lie below all odds: then no question is answered.
    """
    order = np.argsort(null_odds, kind="stable")
    gain = np.cumsum((answered - unanswered)[order])  # of answering all questions up to this one
    odds = null_odds[order]
    last_of_its_odds = np.append(odds[1:] != odds[:-1], True)
    gain = np.where(last_of_its_odds, gain, -np.inf)
    best = int(np.argmax(gain))
    return float(odds[best]) if gain[best] > 0 else float(np.nextafter(odds[0], -np.inf))
