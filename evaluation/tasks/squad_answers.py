"""Answers cut from a passage: from the logits of its windows to the n best spans, their scores, and the official files.

    predictions.json         {id: answer}; in SQuAD 2.0 "" where the odds for no answer are above the threshold
    nbest_predictions.json   {id: [{text, probability, start_logit, end_logit}]}, the best first
    null_odds.json           {id: score of no answer minus score of the best answer}, SQuAD 2.0 only

As in google-research/bert's run_squad.py: a span scores the sum of its two logits; it begins where its window has the
widest context and ends within `max_answer_length` tokens; no answer scores what [CLS] has, the least over the windows.
"""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from data_prep.files import write_json
from evaluation.tasks.squad_metric import answer_scores, best_threshold
from evaluation.tasks.task import Scores

N_BEST = 20
QUESTION_WORDS = ("what", "who", "when", "where", "which", "why", "how", "other")


class Span(NamedTuple):
    """A candidate answer and its two logits; its text is "" for no answer."""

    text: str
    start_logit: float
    end_logit: float

    @property
    def score(self) -> float:
        return self.start_logit + self.end_logit


class Answer(NamedTuple):
    """What is known of one question: at most N_BEST spans, the best first, and the score of no answer minus that of the
    best answer.
    """

    n_best: list[Span]
    null_odds: float

    @property
    def text(self) -> str:
        """The best span that is one; "" if no window offers any."""
        return next((span.text for span in self.n_best if span.text), "")


def decode_answers(
    questions: Sequence, features, logits: Sequence[Tensor], max_answer_length: int, with_null: bool
) -> list[Answer]:
    """An Answer a question from `evaluation.tasks.squad.SpanFeatures` and the logits [S, 2] of each window."""
    answers = []
    for index, windows in groupby(range(len(features)), key=lambda window: features.question_index[window]):
        spans, nulls = [], []
        for window in windows:
            places = slice(features.sequence_start[window], features.sequence_start[window + 1])
            scores = logits[window].numpy()
            spans += window_spans(
                scores, features.spans[places], features.may_begin[places], questions[index].context, max_answer_length
            )
            nulls.append(Span("", float(scores[0, 0]), float(scores[0, 1])))
        answers.append(_answer(spans, min(nulls, key=lambda span: span.score), with_null))
    return answers


def window_spans(
    scores: np.ndarray, spans: np.ndarray, may_begin: np.ndarray, context: str, max_answer_length: int
) -> list[Span]:
    """The N_BEST spans of a window: of its N_BEST best first and last tokens. scores, spans: [S, 2]; may_begin: [S]."""
    begins, ends = np.flatnonzero(may_begin), np.flatnonzero(spans[:, 0] >= 0)
    begins = begins[np.argsort(-scores[begins, 0], kind="stable")[:N_BEST]]
    ends = ends[np.argsort(-scores[ends, 1], kind="stable")[:N_BEST]]
    length = ends[None, :] - begins[:, None] + 1  # [begins, ends]
    allowed = (length >= 1) & (length <= max_answer_length)
    rows, columns = np.nonzero(allowed)
    totals = scores[begins[rows], 0] + scores[ends[columns], 1]
    found = []
    for place in np.argsort(-totals, kind="stable")[:N_BEST]:
        begin, end = begins[rows[place]], ends[columns[place]]
        text = context[spans[begin, 0] : spans[end, 1]].strip()
        found.append(Span(text, float(scores[begin, 0]), float(scores[end, 1])))
    return found


def _answer(spans: list[Span], null: Span, with_null: bool) -> Answer:
    """The best spans of all windows, each text once."""
    by_text: dict[str, Span] = {}
    for span in sorted(spans, key=lambda span: -span.score):
        if span.text and span.text not in by_text and len(by_text) < N_BEST:
            by_text[span.text] = span
    n_best = list(by_text.values())
    odds = null.score - (n_best[0].score if n_best else 0.0)
    if with_null or not n_best:
        n_best = sorted([*n_best, null], key=lambda span: -span.score)
    return Answer(n_best, odds)


def _question_scores(questions: Sequence, texts: Sequence[str], version: int) -> np.ndarray:
    """[N, 2] Exact match and F1 of each question."""
    rows = [answer_scores(text, question.answers, version) for question, text in zip(questions, texts, strict=True)]
    return np.array(rows)


