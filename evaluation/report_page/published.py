"""Published scores of BERT by size, in percent, which `evaluation.report` shows beside those of the same size.

They saw thousands of times the text that a small run sees; where a row says test, the benchmark's server scored it, so
the dev set here is another. Sources: `GLUE test`, the table of google-research/bert's README for its smaller models
(Turc et al. 2019, arXiv:1908.08962); `dev`, Devlin et al. 2019 (arXiv:1810.04805), tables 2, 3 and 7, for SQuAD and
CoNLL-2003, and for GLUE Liu et al. 2019 (arXiv:1907.11692), table 5, for large, and the example of
huggingface/transformers for base (cased).
"""

from typing import NamedTuple


class Published(NamedTuple):
    """The scores of one model: {task: {metric: percent}}."""

    label: str
    scores: dict[str, dict[str, float]]


_GLUE_METRICS = (
    *(("cola", "mcc"), ("sst-2", "accuracy"), ("mrpc", "f1"), ("mrpc", "accuracy"), ("sts-b", "pearson")),
    *(("sts-b", "spearman"), ("qqp", "f1"), ("qqp", "accuracy"), ("mnli", "accuracy"), ("mnli-mm", "accuracy")),
    *(("qnli", "accuracy"), ("rte", "accuracy"), ("wnli", "accuracy")),
)


def _scores(*glue: float | None, **others: dict[str, float]) -> dict[str, dict[str, float]]:
    """GLUE's in the order above, None for one that was not published; then other tasks'."""
    scores: dict[str, dict[str, float]] = {}
    for (task, metric), value in zip(_GLUE_METRICS, glue, strict=True):
        if value is not None:
            scores.setdefault(task, {})[metric] = value
    return scores | others


# By (num_hidden_layers, hidden_size).
PUBLISHED = {
    (2, 128): Published(
        "BERT-Tiny, GLUE test", _scores(0.0, 83.2, 81.1, 71.1, 74.3, 73.6, 62.2, 83.4, 70.2, 70.3, 81.5, 57.2, 62.3)
    ),
    (4, 256): Published(
        "BERT-Mini, GLUE test", _scores(0.0, 85.9, 81.1, 71.8, 75.4, 73.3, 66.4, 86.2, 74.8, 74.3, 84.1, 57.9, 62.3)
    ),
    (4, 512): Published(
        "BERT-Small, GLUE test", _scores(27.8, 89.7, 83.4, 76.2, 78.8, 77.0, 68.1, 87.0, 77.6, 77.0, 86.4, 61.8, 62.3)
    ),
    (8, 512): Published(
        "BERT-Medium, GLUE test", _scores(38.0, 89.6, 86.6, 81.6, 80.4, 78.4, 69.6, 87.9, 80.0, 79.1, 87.7, 62.2, 62.3)
    ),
    (12, 768): Published(
        "BERT-Base, dev",
        _scores(
            *(56.5, 92.3, 88.9, 84.1, 88.6, 88.5, 87.5, 90.7, 83.9, 84.1, 90.7, 65.7, 56.3),
            squad1={"f1": 88.5, "exact": 80.8},
            ner={"f1": 96.4},
        ),
    ),
    (24, 1024): Published(
        "BERT-Large, dev",
        _scores(
            *(60.6, 93.2, None, 88.0, 90.0, None, None, 91.3, 86.6, None, 92.3, 70.4, None),
            squad1={"f1": 90.9, "exact": 84.1},
            squad2={"f1": 81.9, "exact": 78.7},
            ner={"f1": 96.6},
        ),
    ),
}


def published_score(model: dict | None, task: str, metric: str) -> tuple[str, float] | None:
    """(whose, percent) for a model's config.json, or None where nothing of that size was published."""
    known = model and PUBLISHED.get((model["num_hidden_layers"], model["hidden_size"]))
    value = known and known.scores.get(task, {}).get(metric)
    return None if value is None else (known.label, value)
