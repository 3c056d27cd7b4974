"""The places of a configuration as lazy arrays: the scenes that mapping would make, their labels and their split."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pystac
import xarray as xr
from odc.geo.geobox import GeoBox

from s2seg.errors import S2SegWarning
from s2seg.progress import Steps
from s2seg.sources.aoi import parse_aoi
from s2seg.sources.labels import LabelSource, RasterLabels, VectorLabels, footprint, read_labels
from s2seg.sources.radiometry import decide_offsets
from s2seg.sources.scene import SceneSpec, compose
from s2seg.sources.search import search
from s2seg.sources.stack import aligned_chunks, geobox_for
from s2seg.training.chips import ChipSpec
from s2seg.training.config import AreaConfig, TrainConfig
from s2seg.training.cutting import Place
from s2seg.training.splits import Counts, SplitSpec, split_by_area, split_by_blocks, split_by_geometries
from s2seg.training.tiles import TileSpec, read_tiles

_CHUNK = 1024
_CHUNK_BYTES = 384 * 2**20
"""What the dates and bands of one chunk may take, decoded: as when mapping."""


@dataclass(frozen=True)
class Region:
    """One place at one time: pixels, labels and split on one grid, all lazy and cut alike.

    Parameters
    ----------
    name
        The area's.
    date
        The query that the scene was composed from.
    scene
        (band, y, x) uint16 DN, reflectance = DN / 10000, nodata 0.
    labels
        (y, x) uint8 legend codes.
    split
        (y, x) uint8: 0 for no part, else the index in :data:`~s2seg.training.splits.PARTS` plus 1.
    items
        Ids of the source items.
    counted
        Labels of each part, where the split was drawn by counting them; see :class:`~s2seg.training.splits.Counted`.
    """

    name: str
    date: str
    scene: xr.DataArray
    labels: xr.DataArray
    split: xr.DataArray
    items: tuple[str, ...]
    counted: Counts | None = None


def scene_spec(config: TrainConfig) -> SceneSpec:
    """What the scenes are made of."""
    return SceneSpec(config.bands, config.composite, config.resampling, config.seasons)


def chip_spec(config: TrainConfig) -> ChipSpec:
    """How scenes are cut into chips."""
    chips = config.chips
    return ChipSpec(
        chips.size, chips.stride, chips.sizes, chips.min_labelled, chips.max_nodata, drop_only=config.drop_codes
    )


def split_spec(config: TrainConfig) -> SplitSpec:
    """How places are divided."""
    split = config.split
    geometries = {str(part): path for part, path in (split.geometries or {}).items()}
    return SplitSpec(split.by, split.block, split.fractions, split.buffer, split.seed, geometries)


def open_places(config: TrainConfig, on_progress: Steps | None = None) -> Sequence[Place]:
    """Open what a configuration is trained on: its tiles, or the regions of its areas.

    Parameters
    ----------
    config
        What and where.
    on_progress
        Called with (done, total) areas.

    Raises
    ------
    S2SegError
        As :func:`open_regions`, or :func:`~s2seg.training.tiles.read_tiles`.
    """
    if config.tiles is None:
        return open_regions(config, on_progress)
    tiles, split = config.tiles, config.split
    spec = TileSpec(Path(tiles.images), Path(tiles.labels), colors=tiles.colors, remap=tiles.remap)
    return read_tiles(spec, config.legend, config.bands, fractions=split.fractions, seed=split.seed)


def open_regions(config: TrainConfig, on_progress: Steps | None = None) -> list[Region]:
    """Search, stack and label every area at every one of its dates; reads only what the checks need.

    Parameters
    ----------
    config
        With areas; one of ready-cut tiles has no regions.
    on_progress
        Called with (done, total) areas.

    Raises
    ------
    S2SegError
        If a search finds nothing, bands or labels are missing, or labels and scenes do not overlap.
    """
    regions: list[Region] = []
    for done, area in enumerate(config.areas):
        if on_progress is not None:
            on_progress(done, len(config.areas))
        regions += _open_area(area, config)
    if on_progress is not None:
        on_progress(len(config.areas), len(config.areas))
    return regions


def _open_area(area: AreaConfig, config: TrainConfig) -> list[Region]:
    source = _label_source(area)
    aoi = parse_aoi(area.aoi) if area.aoi is not None else footprint(source)
    found = [
        search(area.catalog, aoi, date, max_cloud_cover=area.max_cloud_cover, collection=area.collection)
        for date in area.datetime
    ]
    items = [item for of_date in found for item in of_date]
    geobox = geobox_for(aoi, config.resolution, items, config.crs)
    # the scenes of one date are at hand together, and then, composed, all dates
    dates = max(len(found), *(len(of_date) for of_date in found))
    chunks = aligned_chunks(items, geobox, _side(dates, len(config.bands) + 1))
    labels = read_labels(source, geobox, config.legend, chunks=chunks, remap=area.labels.remap)
    split, counted = _split(area, labels, config)
    return [
        Region(
            name=area.name,
            date=date,
            scene=_scene(of_date, geobox, chunks, config),
            labels=labels,
            split=split,
            items=tuple(item.id for item in of_date),
            counted=counted,
        )
        for date, of_date in zip(area.datetime, found, strict=True)
    ]


def _label_source(area: AreaConfig) -> LabelSource:
    values = area.labels.model_dump(exclude={"remap"})
    if "raster" in values:
        return RasterLabels(values.pop("raster"), **values)
    return VectorLabels(values.pop("vector"), **values)


def _scene(
    items: Sequence[pystac.Item],
    geobox: GeoBox,
    chunks: tuple[tuple[int, ...], tuple[int, ...]],
    config: TrainConfig,
) -> xr.DataArray:
    scene = compose(items, geobox, scene_spec(config), chunks, decide_offsets(items))
    channels = list(config.channels)
    # a list takes a copy of every block, even of all its bands
    return scene if scene.band.values.tolist() == channels else scene.sel(band=channels)


def _split(area: AreaConfig, labels: xr.DataArray, config: TrainConfig) -> tuple[xr.DataArray, Counts | None]:
    """The split, and what its parts have of each class if that is known by then."""
    spec = split_spec(config)
    if spec.by == "area":
        return split_by_area(labels, str(area.split)), None
    if spec.by == "geometries":
        return split_by_geometries(labels, spec), None
    return split_by_blocks(labels, spec, config.legend.codes)


def _side(dates: int, bands: int) -> int:
    """Pixels on a side of a chunk."""
    side = _CHUNK
    while side > 128 and side * side * dates * bands * 2 > _CHUNK_BYTES:
        side //= 2
    return side


def warn_of_empty_classes(counts: dict[str, dict[int, int]], config: TrainConfig) -> None:
    """Warn of classes of the legend that no label has: the network cannot learn them."""
    absent = [c.name for c in config.legend if not any(part[c.code] for part in counts.values())]
    if absent:
        warnings.warn(
            f"no label is of class {', '.join(absent)}: the network will not know them", S2SegWarning, stacklevel=2
        )
