"""Ranking: candidate answers to a question, ordered by the probability that each is right. The scores are mean average
precision (MAP) and mean reciprocal rank (MRR) over questions, as for WikiQA (Yang, Yih and Meek 2015).

Training uses all rows. Scores leave out questions without a right answer, as in that paper, and questions without a
wrong one, which every model ranks perfectly (the "clean" setting of Rao, He and Lin 2016). Questions that differ only
in white space are the same question.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from data_prep.text.tokenizer import Tokenizer
from evaluation.tasks.classification import Example, TextTask, text_task
from evaluation.tasks.features import Features, encode_examples
from evaluation.tasks.metrics import average_precision, reciprocal_rank
from evaluation.tasks.task import Scores, Task


def ranking_task(description: TextTask) -> Task:
    """A task on pairs with the classes 0 and 1, scored as rankings."""
    return replace(text_task(description), encode=encode_candidates, score=score_rankings)


def candidates(examples: Sequence[Example]) -> dict[str, list[int]]:
    """{question: the indices of its examples}, in the order of the file."""
    rows: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        rows.setdefault(" ".join(example.text.split()), []).append(index)
    return rows


def encode_candidates(tokenizer: Tokenizer, examples: Sequence[Example], seq_length: int, name: str) -> Features:
    """Encode the pairs. The note counts the questions that are not scored."""
    features = encode_examples(tokenizer, examples, seq_length, name)
    if features.labels is None:
        return features
    shares = [features.labels[rows].mean() for rows in candidates(examples).values()]
    note = (
        f"{features.note}, {len(shares):,} questions, {shares.count(0):,} without a right and {shares.count(1):,} "
        "without a wrong answer (trained on, not scored)"
    )
    return replace(features, note=note)


def score_rankings(examples: Sequence[Example], predictions: np.ndarray) -> Scores:
    """MAP and MRR over the questions that have right and wrong answers; None if there are none. predictions: [E, 2]."""
    labels, scores = np.array([example.label for example in examples]), predictions[:, 1]
    ranked = [rows for rows in candidates(examples).values() if 0 < labels[rows].mean() < 1]
    metrics = {"map": average_precision, "mrr": reciprocal_rank}
    return {
        name: float(np.mean([metric(labels[rows], scores[rows]) for rows in ranked])) if ranked else None
        for name, metric in metrics.items()
    }
