"""The trainer on real ranks: stop and resume without a trace, evaluation that does not depend on the layout, wrong
input refused.
"""

import json
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from data_prep.cli import parse
from data_prep.shards import make_manifest
from pretrain.checkpoint_reader import MOMENTS, find_checkpoint, tensor_reader
from pretrain.layout import init_layout
from pretrain.metrics_file import read_metrics
from pretrain.options import TrainingRun, TrainOptions, claimed_run_folder, prepare_run
from pretrain.train import train
from pretrain.watchdog import Watchdog
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
CONFIG = {
    "train_batch_size": 16,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_clipping": 1.0,
    "zero_optimization": {"stage": 1},
    "optimizer": {"type": "Lamb", "params": {"lr": 5e-3}},
    "scheduler": {
        "type": "WarmupPolynomialLR",
        "params": {"total_num_steps": 6, "warmup_proportion": 0.3, "degree": 0.5},
    },
}


SMALL_MODEL = {
    "vocab_size": 600,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


@pytest.fixture
def config_file(tmp_path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def arguments(shard_folders, config_file, output, *more: str) -> list[str]:
    train_shards, eval_shards = shard_folders
    return [
        *(() if "--data" in more else ("--data", str(train_shards))),
        *("--model", "tiny", "--eval-data", str(eval_shards)),
        *("--deepspeed_config", str(config_file), "--output", str(output), "--log-interval", "1", *more),
    ]


def prepare(argv: list[str], world_size: int = 1) -> TrainingRun:
    """The run that a command line describes."""
    return prepare_run(parse(TrainOptions, "pretrain.train", argv), world_size)


def run_training(argv: list[str]) -> None:
    """What `main` does on warm ranks, whose process group must outlive the run."""
    options = parse(TrainOptions, "pretrain.train", argv)
    layout = init_layout(options.tensor_parallel, options.sequence_parallel)
    run = prepare_run(options, layout.dp_size * layout.tp_size)
    with claimed_run_folder(run) if layout.rank == 0 else nullcontext(), Watchdog(options.timeout) as watchdog:
        layout.barrier()
        train(run, layout, watchdog)


def with_folders(flags: list[str], shard_folders) -> list[str]:
    """Flags with the shards' folders where they say {train} and {heldout}."""
    train_shards, eval_shards = map(str, shard_folders)
    return [flag.replace("{train}", train_shards).replace("{heldout}", eval_shards) for flag in flags]


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(output, "train")]


def state(run: Path) -> dict[tuple, torch.Tensor]:
    """(name, kind) -> weight or moment of a run's newest checkpoint."""
    names, read = tensor_reader(find_checkpoint(run))
    return {(name, kind): read(name, kind) for name in names for kind in ("weight", *MOMENTS)}


SPIKES = ["--spike-factor", "1.15", "--skip-spikes"]  # at a rate of 1 there are some
MIXED = ["--data", "{train}=3", "{heldout}=0.7"]
ALL_STAGES = [
    (2, 1, 0, SPIKES),
    (2, 1, 1, []),
    (2, 1, 2, MIXED),
    (2, 1, 3, ["--recompute", "full", "--masks", "dynamic", *MIXED, *SPIKES]),
    (2, 2, 2, ["--sequence-parallel", "--recompute", "selective"]),
]
ALL_STAGES += [
    pytest.param(4, 2, stage, flags, marks=pytest.mark.slow)
    for stage, flags in enumerate(([], SPIKES, ["--sequence-parallel", *MIXED], SPIKES))
]


@pytest.mark.parametrize(
    ("world_size", "tensor_parallel", "stage", "flags"),
    ALL_STAGES,
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_stopped_and_resumed_is_bit_for_bit_the_uninterrupted_run(
    world_size, tensor_parallel, stage, flags, shard_folders, config_file, tmp_path
):
    """20 steps are 10 and a resume and 10, dropout 0.1: losses, spikes, evaluation, weights and moments."""
    (tmp_path / "model.json").write_text(json.dumps(SMALL_MODEL))
    more = ["--model", str(tmp_path / "model.json"), "--steps", "20", *with_folders(flags, shard_folders)]
    more += ["--tensor-parallel", str(tensor_parallel), "--set", f"zero_optimization.stage={stage}"]
    more += ["optimizer.params.lr=1"]
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    run_ranks(run_training, world_size, arguments(shard_folders, config_file, whole, *more))
    run_ranks(run_training, world_size, arguments(shard_folders, config_file, halves, *more, "--stop-after", "10"))
    assert not (halves / "finished.json").exists()
    run_ranks(run_training, world_size, arguments(shard_folders, config_file, halves, *more))
    assert len(losses(whole)) == 20 and json.loads((whole / "config.json").read_text())["hidden_dropout_prob"] == 0.1
    assert losses(halves) == losses(whole)
    spikes = read_metrics(whole, "spike")
    assert read_metrics(halves, "spike") == spikes and all(row["skipped"] for row in spikes)
    if "--skip-spikes" in flags:
        assert min(row["step"] for row in spikes) <= 10 < max(row["step"] for row in spikes)
    assert read_metrics(halves, "eval")[-1] == read_metrics(whole, "eval")[-1]
    found, expected = state(halves), state(whole)
    assert len(expected) > 60 and all(torch.equal(found[key], expected[key]) for key in expected)
    assert (halves / "finished.json").exists()


def test_every_tensors_norms_are_logged_on_demand(shard_folders, config_file, tmp_path):
    more = ["--log-tensors", "--steps", "2", "--log-interval", "2"]
    run_ranks(run_training, 2, arguments(shard_folders, config_file, tmp_path / "run", *more))
    rows = [json.loads(line) for line in (tmp_path / "run" / "tensors.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    norms, updates, ratios = (rows[1][title] for title in ("weight_norms", "update_norms", "trust_ratios"))
    assert "bert.encoder.layer.1.attention.self.key.weight" in norms
    assert all(ratios[name] == pytest.approx(norms[name] / updates[name], rel=1e-5) for name in norms)
    summary = read_metrics(tmp_path / "run", "train")[-1]
    assert summary["trust_ratio_max"] == pytest.approx(max(ratios.values()))


@pytest.mark.parametrize(
    "layouts",
    [
        [(2, 1, 2), (1, 1, 0)],
        [(2, 1, 3), (1, 2, 2)],
        pytest.param([(1, 2, 1), (2, 1, 3)], marks=pytest.mark.slow),
        pytest.param([(4, 1, 2), (2, 2, 1), (1, 1, 0), (2, 1, 3), (1, 2, 1), (4, 1, 3)], marks=pytest.mark.slow),
    ],
    ids=lambda layouts: " ".join("x".join(map(str, layout)) for layout in layouts),
)
def test_a_run_goes_on_at_any_layout(layouts, shard_folders, config_file, tmp_path):
    """(dp, tp, ZeRO) after (dp, tp, ZeRO), one step each or more, by the same command. Measured: 4e-9 relative."""
    whole, moving = tmp_path / "whole", tmp_path / "moving"
    run_ranks(run_training, 1, arguments(shard_folders, config_file, whole, "--dropout", "0"))
    for index, (dp_size, tp_size, stage) in enumerate(layouts, start=1):
        more = ["--dropout", "0", "--tensor-parallel", str(tp_size), "--set", f"zero_optimization.stage={stage}"]
        more += ["train_micro_batch_size_per_gpu=2"] * (stage == 3)  # that too may change
        stop = ["--stop-after", str(6 * index // len(layouts))]
        run_ranks(run_training, dp_size * tp_size, arguments(shard_folders, config_file, moving, *more, *stop))
    differences = [abs(a / b - 1) for a, b in zip(losses(moving), losses(whole), strict=True)]
    print(f"{layouts}: {max(differences):.1e}")
    assert max(differences) < 2e-6
    assert (moving / "finished.json").exists()


def test_held_out_averages_do_not_depend_on_the_layout(shard_folders, config_file, tmp_path):
    """Dropout off by zero steps of it: one step, evaluated at three layouts. Measured: 2e-7 relative."""
    rows = []
    for world_size, tensor_parallel in ((1, 1), (2, 1), (2, 2)):
        output = tmp_path / f"{world_size}-{tensor_parallel}"
        more = ["--steps", "1", "--tensor-parallel", str(tensor_parallel), "--set", "optimizer.params.lr=0"]
        run_ranks(run_training, world_size, arguments(shard_folders, config_file, output, *more))
        rows.append(read_metrics(output, "eval")[-1])
    for row in rows[1:]:
        assert row["mlm_loss"] == pytest.approx(rows[0]["mlm_loss"], rel=1e-6)
        assert row["mlm_accuracy"] == rows[0]["mlm_accuracy"]


def test_a_stated_default_and_another_layout_are_the_same_run(shard_folders, config_file, tmp_path):
    """Each start leaves word of what it may change, and of what it has changed."""
    argv = [*arguments(shard_folders, config_file, tmp_path / "run"), "--steps", "3"]
    run_ranks(run_training, 1, [*argv, "--stop-after", "1"])
    more = ["--set", "optimizer.params.min_trust_ratio=0.0", "bf16.enabled=false"]
    more += ["--set", "zero_optimization.stage=2", "--stop-after", "2", "--recompute", "full"]
    run_ranks(run_training, 1, [*argv, *more])
    first, second = (json.loads(line) for line in (tmp_path / "run/launches.jsonl").read_text().splitlines())
    assert (
        first["settings"]["deepspeed"]
        == {
            "train_micro_batch_size_per_gpu": 4,
            "zero_optimization": {"stage": 1},
        }
        and not first["changed"]
    )
    assert second["changed"] == {
        "deepspeed.zero_optimization.stage": [1, 2],
        "recompute": ["none", "full"],
        "stop_after": [1, 2],
    }


def test_damaged_bytes_of_shards_are_not_trained_on(shard_folders, config_file, tmp_path):
    """Zeros inside a shard of unchanged size, which only the checksum reveals; each rank reads a part of the shards."""
    folders = [shutil.copytree(folder, tmp_path / folder.name) for folder in shard_folders]
    shard = sorted(folders[1].glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[2000:4000] = bytes(2000)
    shard.write_bytes(content)
    messages = run_ranks(refusal_of, 2, arguments(folders, config_file, tmp_path / "run"))
    expected = f"{shard}: not the bytes that were written (sha256 differs); copy them again or rebuild the folder"
    assert messages == [f"{expected} with `python -m data_prep.build`"] * 2
    assert not (tmp_path / "run/metrics.jsonl").exists()


def refusal_of(argv: list[str]) -> str:
    """What a run is refused with; all ranks are, so that they can be used again."""
    with pytest.raises(ValueError) as caught:
        run_training(argv)
    return str(caught.value)


def test_every_stage_logs_the_norm_of_the_gradients(shard_folders, config_file, tmp_path):
    """Before clipping, and the same without ZeRO on two tensor-parallel ranks as with ZeRO 1 on two ranks of data."""
    rows = []
    for name, more in (
        ("zero1", ["--set", "zero_optimization.stage=1"]),
        ("zero0", ["--set", "zero_optimization.stage=0", "--tensor-parallel", "2"]),
    ):
        argv = arguments(shard_folders, config_file, tmp_path / name, "--steps", "1", "--dropout", "0", *more)
        run_ranks(run_training, 2, argv)
        rows += read_metrics(tmp_path / name, "train")
    norms = [row["grad_norm"] for row in rows]
    assert norms[0] > 1.5 and norms == pytest.approx(norms[:1] * 2, rel=1e-5)


def test_bf16_with_all_that_saves_memory_follows_float32(shard_folders, config_file, tmp_path):
    """Pre-LayerNorm and sinusoidal positions, which are not parameters. Measured: 2.8e-5 relative."""
    model = SMALL_MODEL | {"model_type": "megatron-bert", "position_embedding_type": "sinusoidal"}
    (tmp_path / "model.json").write_text(json.dumps(model))
    common = ["--model", str(tmp_path / "model.json"), "--dropout", "0"]
    run_ranks(run_training, 1, arguments(shard_folders, config_file, tmp_path / "plain", *common))
    saving = ["--tensor-parallel", "2", "--sequence-parallel", "--recompute", "full", "--set", "bf16.enabled=true"]
    run_ranks(run_training, 2, arguments(shard_folders, config_file, tmp_path / "saving", *common, *saving))
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), rel=2e-4)


def with_setting(folder: Path, copy: Path, key: str, value: object) -> Path:
    """The same shards, with a manifest that states another setting."""
    shutil.copytree(folder, copy)
    manifest = json.loads((copy / "manifest.json").read_text())
    changed = make_manifest(
        manifest["config"] | {key: value}, manifest["vocab"], manifest["corpus"], manifest["shards"]
    )
    (copy / "manifest.json").write_text(json.dumps(changed))
    return copy


def without_pair_task(folder: Path, copy: Path) -> Path:
    """The same shards, with a manifest that states that they hold no pairs."""
    return with_setting(folder, copy, "pair_task", "none")


def test_the_data_decides_whether_there_is_a_pair_head(shard_folders, config_file, tmp_path):
    """Without one the pooler would get no gradient, and weight decay would shrink it: so there is none."""
    plain = without_pair_task(shard_folders[0], tmp_path / "train")
    with pytest.raises(ValueError, match="has pair_task=nsp, but .* has pair_task=none"):
        prepare(arguments((plain, shard_folders[1]), config_file, tmp_path / "run"))
    folders = plain, without_pair_task(shard_folders[1], tmp_path / "heldout")
    run_ranks(run_training, 1, arguments(folders, config_file, tmp_path / "run", "--steps", "2"))
    names, _ = tensor_reader(find_checkpoint(tmp_path / "run"))
    assert names and not [name for name in names if "pooler" in name or "seq_relationship" in name]
    assert json.loads((tmp_path / "run/config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert "pair_loss" not in read_metrics(tmp_path / "run", "train")[-1]


KILLED_BEFORE_STEP = """
import os, signal, sys
from deepspeed import DeepSpeedEngine
from pretrain.train import main

calls, step = [], DeepSpeedEngine.step

def step_or_die(engine, *args, **kwargs):
    calls.append(1)
    if len(calls) == 16:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(engine, *args, **kwargs)

DeepSpeedEngine.step = step_or_die
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_killed_between_backward_and_step_the_curve_goes_on(shard_folders, config_file, tmp_path):
    """kill -9 in step 4 of 6, its last gradients in memory; the checkpoint after step 2 is what is left."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--save-interval", "2"]
    train_alone = [sys.executable, "-m", "pretrain.train"]
    subprocess.run([*train_alone, *arguments(shard_folders, config_file, whole, *options)], cwd=ROOT, check=True)
    again = arguments(shard_folders, config_file, killed, *options)
    died = subprocess.run([sys.executable, "-c", KILLED_BEFORE_STEP, *again], cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    assert [row["step"] for row in read_metrics(killed, "train")] == [1, 2, 3]
    subprocess.run([*train_alone, *again], cwd=ROOT, check=True)
    assert losses(killed) == losses(whole)
    found, expected = state(killed), state(whole)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
