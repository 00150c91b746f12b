"""A step without an update, on real ranks: nothing that is saved changes, and later steps know nothing of it."""

from pathlib import Path

import pytest
import torch

from data_prep.shards import Shards
from pretrain.checkpoint import save_checkpoint
from pretrain.checkpoint_reader import MOMENTS, tensor_reader
from pretrain.data import training_batches
from pretrain.engine import initialize_engine, step_without_update
from pretrain.layout import init_layout
from pretrain.model import BertForPreTraining, init_weights
from pretrain.model_config import ModelConfig
from pretrain.train import accumulate_gradients
from tests.ranks import run_ranks

MODEL = ModelConfig(500, 16, 1, 2, 32)
BF16 = {"bf16": {"enabled": True}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def run_steps(
    tensor_parallel: int, stage: int, more: dict, zero: dict, kind: str, shards: str, folder: str, steps: list[int]
) -> tuple:
    """Trains on the batches `steps`, without an update where one is negative; saves after each. Returns DeepSpeed's
    counters."""
    layout = init_layout(tensor_parallel)
    model = BertForPreTraining(MODEL, layout, "none")
    init_weights(model, seed=1)
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 8 // (layout.dp_size * 2),
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": stage, **zero},
        "optimizer": {"type": kind, "params": {"lr": 1e-2}},
        **more,
    }
    engine, _ = initialize_engine(model, config, layout)
    for number, step in enumerate(steps):
        data = [(Shards(shards), 1)]
        (batch,) = training_batches(
            data, 0, 8, config["train_micro_batch_size_per_gpu"], layout, range(abs(step), abs(step) + 1)
        )
        accumulate_gradients(engine, batch, (0, abs(step)), layout)
        step_without_update(engine) if step < 0 else engine.step()
        save_checkpoint(engine, layout, Path(folder), number, keep=9)
    return engine.global_steps, engine.skipped_steps


def state(folder: Path, number: int) -> dict[tuple, torch.Tensor]:
    names, read = tensor_reader(folder / f"checkpoints/step_{number:08d}")
    return {(name, kind): read(name, kind) for name in names for kind in ("weight", *MOMENTS)}


def same(one: dict, other: dict) -> list[bool]:
    return [torch.equal(one[key], other[key]) for key in one]


@pytest.mark.parametrize("kind", ["Lamb", "AdamW"])
@pytest.mark.parametrize(
    ("tensor_parallel", "stage", "more", "zero"),
    [(1, 0, {}, {}), (1, 1, BF16, {}), (1, 2, {}, {}), (1, 2, {}, OFFLOAD), (1, 3, {}, {}), (2, 1, {}, {})],
    ids=["zero0", "zero1 bf16", "zero2", "zero2 offload", "zero3", "tp2 zero1"],
)
def test_a_skipped_step_leaves_no_trace(tensor_parallel, stage, more, zero, kind, shard_folders, tmp_path):
    """Steps 0, 1, 2 without update, 3 beside steps 0, 1, 3."""
    job = (tensor_parallel, stage, more, zero, kind, str(shard_folders[0]))
    with_it, without = tmp_path / "with", tmp_path / "without"
    assert run_ranks(run_steps, 2, *job, str(with_it), [0, 1, -2, 3]) == [(4, 1)] * 2
    assert run_ranks(run_steps, 2, *job, str(without), [0, 1, 3]) == [(3, 0)] * 2
    before, skipped, after = (state(with_it, number) for number in (1, 2, 3))
    assert all(same(before, skipped)) and not any(same(skipped, after))
    assert all(same(after, state(without, 2)))
