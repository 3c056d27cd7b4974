"""Many dates -> one clear scene: mask clouds by SCL, mosaic each pass, reduce over time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import dask.array as da
import numpy as np
import numpy.typing as npt
import odc.geo.xr  # noqa: F401  registers the .odc accessor
import xarray as xr
from scipy import ndimage

from s2seg.errors import InputError

Method = Literal["median", "mean", "percentile", "least-cloudy", "max-ndvi", "medoid"]
METHODS: tuple[str, ...] = get_args(Method)

SCL_CLASSES: dict[str, int] = {
    "no_data": 0,
    "saturated_or_defective": 1,
    "dark_area": 2,
    "cloud_shadow": 3,
    "vegetation": 4,
    "not_vegetated": 5,
    "water": 6,
    "unclassified": 7,
    "cloud_medium_probability": 8,
    "cloud_high_probability": 9,
    "thin_cirrus": 10,
    "snow": 11,
}
"""Codes of the Level-2A scene classification (ESA, Sentinel-2 products specification)."""

DEFAULT_MASK = (
    "no_data",
    "saturated_or_defective",
    "cloud_shadow",
    "cloud_medium_probability",
    "cloud_high_probability",
    "thin_cirrus",
)

_SLAB_PIXELS = 2**16
"""What is reduced at once: all dates of it stay in a processor's cache, which is nearly twice as fast."""

_NETWORK_LIMIT = 16

_PASS = np.timedelta64(30, "m")
"""Scenes of one platform closer in time than this belong to one pass over the area."""


@dataclass(frozen=True)
class CompositeSpec:
    """How dates become one scene.

    Parameters
    ----------
    method
        ``median``, ``mean`` or ``percentile`` of each band; ``least-cloudy`` takes each pixel from the clearest date
        that sees it; ``max-ndvi`` from its greenest date; ``medoid`` the real observation closest to the median of
        all bands.
    mask
        Names in :data:`SCL_CLASSES` to leave out; empty keeps everything.
    dilate
        Metres by which the mask grows.
    percentile
        For ``percentile``: 0 to 100.

    Raises
    ------
    InputError
        For a method or class that does not exist, or numbers out of range.
    """

    method: Method = "median"
    mask: tuple[str, ...] = DEFAULT_MASK
    dilate: float = 0.0
    percentile: float = 25.0

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise InputError(f"unknown composite {self.method!r}: choose {', '.join(METHODS)}")
        unknown = [name for name in self.mask if name not in SCL_CLASSES]
        if unknown:
            raise InputError(f"unknown SCL class {unknown[0]!r}: choose among {', '.join(SCL_CLASSES)}")
        if self.dilate < 0:
            raise InputError(f"the mask can grow by 0 metres or more, not {self.dilate:g}")
        if not 0 <= self.percentile <= 100:
            raise InputError(f"percentile must lie between 0 and 100, not {self.percentile:g}")


def composite(stack: xr.DataArray, spec: CompositeSpec | None = None) -> xr.DataArray:
    """Reduce a stack to one clear scene, lazily, block by block.

    Scenes of one pass are mosaicked first, so that a pixel in the overlap of two tiles counts once.

    Parameters
    ----------
    stack
        (time, band, y, x) uint16, nodata 0, as :func:`s2seg.stack` returns it; all dates in one chunk. Its last band
        may be ``scl``; without it nothing is masked but nodata.
    spec
        Method and mask; by default the median of pixels that SCL calls clear.

    Returns
    -------
    DataArray
        (band, y, x) uint16 without ``scl``; a pixel that no date sees clearly is 0. Coordinate ``observations`` (y, x)
        uint16 counts the clear looks.

    Raises
    ------
    InputError
        If a mask is asked for with ``dilate`` but the stack has no ``scl``, or ``max-ndvi`` lacks red or nir.
    """
    spec = spec or CompositeSpec()
    bands = [str(b) for b in stack.band.values if b != "scl"]
    reduce = _reducer(spec, bands, stack)
    data = stack.isel(band=slice(0, len(bands))).data
    groups = passes(stack)
    clear = _clear(stack, spec)
    both = da.map_blocks(
        _composite_block,
        data.rechunk({0: -1, 1: -1}),
        clear[:, None].rechunk({0: -1}),
        groups=groups,
        reduce=reduce,
        dtype=np.uint16,
        drop_axis=0,
        chunks=((len(bands) + 1,), *data.chunks[2:]),
        meta=np.empty((0, 0, 0), np.uint16),
    )
    return _scene(both, stack, bands)


