"""The reader: beside plain rasterio and stackstac's own, and over HTTP and S3 that answer late."""

from __future__ import annotations

import os
import statistics
import threading
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dask
import dask.array as da
import numpy as np
import pystac
import rasterio
import stackstac
from odc.geo.geobox import GeoBox
from rasterio.shutil import copy
from rasterio.windows import Window
from rich.console import Console
from rich.table import Table

from s2seg.sources.ranges import installed
from s2seg.sources.reader import GDAL_ENV, close_files
from s2seg.sources.search import search
from s2seg.sources.stack import stack
from tests.bench.fixtures import BANDS, BLOCK, DATES, WORLD, grid_of, scene
from tests.bench.loopback import serving
from tests.bench.measuring import MEGA, THREADS, fresh, gib, rounds, spread, timed

NETWORKS = (
    ("http", 0.02, 2), ("http", 0.02, 4), ("http", 0.02, 8), ("http", 0.08, 4), ("http", 0.08, 8), ("s3", 0.02, 4),
)  # fmt: skip
"""What is read over: protocol, seconds by which every answer is late, threads."""

READERS = ("tiles", "GDAL")
"""Who reads from afar: :mod:`s2seg.sources.tiles`, the default where its packages are installed, and GDAL alone."""


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


def drain(data: da.Array, threads: int = THREADS) -> None:
    """Compute every chunk and keep nothing; files are opened anew, with no block decoded yet."""
    close_files()
    few = data.map_blocks(lambda block: block[:1, :1, :1, :1].copy(), dtype=data.dtype, chunks=(1, 1, 1, 1))
    with ThreadPoolExecutor(threads) as pool, dask.config.set(pool=pool):
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
    grid, (files,) = grid_of(catalog), published(catalog)
    chunks = -(-grid.shape[0] // BLOCK) * -(-grid.shape[1] // BLOCK)
    pixels = grid.shape[0] * grid.shape[1] * len(files) / MEGA
    on_disk = sum(file.stat().st_size for file in files.values())
    table = Table("from", "ms late", "threads", "reader", "s", "min-max", "Mpx-band/s", "requests",
                  "per chunk and band", "MB per chunk", "of the files' bytes", "peak GiB", title=f"{grid.shape[0]} px, "
                  f"{len(files)} bands in {chunks} chunks, from a server whose every answer is late")  # fmt: skip
    figures: dict[str, Any] = {}
    for (kind, delay, threads), reader in product(NETWORKS, READERS if installed() else READERS[1:]):
        (seconds, requests, sent), peak = fresh(
            _from_afar, item.to_dict(), grid, files, (kind, delay, threads), reader, repeats
        )
        figures[f"{kind} {1000 * delay:.0f} ms, {threads} threads, {reader}"] = {
            "seconds": seconds, "chunks": chunks, "requests": requests, "bytes": sent, "files_bytes": on_disk,
            "peak_bytes": peak,
        }  # fmt: skip
        table.add_row(
            kind, f"{1000 * delay:.0f}", str(threads), reader, *spread(seconds),
            f"{pixels / statistics.median(seconds):.0f}", str(requests), f"{requests / chunks / len(files):.2f}",
            f"{sent / MEGA / chunks:.2f}", f"{sent / on_disk:.2f}", gib(peak),
        )  # fmt: skip
    console.print(table)
    return figures


def _from_afar(
    item: dict[str, Any],
    grid: GeoBox,
    files: dict[str, Path],
    network: tuple[str, float, int],
    reader: str,
    repeats: int,
) -> tuple[list[float], int, int]:
    """Seconds of each time; requests and bytes of the last."""
    kind, delay, threads = network
    far, folder = pystac.Item.from_dict(item), next(iter(files.values())).parent
    seconds: list[float] = []
    with nullcontext() if reader == "tiles" else patch("s2seg.sources.reader.tiles_of", return_value=None):
        for _ in range(repeats):
            # a new port, so that GDAL remembers nothing of the last time
            with serving(folder.parent, delay) as (address, traffic), anonymous_s3(address):
                root = "s3:/" if kind == "s3" else address
                for band, file in files.items():
                    far.assets[band].href = f"{root}/{folder.name}/{file.name}"
                lazy = stack([far], grid, list(files), chunksize=BLOCK)
                seconds.append(timed(partial(drain, lazy.data, threads)))
                requests, sent = traffic.requests, traffic.sent
    return seconds, requests, sent


def published(catalog: Path, bands: Sequence[str] = BANDS) -> list[dict[str, Path]]:
    """The bands of each scene, in order of time, as archives publish them, overviews and headers first; made once."""
    folder = catalog.parent.with_name(f"{catalog.parent.name}-published")
    scenes = []
    for item in search(catalog, WORLD, DATES):
        files = {band: (folder / item.id / f"{band}.tif").resolve() for band in bands}
        for band, file in files.items():
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_suffix(".partial")
                copy(item.assets[band].href, partial, driver="COG", compress="deflate", predictor="yes", blocksize=1024)
                partial.rename(file)
        scenes.append(files)
    return scenes


@contextmanager
def anonymous_s3(address: str) -> Iterator[None]:
    """Let ``s3://bucket/key`` mean ``address/bucket/key``."""
    settings = {
        "AWS_S3_ENDPOINT": address.removeprefix("http://"), "AWS_HTTPS": "NO", "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_NO_SIGN_REQUEST": "YES",
    }  # fmt: skip
    with patch.dict(os.environ, settings):
        yield
