"""A STAC item that says what a map is, where and when it holds, and what it was made from."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pystac
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from shapely import affinity
from shapely.geometry import Polygon, box, mapping
from shapely.geometry.base import BaseGeometry

from s2seg.legend import Legend
from s2seg.outputs._files import check_writable, identifiers, is_url, replacing, writing

_EXTENSIONS = tuple(
    f"https://stac-extensions.github.io/{name}/schema.json"
    for name in ("projection/v2.0.0", "raster/v2.0.0", "classification/v2.0.0", "processing/v1.2.0")
)
_KINDS = {  # suffix -> media type, roles
    ".tif": (pystac.MediaType.COG, ["data"]),
    ".zarr": ("application/vnd.zarr; version=3", ["data"]),
    ".png": (pystac.MediaType.PNG, ["overview"]),
    ".json": (pystac.MediaType.JSON, ["metadata"]),
    ".parquet": ("application/vnd.apache.parquet", ["data"]),
}
_DIGITS = 7  # of a degree: centimetres
_EDGE_POINTS = 32


@dataclass(frozen=True)
class MapFacts:
    """What an item says of a finished map.

    Parameters
    ----------
    item_id
        Name of the item.
    geobox, legend
        The map's grid and classes.
    datetime
        The moment of a map of one date; first and last of a composite, whose ``datetime`` is null.
    source_items
        What the map was made from: a ``derived_from`` link to each whose address is known; ids of all of them.
    model
        ``name`` and ``sha256``.
    created, version
        When the map was made, and s2seg's version.
    """

    item_id: str
    geobox: GeoBox
    legend: Legend
    datetime: dt.datetime | tuple[dt.datetime, dt.datetime]
    source_items: Sequence[pystac.Item]
    model: Mapping[str, str]
    created: dt.datetime
    version: str


def write_item(
    path: str | Path, facts: MapFacts, assets: Mapping[str, str | Path], *, overwrite: bool = False
) -> pystac.Item:
    """Describe a finished map as a STAC 1.1 item: projection, raster, classification and processing extensions.

    Parameters
    ----------
    path
        Where the item's JSON goes.
    facts
        What it says of the map.
    assets
        Files by key: ``land_cover`` and ``zarr`` carry the classes, ``confidence`` its nodata. Local ones are linked
        relative to the item, so that the folder can be moved.
    overwrite
        Replace what stands at ``path``.

    Returns
    -------
    pystac.Item
        The item, with its self link.

    Raises
    ------
    OutputError
        If the path exists or cannot be written.
    """
    path = check_writable(path, overwrite=overwrite)
    when = facts.datetime
    moment, start, end = (when, None, None) if isinstance(when, dt.datetime) else (None, *when)
    geometry, bbox = _footprint(facts.geobox)
    item = pystac.Item(
        id=facts.item_id,
        geometry=geometry,
        bbox=bbox,
        datetime=moment,
        start_datetime=start,
        end_datetime=end,
        properties=_projection(facts.geobox) | _processing(facts),
        stac_extensions=list(_EXTENSIONS),
    )
    for key, target in assets.items():
        item.add_asset(key, _asset(key, target, path.parent, facts))
    for source in facts.source_items:
        if href := source.get_self_href():
            item.add_link(pystac.Link("derived_from", href, pystac.MediaType.GEOJSON, title=source.id))
    with replacing(path) as partial, writing(path):
        partial.write_text(json.dumps(item.to_dict(include_self_link=False, transform_hrefs=False), indent=2) + "\n")
    item.set_self_href(str(path.absolute()))
    return item


def _projection(geobox: GeoBox) -> dict[str, Any]:
    crs = geobox.crs
    epsg = crs.to_epsg() if crs is not None else None
    left, bottom, right, top = geobox.boundingbox
    metres = {"gsd": _resolution(geobox)} if crs is not None and crs.projected else {}
    return metres | {
        "proj:code": f"EPSG:{epsg}" if epsg else None,
        **({} if epsg or crs is None else {"proj:wkt2": crs.to_wkt()}),
        "proj:shape": list(geobox.shape),
        "proj:transform": list(geobox.transform)[:6],
        "proj:bbox": [left, bottom, right, top],
    }


def _resolution(geobox: GeoBox) -> float:
    return float(abs(geobox.resolution.x))


def _processing(facts: MapFacts) -> dict[str, Any]:
    model, sources = facts.model, facts.source_items
    count = f"{len(sources)} Sentinel-2 item{'' if len(sources) == 1 else 's'}"
    return {
        "created": pystac.utils.datetime_to_str(facts.created),
        "constellation": "sentinel-2",
        "processing:level": "L4",
        "processing:lineage": f"Land cover by model {model['name']} (sha256 {model['sha256']}) from {count}",
        "processing:software": {"s2seg": facts.version},
        "s2seg:model": dict(model),
        "s2seg:source_items": [source.id for source in sources],
    }


def _asset(key: str, target: str | Path, folder: Path, facts: MapFacts) -> pystac.Asset:
    geobox, legend = facts.geobox, facts.legend
    href = str(target)
    if not is_url(href):
        href = "./" + Path(os.path.relpath(href, folder)).as_posix()
    media_type, roles = _KINDS.get(Path(href).suffix, (None, ["metadata"]))
    asset = pystac.Asset(href, title=key.replace("_", " "), media_type=media_type, roles=roles)
    if roles == ["data"] and key != "confidence":
        asset.extra_fields = _band("land_cover", legend.nodata, geobox) | {"classification:classes": _classes(legend)}
    elif key == "confidence":
        asset.extra_fields = _band("confidence", 255, geobox) | {"unit": "%"}
    return asset


def _band(name: str, nodata: int, geobox: GeoBox) -> dict[str, Any]:
    """STAC 1.1 fields of an asset with one band; what holds for every band stands on the asset."""
    return {
        "bands": [{"name": name}],
        "data_type": "uint8",
        "nodata": nodata,
        "raster:sampling": "area",
        "raster:spatial_resolution": _resolution(geobox),
    }


def _classes(legend: Legend) -> list[dict[str, Any]]:
    classes: list[dict[str, Any]] = [
        {"value": c.code, "name": name, "title": c.name, "color_hint": c.color[1:].upper()}
        for name, c in zip(identifiers(legend), legend.classes, strict=True)
    ]
    name = "no_data" if "no_data" not in identifiers(legend) else f"no_data_{legend.nodata}"
    return [*classes, {"value": legend.nodata, "name": name, "title": "no data", "nodata": True}]


def _footprint(geobox: GeoBox) -> tuple[dict[str, Any], list[float]]:
    """Return outline in lon/lat with densified edges, and bounds; split at the antimeridian, where west > east."""
    column, row = geobox.boundary(_EDGE_POINTS).T
    a, b, c, d, e, f = list(geobox.transform)[:6]
    to_lonlat = Transformer.from_crs(geobox.crs, "EPSG:4326", always_xy=True)
    lon, lat = to_lonlat.transform(a * column + b * row + c, d * column + e * row + f)
    crosses = np.ptp(lon) > 180
    shape = Polygon(np.column_stack([np.where(crosses & (lon < 0), lon + 360, lon), lat]).round(_DIGITS))
    west, south, east, north = shape.bounds
    if not crosses:
        return _geojson(shape), [west, south, east, north]
    eastern = shape.intersection(box(-180, -90, 180, 90))
    western = affinity.translate(shape.intersection(box(180, -90, 540, 90)), -360)
    return _geojson(eastern.union(western)), [west, south, round(east - 360, _DIGITS), north]


def _geojson(shape: BaseGeometry) -> dict[str, Any]:
    """Return plain lists, outer rings counterclockwise."""
    geometry: dict[str, Any] = json.loads(json.dumps(mapping(shape.normalize().reverse())))
    return geometry
