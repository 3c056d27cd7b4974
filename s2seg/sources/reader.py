"""Read the pixels of one asset onto a grid, as plainly as its geometry allows.

stackstac builds the graph and asks for each asset of a chunk (:mod:`s2seg.sources.ahead`). Most Sentinel-2 reads need
no warp: the asset's grid is the target grid, or a whole multiple or fraction of it (10, 20 and 60 m). Those are read
directly, which takes about half the time of a warp; everything else goes through GDAL's warper. Direct reads from afar
do without GDAL where the file allows it (:mod:`s2seg.sources.tiles`).
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from math import ceil, floor
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.errors import RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from s2seg.errors import ReadError
from s2seg.sources.catalogs import load_signer
from s2seg.sources.handles import Handles
from s2seg.sources.radiometry import forget_looks, harmonize
from s2seg.sources.tiles import Tiles, forget_tiles, tiles_of

ATTEMPTS = 3
"""How often a read is tried, after the first time by GDAL; HTTP retries come on top."""

_ALIGNED = 1e-3
"""Two grids count as aligned when they differ by less than this share of a pixel."""

_MEANINGS = {
    "code: 40[13]": "reading it is not allowed, or a signed link has expired",
    "code: 404": "there is no such file",
    "code: (429|503)": "the server wants fewer requests: go on later, or with fewer threads",
    r"got \d+ bytes, expected": "the file or the answer is cut short",
}
"""Pattern in what GDAL says -> what it means."""

REMOTE = ("http://", "https://", "s3://", "gs://", "az://", "/vsi")
"""How the hrefs of assets begin that lie elsewhere."""

GDAL_ENV: dict[str, Any] = {
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "GDAL_HTTP_MAX_RETRY": 4,
    "GDAL_HTTP_RETRY_DELAY": 1,
    "GDAL_HTTP_CONNECTTIMEOUT": 20,
    # an open is two requests, the size and the header: in blocks of 256 px a full tile's header is 20 KB, more than the
    # 16 KiB read by default
    "GDAL_INGESTED_BYTES_AT_OPEN": 32768,
    # decoded blocks kept for the neighbouring chunk; GDAL's own default, 5 % of all memory, grows with the machine
    "GDAL_CACHEMAX": 128 * 2**20,
}
"""GDAL settings for reading: bounded memory, retries on throttling, no directory listings.

