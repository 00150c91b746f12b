"""Tasks that give a sentence, or a pair of sentences, one label or one score: what such a task is, and readers for
one's own files.

A file is one that `evaluation.tasks.rows` reads. The columns are `sentence` and `label`, or `sentence1`,
`sentence2` and `label`; further columns are left alone.
"""

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
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
from evaluation.tasks.rows import FORMATS, check_text, read_rows
from evaluation.tasks.task import Scores, Task

# What tables hold in place of a label that is missing.
MISSING_LABELS = ("", "nan", "null", "<na>")
LARGEST_SCORE = 1e18  # the square of an error has to fit into float32
JOINERS = "\u200c\u200d"  # invisible, but some scripts need them inside a word


class Example(NamedTuple):
    """One row: a sentence or a pair, and its label: a class index, a score, or None in a file without labels."""

    text: str
    text_pair: str | None
    label: int | float | None


@dataclass(frozen=True)
class TextTask:
    """What the loop and the readers know of a task. `labels` are the class names in the order of their indices; empty
    means regression.

    `metrics` are names in `evaluation.tasks.metrics`; the first one picks the best epoch. Rows whose number of
    fields differs from the header's are an error, but for a benchmark that is known to hold some (`skip_broken_rows`).
    """

    name: str
    text_columns: tuple[str, ...]
    label_column: str
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    train_file: str = "train.tsv"
    dev_file: str = "dev.tsv"
    headerless_columns: tuple[str, ...] = ()
    score_range: tuple[float, float] | None = None
    skip_broken_rows: bool = False

    @property
    def num_outputs(self) -> int:
        """Logits per example: one per class, or the one score of a regression."""
        return len(self.labels) or 1


def read_examples(path: Path, task: TextTask, labelled: bool = True) -> list[Example]:
    """Read all rows of one file of `task`. Raises ValueError, with file and line, for a missing column, what is no text
    (null, NaN, a list), a label outside the task, a score that is no number or out of range, and a file without a row.
    """
    examples = []
    index_of = {label: index for index, label in enumerate(task.labels)}
    for where, values in _wanted_columns(path, task, labelled):
        label = _parse_label(where, values.pop(), task, index_of) if labelled else None
        examples.append(Example(values[0], values[1] if len(values) == 2 else None, label))
    return examples


def _wanted_columns(path: Path, task: TextTask, labelled: bool) -> Iterator[tuple[str, list[str]]]:
    """("file:line", the texts and, if labelled, the label) of each row; ValueError as `read_examples`."""
    wanted = task.text_columns + ((task.label_column,) if labelled else ())
    # CoLA's labelled files have no header, its test file has one.
    headerless, where = task.headerless_columns if labelled else (), ""
    for line, row in read_rows(path, headerless, task.skip_broken_rows and labelled):
        where = f"{path}:{line}"
        absent = [column for column in wanted if column not in row]
        if absent:
            raise ValueError(
                f"{where}: column '{absent[0]}' is missing; "
                f"task {task.name} reads {', '.join(wanted)}, the file has {', '.join(row)}"
            )
        yield where, [check_text(where, column, row[column]) for column in wanted]
    if not where:
        raise ValueError(f"{path} holds no row; task {task.name} needs at least one (columns: {', '.join(wanted)})")


def _parse_label(where: str, value: str, task: TextTask, index_of: dict[str, int]) -> int | float:
    if task.labels:
        if value in index_of:
            return index_of[value]
        known = ", ".join(repr(label) for label in task.labels)
        raise ValueError(f"{where}: label '{value}' is outside task {task.name}, which has {known}; correct the row")
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not abs(score) <= LARGEST_SCORE:
        raise ValueError(
            f"{where}: '{value}' is no score of task {task.name}; a number of at most {LARGEST_SCORE:g} in size is due"
        )
    if task.score_range and not task.score_range[0] <= score <= task.score_range[1]:
        low, high = task.score_range
        raise ValueError(f"{where}: '{value}' is outside task {task.name}; a number from {low:g} to {high:g} is due")
    return score


def text_task(form: TextTask) -> Task:
    """The five steps of a task with one label or score a row. Predictions are [num rows, L] float: the probability of
    each class, or the score.
    """
    return Task(
        name=form.name,
        metrics=form.metrics,
        train_file=form.train_file,
        dev_file=form.dev_file,
        labels=form.labels,
        num_outputs=form.num_outputs,
        max_seq_length=128,
        settings=asdict(form),
        read=lambda path, labelled: read_examples(path, form, labelled),
        encode=encode_examples,
        features=Features,
        head=BertForSequenceClassification,
        loss=sequence_loss,
        decode=partial(decode_texts, form),
        score=partial(score_texts, form),
        write=partial(write_texts, form),
    )


def decode_texts(form: TextTask, examples: Sequence[Example], features: Features, logits: list[Tensor]) -> np.ndarray:
    """[num rows, L] Probabilities of the classes, or scores as they are."""
    outputs = torch.stack(logits)
    # In float32 all probabilities near 1 are equal, and rankings would have ties that the model does not make.
    return (outputs.double().softmax(1) if form.labels else outputs).numpy()


def answers(form: TextTask, predictions: np.ndarray) -> np.ndarray:
    """[num rows] The class index of the highest probability, or the score."""
    return predictions.argmax(1) if form.labels else predictions[:, 0]


def score_texts(form: TextTask, examples: Sequence[Example], predictions: np.ndarray) -> Scores:
    """The task's metrics; None where one is undefined."""
    labels = np.array([example.label for example in examples])
    scores = score(form.metrics, labels, answers(form, predictions))
    return {name: None if math.isnan(value) else value for name, value in scores.items()}


