"""Compressed files: opened by their suffix, read as streams of any number of members or frames."""

import bz2
import gzip
import lzma
import zlib
from io import BufferedReader, RawIOBase
from typing import BinaryIO

import zstandard

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
DAMAGED = (EOFError, OSError, lzma.LZMAError, zlib.error, zstandard.ZstdError)  # what reading may raise
