"""One area from catalog to map: the stage calls, in order. What the CLI and the jobs call."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import dask.array as da
import numpy as np
import numpy.typing as npt
import pystac
import xarray as xr
from affine import Affine
from dask.base import compute
from dask.delayed import delayed
from odc.geo.geobox import GeoBox
from shapely.geometry import mapping
from shapely.geometry.base import BaseGeometry

from s2seg.errors import InputError, MissingBandError, OutputError, S2SegError, S2SegWarning
from s2seg.inference import LAYERS, Layer, Margin, chunks_for, predict
from s2seg.legend import Legend
from s2seg.models.bundle import ModelBundle, load_model
from s2seg.models.runtimes import open_session
from s2seg.outputs._files import check_writable, remove, writing
from s2seg.outputs.cog import write_cog
from s2seg.outputs.quicklook import thumbnail, write_quicklook, write_quicklook_series
from s2seg.outputs.stac import write_item
from s2seg.outputs.zarr import read_land_cover, write_zarr
from s2seg.sources.aoi import parse_aoi
from s2seg.sources.catalogs import Catalog, resolve_catalog
from s2seg.sources.clip import inside, needs_clip
from s2seg.sources.composite import CompositeSpec, composite, pass_chunks, per_date
from s2seg.sources.radiometry import Offset, decide_offsets
from s2seg.sources.reader import GDAL_ENV
from s2seg.sources.search import coverage, search
from s2seg.sources.stack import geobox_for, stack
from s2seg.windows import ChunkSpec

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done, and the total."""

_CHUNK_BYTES = 384 * 2**20
"""What the dates and bands of one block may take, decoded."""

_THREADS = 2
_LIBRARIES_BYTES = (500 + GDAL_ENV["GDAL_CACHEMAX"]) * 2**20
_NETWORK_BYTES_PER_PIXEL = 800  # of a window, measured for a U-Net with mobilenet_v2 in float32

_PICTURE_PIXELS = 1000
"""The quicklook's maps have at most this many pixels on a side."""

_OUTPUTS = (
    "run.json",
    "land_cover.zarr",
    "land_cover*.tif",
    "land_cover*.tif.aux.xml",
    "land_cover*.qml",
    "item*.json",
    "quicklook.png",
)
"""What a run writes; a date stands where the star is in ``per-date`` mode."""

_VERSIONS = ("s2seg", "dask", "numpy", "odc-geo", "pystac-client", "rasterio", "stackstac", "xarray", "zarr")

_TILE = 8192
"""Pixels on a side of what is computed as one graph."""


class NothingMappedError(S2SegError):
    """Every pixel came out as nodata."""


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
        Output pixels on a side of a block; smaller ones are chosen if many dates would not fit in memory.
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
    core: int = 1024
    overwrite: bool = False

    def __post_init__(self) -> None:
        unknown = set(self.layers) - set(LAYERS)
        if unknown or "class" not in self.layers:
            raise InputError(
                f"layers must be class, and may be {' and '.join(LAYERS[1:])}, not {', '.join(self.layers)}"
            )
        if self.resampling not in ("nearest", "bilinear"):
            raise InputError(f"resampling must be nearest or bilinear, not {self.resampling!r}")
        if self.core < 1:
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
        height, width = self.geobox.shape
        return self.chunks.padding(height), self.chunks.padding(width)

    @property
    def blocks(self) -> tuple[int, int]:
        """Blocks down and across."""
        height, width = self.geobox.shape
        return len(self.chunks.cores(height)), len(self.chunks.cores(width))

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
            ("blocks", f"{self.blocks[1]} x {self.blocks[0]} of {self.chunks.core} pixels"),
            (
                "windows",
                f"{self.chunks.window} pixels, {window}; the network sees {self.chunks.overlap_cost:.2f} x the pixels",
            ),
            ("to read", f"{self.bytes_to_read / 1e6:,.0f} MB decoded, about half of it compressed"),
            ("peak memory", f"{self.peak_memory / 2**30:.1f} GiB (estimate for one process)"),
            ("model", f"{self.model.spec.name}, {self.model.sha256[:12]}"),
        ]


