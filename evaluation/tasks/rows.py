"""Rows of the tables that hold a task's examples: TSV, CSV or JSONL, told by the ending, in UTF-8 with or without a
byte order mark, with either kind of line end; and folders of text files (IMDb's shape), one folder a label.

In a TSV a quotation mark is a character like any other (that is how GLUE's files are written, see
`evaluation.tasks.glue`), in a CSV it quotes, also over several lines.
"""

import csv
import io
import json
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

FORMATS = (".tsv", ".csv", ".jsonl")
_SURROGATE = re.compile("[\ud800-\udfff]")


def read_rows(
    path: Path, headerless_columns: Sequence[str] = (), skip_broken_rows: bool = False
) -> Iterator[tuple[int | str, dict[str, object]]]:
    """Yield (line number counted from 1, {column: text}) for each row of a TSV, CSV or JSONL file; blank lines are
    passed over. Of a folder: (a text file's path in it, {"sentence": its text, "label": its folder}), by the paths.

    `headerless_columns` names the columns of a TSV whose first line is already data. A number in JSON, true and false
    are taken as they are written; what else is no text is left to `check_text`, since the column may not be needed.
    Raises ValueError, with file and line, for another ending, bytes that are no UTF-8, another separator than the
    ending's, a row whose number of fields differs from the header's, a column that occurs twice, JSON that is no
    object, and what `text_files` refuses.
    """
    if path.is_dir():
        for file in text_files(path):
            name = file.relative_to(path)
            yield name.as_posix(), {"sentence": read_utf8(file), "label": name.parts[0]}
        return
    text = _read_text(path)
    if path.suffix == ".jsonl":
        yield from _json_rows(path, text)
        return
    rows = _fields(path, text)
    if not headerless_columns:
        _check_separator(path, text)
    header = list(headerless_columns) or [column.strip() for column in next(rows, (0, []))[1]]
    twice = [column for column in header if header.count(column) > 1]
    if twice:
        raise ValueError(f"{path}:1: column '{twice[0]}' occurs {header.count(twice[0])} times; rename or remove one")
    for line, fields in rows:
        if len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True))
        elif not skip_broken_rows:
            missing = f"; column '{header[len(fields)]}' is missing" if len(fields) < len(header) else ""
            raise ValueError(
                f"{path}:{line}: the row has {len(fields)} fields where {len(header)} are due{missing}; "
                "correct the row (a tab or line break inside a text splits it)"
            )


def check_text(where: str, name: str, value: object) -> str:
    """`value`, which must be a text. Raises ValueError for anything else (null, NaN, a list) and for a text with half
    of a surrogate pair, which is no character and can be neither encoded nor written.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{name}' is {json.dumps(value)[:60]}, a text is due; write one or remove the row")
    if half := _SURROGATE.search(value):
        raise ValueError(
            f"{where}: '{name}' has {ascii(half[0])}, half of a character, perhaps since the text was cut; remove it"
        )
    return value


def text_files(folder: Path) -> list[Path]:
    """The .txt files (also .TXT) of each subfolder, whose name is their label, at any depth, sorted. Left out are
    IMDb's unlabelled texts (unsup), what lies beside the subfolders, and hidden files.

    Raises ValueError for a folder without subfolders, a subfolder without a text, files of other endings and links to
    folders, and OSError for what cannot be read: no text is left out in silence.
    """

    def fail(error: OSError) -> None:
        raise error

    labels = sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "unsup" and not p.name.startswith("."))
    if not labels:
        raise ValueError(f"{folder} has no subfolders; texts lie in a folder for each label, such as {folder / 'pos'}")
    files = []
    for label in labels:
        inside, others = [], []
        for parent, subfolders, names in os.walk(label, onerror=fail):
            names += [name for name in subfolders if os.path.islink(os.path.join(parent, name))]
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                (inside if path.suffix.lower() == ".txt" and not path.is_dir() else others).append(path)
        if others or not inside:
            shown = f"{len(others)} that are not, such as {min(others).relative_to(label)}" if others else "none"
            raise ValueError(
                f"{label}: a label's folder holds texts that end in .txt and no other files; this one has {shown}: "
                "rename, move or remove what is no text"
            )
        files += sorted(inside)
    return files


def _check_separator(path: Path, text: str) -> None:
    """Raise ValueError for a header whose columns are separated by another character than the ending promises."""
    due = "," if path.suffix == ".csv" else "\t"
    header = re.sub('"[^"]*"', "", text.lstrip("\r\n").partition("\n")[0])
    found = [separator for separator in ";\t|," if separator in header]
    if found and due not in found:
        raise ValueError(
            f"{path}:1: the columns are separated by {found[0]!r}, in a {path.suffix} file {due!r} is due; save it so, "
            "or with the ending of its kind (.csv has commas, .tsv tabs)"
        )


def _read_text(path: Path) -> str:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the ending '{path.suffix}' is no format read here; use one of {', '.join(FORMATS)}")
    if not path.is_file():
        present = sorted(p.name for p in path.parent.glob("*") if p.suffix in FORMATS) if path.parent.is_dir() else []
        raise ValueError(
            f"{path} does not exist; the folder holds {', '.join(present) or 'no table'}: name the right file or folder"
        )
    return read_utf8(path)


def read_utf8(path: Path) -> str:
    """The text of a file, without a byte order mark; ValueError, with file and line, for bytes that are no UTF-8."""
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
        csv.field_size_limit(sys.maxsize)  # else a cell has at most 131,072 characters
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        while True:
            line = reader.line_num + 1  # where the row begins: a quoted text may go over several
            try:
                fields = next(reader, None)
            except csv.Error as error:
                raise ValueError(
                    f"{path}:{line}: {error}; correct the quotation marks or save the table as TSV"
                ) from error
            if fields is None:
                break
            if fields:
                yield line, fields
        return
    # str.splitlines would also break a row at characters such as U+0085 or U+2028, which texts from the web contain.
    for line, row in enumerate(text.split("\n"), 1):
        if row.strip("\r"):
            yield line, row.removesuffix("\r").split("\t")


def _json_rows(path: Path, text: str) -> Iterator[tuple[int, dict[str, object]]]:
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        try:
            record = json.loads(row)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else error
            raise ValueError(f"{path}:{line}: no valid JSON ({reason}); write one object a line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{line}: a JSON {type(record).__name__} where an object with named columns is due")
        yield line, {column: json.dumps(value) if _is_number(value) else value for column, value in record.items()}


def _is_number(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
