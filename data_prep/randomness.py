"""Random numbers as functions of a seed and counters, independent of the number of workers and the order of work.

A stream is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators") started from a
hash of (seed, purpose, a, b), for example (0, MASKING, epoch, sample). Its state is a uint64 array of one element,
which compiled functions can modify. `permuted` shuffles any number of elements without a table.

The bytes of every shard depend on this module, so the same build gives other shards after a change here. numba caches
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
    """numba's njit, without the GIL, so that a loader can mask while a training step runs.

    The machine code is cached in `__pycache__` or the user's cache folder. If neither is writable, it is cached in a
    temporary folder that only this user can write; if that fails, every process compiles the function again.
    """
    try:
        return njit(cache=True, nogil=True)(function)
    except RuntimeError:  # numba found no folder for its cache
        if config.CACHE_DIR or not (folder := _private_temporary_folder()):
            return njit(nogil=True)(function)
        config.CACHE_DIR = str(folder)
        return compiled(function)


def _private_temporary_folder() -> Path | None:
    """A temporary folder in which no other user can place code, or None if it cannot be made."""
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
    """Set `stream` (uint64 [1]) to the start of the stream for four non-negative integers."""
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
    """The new position of element `index` of `size`, int64 in [0, size). The uint64 `key` selects the bijection.

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
