"""One shape for the items of every catalog: canonical band names, projection, absolute links, no duplicates."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from functools import lru_cache
from math import isfinite
from typing import Any
from urllib.parse import urlsplit

import pystac
from affine import Affine
from pyproj import Transformer
from pyproj.exceptions import CRSError
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from s2seg.errors import InputError, S2SegWarning
from s2seg.sources.catalogs import SIGNERS
from s2seg.sources.footprints import footprint, outline, read_geometry
from s2seg.sources.item_checks import ItemError, check_item, leave_out

BANDS = {
    "coastal": ("B01", 60),
    "blue": ("B02", 10),
    "green": ("B03", 10),
    "red": ("B04", 10),
    "rededge1": ("B05", 20),
    "rededge2": ("B06", 20),
    "rededge3": ("B07", 20),
    "nir": ("B08", 10),
    "nir08": ("B8A", 20),
    "nir09": ("B09", 60),
    "cirrus": ("B10", 60),
    "swir16": ("B11", 20),
    "swir22": ("B12", 20),
    "scl": ("SCL", 20),
}
"""Canonical band name -> ESA's name and the native resolution in metres."""

_ALIASES = {
    **{name: name for name in BANDS},
    **{esa.lower(): name for name, (esa, _) in BANDS.items()},
    **{f"b{int(esa[1:])}": name for name, (esa, _) in BANDS.items() if esa[1:].isdigit()},
    "rededge071": "rededge1",
    "rededge075": "rededge2",
    "rededge078": "rededge3",
}
# some catalogs call B05, B06, B07 and B8A alike "rededge": the wavelength in micrometres tells them apart
_REDEDGE_WAVELENGTHS = (
    (0.69, 0.72, "rededge1"),
    (0.72, 0.76, "rededge2"),
    (0.76, 0.80, "rededge3"),
    (0.85, 0.88, "nir08"),
)

_KEY = re.compile(r"(?P<name>[a-z]+\d*a?)(?:[_-](?P<resolution>\d+)m)?(?:[_-]jp2)?", re.IGNORECASE)
_RESOLUTION_IN_NAME = re.compile(r"_(\d{2})m\.\w+$")
_NOT_PIXELS = ("image/png", "image/jpeg", "application/json", "application/geo+json", "application/xml", "text/")
_NOT_A_BAND = {"visual", "overview", "thumbnail", "metadata", "tiles", "tilejson"}

_PREFIXES = ("s2", "sentinel2", "sentinel", "earthsearch")
_PRODUCT_NAMES = tuple(
    f"{prefix}:{name}"
    for prefix in _PREFIXES
    for name in ("product_uri", "product_title", "product_id", "granule_id", "tile_id")
)
_BASELINE = re.compile(r"(\d{1,2})\.(\d{1,2})")
_BASELINE_IN_NAME = re.compile(r"_N(\d{2})\.?(\d{2})(?:_|\.|$)")
_TILE = re.compile(r"(?:MGRS-)?0?(\d{1,2})([C-HJ-NP-X][A-HJ-NP-Z][A-HJ-NP-V])", re.IGNORECASE)
_TILE_IN_NAME = re.compile(r"(?:_T|_)(\d{2}[C-HJ-NP-X][A-HJ-NP-Z][A-HJ-NP-V])(?:_|\.|$)")

_WITHIN = 0.9
"""Share of an item's footprint that must lie where its pixels do, or the other way round: of real ones all does."""


def normalize_items(items: Iterable[pystac.Item]) -> list[pystac.Item]:
    """Bring the items of any catalog into the one shape that the rest of the package expects.

    Parameters
    ----------
    items
        Sentinel-2 items, Level-1C or Level-2A, of any catalog. They are not changed.

    Returns
    -------
    list of pystac.Item
        New items, by time and then id. Asset keys are canonical band names (see `BANDS`), each asset is one band at
        its native resolution with an absolute href and, where it can be derived, ``proj:transform`` and
        ``proj:shape``; ``proj:epsg`` and ``proj:code`` are both set, and ``grid:code`` names the tile. Of several
        versions of one scene the newest processing baseline is kept.

    Raises
    ------
    ItemError
        If no item can be used: each has a field that nothing can be made of, or does not say where its pixels lie, or
        contradicts itself there. Where others can be used, such items are left out with a warning.
    InputError
        If no item has a Sentinel-2 band.
    """
    given, broken = _normalize_all(items)
    known = [normal for _, normal in given if normal.assets]
    leave_out(broken)
    if given and not known:
        bare = given[0][0]
        keys = ", ".join(bare.assets) or "no assets at all"
        raise InputError(f"item {bare.id} has no Sentinel-2 band ({keys}); choose another collection")
    if len(known) < len(given):
        bare = next(item for item, normal in given if not normal.assets)
        warnings.warn(
            f"{len(given) - len(known)} of {len(given)} items have no Sentinel-2 band and are left out, "
            f"such as {bare.id}",
            S2SegWarning,
            stacklevel=2,
        )
    return sorted(_newest(known), key=lambda item: (sensing_time(item), item.id))


