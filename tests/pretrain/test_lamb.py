"""LAMB against references, and `lamb.py` alone in another DeepSpeed project. One curve for every layout of ranks is in
test_layouts.py.
"""

import deepspeed
import numpy as np
import pytest
import torch
import torch_optimizer

from pretrain.lamb import Lamb, param_groups
from tests.ranks import run_ranks


def lamb_reference(weight, gradients, lr, beta1, beta2, eps, weight_decay, bias_correction):
    """You et al. (2020), algorithm 2, for one tensor, in float64; phi is the identity."""
    weight = weight.astype(np.float64)
    mean, square = np.zeros_like(weight), np.zeros_like(weight)
    for step, gradient in enumerate(gradients, start=1):
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        corrected_mean, corrected_square = mean, square
        if bias_correction:
            corrected_mean, corrected_square = mean / (1 - beta1**step), square / (1 - beta2**step)
        update = corrected_mean / (np.sqrt(corrected_square) + eps) + weight_decay * weight
        weight = weight - lr * np.linalg.norm(weight) / np.linalg.norm(update) * update
    return weight


@pytest.mark.parametrize("bias_correction", [True, False])
def test_equals_the_paper(bias_correction):
    """20 steps on tensors of several shapes. Measured: 2.4e-7."""
    rng = np.random.default_rng(0)
    shapes = [(7, 5), (11,), (3, 2, 4)]
    starts = [rng.normal(size=shape).astype(np.float32) for shape in shapes]
    gradients = [[rng.normal(size=shape).astype(np.float32) for _ in range(20)] for shape in shapes]
    tensors = [torch.nn.Parameter(torch.tensor(start)) for start in starts]
    optimizer = Lamb(tensors, lr=0.02, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, bias_correction=bias_correction)
    for step in range(20):
        for tensor, series in zip(tensors, gradients, strict=True):
            tensor.grad = torch.tensor(series[step])
        optimizer.step()
    for tensor, start, series in zip(tensors, starts, gradients, strict=True):
        expected = lamb_reference(start, series, 0.02, 0.9, 0.99, 1e-6, 0.1, bias_correction)
        np.testing.assert_allclose(tensor.detach().numpy(), expected, atol=1e-6)


def test_trust_ratio_of_a_zero_tensor_is_one_and_the_clamps_hold():
    """The first step's update is 1 everywhere: a weight of 100 has the ratio 100, one of 0.1 the ratio 0.1."""
    tensors = [torch.nn.Parameter(torch.full((4,), start)) for start in (0.0, 100.0, 0.1, 5.0)]
    options = {"weight_decay": 0.0, "use_nvlamb": True, "min_trust_ratio": 2.0, "max_trust_ratio": 10.0}
    optimizer = Lamb(tensors, lr=0.1, **options)
    for tensor in tensors:
        tensor.grad = torch.ones(4)
    optimizer.step()
    for tensor, end in zip(tensors, (-0.1, 99.0, -0.1, 4.5), strict=True):
        assert torch.allclose(tensor, torch.full((4,), end), atol=1e-4)


def test_what_is_not_decayed_is_not_adapted():
    """As in the authors' code and NVIDIA's: a bias takes plain Adam steps of size lr."""
    weight, bias = torch.nn.Parameter(torch.full((4,), 100.0)), torch.nn.Parameter(torch.full((4,), 100.0))
    groups = [{"params": [weight], "weight_decay": 0.01}, {"params": [bias], "weight_decay": 0.0}]
    optimizer = Lamb(groups, lr=0.1)
    weight.grad, bias.grad = torch.ones(4), torch.ones(4)
    optimizer.step()
    assert torch.allclose(bias, torch.full((4,), 99.9), atol=1e-4)
    assert torch.allclose(weight, torch.full((4,), 90.0), atol=1e-3)