def per_date(stack: xr.DataArray) -> xr.DataArray:
    """Mosaic each pass and keep the dates apart, clouds and all.

    Parameters
    ----------
    stack
        (time, band, y, x), as :func:`s2seg.stack` returns it. Chunks along time should be those of
        :func:`pass_chunks`, so that one date is read at a time.

    Returns
    -------
    DataArray
        (time, band, y, x) uint16 without ``scl``, one entry per pass, named by its first scene's time. ``observations``
        is 1 where the pass saw the ground.
    """
    bands = [str(b) for b in stack.band.values if b != "scl"]
    data = stack.isel(band=slice(0, len(bands))).data
    starts = np.unique(passes(stack), return_index=True)[1]
    layers = [
        da.map_blocks(
            _first_valid,
            part.rechunk({0: -1, 1: -1}),
            dtype=np.uint16,
            drop_axis=0,
            chunks=((len(bands),), *data.chunks[2:]),
            meta=np.empty((0, 0, 0), np.uint16),
        )
        for part in (data[a:b] for a, b in zip(starts, [*starts[1:], stack.sizes["time"]], strict=True))
    ]
    mosaics = da.stack(layers)
    first = stack.isel(time=starts)
    scene = xr.DataArray(
        mosaics,
        dims=("time", "band", "y", "x"),
        coords=_grid_coords(stack) | {"time": first.time.values, "band": bands},
    )
    return scene.assign_coords(
        observations=(("time", "y", "x"), (mosaics != 0).all(axis=1).astype(np.uint16)),
        platform=("time", first.platform.values),
    ).rename("scene")


def passes(stack: xr.DataArray) -> npt.NDArray[np.int64]:
    """Number the passes: (time,) int; scenes that one platform took within half an hour share a number."""
    times, platforms = stack.time.values, stack.platform.values
    new = np.ones(len(times), dtype=bool)
    new[1:] = (np.diff(times) > _PASS) | (platforms[1:] != platforms[:-1])
    return np.cumsum(new) - 1


def pass_chunks(times: Sequence[np.datetime64], platforms: Sequence[str]) -> tuple[int, ...]:
    """Scenes in each pass, in order: chunks along time that hold one pass each."""
    empty = xr.DataArray(np.empty(len(times)), dims="time", coords={"time": list(times)})
    return tuple(np.bincount(passes(empty.assign_coords(platform=("time", list(platforms))))).tolist())


def _clear(stack: xr.DataArray, spec: CompositeSpec) -> da.Array:
    """(time, y, x) bool: SCL says clear, after dilating what it does not."""
    shape = (stack.sizes["time"], stack.sizes["y"], stack.sizes["x"])
    chunks = (stack.data.chunks[0], *stack.data.chunks[2:])
    if "scl" not in stack.band.values or not spec.mask:
        if spec.dilate:
            raise InputError("the mask cannot grow: the stack has no scl band, or no class is masked")
        return da.ones(shape, dtype=bool, chunks=chunks)
    codes = [SCL_CLASSES[name] for name in spec.mask]
    clear = ~da.isin(stack.isel(band=-1).data, codes)
    resolution = abs(stack.odc.geobox.resolution.x)
    radius = round(spec.dilate / resolution)
    if radius == 0:
        return clear
    # outside the grid is unknown, not cloudy: pad with clear
    return da.map_overlap(
        _erode, clear, depth={1: radius, 2: radius}, boundary={1: True, 2: True}, radius=radius, dtype=bool,
        meta=np.empty((0, 0, 0), bool),
    )  # fmt: skip


