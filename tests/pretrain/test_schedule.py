"""The learning rate against the published schedules, each formula written out a second time, in numpy."""

import numpy as np
import pytest

from pretrain.deepspeed_config import load_deepspeed_config
from pretrain.schedule import SCHEDULES, learning_rate

PEAK, TOTAL, WARMUP, END = 6e-3, 1000, 100, 1e-4
STEPS = np.arange(TOTAL + 1)
AFTER = STEPS[WARMUP:]
FORMULAS = {
    "WarmupPolynomialLR": ({"degree": 0.5}, np.sqrt(1 - AFTER / TOTAL)),
    "WarmupLinearLR": ({}, 1 - AFTER / TOTAL),
    "WarmupConstantLR": ({}, np.ones(len(AFTER))),
    "WarmupCosineLR": ({}, np.cos(np.pi / 2 * np.linspace(0, 1, len(AFTER))) ** 2),
    "WarmupInverseSqrtLR": ({}, np.sqrt(WARMUP) / np.sqrt(AFTER)),
    "WarmupExponentialLR": (
        {"decay_rate": 0.9, "decay_steps": 250},
        np.exp(np.log(0.9) / 250 * np.arange(len(AFTER))),
    ),
}


def rates(kind: str, params: dict, peak: float = PEAK, steps=STEPS) -> list[float]:
    return [learning_rate({"type": kind, "params": params}, peak, int(step)) for step in steps]


@pytest.mark.parametrize("warmup", [{"warmup_num_steps": WARMUP}, {"warmup_proportion": WARMUP / TOTAL}], ids=str)
@pytest.mark.parametrize("kind", SCHEDULES)
def test_warm_up_then_the_published_decay(kind, warmup):
    own, decay = FORMULAS[kind]
    expected = np.concatenate([PEAK * STEPS[1 : WARMUP + 1] / WARMUP, END + (PEAK - END) * decay])
    found = rates(kind, {"total_num_steps": TOTAL, "end_lr": END, **warmup, **own})
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_warm_up_the_first_rate_is_the_peak(kind):
    assert rates(kind, {"total_num_steps": TOTAL, **FORMULAS[kind][0]}, steps=[0]) == [PEAK]


def test_linear_warmup_then_linear_decay():
    found = rates(
        "WarmupPolynomialLR", {"total_num_steps": 100, "warmup_num_steps": 10}, 1.0, (0, 4, 9, 10, 50, 99, 200)
    )
    assert found == pytest.approx([0.1, 0.5, 1.0, 0.9, 0.5, 0.01, 0.0])


def test_nvidias_phase_1():
    """7038 steps, warm-up 28.43 % (2001 steps), degree 0.5, peak 6e-3: (1 - step / total) ** 0.5 of the peak."""
    params = {"total_num_steps": 7038, "warmup_proportion": 0.2843, "degree": 0.5}
    assert rates("WarmupPolynomialLR", params, 6e-3, (2000, 3519)) == pytest.approx([6e-3, 6e-3 * 0.5**0.5])


def test_deepspeeds_phase_1():
    """bing_bert, EE: 11e-3 x (step / warm-up)^2, then 11e-3 x 0.9^((step - warm-up) / 250), and 1e-3 on top of all."""
    params = {"total_num_steps": 7500, "warmup_proportion": 0.06, "warmup_degree": 2.0, "warmup_min_lr": 1e-3}
    params |= {"decay_rate": 0.9, "decay_steps": 250, "end_lr": 1e-3}
    steps = np.arange(7500)
    published = np.where(steps < 450, 11e-3 * ((steps + 1) / 450) ** 2, 11e-3 * 0.9 ** ((steps - 450) / 250)) + 1e-3
    assert rates("WarmupExponentialLR", params, 12e-3, steps) == pytest.approx(published, rel=1e-12)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["type=WarmupCosinLR"], "did you mean 'WarmupCosineLR'"),
        (["type=WarmupCosineLR", "params.degree=1"], "unknown key 'degree'"),
        (["type=WarmupExponentialLR", "params.decay_rate=0.9"], "decay_steps is missing; WarmupExponentialLR needs it"),
        (
            ["type=WarmupExponentialLR", "params.decay_rate=9", "params.decay_steps=2"],
            "decay_rate=9 must be a number from 0 to 1, but not 0",
        ),
        (["params.warmup_proportion=1.5"], "warmup_proportion=1.5 must be a number from 0 to 1"),
        (["params.warmup_proportion=0.1", "params.warmup_num_steps=3"], "leave one out"),
        (["params.warmup_num_steps=0.1"], "warmup_num_steps=0.1 must be a whole number of at least 0"),
        (["params.end_lr=low"], "end_lr='low' must be a number of at least 0"),
        (["params.total_num_steps=0"], "total_num_steps=0 must be a whole number of at least 1"),
    ],
)
def test_what_makes_no_schedule_is_refused(overrides, message, tmp_path):
    (tmp_path / "ds.json").write_text(
        """{"train_batch_size": 4, "train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW", "params":
        {"lr": 1e-3}}, "scheduler": {"type": "WarmupLinearLR", "params": {"total_num_steps": 10}}}"""
    )
    with pytest.raises(ValueError, match=message):
        load_deepspeed_config(tmp_path / "ds.json", [f"scheduler.{override}" for override in overrides])
