"""From phase 1 to phase 2: longer sequences, weights and moments kept, the schedule restarted; and dry runs."""

import json
from pathlib import Path

import pytest
import torch

from data_prep import build
from pretrain.checkpoint_reader import list_checkpoints
from pretrain.convert import main as convert
from pretrain.metrics_file import read_metrics
from pretrain.train import main
from tests.pretrain.test_train import (
    CONFIG,
    ROOT,
    SMALL_MODEL,
    arguments,
    losses,
    prepare,
    run_training,
    state,
    without_pair_task,
)
from tests.ranks import run_ranks

PHASE_2 = {
    **CONFIG,
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "zero_optimization": {"stage": 2},
    "optimizer": {"type": "Lamb", "params": {"lr": 4e-3, "weight_decay": 0.02}},
    "scheduler": {"type": "WarmupLinearLR", "params": {"total_num_steps": 4, "warmup_num_steps": 2}},
}


@pytest.fixture(scope="module")
def config_files(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("configs")
    for name, config in (("phase1", CONFIG), ("phase2", PHASE_2)):
        (folder / f"{name}.json").write_text(json.dumps(config))
    return folder / "phase1.json", folder / "phase2.json"


@pytest.fixture(scope="module")
def long_shards(shard_folders, tmp_path_factory) -> tuple[Path, Path]:
    """The same corpora in sequences of 512."""
    folder = tmp_path_factory.mktemp("long")
    for split in shard_folders:
        build.main(
            ["--corpus", f"{split}_corpus", "--output", f"{folder}/{split.name}", "--seq-length", "512",
             "--max-predictions", "80", "--duplicates", "1", "--pair-task", "nsp", "--seed", "0"]
        )  # fmt: skip
    return folder / "train", folder / "heldout"


@pytest.fixture(scope="module")
def phase_1(shard_folders, config_files, tmp_path_factory) -> Path:
    """Three steps of six at tensor parallel 2, ZeRO 1."""
    output = tmp_path_factory.mktemp("phase1") / "run"
    more = ["--tensor-parallel", "2", "--stop-after", "3"]
    run_ranks(run_training, 2, arguments(shard_folders, config_files[0], output, *more))
    return output


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "stops"),
    [(2, 1, (1, 3, 4)), pytest.param(4, 2, (10, 20), marks=pytest.mark.slow)],
)
def test_through_the_switch_a_stopped_run_is_bit_for_bit_the_uninterrupted_one(
    world_size, tensor_parallel, stops, long_shards, config_files, phase_1, tmp_path
):
    """Data parallel 2 and ZeRO 2, then tensor parallel 2 too, after tensor parallel 2 and ZeRO 1; dropout on."""
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    more = ["--continue-from", str(phase_1), "--steps", str(stops[-1]), "--tensor-parallel", str(tensor_parallel)]
    run_ranks(run_training, world_size, arguments(long_shards, config_files[1], whole, *more))
    for stop in stops:
        stopping = arguments(long_shards, config_files[1], halves, *more, "--stop-after", str(stop))
        run_ranks(run_training, world_size, stopping)
    assert len(losses(whole)) == stops[-1]
    assert losses(halves) == losses(whole)
    found, expected = state(halves), state(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_metrics(halves, "eval")[-1] == read_metrics(whole, "eval")[-1]
    if stops[-1] == 4:
        rates = [row["learning_rate"] for row in read_metrics(whole, "train")]
        assert rates == pytest.approx([2e-3, 4e-3, 2e-3, 1e-3])


def test_weights_and_moments_are_those_of_phase_1(long_shards, config_files, phase_1, tmp_path):
    """One step at rate 0: exp_avg' = 0.9 exp_avg + 0.1 g, without moments 0.1 g. Measured: 2.5e-7 of the largest."""
    for flag in ("--continue-from", "--init-from"):
        more = [flag, str(phase_1), "--steps", "1", "--set", "optimizer.params.lr=0"]
        run_ranks(run_training, 1, arguments(long_shards, config_files[1], tmp_path / flag, *more))
    before, kept, fresh = (state(run) for run in (phase_1, tmp_path / "--continue-from", tmp_path / "--init-from"))
    for (name, kind), moment in before.items():
        rows = kept[name, kind].shape[0]  # the vocabulary is padded for one rank, not for two
        if kind == "weight":
            assert torch.equal(kept[name, kind], moment[:rows])
            continue
        decay = {"exp_avg": 0.9, "exp_avg_sq": 0.999}[kind]
        expected = decay * moment[:rows] + fresh[name, kind]
        assert moment.abs().max() > 0
        assert (kept[name, kind] - expected).abs().max() < 1e-6 * expected.abs().max()


def test_what_has_no_moments_is_refused(long_shards, shard_folders, config_files, phase_1, tmp_path):
    checkpoint = list_checkpoints(phase_1)[-1]
    run = prepare(_continuing(long_shards, config_files, tmp_path, checkpoint))
    assert run.identity()["continue_from"].keys() == {"run.json", "checkpoint.json"}
    convert(["--checkpoint", str(phase_1), "--output", str(tmp_path / "hf")])
    with pytest.raises(
        ValueError, match="--continue-from .*/hf: not one of our runs or checkpoints, so it has no optimizer"
    ):
        prepare(_continuing(long_shards, config_files, tmp_path, tmp_path / "hf"))
    folders = [without_pair_task(folder, tmp_path / folder.name) for folder in shard_folders]
    run_ranks(run_training, 1, arguments(folders, config_files[0], tmp_path / "no pairs", "--stop-after", "1"))
    with pytest.raises(ValueError, match="has no bert.pooler.dense.weight, .* train on shards with the pair task of"):
        prepare(_continuing(long_shards, config_files, tmp_path, tmp_path / "no pairs"))
    with pytest.raises(ValueError, match="no checkpoint here; give a run folder"):
        prepare(_continuing(long_shards, config_files, tmp_path, tmp_path))
    with pytest.raises(ValueError, match="not allowed with argument --continue-from"):
        prepare([*_continuing(long_shards, config_files, tmp_path, checkpoint), "--init-from", str(phase_1)])
    with pytest.raises(ValueError, match="has hidden_size=128, the model has 256"):
        prepare([*_continuing(long_shards, config_files, tmp_path, checkpoint), "--model", "mini"])


def _continuing(shards, config_files, folder: Path, start: Path) -> list[str]:
    return arguments(shards, config_files[1], folder / "run", "--continue-from", str(start))


def test_a_dry_run_prints_everything_and_writes_nothing(shard_folders, config_files, tmp_path, capsys):
    main(arguments(shard_folders, config_files[0], tmp_path / "run", "--dry-run", "--steps", "77"))
    printed = capsys.readouterr().out
    assert '"total_num_steps": 77' in printed and '"hidden_size": 128' in printed and '"tensor_parallel": 1' in printed
    assert (
        "time to train, 77 steps" in printed and "peak, of " in printed and printed.endswith("Nothing was written.\n")
    )
    assert not (tmp_path / "run").exists()


SHIPPED = [
    (["1.3b_tp_zero2.json"], 2),
    (["3.9b_tp_zero3_offload.json"], 2),
    (["large_lamb_phase1.json", "large_lamb_phase2.json"], 1),
    (["large_lamb_deepspeed_phase1.json", "large_lamb_deepspeed_phase2.json"], 1),
]


@pytest.mark.slow
@pytest.mark.parametrize(("files", "tensor_parallel"), SHIPPED, ids=lambda value: str(value))
def test_the_shipped_phases_run_scaled_down(files, tensor_parallel, shard_folders, long_shards, tmp_path):
    """25 steps of each phase, batch and model overridden on the command line: the loss falls through both."""
    (tmp_path / "model.json").write_text(json.dumps(SMALL_MODEL | {"max_position_embeddings": 512}))
    seen, start = [], []
    for number, (file, folders) in enumerate(zip(files, (shard_folders, long_shards), strict=False)):
        output = tmp_path / str(number)
        more = ["--model", str(tmp_path / "model.json"), "--tensor-parallel", str(tensor_parallel), "--steps", "25"]
        more += ["--set", "train_batch_size=8", "train_micro_batch_size_per_gpu=4", *start]
        run_ranks(run_training, 2, arguments(folders, ROOT / "ds_configs" / file, output, *more))
        seen += losses(output)
        start = ["--continue-from", str(output)]
    print(files, f"{seen[0]:.3f} -> {seen[-1]:.3f}")
    assert len(seen) == 25 * len(files)
    assert seen[-1] < seen[0]
