"""The baselines on data whose answer is known."""

import numpy as np

from evaluation.baselines import majority, ngram
from evaluation.tasks.classification import Example

WORDS = ["red", "green"]
TRAIN = [Example(f"the {WORDS[i % 2]} box {i}", None, i % 2) for i in range(40)]


def test_majority_answers_the_most_frequent_class_or_the_mean():
    dev = TRAIN[:3]
    assert majority(TRAIN[:3], dev, is_regression=False).tolist() == [0, 0, 0]
    scores = [Example("a", None, 1.0), Example("b", None, 2.0)]
    assert majority(scores, dev, is_regression=True).tolist() == [1.5] * 3


def test_ngrams_learn_a_word_and_give_the_same_answer_twice():
    dev = [Example("a green hat", None, 1), Example("a red hat", None, 0)]
    first = ngram(TRAIN, dev, is_regression=False, seed=0)
    assert first.tolist() == [1, 0]
    assert np.array_equal(first, ngram(TRAIN, dev, is_regression=False, seed=0))


def test_ngrams_of_pairs_and_scores_and_few_rows():
    pairs = [Example("red", "red" if i % 2 else "blue", float(i % 2)) for i in range(60)]
    predictions = ngram(pairs, pairs[:2], is_regression=True, seed=0)
    assert predictions[1] - predictions[0] > 0.8
    assert ngram(TRAIN[:4], TRAIN[:2], is_regression=False, seed=0).tolist() == [0, 1]
