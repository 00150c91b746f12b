"""What the tests of data preparation share."""

import os
import subprocess

import pytest


@pytest.fixture
def small_disk(tmp_path):
    """The folder of a disk that holds 400 kB; skips where none may be mounted."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no right to mount a disk here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
