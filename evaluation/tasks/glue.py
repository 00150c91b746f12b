"""GLUE (Wang et al., 2018, arXiv:1804.07461): the nine tasks in their official TSV layouts, their labels and their
official metrics.

What is odd about the files: none quotes anything (a lone quotation mark is text); MRPC opens with a byte order mark;
CoLA's train and dev files have no header; SST-2 has two columns and QQP six, of which a few rows of the published file
are broken and skipped, as everyone does; MNLI has two dev files and, like STS-B, its label in the last of many columns.
Columns are found by name, so that files which leave some out are read as well.
"""

from pathlib import Path

import numpy as np

from data_prep.files import finished_file
from evaluation.tasks.classification import TextTask
from evaluation.tasks.task import Task

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

# The file that the benchmark wants for each task, and the number of its rows.
SUBMISSIONS = {
    **{"cola": ("CoLA", 1063), "sst-2": ("SST-2", 1821), "mrpc": ("MRPC", 1725), "sts-b": ("STS-B", 1379)},
    **{"qqp": ("QQP", 390965), "qnli": ("QNLI", 5463), "rte": ("RTE", 3000), "wnli": ("WNLI", 146)},
}
MNLI_SUBMISSIONS = {"test_matched": ("MNLI-m", 9796), "test_mismatched": ("MNLI-mm", 9847), "AX": ("AX", 1104),
                    "diagnostic": ("AX", 1104), "diagnostic-full": ("AX", 1104)}  # fmt: skip


def write_submission(folder: Path, task: Task, stem: str, predictions: np.ndarray) -> str:
    """Write the file that the benchmark takes for one of its test sets: index and prediction, labels by their names,
    similarities from 0 to 5. What was answered is told by the task; for MNLI by the file's `stem`: its two test sets
    and the diagnostics (AX).

    Returns a note for the user; "" if the benchmark has no such file.
    """
    names = MNLI_SUBMISSIONS.get(stem) if task.name.startswith("mnli") else SUBMISSIONS.get(task.name)
    if names is None:
        return ""
    name, num_due = names
    if task.labels:
        answers = [task.labels[index] for index in predictions.argmax(1)]
    else:
        answers = [f"{value:.3f}" for value in predictions[:, 0].clip(0, 5)]
    with finished_file(folder / f"{name}.tsv", "w") as file:
        file.write("index\tprediction\n")
        file.writelines(f"{index}\t{answer}\n" for index, answer in enumerate(answers))
    if len(answers) != num_due:
        return f"{name}.tsv has {len(answers):,} rows; the benchmark takes {num_due:,}: this is not its test set"
    return f"{name}.tsv is in the benchmark's format and has its {num_due:,} rows"
