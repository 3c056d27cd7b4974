"""Remote files read without GDAL, beside GDAL's own reads of the same files."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.windows import Window

from s2seg.errors import ReadError
from s2seg.sources import ranges, reader, tiles
from s2seg.sources.ranges import RangeError
from s2seg.sources.reader import AssetRef, close_files, read_window
from tests.sources.test_reader import EPSG, grid
from tests.sources.test_remote import Store, bucket, sign, store

__all__ = ["bucket", "sign", "store"]

pytestmark = pytest.mark.skipif(not ranges.installed(), reason="obstore and deflate are not installed")

TILED = {"tiled": True, "blockxsize": 64, "blockysize": 64}
HEIGHT, WIDTH = 150, 200


def scene(dtype: str = "uint16") -> np.ndarray:
    """Smooth enough for a predictor, with a corner of nodata and values up to the type's last."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    pixels = (np.sin(x / 9) * np.cos(y / 7) + 1) * 0.4 * np.iinfo(dtype).max + (x * 7 + y * 3) % 11
    pixels[100:, 150:] = 0
    pixels[0, :5] = np.iinfo(dtype).max
    return pixels.astype(dtype)


def encoded(folder: Path, pixels: np.ndarray | None = None, resolution: float = 20, **options: Any) -> Path:
    """A GeoTIFF, compressed by deflate with differences in tiles of 64 px unless the options say otherwise."""
    pixels = scene() if pixels is None else pixels
    bands = np.atleast_3d(pixels).transpose(2, 0, 1) if pixels.ndim == 3 else pixels[None]
    profile = {
        "driver": "GTiff", "height": bands.shape[1], "width": bands.shape[2], "count": len(bands),
        "dtype": bands.dtype, "crs": f"EPSG:{EPSG}", "transform": grid(resolution), "nodata": 0,
        "compress": "deflate", "predictor": 2, **TILED, **options,
    }  # fmt: skip
    path = folder / "band.tif"
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(bands)
    return path


@pytest.fixture
def publish(store: Store) -> Callable[[Path], str]:
    """Serve a file; returns its href."""

    def serve(path: Path) -> str:
        store.content = path.read_bytes()
        close_files()
        store.requests = 0
        return store.href

    return serve


@pytest.fixture
def no_gdal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no remote file be opened by GDAL."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("GDAL was asked")

    monkeypatch.setattr(reader._remote, "lend", refuse)


LAYOUTS: dict[str, dict[str, Any]] = {
    "published": {"driver": "COG", "blocksize": 128, "overviews": "AUTO"},
    "without differences": {"predictor": 1},
    "big-endian": {"ENDIANNESS": "BIG"},
    "big-endian, without differences": {"ENDIANNESS": "BIG", "predictor": 1},
    "BigTIFF": {"BIGTIFF": "YES"},
    "one byte": {"pixels": scene("uint8")},
    "not compressed": {"compress": "none", "predictor": 1},
    "strips": {"tiled": False, "blockxsize": None, "blockysize": 16},
    "strips, not compressed": {"tiled": False, "blockxsize": None, "compress": "none", "predictor": 1},
    "one tile": {"blockxsize": 208, "blockysize": 208},
    "a long header": {"blockxsize": 16, "blockysize": 16, "pixels": np.resize(scene(), (1200, 1200))},
}

WINDOWS = [(0, 0, 150, 200), (10, 20, 100, 30), (64, 64, 64, 64), (-30, -5, 60, 60), (140, 190, 50, 50), (400, 0, 8, 8)]


@pytest.mark.usefixtures("no_gdal")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_read_is_gdals_bit_for_bit(tmp_path: Path, publish: Callable[[Path], str], layout: str) -> None:
    path = encoded(tmp_path, **LAYOUTS[layout])
    href = publish(path)
    for target, resampling in ((20, "nearest"), (10, "nearest"), (10, "bilinear"), (20 / 6, "nearest")):
        for row, col, height, width in WINDOWS:
            for subtract in (0, 1000):
                far, near = (AssetRef("i", "red", at, subtract, resampling) for at in (href, str(path)))
                at = EPSG, grid(target), Window(col, row, width, height)
                np.testing.assert_array_equal(read_window(far, *at), read_window(near, *at))


