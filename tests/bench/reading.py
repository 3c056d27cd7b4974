"""The reader: beside plain rasterio and stackstac's own, and over HTTP and S3 that answer late."""

from __future__ import annotations

import multiprocessing
import os
import re
import statistics
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dask
import dask.array as da
import numpy as np
import rasterio
import stackstac
from odc.geo.geobox import GeoBox
from rasterio.windows import Window
from rich.console import Console
from rich.table import Table

from s2seg.sources.reader import GDAL_ENV
from s2seg.sources.search import search
from s2seg.sources.stack import stack
from tests.bench.fixtures import BANDS, BLOCK, DATES, WORLD, grid_of, scene
from tests.bench.measuring import MEGA, THREADS, rounds, spread, timed

DELAY = 0.02
"""Seconds by which the server's every answer is late."""


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``read``; returns the figures."""
    catalog = scene(folder, 1024 if quick else 4096)
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        return {
            "local": read(catalog, console, 2 if quick else 5),
            "network": over_network(catalog, console, 1 if quick else 3),
        }


def read(catalog: Path, console: Console, repeats: int) -> dict[str, Any]:
    """Our stack against plain rasterio windows and stackstac's own reader: the same pixels, the same threads."""
    (item,) = search(catalog, WORLD, DATES)
    grid = grid_of(catalog)
    bands = [b for b in BANDS if b not in ("swir16", "swir22")] + ["swir16", "swir22"]
    pixels = grid.shape[0] * grid.shape[1] * len(bands) / MEGA

    def ours() -> None:
        drain(stack([item], grid, bands, chunksize=BLOCK).data)

    def plain() -> None:
        plain_windows([item.assets[b].href for b in bands], grid)

    def theirs() -> None:
        box = grid.boundingbox
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lazy = stackstac.stack(
                [item.to_dict()], assets=bands, epsg=grid.crs.to_epsg(), resolution=10, bounds=tuple(box.bbox),
                chunksize=(-1, -1, BLOCK, BLOCK), dtype=np.dtype("uint16"), fill_value=np.uint16(0), rescale=False,
                snap_bounds=False,
            )  # fmt: skip
        drain(lazy.data)

    ways = {"s2seg stack": ours, "plain rasterio": plain, "stackstac's reader": theirs}
    seconds = rounds(ways, repeats)
    speed = {name: [pixels / s for s in values] for name, values in seconds.items()}
    table = Table("reader", "Mpx-band/s", "min-max", "of plain", title=f"read {len(bands)} bands of {grid.shape[0]} px")
    for name, values in speed.items():
        ratio = statistics.median(values) / statistics.median(speed["plain rasterio"])
        table.add_row(name, *spread(values, 0), f"{ratio:.2f}")
    console.print(table)
    return speed


def drain(data: da.Array) -> None:
    """Compute every chunk and keep nothing, in threads of its own: files are opened anew, with no block decoded yet."""
    few = data.map_blocks(lambda block: block[:1, :1, :1, :1].copy(), dtype=data.dtype, chunks=(1, 1, 1, 1))
    with ThreadPoolExecutor(THREADS) as pool, dask.config.set(pool=pool):
        few.compute()


