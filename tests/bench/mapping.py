"""Reading, windows, end to end, memory: what ``s2seg map`` costs."""

from __future__ import annotations

import multiprocessing
import re
import shutil
import statistics
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import dask
import dask.array as da
import numpy as np
import rasterio
import stackstac
import xarray as xr
from odc.geo.geobox import GeoBox
from rasterio.windows import Window
from rich.console import Console
from rich.table import Table

from s2seg.inference import chunks_for, predict
from s2seg.models import ModelBundle, load_model, open_session
from s2seg.pipeline import MapOptions, map_area, plan_area
from s2seg.sources.composite import CompositeSpec
from s2seg.sources.search import search
from s2seg.sources.stack import stack
from s2seg.windows import ChunkSpec
from tests.bench.fixtures import BANDS, DATES, fitted_network, inner_box, scene

THREADS = 2
BLOCK = 1024


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``map``; returns the figures."""
    sizes = (1024, 2048) if quick else (4096, 8192, 10980)
    model = fitted_network(folder, 20 if quick else 120).path
    catalogs = {size: scene(folder, size) for size in sizes}
    first = catalogs[sizes[0]]
    figures: dict[str, Any] = {}
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        figures["read"] = read(first, console, repeats=2 if quick else 5)
    figures["windows"] = windows(first, model, console, 1536 if quick else 3072, repeats=1 if quick else 3)
    figures["end_to_end"] = [end_to_end(catalogs[s], s, model, folder, console) for s in sizes]
    memory(figures["end_to_end"], console)
    return figures


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that its peak memory is its own; returns (result, peak bytes)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, function, arguments).result()


def _with_peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, int]:
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        result = function(*arguments)
    # not getrusage: its maximum begins with what the parent had when it started this process
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return result, int(peak[1]) * 1024 if peak else 0


# reading


def read(catalog: Path, console: Console, repeats: int) -> dict[str, Any]:
    """Our stack against plain rasterio windows and stackstac's own reader: the same pixels, the same threads."""
    (item,) = search(catalog, (-180, -80, 180, 80), DATES)
    with rasterio.open(item.assets["blue"].href) as dataset:
        grid = GeoBox(dataset.shape, dataset.transform, f"EPSG:{dataset.crs.to_epsg()}")
    bands = [b for b in BANDS if b not in ("swir16", "swir22")] + ["swir16", "swir22"]
    pixels = grid.shape[0] * grid.shape[1] * len(bands) / 1e6

    def ours() -> None:
        _drain(stack([item], grid, bands, chunksize=BLOCK).data)

    def plain() -> None:
        _plain_windows([item.assets[b].href for b in bands], grid)

    def theirs() -> None:
        box = grid.boundingbox
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            lazy = stackstac.stack(
                [item.to_dict()], assets=bands, epsg=grid.crs.to_epsg(), resolution=10, bounds=tuple(box.bbox),
                chunksize=(-1, -1, BLOCK, BLOCK), dtype=np.dtype("uint16"), fill_value=np.uint16(0), rescale=False,
                snap_bounds=False,
            )  # fmt: skip
        _drain(lazy.data)

    ways = {"s2seg stack": ours, "plain rasterio": plain, "stackstac's reader": theirs}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(_timed(way))
    speed = {name: [pixels / s for s in values] for name, values in seconds.items()}
    table = Table("reader", "Mpx-band/s", "min-max", "of plain", title=f"read {len(bands)} bands of {grid.shape[0]} px")
    for name, values in speed.items():
        ratio = statistics.median(values) / statistics.median(speed["plain rasterio"])
        table.add_row(name, f"{statistics.median(values):.0f}", f"{min(values):.0f}-{max(values):.0f}", f"{ratio:.2f}")
    console.print(table)
    return speed


def _drain(data: da.Array) -> None:
    """Compute every chunk and keep nothing."""
    data.map_blocks(lambda block: block[:1, :1, :1, :1].copy(), dtype=data.dtype, chunks=(1, 1, 1, 1)).compute()


def _plain_windows(hrefs: list[str], grid: GeoBox) -> None:
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
        rasterio.Env(GDAL_CACHEMAX=256 * 2**20, GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
        ThreadPoolExecutor(THREADS) as pool,
    ):
        steps = [(r, c) for r in range(0, grid.shape[0], BLOCK) for c in range(0, grid.shape[1], BLOCK)]
        list(pool.map(one, *zip(*steps, strict=True)))


def _timed(way: Callable[[], None]) -> float:
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


# windows


def windows(catalog: Path, model: str, console: Console, size: int, repeats: int) -> list[dict[str, Any]]:
    """Agreement with the whole image, cost of the overlap, and what remains of the network's speed."""
    default = chunks_for(load_model(model))
    whole, whole_peak = fresh(_whole_image, catalog, model, size)
    console.print(f"whole image of {size} px at once: {whole_peak / 2**30:.2f} GiB")
    rows = []
    for step in (512, 1024, 1536, 2048):
        for depth in (0, 32, 64) if step == default.step else (32, 64):
            if step > size:
                continue
            (seconds, codes), peak = fresh(_chunked, catalog, model, size, step, depth, repeats)
            spec = ChunkSpec.trimmed(core=step, step=step, depth=depth)
            net = size * size / 1e6 / statistics.median(seconds)
            rows.append(
                {
                    "step": step, "depth": depth, "window": spec.window, "overlap_cost": spec.overlap_cost,
                    "agreement": float((codes == whole).mean()), "net_mpx_s": net,
                    "network_mpx_s": net * spec.overlap_cost, "peak_bytes": peak, "seconds": seconds,
                    "default": (step, depth) == (default.step, default.before),
                }
            )  # fmt: skip
    table = Table("window", "depth", "overlap cost", "agreement %", "network Mpx/s", "net Mpx/s", "peak GiB", "",
                  title=f"windows, {size} px of real pixels, torch on CPU (median of {repeats})")  # fmt: skip
    for r in rows:
        table.add_row(
            str(r["window"]), str(r["depth"]), f"{r['overlap_cost']:.2f}", f"{100 * r['agreement']:.3f}",
            f"{r['network_mpx_s']:.2f}", f"{r['net_mpx_s']:.2f}", f"{r['peak_bytes'] / 2**30:.2f}",
            "default" if r["default"] else "",
        )  # fmt: skip
    console.print(table)
    return rows


