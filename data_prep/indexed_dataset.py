"""Megatron's indexed dataset (.bin and .idx), written in constant memory and read by memory map.

Bit for bit what megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder writes, without importing torch and
without lists that grow with the corpus. Little-endian; with S sequences (for us, sentences) and D documents:

    PREFIX.bin   the token ids of all sequences, one after the other
    PREFIX.idx   9 bytes    b"MMIDIDX\\0\\0"
                 uint64     version, 1
                 uint8      token type: 4 = int32, 8 = uint16 (Megatron takes uint16 below 65,500 tokens)
                 uint64     S
                 uint64     D + 1
                 int32[S]   length of each sequence in tokens
                 int64[S]   its start in PREFIX.bin in bytes
                 int64[D+1] first sequence of each document, and S

Example: one document of the sentences [7, 8] and [9] as uint16 is `0700 0800 0900` in the .bin; the .idx has
lengths 2, 1, starts 0, 4 and documents 0, 2.
"""

import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from data_prep.files import finished_file, naming, sync_folder

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_CHUNK = 1 << 20  # bytes
_PARTS = ("bin", "lengths", "bounds")


def token_type(vocab_size: int) -> type[np.integer]:
    """The token type that Megatron chooses for a vocabulary of this size."""
    return np.uint16 if vocab_size < 65_500 else np.int32


class IndexedDatasetWriter:
    """Appends documents; nothing bears its final name before `finish`.

    Holds files, not lists: the lengths and the document bounds wait in temporary files beside the .bin.
    """

    def __init__(self, prefix: str | Path, dtype: type[np.integer]) -> None:
        self.prefix, self.dtype = Path(prefix), dtype
        self.num_sequences = self.num_documents = self.num_tokens = 0
        with ExitStack() as files:
            self._tokens = files.enter_context(open(self._partial("bin"), "wb+"))
            self._lengths = files.enter_context(open(self._partial("lengths"), "wb+"))
            self._bounds = files.enter_context(open(self._partial("bounds"), "wb+"))
            self._files = files.pop_all()
        self._bounds.write(np.int64(0).tobytes())

    def _partial(self, part: str) -> str:
        return f"{self.prefix}.{part}.tmp"

    def add_documents(self, token_ids: np.ndarray, lengths: np.ndarray, num_sequences: np.ndarray) -> None:
        """Append D documents: the token ids [T] of all their sequences, the sequences' lengths [S], which sum to T, and
        the number of sequences of each document [D], which sum to S.
        """
        with naming(f"{self.prefix}.bin"):
            self._tokens.write(token_ids.astype(self.dtype, copy=False).tobytes())
            self._lengths.write(lengths.astype(np.int32, copy=False).tobytes())
            self._bounds.write((self.num_sequences + np.cumsum(num_sequences, dtype=np.int64)).tobytes())
        self.num_tokens += len(token_ids)
        self.num_sequences += len(lengths)
        self.num_documents += len(num_sequences)

    def finish(self) -> tuple[Path, Path]:
        """Write the index, fsync, rename; returns the paths of .bin and .idx."""
        bin_path, idx_path = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        with naming(bin_path):
            self._tokens.flush()
            os.fsync(self._tokens.fileno())
        with finished_file(idx_path) as file:
            code = next(code for code, known in _TYPES.items() if known is self.dtype)
            file.write(_HEADER.pack(_MAGIC, 1, code, self.num_sequences, self.num_documents + 1))
            self._lengths.seek(0)
            shutil.copyfileobj(self._lengths, file)
            for starts in self._starts():
                file.write(starts.tobytes())
            self._bounds.seek(0)
            shutil.copyfileobj(self._bounds, file)
        os.replace(self._partial("bin"), bin_path)
        sync_folder(bin_path.parent)
        self.close()
        return bin_path, idx_path

    def _starts(self) -> Iterator[np.ndarray]:
        """The sequences' first bytes [S], chunk by chunk."""
        self._lengths.seek(0)
        offset = 0
        while raw := self._lengths.read(_CHUNK):
            ends = offset + np.cumsum(np.frombuffer(raw, np.int32), dtype=np.int64) * np.dtype(self.dtype).itemsize
            yield np.concatenate([[offset], ends[:-1]])
            offset = int(ends[-1])

    def close(self) -> None:
        """Remove the temporary files; safe to call twice, and instead of `finish` to give up."""
        try:
            with naming(f"{self.prefix}.bin"):
                self._files.close()
        finally:
            for part in _PARTS:
                Path(self._partial(part)).unlink(missing_ok=True)


def read_indexed_dataset(prefix: str | Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map a dataset that we or Megatron wrote.

    Returns token_ids (memory map, [T]), sequence_start (int64 [S+1], in tokens) and document_start (int64 [D+1], in
    sequences).
    Raises ValueError where the files are missing, damaged or do not fit each other.
    """
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    for path in (bin_path, idx_path):
        if not path.is_file():
            raise ValueError(
                f"{path} does not exist; a corpus is a pair of .bin and .idx files: make one with data_prep.corpus"
            )
    index = np.memmap(idx_path, mode="r", dtype=np.uint8)
    magic, version, code, num_sequences, num_bounds = (
        _HEADER.unpack_from(index) if len(index) >= _HEADER.size else (b"", 0, 0, 0, 0)
    )
    if magic != _MAGIC or version != 1 or code not in _TYPES:
        raise ValueError(
            f"{idx_path} is not a version 1 Megatron index of integer tokens; make it again with data_prep.corpus"
        )
    if len(index) < _HEADER.size + 12 * num_sequences + 8 * num_bounds:
        raise ValueError(
            f"{idx_path} is cut short: {num_sequences} sequences do not fit {len(index)} bytes; make it again"
        )
    lengths = np.frombuffer(index, np.int32, num_sequences, _HEADER.size)
    starts = np.frombuffer(index, np.int64, num_sequences, _HEADER.size + 4 * num_sequences)
    document_start = np.frombuffer(index, np.int64, num_bounds, _HEADER.size + 12 * num_sequences).copy()
    sequence_start = np.zeros(num_sequences + 1, np.int64)
    np.cumsum(lengths, out=sequence_start[1:], dtype=np.int64)
    itemsize = np.dtype(_TYPES[code]).itemsize
    if not np.array_equal(starts, sequence_start[:-1] * itemsize) or document_start[-1:] != num_sequences:
        raise ValueError(f"{idx_path} is damaged: its lengths, starts and document bounds do not agree; make it again")
    if bin_path.stat().st_size != sequence_start[-1] * itemsize:
        raise ValueError(
            f"{bin_path} has {bin_path.stat().st_size} bytes where its index says {sequence_start[-1] * itemsize}; "
            "make the corpus again"
        )
    token_ids = np.memmap(bin_path, mode="r", dtype=_TYPES[code]) if sequence_start[-1] else np.zeros(0, _TYPES[code])
    return token_ids, sequence_start, document_start
