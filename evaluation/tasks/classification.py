"""Tasks that predict one label or score for a sentence or a pair, among them tasks on one's own files.

`evaluation.tasks.rows` reads the files. One's own files have the columns `sentence` and `label`, or `sentence1`,
`sentence2` and `label`. Other columns are ignored.
"""

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data_prep.files import finished_file
from evaluation.tasks.features import Features, encode_examples
from evaluation.tasks.heads import BertForSequenceClassification, sequence_loss
from evaluation.tasks.metrics import score
from evaluation.tasks.rows import FORMATS, check_text, find_split, read_rows
from evaluation.tasks.task import Scores, Task

OWN_TASKS = ("classification", "regression", "ranking")
MISSING_LABELS = ("", "nan", "null", "<na>")  # what tables write for a missing label
LARGEST_SCORE = 1e18  # the square of an error has to fit into float32
JOINERS = "\u200c\u200d"  # invisible, but some scripts need them inside a word


class Example(NamedTuple):
    """One row: a sentence or a pair, and its label: a class index, a score, or None in a file without labels."""

    text: str
    text_pair: str | None
    label: int | float | None


@dataclass(frozen=True)
class TextTask:
    """The description of a task: files, columns, classes and metrics. `text_task` turns it into a `Task`."""

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]  # names of the classes, by index; empty for a regression
    metrics: tuple[str, ...]  # names in `evaluation.tasks.metrics.METRICS`, or the task's own
    train_file: str = "train.tsv"
    dev_file: str = "dev.tsv"
    headerless_columns: tuple[str, ...] = ()  # of labelled files without a header
    score_range: tuple[float, float] | None = None
    skip_broken_rows: bool = False  # in labelled files


def text_task(description: TextTask) -> Task:
    """The task of this description. Predictions are [E, L] float: the probability of each class, or the score."""
    return Task(
        name=description.name,
        metrics=description.metrics,
        train_file=description.train_file,
        dev_file=description.dev_file,
        labels=description.labels,
        num_outputs=len(description.labels) or 1,
        seq_length=128,
        settings=asdict(description),
        read=lambda path, labelled: read_examples(path, description, labelled),
        encode=encode_examples,
        features=Features,
        head=BertForSequenceClassification,
        loss=sequence_loss,
        decode=partial(decode_texts, description),
        score=partial(score_texts, description),
        write=partial(write_texts, description),
    )


def read_examples(path: Path, task: TextTask, labelled: bool = True) -> list[Example]:
    """Read all rows of a file of `task`.

    Raises ValueError, with file and line, for a missing column, a value that is not a text (null, NaN, a list), a label
    or a score outside the task, and a file without rows.
    """
    examples = []
    index_of = {label: index for index, label in enumerate(task.labels)}
    for where, values in _wanted_columns(path, task, labelled):
        label = _parse_label(where, values.pop(), task, index_of) if labelled else None
        examples.append(Example(values[0], values[1] if len(values) == 2 else None, label))
    return examples


def _wanted_columns(path: Path, task: TextTask, labelled: bool) -> Iterator[tuple[str, list[str]]]:
    """("file:line", the texts and, if labelled, the label) of each row; ValueError as `read_examples`."""
    wanted = [*task.text_columns, *([task.label_column] if labelled else [])]
    headerless, where = task.headerless_columns if labelled else (), ""
    for line, row in read_rows(path, headerless, task.skip_broken_rows and labelled):
        where = f"{path}:{line}"
        if absent := [column for column in wanted if column not in row]:
            raise ValueError(
                f"{where}: column '{absent[0]}' is missing; "
                f"task {task.name} reads {', '.join(wanted)}, the file has {', '.join(row)}"
            )
        yield where, [check_text(where, column, row[column]) for column in wanted]
    if not where:
        raise ValueError(f"{path} holds no rows; task {task.name} needs at least one (columns: {', '.join(wanted)})")


def _parse_label(where: str, value: str, task: TextTask, index_of: dict[str, int]) -> int | float:
    if task.labels:
        if value in index_of:
            return index_of[value]
        known = ", ".join(map(repr, task.labels))
        raise ValueError(f"{where}: label '{value}' is outside task {task.name}, which has {known}; correct the row")
    low, high = task.score_range or (-LARGEST_SCORE, LARGEST_SCORE)
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not low <= number <= high:
        raise ValueError(
            f"{where}: '{value}' is not a score of task {task.name}, a number from {low:g} to {high:g}; correct the row"
        )
    return number


def decode_texts(
    description: TextTask, examples: Sequence[Example], features: Features, logits: list[Tensor]
) -> np.ndarray:
    """[E, L] Probabilities of the classes, or unchanged scores."""
    outputs = torch.stack(logits)
    # In float32, probabilities near 1 round to the same value, which would create ties in rankings.
    return (outputs.double().softmax(1) if description.labels else outputs).numpy()


def answers(description: TextTask, predictions: np.ndarray) -> np.ndarray:
    """[E] The class index of the highest probability, or the score."""
    return predictions.argmax(1) if description.labels else predictions[:, 0]


def score_texts(description: TextTask, examples: Sequence[Example], predictions: np.ndarray) -> Scores:
    """The task's metrics."""
    labels = np.array([example.label for example in examples])
    return score(description.metrics, labels, answers(description, predictions))


