"""The trainer on real ranks: stop and resume without a trace, evaluation that does not depend on the layout, wrong
input refused.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data_prep.cli import sha256_file
from data_prep.shards import make_manifest
from pretrain.checkpoint import MOMENTS, find_checkpoint, read_tensors, tensor_reader
from pretrain.faults import Watchdog
from pretrain.layout import init_layout
from pretrain.settings import claim_run_folder, make_plan, parse_args
from pretrain.telemetry import read_metrics
from pretrain.train import main, train
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
        *("--model", "tiny", "--data", str(train_shards), "--eval-data", str(eval_shards)),
        *("--deepspeed_config", str(config_file), "--output", str(output), "--log-interval", "1", *more),
    ]


def run_training(argv: list[str]) -> None:
    """What `main` does on warm ranks, whose process group must outlive the run."""
    args = parse_args(argv)
    layout = init_layout(args.tensor_parallel, args.sequence_parallel)
    plan = make_plan(args, layout.dp_size * layout.tp_size)
    if layout.rank == 0:
        claim_run_folder(plan)
    layout.barrier()
    with Watchdog(args.timeout) as watchdog:
        train(plan, layout, watchdog)


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
        [(1, 2, 1), (2, 1, 3)],
        [(2, 1, 2), (1, 1, 0)],
        [(2, 1, 3), (1, 2, 2)],
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


@pytest.mark.parametrize(
    ("more", "world_size", "message"),
    [
        (["--tensor-parallel", "3"], 3, "num_attention_heads=2 cannot be split over --tensor-parallel 3"),
        (["--tensor-parallel", "2"], 3, "3 ranks cannot form groups"),
        (
            ["--sequence-parallel"],
            1,
            "splits tokens over the ranks of --tensor-parallel, which is 1",
        ),
        (["--set", "train_batch_size=15"], 2, "train_batch_size=15 is not a multiple"),
        (["--set", "gradient_cliping=1"], 1, "did you mean 'gradient_clipping'"),
        (["--set", "optimizer.params.learning_rate=1"], 1, "unknown key 'learning_rate'"),
        (["--set", "optimizer.type=Lamp"], 1, "did you mean 'Lamb'"),
        (["--set", "optimizer.params.lr=fast"], 1, "optimizer.params.lr='fast'"),
        (["--set", "train_batch_size"], 1, "expected KEY=VALUE"),
        (["--set", "bf16.enabled=true", "zero_optimization.stage=0"], 1, "choose stage 1"),
        (["--model", "tny"], 1, "did you mean 'tiny'"),
        (["--steps", "0"], 1, "--steps 0"),
        (["--timeout", "-0.5"], 1, "--timeout -0.5 is not a positive number"),
        (["--spike-factor", "1"], 1, "--spike-factor 1 is not above 1: every step would be a spike"),
        (["--skip-spikes"], 1, "--skip-spikes has to know what a spike is: give --spike-factor too"),
        (["--data", "nowhere"], 1, "nowhere does not exist"),
        (["--data", "{train}=1", "nowhere=1"], 1, "nowhere does not exist"),
        (
            ["--data", "{train}", "{heldout}=1"],
            1,
            "--data .*/train: its weight is missing; several data sets are given",
        ),
        (["--data", "{train}=1", "{heldout}=much"], 1, "heldout=much: 'much' is no number; several data sets are"),
        (["--data", "{train}=1", "{heldout}=1/0"], 1, "'1/0' is no number"),
        (["--data", "{train}=1", "{heldout}=0"], 1, "heldout=0: a weight is a number above 0; leave the folder out"),
        (["--data", "{train}=1", "{heldout}=-2"], 1, "heldout=-2: a weight is a number above 0"),
        (["--data", "{train}=1", "{train}/../train=1"], 1, "twice; give it once, with the sum of the weights"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    more, world_size, message, shard_folders, config_file, tmp_path
):
    more = with_folders(more, shard_folders)
    args = parse_args(arguments(shard_folders, config_file, tmp_path / "run", *more))
    with pytest.raises(ValueError, match=message):
        make_plan(args, world_size)
    assert not (tmp_path / "run").exists()


def test_a_missing_key_is_named(shard_folders, config_file, tmp_path):
    config_file.write_text(json.dumps({key: value for key, value in CONFIG.items() if key != "train_batch_size"}))
    with pytest.raises(ValueError, match="'train_batch_size' is missing"):
        make_plan(parse_args(arguments(shard_folders, config_file, tmp_path / "run")), 1)


def test_another_runs_folder_is_refused_and_left_as_it_is(shard_folders, config_file, tmp_path):
    output = tmp_path / "run"
    claim_run_folder(make_plan(parse_args(arguments(shard_folders, config_file, output)), 1))
    before = {path.name: path.read_bytes() for path in output.iterdir()}
    with pytest.raises(ValueError, match="holds another run"):
        main(arguments(shard_folders, config_file, output, "--seed", "9"))
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_shards_with_another_vocabulary_are_refused(shard_folders, config_file, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(shard_folders[0], other)
    (vocabulary,) = other.glob("*.model")
    vocabulary.write_bytes(vocabulary.read_bytes() + b"x")
    with pytest.raises(ValueError, match="vocabulary"):
        make_plan(parse_args(arguments((other, shard_folders[1]), config_file, tmp_path / "run")), 1)


def test_bf16_with_all_that_saves_memory_follows_float32(shard_folders, config_file, tmp_path):
    """Pre-LayerNorm and sinusoidal positions, which are no weights. Measured: 2.8e-5 relative."""
    model = SMALL_MODEL | {"model_type": "megatron-bert", "position_embedding_type": "sinusoidal"}
    (tmp_path / "model.json").write_text(json.dumps(model))
    common = ["--model", str(tmp_path / "model.json"), "--dropout", "0"]
    run_ranks(run_training, 1, arguments(shard_folders, config_file, tmp_path / "plain", *common))
    saving = ["--tensor-parallel", "2", "--sequence-parallel", "--recompute", "full", "--set", "bf16.enabled=true"]
    run_ranks(run_training, 2, arguments(shard_folders, config_file, tmp_path / "saving", *common, *saving))
    assert losses(tmp_path / "saving") == pytest.approx(losses(tmp_path / "plain"), rel=2e-4)


def without_pair_task(folder: Path, copy: Path) -> Path:
    """The same shards, told as if they held no pairs."""
    return told_otherwise(folder, copy, "pair_task", "none")


def told_otherwise(folder: Path, copy: Path, key: str, value: object) -> Path:
    """The same shards, told as if they had been built with another setting."""
    shutil.copytree(folder, copy)
    told = json.loads((copy / "manifest.json").read_text())
    manifest = make_manifest(told["config"] | {key: value}, told["vocab"], told["corpus"], told["shards"])
    (copy / "manifest.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.parametrize(("key", "value"), [("seq_length", 128), ("pair_task", "sop"), ("masked_lm_prob", 0.2)])
def test_only_data_sets_of_one_kind_are_mixed(key, value, shard_folders, config_file, tmp_path):
    other = told_otherwise(shard_folders[1], tmp_path / "other", key, value)
    more = ["--data", f"{shard_folders[0]}=1", f"{other}=1"]
    with pytest.raises(ValueError, match=f"other has {key}={value}, but .*/train has {key}=.*; build both alike"):
        make_plan(parse_args(arguments(shard_folders, config_file, tmp_path / "run", *more)), 1)


def test_data_sets_of_two_vocabularies_are_not_mixed(shard_folders, config_file, tmp_path):
    other = shutil.copytree(shard_folders[1], tmp_path / "other")
    (vocabulary,) = other.glob("*.model")
    vocabulary.write_bytes(vocabulary.read_bytes() + b"x")
    told = json.loads((other / "manifest.json").read_text())
    vocab = told["vocab"] | {"sha256": sha256_file(vocabulary)}
    (other / "manifest.json").write_text(
        json.dumps(make_manifest(told["config"], vocab, told["corpus"], told["shards"]))
    )
    more = ["--data", f"{shard_folders[0]}=1", f"{other}=1"]
    with pytest.raises(ValueError, match="other and .*/train have different vocabularies; build both with the same"):
        make_plan(parse_args(arguments(shard_folders, config_file, tmp_path / "run", *more)), 1)


def test_what_is_read_and_in_which_shares_makes_a_run(shard_folders, config_file, tmp_path):
    """The scale of the weights does not, nor the name of a lone folder, which may hold a sign of its own."""

    def identity(*data: str) -> dict:
        more = ["--data", *with_folders(data, (shard_folders[0], tmp_path / "a=b"))]
        return make_plan(parse_args(arguments(shard_folders, config_file, tmp_path / "run", *more)), 1).identity()

    shutil.copytree(shard_folders[0], tmp_path / "a=b")
    assert identity("{train}") == identity("{train}=7") == identity("{heldout}") == identity("{heldout}=2")
    shutil.rmtree(tmp_path / "a=b")
    shutil.copytree(shard_folders[1], tmp_path / "a=b")
    mixed = identity("{train}=3", "{heldout}=1")
    assert mixed == identity("{train}=0.6", "{heldout}=0.2")
    assert mixed["data"] not in (identity("{train}=1", "{heldout}=1")["data"], identity("{train}")["data"])
    assert [share for _, share in mixed["data"]] == ["3/4", "1/4"]


def test_the_data_decides_whether_there_is_a_pair_head(shard_folders, config_file, tmp_path):
    """Without one the pooler would get no gradient, and weight decay would shrink it: so there is none."""
    plain = without_pair_task(shard_folders[0], tmp_path / "train")
    with pytest.raises(ValueError, match="has pair_task=nsp, but .* has pair_task=none"):
        make_plan(parse_args(arguments((plain, shard_folders[1]), config_file, tmp_path / "run")), 1)
    folders = plain, without_pair_task(shard_folders[1], tmp_path / "heldout")
    run_ranks(run_training, 1, arguments(folders, config_file, tmp_path / "run", "--steps", "2"))
    names = [name for name, _ in read_tensors(find_checkpoint(tmp_path / "run"))]
    assert names and not [name for name in names if "pooler" in name or "seq_relationship" in name]
    assert json.loads((tmp_path / "run/config.json").read_text())["architectures"] == ["BertForMaskedLM"]
    assert "pair_loss" not in read_metrics(tmp_path / "run", "train")[-1]


def test_a_model_too_short_for_the_shards_is_refused(shard_folders, config_file, tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps(SMALL_MODEL | {"max_position_embeddings": 32}))
    with pytest.raises(ValueError, match="max_position_embeddings=32"):
        make_plan(parse_args(arguments(shard_folders, config_file, tmp_path / "run", "--model", str(path))), 1)


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
    expected = dict(read_tensors(find_checkpoint(whole)))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in read_tensors(find_checkpoint(killed)))