def sensing_time(item: pystac.Item) -> datetime:
    """Read when the scene was sensed, in UTC.

    Raises
    ------
    InputError
        If the item has no time.
    """
    time = item.datetime or item.common_metadata.start_datetime
    if time is None:
        raise InputError(f"item {item.id} has no datetime")
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def baseline(item: pystac.Item) -> tuple[int, int] | None:
    """Read the processing baseline, such as ``(5, 9)`` for 05.09; None where the item does not tell.

    The properties of the catalogs come first, then the product's name (``_N0509_``).
    """
    stated = [item.properties.get(f"{prefix}:processing_baseline") for prefix in _PREFIXES]
    for value in [*stated, item.properties.get("processing:version")]:
        if match := _BASELINE.fullmatch(str(value).strip().lstrip("Nn")):
            return int(match[1]), int(match[2])
    for name in _names(item):
        if match := _BASELINE_IN_NAME.search(name):
            return int(match[1]), int(match[2])
    return None


def tile(item: pystac.Item) -> str | None:
    """Read the MGRS tile, such as ``33TWL``; None where the item does not tell."""
    get = item.properties.get
    parts = [
        f"{get(f'{prefix}:utm_zone', '')}{get(f'{prefix}:latitude_band', '')}{get(f'{prefix}:grid_square', '')}"
        for prefix in ("mgrs", "sentinel")
    ]
    for value in (get("grid:code"), get("s2:mgrs_tile"), *parts):
        if match := _TILE.fullmatch(str(value)):
            return f"{int(match[1]):02d}{match[2].upper()}"
    for name in _names(item):
        if match := _TILE_IN_NAME.search(name):
            return match[1]
    return None


def epsg(item: pystac.Item) -> int | None:
    """Find the EPSG code of the pixels: as the item states it, as its assets do, or the UTM zone of its tile."""
    for holder in (item.properties, *(asset.extra_fields for asset in item.assets.values())):
        code = holder.get("proj:epsg") or str(holder.get("proj:code") or "").upper().removeprefix("EPSG:")
        if str(code).isdigit():
            return int(code)
    if name := tile(item):
        return (32600 if name[2] >= "N" else 32700) + int(name[:2])
    return None


def cloud_cover(item: pystac.Item) -> float | None:
    """Read the cloud cover in percent; None where the item does not tell."""
    value = item.properties.get("eo:cloud_cover")
    return None if value is None else float(value)


def sign_path(item: pystac.Item) -> str | None:
    """Name the function that must sign this item's links before a read, as a dotted path; None for open links."""
    hosts = {urlsplit(asset.href).netloc for asset in item.assets.values()}
    return next((SIGNERS[host] for host in sorted(hosts) if host in SIGNERS), None)


def _names(item: pystac.Item) -> Iterator[str]:
    for key in _PRODUCT_NAMES:
        if value := item.properties.get(key):
            yield str(value)
    yield item.id


def _normalize_all(items: Iterable[pystac.Item]) -> tuple[list[tuple[pystac.Item, pystac.Item]], dict[str, str]]:
    """Pairs of items, as given and normalised, and what is wrong with the others; some must be right."""
    pairs: list[tuple[pystac.Item, pystac.Item]] = []
    errors: list[ItemError] = []
    for item in items:
        try:
            check_item(item)
            pairs.append((item, _normalize(item)))
        except ItemError as error:
            errors.append(error)
    if errors and not pairs:
        raise errors[0]
    return pairs, {error.item_id: error.reason for error in errors}