@dataclass(frozen=True)
class MapResult:
    """Where a run's outputs are.

    Parameters
    ----------
    zarr, land_cover, items, quicklook, run
        Paths; one COG and one STAC item per date in ``per-date`` mode, else one of each.
    record
        What ``run.json`` holds.
    """

    zarr: Path
    land_cover: tuple[Path, ...]
    items: tuple[Path, ...]
    quicklook: Path
    run: Path
    record: Mapping[str, Any]


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
        If the search finds nothing, the model is not usable, or the items lack its bands.
    """
    options = options or MapOptions()
    bundle = model if isinstance(model, ModelBundle) else load_model(model)
    area = parse_aoi(aoi)
    items = search(catalog, area, datetime, max_cloud_cover=options.max_cloud_cover, collection=options.collection)
    geobox = geobox_for(area, options.resolution, items, options.crs)
    passes = pass_chunks(
        [np.datetime64(item.datetime.astimezone(UTC).replace(tzinfo=None)) for item in items if item.datetime],
        [str(item.properties.get("platform", "")) for item in items],
    )
    bands = _bands(items, bundle, options)
    dates = max(passes) if options.dates_apart else len(items)
    return Plan(
        items=tuple(items),
        aoi=area,
        geobox=geobox,
        bands=bands,
        chunks=chunks_for(bundle, _core_that_fits(options.core, dates, len(bands), bundle.spec.stride)),
        passes=passes,
        model=bundle,
        options=options,
    )


def map_area(
    catalog: str | Path | Catalog,
    aoi: str | Path | Sequence[float] | BaseGeometry | Mapping[str, Any],
    datetime: str,
    model: str | Path | ModelBundle,
    output: str | Path,
    options: MapOptions | None = None,
    on_progress: Progress | None = None,
) -> MapResult:
    """Map the land cover of an area and write everything about it.

    Writes ``land_cover.zarr``, ``land_cover.tif`` (a COG), ``item.json`` (STAC), ``quicklook.png`` and ``run.json``; in
    ``per-date`` mode the Zarr has a time axis, and there is one COG and one item per date. Nothing appears under these
    names before all of it is complete.

    Parameters
    ----------
    catalog, aoi, datetime
        Where, what and when; see :func:`s2seg.search`.
    model
        A bundle, or its path or URL.
    output
        Folder to write to; it is made if it does not exist.
    options
        How to map.
    on_progress
        Called with (stage, done, total).

    Raises
    ------
    S2SegError
        A subclass that names what is wrong with the input, the data or the output folder.
    """
    options = options or MapOptions()
    folder = Path(output)
    report = on_progress or _silent
    _refuse_existing(folder, options)
    clock = _Clock()
    with _noted_warnings() as notes:
        with clock("search"):
            report("search", 0, 1)
            plan = plan_area(catalog, aoi, datetime, model, options)
            report("search", 1, 1)
        with clock("prepare"):
            session = open_session(plan.model, options.runtime, options.device, options.precision).name
            offsets = decide_offsets(plan.items, check=options.check_offsets)
        scene = build_scene(plan, offsets)
        prediction = build_prediction(plan, scene)
        with _staging(folder) as staged:
            with clock("map"):
                zarr = write_zarr(
                    prediction, staged / "land_cover.zarr", tile=_TILE,
                    on_progress=lambda done, total: report("map", done, total),
                )  # fmt: skip
            stored = read_land_cover(zarr)
            counts = _count(stored.land_cover, plan.model.spec.legend)
            with clock("outputs"):
                products = _write_products(plan, stored, staged, offsets, lambda d, n: report("outputs", d, n))
            record = _record(
                plan, str(resolve_catalog(catalog).url), datetime, offsets, products, counts, session, notes, clock
            )
            with writing(folder):
                (staged / "run.json").write_text(json.dumps(record, indent=2) + "\n")
                _publish(staged, folder)
    return MapResult(
        zarr=folder / "land_cover.zarr",
        land_cover=tuple(folder / name for name, _ in products),
        items=tuple(folder / name for _, name in products),
        quicklook=folder / "quicklook.png",
        run=folder / "run.json",
        record=record,
    )


def build_scene(plan: Plan, offsets: Mapping[str, Offset] | None = None) -> xr.DataArray:
    """Stack and composite the planned items, lazily, on the padded grid.

    Parameters
    ----------
    plan
        From :func:`plan_area`.
    offsets
        Radiometric offsets by item id; decided here if not given.

    Returns
    -------
    DataArray
        (band, y, x) uint16, or (time, band, y, x) in ``per-date`` mode, of ``plan.padded``.
    """
    height, width = plan.geobox.shape
    chunks = plan.chunks.chunks(height), plan.chunks.chunks(width)
    if offsets is None:
        offsets = decide_offsets(plan.items, check=plan.options.check_offsets)
    pixels = stack(
        plan.items,
        plan.padded,
        plan.bands,
        chunksize=chunks,
        time_chunks=plan.passes if plan.options.dates_apart else -1,
        resampling=plan.options.resampling,
        offsets=offsets,
    )
    scene = per_date(pixels) if plan.options.composite == "per-date" else composite(pixels, plan.options.composite)
    if needs_clip(plan.aoi):
        # far outside the area nothing is computed; near it the network sees what is really there
        near = inside(
            plan.aoi, plan.padded, chunks, grow=max(plan.chunks.before, plan.chunks.after) * plan.options.resolution
        )
        scene = scene.copy(data=da.where(near, scene.data, np.uint16(0)))
    return scene


def build_prediction(plan: Plan, scene: xr.DataArray) -> xr.Dataset:
    """Classify the planned scene, lazily, and cut it to the area.

    Parameters
    ----------
    plan
        From :func:`plan_area`.
    scene
        From :func:`build_scene`.

    Returns
    -------
    Dataset
        See :func:`s2seg.predict`; on ``plan.geobox``.
    """
    options = plan.options
    prediction = predict(
        scene, plan.model, layers=options.layers, chunks=plan.chunks, margin=plan.margin, runtime=options.runtime,
        device=options.device, precision=options.precision,
    )  # fmt: skip
    if not needs_clip(plan.aoi):
        return prediction
    mask = inside(plan.aoi, plan.geobox, prediction.land_cover.data.chunks[-2:])
    empty = {"land_cover": plan.model.spec.legend.nodata, "confidence": 255, "probability": 255, "observations": 0}
    return prediction.assign(
        {
            name: variable.copy(data=da.where(mask, variable.data, variable.dtype.type(empty[str(name)])))
            for name, variable in prediction.items()
        }
    )


def _bands(items: Sequence[pystac.Item], model: ModelBundle, options: MapOptions) -> tuple[str, ...]:
    """What to read: the model's bands, what the composite and the picture need, and scl if clouds are masked."""
    present = {band for item in items for band in item.assets}
    for band in model.spec.bands:
        if band not in present:
            raise MissingBandError(band, items[0].id, sorted(present))
    bands = list(model.spec.bands)
    if isinstance(options.composite, CompositeSpec):
        if options.composite.method == "max-ndvi":
            bands += [b for b in ("red", "nir") if b not in bands]
        if options.composite.mask and "scl" in present:
            bands.append("scl")
        elif options.composite.mask:
            warnings.warn("the items have no scl band: clouds are not masked", S2SegWarning, stacklevel=3)
    return tuple(bands)


