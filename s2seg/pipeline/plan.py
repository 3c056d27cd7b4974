"""What a run will do, before it does it: options, items, grid, blocks, memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import dask
import pystac
from affine import Affine
from dask.system import CPU_COUNT
from odc.geo.geobox import GeoBox
from shapely.geometry.base import BaseGeometry

from s2seg.errors import InputError
from s2seg.inference import LAYERS, Layer, chunks_for, core_for, network_bytes
from s2seg.models.bundle import ModelBundle, load_model
from s2seg.models.runtimes import expected_session
from s2seg.sources.ahead import AHEAD
from s2seg.sources.aoi import parse_aoi
from s2seg.sources.catalogs import Catalog
from s2seg.sources.composite import CompositeSpec
from s2seg.sources.reader import GDAL_ENV, REMOTE
from s2seg.sources.scene import SceneSpec, bands_to_read, passes_of
from s2seg.sources.search import coverage, search
from s2seg.sources.stack import geobox_for
from s2seg.windows import ChunkSpec, Margin, Shape

_CHUNK_BYTES = 384 * 2**20
"""What one thread reads at once may take, with all its dates and bands."""

_READ_SIDE = 1024
"""Pixels on a side of what is read at once, at most: a block of the files at 10 m."""

_REMOTE_THREADS = 4
"""Threads that read from afar: they wait more than they work, though each has several files read ahead of it."""

_MOST_PIXELS = 2**37
"""Of one map: at 10 m, 14 million square kilometres. Its graph alone would take gigabytes."""

_ROWS_WAITING = 3

_LIBRARIES_BYTES = {"torch": 1250 * 2**20, "torch-compiled": 1250 * 2**20}
_OTHER_LIBRARIES_BYTES = 650 * 2**20
_WAITING_BYTES = 250 * 2**20
_TILE = (16384, 16384)
"""Pixels (down, across) of what is computed as one graph, at most. Its blocks wait for their neighbours row by row, so
what they take together depends on the width alone: as many go side by side as ``_WAITING_BYTES`` hold."""


@dataclass(frozen=True)
class MapOptions:
    """How an area is mapped.

    Parameters
    ----------
    resolution
        Metres per pixel.
    crs
        Projected CRS of the map; by default the UTM zone that holds most of the area.
    collection
        STAC collection; by default the catalog's own choice.
    max_cloud_cover
        Leave out scenes cloudier than this, in percent.
    composite
        How dates become one scene, or ``per-date`` to map each pass by itself.
    layers
        What to write: ``class`` always, ``confidence``, ``probability``.
    resampling
        How 20 and 60 m bands reach a finer grid.
    check_offsets
        Compare the catalog's word on the radiometric offset with the pixels where it is known to err.
    runtime, device, precision
        Where and how the network runs; see :func:`s2seg.models.open_session`.
    core
        Output pixels on a side of a block, at most; by default what the network takes 1 GiB for.
    overwrite
        Replace an earlier result.
    """

    resolution: float = 10.0
    crs: str | None = None
    collection: str | None = None
    max_cloud_cover: float | None = None
    composite: CompositeSpec | Literal["per-date"] = field(default_factory=CompositeSpec)
    layers: tuple[Layer, ...] = ("class",)
    resampling: Literal["nearest", "bilinear"] = "nearest"
    check_offsets: bool = True
    runtime: str = "auto"
    device: str = "auto"
    precision: str = "auto"
    core: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.layers) - set(LAYERS)
        if unknown or "class" not in self.layers:
            raise InputError(
                f"layers must be class, and may be {' and '.join(LAYERS[1:])}, not {', '.join(self.layers)}"
            )
        if self.resampling not in ("nearest", "bilinear"):
            raise InputError(f"resampling must be nearest or bilinear, not {self.resampling!r}")
        if self.core is not None and self.core < 1:
            raise InputError(f"core must be a positive number of pixels, not {self.core}")

    @property
    def dates_apart(self) -> bool:
        """Whether each pass gets a map of its own."""
        return self.composite == "per-date"


@dataclass(frozen=True)
class Plan:
    """What a run will do, before it does it.

    Parameters
    ----------
    items
        The scenes, normalised, by time.
    aoi
        The area in lon/lat.
    geobox
        The map's grid.
    bands
        What is read of each scene; ``scl`` last if it is used.
    chunks
        Geometry of blocks and windows.
    passes
        Scenes in each pass, in order of time.
    model, options
        As given.
    """

    items: tuple[pystac.Item, ...]
    aoi: BaseGeometry
    geobox: GeoBox
    bands: tuple[str, ...]
    chunks: ChunkSpec
    passes: tuple[int, ...]
    model: ModelBundle
    options: MapOptions

    @property
    def padded(self) -> GeoBox:
        """The grid with the context that the network needs around it."""
        (height, width), (above, below), (left, right) = self.geobox.shape, *self.margin
        return GeoBox(
            (height + above + below, width + left + right),
            self.geobox.affine @ Affine.translation(-left, -above),
            self.geobox.crs,
        )

    @property
    def margin(self) -> Margin:
        """Context pixels around the map: ((above, below), (left, right))."""
        return self.chunks.padding(self.geobox.shape.yx)

    @property
    def tile(self) -> tuple[int, int]:
        """Pixels (down, across) that are computed as one graph: whole blocks."""
        height, width = self.chunks.core
        side_by_side = min(_TILE[1] // width, _WAITING_BYTES // (_ROWS_WAITING * self._block_bytes) - 1)
        return max(1, _TILE[0] // height) * height, max(1, side_by_side) * width

    @property
    def read_side(self) -> int:
        """Pixels on a side of what one thread reads at once, of all dates."""
        side, deep = _READ_SIDE, self.dates_per_block * len(self.bands) * 2
        while side > 128 and side * side * deep > _CHUNK_BYTES:
            side //= 2
        return side

    @property
    def threads(self) -> int:
        """Threads of one process: as many as dask is told to take, else one a core, and more to read from afar."""
        if told := dask.config.get("num_workers", None):
            return int(told)
        return max(CPU_COUNT, _REMOTE_THREADS) if self._remote else CPU_COUNT

    @property
    def _remote(self) -> bool:
        return any(asset.href.startswith(REMOTE) for item in self.items for asset in item.assets.values())

    @property
    def _block_bytes(self) -> int:
        """A composited block, with its count of observations."""
        height, width = self.chunks.core
        return (len(self.model.spec.bands) + 1) * height * width * 2

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks down and across."""
        down, across = self.chunks.cores(self.geobox.shape.yx)
        return len(down), len(across)

    @property
    def overlap_cost(self) -> float:
        """Network pixels per pixel of the map."""
        return self.chunks.cost(self.geobox.shape.yx)

    @property
    def dates_per_block(self) -> int:
        """Scenes that one block holds in memory."""
        return max(self.passes) if self.options.dates_apart else len(self.items)

    @property
    def bytes_to_read(self) -> int:
        """Decoded bytes of all reads, at the assets' own resolution; what travels is compressed, often to half."""
        return sum(_bytes(item, band, self) for item in self.items for band in self.bands)

    @property
    def peak_memory(self) -> int:
        """Estimated bytes at the peak of one process; see :func:`_peak_memory`."""
        return _peak_memory(self)

    def describe(self) -> list[tuple[str, str]]:
        """Rows of (what, how much) for people."""
        height, width = self.geobox.shape
        scene = "each pass by itself" if self.options.composite == "per-date" else self.options.composite.method
        window = "blended" if self.chunks.blend else "trimmed"
        return [
            ("items", "\n".join(item.id for item in self.items)),
            ("passes", f"{len(self.passes)}, {scene}"),
            ("bands", ", ".join(self.bands)),
            ("grid", f"{width} x {height} pixels of {self.options.resolution:g} m, {self.geobox.crs}"),
            ("blocks", f"{self.blocks[1]} x {self.blocks[0]} of {_by(self.chunks.core)} pixels"),
            (
                "windows",
                f"{_by(self.chunks.window)} pixels, {window}; the network sees {self.overlap_cost:.2f} x the pixels",
            ),
            ("to read", f"{self.bytes_to_read / 1e6:,.0f} MB decoded, about half of it compressed"),
            ("peak memory", f"{self.peak_memory / 2**30:.1f} GiB (estimate for one process)"),
            ("model", f"{self.model.spec.name}, {self.model.sha256[:12]}"),
        ]


