"""Output files and folders: claiming a folder, finishing a file in one piece, JSON, checksums, room on the disk."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


def claim_output(folder: str | Path, config: dict, name: str = "config", done_file: str = "manifest.json") -> str:
    """Make `folder` this run's own: create it and write the resolved configuration to `folder/<name>.json`.

    Returns "new" (the folder was missing or empty), "resume" (the same configuration began here and has no
    `done_file` yet) or "done" (it has one; this is printed, since the command then has nothing to do).
    `config` is what determines the output's content: leave out the number of workers and the folder itself.
    Raises ValueError where the folder holds other files or a run of another configuration. Nothing is overwritten.
    """
    folder, config = Path(folder), json.loads(json.dumps(config))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; give the name of a folder that is empty or does not exist")
    claim = folder / f"{name}.json"
    if not claim.exists():
        foreign = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) if folder.exists() else []
        if foreign:
            raise ValueError(
                f"output folder {folder} already holds {foreign[0]!r} and no {claim.name}, "
                "so it is not this command's; choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(claim, config)
        return "new"
    held = read_json(claim)
    if held != config and not [p for p in folder.iterdir() if p != claim]:
        write_json(claim, config)  # a run that failed at once left nothing that could be lost
        return "new"
    if held != config:
        raise ValueError(
            f"output folder {folder} holds another run ({_difference(held, config)}); "
            "choose another folder or remove that one"
        )
    if (folder / done_file).exists():
        print(f"{folder} is complete and made by the same configuration: reused")
        return "done"
    return "resume"


@contextmanager
def sole_process(folder: str | Path, shared: bool = False) -> Iterator[None]:
    """Keep an output folder to this process, and make it if it is missing; with `shared`, other sharers may enter.

    Raises ValueError where another process of this host is at work. A file system without locks lets all in.
    """
    if not Path(folder).exists():
        Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is at work in {folder}; wait for it to end, or give another folder"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _difference(held: object, asked: object, name: str = "") -> str:
    """The values that differ, by their dotted names, inside objects as well."""
    if isinstance(held, dict) and isinstance(asked, dict):
        keys = sorted(key for key in {*held, *asked} if held.get(key) != asked.get(key))
        return "; ".join(_difference(held.get(key), asked.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
    return f"{name}: {held!r} there, {asked!r} asked for" if name else "its configuration is no JSON object"


@contextmanager
def finished_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open `path` for writing so that it appears whole or not at all: written beside, fsynced, renamed.

    The temporary name is this process's own, since several hosts may make the same file of a shared folder. OSError
    names the file; nothing is left of a file that could not be finished.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{platform.node()}-{os.getpid()}.tmp")
    text = {"encoding": "utf-8", "newline": "\n"} if "b" not in mode else {}
    try:
        with naming(path):
            with open(partial, mode, **text) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
            sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """An OSError inside that names no file names this one: a full disk does not say which file it could not hold."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed processes began to write in `folder`; only for who knows that no other is at work there."""
    for path in Path(folder).glob("*.tmp"):
        path.unlink()


def sync_folder(folder: str | Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: str | Path, content: object) -> None:
    """Write readable JSON in one piece: the file is the old one or the new one, never a part."""
    with finished_file(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | Path) -> object:
    """Read a JSON file; ValueError names the file when it is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it is damaged or not ours") from error


def sha256_file(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: str | Path, num_bytes: int, what: str) -> None:
    """Raise ValueError unless the disk of `folder` has room for `num_bytes` more, which `what` needs."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{what} needs {num_bytes:,} bytes and the disk of {folder} has {free:,} free; "
            "make room or choose another folder"
        )