def write_texts(form: TextTask, folder: Path, examples: Sequence[Example], predictions: np.ndarray) -> None:
    """predictions.tsv: index, label (if the rows have one), prediction, and the probability of each class."""
    labelled = examples[0].label is not None
    header = ["index", *(["label"] if labelled else []), "prediction", *(f"p({label})" for label in form.labels)]
    with finished_file(folder / "predictions.tsv", "w") as file:
        file.write("\t".join(header) + "\n")
        for index, (example, answer, row) in enumerate(
            zip(examples, answers(form, predictions).tolist(), predictions.tolist(), strict=True)
        ):
            values = [example.label, answer] if labelled else [answer]
            shown = [form.labels[value] if form.labels else f"{value:.6g}" for value in values]
            probabilities = [f"{value:.6g}" for value in row] if form.labels else []
            file.write("\t".join([str(index), *shown, *probabilities]) + "\n")


OWN_TASKS = ("classification", "regression", "ranking")


def own_task(name: str, data_dir: Path, train_file: str | None = None, dev_file: str | None = None) -> TextTask:
    """Describe one's own task from its files: `name` is one of OWN_TASKS, the columns come from the header
    of the training file, and the classes are the distinct labels in it (in numerical order when all are whole numbers,
    of which equal ones, such as 01 and 1, are in alphabetical order; else alphabetical).

    Raises ValueError for missing files or columns, an empty file, a classification with fewer than two classes, and
    labels that are a missing value or look like another one.
    """
    train_file = train_file or _find_split(data_dir, "train")
    dev_file = dev_file or _find_split(data_dir, "dev")
    path = data_dir / train_file
    _, columns = next(read_rows(path), (0, None))
    if columns is None:
        raise ValueError(
            f"{path} holds no row; give it a header (sentence, label or sentence1, sentence2, label) and examples"
        )
    if name == "ranking":
        return ranking_form(columns, train_file, dev_file)
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
        raise ValueError(f"{path}: every row has the label '{label}'; a classification needs at least two")
    whole_numbers = all(re.fullmatch(r"-?\d{1,18}", label) for label in first_rows)
    labels = sorted(first_rows, key=lambda label: (int(label) if whole_numbers else 0, label))
    return replace(task, labels=tuple(labels), metrics=("accuracy", "macro_f1"))


def _check_class(where: str, label: str) -> None:
    """Raise ValueError for a label that is a missing value, or that white space, control characters, invisible ones or
    decomposed accents make another class than what it looks like.
    """
    shown = [char for char in unicodedata.normalize("NFC", label)
             if char.isspace() or char in JOINERS or unicodedata.category(char) not in ("Cc", "Cf")]  # fmt: skip
    plain = " ".join("".join(shown).split()).strip(JOINERS)
    if plain.lower() in MISSING_LABELS:
        raise ValueError(
            f"{where}: label {ascii(label)} stands for a missing value; write the label or remove the row, and give a "
            "class that is called so another name"
        )
    if label != plain:
        raise ValueError(
            f"{where}: label {ascii(label)} would be another class than {ascii(plain)}, as which it reads; write that"
        )


def draw_examples(examples: list, number: int | None, labels: Sequence[str]) -> tuple[list, str]:
    """`number` of the examples in their order, and a sentence that says how they were drawn; all, and "", if that many
    there are not. Since files may be sorted by label, each class has its share, and at least one example while there
    is room. What has no class (a score, a question, a tagged sentence) is drawn by chance.

    The draw depends on nothing but the arguments: all seeds and starts train on the same examples.
    """
    if number is None or number >= len(examples):
        return examples, ""
    has_class = bool(labels) and isinstance(examples[0], Example)
    classes = np.array([example.label if has_class else 0 for example in examples])
    place = np.empty(len(examples))  # how much of its class comes before an example, from 0 to 1
    shuffled = np.random.default_rng(0).permutation(len(examples))
    for index in np.unique(classes):
        members = shuffled[classes[shuffled] == index]
        place[members] = np.arange(len(members)) / len(members)
    drawn = np.sort(shuffled[np.argsort(place[shuffled], kind="stable")[:number]])
    counts = np.bincount(classes[drawn], minlength=len(labels)).tolist()
    shares = ", ".join(f"{count:,} {label}" for label, count in zip(labels, counts, strict=True)) if has_class else ""
    note = f"{number:,} of {len(examples):,} training examples, drawn by chance" + (shares and f" by label: {shares}")
    return [examples[index] for index in drawn], note


def ranking_form(columns: Iterable[str], train_file: str, dev_file: str) -> TextTask:
    """Candidate answers to questions, right (1) or not (0): WikiQA's columns, in its capitals or in small letters."""
    names = ("Question", "Sentence", "Label") if "Question" in columns else ("question", "sentence", "label")
    return TextTask("ranking", names[:2], names[2], ("0", "1"), ("map", "mrr"), train_file, dev_file)


def _find_split(data_dir: Path, split: str) -> str:
    found = [split + ending for ending in FORMATS if (data_dir / (split + ending)).is_file()]
    found += [split] if (data_dir / split).is_dir() else []
    if len(found) == 1:
        return found[0]
    problem = (
        f"holds {' and '.join(found)}"
        if found
        else f"holds no {split}.tsv, {split}.csv, {split}.jsonl or folder {split}"
    )
    raise ValueError(f"{data_dir} {problem}; exactly one is due: name it with --{split}-file")
