"""Reads a task's examples: UTF-8 tables (TSV, CSV or JSONL, by their ending), or one folder of texts per label (IMDb).

In a TSV a quotation mark is an ordinary character, as in GLUE's files. In a CSV, a quoted text may span several lines.
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
    """Yield (line number from 1, {column: value}) for each row of a table except blank lines. For each text of a
    folder, sorted by path, yield (its path in the folder, {"sentence": the text, "label": the subfolder}).

    Values are texts. JSON's numbers, true and false become texts in JSON's notation. Its other values are unchanged,
    because the column may not be needed; `check_text` rejects them.

    Args:
        headerless_columns: the columns of a TSV without a header
        skip_broken_rows: skip rows whose number of fields differs from the header's instead of raising

    Raises ValueError, with file and line, for another ending or separator, bytes that are not UTF-8, a column that
    occurs twice, a broken row, JSON other than objects, and what `text_files` rejects.
    """
    if path.is_dir():
        for file in text_files(path):
            name = file.relative_to(path)
            yield name.as_posix(), {"sentence": read_utf8(file), "label": name.parts[0]}
        return
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the ending '{path.suffix}' is not one of {', '.join(FORMATS)}; convert the file")
    text = read_utf8(path, FORMATS)
    if path.suffix == ".jsonl":
        yield from _json_rows(path, text)
        return
    rows = _csv_rows(path, text) if path.suffix == ".csv" else _tsv_rows(text)
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
                f"{path}:{line}: the row has {len(fields)} fields and the header {len(header)}{missing}; "
                "correct the row (a tab or line break inside a text splits it)"
            )


def read_utf8(path: Path, endings: Sequence[str] = ()) -> str:
    """The text of a file, without a byte order mark.

    Raises ValueError, with file and line, for bytes that are not UTF-8. For a missing file, the error names the
    files of the folder, or only those with one of the `endings` if there are any.
    """
    if not path.is_file():
        present = sorted(p.name for p in path.parent.glob("*") if p.is_file() and (not endings or p.suffix in endings))
        shown = ", ".join(present[:10]) or " ".join(["no", *endings, "file"])
        raise ValueError(f"{path} does not exist; the folder holds {shown}: name the right file or folder")
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; convert the file to UTF-8"
        ) from error


def check_text(where: str, name: str, value: object) -> str:
    """`value` if it is a text. Raises ValueError for anything else (null, NaN, a list) and for a text with half of a
    surrogate pair, which can be neither encoded nor written.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: '{name}' is {json.dumps(value)[:60]} instead of a text; correct or remove the row")
    if half := _SURROGATE.search(value):
        raise ValueError(
            f"{where}: '{name}' has {ascii(half[0])}, half of a character, perhaps because the text was cut; remove it"
        )
    return value


def find_split(data_dir: Path, split: str, names: Sequence[str]) -> str:
    """The one of `names` that `data_dir` holds, ValueError unless it is exactly one. Names of folders end in "/"."""
    found = [name for name in names if ((data_dir / name).is_dir() if name[-1] == "/" else (data_dir / name).is_file())]
    if len(found) != 1:
        problem = f"holds {' and '.join(found)}" if found else f"holds none of {', '.join(names)}"
        raise ValueError(f"{data_dir} {problem}; name the file for {split} with --{split}-file")
    return found[0].rstrip("/")


def text_files(folder: Path) -> list[Path]:
    """The .txt and .TXT files of each subfolder, at any depth, sorted. The subfolder's name is their label. IMDb's
    unlabelled texts (unsup), files outside the subfolders and hidden files are left out.

    Raises ValueError for a folder without subfolders, a subfolder without a text, files with other endings and links
    to folders, and OSError for anything unreadable, so that no text is left out silently.
    """

    def fail(error: OSError) -> None:
        raise error

    labels = sorted(p for p in folder.iterdir() if p.is_dir() and p.name != "unsup" and not p.name.startswith("."))
    if not labels:
        raise ValueError(f"{folder} has no subfolders; texts lie in a folder for each label, such as {folder / 'pos'}")
    files = []
    for label in labels:
        texts, others = [], []
        for parent, subfolders, names in os.walk(label, onerror=fail):
            names += [name for name in subfolders if os.path.islink(os.path.join(parent, name))]
            subfolders[:] = [name for name in subfolders if not name.startswith(".")]
            for path in (Path(parent, name) for name in names if not name.startswith(".")):
                (texts if path.suffix.lower() == ".txt" and not path.is_dir() else others).append(path)
        if others or not texts:
            shown = f"{len(others)} other files, such as {min(others).relative_to(label)}" if others else "no text"
            raise ValueError(
                f"{label} holds {shown}; the folder of a label holds texts that end in .txt and nothing else: rename, "
                "move or remove other files"
            )
        files += sorted(texts)
    return files


def _check_separator(path: Path, text: str) -> None:
    """Raise ValueError if the header uses another separator than the file's ending implies."""
    expected = "," if path.suffix == ".csv" else "\t"
    header = re.sub('"[^"]*"', "", text.lstrip("\r\n").partition("\n")[0])
    found = [separator for separator in ";\t|," if separator in header]
    if found and expected not in found:
        raise ValueError(
            f"{path}:1: the columns are separated by {found[0]!r}, in a {path.suffix} file {expected!r} is expected; "
            "save it with that, or give it the ending of its format (.csv has commas, .tsv tabs)"
        )


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # the library's own limit is 131,072 characters per cell
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1  # where a row begins: a quoted text may span several lines
    try:
        for fields in reader:
            if fields:
                yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: {error}; correct the quotation marks or save the table as TSV") from error


def _tsv_rows(text: str) -> Iterator[tuple[int, list[str]]]:
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
            raise ValueError(f"{path}:{line}: not valid JSON ({reason}); write one object per line") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}:{line}: a JSON {type(record).__name__} instead of an object with named columns")
        yield line, {column: json.dumps(value) if _is_number(value) else value for column, value in record.items()}


def _is_number(value: object) -> bool:
    """Whether a JSON value is a finite number, true or false."""
    return isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
