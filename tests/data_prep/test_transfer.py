"""Transfers from a server on this machine that misbehaves: the right bytes under the right name, or a plain error."""

import hashlib
import random
import shutil

import pytest

from data_prep import transfer
from data_prep.transfer import NotFound, RemoteFile, fetch, read_text
from tests.data_prep.unruly_server import Served, serving

CONTENT = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(300_000)
ATTEMPTS = 3

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(transfer, "FIRST_WAIT_S", 0.01)
    with serving() as server:
        yield server


def offer(server, content=CONTENT, **faults) -> RemoteFile:
    """Serve `content` under /file with the faults; the size and the digest that were published are CONTENT's."""
    server.files["/file"] = Served(content, **faults)
    return RemoteFile(f"{server.url}/file", len(CONTENT), f"sha1:{hashlib.sha1(CONTENT).hexdigest()}")


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_arrives_whole_and_is_reused_without_a_request(server, tmp_path):
    remote = offer(server)
    for _ in range(2):
        assert fetch(remote, tmp_path / "new" / "file", ATTEMPTS).read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["file"]
    [(_, headers)] = server.asked
    assert "data_prep.download" in headers["User-Agent"]
    (tmp_path / "new" / "file").write_bytes(OTHER)
    with pytest.raises(ValueError, match="file exists, but its sha1 is .* move it away"):
        fetch(remote, tmp_path / "new" / "file", ATTEMPTS)
    assert (tmp_path / "new" / "file").read_bytes() == OTHER


def test_broken_connections_are_continued(server, tmp_path):
    remote = offer(server, breaks=[1000, 50_000, 0, 0, 100_000, 7])  # more breaks than attempts, but with progress
    fetch(remote, tmp_path / "file", ATTEMPTS)
    assert (tmp_path / "file").read_bytes() == CONTENT
    starts = [None, 1000, 51_000, 51_000, 51_000, 151_000, 151_007]
    assert server.ranges() == [start and f"bytes={start}-" for start in starts]


def test_after_the_last_attempt_the_next_run_continues(server, tmp_path):
    remote = offer(server, breaks=[1000, 0, 0, 0])
    with pytest.raises(ValueError, match=r"/file: .*299000 bytes.* \(attempt 3 of 3\). The next run continues"):
        fetch(remote, tmp_path / "file", ATTEMPTS)
    assert names(tmp_path) == ["file.part"]
    fetch(remote, tmp_path / "file", ATTEMPTS)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == [None, *["bytes=1000-"] * 4]


def test_a_server_that_cannot_continue_sends_all_of_it(server, tmp_path):
    fetch(offer(server, has_ranges=False, breaks=[200_000, 100_000]), tmp_path / "file", ATTEMPTS)
    assert (tmp_path / "file").read_bytes() == CONTENT
    # A new start is no progress, or this would never end.
    with pytest.raises(ValueError, match="attempt 3 of 3"):
        fetch(offer(server, has_ranges=False, breaks=[100_000] * 9), tmp_path / "again", ATTEMPTS)


def test_a_stalled_connection_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "STALL_S", 1)
    fetch(offer(server, breaks=[1000], stalls=[0, 3]), tmp_path / "file", ATTEMPTS)
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert server.ranges() == [None, "bytes=1000-", "bytes=1000-"]


def test_an_overloaded_server_is_asked_again_and_a_refusal_is_final(server, tmp_path):
    fetch(offer(server, refusals=[500, 429, 503]), tmp_path / "file", ATTEMPTS + 1)
    assert (tmp_path / "file").read_bytes() == CONTENT
    num_asked = len(server.asked)
    with pytest.raises(ValueError, match=r"/file: .*403. .*mirror with --base-url"):
        fetch(offer(server, refusals=[403]), tmp_path / "again", ATTEMPTS)
    with pytest.raises(NotFound, match=r"/absent does not exist \(.*404\); name a mirror"):
        fetch(RemoteFile(f"{server.url}/absent"), tmp_path / "again", ATTEMPTS)
    assert names(tmp_path) == ["file"] and len(server.asked) == num_asked + 2
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=r"/file: .*connect.* \(attempt 3 of 3\)"):
        fetch(offer(server), tmp_path / "again", ATTEMPTS)


@pytest.mark.parametrize("content", [OTHER, b"<html>Please sign in</html>", CONTENT + b"more"])
@pytest.mark.parametrize("length", ["", None])
def test_wrong_content_never_gets_the_name(server, tmp_path, content, length):
    remote = offer(server, content, length=length)
    with pytest.raises(
        ValueError, match="published.* nothing was kept|sends more than 300,000 bytes; nothing was kept"
    ):
        fetch(remote, tmp_path / "file", ATTEMPTS)
    assert names(tmp_path) == []


@pytest.mark.parametrize("is_published", [True, False])
def test_two_versions_are_never_spliced(server, tmp_path, is_published):
    remote = offer(server, OTHER, breaks=[1000, 0, 0, 0])
    remote = remote if is_published else RemoteFile(remote.url)
    with pytest.raises(ValueError, match="attempt 3"):
        fetch(remote, tmp_path / "file", ATTEMPTS)
    offer(server)
    if is_published:  # the digest shows the splice, and the next run starts over
        with pytest.raises(ValueError, match="its sha1 is .* starts over"):
            fetch(remote, tmp_path / "file", ATTEMPTS)
    fetch(remote, tmp_path / "file", ATTEMPTS)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_pages_are_read_whole_or_not_at_all(server, monkeypatch):
    server.files["/page"] = Served("Straße".encode(), breaks=[3, 0], refusals=[502])
    assert read_text(f"{server.url}/page", 4) == "Straße"
    monkeypatch.setattr(transfer, "MAX_PAGE_BYTES", 6)
    with pytest.raises(ValueError, match="/page: the server sends more than 6 bytes"):
        read_text(f"{server.url}/page", ATTEMPTS)


def test_a_proxy_is_honoured(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    server.files["http://corpus.example/file"] = Served(CONTENT)
    fetch(RemoteFile("http://corpus.example/file"), tmp_path / "file", ATTEMPTS)
    assert (tmp_path / "file").read_bytes() == CONTENT
