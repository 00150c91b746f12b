"""The pool of workers: results in order, and no worker outlives the process that started it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from data_prep.workers import worker_pool

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, time
from data_prep.workers import worker_pool

if __name__ == "__main__":
    with worker_pool(2) as ordered_map:
        print(*ordered_map(os.getpgid, [0] * 4), flush=True)
        time.sleep(600)
"""


def test_results_come_in_the_order_of_the_items():
    with worker_pool(2) as ordered_map:
        assert list(ordered_map(abs, range(-20, 0))) == list(range(20, 0, -1))


def test_workers_end_with_a_killed_parent(tmp_path):
    script = tmp_path / "pool.py"
    script.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env=environment)
    parent.stdout.readline()
    children = psutil.Process(parent.pid).children(recursive=True)
    assert len(children) >= 2
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_a_killed_worker_is_reported():
    with pytest.raises(OSError, match="worker process was killed"), worker_pool(2) as ordered_map:
        list(ordered_map(_kill_itself, range(4)))


def _kill_itself(number: int) -> None:
    time.sleep(0.1 * number)
    os.kill(os.getpid(), signal.SIGKILL)