def _normalize(item: pystac.Item) -> pystac.Item:
    properties = copy.copy(item.properties)
    if name := tile(item):
        properties["grid:code"] = f"MGRS-{name}"
    code = epsg(item)
    if code is not None:
        properties |= {"proj:epsg": code, "proj:code": f"EPSG:{code}"}
    normal = pystac.Item(
        item.id,
        item.geometry,
        item.bbox,
        item.datetime,
        properties,
        stac_extensions=list(item.stac_extensions),
        collection=item.collection_id,
    )
    # of the links only the origin is kept: the others would drag the whole catalog along into every task
    if origin := item.get_self_href():
        normal.set_self_href(origin)
    chosen = _best_assets(item)
    for band in (name for name in BANDS if name in chosen):
        normal.add_asset(band, _normal_asset(*chosen[band], item))
    if normal.assets and code is None:
        raise ItemError(item.id, "it states neither a projection (proj:code) nor a tile (grid:code)")
    if normal.assets and code is not None:
        _check_place(normal, code)
    return normal


def _check_place(item: pystac.Item, code: int) -> None:
    """Refuse an item whose pixels, by its projection and transform, lie elsewhere than its footprint.

    The footprint follows the pixels that are seen, or is that of a whole tile of which the files are a part: either
    way the smaller of the two lies within the larger.
    """
    try:
        to_lon_lat = _to_lon_lat(code)
    except CRSError:
        raise ItemError(item.id, f"its projection EPSG:{code} is unknown") from None
    covered = footprint(item)
    grids = (asset.extra_fields for asset in item.assets.values())
    grid = next((grid for grid in grids if {"proj:transform", "proj:shape"} <= grid.keys()), None)
    if covered is None or grid is None:
        return
    to_map, (height, width) = Affine(*grid["proj:transform"]), grid["proj:shape"]
    (left, top), (right, bottom) = to_map @ (0, 0), to_map @ (width, height)
    corners = min(left, right), min(bottom, top), max(left, right), max(bottom, top)
    west, south, east, north = to_lon_lat.transform_bounds(*corners)
    seen = outline((west, south, east, north)) if isfinite(west + south + east + north) else Polygon()
    shared = covered.intersection(seen)
    if shared.is_empty or shared.area < _WITHIN * min(covered.area, seen.area):
        raise ItemError(
            item.id,
            f"its footprint ({_extent(covered)}) lies elsewhere than its pixels by EPSG:{code} and proj:transform "
            f"({_extent(seen)})",
        )


@lru_cache
def _to_lon_lat(code: int) -> Transformer:
    return Transformer.from_crs(code, 4326, always_xy=True)


def _extent(geometry: BaseGeometry) -> str:
    if geometry.is_empty:
        return "nowhere on earth"
    west, south, east, north = geometry.bounds
    return f"lon {west:.4g} to {east:.4g}, lat {south:.4g} to {north:.4g}"


def _best_assets(item: pystac.Item) -> dict[str, tuple[str, pystac.Asset]]:
    """For each band the asset at the native resolution, then the finest, then GeoTIFF before JPEG 2000."""
    best: dict[str, tuple[str, pystac.Asset]] = {}
    ranks: dict[str, tuple[Any, ...]] = {}
    for key, asset in item.assets.items():
        band = _band_of(key, asset)
        if band is None:
            continue
        native = BANDS[band][1]
        resolution = _resolution(key, asset) or native
        is_jp2 = "jp2" in (asset.media_type or "") or asset.href.lower().endswith(".jp2")
        rank = (resolution != native, resolution, is_jp2, len(key), key)
        if band not in ranks or rank < ranks[band]:
            best[band], ranks[band] = (key, asset), rank
    return best


def _band_of(key: str, asset: pystac.Asset) -> str | None:
    fields = asset.extra_fields
    bands = fields.get("eo:bands") or fields.get("bands") or []
    if len(bands) > 1 or _NOT_A_BAND & {*(asset.roles or ()), key.lower()}:
        return None
    if (asset.media_type or "").startswith(_NOT_PIXELS):
        return None
    # the key and ESA's name say more than a common name: catalogs file B8A under "rededge"
    if (match := _KEY.fullmatch(key)) and (band := _ALIASES.get(match["name"].lower())):
        return band
    return _band_from_metadata(bands[0]) if bands else None


