"""Many dates -> one clear scene: mask clouds by SCL, mosaic each pass, reduce over time."""

from __future__ import annotations

from collections.abc import Sequence
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
from s2seg.sources.reducers import Flags, Pixels, Reducer, Slab, bits, first_clear, max_ndvi, mean, medoid, quantile

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

_FARTHEST = 10_000  # metres that a mask can grow by
_OUTSIDE = len(SCL_CLASSES)
"""No class: what lies outside the grid is unknown, and masks nothing within."""

_SLAB_PIXELS = 2**18
"""Pixels of all dates reduced at once: they stay in the cache, and threads seldom wait for the interpreter."""

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
        if not 0 <= self.dilate <= _FARTHEST:
            raise InputError(f"the mask can grow by 0 to {_FARTHEST:,} metres, not {self.dilate:g}")
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
        If the stack has no band but ``scl``, a mask is asked for with ``dilate`` but the stack has no ``scl``, or
        ``max-ndvi`` lacks red or nir.
    """
    spec = spec or CompositeSpec()
    bands = [str(b) for b in stack.band.values if b != "scl"]
    if not bands:
        raise InputError("there is nothing to composite: the stack has no reflectance band beside scl")
    reduce = _reducer(spec, bands, stack)
    data = stack.isel(band=slice(0, len(bands))).data.rechunk({0: -1, 1: -1})
    scl = _scl(stack, spec)
    both = da.map_blocks(
        _composite_block,
        data,
        *([] if scl is None else [scl.rechunk({0: -1})]),
        mask=spec.mask,
        groups=passes(stack),
        reduce=reduce,
        dtype=np.uint16,
        chunks=((1,), (len(bands) + 1,), *data.chunks[2:]),
        meta=np.empty((0, 0, 0, 0), np.uint16),
    )
    return _scene(both[0], stack, bands)


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
            chunks=((1,), (len(bands),), *data.chunks[2:]),
            meta=np.empty((0, 0, 0, 0), np.uint16),
        )
        for part in (data[a:b] for a, b in zip(starts, [*starts[1:], stack.sizes["time"]], strict=True))
    ]
    mosaics = da.concatenate(layers)
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


def _scl(stack: xr.DataArray, spec: CompositeSpec) -> da.Array | None:
    """(time, 1, y, x) SCL in which the mask has grown; None where nothing but nodata is masked."""
    if "scl" not in stack.band.values or not spec.mask:
        if spec.dilate:
            raise InputError("the mask cannot grow: the stack has no scl band, or no class is masked")
        return None
    scl = stack.isel(band=slice(-1, None)).data
    radius = round(spec.dilate / abs(stack.odc.geobox.resolution.x))
    if radius == 0:
        return scl
    height, width = (min(radius, size) for size in scl.shape[-2:])
    grown: da.Array = da.map_overlap(
        _grow, scl, depth={2: height, 3: width}, boundary={2: _OUTSIDE, 3: _OUTSIDE}, mask=spec.mask, radius=radius,
        dtype=np.uint16, meta=np.empty((0, 0, 0, 0), np.uint16),
    )  # fmt: skip
    return grown.rechunk(scl.chunks)  # dask joins blocks that are smaller than what they need of their neighbours


def _grow(scl: Pixels, mask: tuple[str, ...], radius: int) -> Pixels:
    """Let masked classes spread by a disc of ``radius`` pixels, date by date: (time, 1, y, x) SCL in and out."""
    grown = scl.copy()
    for layer in grown[:, 0]:
        clear = _is_clear(layer, mask)
        if not clear.all():  # there is a nearest masked pixel
            layer[ndimage.distance_transform_edt(clear) <= radius] = SCL_CLASSES[mask[0]]
    return grown


def _is_clear(scl: Pixels, mask: tuple[str, ...]) -> Flags:
    """Whether SCL is none of the masked classes; what is no class is clear."""
    masked = sum(1 << SCL_CLASSES[name] for name in set(mask))
    clear: Flags = np.right_shift(np.uint16(masked), scl) & 1 == 0
    return clear


def _reducer(spec: CompositeSpec, bands: Sequence[str], stack: xr.DataArray) -> Reducer:
    """Choose the function that reduces the dates of a slab."""
    if spec.method == "max-ndvi":
        if not {"red", "nir"} <= set(bands):
            raise InputError("max-ndvi needs the bands red and nir in the stack")
        return partial(max_ndvi, red=bands.index("red"), nir=bands.index("nir"))
    if spec.method == "least-cloudy":
        return partial(first_clear, clouds=_pass_clouds(stack))
    if spec.method == "medoid":
        return medoid
    if spec.method == "mean":
        return mean
    return partial(quantile, q=spec.percentile / 100 if spec.method == "percentile" else 0.5)


def _pass_clouds(stack: xr.DataArray) -> tuple[float, ...]:
    """Mean cloud cover of each pass; unknown counts as fully cloudy."""
    clouds = np.nan_to_num(stack.cloud_cover.values, nan=100.0)
    groups = passes(stack)
    return tuple((np.bincount(groups, weights=clouds) / np.bincount(groups)).tolist())


def _composite_block(
    data: Pixels, *scl: Pixels, mask: tuple[str, ...], groups: npt.NDArray[np.int64], reduce: Reducer
) -> Pixels:
    """One block, (time, band, y, x) and (time, 1, y, x) -> (1, band + 1, y, x): the composite, then the clear looks.

    Time stays, as one date: dask would copy a block to drop a dimension along with it.
    """
    dates, bands, height, width = data.shape
    out = np.empty((bands + 1, height, width), dtype=np.uint16)
    rows = min(height, max(1, _SLAB_PIXELS // (dates * width)))
    scratch = np.empty((groups[-1] + 3, bands, rows, width), dtype=np.uint16)
    for top in range(0, height, rows):
        at = slice(top, top + rows)
        usable = _is_whole(data[:, :, at])
        for codes in scl:
            usable &= _is_clear(codes[:, 0, at], mask)
        pixels, usable = _mosaic_passes(data[:, :, at], usable, groups)
        looks = usable.sum(axis=0, dtype=np.uint16)
        out[-1, at] = looks
        if len(pixels) == 1:  # one date is its own median, and its own best
            np.bitwise_and(pixels[0], bits(usable[0]), out=out[:-1, at])
        else:
            out[:-1, at] = reduce(Slab(pixels, usable, looks, scratch[:, :, : len(looks)]))
    return out[None]


def _is_whole(data: Pixels) -> Flags:
    """Whether all bands of a pixel have data: (time, band, y, x) -> (time, y, x)."""
    whole: Flags = np.minimum.reduce(data, axis=1) != 0
    return whole


def _mosaic_passes(data: Pixels, usable: Flags, groups: npt.NDArray[np.int64]) -> tuple[Pixels, Flags]:
    """Merge scenes of one pass: each pixel from the first scene that is usable there, else from the first scene."""
    if groups[-1] == len(groups) - 1:
        return data, usable
    first = np.unique(groups, return_index=True)[1]
    merged, seen = data[first], usable[first]
    for t, g in enumerate(groups):
        fill = usable[t] & ~seen[g]
        if fill.any():
            merged[g] ^= (merged[g] ^ data[t]) & bits(fill)
            seen[g] |= fill
    return merged, seen


def _first_valid(data: Pixels) -> Pixels:
    """Mosaic one pass: (scene, band, y, x) -> (1, band, y, x), each pixel from the first scene that has it."""
    merged, _ = _mosaic_passes(data, _is_whole(data), np.zeros(len(data), dtype=np.int64))
    return merged


def _grid_coords(stack: xr.DataArray) -> dict[str, xr.DataArray]:
    return {name: stack.coords[name] for name in ("y", "x", "spatial_ref")}


def _scene(both: da.Array, stack: xr.DataArray, bands: Sequence[str]) -> xr.DataArray:
    scene = xr.DataArray(both[:-1], dims=("band", "y", "x"), coords=_grid_coords(stack) | {"band": list(bands)})
    return scene.assign_coords(observations=(("y", "x"), both[-1])).rename("scene")
