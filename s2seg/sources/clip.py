"""Pixels inside an area, as a lazy mask."""

from __future__ import annotations

import dask.array as da
import numpy as np
import numpy.typing as npt
import shapely
from odc.geo.geobox import GeoBox
from rasterio.features import geometry_mask
from shapely.geometry.base import BaseGeometry

from s2seg.sources.stack import epsg_of, project


def needs_clip(aoi: BaseGeometry) -> bool:
    """Whether an area in lon/lat is anything but a bounding box (or two, across the antimeridian)."""
    return not all(shapely.equals(part, shapely.envelope(part)) for part in shapely.get_parts(aoi))


def inside(
    aoi: BaseGeometry, geobox: GeoBox, chunks: tuple[tuple[int, ...], tuple[int, ...]], grow: float = 0
) -> da.Array:
    """Mark the pixels that touch an area.

    Parameters
    ----------
    aoi
        Area in lon/lat.
    geobox
        The grid.
    chunks
        Chunks for (y, x).
    grow
        Metres to widen the area by.

    Returns
    -------
    dask array
        (y, x) bool.
    """
    shape = project(aoi, epsg_of(geobox))
    mask: da.Array = da.map_blocks(
        _inside_block,
        chunks=chunks,
        dtype=bool,
        meta=np.empty((0, 0), bool),
        shape=shape.buffer(grow) if grow else shape,
        geobox=geobox,
    )
    return mask


def _inside_block(
    shape: BaseGeometry, geobox: GeoBox, block_info: dict[object, dict[str, list[tuple[int, int]]]]
) -> npt.NDArray[np.bool_]:
    (top, bottom), (left, right) = block_info[None]["array-location"]
    part = geobox[top:bottom, left:right]
    mask: npt.NDArray[np.bool_] = geometry_mask([shape], part.shape, part.affine, all_touched=True, invert=True)
    return mask