What is not here won nothing where it was measured (HTTP/1.1 with 20 ms added to each request, as in ``python -m
tests.bench read``): GDAL merges consecutive ranges by itself; HTTP/2 is left to curl; VSI_CACHE saves no request of a
tiled file and copies local bytes once more; larger pieces (CPL_VSIL_CURL_CHUNK_SIZE) send 30 to 50 % more bytes;
without asking for the size first (CPL_VSIL_CURL_USE_HEAD=NO) GDAL begins to fetch whole files, and breaks off; a cache
of 64 MB (CPL_VSIL_CURL_CACHE_SIZE) saves 5 % of the bytes of six dates and takes 50 MB.
"""


@dataclass(frozen=True)
class AssetRef:
    """Everything a reader must know of one asset.

    Parameters
    ----------
    item_id, band, href
        Which asset; the href is unsigned.
    subtract
        Digital numbers to take off valid pixels (see :mod:`s2seg.sources.radiometry`).
    resampling
        How coarser or unaligned pixels reach the grid.
    sign
        Dotted path of the function that signs the href just before it is opened, or None.
    epsg
        CRS of the file, as its item states it; a file that contradicts it is not read.
    corners
        Upper left and lower right corner (x, y) of the file in that CRS, as far as its item states them; a file whose
        own are more than a pixel away is not read either.
    """

    item_id: str
    band: str
    href: str
    subtract: int = 0
    resampling: Literal["nearest", "bilinear"] = "nearest"
    sign: str | None = None
    epsg: int | None = None
    corners: tuple[tuple[float, float], ...] = ()

    @property
    def remote(self) -> bool:
        """Whether a read waits for a network."""
        return self.href.startswith(REMOTE)

    @property
    def categorical(self) -> bool:
        """Whether pixel values are codes, which must never be averaged."""
        return self.band == "scl"


Source: TypeAlias = rasterio.DatasetReader | Tiles
"""What plain windows are read from."""

_local, _remote = Handles(idle=128), Handles(idle=1024)  # each local one holds a file of the system's open


def close_files() -> None:
    """Close the files that stay open between reads, with the blocks that are decoded of them.

    For files that are replaced within the life of a process, and for measurements that shall begin cold.
    """
    for handles in (_local, _remote):
        handles.clear()
    forget_tiles()
    forget_looks()


def read_window(ref: AssetRef, epsg: int, transform: Affine, window: Window) -> npt.NDArray[np.uint16]:
    """Read one asset onto a window of the target grid.

    Parameters
    ----------
    ref
        The asset.
    epsg, transform
        The target grid's CRS and its affine transform (north up).
    window
        Rows and columns of that grid; parts outside the asset are filled with 0.

    Returns
    -------
    ndarray
        (rows, columns) uint16, harmonised, nodata 0.

    Raises
    ------
    ReadError
        If the asset cannot be opened or read after a bounded number of attempts, or does not hold whole numbers.
    """
    # a signed URL expires: the href is signed again with every attempt
    sign = load_signer(ref.sign) if ref.sign else None
    handles = _remote if ref.remote else _local
    for attempt in range(1, ATTEMPTS + 1):
        again = attempt > 1
        # GDAL remembers a failed open; a new attempt must not be answered from that memory
        fresh = {"CPL_VSIL_CURL_NON_CACHED": "/vsicurl/:/vsis3/"} if again else {}
        try:
            pixels = None if again or not ref.remote else _read_tiles(ref, epsg, transform, window)
            if pixels is None:
                with rasterio.Env(**GDAL_ENV, **fresh), handles.lend(ref.href, sign, anew=again) as dataset:
                    pixels = _read(dataset, ref, epsg, transform, window)
            return harmonize(pixels, ref.subtract)
        except (RasterioError, OSError) as error:
            if attempt == ATTEMPTS or not ref.remote:
                raise ReadError(ref.item_id, ref.band, ref.href, _one_line(error)) from error
            time.sleep(2 ** (attempt - 1) * 0.5)
    raise AssertionError("unreachable")


def _one_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # what GDAL said first says most
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    meaning = next((meaning for pattern, meaning in _MEANINGS.items() if re.search(pattern, text)), None)
    return f"{text} ({meaning})" if meaning else text


def _read_tiles(ref: AssetRef, epsg: int, transform: Affine, window: Window) -> npt.NDArray[np.uint16] | None:
    """Read without GDAL; None where that does not go."""
    tiles = tiles_of(ref.href, ref.sign)
    ratio = _ratio(tiles, epsg, transform) if tiles else None
    if tiles is None or ratio is None or ratio < 1:
        return None
    _check_place(tiles, ref, epsg)
    if ratio == 1:
        return _copy(tiles, transform, window)
    return _repeat(tiles, transform, window, round(ratio), ref.resampling)


def _read(
    dataset: rasterio.DatasetReader, ref: AssetRef, epsg: int, transform: Affine, window: Window
) -> npt.NDArray[np.uint16]:
    dtype = np.dtype(dataset.dtypes[0])
    if dtype.kind != "u" or dtype.itemsize > 2:
        raise ReadError(ref.item_id, ref.band, ref.href, f"holds {dtype.name}, not uint16 digital numbers")
    ratio = _ratio(dataset, epsg, transform)
    _check_place(dataset, ref, None if ratio is None else epsg)
    if ratio is None:
        return _warp(dataset, ref, epsg, transform, window)
    if ratio == 1:
        return _copy(dataset, transform, window)
    if ratio > 1:
        return _repeat(dataset, transform, window, round(ratio), ref.resampling)
    return _decimate(dataset, transform, window, round(1 / ratio), ref.categorical)


def _ratio(dataset: Source, epsg: int, transform: Affine) -> float | None:
    """Asset pixel size over target pixel size where the grids nest, else None."""
    own = dataset.transform
    square = abs(own.a + own.e) < 1e-9 and own.b == own.d == 0
    if not square or dataset.crs is None or dataset.crs.to_epsg() != epsg:
        return None
    ratio = own.a / transform.a
    whole = round(ratio) if ratio >= 1 else round(1 / ratio)
    if abs((ratio if ratio >= 1 else 1 / ratio) - whole) > 1e-6:
        return None
    # a coarse pixel may start at any target pixel; a target pixel must start at some fine one
    unit = min(own.a, transform.a)
    shifts = (own.c - transform.c) / unit, (own.f - transform.f) / unit
    return ratio if all(abs(s - round(s)) < _ALIGNED for s in shifts) else None


def _check_place(dataset: Source, ref: AssetRef, known: int | None) -> None:
    """Refuse a file that lies elsewhere than its item says; ``known`` is its EPSG code where that is settled."""
    own = known or (dataset.crs.to_epsg() if dataset.crs else None)
    if own is None or ref.epsg is None:
        return
    if own != ref.epsg:
        cause = f"the file is in EPSG:{own}, its item says EPSG:{ref.epsg}; mend the item's proj:code, or leave it out"
        raise ReadError(ref.item_id, ref.band, ref.href, cause)
    to_map = dataset.transform
    found = ("begins", to_map @ (0, 0)), ("ends", to_map @ (dataset.width, dataset.height))
    for (verb, (x, y)), stated in zip(found, ref.corners, strict=False):
        if max(abs(x - stated[0]), abs(y - stated[1])) > abs(to_map.a) + abs(to_map.b):
            cause = (
                f"the file {verb} at {x:.10g}, {y:.10g} (EPSG:{own}), by its item at {stated[0]:.10g}, "
                f"{stated[1]:.10g}; mend the item's proj:transform and proj:shape, or leave it out"
            )
            raise ReadError(ref.item_id, ref.band, ref.href, cause)


def _offset(dataset: Source, transform: Affine, unit: float) -> tuple[int, int]:
    """Row and column of the target grid's origin in the asset, in pixels of ``unit`` metres."""
    own = dataset.transform
    return round((own.f - transform.f) / unit), round((transform.c - own.c) / unit)


