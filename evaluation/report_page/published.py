"""Published scores of BERT by size, in percent, which `evaluation.report` shows beside runs of the same size.

Those models saw thousands of times the text of a small run. Scores labelled `GLUE test` are not on the dev set that is
used here, but on the test set. They are from google-research/bert's README (Turc et al. 2019, arXiv:1908.08962). Those
labelled `dev` are from Devlin et al. 2019 (arXiv:1810.04805), tables 2, 3 and 7, for SQuAD and CoNLL-2003, from Liu et
al. 2019 (arXiv:1907.11692), table 5, for GLUE with large, and from huggingface/transformers' example for GLUE with base
(cased).
"""

COLUMNS = (
    *(("cola", "mcc"), ("sst-2", "accuracy"), ("mrpc", "f1"), ("mrpc", "accuracy"), ("sts-b", "pearson")),
    *(("sts-b", "spearman"), ("qqp", "f1"), ("qqp", "accuracy"), ("mnli", "accuracy"), ("mnli-mm", "accuracy")),
    *(("qnli", "accuracy"), ("rte", "accuracy"), ("wnli", "accuracy")),
    *(("squad1", "f1"), ("squad1", "exact"), ("squad2", "f1"), ("squad2", "exact"), ("ner", "f1")),
)
# (layers, hidden size): source, and one score per column. A missing score is None, or left out at the end.
PUBLISHED = {
    (2, 128): ("BERT-Tiny, GLUE test", (0.0, 83.2, 81.1, 71.1, 74.3, 73.6, 62.2, 83.4, 70.2, 70.3, 81.5, 57.2, 62.3)),
    (4, 256): ("BERT-Mini, GLUE test", (0.0, 85.9, 81.1, 71.8, 75.4, 73.3, 66.4, 86.2, 74.8, 74.3, 84.1, 57.9, 62.3)),
    (4, 512): ("BERT-Small, GLUE test", (27.8, 89.7, 83.4, 76.2, 78.8, 77.0, 68.1, 87.0, 77.6, 77.0, 86.4, 61.8, 62.3)),
    (8, 512): (
        "BERT-Medium, GLUE test",
        (38.0, 89.6, 86.6, 81.6, 80.4, 78.4, 69.6, 87.9, 80.0, 79.1, 87.7, 62.2, 62.3),
    ),
    (12, 768): (
        "BERT-Base, dev",
        (56.5, 92.3, 88.9, 84.1, 88.6, 88.5, 87.5, 90.7, 83.9, 84.1, 90.7, 65.7, 56.3, 88.5, 80.8, None, None, 96.4),
    ),
    (24, 1024): (
        "BERT-Large, dev",
        (60.6, 93.2, None, 88.0, 90.0, None, None, 91.3, 86.6, None, 92.3, 70.4, None, 90.9, 84.1, 81.9, 78.7, 96.6),
    ),
}


def published_score(model: dict | None, task: str, metric: str) -> tuple[str, float] | None:
    """(whose, percent) for a model's config.json, or None if nothing was published for that size."""
    if model is None or (model["num_hidden_layers"], model["hidden_size"]) not in PUBLISHED:
        return None
    whose, scores = PUBLISHED[model["num_hidden_layers"], model["hidden_size"]]
    value = dict(zip(COLUMNS, scores, strict=False)).get((task, metric))
    return None if value is None else (whose, value)
