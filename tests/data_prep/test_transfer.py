"""Transfers against a server that breaks off, lies, errs and changes its mind: byte for byte, or a plain error."""

import fcntl
import hashlib
import random
import shutil
import threading
import time
from email.utils import formatdate

import pytest

from data_prep import transfer
from data_prep.transfer import NotFound, Patience, RemoteFile, fetch, read_text
from tests.data_prep.unruly_server import Served, serving

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
PATIENCE = Patience(num_attempts=3, first_wait_s=0.01)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serving() as server:
        yield server


def offer(server, content=CONTENT, **faults) -> RemoteFile:
    """Serve `content` under /file with the faults; what was published of it are the facts of CONTENT."""
    server.files["/file"] = Served(content, **faults)
    return RemoteFile(f"{server.url}/file", len(CONTENT), f"sha1:{hashlib.sha1(CONTENT).hexdigest()}")


def unpublished(remote: RemoteFile) -> RemoteFile:
    return RemoteFile(remote.url)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_comes_whole_and_is_reused_without_asking_again(server, tmp_path):
    remote = offer(server)
    assert fetch(remote, tmp_path / "new" / "file", PATIENCE) == "fetched"
    assert (tmp_path / "new" / "file").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["file"]
    assert fetch(remote, tmp_path / "new" / "file", PATIENCE) == "reused"
    assert len(server.asked) == 1
    assert "data_prep.download" in server.asked[0][1]["User-Agent"]


def test_broken_connections_are_gone_on_with_by_ranges(server, tmp_path):
    remote = offer(server, breaks=[1000, 50_000, 0, 0, 100_000, 7])  # more breaks than attempts, but with progress
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    starts = [None, 1000, 51_000, 51_000, 51_000, 151_000, 151_007]
    assert server.ranges() == [start and f"bytes={start}-" for start in starts]
    assert server.asked[1][1]["If-Range"] == '"1"'


def test_patience_ends_without_progress_and_what_came_stays(server, tmp_path):
    remote = offer(server, breaks=[1000, 0, 0, 0])
    with pytest.raises(
        ConnectionError, match=r"/file: broke off at 1,000 of 300,000 bytes \(attempt 3 of 3\); what came is kept"
    ):
        fetch(remote, tmp_path / "file", PATIENCE)
    assert names(tmp_path) == ["file.part", "file.part.json"]
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == [None, *["bytes=1000-"] * 4]


def test_a_server_without_ranges_makes_it_start_anew(server, tmp_path):
    remote = offer(server, has_ranges=False, breaks=[200_000, 100_000])
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=200000-", "bytes=100000-"]
    # Starting anew is no progress, or this would never end.
    remote = offer(server, has_ranges=False, breaks=[100_000] * 9)
    with pytest.raises(ConnectionError, match="attempt 3 of 3"):
        fetch(remote, tmp_path / "again", PATIENCE)


def test_a_stalled_connection_is_broken_off(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "TIMEOUT_S", 0.2)
    remote = offer(server, bytes_per_s=10_000)  # a block of 16 KB, then a second and a half of nothing
    threading.Timer(0.3, setattr, (server.files["/file"], "bytes_per_s", 0)).start()
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges()[:2] == [None, "bytes=16384-"]


def test_nobody_listens(tmp_path):
    with serving() as server:
        remote = offer(server)
    with pytest.raises(ConnectionError, match=r"/file: Connection refused \(attempt 3 of 3\)"):
        fetch(remote, tmp_path / "file", PATIENCE)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "version", [{"ETag": '"{}"'}, {"ETag": 'W/"weak"', "Last-Modified": "Mon, 0{} Jan 2026 00:00:00 GMT"}]
)
@pytest.mark.parametrize("is_published", [True, False])
def test_a_file_that_changed_is_started_anew(server, tmp_path, version, is_published):
    old = {name: value.format(1) for name, value in version.items()}
    new = {name: value.format(2) for name, value in version.items()}
    remote = offer(server, OTHER, version=old, breaks=[1000, 0, 0, 0])
    remote = remote if is_published else unpublished(remote)
    with pytest.raises(ConnectionError):
        fetch(remote, tmp_path / "file", PATIENCE)
    offer(server, CONTENT, version=new)
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges()[-1] == "bytes=1000-"  # asked with If-Range, and answered from the start