def _clip(start: int, size: int, limit: int) -> tuple[slice, slice]:
    """Part of [start, start + size) within [0, limit): as a slice of the source and of the destination."""
    low, high = max(start, 0), min(start + size, limit)
    high = max(low, high)
    return slice(low, high), slice(low - start, high - start)


def _window(rows: slice, cols: slice) -> Window:
    return Window(cols.start, rows.start, cols.stop - cols.start, rows.stop - rows.start)


def _shape(window: Window) -> tuple[int, int]:
    return int(window.height), int(window.width)


def _blank(window: Window, rows: slice, cols: slice) -> npt.NDArray[np.uint16]:
    """Pixels of a window of which ``rows`` and ``cols`` will be written: nodata around them, if anything is."""
    shape = _shape(window)
    whole = (rows.stop - rows.start, cols.stop - cols.start) == shape
    return np.empty(shape, np.uint16) if whole else np.zeros(shape, np.uint16)


def _copy(dataset: Source, transform: Affine, window: Window) -> npt.NDArray[np.uint16]:
    """Read pixel for pixel."""
    row0, col0 = _offset(dataset, transform, transform.a)
    height, width = _shape(window)
    rows, to_rows = _clip(row0 + int(window.row_off), height, dataset.height)
    cols, to_cols = _clip(col0 + int(window.col_off), width, dataset.width)
    out = _blank(window, to_rows, to_cols)
    if rows.start < rows.stop and cols.start < cols.stop:
        dataset.read(1, window=_window(rows, cols), out=out[to_rows, to_cols])
    return out


def _repeat(
    dataset: Source,
    transform: Affine,
    window: Window,
    factor: int,
    resampling: str,
) -> npt.NDArray[np.uint16]:
    """Bring coarser pixels (20 or 60 m) to the finer grid, each repeated or interpolated."""
    row0, col0 = _offset(dataset, transform, transform.a)
    top, left = row0 + int(window.row_off), col0 + int(window.col_off)
    height, width = _shape(window)
    margin = 1 if resampling == "bilinear" else 0
    rows, _ = _clip(floor(top / factor) - margin, _covering(top, height, factor) + 2 * margin, dataset.height)
    cols, _ = _clip(floor(left / factor) - margin, _covering(left, width, factor) + 2 * margin, dataset.width)
    if rows.start == rows.stop or cols.start == cols.stop:
        return np.zeros((height, width), np.uint16)
    coarse = dataset.read(1, window=_window(rows, cols))
    from_rows, put_rows = _clip(top - rows.start * factor, height, coarse.shape[0] * factor)
    from_cols, put_cols = _clip(left - cols.start * factor, width, coarse.shape[1] * factor)
    out = _blank(window, put_rows, put_cols)
    if margin:
        out[put_rows, put_cols] = _interpolate(coarse, factor)[from_rows, from_cols]
        return out
    wide = _widen(coarse, factor)[:, from_cols]
    target = out[put_rows, put_cols]
    for first in range(min(factor, len(target))):
        # every factor-th row from here shows consecutive coarse rows: whole rows are copied, once
        start = (from_rows.start + first) // factor
        part = target[first::factor]
        part[:] = wide[start : start + len(part)]
    return out


