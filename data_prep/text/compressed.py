"""Files as blocks of whole lines. Compressed ones are opened by their suffix, as streams of any number of members."""

import bz2
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from io import BufferedReader, RawIOBase
from pathlib import Path
from typing import BinaryIO

import zstandard

_BLOCK_BYTES = 1 << 17
_ZSTD_BYTES = 1024  # at a time: a kilobyte unpacks to 32 MB at most


class _ZstdFile(RawIOBase):
    """The frames of a .zst file, one after the other. zstandard's own reader would take a cut file for a whole one."""

    def __init__(self, raw: BinaryIO) -> None:
        self.raw, self.frame, self.plain = raw, None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.plain:
            in_frame = self.frame is not None and not self.frame.eof
            after_frame = b"" if in_frame or self.frame is None else self.frame.unused_data
            packed = after_frame or self.raw.read(_ZSTD_BYTES)
            if not packed and in_frame:
                raise EOFError("the file ends inside a frame")
            if not packed:
                return 0
            if not in_frame:
                self.frame = zstandard.ZstdDecompressor().decompressobj()
            self.plain = memoryview(self.frame.decompress(packed))
        size = min(len(buffer), len(self.plain))
        buffer[:size], self.plain = self.plain[:size], self.plain[size:]
        return size


def _open_zstd(raw: BinaryIO) -> BufferedReader:
    return BufferedReader(_ZstdFile(raw))


OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}
_DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)  # what reading may raise

Progress = Callable[[int], object]


def no_progress(num_bytes: int) -> None:
    pass


class NotText(ValueError):
    """A file, or the rest of it, cannot be read as text; `reason` is a short key to count by."""

    def __init__(self, reason: str, place: str) -> None:
        super().__init__(f"{place}: {reason}")
        self.reason, self.place = reason, place


def raw_blocks(path: Path, progress: Progress, longest_line: int = 2 * _BLOCK_BYTES) -> Iterator[tuple[int, bytes]]:
    """(number of its first line, bytes) of the file's blocks; they end with a line, unless one of `longest_line` bytes.

    `progress(num_bytes)` is called with the bytes read from disk since its last call. Of a damaged file come the whole
    lines before the damage, then NotText names the line that it is in.
    """
    number, position, size, damage = 1, 0, 0, None
    pending: list[bytes] = []
    try:
        with open(path, "rb") as raw, OPENERS.get(path.suffix.lower(), nullcontext)(raw) as file:
            while piece := file.read1(_BLOCK_BYTES):  # `read` would lose what it had unpacked when it meets the damage
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
        number += block.count(b"\n")
        reason = f"unreadable: {damage.strerror}" if getattr(damage, "strerror", None) else "file is damaged"
        raise NotText(reason, f"{path}:{number}") from damage
