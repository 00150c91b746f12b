"""Tasks that give a sentence, or a pair of sentences, one label or one score: what such a task is, and readers for
one's own files.

A file is a TSV, a CSV or a JSONL, told by its ending, in UTF-8 with or without a byte order mark, with either kind of
line end. The columns are `sentence` and `label`, or `sentence1`, `sentence2` and `label`; further columns are left
alone. In a TSV a quotation mark is a character like any other (that is how GLUE's files are written, see
`evaluation.glue`), in a CSV it quotes.
"""

import csv
import io
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

FORMATS = (".tsv", ".csv", ".jsonl")


class Example(NamedTuple):
    """One row: a sentence or a pair, and its label: a class index, a score, or None in a file without labels."""

    text: str
    text_pair: str | None
    label: int | float | None


@dataclass(frozen=True)
class TextTask:
    """What the loop and the readers know of a task. `labels` are the class names in the order of their indices; empty
    means regression.

    `metrics` are names in `evaluation.metrics`; the first one picks the best epoch. Rows whose number of fields differs
    from the header's are an error, but for a benchmark that is known to hold some (`skip_broken_rows`).
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


def read_rows(
    path: Path, headerless_columns: Sequence[str] = (), skip_broken_rows: bool = False
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield (line number counted from 1, {column: text}) for each row of a TSV, CSV or JSONL file; blank lines are
    passed over.

    `headerless_columns` names the columns of a TSV whose first line is already data. Raises ValueError, with file and
    line, for another ending, bytes that are no UTF-8, a row whose number of fields differs from the header's, and JSON
    that is no object.
    """
    text = _read_text(path)
    if path.suffix == ".jsonl":
        yield from _json_rows(path, text)
        return
    rows = _fields(path, text)
    header = list(headerless_columns) or next(rows, (0, []))[1]
    for line, fields in rows:
        if len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True))
        elif not skip_broken_rows:
            missing = f"; column '{header[len(fields)]}' is missing" if len(fields) < len(header) else ""
            raise ValueError(
                f"{path}:{line}: the row has {len(fields)} fields where {len(header)} are due{missing}; "
                "correct the row (a tab or line break inside a text splits it)"
            )


def _read_text(path: Path) -> str:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the ending '{path.suffix}' is no format read here; use one of {', '.join(FORMATS)}")
    if not path.is_file():
        present = sorted(p.name for p in path.parent.glob("*") if p.suffix in FORMATS) if path.parent.is_dir() else []
        raise ValueError(
            f"{path} does not exist; the folder holds {', '.join(present) or 'no table'}: name the right file or folder"
        )
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is no UTF-8 text; convert the file to UTF-8"
        ) from error


def _fields(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    if path.suffix == ".csv":
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            for fields in reader:
                if fields:
                    yield reader.line_num, fields
        except csv.Error as error:
            raise ValueError(
                f"{path}:{reader.line_num}: {error}; correct the quotation marks or save the table as TSV"
            ) from error
        return
    # str.splitlines would also break a row at characters such as U+0085 or U+2028, which texts from the web contain.
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip("\r"):
            yield line, row.removesuffix("\r").split("\t")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, str]]]:
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{line}: no valid JSON ({error.msg}); write one object a line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{line}: a JSON {type(record).__name__} where an object with named columns is due")
        yield line, {column: value if isinstance(value, str) else json.dumps(value) for column, value in record.items()}


def read_examples(path: Path, task: TextTask, labelled: bool = True) -> list[Example]:
    """Read all rows of one file of `task`. Raises ValueError, with file and line, for a missing column, a label outside
    the task, a score that is no number or out of range, and a file without a row.
    """
    examples = []
    wanted = task.text_columns + ((task.label_column,) if labelled else ())
    # CoLA's labelled files have no header, its test file has one.
    headerless = task.headerless_columns if labelled else ()
    index_of = {label: index for index, label in enumerate(task.labels)}
    for line, row in read_rows(path, headerless, task.skip_broken_rows):
        absent = [column for column in wanted if column not in row]
        if absent:
            raise ValueError(
                f"{path}:{line}: column '{absent[0]}' is missing; "
                f"task {task.name} reads {', '.join(wanted)}, the file has {', '.join(row)}"
            )
        label = _parse_label(f"{path}:{line}", row[task.label_column], task, index_of) if labelled else None
        texts = [row[column] for column in task.text_columns]
        examples.append(Example(texts[0], texts[1] if len(texts) == 2 else None, label))
    if not examples:
        raise ValueError(f"{path} holds no row; task {task.name} needs at least one (columns: {', '.join(wanted)})")
    return examples


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
    if not math.isfinite(score):
        raise ValueError(f"{where}: '{value}' is no score of task {task.name}; a number is due")
    if task.score_range and not task.score_range[0] <= score <= task.score_range[1]:
        low, high = task.score_range
        raise ValueError(f"{where}: '{value}' is outside task {task.name}; a number from {low:g} to {high:g} is due")
    return score


OWN_TASKS = ("classification", "regression")


def own_task(name: str, data_dir: Path, train_file: str | None = None, dev_file: str | None = None) -> TextTask:
    """Describe one's own task from its files: `name` is classification or regression, the columns come from the header
    of the training file, and the classes are the distinct labels in it (in numerical order when all are whole numbers,
    else alphabetical).

    Raises ValueError for missing files or columns, an empty file, and a classification with fewer than two classes.
    """
    train_file = train_file or _find_split(data_dir, "train")
    dev_file = dev_file or _find_split(data_dir, "dev")
    path = data_dir / train_file
    rows = list(read_rows(path))
    if not rows:
        raise ValueError(
            f"{path} holds no row; give it a header (sentence, label or sentence1, sentence2, label) and examples"
        )
    text_columns = ("sentence1", "sentence2") if "sentence1" in rows[0][1] else ("sentence",)
    task = TextTask(name, text_columns, "label", (), ("pearson", "spearman"), train_file, dev_file)
    if name == "regression":
        return task
    labels = {row["label"] for _, row in rows if "label" in row}
    if labels and len(labels) < 2:
        raise ValueError(f"{path}: every row has the label '{labels.pop()}'; a classification needs at least two")
    whole_numbers = all(label.removeprefix("-").isdecimal() for label in labels)
    ordered = tuple(sorted(labels, key=int if whole_numbers else None))
    # Without any label column a placeholder class lets read_examples name the missing column and its line.
    return replace(task, labels=ordered or ("",), metrics=("accuracy", "macro_f1"))


def _find_split(data_dir: Path, split: str) -> str:
    found = [split + ending for ending in FORMATS if (data_dir / (split + ending)).is_file()]
    if len(found) == 1:
        return found[0]
    problem = f"holds {' and '.join(found)}" if found else f"holds no {split}.tsv, {split}.csv or {split}.jsonl"
    raise ValueError(f"{data_dir} {problem}; exactly one is due: name it with --{split}-file")