def test_without_version_and_digest_nothing_is_spliced(server, tmp_path):
    remote = unpublished(offer(server, OTHER, version={}, breaks=[1000, 0, 0, 0]))
    with pytest.raises(ConnectionError):
        fetch(remote, tmp_path / "file", PATIENCE)
    offer(server, version={})
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert set(server.ranges()) == {None}


def test_without_a_version_the_digest_finds_a_splice(server, tmp_path):
    remote = offer(server, OTHER, version={}, breaks=[1000, 0, 0, 0])
    with pytest.raises(ConnectionError):
        fetch(remote, tmp_path / "file", PATIENCE)
    offer(server, version={})
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges()[-2:] == ["bytes=1000-", None]


@pytest.mark.parametrize("content_range", ["bytes 0-299999/300000", "bytes 1000-299999/300001", "garbage"])
def test_a_range_that_is_not_the_one_asked_for_is_not_appended(server, tmp_path, content_range):
    fetch(offer(server, breaks=[1000], content_range=content_range), tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1000-", None]


@pytest.mark.parametrize("length", [200_000, 400_000])
def test_a_length_that_is_not_the_published_one_is_refused(server, tmp_path, length):
    remote = offer(server, length=str(length))
    with pytest.raises(ValueError, match=f"announces {length:,} bytes where 300,000 are published"):
        fetch(remote, tmp_path / "file", PATIENCE)
    assert names(tmp_path) == [] and len(server.asked) == 1


def test_a_login_page_does_not_cost_what_came_before(server, tmp_path):
    remote = offer(server, breaks=[1000, 0, 0, 0])
    with pytest.raises(ConnectionError):
        fetch(remote, tmp_path / "file", PATIENCE)
    offer(server, b"<html>Please sign in</html>", version={"ETag": '"page"'})
    with pytest.raises(ValueError, match="announces 27 bytes"):
        fetch(remote, tmp_path / "file", PATIENCE)
    offer(server)
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges()[-1] == "bytes=1000-"


def test_a_longer_length_than_what_comes_never_passes_for_whole(server, tmp_path):
    remote = unpublished(offer(server, length="400000"))
    with pytest.raises(ValueError, match="416 .* to bytes=300000-, also after a new start"):
        fetch(remote, tmp_path / "file", PATIENCE)
    assert names(tmp_path) == []


def test_a_length_that_is_not_announced(server, tmp_path):
    remote = offer(server, length=None)
    with pytest.raises(ValueError, match="does not say how long the file is"):
        fetch(unpublished(remote), tmp_path / "file", PATIENCE)
    assert names(tmp_path) == []
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    offer(server, CONTENT + b"more", length=None)
    with pytest.raises(
        ValueError, match="sends more than the 300,000 bytes that are published, also after a new start"
    ):
        fetch(remote, tmp_path / "again", PATIENCE)


def test_garbage_is_tried_once_more_and_then_refused_with_both_digests(server, tmp_path):
    remote = offer(server, OTHER)
    digests = [hashlib.sha1(content).hexdigest() for content in (OTHER, CONTENT)]
    with pytest.raises(
        ValueError, match="its sha1 is {} where {} is published, also after a new start".format(*digests)
    ):
        fetch(remote, tmp_path / "file", PATIENCE)
    assert names(tmp_path) == [] and server.ranges() == [None, None]


def test_damage_of_what_came_before_is_mended(server, tmp_path):
    remote = offer(server, breaks=[1000, 0, 0, 0])
    with pytest.raises(ConnectionError):
        fetch(remote, tmp_path / "file", PATIENCE)
    (tmp_path / "file.part").write_bytes(bytes(2000))
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges()[-2:] == ["bytes=2000-", None]


def test_all_came_but_the_process_died_before_the_end(server, tmp_path):
    remote = offer(server, breaks=[1000, 0, 0, 0])
    with pytest.raises(ConnectionError):
        fetch(remote, tmp_path / "file", PATIENCE)
    (tmp_path / "file.part").write_bytes(CONTENT)
    num_asked = len(server.asked)
    fetch(remote, tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.asked) == num_asked


def test_an_overloaded_server_is_asked_again(server, tmp_path):
    remote = offer(server, refusals=[(500, {}), (429, {"Retry-After": "0"}), (503, {"Retry-After": "nonsense"})])
    fetch(remote, tmp_path / "file", Patience(4, 0.01))
    remote = offer(server, refusals=[(429, {"Retry-After": "1"})])
    start = time.monotonic()
    fetch(remote, tmp_path / "again", PATIENCE)
    assert time.monotonic() - start >= 1
    assert (tmp_path / "file").read_bytes() == (tmp_path / "again").read_bytes() == CONTENT
    assert 98 < transfer._retry_after_s("", formatdate(time.time() + 100, usegmt=True)) <= 100
    remote = offer(server, refusals=[(429, {"Retry-After": "86400"})])
    with pytest.raises(ConnectionError, match="asks to come back in 86400 s"):
        fetch(remote, tmp_path / "third", PATIENCE)


def test_what_is_not_there_or_forbidden_is_told_at_once(server, tmp_path):
    with pytest.raises(NotFound, match=r"/absent does not exist there .*mirror by --base-url"):
        fetch(RemoteFile(f"{server.url}/absent"), tmp_path / "file", PATIENCE)
    with pytest.raises(ConnectionError, match="/file: the server answers 403 Forbidden"):
        fetch(offer(server, refusals=[(403, {})]), tmp_path / "file", PATIENCE)
    assert len(server.asked) == 2 and names(tmp_path) == []


def test_another_file_of_that_name_is_left_alone(server, tmp_path):
    (tmp_path / "file").write_bytes(OTHER)
    with pytest.raises(ValueError, match="file is there but its sha1 is .* move it away"):
        fetch(offer(server), tmp_path / "file", PATIENCE)
    assert (tmp_path / "file").read_bytes() == OTHER and not server.asked


def test_two_processes_do_not_write_one_file(server, tmp_path):
    with open(tmp_path / "file.part", "wb") as file:
        file.write(b"the other's")
        file.flush()
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match=r"file\.part: another process is fetching"):
            fetch(offer(server), tmp_path / "file", PATIENCE)
    assert (tmp_path / "file.part").read_bytes() == b"the other's"


