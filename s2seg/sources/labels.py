"""Labels, raster or vector, as lazy legend codes on a stack's grid."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import dask.array as da
import numpy as np
import numpy.typing as npt
import odc.geo.xr
import shapely
import xarray as xr
from dask.base import tokenize
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from rasterio.errors import RasterioError
from rasterio.warp import transform_bounds, transform_geom
from shapely.geometry.base import BaseGeometry

from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.sources.label_codes import Gathered, UnknownLabelsError, crs_of
from s2seg.sources.label_rasters import RasterLabels, RasterOnGrid, raster_extent
from s2seg.sources.label_vectors import VectorLabels, VectorOnGrid, vector_extent

LabelSource = RasterLabels | VectorLabels

__all__ = ["LabelSource", "RasterLabels", "VectorLabels", "footprint", "read_labels"]

_LON_LAT = "EPSG:4326"
_PATCH, _PATCHES = 64, 4
"""Side of the patches that are read early, in pixels, and how many of them along each side of the overlap."""
_SCAN = 1024


class OnGrid(Protocol):
    """Labels seen through a grid."""

    @property
    def extent(self) -> tuple[CRS, tuple[float, float, float, float]]:
        """CRS and bounds of the labels."""
        ...

    def read(self, rows: slice, cols: slice) -> npt.NDArray[np.uint8]:
        """Legend codes (rows, columns) of a part of the grid."""
        ...


def read_labels(
    source: LabelSource,
    geobox: GeoBox,
    legend: Legend,
    *,
    chunks: tuple[tuple[int, ...], tuple[int, ...]] | int,
    remap: Mapping[Any, Any] | None = None,
) -> xr.DataArray:
    """Bring labels onto a grid, lazily; the result does not depend on the chunks, and no class is invented.

    Labels finer than the grid are translated to legend codes first, so that merged classes vote together; then the
    majority of each pixel's area wins (nodata has no vote; the class at the centre wins a tie, else the first in the
    legend). Coarser labels, and those of the same resolution, are read by nearest. Features are burned in order.

    A few patches are read at once, so that most mistakes show here and not in hours of computing.

    Parameters
    ----------
    source
        Where the labels are.
    geobox
        The grid, such as ``stack.odc.geobox``.
    legend
        The classes to end up with.
    chunks
        Pixels on a side of a chunk, or the chunks of (y, x), such as ``scene.data.chunks[-2:]``.
    remap
        Source value (code, or class name for features) -> legend code or class name, or None to drop it. What is not
        mapped must be a code of the legend already (or, for features, a name). A file's own nodata stays nodata,
        whatever the remap says.

    Returns
    -------
    DataArray
        (y, x) uint8 legend codes, ``legend.nodata`` where there is no label; one dask task per chunk.

    Raises
    ------
    InputError
        For a file that cannot be opened, has no CRS, holds floats or undeclared colours, does not overlap the grid or
        has no label on it; for values that neither legend nor remap explains (all on the grid, or where the first one
        is met only when computed, all of the chunk).
    ReadError
        When computed, for pixels that cannot be read.
    """
    reader = _on_grid(source, geobox, legend, remap)
    rows, cols = _overlap(reader, geobox, source.href)
    _look_early(reader, rows, cols, legend, source.href)
    data = da.map_blocks(
        _block,
        chunks=da.core.normalize_chunks(chunks, shape=tuple(geobox.shape)),
        dtype=np.uint8,
        meta=np.empty((0, 0), np.uint8),
        name=f"labels-{tokenize(source, geobox, legend, remap, chunks)}",
        reader=reader,
    )
    return xr.DataArray(data, dims=("y", "x"), coords=odc.geo.xr.xr_coords(geobox, dims=("y", "x")), name="labels")


def footprint(source: LabelSource) -> BaseGeometry:
    """Area that labels may cover: the raster's extent, or the bounds of all features.

    Returns
    -------
    shapely.geometry.base.BaseGeometry
        In lon/lat, edges densified, cut at the antimeridian.

    Raises
    ------
    InputError
        For a file that cannot be used as labels.
    """
    crs, bounds = raster_extent(source) if isinstance(source, RasterLabels) else vector_extent(source)
    area = shapely.box(*bounds)
    dense = shapely.segmentize(area, max(bounds[2] - bounds[0], bounds[3] - bounds[1]) / 32 or 1.0)
    return shapely.geometry.shape(
        transform_geom(crs.to_wkt(), _LON_LAT, shapely.geometry.mapping(dense), antimeridian_cutting=True)
    )


def _on_grid(source: LabelSource, geobox: GeoBox, legend: Legend, remap: Mapping[Any, Any] | None) -> OnGrid:
    if isinstance(source, RasterLabels):
        return RasterOnGrid.open(source, geobox, legend, remap)
    return VectorOnGrid.open(source, geobox, legend, remap)


def _block(reader: OnGrid, block_info: Mapping[Any, Any]) -> npt.NDArray[np.uint8]:
    rows, cols = block_info[None]["array-location"]
    return reader.read(slice(*rows), slice(*cols))


def _overlap(reader: OnGrid, geobox: GeoBox, href: str) -> tuple[slice, slice]:
    """Rows and columns of the grid within the labels' bounds."""
    crs, bounds = reader.extent
    try:
        box = transform_bounds(crs.to_wkt(), str(crs_of(geobox)), *bounds, densify_pts=21)
    except RasterioError:
        return _clamp(None, None, geobox)  # a file that covers the world has no bounds in every projection
    corners = [~geobox.affine @ (x, y) for x in (box[0], box[2]) for y in (box[1], box[3])]
    if not np.isfinite(corners).all():
        return _clamp(None, None, geobox)
    u, v = zip(*corners, strict=True)
    rows, cols = _clamp(v, u, geobox)
    if rows.start >= rows.stop or cols.start >= cols.stop:
        raise InputError(
            f"labels {href} do not overlap the grid: they cover {_lon_lat(crs, bounds)} and the grid "
            f"{_lon_lat(crs_of(geobox), geobox.boundingbox.bbox)} (west, south, east, north)"
        )
    return rows, cols


