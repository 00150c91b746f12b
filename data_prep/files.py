"""Output files and folders: claiming a folder, writing files atomically, JSON, checksums, free disk space."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

RUN_FILE, FINISHED_FILE = "run.json", "finished.json"


def claim_output(folder: str | Path, command: str, identity: dict, part: str = "") -> str:
    """Reserve an output folder for one run: create it and write run.json, which says what the run is.

    `identity` holds everything that determines the output, so neither the number of workers nor the folder's name.

    Returns:
        "new" if the folder is missing or empty, "resume" if the same run began here and has not finished, or "done" if
        it has finished (or its `part`, a subfolder, has), which is printed. A finished folder holds finished.json.

    Raises ValueError if the folder holds other files or another run. Nothing is overwritten.
    """
    folder, asked = Path(folder), json.loads(json.dumps({"command": command, **identity}))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; give the name of a folder that is empty or does not exist")
    run_file = folder / RUN_FILE
    held = read_json(run_file) if run_file.exists() else None
    others = sorted(path.name for path in folder.iterdir() if path != run_file) if folder.exists() else []
    if held is None and (foreign := [name for name in others if not name.endswith(".tmp")]):
        raise ValueError(
            f"output folder {folder} already holds {foreign[0]!r} but no {RUN_FILE}, so this command did not make it; "
            "choose another folder"
        )
    if held is None or (held != asked and not others):  # a run that failed at once left nothing that could be lost
        folder.mkdir(parents=True, exist_ok=True)
        write_json(run_file, asked)
        return "new"
    if held != asked:
        raise ValueError(
            f"output folder {folder} holds another run ({_difference(held, asked)}); "
            "choose another folder or remove that one"
        )
    if (folder / part / FINISHED_FILE).exists():
        print(f"{folder / part} is complete, with the same configuration: reused")
        return "done"
    return "resume"


def mark_finished(folder: str | Path, **facts: object) -> None:
    """Write finished.json, the last file of a run or of a part of one, with a few facts about the result."""
    write_json(Path(folder) / FINISHED_FILE, facts)


@contextmanager
def sole_process(folder: str | Path, shared: bool = False) -> Iterator[None]:
    """Lock an output folder, which is created if missing, for this process. With `shared`, other sharers may enter.

    Raises ValueError if another process of this host holds the lock. Without locks in the file system, all may enter.
    """
    if not Path(folder).exists():  # it may be a file, which claim_output refuses
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
    """The values that differ, with their dotted names, also inside objects."""
    if isinstance(held, dict) and isinstance(asked, dict):
        keys = sorted(key for key in {*held, *asked} if held.get(key) != asked.get(key))
        return "; ".join(_difference(held.get(key), asked.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
    return f"{name}: {held!r} there, {asked!r} asked for" if name else f"its {RUN_FILE} is not a JSON object"


@contextmanager
def finished_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open `path` for writing so that it appears whole or not at all: written under another name, fsynced, renamed.

    The temporary name is unique to this process, since several hosts may make the same file of a shared folder. An
    OSError names the file. Nothing is left of a file that could not be finished.
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
    """Add the name of this file to an OSError that names none, as when a disk is full."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remove_leftovers(folder: str | Path) -> None:
    """Remove what killed processes began to write in `folder`. No other process may be at work there."""
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
    """Write indented JSON atomically: readers see the old file or the new one."""
    with finished_file(path, "w") as file:
        json.dump(content, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: str | Path, kind: type = object) -> Any:
    """Read a JSON file, which must hold a `kind`, such as `dict`.

    Raises ValueError, which names the file, if it does not exist, is not JSON, holds something else, or gives a key
    twice (of which Python would silently keep the last).
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); correct it, or copy it again") from error
    if not isinstance(content, kind):
        raise ValueError(f"{path} holds a {type(content).__name__}, but a {kind.__name__} is expected")
    return content


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in values if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is given twice; leave one out")
    return values


def sha256_file(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: str | Path, num_bytes: int, what: str) -> None:
    """Raise ValueError unless the disk of `folder` has `num_bytes` free, which `what` needs."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{what} needs {num_bytes:,} bytes and the disk of {folder} has {free:,} free; "
            "make room or choose another folder"
        )
