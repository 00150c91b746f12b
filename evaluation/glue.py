"""GLUE (Wang et al., 2018, arXiv:1804.07461): the nine tasks in their official TSV layouts, their labels and their
official metrics.

What is odd about the files: none quotes anything (a lone quotation mark is text); MRPC opens with a byte order mark;
CoLA's train and dev files have no header; SST-2 has two columns and QQP six, of which a few rows of the published file
are broken and skipped, as everyone does; MNLI has two dev files and, like STS-B, its label in the last of many columns.
Columns are found by name, so that files which leave some out are read as well.
"""

from evaluation.classification import TextTask

ENTAILMENT = ("entailment", "not_entailment")
BINARY = ("0", "1")
SENTENCE_PAIR = ("sentence1", "sentence2")

GLUE_TASKS = {
    task.name: task
    for task in (
        TextTask("cola", ("sentence",), "label", BINARY, ("mcc",),
                 headerless_columns=("source", "label", "original_label", "sentence")),
        TextTask("sst-2", ("sentence",), "label", BINARY, ("accuracy",)),
        TextTask("mrpc", ("#1 String", "#2 String"), "Quality", BINARY, ("f1", "accuracy")),
        TextTask("sts-b", SENTENCE_PAIR, "score", (), ("pearson", "spearman"), score_range=(0.0, 5.0)),
        TextTask("qqp", ("question1", "question2"), "is_duplicate", BINARY, ("f1", "accuracy"), skip_broken_rows=True),
        TextTask("mnli", SENTENCE_PAIR, "gold_label", ("contradiction", "entailment", "neutral"), ("accuracy",),
                 dev_file="dev_matched.tsv"),
        TextTask("mnli-mm", SENTENCE_PAIR, "gold_label", ("contradiction", "entailment", "neutral"), ("accuracy",),
                 dev_file="dev_mismatched.tsv"),
        TextTask("qnli", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",)),
        TextTask("rte", SENTENCE_PAIR, "label", ENTAILMENT, ("accuracy",)),
        TextTask("wnli", SENTENCE_PAIR, "label", BINARY, ("accuracy",)),
    )
}  # fmt: skip
