"""Median, percentile and medoid of many dates beside xarray's; whether the answers are the same."""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import odc.geo.xr
import pandas as pd
import xarray as xr
from odc.geo.geobox import GeoBox
from rich.console import Console
from rich.table import Table

from s2seg.sources.composite import SCL_CLASSES, CompositeSpec, composite
from tests.bench.fixtures import BANDS
from tests.bench.measuring import MEGA, spread, timed

MASKED = 0.3
SLOW, SLOWEST = 192, 96
"""Pixels on a side for what takes minutes otherwise, and for what takes hours; speeds are per megapixel."""

Reduce = Callable[[xr.DataArray], xr.DataArray]


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``composite``; returns the figures."""
    del folder  # all pixels are made up
    dates, size, repeats = (5, 256, 1) if quick else (12, 1024, 5)
    stack = stack_of(dates, size)
    table = Table("composite", "by", "s / Mpx", "min-max", "x s2seg", "same answer %",
                  title=f"{dates} dates, {len(BANDS)} bands, {MASKED:.0%} masked, one thread")  # fmt: skip
    rows = []
    with dask.config.set(scheduler="single-threaded"):
        for method, peers in METHODS.items():
            ours = partial(_ours, spec=CompositeSpec(method))
            base, _ = _row(f"{method}, s2seg", ours, stack, repeats)
            rows.append(base)
            table.add_row(method, "s2seg", *spread(base["s_per_mpx"], 3), "", "")
            for name, reduce in peers.items():
                side = SLOWEST if name.startswith("xarray, quantile") else SLOW
                corner = stack.isel(y=slice(side), x=slice(side))
                row, theirs = _row(f"{method}, {name}", reduce, corner, min(repeats, 3))
                row["same"] = float((theirs.values == ours(corner).values).mean())
                rows.append(row)
                ratio = statistics.median(row["s_per_mpx"]) / statistics.median(base["s_per_mpx"])
                table.add_row("", name, *spread(row["s_per_mpx"], 3), f"{ratio:.1f}", f"{100 * row['same']:.4f}")
    console.print(table, "goal: the median at least 5 times as fast as xarray's; all of them include the mask"
                         + ("" if NUMBAGG else "; numbagg, which makes xarray faster, is not installed"))  # fmt: skip
    return {"rows": rows}


def stack_of(dates: int, size: int) -> xr.DataArray:
    """(time, band, y, x) uint16 with SCL last, in one chunk: noise, of which clouds hide patches of 16 px."""
    rng = np.random.default_rng(0)
    data = rng.integers(1, 10_000, (dates, len(BANDS) + 1, size, size), np.uint16)
    cloudy = rng.random((dates, size // 16, size // 16)) < MASKED
    data[:, -1] = np.where(cloudy, SCL_CLASSES["cloud_high_probability"], SCL_CLASSES["vegetation"]).repeat(
        16, axis=1
    ).repeat(16, axis=2)  # fmt: skip
    grid = GeoBox.from_bbox((300_000, 0, 300_000 + 10 * size, 10 * size), "EPSG:32648", resolution=10)
    coords = odc.geo.xr.xr_coords(grid, dims=("y", "x")) | {
        "time": pd.date_range("2022-01-01", periods=dates, freq="5D"), "band": [*BANDS, "scl"],
        "platform": ("time", ["sentinel-2a"] * dates), "cloud_cover": ("time", np.zeros(dates, np.float32)),
    }  # fmt: skip
    return xr.DataArray(data, dims=("time", "band", "y", "x"), coords=coords).chunk()


def _row(name: str, reduce: Reduce, stack: xr.DataArray, repeats: int) -> tuple[dict[str, Any], xr.DataArray]:
    """Speeds, and what is made."""
    made = reduce(stack)  # pays for what is compiled on first use
    amount = stack.sizes["y"] * stack.sizes["x"] / MEGA
    return {"name": name, "s_per_mpx": [timed(lambda: reduce(stack)) / amount for _ in range(repeats)]}, made


def _ours(stack: xr.DataArray, spec: CompositeSpec) -> xr.DataArray:
    return composite(stack, spec).compute()


def _clear(stack: xr.DataArray) -> xr.DataArray:
    """(time, band, y, x) float32 in memory, NaN where SCL says cloud: what xarray's reductions need."""
    in_memory = stack.compute()
    clear = in_memory.isel(band=-1) != SCL_CLASSES["cloud_high_probability"]
    return in_memory.isel(band=slice(0, -1)).astype(np.float32).where(clear)


def _xarray(stack: xr.DataArray, q: float, fast: bool) -> xr.DataArray:
    with warnings.catch_warnings(), xr.set_options(use_numbagg=fast, use_bottleneck=fast):
        warnings.simplefilter("ignore", RuntimeWarning)  # pixels that no date sees
        clear = _clear(stack)
        reduced = clear.median("time", skipna=True) if q == 0.5 else clear.quantile(q, "time", skipna=True)
    return _rounded(reduced)


def _rounded(reduced: xr.DataArray) -> xr.DataArray:
    return np.rint(reduced).fillna(0).astype(np.uint16)


def _medoid(stack: xr.DataArray) -> xr.DataArray:
    clear = _clear(stack)
    centre = _xarray(stack, 0.5, fast=True).astype(np.float32)
    distance = ((clear - centre) ** 2).sum("band", skipna=False).fillna(np.inf)
    nearest = clear.isel(time=distance.argmin("time"))
    return nearest.drop_vars("time").fillna(0).astype(np.uint16).transpose("band", "y", "x")


NUMBAGG = importlib.util.find_spec("numbagg") is not None  # without it, xarray does as if it were not asked for

METHODS: dict[str, dict[str, Reduce]] = {
    "median": {"xarray, median(skipna=True)": partial(_xarray, q=0.5, fast=False)},
    "percentile": {"xarray, quantile(skipna=True)": partial(_xarray, q=0.25, fast=False)},
    "medoid": {"xarray with numbagg" if NUMBAGG else "xarray": _medoid},
}
if NUMBAGG:
    METHODS["median"]["xarray with numbagg"] = partial(_xarray, q=0.5, fast=True)
    METHODS["percentile"]["xarray with numbagg"] = partial(_xarray, q=0.25, fast=True)
