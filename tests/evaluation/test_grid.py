"""A grid of fine-tunings as a user runs it: several at a time, killed and resumed, with wrong input."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.cli import command_line, parse, run_cli
from data_prep.files import claim_output
from evaluation import finetune
from evaluation.grid import GridOptions, Setting, main, shared_settings
from evaluation.options import FinetuneOptions
from tests.evaluation.test_finetune import arguments, read, task

__all__ = ["task"]  # the fixture
ROOT = Path(__file__).parents[2]
POINTS = ["--learning-rates", "0.005", "1e-9", "--batch-sizes", "8", "--epochs", "2", "--seeds", "0", "1"]
OWN = {name: None for name in ("epochs", "batch-size", "learning-rate", "seeds")}  # the grid's, not finetune's


def grid(folder, output, *more):
    """The command line: a rate that learns and one that does not, two seeds, two runs at a time."""
    rest = arguments(folder, output, **OWN, **{"keep-weights": "none"})
    return [*POINTS, "--workers", "2", *rest, *more]


@pytest.mark.slow
def test_killed_and_restarted_it_gives_the_same_table(task, capsys):
    main(grid(task, "undisturbed"))
    undisturbed = capsys.readouterr().out
    command = [sys.executable, "-m", "evaluation.grid", *grid(task, "killed")]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(task.glob("killed/*/seed_*/finished.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    num_done = len(list(task.glob("killed/*/seed_*/finished.json")))
    assert 0 < num_done < 4
    main(grid(task, "killed"))
    again = capsys.readouterr().out
    assert f"already finished: {num_done} of 4 runs" in again
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
        (["--learning-rate", "1e-4"], "unrecognized arguments: --learning-rate"),
        (["--batch-size=16"], "unrecognized arguments: --batch-size"),
        (["--workers", "0"], "argument --workers: 0 is below 1"),
        (["--epochs", "2"], "--epochs 2 2: give each value once"),
        (["--learning-rates", "5"], "argument --learning-rates: 5 is not below 1"),
        (["--task", "classificatoin"], "--task classificatoin is unknown"),
        (["--micro-batch-size", "3"], "--micro-batch-size 3 does not divide the 8 examples"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(task, capsys, more, message):
    with pytest.raises(SystemExit) as stop:
        run_cli(main, grid(task, "run", *more))
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not (task / "run").exists()


def small_grid(folder, *points, **changes):
    """The command line of a grid of one rate, one batch size and one epoch, unless `points` say more."""
    rest = arguments(folder, "run", **OWN, **{"keep-weights": "none"} | changes)
    return ["--learning-rates", "0.005", "--batch-sizes", "8", "--epochs", "1", *points, *rest]


def test_a_finished_grid_is_that_of_its_settings_and_seeds_alone(task, capsys):
    options = parse(GridOptions, "evaluation.grid", small_grid(task))
    (setting,) = options.settings
    claim_output(options.output, "evaluation.grid", shared_settings(options))
    run = options.finetune_options(setting, (0, 1))
    assert parse(FinetuneOptions, "evaluation.finetune", command_line(run)) == run
    finetune.main(command_line(run))
    # It shows the seeds asked for; an option given twice adds its values.
    seeds = read(task / "run/rate-0.005_batch-8_epochs-1/results.json")["seeds"]
    scores = [100 * row["epochs"][0]["scores"]["accuracy"] for row in seeds]
    for points, mean in ((["--seeds", "1"], scores[1]), (["--seeds", "0", "--seeds", "1"], sum(scores) / 2)):
        main(small_grid(task, *points))
        printed = capsys.readouterr().out
        number = len(points) // 2
        assert f"already finished: {number} of {number} runs" in printed
        assert float(printed.splitlines()[-1].split()[4]) == pytest.approx(mean, abs=0.05)
    # What all its runs share is refused by the name of what differs.
    (task / "dev2.tsv").write_text("sentence\tlabel\nthe hat\tred\n", encoding="utf-8")
    dropout = "model.attention_probs_dropout_prob: 0.1 there, 0.2 requested; model.hidden_dropout_prob: 0.1 there"
    refused = [
        ({"weight-decay": 0.5}, "(deepspeed_config.optimizer.params.weight_decay: 0.01 there, 0.5 requested)"),
        ({"seq-length": 8}, "(seq_length: 16 there, 8 requested)"),
        ({"keep-weights": "last"}, "(keep_weights: 'none' there, 'last' requested)"),
        ({"patience": 1}, "(patience: None there, 1 requested)"),
        ({"dropout": 0.2}, f"({dropout}, 0.2 requested)"),
        ({"dev-file": "dev2.tsv"}, "(dev.file: "),
        ({"checkpoint": "majority", "model": None, "vocab": None}, "(checkpoint: 'random' there, 'majority' requested"),
        ({"task": "ranking"}, "column 'question' is missing"),
        ({"checkpoint": "nowhere", "model": None, "vocab": None}, "--checkpoint nowhere: no such folder"),
    ]
    for changes, message in refused:
        with pytest.raises(ValueError, match=re.escape(message)):
            main(small_grid(task, "--seeds", "0", "1", **changes))
    # Two rates that look alike are two settings.
    other = Setting(0.0050000001, 8, 1)
    assert other.name != Setting(0.005, 8, 1).name and not (task / "run" / other.name).exists()