def _erode(clear: npt.NDArray[np.bool_], radius: int) -> npt.NDArray[np.bool_]:
    """Shrink clear areas by a disc of ``radius`` pixels, date by date."""
    out = np.empty_like(clear)
    for t, layer in enumerate(clear):
        # the distance to the nearest masked pixel; a field without one is far from any
        out[t] = ndimage.distance_transform_edt(layer) > radius if not layer.all() else True
    return out


Reducer = Callable[[npt.NDArray[np.uint16], npt.NDArray[np.bool_]], npt.NDArray[np.uint16]]


def _reducer(spec: CompositeSpec, bands: Sequence[str], stack: xr.DataArray) -> Reducer:
    """Choose the function that reduces one block, (time, band, y, x) and clear (time, y, x) -> (band, y, x)."""
    if spec.method == "max-ndvi":
        if not {"red", "nir"} <= set(bands):
            raise InputError("max-ndvi needs the bands red and nir in the stack")
        return partial(_max_ndvi, red=bands.index("red"), nir=bands.index("nir"))
    if spec.method == "least-cloudy":
        return partial(_first_clear, clouds=_pass_clouds(stack))
    if spec.method == "medoid":
        return _medoid
    if spec.method == "mean":
        return _mean
    return partial(_quantile, q=spec.percentile / 100 if spec.method == "percentile" else 0.5)


def _pass_clouds(stack: xr.DataArray) -> tuple[float, ...]:
    """Mean cloud cover of each pass; unknown counts as fully cloudy."""
    clouds = np.nan_to_num(stack.cloud_cover.values, nan=100.0)
    groups = passes(stack)
    return tuple((np.bincount(groups, weights=clouds) / np.bincount(groups)).tolist())


def _composite_block(
    data: npt.NDArray[np.uint16], clear: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64], reduce: Reducer
) -> npt.NDArray[np.uint16]:
    """One block, (time, band, y, x) and (time, 1, y, x) -> (band + 1, y, x): the composite, then the clear looks."""
    usable = clear[:, 0] & (data != 0).all(axis=1)
    data, usable = _mosaic_passes(data, usable, groups)
    out = np.zeros((data.shape[1] + 1, *data.shape[2:]), dtype=np.uint16)
    if len(data) == 1:
        np.copyto(out[:-1], data[0], where=usable[0])  # one date is its own median, and its own best
        out[-1] = usable[0]
    elif usable.any():
        rows = max(1, _SLAB_PIXELS // data.shape[-1])
        for top in range(0, data.shape[-2], rows):
            slab = slice(top, top + rows)
            out[:-1, slab] = reduce(data[:, :, slab], usable[:, slab])
        out[-1] = usable.sum(axis=0)
    return out


def _mosaic_passes(
    data: npt.NDArray[np.uint16], usable: npt.NDArray[np.bool_], groups: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint16], npt.NDArray[np.bool_]]:
    """Merge scenes of one pass: each pixel from the first scene that is usable there."""
    first = np.unique(groups, return_index=True)[1]
    if len(first) == len(groups):
        return data, usable
    merged, seen = data[first].copy(), usable[first].copy()
    for t, g in enumerate(groups):
        fill = usable[t] & ~seen[g]
        if t != first[g] and fill.any():
            np.copyto(merged[g], data[t], where=fill)
            seen[g] |= fill
    return merged, seen


