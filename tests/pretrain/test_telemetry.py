"""Weights & Biases, where it is installed: the rows of metrics.jsonl in a run of its own that a resume goes on with."""

import importlib.util
import os
import subprocess
import sys

import pytest

from pretrain.settings import make_plan, parse_args
from tests.pretrain.test_train import ROOT, arguments, config_file  # noqa: F401 (a fixture)

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
    with pytest.raises(
        ValueError, match="--wandb bert needs the package wandb: pip install wandb, or leave --wandb out"
    ):
        make_plan(parse_args(arguments(shard_folders, config_file, tmp_path / "run", "--wandb", "bert")), 1)