def plan_area(
    catalog: str | Path | Catalog,
    aoi: str | Path | Sequence[float] | BaseGeometry | Mapping[str, Any],
    datetime: str,
    model: str | Path | ModelBundle,
    options: MapOptions | None = None,
) -> Plan:
    """Search and decide, but read no pixels: what :func:`map_area` would do.

    Parameters
    ----------
    catalog, aoi, datetime
        See :func:`s2seg.search`.
    model
        A bundle, or its path or URL.
    options
        How to map.

    Raises
    ------
    S2SegError
        If the search finds nothing, the model is not usable, the items lack its bands, or the area is too large for
        one map.
    """
    options = options or MapOptions()
    bundle = model if isinstance(model, ModelBundle) else load_model(model)
    area = parse_aoi(aoi)
    items = search(catalog, area, datetime, max_cloud_cover=options.max_cloud_cover, collection=options.collection)
    geobox = geobox_for(area, options.resolution, items, options.crs)
    height, width = geobox.shape
    if height * width > _MOST_PIXELS:
        raise InputError(
            f"the area makes a map of {width:,} x {height:,} pixels of {options.resolution:g} m, too large for one: "
            "choose a smaller area, or a coarser resolution"
        )
    passes = passes_of(items)
    bands = bands_to_read(items, scene_spec(bundle, options))
    core = options.core or core_for(bundle, options.runtime, options.device, options.precision)
    return Plan(
        items=tuple(items),
        aoi=area,
        geobox=geobox,
        bands=bands,
        chunks=chunks_for(bundle, core, geobox.shape.yx),
        passes=passes,
        model=bundle,
        options=options,
    )


