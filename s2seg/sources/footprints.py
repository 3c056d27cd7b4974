"""Outlines of items in lon/lat, whatever catalogs made of them, cut at the antimeridian."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pystac
import shapely
from shapely.errors import ShapelyError
from shapely.geometry import MultiPolygon, box, shape
from shapely.geometry.base import BaseGeometry

_WORLD = box(-180, -90, 180, 90)


def footprint(item: pystac.Item) -> BaseGeometry | None:
    """Outline an item in lon/lat, cut at the antimeridian; None where it has no usable geometry."""
    geometry = read_geometry(item.geometry)
    if geometry is None or geometry.is_empty:
        return outline(item.bbox) if item.bbox else None
    return _cut(geometry)


def outline(bbox: Sequence[float]) -> BaseGeometry:
    """Turn a STAC bbox (4 or 6 numbers; west > east crosses the antimeridian) into a geometry."""
    west, south = bbox[0], bbox[1]
    east, north = bbox[len(bbox) // 2], bbox[len(bbox) // 2 + 1]
    if west <= east:
        return box(west, south, east, north)
    return MultiPolygon([box(west, south, 180, north), box(-180, south, east, north)])


def read_geometry(geometry: Any) -> BaseGeometry | None:
    """Read a GeoJSON geometry as a valid, flat one; None where there is none, or it cannot be read."""
    if not geometry:
        return None
    try:
        return shapely.make_valid(shapely.force_2d(shape(geometry)))
    except (ShapelyError, ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None


def _cut(geometry: BaseGeometry) -> BaseGeometry:
    """Bring each part within -180 and 180; a part wider than half the globe crossed the antimeridian unseen."""
    west, _, east, _ = geometry.bounds
    if east - west <= 180 and east <= 180 and west >= -180:
        return geometry
    return shapely.union_all([_cut_part(part) for part in shapely.get_parts(geometry)])


def _cut_part(part: BaseGeometry) -> BaseGeometry:
    west, _, east, _ = part.bounds
    if east - west > 180 and west >= -180 and east <= 180:
        part = shapely.transform(part, lambda xy: np.column_stack((xy[:, 0] % 360, xy[:, 1])))
        part = part if part.is_valid else shapely.make_valid(part)
    turns = [shapely.transform(part, partial(np.add, [[shift, 0]])) for shift in (-360, 0, 360)]
    return shapely.union_all([shapely.intersection(turn, _WORLD) for turn in turns])
