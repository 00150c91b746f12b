"""What a step's loss says about the run."""

import pytest

from pretrain.loss_watch import LossWatch
from pretrain.metrics_file import read_metrics
from tests.pretrain.test_train import arguments, config_file, run_training  # noqa: F401 (a fixture)
from tests.ranks import run_ranks


def test_repeated_overflow_is_a_fault_and_some_overflows_are_not():
    watch = LossWatch({"initial_scale_power": 4}, None)
    assert [watch.fault(1.0, bool(overflowed), 2.0**20) for overflowed in (1, 1, 1, 0, 1, 1, 1)] == [None] * 7
    assert watch.fault(1.0, True, 2.0**16) == "the gradients overflowed in 4 consecutive steps, loss scale 65536"
    assert LossWatch({}, None).fault(1.0, True, 1.0) == "the gradients overflowed in 1 consecutive steps, loss scale 1"


def test_a_spike_exceeds_the_running_mean_by_the_factor():
    watch = LossWatch({}, 1.5)
    assert [watch.spike(loss) for loss in (2.0, 2.9, 1.0)] == [None] * 3
    assert watch.spike(9.0) == pytest.approx(1.99891)
    assert LossWatch({}, 1.5, watch.mean).spike(9.0) == watch.mean == pytest.approx(2.0689191)
    assert LossWatch({}, None).spike(9.0) is None


def test_a_run_logs_its_spikes(shard_folders, config_file, tmp_path):  # noqa: F811
    more = ["--spike-factor", "1.01", "--set", "optimizer.params.lr=3", "--steps", "3"]
    run_ranks(run_training, 1, arguments(shard_folders, config_file, tmp_path / "run", *more))
    spike = read_metrics(tmp_path / "run", "spike")[0]
    assert spike["loss"] > 1.01 * spike["mean_loss"]