def test_a_disk_without_room_is_told_before_anything_is_written(server, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(ValueError, match=rf"needs 300,000 bytes and the disk of {tmp_path} has 1,000 free"):
        fetch(unpublished(offer(server)), tmp_path / "file", PATIENCE)
    assert names(tmp_path) == []


def test_a_disk_that_others_fill_is_told_and_what_came_stays(server, small_disk, monkeypatch):
    remote = offer(server)
    (small_disk / "filler").write_bytes(bytes(250_000))
    with pytest.raises(ValueError, match="needs 300,000 bytes"):
        fetch(remote, small_disk / "file", PATIENCE)
    with monkeypatch.context() as patch:  # as if there had been room when it was asked for
        patch.setattr(transfer, "require_space", lambda *_: None)
        with pytest.raises(OSError, match="No space left") as raised:
            fetch(remote, small_disk / "file", PATIENCE)
    assert raised.value.filename == str(small_disk / "file.part")
    assert (small_disk / "file.part").stat().st_size > 50_000
    (small_disk / "filler").unlink()
    fetch(remote, small_disk / "file", PATIENCE)
    assert (small_disk / "file").read_bytes() == CONTENT
    assert server.ranges()[-1].startswith("bytes=")


def test_pages_are_read_whole_or_not_at_all(server, monkeypatch):
    server.files["/page"] = Served("Straße".encode(), breaks=[3, 0], refusals=[(502, {})])
    assert read_text(f"{server.url}/page", Patience(4, 0.01)) == "Straße"
    server.files["/page"] = Served(b"\xff\xfe")
    with pytest.raises(ValueError, match="/page is no UTF-8 text"):
        read_text(f"{server.url}/page", PATIENCE)
    monkeypatch.setattr(transfer, "LONGEST_TEXT", 1000)
    server.files["/page"] = Served(bytes(2000))
    with pytest.raises(ValueError, match="/page is longer than 1,000 bytes"):
        read_text(f"{server.url}/page", PATIENCE)
