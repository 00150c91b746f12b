"""The files of a run that hold one JSON object per line: metrics.jsonl, tensors.jsonl and launches.jsonl."""

import json
from pathlib import Path

from data_prep.files import finished_file


def read_metrics(folder: str | Path, kind: str | None = None) -> list[dict]:
    """Rows of a run's metrics.jsonl in order: those of one kind ("train", "eval", "spike"), or all."""
    return [row for row in read_rows(Path(folder) / "metrics.jsonl") if kind in (None, row.get("kind"))]


def read_rows(path: Path) -> list[dict]:
    """The rows of a file. Drops an incomplete last line, which a killed process left.

    Raises ValueError with the number of any other line that is not a JSON object with a step.
    """
    rows, lines = [], path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif number < len(lines):  # what follows the last newline is empty or cut short
            raise ValueError(
                f"{path}, line {number} is damaged: not a JSON object with a step; remove or restore the line"
            )
    return rows


def write_rows(path: Path, rows: list[dict]) -> None:
    """Replace a file's content with these rows, atomically."""
    with finished_file(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def flattened(values: dict, prefix: str = "") -> dict:
    """Nested keys joined by dots: {"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for key, value in values.items():
        flat |= flattened(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
