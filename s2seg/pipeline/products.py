"""What is made of a stored map: COG, STAC item, picture, record."""

from __future__ import annotations

import importlib.metadata
import platform
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyproj
import pystac
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry import mapping

from s2seg.errors import S2SegWarning
from s2seg.legend import Legend
from s2seg.outputs.cog import write_cog
from s2seg.outputs.quicklook import stride, thumbnail, write_quicklook, write_quicklook_series
from s2seg.outputs.stac import MapFacts, write_item
from s2seg.outputs.zarr import open_stored, pieces
from s2seg.pipeline.plan import Plan
from s2seg.progress import Steps
from s2seg.sources.clip import inside, needs_clip
from s2seg.sources.composite import composite, per_date
from s2seg.sources.items import sensing_time
from s2seg.sources.radiometry import Offset
from s2seg.sources.stack import stack

_PICTURE_PIXELS, _SMALL_PICTURE_PIXELS = 1000, 520
"""The quicklook's map, and each of its maps where there are several, has at most this many pixels on a side."""

_EQUAL_AREA = 1.01
"""How much the areal scale of a projection may vary within a map that is told in square kilometres."""

_COUNTED_ROWS = 64
"""Rows that are counted at once: NumPy makes eight bytes of each pixel to count it, and these stay in the cache."""

_PACKAGES = ("s2seg", "dask", "numpy", "odc-geo", "pystac-client", "rasterio", "stackstac", "xarray", "zarr")


@dataclass(frozen=True)
class Product:
    """One map as files.

    Parameters
    ----------
    land_cover, item
        Names of its COG and of its STAC item.
    counts
        (256,) int64: pixels of each code.
    """

    land_cover: str
    item: str
    counts: npt.NDArray[np.int64]


