"""One file over HTTP, whole or not at all, however often the connection breaks.

`fetch` writes NAME.part and renames it to NAME once it has the size and the digest that were published. Beside it
lies NAME.part.json: where it comes from, how long it will be, and the server's mark of the version (ETag, or else
Last-Modified). A broken transfer goes on behind the last byte with `Range` and `If-Range`, in this process or a later
one; a file that changed on the server, or a server that ignores ranges, makes it start anew. So no two versions are
ever spliced, and no more is written than was announced and the disk has room for.
"""

import email.utils
import fcntl
import hashlib
import http.client
import os
import random
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, TypeVar

from tqdm import tqdm

from data_prep.cli import read_json, require_space, sync_folder, write_json

USER_AGENT = "bert-pretraining-at-scale (python -m data_prep.download)"  # Wikimedia refuses callers without a name
TIMEOUT_S = 60.0  # without a byte
LONGEST_WAIT_S = 60.0
LONGEST_RETRY_AFTER_S = 600.0
LONGEST_TEXT = 64 << 20  # bytes of a page or a JSON file that is read into memory
_BLOCK_BYTES = 1 << 18
_RETRIED = (408, 425, 429)  # and all from 500 on

Result = TypeVar("Result")


class RemoteFile(NamedTuple):
    """A URL with what was published of the file behind it: its size in bytes, and its digest as "sha1:0a4d...".

    A size of None or an empty digest means that it is not known.
    """

    url: str
    size: int | None = None
    digest: str = ""


class Patience(NamedTuple):
    """Attempts in a row that bring nothing new before giving up, and the wait after the first; it doubles each time."""

    num_attempts: int = 8
    first_wait_s: float = 1.0


class NotFound(ValueError):
    """The server says that there is no such file."""


