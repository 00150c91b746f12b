"""What the tests of data preparation share."""

import ctypes
import os
import subprocess
from contextlib import contextmanager

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


@pytest.fixture
def bound_by_modes():
    """A block in which the modes of files bind root, too: it does without two capabilities meanwhile (capset(2))."""

    @contextmanager
    def bound():
        libc = ctypes.CDLL(None, use_errno=True)
        header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, held) == 0
        fewer = (ctypes.c_uint32 * 6)(*held)
        fewer[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH of the effective set
        assert libc.capset(header, fewer) == 0
        try:
            yield
        finally:
            assert libc.capset(header, held) == 0

    return bound