def tuned_threshold(questions: Sequence, answers: Sequence[Answer], metric: str = "f1") -> float:
    """The null threshold with the best F1 or, for the `metric` "exact", the most exact matches on these very questions:
    what is scored with it is no held-out number.
    """
    column = ("exact", "f1").index(metric)
    answered = _question_scores(questions, [answer.text for answer in answers], 2)[:, column]
    unanswered = _question_scores(questions, [""] * len(answers), 2)[:, column]
    return best_threshold(np.array([answer.null_odds for answer in answers]), answered, unanswered)


def final_texts(answers: Sequence[Answer], version: int, null_threshold: float) -> list[str]:
    """What each question is answered with: in SQuAD 2.0 "" where the odds for no answer are above the threshold."""
    return ["" if version == 2 and answer.null_odds > null_threshold else answer.text for answer in answers]


def score_answers(
    questions: Sequence, answers: Sequence[Answer], version: int, null_threshold: float | None = None
) -> Scores:
    """Exact match and F1, over all and by the question's first question word. For SQuAD 2.0 at the threshold with the
    best F1 here, unless one is given; by questions with and without an answer; at threshold 0, which was not tuned; the
    threshold itself; and best_exact, whose threshold is tuned for exact match alone, as in the official evaluation.
    """
    untuned = _question_scores(questions, final_texts(answers, version, 0.0), version)
    scores, threshold, rows = untuned, None, {}
    if version == 2:
        threshold = tuned_threshold(questions, answers) if null_threshold is None else null_threshold
        scores = _question_scores(questions, final_texts(answers, 2, threshold), 2)
        has_answer = np.array([bool(question.answers) for question in questions])
        rows = {"HasAns_": scores[has_answer], "NoAns_": scores[~has_answer], "at threshold 0: ": untuned}
    words = np.array([question_word(question.question) for question in questions])
    rows = {"": scores} | rows | {f"{word}: ": scores[words == word] for word in QUESTION_WORDS if word in words}
    shown = {}
    for prefix, part in rows.items():
        exact, f1 = part.mean(0).tolist() if len(part) else (None, None)
        shown |= {f"{prefix}f1": f1, f"{prefix}exact": exact}
    if version == 1:
        return shown
    exact_threshold = tuned_threshold(questions, answers, "exact")
    exact = _question_scores(questions, final_texts(answers, 2, exact_threshold), 2)[:, 0]
    best = {"best_exact": exact.mean().item(), "best_exact_threshold": exact_threshold}
    return shown | {"null_threshold": threshold} | best


def question_word(question: str) -> str:
    """The first of QUESTION_WORDS in a question, whose forms (whom, whose) count as who; "other" if there is none."""
    words = (word.strip(".,?!'\"").replace("whom", "who").replace("whose", "who") for word in question.lower().split())
    return next((word for word in words if word in QUESTION_WORDS), "other")


def write_answers(
    folder: Path, questions: Sequence, answers: Sequence[Answer], version: int, null_threshold: float | None = None
) -> None:
    """The official files. Without a given threshold SQuAD 2.0's is the one that is best for these questions."""
    if null_threshold is None:
        null_threshold = tuned_threshold(questions, answers) if version == 2 else 0.0
    ids = [question.id for question in questions]
    write_json(folder / "predictions.json", dict(zip(ids, final_texts(answers, version, null_threshold), strict=True)))
    n_best = {identity: _n_best_rows(answer.n_best) for identity, answer in zip(ids, answers, strict=True)}
    write_json(folder / "nbest_predictions.json", n_best)
    if version == 2:
        odds = {identity: answer.null_odds for identity, answer in zip(ids, answers, strict=True)}
        write_json(folder / "null_odds.json", odds)


def _n_best_rows(n_best: list[Span]) -> list[dict]:
    """The official rows; probabilities are a softmax over these spans alone."""
    weights = np.exp(np.array([span.score for span in n_best]) - max(span.score for span in n_best))
    probabilities = (weights / weights.sum()).tolist()
    return [
        {"text": span.text, "probability": p, "start_logit": span.start_logit, "end_logit": span.end_logit}
        for span, p in zip(n_best, probabilities, strict=True)
    ]
