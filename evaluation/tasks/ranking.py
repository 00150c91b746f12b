"""Ranking: candidate answers to a question, by the probability that each is right; mean average precision (MAP) and
mean reciprocal rank (MRR) over questions, as for WikiQA (Yang, Yih and Meek 2015).

A question without a right answer cannot be ranked well or badly and is left out of the scores, as in that paper; so is
one without a wrong answer, which every model ranks perfectly (the "clean" setting of Rao, He and Lin 2016). How many
there are is printed. Questions are told apart by their text, white space aside. All rows are trained on. Of equal
scores those of right answers come last (`evaluation.tasks.metrics.right_places`).
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_prep.text.tokenizer import Tokenizer
from evaluation.tasks.classification import Example, TextTask, text_task
from evaluation.tasks.features import Features, encode_examples
from evaluation.tasks.metrics import average_precision, reciprocal_rank
from evaluation.tasks.task import Scores, Task


def ranking_task(form: TextTask) -> Task:
    """A pair task with the classes 0 and 1 whose scores are those of rankings."""
    return replace(text_task(form), encode=encode_candidates, score=score_rankings)


def candidates(examples: Sequence[Example]) -> dict[str, list[int]]:
    """The rows of each question, in the order of the file."""
    rows: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        rows.setdefault(" ".join(example.text.split()), []).append(index)
    return rows


def encode_candidates(tokenizer: Tokenizer, examples: Sequence[Example], max_seq_length: int, name: str) -> Features:
    """The pairs, with a note on the questions that are not scored."""
    features = encode_examples(tokenizer, examples, max_seq_length, name)
    if features.labels is None:
        return features
    shares = [features.labels[rows].mean() for rows in candidates(examples).values()]
    note = (
        f"{features.note}, {len(shares):,} questions, {shares.count(0):,} without a right and {shares.count(1):,} "
        "without a wrong answer (trained on, not scored)"
    )
    return replace(features, note=note)


def score_rankings(examples: Sequence[Example], predictions: np.ndarray) -> Scores:
    """MAP and MRR over the questions that have right and wrong answers; None if there is none. predictions: [N, 2]."""
    labels, scores = np.array([example.label for example in examples]), predictions[:, 1]
    ranked = [rows for rows in candidates(examples).values() if 0 < labels[rows].mean() < 1]
    if not ranked:
        return {"map": None, "mrr": None}
    return {
        "map": float(np.mean([average_precision(labels[rows], scores[rows]) for rows in ranked])),
        "mrr": float(np.mean([reciprocal_rank(labels[rows], scores[rows]) for rows in ranked])),
    }
