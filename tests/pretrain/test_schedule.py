"""The learning rate against the published schedules, computed by hand."""

import pytest

from pretrain.schedule import learning_rate


def test_linear_warmup_then_linear_decay():
    params = {"total_num_steps": 100, "warmup_num_steps": 10}
    rates = [learning_rate(params, 1.0, step) for step in (0, 4, 9, 10, 50, 99, 100, 200)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 0.9, 0.5, 0.01, 0.0, 0.0])


def test_nvidias_phase_1():
    """7038 steps, warm-up 28.43 % (2001 steps), degree 0.5, peak 6e-3: (1 - step / total) ** 0.5 of the peak."""
    params = {"total_num_steps": 7038, "warmup_proportion": 0.2843, "degree": 0.5}
    assert learning_rate(params, 6e-3, 2000) == pytest.approx(6e-3)
    assert learning_rate(params, 6e-3, 3519) == pytest.approx(6e-3 * 0.5**0.5)


def test_end_rate_is_a_floor():
    params = {"total_num_steps": 10, "degree": 1.0, "end_lr": 0.1}
    assert learning_rate(params, 1.0, 5) == pytest.approx(0.55)
    assert learning_rate(params, 1.0, 11) == pytest.approx(0.1)
