"""Megatron's indexed dataset (.bin and .idx), written in constant memory and read by memory map.

The files are bit for bit those of megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder, but this module does
not import torch and keeps no lists that grow with the corpus. All numbers are little-endian. With S sequences, which
are our sentences, and D documents:

    PREFIX.bin   the token ids of all sequences, concatenated
    PREFIX.idx   9 bytes    b"MMIDIDX\\0\\0"
                 uint64     version, 1
                 uint8      token type: 4 = int32, 8 = uint16 (for vocabularies below 65,500 tokens, as in Megatron)
                 uint64     S
                 uint64     D + 1
                 int32[S]   length of each sequence in tokens
                 int64[S]   its start in PREFIX.bin in bytes
                 int64[D+1] first sequence of each document, and S

Example: for one document with the sentences [7, 8] and [9] as uint16, the .bin is `0700 0800 0900`, and the .idx has
the lengths 2, 1, the starts 0, 4 and the documents 0, 2.
"""

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple

import numpy as np

from data_prep.files import finished_file, naming, sync_folder

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CHUNK = 1 << 20  # bytes


class IndexedDataset(NamedTuple):
    """A corpus of T tokens, S sequences and D documents."""

    token_ids: np.ndarray  # [T], a memory map
    sequence_start: np.ndarray  # int64 [S + 1] in tokens
    document_start: np.ndarray  # int64 [D + 1] in sequences


def token_type(vocab_size: int) -> type[np.integer]:
    """The token type that Megatron chooses for a vocabulary of this size."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class IndexedDatasetWriter:
    """Appends documents to temporary files, not to lists in memory. `finish` gives the files their final names."""

    def __init__(self, prefix: str | Path, dtype: type[np.integer]) -> None:
        self.bin_path, self.idx_path, self.dtype = Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), dtype
        self.num_sequences = self.num_documents = self.num_tokens = 0
        self._partial = Path(f"{prefix}.bin.tmp")
        with ExitStack() as files:
            self._tokens = files.enter_context(open(self._partial, "wb"))
            self._lengths = files.enter_context(TemporaryFile(dir=self._partial.parent))
            self._bounds = files.enter_context(TemporaryFile(dir=self._partial.parent))
            self._files = files.pop_all()
        self._bounds.write(np.int64(0).tobytes())

    def add_documents(self, token_ids: np.ndarray, lengths: np.ndarray, num_sequences: np.ndarray) -> None:
        """Append D documents: their token ids [T], the length of each sequence [S], the sequences per document [D]."""
        with naming(self.bin_path):
            self._tokens.write(token_ids.astype(self.dtype, copy=False).tobytes())
            self._lengths.write(lengths.astype(np.int32, copy=False).tobytes())
            self._bounds.write((self.num_sequences + np.cumsum(num_sequences, dtype=np.int64)).tobytes())
        self.num_tokens += len(token_ids)
        self.num_sequences += len(lengths)
        self.num_documents += len(num_sequences)

    def finish(self) -> None:
        """Write the index, sync both files to disk and give them their final names."""
        with naming(self.bin_path):
            self._tokens.flush()
            os.fsync(self._tokens.fileno())
        with finished_file(self.idx_path) as file:
            code = next(code for code, known in _TYPES.items() if known is self.dtype)
            file.write(_HEADER.pack(_MAGIC, 1, code, self.num_sequences, self.num_documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, file)
            file.writelines(starts.tobytes() for starts in self._starts())
            self._bounds.seek(0)
            shutil.copyfileobj(self._bounds, file)
        os.replace(self._partial, self.bin_path)
        sync_folder(self.bin_path.parent)
        self.close()

    def _starts(self) -> Iterator[np.ndarray]:
        """The byte offset of each sequence in the .bin, int64 [S], in chunks."""
        self._lengths.seek(0)
        offset = 0
        while raw := self._lengths.read(_CHUNK):
            ends = offset + np.cumsum(np.frombuffer(raw, np.int32), dtype=np.int64) * np.dtype(self.dtype).itemsize
            yield np.concatenate([[offset], ends[:-1]])
            offset = int(ends[-1])

    def close(self) -> None:
        """Remove the temporary files, and with them what was added if `finish` was not called. May be called twice."""
        try:
            with naming(self.bin_path):
                self._files.close()
        finally:
            self._partial.unlink(missing_ok=True)


def read_indexed_dataset(prefix: str | Path) -> IndexedDataset:
    """Map a dataset written by us or by Megatron. Raises ValueError if its files are missing, damaged or disagree."""
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; a corpus is a pair of .bin and .idx files: make one with data_prep.corpus"
            )
    index = np.memmap(idx_path, mode="r", dtype=np.uint8)
    header = _HEADER.unpack_from(index) if len(index) >= _HEADER.size else (b"", 0, 0, 0, 0)
    magic, version, code, num_sequences, num_bounds = header
    if magic != _MAGIC or version != 1 or code not in _TYPES:
        raise ValueError(
            f"{idx_path} is not a version 1 Megatron index of integer tokens; make it again with data_prep.corpus"
        )
    starts_offset = _HEADER.size + 4 * num_sequences
    bounds_offset = starts_offset + 8 * num_sequences
    if len(index) < bounds_offset + 8 * num_bounds:
        raise ValueError(
            f"{idx_path} is cut short: {num_sequences} sequences do not fit {len(index)} bytes; make it again"
        )
    lengths = np.frombuffer(index, np.int32, num_sequences, _HEADER.size)
    starts = np.frombuffer(index, np.int64, num_sequences, starts_offset)
    document_start = np.frombuffer(index, np.int64, num_bounds, bounds_offset).copy()
    sequence_start = np.zeros(num_sequences + 1, np.int64)
    np.cumsum(lengths, out=sequence_start[1:], dtype=np.int64)
    num_tokens, dtype = int(sequence_start[-1]), np.dtype(_TYPES[code])
    if not np.array_equal(starts, sequence_start[:-1] * dtype.itemsize) or document_start[-1:] != num_sequences:
        raise ValueError(f"{idx_path} is damaged: its lengths, starts and document bounds do not agree; make it again")
    if (num_bytes := bin_path.stat().st_size) != num_tokens * dtype.itemsize:
        raise ValueError(
            f"{bin_path} has {num_bytes} bytes where its index says {num_tokens * dtype.itemsize}; make it again"
        )
    token_ids = np.memmap(bin_path, mode="r", dtype=dtype) if num_tokens else np.zeros(0, dtype)
    return IndexedDataset(token_ids, sequence_start, document_start)