def scene_spec(model: ModelBundle, options: MapOptions) -> SceneSpec:
    """What the model's scene is made of."""
    seasons = model.spec.seasons
    bands = tuple(dict.fromkeys(band.partition("@")[0] for band in model.spec.bands)) if seasons else model.spec.bands
    return SceneSpec(bands, options.composite, options.resampling, seasons)


def _by(shape: Shape) -> str:
    height, width = shape
    return f"{width} x {height}"


def _bytes(item: pystac.Item, band: str, plan: Plan) -> int:
    """Decoded bytes of an asset within the area, at its own resolution, or the map's where overviews serve."""
    asset = item.assets.get(band)
    if asset is None:
        return 0
    resolution = plan.options.resolution
    native = asset.extra_fields.get("proj:transform", [resolution])[0]
    height, width = plan.geobox.shape
    pixels = coverage(item, plan.aoi) * height * width * (resolution / max(native, resolution)) ** 2
    return round(pixels) * (1 if band == "scl" else 2)


def _peak_memory(plan: Plan) -> int:
    """Estimate the peak of one process, in bytes.

    What counts: the libraries and GDAL's cache; the network's own buffers, which grow with the window; the dates of
    what is being read; and the composited blocks (with their count of observations) that wait for
    their neighbours.
    """
    layers = plan.dates_per_block * len(plan.bands) + (AHEAD if plan._remote else 0)
    reading = plan.threads * layers * plan.read_side**2 * 2
    down, across = plan.blocks
    side_by_side = min(across, plan.tile[1] // plan.chunks.core[1] + 1)
    waiting = min(down, _ROWS_WAITING) * side_by_side * plan._block_bytes
    choice = plan.options.runtime, plan.options.device, plan.options.precision
    network = network_bytes(plan.model, plan.chunks, *choice)
    libraries = _LIBRARIES_BYTES.get(expected_session(plan.model, *choice)[0], _OTHER_LIBRARIES_BYTES)
    return libraries + GDAL_ENV["GDAL_CACHEMAX"] + network + reading + waiting
