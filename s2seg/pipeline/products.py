"""What is made of a stored map: COG, STAC item, picture, record."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from shapely.geometry import mapping

from s2seg.outputs.cog import write_cog
from s2seg.outputs.quicklook import thumbnail, write_quicklook, write_quicklook_series
from s2seg.outputs.stac import write_item
from s2seg.pipeline.plan import Plan
from s2seg.sources.composite import composite, per_date
from s2seg.sources.radiometry import Offset
from s2seg.sources.stack import stack

_PICTURE_PIXELS = 1000
"""The quicklook's maps have at most this many pixels on a side."""

_VERSIONS = ("s2seg", "dask", "numpy", "odc-geo", "pystac-client", "rasterio", "stackstac", "xarray", "zarr")


def write_products(
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
    bands = colors if len(colors) == 3 else list(plan.bands)[:3]
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


def describe_run(
    plan: Plan,
    catalog: str,
    dates: str,
    offsets: Mapping[str, Offset],
    products: Sequence[tuple[str, str]],
    counts: npt.NDArray[np.int64],
    session: Mapping[str, str],
    notes: Sequence[str],
    seconds: Mapping[str, float],
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
            **session,
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
        "seconds": seconds,
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in _VERSIONS},
    }
