"""What all tests share: one thread a process, the environment's programs on PATH, ranks that end with the session."""

import os
import sys
from pathlib import Path

# Before anything imports torch: two ranks with every core each would be slower than one.
os.environ["OMP_NUM_THREADS"] = "1"
# DeepSpeed compiles with the environment's ninja and tests start its launcher, also when nobody activated it.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

import pytest

from tests.ranks import stop_pools


@pytest.fixture(scope="session", autouse=True)
def _ranks_end_with_the_session():
    yield
    stop_pools()


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if gpu_tests and not _has_gpu():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="no GPU on this machine"))


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()