def plain_windows(hrefs: list[str], grid: GeoBox) -> None:
    """The same windows with nothing but rasterio, each thread with its own handles; 20 m bands are repeated."""
    local = threading.local()

    def one(row: int, col: int) -> None:
        if not hasattr(local, "open"):
            local.open = [rasterio.open(href) for href in hrefs]
        height, width = min(BLOCK, grid.shape[0] - row), min(BLOCK, grid.shape[1] - col)
        out = np.zeros((len(hrefs), height, width), np.uint16)
        for band, dataset in zip(out, local.open, strict=True):
            factor = round(dataset.res[0] / 10)
            at = Window(col // factor, row // factor, -(-width // factor), -(-height // factor))
            if factor == 1:
                dataset.read(1, window=at, out=band)
            else:
                band[:] = dataset.read(1, window=at).repeat(factor, 0).repeat(factor, 1)[:height, :width]

    with (
        rasterio.Env(GDAL_CACHEMAX=GDAL_ENV["GDAL_CACHEMAX"], GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
        ThreadPoolExecutor(THREADS) as pool,
    ):
        steps = [(r, c) for r in range(0, grid.shape[0], BLOCK) for c in range(0, grid.shape[1], BLOCK)]
        list(pool.map(one, *zip(*steps, strict=True)))


# over the network


def over_network(catalog: Path, console: Console, repeats: int) -> dict[str, Any]:
    """Read the scene block by block from a server on this machine that takes its time; nothing is left in a cache."""
    (item,) = search(catalog, WORLD, DATES)
    grid, bucket = grid_of(catalog), catalog.parent.resolve()
    chunks = -(-grid.shape[0] // BLOCK) * -(-grid.shape[1] // BLOCK)
    files = {band: Path(item.assets[band].href).resolve() for band in BANDS}
    on_disk = sum(file.stat().st_size for file in files.values())
    table = Table("from", "chunks", "s", "min-max", "requests", "per chunk and band", "MB sent", "MB per chunk",
                  "of the files' bytes", title=f"{1000 * DELAY:.0f} ms added to each request: {grid.shape[0]} px, "
                  f"{len(BANDS)} bands, {THREADS} threads")  # fmt: skip
    figures: dict[str, Any] = {}
    for kind in ("http", "s3"):
        seconds = []
        for _ in range(repeats):
            # a new port, so that GDAL remembers nothing of the last time
            with serving(bucket.parent) as (address, traffic), anonymous_s3(address):
                root = "s3:/" if kind == "s3" else address
                for band, file in files.items():
                    item.assets[band].href = f"{root}/{bucket.name}/{file.relative_to(bucket)}"
                seconds.append(timed(lambda: drain(stack([item], grid, list(BANDS), chunksize=BLOCK).data)))
                requests, sent = traffic.requests, traffic.sent
        figures[kind] = {
            "seconds": seconds, "chunks": chunks, "requests": requests, "bytes": sent, "files_bytes": on_disk,
        }  # fmt: skip
        table.add_row(
            kind, str(chunks), *spread(seconds), str(requests), f"{requests / chunks / len(BANDS):.2f}",
            f"{sent / MEGA:.1f}", f"{sent / MEGA / chunks:.2f}", f"{sent / on_disk:.2f}",
        )  # fmt: skip
    console.print(table)
    return figures


@contextmanager
def anonymous_s3(address: str) -> Iterator[None]:
    """Let ``s3://bucket/key`` mean ``address/bucket/key``."""
    settings = {
        "AWS_S3_ENDPOINT": address.removeprefix("http://"), "AWS_HTTPS": "NO", "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_NO_SIGN_REQUEST": "YES",
    }  # fmt: skip
    with patch.dict(os.environ, settings):
        yield


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
def serving(root: Path) -> Iterator[tuple[str, Traffic]]:
    """Serve a folder, ranges included, on a free port; yields the address and the count of what was asked for.

    The server is a process of its own: in a thread it would wait for the interpreter, which a reader can hold.
    """
    context = multiprocessing.get_context("spawn")
    counts, ports = context.Array("q", 2), context.SimpleQueue()
    process = context.Process(target=_serve, args=(root, counts, ports), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ports.get()}", Traffic(counts)
    finally:
        process.terminate()
        process.join()


def _serve(root: Path, counts: Any, ports: Any) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, root, counts))
    ports.put(server.server_port)
    server.serve_forever()


class _Files(BaseHTTPRequestHandler):
    """Answers GET and HEAD, late, from one folder."""

    protocol_version = "HTTP/1.1"  # which keeps connections open

    def __init__(self, root: Path, counts: Any, *arguments: Any) -> None:
        self.root, self.counts = root, counts
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
        time.sleep(DELAY)
        path = self.root / self.path.lstrip("/")
        if not path.is_file():
            self._note(0)
            self.send_error(404)
            return
        size = path.stat().st_size
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), min(int(asked[2] or size), size - 1)) if asked else (0, size - 1)
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{last}/{size}")
        self.end_headers()
        self._note(last - first + 1 if body else 0)
        if body:
            with path.open("rb") as file:
                file.seek(first)
                self.wfile.write(file.read(last - first + 1))

    def log_message(self, *_: Any) -> None:
        """Say nothing."""
