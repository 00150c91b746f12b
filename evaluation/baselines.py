"""Baselines without a network, which a model should beat. Their predictions have the same format as a model's.

`majority` predicts the most frequent class of the training set, or its mean score. `ngram` is logistic regression (for
scores: ridge regression) on tf-idf of word 1- and 2-grams, so its context is at most two neighbouring words.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import hstack, spmatrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GridSearchCV, KFold, StratifiedKFold

from evaluation.tasks.classification import Example

BASELINES = ("majority", "ngram")
STRENGTHS = (0.1, 1.0, 10.0)


def majority(train: Sequence[Example], dev: Sequence[Example], is_regression: bool) -> np.ndarray:
    """One answer for all dev examples, [num dev]: an int64 class index (the lowest on a tie), or the float64 mean."""
    labels = np.array([example.label for example in train])
    answer = labels.mean() if is_regression else np.bincount(labels).argmax()
    return np.full(len(dev), answer)


def ngram(train: Sequence[Example], dev: Sequence[Example], is_regression: bool, seed: int) -> np.ndarray:
    """Fit word n-grams on `train` and predict `dev`, [num dev]: int64 class indices, or float64 scores.

    Each sentence of a pair has its own n-grams, and the words that both share form a third set. Three-fold
    cross-validation within `train` chooses the regularisation from `STRENGTHS`, and the seed determines only the folds.
    If `train` is too small for that, the library's default is used.
    """
    train_features, dev_features = _features(train, dev)
    labels = np.array([example.label for example in train])
    if is_regression:
        model, grid, folds = Ridge(), {"alpha": [1 / strength for strength in STRENGTHS]}, KFold
    else:
        model, grid, folds = LogisticRegression(max_iter=1000), {"C": STRENGTHS}, StratifiedKFold
    if len(train) >= 30 and (is_regression or np.bincount(labels).min() >= 3):  # every fold has every class
        model = GridSearchCV(model, grid, cv=folds(3, shuffle=True, random_state=seed))
    return model.fit(train_features, labels).predict(dev_features)


def _features(train: Sequence[Example], dev: Sequence[Example]) -> tuple[spmatrix, spmatrix]:
    views = [lambda example: example.text]
    if train[0].text_pair is not None:
        views += [lambda example: example.text_pair, _shared_words]
    columns = []
    for view in views:
        vectorizer = TfidfVectorizer(ngram_range=(1, 2), token_pattern=r"\w+|[^\w\s]", sublinear_tf=True)
        columns.append((vectorizer.fit_transform(map(view, train)), vectorizer.transform(map(view, dev))))
    return tuple(hstack(split, format="csr") for split in zip(*columns, strict=True))


def _shared_words(example: Example) -> str:
    second = set(example.text_pair.lower().split())
    return " ".join(word for word in example.text.lower().split() if word in second) or "nothing_shared"