def _band_from_metadata(band: Mapping[str, Any]) -> str | None:
    common = str(band.get("eo:common_name") or band.get("common_name") or "").lower()
    for name in (str(band.get("name") or "").lower(), common):
        if name in _ALIASES:
            return _ALIASES[name]
    if common == "rededge":
        wavelength = float(band.get("eo:center_wavelength") or band.get("center_wavelength") or 0)
        return next((name for low, high, name in _REDEDGE_WAVELENGTHS if low <= wavelength < high), None)
    return None


def _resolution(key: str, asset: pystac.Asset) -> float | None:
    fields = asset.extra_fields
    if transform := fields.get("proj:transform"):
        return abs(float(transform[0]))
    if (match := _KEY.fullmatch(key)) and match["resolution"]:
        return float(match["resolution"])
    if match := _RESOLUTION_IN_NAME.search(asset.href):
        return float(match[1])
    raster = (fields.get("raster:bands") or fields.get("bands") or [{}])[0]
    value = raster.get("spatial_resolution") or raster.get("raster:spatial_resolution") or fields.get("gsd")
    return float(value) if value else None


def _normal_asset(key: str, asset: pystac.Asset, item: pystac.Item) -> pystac.Asset:
    fields = copy.copy(asset.extra_fields)
    fields.update(_grid(key, asset, item))
    href = asset.get_absolute_href() or asset.href
    return pystac.Asset(href, asset.title, asset.description, asset.media_type, copy.copy(asset.roles), fields)


def _grid(key: str, asset: pystac.Asset, item: pystac.Item) -> dict[str, list[float] | list[int]]:
    """Transform and shape of an asset, from its own fields, the item's, or a box and a pixel size."""
    own = asset.extra_fields
    transform, extent = own.get("proj:transform"), own.get("proj:shape")
    resolution = _resolution(key, asset)
    common = item.properties.get("proj:transform")
    # one transform for the whole item holds for the bands of that pixel size only
    if transform is None and common and resolution in (None, abs(common[0])):
        transform, extent = common, extent or item.properties.get("proj:shape")
    bbox = own.get("proj:bbox") or item.properties.get("proj:bbox")
    if bbox and (transform is None or extent is None):
        west, south, east, north = (float(value) for value in bbox)
        if extent is not None:
            resolution = (east - west) / extent[1]
        if resolution:
            extent = extent or [round((north - south) / resolution), round((east - west) / resolution)]
            transform = transform or [resolution, 0.0, west, 0.0, -resolution, north]
    found: dict[str, list[float] | list[int]] = {}
    if transform is not None:
        found["proj:transform"] = [float(value) for value in transform[:6]]
    if extent is not None:
        found["proj:shape"] = [int(value) for value in extent]
    return found


def _newest(items: Iterable[pystac.Item]) -> Iterator[pystac.Item]:
    """Of the versions of one scene only the newest.

    A pass that two ground stations received comes as two products of one tile and time, each with its part of the
    tile: those are no versions of one another, so footprints must overlap for one to replace the other.
    """
    scenes: dict[tuple[str, str, datetime], list[pystac.Item]] = {}
    for item in sorted(items, key=_age, reverse=True):
        platform = str(item.properties.get("platform") or "").lower()
        place = tile(item) or item.id
        kept = scenes.setdefault((place, platform, sensing_time(item).replace(microsecond=0)), [])
        if not any(_overlap(item, newer) for newer in kept):
            kept.append(item)
            yield item


def _age(item: pystac.Item) -> tuple[tuple[int, int], str, int, str]:
    properties = item.properties
    made = [properties.get(f"{prefix}:generation_time") for prefix in _PREFIXES]
    stamp = next((str(value) for value in [*made, properties.get("created"), properties.get("updated")] if value), "")
    sequence = next((properties[key] for key in ("s2:sequence", "sentinel:sequence") if key in properties), 0)
    # without fractions and zone the ISO stamps of all catalogs compare as text
    return baseline(item) or (-1, -1), stamp[:19], int(sequence), item.id


def _overlap(one: pystac.Item, other: pystac.Item) -> bool:
    """Whether the smaller footprint lies mostly within the larger; footprints that cannot be compared count as one."""
    a, b = read_geometry(one.geometry), read_geometry(other.geometry)
    if a is None or b is None:
        return True
    smaller = min(a.area, b.area)
    return smaller == 0 or a.intersection(b).area > 0.5 * smaller
