"""kill -9 of a command at random moments, each on what the one before left."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from data_prep.files import sha256_file

ROOT = Path(__file__).parents[2]


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file in the folder."""
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def give(program: str, arguments: list, **options) -> subprocess.Popen:
    """Start `python -c program ARGUMENTS` in a new process group."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, stderr=subprocess.DEVNULL, **options)


def finish_through_kills(program: str, arguments: list, output: Path, num_kills: int = 10) -> list[dict[str, str]]:
    """Hashes of every folder `output` that came to its end while the command was killed `num_kills` times.

    A run that ends before its kill counts as an end and is started again; the last one may run to its end.
    """
    started = time.monotonic()
    assert give(program, [*arguments, "--output", output]).wait() == 0
    seconds = time.monotonic() - started
    ends, random, num_killed = [hashes(output)], np.random.default_rng(3), 0
    shutil.rmtree(output)
    while True:
        process = give(program, [*arguments, "--output", output])
        if num_killed < num_kills:
            time.sleep(random.uniform(0.2, 1.0) * seconds)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                num_killed += 1
                continue
        assert process.wait() == 0
        ends.append(hashes(output))
        if num_killed == num_kills:
            return ends
        shutil.rmtree(output)