def write_texts(description: TextTask, folder: Path, examples: Sequence[Example], predictions: np.ndarray) -> None:
    """predictions.tsv: index, label (if the rows have one), prediction, and the probability of each class."""
    classes, labelled = description.labels, examples[0].label is not None
    header = ["index", *(["label"] if labelled else []), "prediction", *(f"p({label})" for label in classes)]
    with finished_file(folder / "predictions.tsv", "w") as file:
        file.write("\t".join(header) + "\n")
        rows = zip(examples, answers(description, predictions).tolist(), predictions.tolist(), strict=True)
        for index, (example, answer, outputs) in enumerate(rows):
            values = [example.label, answer] if labelled else [answer]
            shown = [classes[value] if classes else f"{value:.6g}" for value in values]
            probabilities = [f"{value:.6g}" for value in outputs] if classes else []
            file.write("\t".join([str(index), *shown, *probabilities]) + "\n")


def own_task(name: str, data_dir: Path, train_file: str | None = None, dev_file: str | None = None) -> TextTask:
    """Describe a task on one's own files. `name` is one of OWN_TASKS.

    The header of the training file determines the columns, and its distinct labels are the classes. They are sorted as
    numbers if all are integers (equal ones, such as 01 and 1, alphabetically), and alphabetically otherwise.

    Raises ValueError for missing files or columns, an empty file, a classification with fewer than two classes, and
    labels that stand for a missing value or look like another one.
    """
    endings = (*FORMATS, "/")  # tables, or a folder
    train_file = train_file or find_split(data_dir, "train", [f"train{ending}" for ending in endings])
    dev_file = dev_file or find_split(data_dir, "dev", [f"dev{ending}" for ending in endings])
    path = data_dir / train_file
    _, columns = next(read_rows(path), (0, None))
    if columns is None:
        raise ValueError(
            f"{path} holds no rows; give it a header (sentence, label or sentence1, sentence2, label) and examples"
        )
    if name == "ranking":  # WikiQA's columns, capitalised as there or not
        names = ("Question", "Sentence", "Label") if "Question" in columns else ("question", "sentence", "label")
        return TextTask(name, names[:2], names[2], ("0", "1"), ("map", "mrr"), train_file, dev_file)
    text_columns = ("sentence1", "sentence2") if "sentence1" in columns else ("sentence",)
    task = TextTask(name, text_columns, "label", (), ("pearson", "spearman"), train_file, dev_file)
    if name == "regression":
        return task
    first_rows: dict[str, str] = {}
    for where, values in _wanted_columns(path, task, True):
        first_rows.setdefault(values[-1], where)
    for label, where in first_rows.items():
        _check_class(where, label)
    if len(first_rows) == 1:
        raise ValueError(
            f"{path}: every row has the label '{next(iter(first_rows))}'; a classification needs at least two"
        )
    all_integers = all(re.fullmatch(r"-?\d{1,18}", label) for label in first_rows)
    labels = sorted(first_rows, key=lambda label: (int(label) if all_integers else 0, label))
    return replace(task, labels=tuple(labels), metrics=("accuracy", "macro_f1"))


def _check_class(where: str, label: str) -> None:
    """Raise ValueError for a label that stands for a missing value, and for one that looks like another label because
    of surrounding white space, invisible characters or decomposed accents.
    """
    shown = [char for char in unicodedata.normalize("NFC", label)
             if char.isspace() or char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf")]  # fmt: skip
    plain = " ".join("".join(shown).split()).strip(JOINERS)
    if plain.lower() in MISSING_LABELS:
        raise ValueError(
            f"{where}: label {ascii(label)} stands for a missing value; write the label or remove the row, and rename "
            "a class of that name"
        )
    if label != plain:
        raise ValueError(
            f"{where}: label {ascii(label)} looks like {ascii(plain)} and would be another class; write that"
        )


def draw_examples(examples: list, number: int | None, labels: Sequence[str]) -> tuple[list, str]:
    """Draw `number` of the examples at random, in their original order.

    Each class gets its share, and at least one example if `number` allows. Examples without a class (scores, questions,
    tagged sentences) are drawn uniformly. The draw depends only on the arguments, so all seeds and checkpoints train on
    the same examples. Returns them and a sentence about the draw for the user, or all examples and "" without a draw.
    """
    if number is None or number >= len(examples):
        return examples, ""
    has_class = bool(labels) and isinstance(examples[0], Example)
    classes = np.array([example.label if has_class else 0 for example in examples])
    quantile = np.empty(len(examples))  # the share of its class that precedes each example in `shuffled`
    shuffled = np.random.default_rng(0).permutation(len(examples))
    for index in np.unique(classes):
        members = shuffled[classes[shuffled] == index]
        quantile[members] = np.arange(len(members)) / len(members)
    drawn = np.sort(shuffled[np.argsort(quantile[shuffled], kind="stable")[:number]])
    note = f"{number:,} of {len(examples):,} training examples, drawn by chance"
    if has_class:
        counts = np.bincount(classes[drawn], minlength=len(labels)).tolist()
        note += " by label: " + ", ".join(f"{count:,} {label}" for count, label in zip(counts, labels, strict=True))
    return [examples[index] for index in drawn], note
