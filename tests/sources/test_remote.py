"""Reads over HTTP and S3 from a server on the loopback that fails in the ways that object stores do."""

from __future__ import annotations

import itertools
import pickle
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from rasterio.windows import Window

from s2seg.errors import ReadError
from s2seg.sources import ranges, reader
from s2seg.sources.reader import AssetRef, close_files, read_window
from s2seg.sources.stack import stack
from s2seg.testing import position_scene
from tests.sources.test_reader import EPSG, grid, positions, write
from tests.sources.test_stack import items_in, own_grid

_tokens = itertools.count()


def sign(href: str) -> str:
    """A link that can be told from the one before."""
    return f"{href}?token={next(_tokens)}"


class Store(ThreadingHTTPServer):
    """Serves one file with ranges; ``failures`` is how many requests from ``beyond`` on end in ``status`` first.

    Beside codes of HTTP there is the status ``cut``: half of the answer, and no more.
    """

    def __init__(self, content: bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.expired = content, -1
        self.failures, self.beyond, self.status = 0, 0, 503
        self.requests, self.tokens = 0, set[int]()

    @property
    def href(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/band.tif"

    def handle_error(self, *_: object) -> None:
        """Say nothing of connections that were cut."""


class Handler(BaseHTTPRequestHandler):
    server: Store

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        store = self.server
        store.requests += 1
        token = int(parse_qs(urlsplit(self.path).query).get("token", ["-1"])[0])
        store.tokens.add(token)
        content, asked = store.content, self.headers.get("Range")
        first, last = 0, len(content) - 1
        if asked:
            low, high = asked.removeprefix("bytes=").split("-")
            first, last = int(low), min(int(high or last), last)
        if 0 <= token <= store.expired:
            self.send_error(403)
            return
        fails = store.failures > 0 and first >= store.beyond
        store.failures -= fails
        if fails and store.status != "cut":
            self.send_error(store.status)
            return
        if first > last:
            self.send_error(416)
            return
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(last - first + 1))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.end_headers()
        if body:
            self.wfile.write(content[first : (first + last) // 2 if fails else last + 1])

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    monkeypatch.setitem(reader.GDAL_ENV, "GDAL_HTTP_MAX_RETRY", 0)
    monkeypatch.setattr(reader.time, "sleep", lambda seconds: None)
    monkeypatch.setitem(ranges.RETRIES, "max_retries", 0)
    close_files()  # ports come back: nothing may be remembered of the server before
    server = Store(Path(write(tmp_path / "band.tif", positions(200, 200), 10)).read_bytes())
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True, params=["tiles", "gdal"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read with and without GDAL."""
    if request.param == "gdal":
        monkeypatch.setattr(reader, "tiles_of", lambda *_: None)
    elif not ranges.installed():
        pytest.skip("obstore and deflate are not installed")


WHOLE = Window(0, 0, 200, 200)
TOP, BOTTOM = Window(0, 0, 200, 50), Window(0, 150, 200, 50)
HEADER = 32_768
"""Bytes that come with an open, of 80 000 in all: the top of the image is among them."""


@pytest.mark.parametrize("beyond", [0, HEADER])
@pytest.mark.parametrize("status", [500, 503, 429, 404, 403, "cut"])
def test_a_failure_is_tried_again_and_not_answered_from_gdals_memory(
    store: Store, status: int | str, beyond: int
) -> None:
    store.failures, store.status, store.beyond = 1, status, beyond
    got = read_window(AssetRef("i", "red", store.href), EPSG, grid(10), WHOLE)
    np.testing.assert_array_equal(got, positions(200, 200))


@pytest.mark.parametrize(
    "status, said",
    [
        (404, "HTTP response code: 404 (there is no such file)"),
        (403, "HTTP response code: 403 (reading it is not allowed, or a signed link has expired)"),
        (503, "HTTP response code: 503 (the server wants fewer requests: go on later, or with fewer threads)"),
        ("cut", "(the file or the answer is cut short)"),
    ],
)
def test_attempts_are_bounded_and_one_line_names_the_asset(store: Store, status: int | str, said: str) -> None:
    store.failures, store.status = 10_000, status
    with pytest.raises(ReadError) as caught:
        read_window(AssetRef("S2A_x", "red", store.href), EPSG, grid(10), WHOLE)
    message = str(caught.value)
    assert message.startswith(f"cannot read band red of item S2A_x ({store.href}): ") and "\n" not in message
    assert message.endswith(said)
    assert store.requests < 20


def test_a_file_elsewhere_than_its_item_says_is_not_read(store: Store) -> None:
    ref = AssetRef("i", "red", store.href, epsg=EPSG, corners=((503_000, 5_100_000),))
    with pytest.raises(ReadError, match=r"the file begins at 500000, 5100000 .*, by its item at 503000, 5100000"):
        read_window(ref, EPSG, grid(10), WHOLE)


def test_a_file_that_is_cut_short_is_named(store: Store) -> None:
    store.content = store.content[:40_000]
    np.testing.assert_array_equal(
        read_window(AssetRef("i", "red", store.href), EPSG, grid(10), TOP), positions(200, 200)[:50]
    )
    with pytest.raises(ReadError, match="cut short"):
        read_window(AssetRef("i", "red", store.href), EPSG, grid(10), BOTTOM)


def test_links_are_signed_late_and_again_when_they_have_expired(store: Store) -> None:
    ref = AssetRef("i", "red", store.href, sign=f"{__name__}.sign")
    store.expired = next(_tokens) + 1  # the next link that is made has expired already
    got = read_window(ref, EPSG, grid(10), WHOLE)
    np.testing.assert_array_equal(got, positions(200, 200))


def test_a_link_that_expires_during_a_map_is_signed_again(store: Store) -> None:
    ref = AssetRef("i", "red", store.href, sign=f"{__name__}.sign")
    read_window(ref, EPSG, grid(10), TOP)
    opened = store.requests
    read_window(ref, EPSG, grid(10), TOP)
    # an open file is not signed, and not asked for, again while its link serves
    assert store.requests == opened and len(store.tokens) == 1
    store.expired = max(store.tokens)
    np.testing.assert_array_equal(read_window(ref, EPSG, grid(10), BOTTOM), positions(200, 200)[150:])
    assert len(store.tokens) == 2


def test_threads_share_what_is_open(store: Store) -> None:
    ref = AssetRef("i", "red", store.href)
    for _ in range(3):
        with ThreadPoolExecutor(1) as other:
            other.submit(read_window, ref, EPSG, grid(10), TOP).result()
    assert store.requests == 2  # GDAL: the size, and the header with the tiles; otherwise: the header, and the tiles


@pytest.mark.parametrize("time_chunks", [-1, 1])
def test_a_stack_from_afar_is_the_stack_of_the_files(store: Store, tmp_path: Path, time_chunks: int) -> None:
    (item,) = items_in(position_scene(tmp_path / "scene", bands={"red": 10}))
    near, far = item.clone(), item.clone()
    far.assets["red"].href = store.href
    store.content = Path(near.assets["red"].href).read_bytes()
    far.id = "far"
    grid_ = own_grid(near, "red")
    lazy = pickle.loads(pickle.dumps(stack([near, far], grid_, ["red"], chunksize=64, time_chunks=time_chunks)))
    got = lazy.compute(num_workers=3)
    assert got[0].values.any()
    np.testing.assert_array_equal(got[0].values, got[1].values)


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
