"""A grid of fine-tunings as a user runs it: side by side, killed, gone on with, and told what is wrong."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.cli import run_cli
from evaluation.grid import main
from tests.evaluation.test_finetune import arguments, read, task

__all__ = ["task"]  # the fixture
ROOT = Path(__file__).parents[2]
POINTS = ["--learning-rates", "0.005", "1e-9", "--batch-sizes", "8", "--epochs", "2", "--seeds", "0", "1"]


def grid(folder, output, *more):
    """The command line: a rate that learns and one that does not, two seeds, two jobs at a time."""
    own = {name: None for name in ("epochs", "batch-size", "learning-rate", "seeds")}
    rest = arguments(folder, output, **own, **{"keep-weights": "none"})
    return [*POINTS, "--jobs", "2", *rest, *more]


@pytest.mark.slow
def test_killed_and_restarted_it_gives_the_same_table(task, capsys):
    main(grid(task, "undisturbed"))
    undisturbed = capsys.readouterr().out
    command = [sys.executable, "-m", "evaluation.grid", *grid(task, "killed")]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(task.glob("killed/*/seed_*/result.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    num_done = len(list(task.glob("killed/*/seed_*/result.json")))
    assert 0 < num_done < 4
    main(grid(task, "killed"))
    again = capsys.readouterr().out
    assert f"finished before and kept: {num_done} of 4 runs" in again
    rows = undisturbed.splitlines()[-2:]
    assert again.splitlines()[-2:] == rows
    assert len(list((task / "killed/cache").glob("*.features"))) == 2  # of four runs
    assert rows[0].split()[:4] == ["0.005", "8", "2", "100.0"] and rows[1].split()[0] == "1e-09"
    for name in ("rate-0.005_batch-8_epochs-2", "rate-1e-09_batch-8_epochs-2"):
        runs = [read(task / folder / name / "results.json") for folder in ("undisturbed", "killed")]
        assert runs[0]["last"] == runs[1]["last"] and [row["seed"] for row in runs[1]["seeds"]] == [0, 1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--learning-rate", "1e-4"], "--learning-rate is not the grid's"),
        (["--jobs", "0"], "--jobs 0: at least 1"),
        (["--epochs", "2", "2"], "--epochs 2 2: each value once"),
        (["--task", "classificatoin"], "rate-0.005_batch-8_epochs-2, seed 0: --task classificatoin is unknown"),
    ],
)
def test_bad_input_is_told(task, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        run_cli(main, grid(task, "run", "--learning-rates", "0.005", "--seeds", "0", *more))
    assert stop.value.code == 2 and message in capsys.readouterr().err
