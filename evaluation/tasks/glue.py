"""GLUE (Wang et al., 2018, arXiv:1804.07461): its tasks' TSV columns, labels and metrics, and files to submit to it.

The files are irregular. A quotation mark is ordinary text in all of them. MRPC starts with a byte order mark. CoLA's
train and dev files have no header. QQP has a few broken rows, which are skipped, as is usual. Columns are found by
name, so files may leave out columns that are not used.
"""

from pathlib import Path

import numpy as np

from data_prep.files import finished_file
from evaluation.tasks.classification import TextTask
from evaluation.tasks.task import Task

BINARY = ("0", "1")
ENTAILMENT = ("entailment", "not_entailment")
MNLI = ("contradiction", "entailment", "neutral")
PAIR = ("sentence1", "sentence2")

GLUE_TASKS = {
    task.name: task
    for task in (
        TextTask("cola", ("sentence",), "label", BINARY, ("mcc",),
                 headerless_columns=("source", "label", "original_label", "sentence")),
        TextTask("sst-2", ("sentence",), "label", BINARY, ("accuracy",)),
        TextTask("mrpc", ("#1 String", "#2 String"), "Quality", BINARY, ("f1", "accuracy")),
        TextTask("sts-b", PAIR, "score", (), ("pearson", "spearman"), score_range=(0.0, 5.0)),
        TextTask("qqp", ("question1", "question2"), "is_duplicate", BINARY, ("f1", "accuracy"), skip_broken_rows=True),
        TextTask("mnli", PAIR, "gold_label", MNLI, ("accuracy",), dev_file="dev_matched.tsv"),
        TextTask("mnli-mm", PAIR, "gold_label", MNLI, ("accuracy",), dev_file="dev_mismatched.tsv"),
        TextTask("qnli", ("question", "sentence"), "label", ENTAILMENT, ("accuracy",)),
        TextTask("rte", PAIR, "label", ENTAILMENT, ("accuracy",)),
        TextTask("wnli", PAIR, "label", BINARY, ("accuracy",)),
    )
}  # fmt: skip

# Name and number of rows of the file to submit: by task, and for MNLI by the name of the test set.
SUBMISSIONS = {"cola": ("CoLA", 1063), "sst-2": ("SST-2", 1821), "mrpc": ("MRPC", 1725), "sts-b": ("STS-B", 1379),
               "qqp": ("QQP", 390965), "qnli": ("QNLI", 5463), "rte": ("RTE", 3000), "wnli": ("WNLI", 146)}  # fmt: skip
MNLI_SUBMISSIONS = {"test_matched": ("MNLI-m", 9796), "test_mismatched": ("MNLI-mm", 9847), "AX": ("AX", 1104),
                    "diagnostic": ("AX", 1104), "diagnostic-full": ("AX", 1104)}  # fmt: skip


def write_submission(folder: Path, task: Task, stem: str, predictions: np.ndarray) -> str:
    """Write the file to submit for a test set: an index and the name of a label, or a similarity from 0 to 5, per row.

    `stem` is the name of the test file without its ending, which distinguishes MNLI's test sets. predictions: [E, L].
    Returns a note for the user, or "" if the benchmark has no such test set.
    """
    names = MNLI_SUBMISSIONS.get(stem) if task.name.startswith("mnli") else SUBMISSIONS.get(task.name)
    if names is None:
        return ""
    name, num_rows = names
    if task.labels:
        answers = [task.labels[index] for index in predictions.argmax(1)]
    else:
        answers = [f"{value:.3f}" for value in predictions[:, 0].clip(0, 5)]
    with finished_file(folder / f"{name}.tsv", "w") as file:
        file.write("index\tprediction\n")
        file.writelines(f"{index}\t{answer}\n" for index, answer in enumerate(answers))
    if len(answers) != num_rows:
        return f"{name}.tsv has {len(answers):,} rows; the benchmark takes {num_rows:,}: this is not its test set"
    return f"{name}.tsv is in the benchmark's format and has its {num_rows:,} rows"