LEFT_TO_GDAL: dict[str, dict[str, Any]] = {
    "another compression": {"compress": "lzw"},
    "packed bits": {"NBITS": 12, "predictor": 1, "pixels": scene() // 16},
    "two bands": {"pixels": np.dstack([scene(), scene()]), "interleave": "pixel"},
    "tiles that are not stored": {"SPARSE_OK": True, "pixels": np.pad(scene(), ((0, 200), (0, 0)))[-HEIGHT:]},
}


@pytest.mark.parametrize("layout", LEFT_TO_GDAL)
def test_what_is_laid_out_otherwise_is_left_to_gdal(
    tmp_path: Path, publish: Callable[[Path], str], layout: str
) -> None:
    path = encoded(tmp_path, **LEFT_TO_GDAL[layout])
    href = publish(path)
    at = EPSG, grid(10), Window(-3, -5, 200, 170)
    for _ in range(2):
        got = read_window(AssetRef("i", "red", href), *at)
        np.testing.assert_array_equal(got, read_window(AssetRef("i", "red", str(path)), *at))
    assert tiles.tiles_of(href) is None


def test_a_directory_at_the_end_is_left_to_gdal(tmp_path: Path, publish: Callable[[Path], str]) -> None:
    path = encoded(tmp_path)
    with rasterio.open(path, "r+") as dataset:
        dataset.update_tags(note="long enough to be written anew " * 9)
    assert path.stat().st_size > tiles._HEADER
    href = publish(path)
    got = read_window(AssetRef("i", "red", href), EPSG, grid(20), Window(0, 0, WIDTH, HEIGHT))
    np.testing.assert_array_equal(got, scene())
    assert tiles.tiles_of(href) is None


@pytest.mark.parametrize("options", [{}, {"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}])
def test_a_header_ends_where_the_first_tile_begins(tmp_path: Path, options: dict[str, str]) -> None:
    content = encoded(tmp_path, **options).read_bytes()
    length = tiles.header_length(content)
    layout = tiles.layout_of(content[:length])
    assert layout is not None and 0 <= layout.starts.min() - length < 16
    for start in (b"", b"II", b"GIF89a", content[:8], content[:100]):
        with pytest.raises(ValueError):
            tiles.header_length(start)


@pytest.mark.parametrize("geometry", ["a finer asset", "a shifted grid", "another zone"])
def test_what_needs_gdals_resampling_is_left_to_gdal(
    tmp_path: Path, publish: Callable[[Path], str], geometry: str
) -> None:
    path = encoded(tmp_path)
    code, transform = {
        "a finer asset": (EPSG, grid(40)),
        "a shifted grid": (EPSG, grid(20, left=500_007.0)),
        "another zone": (32632, Affine(20, 0, 962_000, 0, -20, 5_118_000)),
    }[geometry]
    at = code, transform, Window(0, 0, 150, 150)
    far, near = (read_window(AssetRef("i", "red", href), *at) for href in (publish(path), str(path)))
    assert near.any()
    np.testing.assert_array_equal(far, near)


@pytest.mark.usefixtures("no_gdal")
def test_neighbours_are_one_request_and_no_tile_is_fetched_twice(
    store: Store, tmp_path: Path, publish: Callable[[Path], str]
) -> None:
    ref = AssetRef("i", "red", publish(encoded(tmp_path)))

    def read(row: int, col: int, height: int, width: int) -> np.ndarray:
        return read_window(ref, EPSG, grid(20), Window(col, row, width, height))

    np.testing.assert_array_equal(read(10, 0, 20, 200), scene()[10:30])  # a row of tiles
    assert store.requests == 2  # the header, and the tiles
    with ThreadPoolExecutor(8) as pool:
        for row, pixels in zip(range(30, 70), pool.map(lambda row: read(row, 0, 1, 64), range(30, 70)), strict=True):
            np.testing.assert_array_equal(pixels, scene()[row : row + 1, :64])
    assert store.requests == 3  # one tile of the second row, for all


@pytest.mark.usefixtures("no_gdal")
def test_little_is_kept_and_what_was_read_whole_goes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, publish: Callable[[Path], str]
) -> None:
    href = publish(encoded(tmp_path))
    monkeypatch.setattr(tiles._decoded, "_room", 4 * 64 * 64 * 2)
    for row, col in ((0, 0), (0, 64), (64, 0), (64, 64)):
        read_window(AssetRef("i", "red", href), EPSG, grid(20), Window(col, row, 64, 64))
    read_window(AssetRef("i", "red", href), EPSG, grid(20), Window(130, 64, 10, 10))
    kept = [cell for (_, cell) in tiles._decoded._things]
    assert len(kept) == 4 and (1, 2) in kept


@pytest.mark.usefixtures("no_gdal")
@pytest.mark.parametrize("status", [429, 503, 500])
def test_throttling_is_waited_out(
    store: Store, tmp_path: Path, publish: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    backoff = {"init_backoff": timedelta(milliseconds=5), "max_backoff": timedelta(milliseconds=9), "base": 2}
    monkeypatch.setattr(ranges, "RETRIES", {**ranges.RETRIES, "max_retries": 2, "backoff": backoff})
    ref = AssetRef("i", "red", publish(encoded(tmp_path)))
    store.failures, store.status = 2, status
    np.testing.assert_array_equal(read_window(ref, EPSG, grid(20), Window(0, 0, WIDTH, HEIGHT)), scene())
    assert store.requests == 4


@pytest.mark.usefixtures("no_gdal")
def test_a_header_outlives_the_link_it_was_read_by(
    store: Store, tmp_path: Path, publish: Callable[[Path], str]
) -> None:
    ref = AssetRef("i", "red", publish(encoded(tmp_path)), sign=f"{__name__}.sign")
    read_window(ref, EPSG, grid(20), Window(0, 0, WIDTH, 10))
    assert store.requests == 2 and len(store.tokens) == 1
    store.expired = max(store.tokens)
    got = read_window(ref, EPSG, grid(20), Window(0, 64, WIDTH, 10))
    np.testing.assert_array_equal(got, scene()[64:74])
    assert store.requests == 4 and len(store.tokens) == 2  # refused, and the tiles


@pytest.mark.parametrize("damage", ["cut short", "overwritten"])
def test_tiles_that_do_not_hold_what_they_should_are_gdals_to_judge(
    store: Store, tmp_path: Path, publish: Callable[[Path], str], damage: str
) -> None:
    path = encoded(tmp_path)
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes(content[:half] + (bytes(len(content) - half) if damage == "overwritten" else b""))
    ref = AssetRef("S2A_x", "red", publish(path))
    opened = tiles.tiles_of(ref.href)
    assert opened is not None
    with pytest.raises(RangeError):
        opened.read(1, Window(0, 0, WIDTH, HEIGHT))
    with pytest.raises(ReadError, match="band red of item S2A_x"):
        read_window(ref, EPSG, grid(20), Window(0, 0, WIDTH, HEIGHT))


@pytest.mark.usefixtures("no_gdal")
def test_a_bucket_is_read(bucket: str, tmp_path: Path, publish: Callable[[Path], str]) -> None:
    publish(encoded(tmp_path))
    got = read_window(AssetRef("i", "red", bucket), EPSG, grid(20), Window(0, 0, WIDTH, HEIGHT))
    np.testing.assert_array_equal(got, scene())


FORK = f"""
import os, sys
from affine import Affine
from rasterio.windows import Window
from s2seg.sources import ranges
from s2seg.sources.ahead import _pool
from s2seg.sources.reader import AssetRef, read_window

def read():
    return read_window(AssetRef("i", "red", sys.argv[1]), {EPSG}, Affine{tuple(grid(20))[:6]}, Window(0, 0, 9, 9)).sum()

there = _pool.submit(read).result()
assert ranges.usable()
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
from s2seg.sources.ahead import _pool
here = _pool.submit(read).result()
os._exit(0 if here == there > 0 and not ranges.usable() else 1)
"""


@pytest.mark.skipif(not hasattr(sys.modules["os"], "fork"), reason="needs fork")
def test_a_forked_process_reads_through_gdal(tmp_path: Path, publish: Callable[[Path], str]) -> None:
    href = publish(encoded(tmp_path))
    run = subprocess.run([sys.executable, "-c", FORK, href], capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stderr) == (0, "")
