"""A scene as a model sees it: which bands, of which dates, made into one image how. Mapping and training share it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pystac
import xarray as xr
from odc.geo.geobox import GeoBox

from s2seg.errors import InputError, MissingBandError, NoItemsError, S2SegWarning
from s2seg.sources.composite import CompositeSpec, composite, pass_chunks, per_date
from s2seg.sources.items import sensing_time
from s2seg.sources.radiometry import Offset
from s2seg.sources.stack import stack

_DAYS = re.compile(r"(\d\d)-(\d\d)/(\d\d)-(\d\d)")


@dataclass(frozen=True)
class SceneSpec:
    """What a scene holds and how dates become one image.

    Parameters
    ----------
    bands
        STAC common names, in order.
    composite
        How dates become one scene, or ``per-date`` to keep each pass by itself.
    resampling
        How 20 and 60 m bands reach a finer grid.
    seasons
        Name -> ``MM-DD/MM-DD``, first and last day, of whatever years the items have (it may span New Year). Each
        season becomes a composite of its own, and the scene holds the bands of one season after the other, named
        ``red@spring``.

    Raises
    ------
    InputError
        For a season that is not of that form, or seasons of dates that are kept apart.
    """

    bands: tuple[str, ...]
    composite: CompositeSpec | Literal["per-date"] = field(default_factory=CompositeSpec)
    resampling: Literal["nearest", "bilinear"] = "nearest"
    seasons: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, days in self.seasons.items():
            _parse_days(name, days)
        if self.seasons and self.composite == "per-date":
            raise InputError(f"the seasons {', '.join(self.seasons)} are composites: per-date would keep dates apart")

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the scene's bands."""
        if not self.seasons:
            return self.bands
        return tuple(f"{band}@{season}" for season in self.seasons for band in self.bands)


def bands_to_read(items: Sequence[pystac.Item], spec: SceneSpec) -> tuple[str, ...]:
    """Return what must be read of the items: the bands, what the composite looks at, and last ``scl`` if it masks.

    Raises
    ------
    MissingBandError
        If no item has one of the bands.
    """
    present = {band for item in items for band in item.assets}
    bands = list(spec.bands)
    if isinstance(spec.composite, CompositeSpec) and spec.composite.method == "max-ndvi":
        bands += [b for b in ("red", "nir") if b not in bands]
    for band in bands:
        if band not in present:
            raise MissingBandError(band, items[0].id, sorted(present))
    if isinstance(spec.composite, CompositeSpec) and spec.composite.mask:
        if "scl" in present:
            bands.append("scl")
        else:
            warnings.warn("the items have no scl band: clouds are not masked", S2SegWarning, stacklevel=3)
    return tuple(bands)


def passes_of(items: Sequence[pystac.Item]) -> tuple[int, ...]:
    """Scenes in each pass of a satellite, in order of time."""
    times = [np.datetime64(sensing_time(item).replace(tzinfo=None)) for item in items]
    return pass_chunks(times, [str(item.properties.get("platform", "")) for item in items])


def compose(
    items: Sequence[pystac.Item],
    geobox: GeoBox,
    spec: SceneSpec,
    chunks: tuple[tuple[int, ...], tuple[int, ...]],
    offsets: Mapping[str, Offset],
) -> xr.DataArray:
    """Stack items and make one scene of them, lazily.

    Parameters
    ----------
    items
        Normalised, by time.
    geobox
        The grid.
    spec
        Bands, composite, seasons.
    chunks
        Along y and x.
    offsets
        Radiometric offsets by item id; see :func:`s2seg.sources.radiometry.decide_offsets`.

    Returns
    -------
    DataArray
        (band, y, x) uint16 with ``spec.channels``, or (time, band, y, x) for ``per-date``. ``observations`` counts the
        clear looks, of all seasons together.

    Raises
    ------
    NoItemsError
        If a season has no items.
    MissingBandError
        If no item has one of the bands.
    """
    if spec.seasons:
        return _compose_seasons(items, geobox, spec, chunks, offsets)
    pixels = stack(
        items,
        geobox,
        bands_to_read(items, spec),
        chunksize=chunks,
        time_chunks=passes_of(items) if spec.composite == "per-date" else -1,
        resampling=spec.resampling,
        offsets=offsets,
    )
    return per_date(pixels) if spec.composite == "per-date" else composite(pixels, spec.composite)


def _compose_seasons(items: Sequence[pystac.Item], geobox: GeoBox, spec: SceneSpec, *rest: Any) -> xr.DataArray:
    scenes = []
    for name, days in spec.seasons.items():
        own = [item for item in items if _within(item, days)]
        if not own:
            raise NoItemsError(f"no scene in season {name} ({days}): widen the dates, or the season")
        scene = compose(own, geobox, replace(spec, seasons={}), *rest).sel(band=list(spec.bands))
        scenes.append(scene.assign_coords(band=[f"{band}@{name}" for band in spec.bands]))
    looks = sum(scene.observations for scene in scenes[1:]) + scenes[0].observations
    joined = xr.concat([s.drop_vars("observations") for s in scenes], "band", coords="minimal", compat="override")
    return joined.chunk(band=-1).assign_coords(observations=looks)


def _within(item: pystac.Item, days: str) -> bool:
    first, _, last = days.partition("/")
    day = f"{sensing_time(item):%m-%d}"
    return first <= day <= last if first <= last else day >= first or day <= last


def _parse_days(name: str, days: str) -> None:
    found = _DAYS.fullmatch(days)
    if not found or not all(1 <= int(m) <= 12 for m in found.groups()[::2]):
        raise InputError(f"season {name}: {days!r} is not of the form MM-DD/MM-DD, such as 03-01/05-31")
