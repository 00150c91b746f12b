"""Read files as blocks of whole lines. The suffix selects the decompressor; a file may have several members."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import BinaryIO

import zstandard

_BLOCK_BYTES = 1 << 17
_ZSTD_BYTES = 1024  # compressed bytes per call: a kilobyte unpacks to 32 MB at most

Progress = Callable[[int], object]


def no_progress(num_bytes: int) -> None:
    """A `Progress` that reports nothing."""


class Unreadable(ValueError):
    """A file is not readable as text from `line` on (counted from 1). Equal `reason`s are counted together."""

    def __init__(self, reason: str, line: int) -> None:
        super().__init__(reason, line)
        self.reason, self.line = reason, line


_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
COMPRESSED = (*_OPENERS, ".zst")
_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)  # what reading may raise


def _pieces(suffix: str, raw: BinaryIO) -> Iterator[bytes]:
    """The content of an open file, uncompressed, in pieces of at most _BLOCK_BYTES."""
    if suffix == ".zst":
        for plain in _zstd_frames(raw):
            yield from (plain[start : start + _BLOCK_BYTES] for start in range(0, len(plain), _BLOCK_BYTES))
        return
    with _OPENERS.get(suffix, nullcontext)(raw) as file:
        while piece := file.read1(_BLOCK_BYTES):  # in a damaged file, `read` would lose what it had unpacked
            yield piece


def _zstd_frames(raw: BinaryIO) -> Iterator[bytes]:
    """The content of all frames of a .zst file. zstandard's own reader does not notice a truncated file."""
    packed = raw.read(_ZSTD_BYTES)
    while packed:
        frame = zstandard.ZstdDecompressor().decompressobj()
        yield frame.decompress(packed)
        while not frame.eof:
            if not (packed := raw.read(_ZSTD_BYTES)):
                raise EOFError("the file ends inside a frame")
            yield frame.decompress(packed)
        packed = frame.unused_data or raw.read(_ZSTD_BYTES)


def raw_blocks(
    path: Path, progress: Progress = no_progress, longest_line: int = 2 * _BLOCK_BYTES
) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, bytes) for each block of a file.

    A block ends at the end of a line, unless that line has more than `longest_line` bytes. A damaged file gives the
    whole lines before the damage and then raises Unreadable. For `progress`, see `read_documents`.
    """
    number, position, size, damage = 1, 0, 0, None
    pending: list[bytes] = []
    try:
        with open(path, "rb") as raw:
            for piece in _pieces(path.suffix.lower(), raw):
                progress(raw.tell() - position)
                position = raw.tell()
                pending.append(piece)
                size += len(piece)
                if (size >= _BLOCK_BYTES and b"\n" in piece) or size >= longest_line:
                    block = b"".join(pending)
                    end = block.rfind(b"\n") + 1 or size
                    pending, size = [block[end:]], size - end
                    yield number, block[:end]
                    number += block.count(b"\n")
    except _DAMAGED as error:
        damage = error
    block = b"".join(pending)
    if damage:
        block = block[: block.rfind(b"\n") + 1]
    if block:
        yield number, block
    if damage:
        reason = f"unreadable: {damage.strerror}" if getattr(damage, "strerror", None) else "file is damaged"
        raise Unreadable(reason, number + block.count(b"\n")) from damage