def read_picture(plan: Plan, offsets: Mapping[str, Offset]) -> xr.DataArray:
    """Read the scene in true colour at a coarse resolution, through the overviews.

    Parameters
    ----------
    plan, offsets
        What is mapped, and the radiometric offsets by item id.

    Returns
    -------
    DataArray
        (band, y, x) uint16, or (time, band, y, x) in ``per-date`` mode, in memory, for :func:`write_products`.
    """
    factor = max(1, -(-max(plan.geobox.shape) // _picture_pixels(plan)))
    height, width = plan.geobox.shape
    coarse = GeoBox(
        (-(-height // factor), -(-width // factor)), plan.geobox.affine @ Affine.scale(factor), plan.geobox.crs
    )
    present = {band for item in plan.items for band in item.assets}
    colors = [b for b in ("red", "green", "blue") if b in present]
    bands = colors if len(colors) == 3 else list(plan.bands)[:3]
    masked = ["scl"] if "scl" in plan.bands else []
    pixels = stack(plan.items, coarse, [*bands, *masked], resampling=plan.options.resampling, offsets=offsets)
    if plan.options.composite == "per-date":
        return per_date(pixels).compute()
    return composite(
        pixels, replace(plan.options.composite, dilate=0.0) if not masked else plan.options.composite
    ).compute()


def _picture_pixels(plan: Plan) -> int:
    return _SMALL_PICTURE_PIXELS if plan.options.dates_apart else _PICTURE_PIXELS


def write_products(plan: Plan, staged: Path, scene: xr.DataArray, report: Steps) -> list[Product]:
    """COG and STAC item of each stored map, and the picture, which is drawn while the COGs are written.

    Parameters
    ----------
    plan
        What has been mapped.
    staged
        Folder that holds the Zarr, and gets all else.
    scene
        From :func:`read_picture`.
    report
        Called with (done, total) maps.
    """
    maps = open_stored(staged / "land_cover.zarr").land_cover
    dates = _dates(plan, maps)
    names: list[tuple[str, str]] = []
    with ThreadPoolExecutor(1) as aside:
        counting = aside.submit(_write_picture, plan, maps, dates, scene, staged / "quicklook.png")
        for done, (label, items) in enumerate(dates):
            report(done, len(dates))
            names.append(_write_map(plan, maps, done, label, items, staged))
        counts = counting.result()
    report(len(dates), len(dates))
    return [Product(cog, item, n) for (cog, item), n in zip(names, counts, strict=True)]


def _write_map(
    plan: Plan, maps: xr.DataArray, index: int, label: str, items: list[pystac.Item], staged: Path
) -> tuple[str, str]:
    """Write the COG and the item of one map; returns their names."""
    suffix = f"_{label}" if plan.options.dates_apart else ""
    cog, item = f"land_cover{suffix}.tif", f"item{suffix}.json"
    layer = maps.isel(time=index) if plan.options.dates_apart else maps
    write_cog(layer, staged / cog, legend=plan.model.spec.legend, tags=_tags(plan))
    times = [sensing_time(i) for i in items]
    facts = MapFacts(
        item_id=f"land-cover{suffix}" if suffix else f"land-cover_{min(times):%Y%m%d}_{max(times):%Y%m%d}",
        geobox=plan.geobox,
        legend=plan.model.spec.legend,
        datetime=times[0] if plan.options.dates_apart else (min(times), max(times)),
        source_items=items,
        model={"name": plan.model.spec.name, "sha256": plan.model.sha256},
        created=datetime.now(UTC),
        version=_versions()["s2seg"],
    )
    files = {"land_cover": cog, "zarr": "land_cover.zarr", "quicklook": "quicklook.png"}
    write_item(staged / item, facts, {key: staged / name for key, name in files.items()})
    return cog, item


def _write_picture(
    plan: Plan,
    maps: xr.DataArray,
    dates: list[tuple[str, list[pystac.Item]]],
    scene: xr.DataArray,
    path: Path,
) -> npt.NDArray[np.int64]:
    """Draw the quicklook; returns the pixels of each code in each map, (date, 256), which the same reading counts."""
    counts, small = _survey(maps, _picture_pixels(plan))
    within = None
    if needs_clip(plan.aoi):
        within = _inside(plan, small.odc.geobox)
        scene = scene.where(_inside(plan, scene.odc.geobox), 0)
    days = dict.fromkeys(f"{sensing_time(item):%Y-%m-%d}" for item in (dates[0][1][0], dates[-1][1][-1]))
    title = " to ".join(days)
    subtitle = f"{plan.model.spec.name} {plan.model.sha256[:8]} - {plan.geobox.crs} - {plan.options.resolution:g} m"
    legend = plan.model.spec.legend
    if plan.options.dates_apart:
        write_quicklook_series(
            path, composites=scene, land_cover=small, legend=legend, title=title, subtitle=subtitle, inside=within,
        )  # fmt: skip
    else:
        write_quicklook(
            path, composite=scene, land_cover=small, legend=legend, title=title, subtitle=subtitle, inside=within,
        )  # fmt: skip
    return counts


def _inside(plan: Plan, geobox: GeoBox) -> npt.NDArray[np.bool_]:
    """Which pixels of a small grid touch the area."""
    height, width = geobox.shape
    mask: npt.NDArray[np.bool_] = inside(plan.aoi, geobox, ((height,), (width,))).compute()
    return mask


def _survey(maps: xr.DataArray, pixels: int) -> tuple[npt.NDArray[np.int64], xr.DataArray]:
    """Pixels of each code in each map, (date, 256), and the maps with ``pixels`` on a side at most; reads them once."""
    thumb = thumbnail(maps, pixels)
    step = stride(maps.sizes["y"], maps.sizes["x"], pixels)
    down, across = (np.arange(maps.sizes[dim])[step // 2 :: step] for dim in ("y", "x"))
    layers = [maps] if maps.ndim == 2 else list(maps)
    counts, small = np.zeros((len(layers), 256), np.int64), np.empty((len(layers), *thumb.shape[-2:]), maps.dtype)
    for count, picture, layer in zip(counts, small, layers, strict=True):
        for rows, columns in pieces(layer):
            block = layer[rows, columns].to_numpy()
            for few in np.split(block, range(_COUNTED_ROWS, len(block), _COUNTED_ROWS)):
                count += np.bincount(few.ravel(), minlength=256)
            y, x = (
                slice(*np.searchsorted(taken, (span.start, span.stop)))
                for taken, span in ((down, rows), (across, columns))
            )
            picture[y, x] = block[np.ix_(down[y] - rows.start, across[x] - columns.start)]
    return counts, thumb.copy(data=small.reshape(thumb.shape))


def _dates(plan: Plan, maps: xr.DataArray) -> list[tuple[str, list[pystac.Item]]]:
    """Label and source items of each map along time; a composite is one map of all items."""
    if not plan.options.dates_apart:
        return [("", list(plan.items))]
    ends = np.cumsum(plan.passes)
    groups = [list(plan.items[end - n : end]) for n, end in zip(plan.passes, ends, strict=True)]
    times = [np.datetime_as_string(t, unit="s") for t in maps.time.values]
    days = [t[:10].replace("-", "") for t in times]
    # two platforms may pass on one day: then the time tells them apart
    labels = days if len(set(days)) == len(days) else [t.replace("-", "").replace(":", "") for t in times]
    return list(zip(labels, groups, strict=True))


def _tags(plan: Plan) -> dict[str, str]:
    """TIFF metadata that leads back to the model."""
    return {"S2SEG_MODEL": plan.model.spec.name, "S2SEG_MODEL_SHA256": plan.model.sha256}


def _square_kilometres(geobox: GeoBox) -> float:
    """Area of a pixel on the ellipsoid, by the projection's areal scale in the middle of the grid.

    A UTM zone keeps areas within 0.2 %; Web Mercator doubles them at 45 degrees. Where the scale changes by more than a
    hundredth over the grid, this warns.
    """
    crs = pyproj.CRS(str(geobox.crs))
    height, width = geobox.shape
    spots = [geobox.affine * (width * x, height * y) for x in (0, 0.5, 1) for y in (0, 0.5, 1)]
    to_degrees = pyproj.Transformer.from_crs(crs, crs.geodetic_crs, always_xy=True)
    scales = [pyproj.Proj(crs).get_factors(*to_degrees.transform(*spot)).areal_scale for spot in spots]
    if max(scales) / min(scales) > _EQUAL_AREA:
        warnings.warn(
            S2SegWarning(
                f"{geobox.crs} stretches areas {min(scales):.2f} to {max(scales):.2f} times within this map: "
                "the km2 of each class are approximate"
            ),
            stacklevel=2,
        )
    return float(abs(geobox.affine.determinant) / scales[len(scales) // 2] / 1e6)


def describe_run(
    plan: Plan,
    catalog: str,
    dates: str,
    offsets: Mapping[str, Offset],
    products: Sequence[Product],
    session: Mapping[str, str],
    notes: Sequence[str],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """Everything needed to understand and repeat the run."""
    area = _square_kilometres(plan.geobox)
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "catalog": catalog,
        "datetime": dates,
        "aoi": mapping(plan.aoi),
        "options": asdict(plan.options),
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
            **session,
        },
        "items": [_describe_item(plan, item, offsets[item.id]) for item in plan.items],
        "maps": [_describe_map(plan.model.spec.legend, product, area) for product in products],
        "warnings": list(notes),
        "seconds": seconds,
        "versions": _versions(),
    }


@cache
def _versions() -> dict[str, str]:
    """Of what a map was made with."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def _describe_item(plan: Plan, item: pystac.Item, offset: Offset) -> dict[str, Any]:
    return {
        "id": item.id,
        "datetime": sensing_time(item).isoformat(),
        "assets": {band: item.assets[band].href for band in plan.bands if band in item.assets},
        "offset": asdict(offset),
    }


def _describe_map(legend: Legend, product: Product, area: float) -> dict[str, Any]:
    """Files and classes of a map, whose pixels have an ``area`` in square kilometres."""
    counts = product.counts[list(legend.codes)].tolist()
    return {
        "land_cover": product.land_cover,
        "item": product.item,
        "classes": [
            {"code": c.code, "name": c.name, "pixels": n, "km2": round(n * area, 4)}
            for c, n in zip(legend.classes, counts, strict=True)
        ],
        "nodata_pixels": int(product.counts[legend.nodata]),
    }