class _Interrupted(Exception):
    """What may pass: a broken connection, an overloaded server. `wait_s` is what the server asks for."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class _WrongContent(Exception):
    """What was sent, or announced, is not the file that was published."""


def fetch(remote: RemoteFile, path: str | Path, patience: Patience) -> str:
    """Make `path` the file behind `remote.url`, checked; returns "fetched", or "reused" if it was there and is right.

    Raises NotFound for a 404, ConnectionError when the patience is at its end (what came stays for the next run),
    ValueError for content that is twice not the published one, for another length than that, for a disk without room,
    and for a file already there that is another one.
    """
    path = Path(path)
    if path.exists():
        if fault := _fault(path, remote):
            raise ValueError(f"{path} is there but {fault}; move it away to fetch it again")
        return "reused"
    path.parent.mkdir(parents=True, exist_ok=True)
    part, note = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.json")
    with _owned(part, note) as file, tqdm(desc=path.name, unit="B", unit_scale=True) as bar:
        for has_another_try in (True, False):
            try:
                _persist(
                    lambda: _receive(remote, file, note, bar), remote.url, patience, lambda: file.seek(0, os.SEEK_END)
                )
                file.flush()
                bar.set_postfix_str("checking")
                fault = _fault(part, remote)
            except _WrongContent as error:
                fault = str(error)
            if not fault:
                break
            file.truncate(0)
            if not has_another_try:
                raise ValueError(
                    f"{remote.url}: {fault}, also after a new start; nothing was kept: try later, or name a mirror by "
                    "--base-url"
                )
            bar.write(f"{remote.url}: {fault}; once more from the start")
        os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
        note.unlink(missing_ok=True)
    return "fetched"


def read_text(url: str, patience: Patience) -> str:
    """The text of a page or JSON file, up to LONGEST_TEXT bytes. Raises as `fetch` does."""

    def read() -> bytes:
        with _open(url, {}) as response:
            announced, content = response.length, b""
            while len(content) <= LONGEST_TEXT and (block := _read(response, _BLOCK_BYTES)):
                content += block
        if announced is not None and len(content) < announced:
            raise _Interrupted(f"broke off at {len(content):,} of {announced:,} bytes")
        return content

    content = _persist(read, url, patience, lambda: 0)
    if len(content) > LONGEST_TEXT:
        raise ValueError(f"{url} is longer than {LONGEST_TEXT:,} bytes, so it is not what was asked for")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{url} is no UTF-8 text, so it is not what was asked for; check --base-url") from error


def _persist(step: Callable[[], Result], url: str, patience: Patience, reached: Callable[[], int]) -> Result:
    """Repeat `step` while it is interrupted. Attempts count only in a row, without `reached()` getting any further."""
    furthest = num_failures = 0
    while True:
        try:
            return step()
        except _Interrupted as error:
            num_failures = 0 if reached() > furthest else num_failures + 1
            furthest = max(furthest, reached())
            if num_failures >= patience.num_attempts:
                way_out = "what came is kept, and the same command goes on behind it" if reached() else "try later"
                raise ConnectionError(
                    f"{url}: {error} (attempt {num_failures} of {patience.num_attempts}); {way_out}"
                ) from error
            wait_s = min(patience.first_wait_s * 2 ** min(max(num_failures - 1, 0), 10), LONGEST_WAIT_S)
            wait_s = max(wait_s * random.uniform(0.5, 1), error.wait_s)
            tqdm.write(f"{url}: {error}; again in {wait_s:.1f} s")
            time.sleep(wait_s)


def _receive(remote: RemoteFile, file: IO[bytes], note: Path, bar: tqdm) -> None:
    """One request: append to `file` what it lacks, from the start where it cannot be gone on with."""
    offset = file.seek(0, os.SEEK_END)
    held = read_json(note) if offset and note.exists() else {}
    goes_on = (
        held.get("url") == remote.url
        and bool(held["version"] or remote.digest)  # without either, nothing would tell two versions apart
        and offset <= held["size"]
    )
    if goes_on and offset == held["size"]:
        return
    headers = {"Range": f"bytes={offset}-"} if goes_on else {}
    if goes_on and held["version"]:
        headers["If-Range"] = held["version"]
    with _open(remote.url, headers) as response:
        announced = response.length
        if goes_on and response.status == 206:
            size = held["size"]
            answer = response.headers.get("Content-Range", "")
            if not re.fullmatch(rf"bytes {offset}-\d+/{size}", answer):
                raise _WrongContent(f"the server answers bytes {offset:,} on of {size:,} with Content-Range {answer!r}")
        else:
            size = _size_of_whole(remote, response)
            file.truncate(0)
            offset = 0
            write_json(note, {"url": remote.url, "version": _version(response), "size": size})
        require_space(note.parent, size - offset, remote.url)
        bar.initial = 0
        bar.reset(size)
        bar.initial = bar.n = offset  # the rate is that of this connection
        while offset < size and (block := _read(response, min(_BLOCK_BYTES, size - offset))):
            file.write(block)
            offset += len(block)
            bar.update(len(block))
        if offset < size:
            raise _Interrupted(f"broke off at {offset:,} of {size:,} bytes")
        if announced is None and _read(response, 1):
            raise _WrongContent(f"the server sends more than the {size:,} bytes that are published")


def _size_of_whole(remote: RemoteFile, response: http.client.HTTPResponse) -> int:
    """The length of an answer that should be the whole file; ValueError, with the partial file as it was, if it is not.

    A login page in a hotel must not cost what came before.
    """
    announced = response.length
    if response.status != 200:
        raise ValueError(f"{remote.url}: the server answers HTTP {response.status}; name a mirror by --base-url")
    if announced is None and remote.size is None:
        raise ValueError(
            f"{remote.url}: the server does not say how long the file is, so a broken transfer could pass for a whole "
            "one; name a mirror by --base-url"
        )
    if announced is not None and remote.size not in (None, announced):
        raise ValueError(
            f"{remote.url}: the server announces {announced:,} bytes where {remote.size:,} are published; "
            "try later, or name a mirror by --base-url"
        )
    return announced if remote.size is None else remote.size


def _version(response: http.client.HTTPResponse) -> str:
    """What `If-Range` may name: the ETag unless it is weak (RFC 9110, section 13.1.5), else the time of the change."""
    etag = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")


def _open(url: str, headers: dict[str, str]) -> http.client.HTTPResponse:
    """Send a GET; proxies are those of the environment, as everywhere in urllib."""
    headers = {"User-Agent": USER_AGENT, "Accept-Encoding": "identity", **headers}
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)
    except urllib.error.HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code in (404, 410):
            raise NotFound(f"{url} does not exist there ({answer}); name a mirror by --base-url") from error
        if error.code == 416 and "Range" in headers:
            raise _WrongContent(f"{answer} to {headers['Range']}") from error
        if error.code in _RETRIED or error.code >= 500:
            raise _Interrupted(answer, _retry_after_s(url, error.headers.get("Retry-After", ""))) from error
        raise ConnectionError(f"{url}: {answer}; name a mirror by --base-url") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            raise ConnectionError(f"{url}: {reason}; correct this machine's certificates or clock") from error
        raise _Interrupted(_told(reason)) from error


def _read(response: http.client.HTTPResponse, num_bytes: int) -> bytes:
    try:
        return response.read1(num_bytes)
    except (OSError, http.client.HTTPException) as error:
        raise _Interrupted(_told(error)) from error


def _told(reason: object) -> str:
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _retry_after_s(url: str, value: str) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; one that asks for very long ends the command."""
    try:
        wait_s = (
            float(value) if value.isdecimal() else email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        )
    except ValueError:
        return 0.0
    if wait_s > LONGEST_RETRY_AFTER_S:
        raise ConnectionError(f"{url}: the server asks to come back in {wait_s:.0f} s; give the same command then")
    return max(wait_s, 0.0)


def _fault(path: Path, remote: RemoteFile) -> str:
    """What tells a file from the published one, or nothing."""
    size = path.stat().st_size
    if remote.size not in (None, size):
        return f"it has {size:,} bytes where {remote.size:,} are published"
    if remote.digest:
        algorithm, _, published = remote.digest.partition(":")
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()
        if found != published.lower():
            return f"its {algorithm} is {found} where {published} is published"
    return ""


@contextmanager
def _owned(part: Path, note: Path) -> Iterator[IO[bytes]]:
    """The partial file, open to be appended to by this process alone; with nothing in it, it does not stay.

    A full disk is told with the file's name.
    """
    try:
        with open(part, "ab") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_ours = os.path.samestat(os.fstat(file.fileno()), part.stat())  # not just renamed by its owner
            except (BlockingIOError, FileNotFoundError):
                is_ours = False
            if not is_ours:
                raise ValueError(f"{part}: another process is fetching this file; wait for it to end")
            try:
                yield file
            finally:
                if part.exists() and part.stat().st_size == 0:
                    part.unlink()
                    note.unlink(missing_ok=True)
    except OSError as error:
        if error.errno:
            error.filename = error.filename or str(part)
        raise
