"""What a run shows, also after a crash: rows of files, events of TensorBoard, and Weights & Biases, where it is
installed.
"""

import importlib.util
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.layout import Layout
from pretrain.options import claimed_run_folder
from pretrain.telemetry import LOGS, RunLog
from tests.pretrain.test_train import ROOT, arguments, config_file, prepare  # noqa: F401 (a fixture)

needs_wandb = pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")


@needs_wandb
def test_the_rows_go_to_weights_and_biases_without_network(shard_folders, config_file, tmp_path):  # noqa: F811
    output = tmp_path / "run"
    command = [sys.executable, "-m", "pretrain.train", *arguments(shard_folders, config_file, output)]
    for stop in (2, 3):
        more = ["--wandb", "bert", "--stop-after", str(stop), "--save-interval", "1"]
        subprocess.run([*command, *more], cwd=ROOT, env=os.environ | {"WANDB_MODE": "offline"}, check=True)
    written = [path.read_bytes() for path in sorted(output.glob("wandb/offline-run-*/run-*.wandb"))]
    assert len(written) == 2 and all(b"train/mlm_accuracy" in rows for rows in written)
    (run_id,) = {path.name.rpartition("-")[2] for path in output.glob("wandb/offline-run-*")}
    assert len(run_id) == 16


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_without_the_package_it_is_refused_with_the_way_out(shard_folders, config_file, tmp_path):  # noqa: F811
    with pytest.raises(ValueError, match="--wandb bert needs the package wandb: pip install wandb, or leave --wandb"):
        prepare(arguments(shard_folders, config_file, tmp_path / "run", "--wandb", "bert"))


ROWS = b'{"kind": "train", "step": 1}\n{"kind": "train", "step": 2}\n'


@pytest.mark.parametrize("line", [b'{"kind": "tra', b"\xff\xfe", bytes(100), b"[3]", b"7", b"null", b"{}", b""])
@pytest.mark.parametrize("name", LOGS)
def test_any_other_damaged_line_is_named_before_a_rank_starts(name, line, shard_folders, config_file, tmp_path):  # noqa: F811
    argv = arguments(shard_folders, config_file, tmp_path / "run")
    with claimed_run_folder(prepare(argv)):
        pass
    (tmp_path / "run" / name).write_bytes(ROWS + line + b"\n" + ROWS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "run.lock"}
    told = rf"{name}, line 3 is damaged: not a JSON object with a step; remove or restore"
    with pytest.raises(ValueError, match=told), claimed_run_folder(prepare(argv)):
        pass
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir() if path.name != "run.lock"}
    assert after == before


def test_tensorboard_loses_no_step_when_the_clock_goes_back(tmp_path):
    """Launches at 12 steps each, all of the past ones by a clock that was ahead; the second goes on after step 8."""
    layout = Layout(1, 1, 0, 0, torch.device("cpu"))
    (tmp_path / "run.json").write_text("{}")
    for first, last, hour in ((0, 12, 9), (8, 12, 8), (12, 15, 0)):
        log = RunLog(tmp_path, layout, first, 15)
        for step in range(first + 1, last + 1):
            log.write("train", step, {"loss": 100 * first + step})
        log.close()
        newest = max((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        newest.rename(
            newest.with_name(newest.name.replace(newest.name.split(".")[3], str(int(time.time()) + 3600 * hour)))
        )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    expected = [*range(1, 9), *range(809, 813), *range(1213, 1216)]
    assert [(event.step, event.value) for event in events] == list(zip(range(1, 16), expected, strict=True))


def test_a_torn_row_of_a_launch_does_not_spoil_the_next(tmp_path):
    (tmp_path / "launches.jsonl").write_bytes(ROWS + b'{"time": "2026-')
    log = RunLog(tmp_path, Layout(1, 1, 0, 0, torch.device("cpu")), 0, 1)
    log.launched(5, [], {"recompute": "none"})
    log.close()
    rows = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 5] and rows[-1]["changed"] == {}