def _first_valid(data: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Mosaic one pass: (scene, band, y, x) -> (band, y, x), each pixel from the first scene that has it."""
    merged, _ = _mosaic_passes(data, (data != 0).all(axis=1), np.zeros(len(data), dtype=np.int64))
    return merged[0]


def _mean(data: npt.NDArray[np.uint16], usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint16]:
    looks = np.maximum(usable.sum(axis=0, dtype=np.uint32), 1)
    total = np.where(usable[:, None], data, np.uint16(0)).sum(axis=0, dtype=np.uint32)
    return np.rint(total / looks).astype(np.uint16)


def _quantile(data: npt.NDArray[np.uint16], usable: npt.NDArray[np.bool_], q: float) -> npt.NDArray[np.uint16]:
    """Quantile of the usable dates with linear interpolation, as NumPy's; band by band, without a copy as float."""
    looks = usable.sum(axis=0)
    rank = q * np.maximum(looks - 1, 0)
    low = rank.astype(np.intp)
    high = np.minimum(low + 1, np.maximum(looks - 1, 0))
    share = (rank - low).astype(np.float32)
    out = np.empty(data.shape[1:], dtype=np.uint16)
    for b in range(data.shape[1]):
        # what is not usable sorts behind everything that is
        ordered = _sort(np.where(usable, data[:, b], np.uint16(65535)))
        below, above = (np.take_along_axis(ordered, i[None], axis=0)[0].astype(np.float32) for i in (low, high))
        out[b] = np.where(looks > 0, np.rint(below + (above - below) * share), 0)
    return out


def _sort(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Sort along the first axis, in place; a few dates are fastest by exchanging whole images (odd-even sort)."""
    n = len(values)
    if n > _NETWORK_LIMIT:
        values.sort(axis=0)
        return values
    smaller = np.empty_like(values[0])
    for turn in range(n):
        for i in range(turn % 2, n - 1, 2):
            np.minimum(values[i], values[i + 1], out=smaller)
            np.maximum(values[i], values[i + 1], out=values[i + 1])
            values[i] = smaller
    return values


def _pick(
    data: npt.NDArray[np.uint16], chosen: npt.NDArray[np.intp], seen: npt.NDArray[np.bool_]
) -> npt.NDArray[np.uint16]:
    """Take all bands of a pixel from its chosen date."""
    picked = np.take_along_axis(data, chosen[None, None], axis=0)[0]
    return np.where(seen, picked, np.uint16(0))


def _first_clear(
    data: npt.NDArray[np.uint16], usable: npt.NDArray[np.bool_], clouds: Sequence[float]
) -> npt.NDArray[np.uint16]:
    order = np.argsort(clouds, kind="stable")
    chosen = order[np.argmax(usable[order], axis=0)]
    return _pick(data, chosen, np.any(usable, axis=0))


def _max_ndvi(
    data: npt.NDArray[np.uint16], usable: npt.NDArray[np.bool_], red: int, nir: int
) -> npt.NDArray[np.uint16]:
    r, n = data[:, red].astype(np.float32), data[:, nir].astype(np.float32)
    ndvi = np.where(usable, (n - r) / np.maximum(n + r, 1), -np.inf)
    return _pick(data, ndvi.argmax(axis=0), np.any(usable, axis=0))


def _medoid(data: npt.NDArray[np.uint16], usable: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint16]:
    """The date nearest to the band-wise median (Flood 2013, doi:10.3390/rs5126481, with the median as the centre)."""
    distance = np.zeros(usable.shape, dtype=np.float32)
    centre = _quantile(data, usable, q=0.5)
    for b in range(data.shape[1]):
        distance += (data[:, b].astype(np.float32) - centre[b]) ** 2
    distance[~usable] = np.inf
    return _pick(data, distance.argmin(axis=0), np.any(usable, axis=0))


def _grid_coords(stack: xr.DataArray) -> dict[str, xr.DataArray]:
    return {name: stack.coords[name] for name in ("y", "x", "spatial_ref")}


def _scene(both: da.Array, stack: xr.DataArray, bands: Sequence[str]) -> xr.DataArray:
    scene = xr.DataArray(both[:-1], dims=("band", "y", "x"), coords=_grid_coords(stack) | {"band": list(bands)})
    return scene.assign_coords(observations=(("y", "x"), both[-1])).rename("scene")
