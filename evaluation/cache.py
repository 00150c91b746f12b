"""A cache of features, so that a training set is tokenised once and not for each seed, setting and run.

    CACHE/<key>.features    the sha256 of the rest (32 bytes), then the fields of the task's Features as numpy's .npz

The key is the sha256 of a JSON object with everything that the features depend on: the sha256 of the examples' file,
their number, the task's settings, the vocabulary, the sequence length and VERSION. Files are written atomically, so any
number of processes may write the same one. A file whose checksum does not match is reported and replaced.
"""

import hashlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np

from data_prep.files import finished_file
from evaluation.tasks.features import Features

VERSION = 2  # increase it whenever the result of a task's `encode` changes
DIGEST_SIZE = 32


def cached_features(folder: Path, identity: dict, kind: type[Features], encode: Callable[[], Features]) -> Features:
    """The result of `encode`, read from `folder` if cached there. `identity` must determine it; `kind` is its class.

    Raises OSError if the folder cannot be written.
    """
    text = json.dumps({"version": VERSION, **identity}, sort_keys=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.features"
    features = _read(path, kind)
    if features is None:
        features = encode()
        if not path.exists():  # another process may have been faster
            folder.mkdir(parents=True, exist_ok=True)
            _write(path, features)
    return features


def _read(path: Path, kind: type[Features]) -> Features | None:
    """None if there is no such file, or if it is damaged and has been removed."""
    try:
        content = memoryview(path.read_bytes())
    except FileNotFoundError:
        return None
    if hashlib.sha256(content[DIGEST_SIZE:]).digest() != content[:DIGEST_SIZE]:
        print(f"{path} is damaged: it is removed and written again", file=sys.stderr)
        path.unlink(missing_ok=True)
        return None
    with np.load(io.BytesIO(content[DIGEST_SIZE:])) as arrays:
        return kind(**{name: str(arrays[name]) if name == "note" else arrays[name] for name in arrays.files})


def _write(path: Path, features: Features) -> None:
    assert features.labels is not None, "only training and dev sets are cached"
    buffer = io.BytesIO()
    np.savez(buffer, **{field.name: np.asarray(getattr(features, field.name)) for field in fields(features)})
    with finished_file(path) as file:
        file.write(hashlib.sha256(buffer.getbuffer()).digest())
        file.write(buffer.getbuffer())
