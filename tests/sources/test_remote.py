"""Reads over HTTP and S3 from a server on the loopback that fails in the ways that object stores do."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from rasterio.windows import Window

from s2seg.errors import ReadError
from s2seg.sources import reader
from s2seg.sources.reader import AssetRef, read_window
from tests.sources.test_reader import EPSG, grid, positions, write

_tokens = itertools.count()


def sign(href: str) -> str:
    """A link that can be told from the one before."""
    return f"{href}?token={next(_tokens)}"


class Store(ThreadingHTTPServer):
    """Serves one file with ranges; ``failures`` is how many requests get ``status`` first."""

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.failures, self.status, self.expired = content, 0, 503, -1
        self.requests = 0

    @property
    def href(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/band.tif"


class Handler(BaseHTTPRequestHandler):
    server: Store

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        self.server.requests += 1
        token = int(parse_qs(urlsplit(self.path).query).get("token", ["-1"])[0])
        if 0 <= token <= self.server.expired:
            self.send_error(403)
            return
        if self.server.failures > 0:
            self.server.failures -= 1
            self.send_error(self.server.status)
            return
        content, asked = self.server.content, self.headers.get("Range")
        first, last = 0, len(content) - 1
        if asked:
            low, high = asked.removeprefix("bytes=").split("-")
            first, last = int(low), min(int(high or last), last)
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(content[first : last + 1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setitem(reader.GDAL_ENV, "GDAL_HTTP_MAX_RETRY", 0)
    monkeypatch.setattr(reader.time, "sleep", lambda seconds: None)
    server = Store(Path(write(tmp_path / "band.tif", positions(200, 200), 10)).read_bytes())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


WHOLE = Window(0, 0, 200, 200)


@pytest.mark.parametrize("status", [503, 429, 404])
def test_a_failed_open_is_tried_again_and_not_answered_from_gdals_memory(store: Store, status: int) -> None:
    store.failures, store.status = 1, status
    got = read_window(AssetRef("i", "red", store.href), EPSG, grid(10), WHOLE)
    np.testing.assert_array_equal(got, positions(200, 200))


def test_attempts_are_bounded_and_the_error_names_the_asset(store: Store) -> None:
    store.failures = 10_000
    with pytest.raises(ReadError, match=r"band red of item S2A_x \(http://127"):
        read_window(AssetRef("S2A_x", "red", store.href), EPSG, grid(10), WHOLE)
    assert store.requests < 20


def test_links_are_signed_late_and_again_when_they_have_expired(store: Store) -> None:
    ref = AssetRef("i", "red", store.href, sign=f"{__name__}.sign")
    store.expired = next(_tokens) + 1  # the next link that is made has expired already
    got = read_window(ref, EPSG, grid(10), WHOLE)
    np.testing.assert_array_equal(got, positions(200, 200))


@pytest.fixture
def bucket(store: Store, monkeypatch: pytest.MonkeyPatch) -> str:
    """The store as a public S3 bucket."""
    monkeypatch.setenv("AWS_S3_ENDPOINT", f"127.0.0.1:{store.server_port}")
    monkeypatch.setenv("AWS_HTTPS", "NO")
    monkeypatch.setenv("AWS_VIRTUAL_HOSTING", "FALSE")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    return f"s3://bucket/{store.server_port}.tif"  # open files are remembered by their name


@pytest.mark.parametrize("failures", [0, 1])
def test_a_bucket_is_read_and_again_after_a_failure(store: Store, bucket: str, failures: int) -> None:
    store.failures = failures
    got = read_window(AssetRef("i", "red", bucket), EPSG, grid(10), WHOLE)
    np.testing.assert_array_equal(got, positions(200, 200))
    assert store.requests > failures