def _piece(catalog: Path, size: int, margin: int) -> xr.DataArray:
    """(band, y, x) pixels in memory, with a margin, from the middle of the scene."""
    (item,) = search(catalog, (-180, -80, 180, 80), DATES)
    with rasterio.open(item.assets["blue"].href) as dataset:
        grid = GeoBox(dataset.shape, dataset.transform, f"EPSG:{dataset.crs.to_epsg()}")
    at = slice((grid.shape[0] - size) // 2 - margin, (grid.shape[0] + size) // 2 + margin)
    pixels = stack([item], grid[at, at], list(BANDS), chunksize=BLOCK).isel(time=0)
    return pixels.compute().chunk()


def _whole_image(catalog: Path, model: str, size: int) -> np.ndarray:
    margin = 128
    pixels = _piece(catalog, size, margin).values
    return open_session(load_model(model)).classify(pixels[None], margin, frozenset({"class"}))["class"][0]


def _chunked(
    catalog: Path, model: str, size: int, step: int, depth: int, repeats: int
) -> tuple[list[float], np.ndarray]:
    scene_ = _piece(catalog, size, depth)
    margin = ((depth, depth), (depth, depth))
    spec = ChunkSpec.trimmed(core=step, step=step, depth=depth)
    lazy = predict(scene_, load_model(model), chunks=spec, margin=margin).land_cover
    codes = lazy.values  # the first run pays for set-up
    return [_timed(lambda: lazy.compute()) for _ in range(repeats)], codes


# end to end


def end_to_end(catalog: Path, size: int, model: str, folder: Path, console: Console) -> dict[str, Any]:
    """``map_area`` in a process of its own, then the network alone on the same pixels, in memory."""
    (record, seconds, first, planned), peak = fresh(_map, catalog, model, folder / "map")
    pixels = record["grid"]["shape"][0] * record["grid"]["shape"][1] / 1e6
    (same, bare), _ = fresh(_network_alone, catalog, model)
    row = {
        "size": size, "mpx": pixels, "seconds": seconds, "first_seconds": first, "stages": record["seconds"],
        "peak_bytes": peak, "planned_bytes": planned, "network_seconds": pixels / bare,
        "network_with_overlap_seconds": pixels / same,
    }  # fmt: skip
    console.print(
        f"{size} px: {seconds:.1f} s for {pixels:.1f} Mpx; the network alone {pixels / bare:.1f} s, "
        f"with its overlap {pixels / same:.1f} s; total is {seconds * bare / pixels:.2f} x the network alone, "
        f"{seconds * same / pixels:.2f} x with its overlap; "
        f"set-up of the process {first:.1f} s"
    )
    return row


def _map(catalog: Path, model: str, output: Path) -> tuple[dict[str, Any], float, float, int]:
    options = MapOptions(composite=CompositeSpec(mask=()), overwrite=True)
    box = inner_box(catalog)
    planned = plan_area(catalog, box, DATES, model, options).peak_memory
    # a first, small map pays for imports and for opening the network, once per process
    west, south, east, north = box
    corner = west, south, west + (east - west) / 16, south + (north - south) / 16
    first = _timed(lambda: map_area(catalog, corner, DATES, model, output, options))
    start = time.perf_counter()
    record = map_area(catalog, box, DATES, model, output, options).record
    seconds = time.perf_counter() - start
    shutil.rmtree(output)
    return dict(record), seconds, first, planned


def _network_alone(catalog: Path, model: str) -> tuple[float, float]:
    """Mpx/s of output: with the default's windows and overlap, and of the same windows laid side by side."""
    bundle: ModelBundle = load_model(model)
    session, spec = open_session(bundle), chunks_for(bundle)
    pixels = _piece(catalog, spec.window, 0).values[None]
    session.classify(pixels, 0, frozenset({"class"}))
    seconds = statistics.median(_timed(lambda: session.classify(pixels, 0, frozenset({"class"}))) for _ in range(7))
    bare = spec.window**2 / 1e6 / seconds
    return bare / spec.overlap_cost, bare


def memory(rows: list[dict[str, Any]], console: Console) -> None:
    """Peak memory against size, and against what the plan predicted."""
    table = Table(
        "size", "Mpx", "wall s", "Mpx/s", "x network", "peak GiB", "planned GiB", title="end to end, torch on CPU"
    )
    for r in rows:
        table.add_row(
            str(r["size"]), f"{r['mpx']:.0f}", f"{r['seconds']:.1f}", f"{r['mpx'] / r['seconds']:.2f}",
            f"{r['seconds'] / r['network_seconds']:.2f}", f"{r['peak_bytes'] / 2**30:.2f}",
            f"{r['planned_bytes'] / 2**30:.2f}",
        )  # fmt: skip
    peaks = [r["peak_bytes"] for r in rows]
    console.print(table, f"largest over smallest peak: {max(peaks) / min(peaks):.2f}")
