"""Rows of a run's files after a crash; tests/pretrain/test_telemetry.py has those that a launch refuses."""

import pytest

from pretrain.metrics_file import read_rows

ROWS = b'{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n'


@pytest.mark.parametrize(
    "tail", [b"", b'{"kind": "train", "st', b'{"kind": "tr\xc3', bytes(100), b"[3]", b'{"step": 3']
)
def test_a_last_line_that_a_crash_cut_short_is_dropped(tail, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(ROWS + tail)
    assert [row["step"] for row in read_rows(path)] == [1, 2]