def _widen(coarse: npt.NDArray[Any], factor: int) -> npt.NDArray[Any]:
    """``coarse.repeat(factor, axis=1)``, in a third of its time."""
    wide = np.empty((*coarse.shape, factor), coarse.dtype)
    for column in range(factor):
        wide[..., column] = coarse
    return wide.reshape(len(coarse), -1)


def _covering(start: int, size: int, factor: int) -> int:
    """How many coarse pixels touch [start, start + size) fine ones."""
    return ceil((start + size) / factor) - floor(start / factor)


def _interpolate(coarse: npt.NDArray[Any], factor: int) -> npt.NDArray[np.uint16]:
    """Bilinear between pixel centres; nodata (0) does not bleed into its neighbours."""
    value = coarse.astype(np.float32)
    weight = (coarse > 0).astype(np.float32)
    for axis in (0, 1):
        value, weight = _interpolate_axis(value, factor, axis), _interpolate_axis(weight, factor, axis)
    mean = np.divide(value, weight, out=np.zeros_like(value), where=weight > 0)
    nearest_valid = (coarse > 0).repeat(factor, axis=0).repeat(factor, axis=1)
    return np.where(nearest_valid, np.rint(mean), 0).astype(np.uint16)


def _interpolate_axis(a: npt.NDArray[np.float32], factor: int, axis: int) -> npt.NDArray[np.float32]:
    n = a.shape[axis]
    at = (np.arange(n * factor) + 0.5) / factor - 0.5
    low = np.clip(np.floor(at).astype(int), 0, n - 1)
    high = np.minimum(low + 1, n - 1)
    share = np.clip(at - low, 0, 1).astype(np.float32)
    share = share.reshape((-1, 1) if axis == 0 else (1, -1))
    between: npt.NDArray[np.float32] = a.take(low, axis) * (1 - share) + a.take(high, axis) * share
    return between


def _decimate(
    dataset: rasterio.DatasetReader,
    transform: Affine,
    window: Window,
    factor: int,
    categorical: bool,
) -> npt.NDArray[np.uint16]:
    """Read onto a coarser grid: the mean of the valid pixels, or the nearest code; overviews serve where they exist."""
    row0, col0 = _offset(dataset, transform, dataset.transform.a)
    height, width = _shape(window)
    # only whole target pixels are read this way, so that the mean is taken over the same pixels whatever the window
    rows, to_rows = _clip_coarse(row0 + int(window.row_off) * factor, height, dataset.height, factor)
    cols, to_cols = _clip_coarse(col0 + int(window.col_off) * factor, width, dataset.width, factor)
    out = _blank(window, to_rows, to_cols)
    part = out[to_rows, to_cols]
    if part.size:
        resampling = Resampling.nearest if categorical else Resampling.average
        dataset.read(1, window=_window(rows, cols), out=part, resampling=resampling)
    return out


def _clip_coarse(start: int, size: int, limit: int, factor: int) -> tuple[slice, slice]:
    """Like :func:`_clip` for ``size`` coarse pixels of ``factor`` fine ones each, cut at whole coarse pixels."""
    first = max(0, ceil(-start / factor))
    last = min(size, floor((limit - start) / factor))
    last = max(first, last)
    return slice(start + first * factor, start + last * factor), slice(first, last)


def _warp(
    dataset: rasterio.DatasetReader, ref: AssetRef, epsg: int, transform: Affine, window: Window
) -> npt.NDArray[np.uint16]:
    """Resample between grids that do not nest: another UTM zone, or a shifted origin."""
    resampling = Resampling.nearest if ref.categorical else Resampling[ref.resampling]
    if not ref.categorical and transform.a > 1.5 * dataset.transform.a:
        resampling = Resampling.average
    height, width = _shape(window)
    with WarpedVRT(
        dataset,
        crs=f"EPSG:{epsg}",
        transform=transform @ Affine.translation(window.col_off, window.row_off),
        height=height,
        width=width,
        resampling=resampling,
        src_nodata=0,
        nodata=0,
    ) as warped:
        return warped.read(1, out=np.empty((height, width), np.uint16))