def _core_that_fits(core: int, dates: int, bands: int, stride: int) -> int:
    while core > 8 * stride and core * core * dates * bands * 2 > _CHUNK_BYTES:
        core //= 2
    return core


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
    """Estimate the peak of one process running two threads, in bytes.

    What counts: the libraries and GDAL's cache; the network's own buffers, which grow with the window; the dates of
    the blocks that are being read; and the composited blocks that wait for their neighbours, two rows of them.
    """
    side = plan.chunks.core + plan.chunks.before + plan.chunks.after
    reading = _THREADS * plan.dates_per_block * len(plan.bands) * side**2 * 2
    reducing = _THREADS * plan.dates_per_block * side**2 * 8
    across = min(plan.blocks[1], _TILE // plan.chunks.core)
    waiting = 2 * (across + 2) * len(plan.model.spec.bands) * plan.chunks.core**2 * 2
    network = _NETWORK_BYTES_PER_PIXEL * max(plan.chunks.window**2, 2**18)
    return _LIBRARIES_BYTES + network + reading + reducing + waiting


class _Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


@contextmanager
def _noted_warnings() -> Iterator[list[str]]:
    """Collect our own warnings for run.json, and pass every warning on when done."""
    notes: list[str] = []
    shown = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, S2SegWarning):
            notes.append(str(message))
        shown(message, category, *rest)

    with warnings.catch_warnings():
        warnings.showwarning = note  # type: ignore[assignment]
        yield notes


