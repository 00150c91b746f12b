"""Output files and folders: claiming a folder, writing files atomically, JSON, checksums, free disk space."""

import fcntl
import hashlib
import json
import os
import platform
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

RUN_FILE, FINISHED_FILE = "run.json", "finished.json"


def claim_output(folder: str | Path, command: str, identity: dict, part: str = "") -> str:
    """Reserve an output folder for one run: create it and write run.json, which describes the run.

    `identity` holds everything that determines the output, but not the number of workers or the folder's name.
    Returns "new" if the folder is missing or empty, "resume" if the same run began here but has not finished, and
    "done", with a printed message, if the folder (or its subfolder `part`) holds finished.json.
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
            "choose another folder or remove this one"
        )
    if (folder / part / FINISHED_FILE).exists():
        print(f"{folder / part} is complete, with the same configuration: reused")
        return "done"
    return "resume"


def mark_finished(folder: str | Path, **facts: object) -> None:
    """Write finished.json, the last file of a run or of one of its parts, with a few facts about the result."""
    write_json(Path(folder) / FINISHED_FILE, facts)


@contextmanager
def sole_process(folder: str | Path, shared: bool = False) -> Iterator[None]:
    """Create an output folder if it is missing and lock it for this process. A `shared` lock allows other shared ones.

    Raises ValueError if another process on this host holds the lock. A file system without locks is not an error.
    """
    if not Path(folder).exists():  # if it is a file, claim_output reports that
        Path(folder).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"another process is working in {folder}; wait until it ends, or choose another folder"
            ) from error
        except OSError:
            pass
        yield
    finally:
        os.close(descriptor)


def _difference(held: object, asked: object, name: str = "") -> str:
    """The values that differ, with dotted names such as `vocab.sha256`."""
    if isinstance(held, dict) and isinstance(asked, dict):
        keys = sorted(key for key in {*held, *asked} if held.get(key) != asked.get(key))
        return "; ".join(_difference(held.get(key), asked.get(key), f"{name}.{key}".lstrip(".")) for key in keys)
    return f"{name}: {held!r} there, {asked!r} requested" if name else f"its {RUN_FILE} is not a JSON object"


@contextmanager
def finished_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that becomes `path` atomically: it is written under a temporary name, fsynced and renamed.

    The temporary name contains the host and the process, since several hosts may write the same file to a shared
    folder. After an error the temporary file is removed, and an OSError names `path`.
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
    """Add the name of this file to an OSError that names none, for example that of a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def remove_leftovers(folder: str | Path) -> None:
    """Remove the temporary files that killed processes left in `folder`. No other process may be writing there."""
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
    """Read a JSON file whose content must be a `kind`, such as `dict`.

    Raises ValueError with the file's name if it is missing, is not JSON, holds another type, or has a key twice
    (Python would silently keep the last value).
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
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} is given twice; leave one out")
    return values


def sha256_file(path: str | Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_space(folder: str | Path, num_bytes: int, what: str) -> None:
    """Raise ValueError unless the disk of `folder` has `num_bytes` free; the message says that `what` needs them."""
    free = shutil.disk_usage(folder).free
    if num_bytes > free:
        raise ValueError(
            f"{what} needs {num_bytes:,} bytes and the disk of {folder} has {free:,} free; "
            "make room or choose another folder"
        )
