"""Unpacking zip and tar archives of which nothing is trusted.

Before a byte is written, every name and kind of member is looked at, and the announced total is held against the
archive's own size and the disk's free space. What is then written is bounded by what was announced, and goes to a
temporary folder that is renamed when all of it is there.
"""

import lzma
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from data_prep.cli import require_space, sync_folder

MAX_RATIO = 200  # unpacked to packed; tables of text stay below 20, a bomb of zeros reaches 1,000
MAX_MEMBERS = 10_000
_BLOCK_BYTES = 1 << 20
_ENCRYPTED = 1  # bit of a zip member's flags
_DAMAGED = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, NotImplementedError)


class _Member(NamedTuple):
    name: str
    size: int
    is_folder: bool
    is_file: bool
    open: Callable[[], IO[bytes]]


def unpack(archive: str | Path, folder: str | Path, inside: str = "", required: Sequence[str] = ()) -> None:
    """Make `folder`, which must not exist, from what lies under `inside` in a zip or tar; all of it or nothing.

    Raises ValueError for a damaged archive; for one that holds absolute names, "..", links, devices or the same name
    twice; for one that grows more than MAX_RATIO times or beyond the free disk; and where one of the `required` names
    is missing.
    """
    archive, folder = Path(archive), Path(folder)
    with _members(archive) as members:
        _require_harmless(archive, members)
        files = {name: member for member in members if (name := _name_inside(member, inside))}
        missing = [name for name in required if name not in files]
        if missing:
            raise ValueError(f"{archive} holds no {PurePosixPath(inside, missing[0])}, so it is not what was asked for")
        total = sum(member.size for member in files.values())
        require_space(folder.parent, total, f"unpacking {archive.name}")
        print(f"{archive}: unpacking {len(files):,} files of {total:,} bytes into {folder}")
        with finished_folder(folder) as temporary:
            for name, member in files.items():
                _write(archive, member, temporary / name)


@contextmanager
def finished_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill that becomes `folder`, which must not exist, when nothing went wrong; else nothing is left."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a killed process
    temporary.mkdir()
    try:
        yield temporary
        os.rename(temporary, folder)
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _members(archive: Path) -> Iterator[list[_Member]]:
    """What an archive says it holds; whatever its reader trips over becomes a ValueError."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                yield [_zip_member(file, info) for info in file.infolist()]
        else:
            with tarfile.open(archive) as file:
                yield [
                    _Member(info.name, info.size, info.isdir(), info.isfile(), lambda info=info: file.extractfile(info))
                    for info in file
                ]
    except _DAMAGED as error:
        raise ValueError(
            f"{archive} is damaged or no zip or tar archive ({error}); remove it and fetch it again"
        ) from error


def _zip_member(file: zipfile.ZipFile, info: zipfile.ZipInfo) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive was not made on Unix
    if info.flag_bits & _ENCRYPTED:
        raise zipfile.BadZipFile(f"{info.filename!r} is encrypted")
    is_file = not info.is_dir() and kind in (0, stat.S_IFREG)
    return _Member(info.filename, info.file_size, info.is_dir(), is_file, lambda: file.open(info))


def _require_harmless(archive: Path, members: list[_Member]) -> None:
    names = set()
    for member in members:
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts or "\\" in member.name or "\0" in member.name:
            raise ValueError(f"{archive} wants to write {member.name!r}, outside its folder; nothing was unpacked")
        if not (member.is_file or member.is_folder) or member.size < 0:
            raise ValueError(f"{archive} holds {member.name!r}, which is no plain file or folder; nothing was unpacked")
        if path in names and member.is_file:
            raise ValueError(f"{archive} holds {member.name!r} twice; nothing was unpacked")
        names.add(path)
    total, packed = sum(member.size for member in members), archive.stat().st_size
    if total > MAX_RATIO * packed or len(members) > MAX_MEMBERS:
        raise ValueError(
            f"{archive} of {packed:,} bytes would unpack to {total:,} bytes in {len(members):,} members; at most "
            f"{MAX_RATIO} times as much and {MAX_MEMBERS:,} are taken, so nothing was unpacked"
        )


def _name_inside(member: _Member, inside: str) -> str:
    """A file's name below `inside`; empty for folders and for what lies elsewhere."""
    path = PurePosixPath(member.name)
    if not member.is_file or not path.is_relative_to(inside):
        return ""
    return path.relative_to(inside).as_posix()


def _write(archive: Path, member: _Member, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    left = member.size
    with member.open() as source, open(path, "xb") as file:
        while block := source.read(_BLOCK_BYTES):
            left -= len(block)
            if left < 0:
                break
            file.write(block)
        if left:
            raise ValueError(f"{archive} announces {member.size:,} bytes of {member.name!r} and holds another number")
        file.flush()
        os.fsync(file.fileno())
