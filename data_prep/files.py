"""Output files and folders: claiming a folder, finishing a file in one piece, JSON, checksums, room on the disk."""

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
    """Reserve an output folder for one run: create it and write run.json, which says what the run is.

    `identity` holds everything that determines the output, so not the number of workers nor the folder's own name.
    Returns "new" (the folder was missing or empty), "resume" (the same run began here and is not finished) or "done"
    (it is finished, or this `part` of it, a subfolder, is; that is printed). A finished folder holds finished.json.

    Raises ValueError if the folder holds other files or another run. Nothing is overwritten.
    """
    folder, asked = Path(folder), json.loads(json.dumps({"command": command, **identity}))
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; give the name of a folder that is empty or does not exist")
    run_file = folder / RUN_FILE
    if not run_file.exists():
        foreign = sorted(p.name for p in folder.iterdir() if not p.name.endswith(".tmp")) if folder.exists() else []
        if foreign:
            raise ValueError(
                f"output folder {folder} already holds {foreign[0]!r} and no {RUN_FILE}, "
                "so it is not this command's; choose another folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_json(run_file, asked)
        return "new"
    held = read_json(run_file)
    if held != asked and not [path for path in folder.iterdir() if path != run_file]:
        write_json(run_file, asked)  # a run that failed at once left nothing that could be lost
        return "new"
    if held != asked:
        raise ValueError(
            f"output folder {folder} holds another run ({_difference(held, asked)}); "
            "choose another folder or remove that one"
        )
    if (folder / part / FINISHED_FILE).exists():
        print(f"{folder / part} is complete and made by the same configuration: reused")
        return "done"
    return "resume"


def mark_finished(folder: str | Path, **facts: object) -> None:
    """Write finished.json, with a few facts about the result: the last file of a run, or of a part of one."""
    write_json(Path(folder) / FINISHED_FILE, facts)


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
    return f"{name}: {held!r} there, {asked!r} asked for" if name else f"its {RUN_FILE} is not a JSON object"


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
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice!r} is given twice; leave one out")
    return values


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
