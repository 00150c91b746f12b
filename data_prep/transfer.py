"""Downloads with curl: a file arrives complete and checked, or not at all, however often the connection breaks.

`fetch` writes NAME.part and continues it with `curl --continue-at` after a broken connection, also in a later run. Once
size and digest match the published ones, it renames the file to NAME. Proxies, certificates and `.curlrc` apply.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import IO, NamedTuple

from tqdm import tqdm

from data_prep.files import naming, sync_folder

USER_AGENT = "bert-pretraining-at-scale (python -m data_prep.download)"  # Wikimedia refuses clients without a name
STALL_S = 60  # give up a connection after this time without a byte
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0  # between attempts; the wait doubles each time
MAX_PAGE_BYTES = 64 << 20
_CURL = ("curl", "--silent", "--show-error", "--fail", "--location", "--globoff", "--user-agent", USER_AGENT)
_NO_RANGES, _BAD_CERTIFICATE = 33, 60  # exit codes of curl
_TEMPORARY = ("408", "425", "429")  # the client errors of HTTP that are worth another attempt
_WAY_OUT = "Try again later, or name a mirror with --base-url"


class RemoteFile(NamedTuple):
    """A URL with the published size and digest of its file; None and "" mean unknown."""

    url: str
    size: int | None = None  # bytes
    digest: str = ""  # "sha1:0a4d..."

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


class NotFound(ValueError):
    """The server says that the file does not exist."""


def require_curl() -> None:
    """Raise ValueError if curl is not installed."""
    if not shutil.which("curl"):
        raise ValueError(
            "curl is not installed and does the downloads: install it with `apt-get install curl`, `dnf install curl` "
            "or `conda install curl`, or put the files into the output folder by hand"
        )


def fetch(remote: RemoteFile, path: Path, attempts: int) -> Path:
    """Download `remote.url` to `path` and return `path`; an existing file is checked and kept.

    The caller ensures that no other process downloads into the same folder. Raises ValueError after `attempts` failures
    in a row without a new byte (the next run continues the download), if the content is not the published one, and if
    `path` is another file. Raises NotFound if the server does not have the file.
    """
    if path.exists():
        if fault := _fault(path, remote):
            raise ValueError(f"{path} exists, but {fault}; move it away to fetch it again")
        print(f"{path}: reused")
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        with naming(part), open(part, "ab") as file:
            if not remote.digest or file.tell() > (remote.size or file.tell()):
                file.truncate(0)  # without a digest, nothing would show that the file has changed since
            _receive(remote.url, file, remote.size, attempts)
            file.flush()
            os.fsync(file.fileno())
            if fault := _fault(part, remote):
                file.truncate(0)
                raise ValueError(f"{remote.url}: {fault}; nothing was kept, the next run starts over. {_WAY_OUT}")
        os.replace(part, path)
        sync_folder(path.parent)
    finally:
        if part.exists() and part.stat().st_size == 0:
            part.unlink()
    print(f"{path}: fetched, {path.stat().st_size:,} bytes")
    return path


def read_text(url: str, attempts: int) -> str:
    """The text of a page or a JSON file of at most MAX_PAGE_BYTES. Raises as `fetch` does."""
    with tempfile.TemporaryFile() as file:
        _receive(url, file, MAX_PAGE_BYTES, attempts)
        file.seek(0)
        try:
            return file.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{url} is not UTF-8 text; check --base-url") from error


def _receive(url: str, file: IO[bytes], limit: int | None, attempts: int) -> None:
    """Append the rest of `url` to `file`, reconnecting as needed. `limit`: its size, or the largest allowed."""
    furthest, failures = file.seek(0, os.SEEK_END), 0
    while file.tell() != limit and (reason := _connect(url, file, limit)):
        failures = 0 if file.tell() > furthest else failures + 1
        furthest = max(furthest, file.tell())
        if failures >= attempts:
            advice = "The next run continues the download" if file.tell() else _WAY_OUT
            raise ValueError(f"{url}: {reason} (attempt {failures} of {attempts}). {advice}")
        wait_s = min(FIRST_WAIT_S * 2 ** min(max(failures - 1, 0), 10), LONGEST_WAIT_S)
        print(f"{url}: {reason}; trying again in {wait_s:g} s")
        time.sleep(wait_s)


def _connect(url: str, file: IO[bytes], limit: int | None) -> str:
    """Run curl once, starting at the end of `file`. Returns "" on success, or the reason of a temporary failure.

    The bytes pass through this process, so that curl ends when this process is killed and never writes beyond `limit`.
    """
    offset = file.seek(0, os.SEEK_END)
    patience = ("--connect-timeout", str(STALL_S), "--speed-limit", "1", "--speed-time", str(STALL_S))
    command = (*_CURL, *patience, "--write-out", "%{stderr}\n%{http_code}", "--continue-at", str(offset), url)
    with (
        tqdm(desc=url.rpartition("/")[2], total=limit, initial=offset, unit="B", unit_scale=True, delay=1) as bar,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as curl,
    ):
        while block := curl.stdout.read1(1 << 18):
            if limit is not None and file.tell() + len(block) > limit:
                file.truncate(0)
                raise ValueError(f"{url}: the server sends more than {limit:,} bytes; nothing was kept. {_WAY_OUT}")
            file.write(block)
            bar.update(len(block))
        message, _, status = curl.stderr.read().decode(errors="replace").strip().rpartition("\n")
    if curl.returncode == 0:
        return ""
    if offset and (curl.returncode == _NO_RANGES or status == "416"):
        file.truncate(0)  # the server cannot continue this file
        return _connect(url, file, limit)
    reason = message.partition(") ")[2].strip() or f"curl ended with exit code {curl.returncode}"
    if status in ("404", "410"):
        raise NotFound(f"{url} does not exist ({reason}); name a mirror with --base-url")
    if curl.returncode == _BAD_CERTIFICATE or (status.startswith("4") and status not in _TEMPORARY):
        raise ValueError(f"{url}: {reason}. {_WAY_OUT}")
    return reason


def _fault(path: Path, remote: RemoteFile) -> str:
    """How a file differs from the published one, or ""."""
    size = path.stat().st_size
    if remote.size not in (None, size):
        return f"it has {size:,} bytes instead of the published {remote.size:,}"
    algorithm, _, published = remote.digest.partition(":")
    if published:
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        if found != published.lower():
            return f"its {algorithm} is {found} instead of the published {published}"
    return ""
