"""Reading what a run's folder says about it: the rows of its .jsonl files, and settings by their dotted names."""

import json
from pathlib import Path


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict]:
    """Rows of a run's metrics.jsonl in order, of all kinds or of one."""
    return [row for row in read_rows(Path(folder) / "metrics.jsonl") if kind in (None, row.get("kind"))]


def read_rows(path: Path) -> list[dict]:
    """The rows of a file, one JSON object with a step a line; a last line that a kill cut short is dropped.

    Raises ValueError for any other line that is none, with its number.
    """
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif number < len(lines):  # a whole line ends in a newline, so nothing comes behind the last one
            raise ValueError(
                f"{path}, line {number} is damaged: no JSON object with a step; remove or restore the line"
            )
    return rows


def flattened(values: dict, prefix: str = "") -> dict:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
