"""Answers cut from a passage: from the logits of its windows to the best spans, their scores and the official files.

    predictions.json         {id: answer}; in SQuAD 2.0 "" where the odds for no answer are above the threshold
    nbest_predictions.json   {id: [{text, probability, start_logit, end_logit}]}, the best first
    null_odds.json           {id: score of no answer minus score of the best answer}, SQuAD 2.0 only

As in google-research/bert's run_squad.py, the score of a span is the sum of its two logits. A span begins in the window
with the most context around its first token, and has at most `max_answer_length` tokens. The score of no answer is the
lowest score of [CLS] over all windows.

`questions` are `evaluation.tasks.squad.Question`s, and E is their number.
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
    """The prediction for one question: the best spans, and the score of no answer minus that of the best span."""

    n_best: list[Span]
    null_odds: float

    @property
    def text(self) -> str:
        """The best span other than no answer; "" if no window offers one."""
        return next((span.text for span in self.n_best if span.text), "")


def decode_answers(
    questions: Sequence, features, logits: Sequence[Tensor], max_answer_length: int, with_null: bool
) -> list[Answer]:
    """An Answer per question from its `evaluation.tasks.squad.SpanFeatures` and the logits [S, 2] of each window."""
    answers = []
    for index, windows in groupby(range(len(features)), key=lambda window: features.question_index[window]):
        spans, nulls = [], []
        for window in windows:
            tokens = slice(features.sequence_start[window], features.sequence_start[window + 1])
            scores, offsets, may_begin = logits[window].numpy(), features.spans[tokens], features.may_begin[tokens]
            spans += window_spans(scores, offsets, may_begin, questions[index].context, max_answer_length)
            nulls.append(Span("", float(scores[0, 0]), float(scores[0, 1])))
        answers.append(_answer(spans, min(nulls, key=lambda span: span.score), with_null))
    return answers


def window_spans(
    scores: np.ndarray, offsets: np.ndarray, may_begin: np.ndarray, context: str, max_answer_length: int
) -> list[Span]:
    """The N_BEST spans from a window's N_BEST best first and last tokens. scores, offsets: [S, 2]; may_begin: [S]."""
    begins, ends = np.flatnonzero(may_begin), np.flatnonzero(offsets[:, 0] >= 0)
    begins = begins[np.argsort(-scores[begins, 0], kind="stable")[:N_BEST]]
    ends = ends[np.argsort(-scores[ends, 1], kind="stable")[:N_BEST]]
    length = ends[None, :] - begins[:, None] + 1  # [begins, ends]
    rows, columns = np.nonzero((length >= 1) & (length <= max_answer_length))
    begins, ends = begins[rows], ends[columns]
    best = np.argsort(-(scores[begins, 0] + scores[ends, 1]), kind="stable")[:N_BEST]
    return [
        Span(context[offsets[begin, 0] : offsets[end, 1]].strip(), float(scores[begin, 0]), float(scores[end, 1]))
        for begin, end in zip(begins[best], ends[best], strict=True)
    ]


def _answer(spans: list[Span], null: Span, with_null: bool) -> Answer:
    """The best spans of all windows, each text once. `with_null` adds no answer as a candidate."""
    best_of: dict[str, Span] = {}
    for span in sorted(spans, key=lambda span: -span.score):
        if span.text:
            best_of.setdefault(span.text, span)
    n_best = list(best_of.values())[:N_BEST]
    odds = null.score - (n_best[0].score if n_best else 0.0)
    if with_null or not n_best:
        n_best = sorted([*n_best, null], key=lambda span: -span.score)
    return Answer(n_best, odds)


def score_answers(
    questions: Sequence, answers: Sequence[Answer], version: int, null_threshold: float | None = None
) -> Scores:
    """Exact match and F1, over all questions and by their first question word.

    For SQuAD 2.0 they are at `null_threshold` or, if it is None, at the threshold with the best F1 on these questions.
    Further scores are those of questions with and without an answer, those at the untuned threshold 0, the threshold
    itself, and best_exact, at a threshold tuned for exact match, as in the official evaluation.
    """
    answered = _question_scores(questions, [answer.text for answer in answers], version)
    parts, thresholds = {"": answered}, {}
    if version == 2:
        unanswered, odds = _question_scores(questions, [""] * len(answers), 2), np.array([a.null_odds for a in answers])
        threshold = best_threshold(odds, answered[:, 1], unanswered[:, 1]) if null_threshold is None else null_threshold
        exact_threshold = best_threshold(odds, answered[:, 0], unanswered[:, 0])
        tuned, untuned, exact = (
            np.where((odds > limit)[:, None], unanswered, answered) for limit in (threshold, 0.0, exact_threshold)
        )
        has_answer = np.array([bool(question.answers) for question in questions])
        parts = {"": tuned, "HasAns_": tuned[has_answer], "NoAns_": tuned[~has_answer], "at threshold 0: ": untuned}
        thresholds = {"null_threshold": threshold, "best_exact": exact[:, 0].mean().item()}
        thresholds["best_exact_threshold"] = exact_threshold
    words = np.array([question_word(question.question) for question in questions])
    parts |= {f"{word}: ": parts[""][words == word] for word in QUESTION_WORDS if word in words}
    scores = {}
    for prefix, part in parts.items():
        exact_match, f1 = part.mean(0).tolist() if len(part) else (None, None)
        scores |= {f"{prefix}f1": f1, f"{prefix}exact": exact_match}
    return scores | thresholds


def _question_scores(questions: Sequence, texts: Sequence[str], version: int) -> np.ndarray:
    """[E, 2] Exact match and F1 of each question."""
    pairs = zip(questions, texts, strict=True)
    return np.array([answer_scores(text, question.answers, version) for question, text in pairs])


def question_word(question: str) -> str:
    """The first of QUESTION_WORDS in a question, or "other". Whom and whose count as who."""
    words = (word.strip(".,?!'\"").replace("whom", "who").replace("whose", "who") for word in question.lower().split())
    return next((word for word in words if word in QUESTION_WORDS), "other")


def write_answers(
    folder: Path, questions: Sequence, answers: Sequence[Answer], version: int, null_threshold: float | None = None
) -> None:
    """Write the official files, with the threshold of `score_answers`."""
    ids, texts = [question.id for question in questions], [answer.text for answer in answers]
    if version == 2:
        if null_threshold is None:
            null_threshold = score_answers(questions, answers, 2)["null_threshold"]
        texts = ["" if answer.null_odds > null_threshold else answer.text for answer in answers]
        odds = [answer.null_odds for answer in answers]
        write_json(folder / "null_odds.json", dict(zip(ids, odds, strict=True)))
    write_json(folder / "predictions.json", dict(zip(ids, texts, strict=True)))
    n_best = [_n_best_rows(answer.n_best) for answer in answers]
    write_json(folder / "nbest_predictions.json", dict(zip(ids, n_best, strict=True)))


def _n_best_rows(n_best: list[Span]) -> list[dict]:
    """The official rows; the probabilities are a softmax over these spans alone."""
    weights = np.exp(np.array([span.score for span in n_best]) - max(span.score for span in n_best))
    probabilities = (weights / weights.sum()).tolist()
    return [
        {"text": span.text, "probability": p, "start_logit": span.start_logit, "end_logit": span.end_logit}
        for span, p in zip(n_best, probabilities, strict=True)
    ]
