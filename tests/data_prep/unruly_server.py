"""A real HTTP server on this machine that breaks connections, lies and fails on demand, and records its requests."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Served:
    """One file, and what goes wrong with it. The next answer breaks off after `breaks[0]` bytes."""

    content: bytes
    breaks: list[int] = field(default_factory=list)
    refusals: list[int] = field(default_factory=list)  # statuses of the next answers
    has_ranges: bool = True
    length: str | None = ""  # a false Content-Length; None sends none
    stalls: list[float] = field(default_factory=list)  # seconds of silence before the bodies of the next answers
    bytes_per_s: float = 0.0


class Server(ThreadingHTTPServer):
    """`files` by path; `asked` is a list of (path, headers) of all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, Served] = {}
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def ranges(self) -> list[str | None]:
        """The Range headers of all requests so far."""
        return [headers.get("Range") for _, headers in self.asked]


class _Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        served = self.server.files.get(self.path)
        if served is None:
            self.send_error(404)
            return
        if served.refusals:
            self._send(served.refusals.pop(0), {"Content-Length": "0"}, b"", served)
            return
        content, offset = served.content, 0
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if asked and served.has_ranges:
            offset = int(asked[1])
            if offset >= len(content):
                self._send(416, {"Content-Range": f"bytes */{len(content)}", "Content-Length": "0"}, b"", served)
                return
        headers = {}
        if served.length is not None:
            headers["Content-Length"] = served.length or str(len(content) - offset)
        if offset:
            headers["Content-Range"] = f"bytes {offset}-{len(content) - 1}/{len(content)}"
        self._send(206 if offset else 200, headers, content[offset:], served)

    def _send(self, status: int, headers: dict[str, str], body: bytes, served: Served) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if served.stalls:
            time.sleep(served.stalls.pop(0))
        if served.breaks and body:
            body = body[: served.breaks.pop(0)]
        step = 1 << 14
        with suppress(ConnectionError):  # of a client that was killed
            for start in range(0, len(body), step):
                self.wfile.write(body[start : start + step])
                if served.bytes_per_s:
                    time.sleep(step / served.bytes_per_s)


@contextmanager
def serving() -> Iterator[Server]:
    """A server in a thread, on a free port."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
