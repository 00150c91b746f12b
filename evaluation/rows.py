"""Rows of the tables that hold a task's examples: TSV, CSV or JSONL, told by the ending, in UTF-8 with or without a
byte order mark, with either kind of line end; and folders of text files (IMDb's shape), one folder a label.

In a TSV a quotation mark is a character like any other (that is how GLUE's files are written, see `evaluation.glue`),
in a CSV it quotes, also over several lines.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

FORMATS = (".tsv", ".csv", ".jsonl")


def read_rows(
    path: Path, headerless_columns: Sequence[str] = (), skip_broken_rows: bool = False
) -> Iterator[tuple[int | str, dict[str, str]]]:
    """Yield (line number counted from 1, {column: text}) for each row of a TSV, CSV or JSONL file; blank lines are
    passed over. Of a folder: (name of a text file, {"sentence": its text, "label": its folder}).

    `headerless_columns` names the columns of a TSV whose first line is already data. Raises ValueError, with file and
    line, for another ending, bytes that are no UTF-8, a row whose number of fields differs from the header's, a column
    that occurs twice, and JSON that is no object.
    """
    if path.is_dir():
        yield from _texts(path)
        return
    text = _read_text(path)
    if path.suffix == ".jsonl":
        yield from _json_rows(path, text)
        return
    rows = _fields(path, text)
    header = list(headerless_columns) or next(rows, (0, []))[1]
    _check_header(path, header)
    for line, fields in rows:
        if len(fields) == len(header):
            yield line, dict(zip(header, fields, strict=True))
        elif not skip_broken_rows:
            missing = f"; column '{header[len(fields)]}' is missing" if len(fields) < len(header) else ""
            raise ValueError(
                f"{path}:{line}: the row has {len(fields)} fields where {len(header)} are due{missing}; "
                "correct the row (a tab or line break inside a text splits it)"
            )


def _check_header(path: Path, header: list[str]) -> None:
    twice = [column for column in header if header.count(column) > 1]
    if twice:
        raise ValueError(f"{path}:1: column '{twice[0]}' occurs {header.count(twice[0])} times; rename or remove one")
    if path.suffix == ".csv" and len(header) == 1 and ";" in header[0]:
        raise ValueError(f"{path}:1: the columns '{header[0]}' are separated by ';'; a CSV has commas here: save it so")


def _texts(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The .txt files of each subfolder, whose name is their label; IMDb's unlabelled texts (unsup) are left out."""
    for label in sorted(path for path in folder.iterdir() if path.is_dir() and path.name != "unsup"):
        for path in sorted(label.glob("*.txt")):
            yield f"{label.name}/{path.name}", {"sentence": _decode(path), "label": label.name}


def _read_text(path: Path) -> str:
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the ending '{path.suffix}' is no format read here; use one of {', '.join(FORMATS)}")
    if not path.is_file():
        present = sorted(p.name for p in path.parent.glob("*") if p.suffix in FORMATS) if path.parent.is_dir() else []
        raise ValueError(
            f"{path} does not exist; the folder holds {', '.join(present) or 'no table'}: name the right file or folder"
        )
    return _decode(path)


def _decode(path: Path) -> str:
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