def _silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


def _refuse_existing(folder: Path, options: MapOptions) -> None:
    """Check the output before anything is read."""
    check_writable(folder / "run.json", overwrite=options.overwrite)
    found = [path for pattern in _OUTPUTS for path in folder.glob(pattern)]
    if found and not options.overwrite:
        raise OutputError(str(found[0]), "it exists already; pass --overwrite to replace it")


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A folder inside the output that is removed again, with the output folder if that is new and still empty."""
    created = [p for p in (folder, *folder.parents) if not p.exists()]
    staged = folder / ".partial"
    with writing(folder):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
    try:
        yield staged
    finally:
        shutil.rmtree(staged, ignore_errors=True)
        for made in created:
            if made.exists() and not any(made.iterdir()):
                made.rmdir()


def _publish(staged: Path, folder: Path) -> None:
    """Move finished outputs to their names; run.json goes last, so that it vouches for the rest."""
    for pattern in _OUTPUTS:
        for earlier in folder.glob(pattern):
            remove(earlier)
    for path in sorted(staged.iterdir(), key=lambda p: p.name == "run.json"):
        path.replace(folder / path.name)


def _count(land_cover: xr.DataArray, legend: Legend) -> npt.NDArray[np.int64]:
    """Pixels of each code in each map: (date, 256); a composite is one map.

    Raises
    ------
    NothingMappedError
        If all of them are nodata.
    """
    maps = land_cover.data[None] if land_cover.ndim == 2 else land_cover.data
    blocks = [[delayed(_bincount)(block) for block in one.to_delayed().ravel()] for one in maps]
    counts = np.array([np.sum(one, axis=0) for one in compute(*blocks)])
    if counts.sum() == counts[:, legend.nodata].sum():
        raise NothingMappedError(
            "nothing to map: no scene has a clear pixel in this area; widen the dates, or mask fewer SCL classes"
        )
    return counts


def _bincount(block: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return np.bincount(block.ravel(), minlength=256)


def _write_products(
    plan: Plan, stored: xr.Dataset, staged: Path, offsets: Mapping[str, Offset], report: Callable[[int, int], None]
) -> list[tuple[str, str]]:
    """COG and STAC item, one each per date, and the picture; returns their names."""
    dates = _dates(plan, stored)
    picture = _picture(plan, offsets)
    subtitle = f"{plan.model.spec.name} {plan.model.sha256[:8]} - {plan.geobox.crs} - {plan.options.resolution:g} m"
    names: list[tuple[str, str]] = []
    for done, (label, index, items) in enumerate(dates):
        report(done, len(dates))
        suffix = f"_{label}" if plan.options.dates_apart else ""
        cog, item = f"land_cover{suffix}.tif", f"item{suffix}.json"
        layer = stored.land_cover.isel(time=index) if plan.options.dates_apart else stored.land_cover
        write_cog(layer, staged / cog, legend=plan.model.spec.legend, tags=_tags(plan))
        times = [i.datetime for i in items if i.datetime]
        write_item(
            staged / item,
            geobox=plan.geobox,
            legend=plan.model.spec.legend,
            assets={
                "land_cover": staged / cog,
                "zarr": staged / "land_cover.zarr",
                "quicklook": staged / "quicklook.png",
            },
            datetime=times[0] if plan.options.dates_apart else (min(times), max(times)),
            source_items=items,
            model={"name": plan.model.spec.name, "sha256": plan.model.sha256},
            item_id=f"land-cover{suffix}" if suffix else f"land-cover_{min(times):%Y%m%d}_{max(times):%Y%m%d}",
            created=datetime.now(UTC),
            version=importlib.metadata.version("s2seg"),
        )
        names.append((cog, item))
    title = f"{dates[0][2][0].datetime:%Y-%m-%d} to {dates[-1][2][-1].datetime:%Y-%m-%d}"
    maps = thumbnail(stored.land_cover, _PICTURE_PIXELS).compute()
    if plan.options.dates_apart:
        write_quicklook_series(
            staged / "quicklook.png", composites=picture, land_cover=maps, legend=plan.model.spec.legend, title=title,
            subtitle=subtitle,
        )  # fmt: skip
    else:
        write_quicklook(
            staged / "quicklook.png", composite=picture, land_cover=maps, legend=plan.model.spec.legend, title=title,
            subtitle=subtitle,
        )  # fmt: skip
    report(len(dates), len(dates))
    return names


def _dates(plan: Plan, stored: xr.Dataset) -> list[tuple[str, int, list[pystac.Item]]]:
    """Label, index along time and source items of each map; a composite is one map of all items."""
    if not plan.options.dates_apart:
        return [("", 0, list(plan.items))]
    ends = np.cumsum(plan.passes)
    groups = [list(plan.items[end - n : end]) for n, end in zip(plan.passes, ends, strict=True)]
    times = [np.datetime_as_string(t, unit="s") for t in stored.time.values]
    days = [t[:10].replace("-", "") for t in times]
    # two platforms may pass on one day: then the time tells them apart
    labels = days if len(set(days)) == len(days) else [t.replace("-", "").replace(":", "") for t in times]
    return [(label, i, group) for i, (label, group) in enumerate(zip(labels, groups, strict=True))]


def _picture(plan: Plan, offsets: Mapping[str, Offset]) -> xr.DataArray:
    """The scene in true colour at a coarse resolution, read anew through the overviews."""
    factor = max(1, -(-max(plan.geobox.shape) // _PICTURE_PIXELS))
    height, width = plan.geobox.shape
    coarse = GeoBox(
        (-(-height // factor), -(-width // factor)), plan.geobox.affine @ Affine.scale(factor), plan.geobox.crs
    )
    present = {band for item in plan.items for band in item.assets}
    colors = [b for b in ("red", "green", "blue") if b in present]
    bands = colors if len(colors) == 3 else list(plan.model.spec.bands)[:3]
    masked = ["scl"] if "scl" in plan.bands else []
    pixels = stack(plan.items, coarse, [*bands, *masked], resampling=plan.options.resampling, offsets=offsets)
    if plan.options.composite == "per-date":
        return per_date(pixels).compute()
    return composite(
        pixels, replace(plan.options.composite, dilate=0.0) if not masked else plan.options.composite
    ).compute()


def _tags(plan: Plan) -> dict[str, str]:
    """TIFF metadata that leads back to the model."""
    return {"S2SEG_MODEL": plan.model.spec.name, "S2SEG_MODEL_SHA256": plan.model.sha256}


def _record(
    plan: Plan,
    catalog: str,
    dates: str,
    offsets: Mapping[str, Offset],
    products: Sequence[tuple[str, str]],
    counts: npt.NDArray[np.int64],
    session: str,
    notes: Sequence[str],
    clock: _Clock,
) -> dict[str, Any]:
    """Everything needed to understand and repeat the run."""
    legend = plan.model.spec.legend
    area = plan.options.resolution**2 / 1e6
    options = asdict(plan.options)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "catalog": catalog,
        "datetime": dates,
        "aoi": mapping(plan.aoi),
        "options": options,
        "grid": {
            "crs": str(plan.geobox.crs),
            "shape": list(plan.geobox.shape),
            "transform": list(plan.geobox.affine[:6]),
        },
        "chunks": asdict(plan.chunks),
        "model": {
            "name": plan.model.spec.name,
            "path": plan.model.path,
            "sha256": plan.model.sha256,
            "session": session,
        },
        "items": [
            {
                "id": item.id,
                "datetime": item.datetime.isoformat() if item.datetime else None,
                "assets": {band: item.assets[band].href for band in plan.bands if band in item.assets},
                "offset": asdict(offsets[item.id]),
            }
            for item in plan.items
        ],
        "maps": [
            {
                "land_cover": cog,
                "item": item,
                "classes": [
                    {"code": c.code, "name": c.name, "pixels": int(n[c.code]), "km2": round(int(n[c.code]) * area, 4)}
                    for c in legend.classes
                ],
                "nodata_pixels": int(n[legend.nodata]),
            }
            for (cog, item), n in zip(products, counts, strict=True)
        ],
        "warnings": list(notes),
        "seconds": clock.seconds,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _VERSIONS},
    }
