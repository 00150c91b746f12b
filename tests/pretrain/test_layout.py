"""Process groups and the environment: any launcher's ranks, grids that leave nothing, locks of killed builds."""

import os
import sys
import time
from pathlib import Path

import pytest

from pretrain.layout import LONGEST_BUILD, check_layout, init_layout, rank_environment
from tests.ranks import run_ranks


@pytest.fixture
def lone_process(monkeypatch, tmp_path):
    """The environment of a process that no launcher started, with operators compiled into `tmp_path`."""
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "CUDA_DEVICE_MAX_CONNECTIONS")
    for name in (*names, "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.setenv(name, "")  # so that what the test sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    return monkeypatch


def test_lock_of_a_killed_build_is_removed(lone_process, tmp_path):
    for name, age in (("killed", LONGEST_BUILD + 60), ("building", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "lock").touch()
        os.utime(tmp_path / name / "lock", (time.time() - age,) * 2)
    assert rank_environment() == {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    assert [path.parent.name for path in tmp_path.glob("*/lock")] == ["building"]


def test_operators_are_compiled_inside_the_environment(lone_process):
    lone_process.delenv("TORCH_EXTENSIONS_DIR")
    lone_process.setenv("PATH", "/usr/bin:/bin")  # as of a user who calls the environment's python by its path
    for _ in range(2):
        rank_environment()
    assert Path(os.environ["TORCH_EXTENSIONS_DIR"]).parent == Path(sys.prefix)
    assert os.environ["PATH"] == f"{Path(sys.executable).parent}:/usr/bin:/bin"


def test_srun_gives_the_ranks_and_must_give_the_address(lone_process):
    for name, value in (("SLURM_NTASKS", "4"), ("SLURM_PROCID", "3"), ("SLURM_LOCALID", "1")):
        lone_process.setenv(name, value)
    with pytest.raises(ValueError, match="MASTER_ADDR and MASTER_PORT must be exported"):
        rank_environment()
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29511")):
        lone_process.setenv(name, value)
    assert rank_environment() == {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1}


@pytest.mark.parametrize(
    "world_size, tensor_parallel, sequence_parallel, message",
    [(4, 3, False, r"choose from \[1, 2, 4\]"), (2, 0, False, "2 ranks"), (2, 1, True, "--sequence-parallel splits")],
)
def test_ranks_that_form_no_grid(world_size, tensor_parallel, sequence_parallel, message):
    with pytest.raises(ValueError, match=message):
        check_layout(world_size, tensor_parallel, sequence_parallel)


def lay_grids():
    sizes = []
    for tensor_parallel in (2, 1, 2, 1):
        init_layout(tensor_parallel)
        sizes.append(len(os.listdir("/proc/self/task")))
    return sizes


def test_a_grid_leaves_no_threads_behind():
    for sizes in run_ranks(lay_grids, 2):
        assert sizes[2:] == sizes[:2]