def test_vectors_and_single_numbers_are_not_decayed():
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.LayerNorm(4))
    network.scale = torch.nn.Parameter(torch.ones(()))
    decayed, plain = param_groups(network, 0.1)
    assert [parameter.ndim for parameter in decayed["params"]] == [4] and decayed["weight_decay"] == 0.1
    assert sorted(parameter.ndim for parameter in plain["params"]) == [0, 1, 1, 1] and plain["weight_decay"] == 0.0


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torch_optimizers_lamb(weight_decay):
    """20 steps without bias correction, which that library has in another form. Measured: 3.6e-7."""
    torch.manual_seed(0)
    starts = [torch.randn(shape) for shape in ((64, 32), (32,), (3, 4, 5))]
    gradients = [[torch.randn_like(start) for start in starts] for _ in range(20)]
    results = []
    for build in (
        lambda tensors: Lamb(tensors, 0.02, weight_decay=weight_decay, bias_correction=False, use_nvlamb=True),
        lambda tensors: torch_optimizer.Lamb(tensors, 0.02, weight_decay=weight_decay, clamp_value=1e9),
    ):
        tensors = [torch.nn.Parameter(start.clone()) for start in starts]
        optimizer = build(tensors)
        for step in gradients:
            for tensor, gradient in zip(tensors, step, strict=True):
                tensor.grad = gradient.clone()
            optimizer.step()
        results.append(tensors)
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def start_engine(stage: int = 1, more: dict | None = None, zero_init: bool = False):
    """A convolutional network of somebody else's under DeepSpeed, with our LAMB: one import, one bind."""
    deepspeed.utils.groups.mpu = None  # ranks are warm, and DeepSpeed keeps the grid of an earlier test
    torch.manual_seed(0)
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 1.0,
        **(more or {}),
    }
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=zero_init):
        network = torch.nn.Sequential(
            torch.nn.Conv2d(1, 6, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(6 * 36, 10)
        )
    optimizer = Lamb(param_groups(network, weight_decay=0.01), lr=2e-2)
    engine, *_ = deepspeed.initialize(model=network, optimizer=optimizer, config=config)
    optimizer.bind(engine)
    return engine, optimizer


def train_engine(engine, num_steps: int, poison_step: int | None = None) -> list[float]:
    """Mean losses over all ranks of steps on 8 random images; in `poison_step`, the last rank's loss is infinite."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = next(engine.parameters()).dtype
    generator, losses = torch.Generator().manual_seed(1), []
    for step in range(num_steps):
        images, labels = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator)
        mine = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        loss = torch.nn.functional.cross_entropy(engine(images[mine].to(dtype)).float(), labels[mine])
        engine.backward(loss * torch.inf if step == poison_step and rank == world_size - 1 else loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(mean.item() / world_size)
    return losses


def foreign_curve(stage: int, more: dict | None = None, zero_init: bool = False) -> tuple[list[float], list[str]]:
    """Losses of 20 steps, and which tensors have a trust ratio."""
    engine, optimizer = start_engine(stage, more, zero_init)
    return train_engine(engine, 20), sorted(optimizer.trust_ratios)


def test_another_project_has_one_curve_for_every_stage():
    """20 steps of a network that is not BERT, plain or built in partitions. Measured: 3e-7 relative."""
    expected, adapted = run_ranks(foreign_curve, 1, 0)[0]
    assert adapted == ["0.weight", "3.weight"]
    for stage, zero_init in ((1, False), (2, False), (3, False), (3, True)):
        losses, names = run_ranks(foreign_curve, 2, stage, None, zero_init)[0]
        assert losses == pytest.approx(expected, rel=2e-6) and names == adapted


def test_16_bits_without_zero_are_those_of_zero_1():
    """DeepSpeed's optimizer for that takes a step of zeros inside initialize, before `bind`."""
    bf16 = {"bf16": {"enabled": True}}
    assert run_ranks(foreign_curve, 2, 0, bf16) == run_ranks(foreign_curve, 2, 1, bf16)


def poisoned_step(stage: int, more: dict) -> tuple:
    """(whether masters and moments are untouched by a step whose gradients are infinite on one rank, skipped steps,
    whether the next step moves them, whether all stays finite).
    """
    engine, optimizer = start_engine(stage, more)
    train_engine(engine, 2)
    before = {
        flat: [flat.clone(), *(optimizer.state[flat][name].clone() for name in MOMENTS)] for flat in optimizer.fragments
    }
    train_engine(engine, 1, poison_step=0)
    same = all(
        torch.equal(old, new)
        for flat in before
        for old, new in zip(before[flat], (flat, *(optimizer.state[flat][name] for name in MOMENTS)), strict=True)
    )
    skipped = engine.skipped_steps
    train_engine(engine, 1)
    moved = all(not torch.equal(old[0], flat) for flat, old in before.items())
    return same, skipped, moved, all(bool(torch.isfinite(flat).all()) for flat in before)


MOMENTS = ("exp_avg", "exp_avg_sq", "step")


@pytest.mark.parametrize(
    ("stage", "more"),
    [(1, {}), (2, {}), (3, {}), (1, {"bf16": {"enabled": True}}), (2, {"bf16": {"enabled": True}})],
    ids=["zero1", "zero2", "zero3", "zero1 bf16", "zero2 bf16"],
)
def test_an_infinite_gradient_skips_the_step_on_every_rank(stage, more):
    assert run_ranks(poisoned_step, 2, stage, more) == [(True, 1, True, True)] * 2


def step_without(binding: str) -> str:
    """What an optimizer says that was not bound, or is bound to an engine that is gone."""
    engine, optimizer = start_engine()
    if binding == "stale":
        optimizer.fragments = start_engine()[1].fragments
    else:
        optimizer.fragments = Lamb([torch.nn.Parameter(torch.zeros(1))], lr=0.1).fragments
    try:
        train_engine(engine, 1)
    except RuntimeError as error:
        return str(error)
    return "stepped"


@pytest.mark.parametrize("binding", ["none", "stale"])
def test_an_unbound_step_under_zero_refuses(binding):
    assert all("bind(engine)" in message for message in run_ranks(step_without, 2, binding))