def _clamp(v: tuple[float, ...] | None, u: tuple[float, ...] | None, geobox: GeoBox) -> tuple[slice, slice]:
    """Whole pixels within the grid; None is all of it."""
    height, width = geobox.shape
    rows, cols = (
        slice(0, n) if at is None else slice(max(0, int(np.floor(min(at)))), min(n, int(np.ceil(max(at)))))
        for at, n in ((v, height), (u, width))
    )
    return rows, cols


def _lon_lat(crs: CRS, bounds: tuple[float, float, float, float]) -> str:
    return ", ".join(f"{value:.4f}" for value in transform_bounds(crs.to_wkt(), _LON_LAT, *bounds, densify_pts=21))


def _look_early(reader: OnGrid, rows: slice, cols: slice, legend: Legend, href: str) -> None:
    """Read patches spread over the overlap; where all are empty, read on until a label is found."""
    try:
        labelled = [bool((reader.read(*patch) != legend.nodata).any()) for patch in _patches(rows, cols)]
        found = any(labelled) or any((reader.read(*part) != legend.nodata).any() for part in _parts(rows, cols))
    except UnknownLabelsError:
        _list_unknown(reader, rows, cols)
        raise
    if not found:
        raise InputError(f"labels {href} have no label on the grid: all {_pixels(rows, cols)} pixels there are nodata")


def _list_unknown(reader: OnGrid, rows: slice, cols: slice) -> None:
    """Raise the error about all unknown values: who adds them to a remap one by one would start many times."""
    unknown = Gathered()
    for part in _parts(rows, cols):
        with unknown.piece():
            reader.read(*part)
    unknown.check()


def _pixels(rows: slice, cols: slice) -> int:
    return (rows.stop - rows.start) * (cols.stop - cols.start)


def _patches(rows: slice, cols: slice) -> Iterator[tuple[slice, slice]]:
    def along(span: slice) -> list[slice]:
        last = max(span.start, span.stop - _PATCH)
        starts = sorted({round(start) for start in np.linspace(span.start, last, _PATCHES)})
        return [slice(start, min(start + _PATCH, span.stop)) for start in starts]

    return ((r, c) for r in along(rows) for c in along(cols))


def _parts(rows: slice, cols: slice) -> Iterator[tuple[slice, slice]]:
    def along(span: slice) -> list[slice]:
        return [slice(start, min(start + _SCAN, span.stop)) for start in range(span.start, span.stop, _SCAN)]

    return ((r, c) for r in along(rows) for c in along(cols))
