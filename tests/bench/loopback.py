"""A server of files on this machine that takes its time. It imports little: each one is a process that starts anew."""

from __future__ import annotations

import math
import multiprocessing
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Traffic:
    """What a server was asked for; it counts in another process."""

    counts: Any

    @property
    def requests(self) -> int:
        """How many requests."""
        return int(self.counts[0])

    @property
    def sent(self) -> int:
        """Bytes of files sent."""
        return int(self.counts[1])


@contextmanager
def serving(root: Path, delay: float, pace: float = math.inf) -> Iterator[tuple[str, Traffic]]:
    """Serve a folder, ranges included, on a free port; yields the address and the count of what was asked for.

    Every answer is ``delay`` seconds late, and all of them share a line of ``pace`` bytes a second.

    The server is a process of its own: in a thread it would wait for the interpreter, which a reader can hold.
    """
    context = multiprocessing.get_context("spawn")
    counts, ports = context.Array("q", 2), context.SimpleQueue()
    process = context.Process(target=_serve, args=(root, delay, pace, counts, ports), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ports.get()}", Traffic(counts)
    finally:
        process.terminate()
        process.join()


def _serve(root: Path, delay: float, pace: float, counts: Any, ports: Any) -> None:
    server = _Server(("127.0.0.1", 0), partial(_Files, root, delay, _Line(pace), counts))
    ports.put(server.server_port)
    server.serve_forever()


class _Line:
    """What all answers go through, one after the other."""

    def __init__(self, pace: float) -> None:
        self._pace, self._lock, self._free = pace, threading.Lock(), 0.0

    def carry(self, count: int) -> None:
        """Return when so many bytes have had their turn."""
        with self._lock:
            self._free = max(self._free, time.monotonic()) + count / self._pace
            until = self._free
        time.sleep(max(0.0, until - time.monotonic()))


class _Server(ThreadingHTTPServer):
    request_queue_size = 128  # so many connections may come at once


class _Files(BaseHTTPRequestHandler):
    """Answers GET and HEAD, late, from one folder."""

    protocol_version = "HTTP/1.1"  # which keeps connections open
    disable_nagle_algorithm = True  # which would hold the end of an answer back

    def __init__(self, root: Path, delay: float, line: _Line, counts: Any, *arguments: Any) -> None:
        self.root, self.delay, self.line, self.counts = root, delay, line, counts
        super().__init__(*arguments)

    def _note(self, sent: int) -> None:
        with self.counts.get_lock():
            self.counts[0] += 1
            self.counts[1] += sent

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        time.sleep(self.delay)
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self._note(0)
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2] or size), size - 1)) if asked else (0, size - 1)
        count = last - first + 1
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(count))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        self._note(count if body else 0)
        if body:
            self.line.carry(count)
            with path.open("rb") as file:
                self.connection.sendfile(file, first, count)  # the system's copy: the reader has the processors

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
