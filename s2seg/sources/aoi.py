"""Areas of interest: whatever people have at hand becomes one valid lon/lat geometry, or one line that says why not."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from shapely.errors import ShapelyError
from shapely.geometry import MultiPolygon, Polygon, box, shape
from shapely.geometry.base import BaseGeometry
from shapely.validation import explain_validity

from s2seg.errors import InputError

_HELP = "give west,south,east,north in degrees, a GeoJSON file, or WKT"
_WKT = re.compile(
    r"\s*(SRID=\d+;\s*)?((MULTI)?(POINT|LINESTRING|POLYGON)|LINEARRING|GEOMETRYCOLLECTION)\s*(Z|M|ZM)?\s*"
    r"(\((?!.*json\s*$)|EMPTY\s*$)",  # "polygon (1).geojson" is a file
    re.IGNORECASE | re.DOTALL,
)
_LON_LAT = re.compile(r"CRS:?84|EPSG:+4326|WGS ?84$", re.IGNORECASE)


def parse_aoi(aoi: str | Path | Sequence[float] | BaseGeometry | Mapping[str, Any]) -> BaseGeometry:
    """Read an area of interest.

    Parameters
    ----------
    aoi
        A bounding box ``west, south, east, north`` (numbers or text; west > east crosses the antimeridian), the path
        of a GeoJSON file, WKT, a shapely geometry, or a GeoJSON mapping. Always longitude and latitude in degrees.

    Returns
    -------
    shapely.geometry.base.BaseGeometry
        A valid, two-dimensional Polygon or MultiPolygon. Parts that touch or overlap are merged.

    Raises
    ------
    InputError
        If it is empty, crosses itself, has no area, is not in degrees, crosses the antimeridian without being cut
        there, or cannot be read.
    """
    try:
        parts = [shapely.force_2d(part) for part in _read(aoi)]
    except RecursionError:
        raise InputError(f"the aoi is nested too deeply to be an area; {_HELP}") from None
    if not parts or all(part.is_empty for part in parts):
        raise InputError(f"the aoi is empty; {_HELP}")
    for part in parts:
        _check_range(part)
        _check_cut(part)
        _check_shape(part)
    return parts[0] if len(parts) == 1 else shapely.union_all(parts)


def _read(aoi: str | Path | Sequence[float] | BaseGeometry | Mapping[str, Any]) -> list[BaseGeometry]:
    if isinstance(aoi, BaseGeometry):
        return list(_leaves(aoi))
    if isinstance(aoi, Mapping):
        return list(_from_geojson(aoi, "the aoi"))
    if isinstance(aoi, Path):
        return list(_from_file(aoi))
    if isinstance(aoi, str):
        return list(_from_text(aoi))
    return [_from_bbox(aoi)]


def _from_text(text: str) -> Iterator[BaseGeometry]:
    words = text.replace(",", " ").split()
    numbers = [_number(word) for word in words]
    if not words:
        raise InputError(f"the aoi is empty; {_HELP}")
    if all(number is not None for number in numbers):
        return iter([_from_bbox([number for number in numbers if number is not None])])
    if _WKT.match(text):
        return _from_wkt(text)
    if text.lstrip().startswith("{"):
        return _from_geojson(_json(text, "the aoi"), "the aoi")
    return _from_file(Path(text))


def _number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def _from_bbox(values: Sequence[float]) -> BaseGeometry:
    try:
        west, south, east, north = (float(value) for value in values)
    except (TypeError, ValueError):
        raise InputError(f"aoi {values!r} is not four numbers; {_HELP}") from None
    _check_degrees((west, east), (south, north))
    if south > north:
        raise InputError(f"aoi: south ({south:g}) is greater than north ({north:g}); west,south,east,north is expected")
    if west <= east:
        # the vertices between say which way around the globe it goes
        return (
            shapely.segmentize(box(west, south, east, north), 180)
            if east - west > 180
            else box(west, south, east, north)
        )
    sides = [box(a, south, b, north) for a, b in ((west, 180.0), (-180.0, east)) if a < b]
    return MultiPolygon(sides) if len(sides) == 2 else (sides or [Polygon()])[0]


def _from_wkt(text: str) -> Iterator[BaseGeometry]:
    srid = re.match(r"\s*SRID=(\d+);", text, re.IGNORECASE)
    if srid and srid[1] != "4326":
        raise InputError(f"aoi is in EPSG:{srid[1]}; reproject it to lon/lat (EPSG:4326)")
    try:
        return _leaves(shapely.from_wkt(text[srid.end() :] if srid else text))
    except ShapelyError as error:
        raise InputError(f"aoi is not valid WKT: {_line(error)}") from None


def _from_file(path: Path) -> Iterator[BaseGeometry]:
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise InputError(f"aoi {str(path)!r} is no file, bounding box or WKT; {_HELP}") from None
    except UnicodeDecodeError:
        raise InputError(
            f"aoi {path} is not text; convert it first: ogr2ogr -t_srs EPSG:4326 aoi.geojson {path}"
        ) from None
    except OSError as error:
        raise InputError(f"aoi {path} cannot be read: {error.strerror or error}") from None
    return _from_geojson(_json(text, f"aoi {path}"), f"aoi {path}")


def _json(text: str, name: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is not JSON (line {error.lineno}: {error.msg}); a GeoJSON file is expected") from None


def _from_geojson(document: Any, name: str) -> Iterator[BaseGeometry]:
    if not isinstance(document, Mapping) or "type" not in document:
        raise InputError(f"{name} is not GeoJSON: it has no 'type'")
    _check_crs(document.get("crs"), name)
    kind = document["type"]
    if kind == "FeatureCollection":
        features = document.get("features") or []
        if not isinstance(features, list):
            raise InputError(f"{name} is not GeoJSON: its features are no list")
        for feature in features:
            yield from _from_geojson(feature, name)
    elif kind == "Feature":
        if document.get("geometry") is not None:
            yield from _from_geojson(document["geometry"], name)
    else:
        try:
            yield from _leaves(shape(dict(document)))
        except (ShapelyError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
            raise InputError(f"{name}: not a GeoJSON geometry ({kind}): {_line(error)}") from None


def _leaves(geometry: BaseGeometry) -> Iterator[BaseGeometry]:
    """Take collections apart; a MultiPolygon stays whole, because its parts are valid or invalid together."""
    if geometry.geom_type == "GeometryCollection":
        for part in shapely.get_parts(geometry):
            yield from _leaves(part)
    else:
        yield geometry


def _check_crs(crs: Any, name: str) -> None:
    if crs is None:
        return
    properties = crs.get("properties") if isinstance(crs, Mapping) else None
    label = properties.get("name") if isinstance(properties, Mapping) else crs
    if not _LON_LAT.search(str(label)):
        raise InputError(f"{name} is in CRS {label}; reproject it to lon/lat: ogr2ogr -t_srs EPSG:4326 aoi.geojson IN")


def _check_range(part: BaseGeometry) -> None:
    if part.is_empty:
        return
    west, south, east, north = part.bounds
    _check_degrees((west, east), (south, north))


def _check_cut(part: BaseGeometry) -> None:
    """Refuse an edge of more than half the globe: what crosses the antimeridian must be cut there (RFC 7946, 3.1.9)."""
    points, ring = shapely.get_coordinates(shapely.get_rings(part), return_index=True)
    steps = abs(np.diff(points[:, 0]))[np.diff(ring) == 0]
    if ((steps > 180) & (steps < 360)).any():  # 360 runs along a parallel, from the antimeridian to itself
        west, _, east, _ = part.bounds
        raise InputError(
            f"aoi: this {part.geom_type} has an edge of more than 180 degrees (lon {west:g} to {east:g}); if it "
            "crosses the antimeridian, cut it there into a MultiPolygon, or give a bounding box with west > east"
        )


def _check_degrees(lon: tuple[float, float], lat: tuple[float, float]) -> None:
    text = f"lon {min(lon):g} to {max(lon):g}, lat {min(lat):g} to {max(lat):g}"
    if not all(abs(value) < float("inf") for value in lon + lat):
        raise InputError(f"aoi has coordinates that are not finite ({text})")
    far_lon, far_lat = max(map(abs, lon)), max(map(abs, lat))
    if far_lon > 360 or far_lat > 180:
        raise InputError(f"aoi looks projected ({text}); lon/lat in degrees is expected: ogr2ogr -t_srs EPSG:4326")
    if far_lat > 90:
        swapped = "; lat/lon look swapped: west,south,east,north is expected" if far_lon <= 90 else ""
        raise InputError(f"aoi: latitudes must lie within -90 and 90 ({text}){swapped}")
    if far_lon > 180:
        raise InputError(
            f"aoi: longitudes must lie within -180 and 180 ({text}); an area across the antimeridian is "
            "a bounding box with west > east, or a MultiPolygon cut at 180"
        )


def _check_shape(part: BaseGeometry) -> None:
    if shapely.get_dimensions(part) < 2 or part.convex_hull.area == 0:
        raise InputError(f"aoi: this {part.geom_type} has no area; buffer it to the area that you want mapped")
    if not part.is_valid:
        why = re.sub(r"\[(\S+) (\S+)\]", r" at lon \1, lat \2", explain_validity(part))
        raise InputError(f"aoi is not a valid {part.geom_type}: {why}; mend it first (QGIS: Fix geometries)")


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
