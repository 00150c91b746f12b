"""Random numbers as functions of a seed and of counters, so that no worker count or order of work can change them.

A stream is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") started from a
hash of (seed, purpose, a, b), for example (0, MASKING, epoch, sample). It lives in a uint64 array of one element, so
that compiled code can pass it on. `permuted` shuffles any number of elements without a table.

The bytes of every shard follow from these few lines, so a change here changes what a shard folder means. numba keeps
compiled callers on disk and does not notice such a change: delete `data_prep/__pycache__` after one.
"""

import os
import stat
import tempfile
from pathlib import Path

import numpy as np
from numba import config, njit

INSTANCES, MASKING, SHUFFLE = 1, 2, 3  # purposes, which keep the streams of one seed apart

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX_1, _MIX_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_NUM_ROUNDS = 6


def compiled(function):
    """numba's njit. The machine code runs without the GIL, because a loader masks beside the training step.

    It is cached in `__pycache__` or the user's cache folder. If neither is writable, it is cached in a temporary folder
    that only this user can write; without that, every process compiles for itself.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no folder for its cache
        if config.CACHE_DIR or not (folder := _private_temporary_folder()):
            return njit(nogil=True)(function)
        config.CACHE_DIR = str(folder)
        return compiled(function)


def _private_temporary_folder() -> Path | None:
    """A folder in which nobody else can place code, or None if there is none."""
    try:
        folder = Path(tempfile.gettempdir(), f"numba-cache-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
    except OSError:
        return None
    return folder if (status.st_uid, status.st_mode) == (os.getuid(), stat.S_IFDIR | 0o700) else None


@compiled
def mix(x):
    """uint64 -> uint64, a bijection in which every output bit depends on every input bit (SplitMix64's finaliser)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


@compiled
def start_stream(stream, seed, purpose, a, b):
    """Set `stream` (uint64 [1]) to the start of the stream that four non-negative integers name."""
    # Every operand is made unsigned, because a sum with a signed integer would silently become a float64.
    key = mix(np.uint64(seed) + _GAMMA)
    key = mix(key + np.uint64(purpose) * _GAMMA)
    key = mix(key + np.uint64(a) * _GAMMA)
    stream[0] = mix(key + np.uint64(b) * _GAMMA)


@compiled
def next_bits(stream):
    """64 random bits as uint64."""
    stream[0] += _GAMMA
    return mix(stream[0])


@compiled
def uniform(stream):
    """float64 in [0, 1)."""
    return np.float64(next_bits(stream) >> np.uint64(11)) * 2.0**-53


@compiled
def below(stream, bound):
    """int64 in [0, bound), for 0 < bound < 2**32. Each value's probability is within 2**-32 of 1 / bound."""
    return np.int64(((next_bits(stream) >> np.uint64(32)) * np.uint64(bound)) >> np.uint64(32))


@compiled
def permuted(index, size, key):
    """The new position of element `index` of `size`: int64 in [0, size), by a bijection that the uint64 `key` chooses.

    A Feistel network over the next power of four is applied until its result is below `size`, at most four times on
    average (Black and Rogaway 2002, "Ciphers with arbitrary finite domains").
    """
    half_bits = np.uint64(1)
    while np.uint64(1) << (half_bits + half_bits) < np.uint64(size):
        half_bits += np.uint64(1)
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    x = np.uint64(index)
    while True:
        left, right = x >> half_bits, x & mask
        for turn in range(_NUM_ROUNDS):
            left, right = right, left ^ (mix(key + right * _GAMMA + np.uint64(turn)) & mask)
        x = (left << half_bits) | right
        if x < np.uint64(size):
            return np.int64(x)


@compiled
def shuffled_positions(first, last, size, seed):
    """The positions of elements first .. last - 1 in the shuffled order of `size` elements: int64 [last - first]."""
    stream = np.empty(1, np.uint64)
    start_stream(stream, seed, SHUFFLE, 0, size)
    key = next_bits(stream)
    positions = np.empty(last - first, np.int64)
    for index in range(first, last):
        positions[index - first] = permuted(index, size, key)
    return positions
