"""Vector labels onto a grid: features burned in fixed blocks.

Where an edge runs exactly through a pixel's centre or corner, GDAL's rounding decides, and that depends on the window
that is burned. So features are always burned in the same blocks, counted from the grid's origin, and chunks are cut
from these: a pixel does not depend on the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import shapely
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from rasterio.features import rasterize
from rasterio.warp import transform_bounds

from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.sources.label_codes import Gathered, UnknownLabelsError, code_table, crs_of, plain
from s2seg.sources.stamps import stamp

if TYPE_CHECKING:
    from geopandas import GeoDataFrame

_BLOCK = 512
"""Side of the blocks in which features are burned, in pixels."""
_PARTS = 64
"""Edges are cut to this part of the grid's side before they are reprojected: a straight line there is a curve here."""

_PIXELS = Affine(1, 0, 1, 0, -1, 0)
"""Where features are burned: pixels as units, y up, x from 1 (GDAL takes a mere flip for "no position at all")."""


@dataclass(frozen=True)
class VectorLabels:
    """Labels as features with a class column.

    Parameters
    ----------
    href
        GeoPackage, GeoJSON, GeoParquet (``.parquet``), shapefile, or whatever GDAL reads.
    column
        Column that holds a class name or a code; features without a value stay nodata.
    layer
        Layer name, for a file with more than one.
    all_touched
        Whether a feature takes every pixel that it touches, or those alone whose centre it covers.
    priority
        Values of ``column`` in the order in which they are burned: where features overlap, the value last in the list
        wins, and any listed one over those that are not. By default, later features win.
    """

    href: str
    column: str
    layer: str | None = None
    all_touched: bool = False
    priority: tuple[str | int, ...] | None = None


@dataclass(frozen=True)
class _Info:
    crs: CRS
    bounds: tuple[float, float, float, float]
    layer: str | None


@dataclass(frozen=True)
class VectorOnGrid:
    """Vector labels seen through a grid; picklable, reads the features of each part from the file.

    Parameters
    ----------
    source
        What to read; its layer is settled.
    crs, bounds
        Of the file.
    geobox
        The grid.
    legend
        Names the classes in errors, and says what nodata is.
    values
        Source value -> legend code.
    """

    source: VectorLabels
    crs: CRS
    bounds: tuple[float, float, float, float]
    layer: str | None
    geobox: GeoBox
    legend: Legend
    values: Mapping[int | str, int]

    @classmethod
    def open(
        cls, source: VectorLabels, geobox: GeoBox, legend: Legend, remap: Mapping[Any, Any] | None
    ) -> VectorOnGrid:
        """Check the file and settle how it is read.

        Raises
        ------
        InputError
            For a file, layer or column that is not there, no features, no CRS, or a priority that means no class.
        """
        values = code_table(legend, remap)
        idle = [value for value in source.priority or () if plain(value) not in values]
        if idle:
            raise InputError(f"labels {source.href}: priority names {idle[0]!r}, which is in neither legend nor remap")
        info = _inspect(source)
        return cls(source, info.crs, info.bounds, info.layer, geobox, legend, values)

    @property
    def extent(self) -> tuple[CRS, tuple[float, float, float, float]]:
        """CRS and bounds of the features."""
        return self.crs, self.bounds

    def read(self, rows: slice, cols: slice) -> npt.NDArray[np.uint8]:
        """Legend codes (rows, columns) uint8 of a part of the grid.

        Raises
        ------
        UnknownLabelsError
            For values that neither the legend nor the remap explains.
        InputError
            For a file that cannot be read.
        """
        out, unknown = np.empty((rows.stop - rows.start, cols.stop - cols.start), dtype=np.uint8), Gathered()
        for top, of_rows, to_rows in _blocks(rows):
            for left, of_cols, to_cols in _blocks(cols):
                with unknown.piece():
                    out[to_rows, to_cols] = self._burn(top, left)[of_rows, of_cols]
        unknown.check()
        return out

    def _burn(self, top: int, left: int) -> npt.NDArray[np.uint8]:
        """Legend codes of the block whose first pixel is (top, left)."""
        frame = _features(self.source, self.layer, self._around(top, left))
        frame = frame[frame[self.source.column].notna() & frame.geometry.notna() & ~frame.geometry.is_empty]
        values = [plain(value) for value in frame[self.source.column]]
        lost = {value for value in values if value not in self.values}
        if lost:
            raise UnknownLabelsError(self.source.href, lost, self.legend)
        shapes = self._to_pixels(np.asarray(frame.geometry.array), top, left)
        burns = [(shapes[i], self.values[values[i]]) for i in self._order(values) if not shapes[i].is_empty]
        out = np.full((_BLOCK, _BLOCK), self.legend.nodata, dtype=np.uint8)
        if burns:
            rasterize(burns, out=out, transform=_PIXELS, all_touched=self.source.all_touched)
        return out

    def _order(self, values: list[int | str]) -> list[int]:
        """Which feature to burn first, and so on."""
        rank = {plain(value): i for i, value in enumerate(self.source.priority or ())}
        return sorted(range(len(values)), key=lambda i: rank.get(values[i], -1))

    def _around(self, top: int, left: int) -> tuple[float, float, float, float]:
        """Bounds in the file's CRS of a block and one pixel around it."""
        block = GeoBox((_BLOCK, _BLOCK), self.geobox.affine @ Affine.translation(left, top), self.geobox.crs)
        return _reproject_bounds(block.pad(1), self.crs)

    def _to_pixels(self, shapes: npt.NDArray[Any], row: int, col: int) -> npt.NDArray[Any]:
        """Valid geometries in the coordinates of :data:`_PIXELS`, counted from pixel (row, col)."""
        areas = shapely.get_dimensions(shapes) == 2
        invalid = areas & ~shapely.is_valid(shapes)
        shapes = shapes.copy()
        shapes[invalid] = shapely.make_valid(shapes[invalid], method="structure", keep_collapsed=False)
        if self.crs != self.geobox.crs:
            shapes = self._reproject(shapes)
        to_pixel = ~self.geobox.affine

        def move(xy: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
            u, v = to_pixel @ (xy[:, 0], xy[:, 1])
            return np.column_stack([u - col + 1, row - v])

        moved: npt.NDArray[Any] = shapely.transform(shapes, move)
        return moved

    def _reproject(self, shapes: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Bring geometries to the grid's CRS; what lies far outside, where projections end, is cut off before."""
        left, bottom, right, top = _reproject_bounds(self.geobox.pad(2), self.crs)
        side = max(right - left, top - bottom)
        shapes = shapely.clip_by_rect(shapes, left - side, bottom - side, right + side, top + side)
        shapes = shapely.segmentize(shapes, side / _PARTS)
        project = self.crs.transformer_to_crs(crs_of(self.geobox))
        moved: npt.NDArray[Any] = shapely.transform(shapes, lambda xy: np.column_stack(project(xy[:, 0], xy[:, 1])))
        return moved


def _blocks(span: slice) -> Iterator[tuple[int, slice, slice]]:
    """Blocks along one axis that make up a span: where each starts, which part of it is needed, and where that goes."""
    for start in range(span.start // _BLOCK * _BLOCK, span.stop, _BLOCK):
        first, last = max(start, span.start), min(start + _BLOCK, span.stop)
        yield start, slice(first - start, last - start), slice(first - span.start, last - span.start)


def vector_extent(source: VectorLabels) -> tuple[CRS, tuple[float, float, float, float]]:
    """CRS and bounds of a label file.

    Raises
    ------
    InputError
        For a file that cannot be used as labels.
    """
    info = _inspect(source)
    return info.crs, info.bounds


def _reproject_bounds(geobox: GeoBox, crs: CRS) -> tuple[float, float, float, float]:
    box = geobox.boundingbox.bbox
    if crs == geobox.crs:
        return box
    bounds: tuple[float, float, float, float] = transform_bounds(str(geobox.crs), crs.to_wkt(), *box, densify_pts=21)
    return bounds


def _inspect(source: VectorLabels) -> _Info:
    """Look at a file's header, and refuse what cannot be labels."""
    if "://" not in source.href and not source.href.startswith("/vsi") and not Path(source.href).exists():
        raise InputError(f"labels {source.href} do not exist")
    columns, crs, bounds, count, layer = _header(source)
    if source.column not in columns:
        raise InputError(f"labels {source.href} have no column {source.column!r}; choose {', '.join(columns)}")
    if count == 0 or bounds is None or not np.isfinite(bounds).all():
        raise InputError(f"labels {source.href} have no features")
    if crs is None:
        raise InputError(f"labels {source.href} have no CRS; give them one: ogr2ogr -a_srs EPSG:CODE OUT {source.href}")
    left, bottom, right, top = (float(value) for value in bounds)
    return _Info(CRS(crs), (left, bottom, right, top), layer)


def _header(source: VectorLabels) -> tuple[list[str], Any, Any, int, str | None]:
    """Columns, CRS, bounds, number of features and layer."""
    with _reading(source.href):
        if _is_parquet(source.href):
            frame = _parquet(source.href, stamp(source.href))
            columns = [str(c) for c in frame.columns if c != frame.geometry.name]
            return columns, frame.crs and frame.crs.to_wkt(), frame.total_bounds, len(frame), None
        import pyogrio

        layers = [str(name) for name, kind in pyogrio.list_layers(source.href) if kind is not None]
        if source.layer is not None and source.layer not in layers:
            raise InputError(f"labels {source.href} have no layer {source.layer!r}; choose {', '.join(layers)}")
        if source.layer is None and len(layers) != 1:
            listed = f"several layers; name one with `layer`: {', '.join(layers)}" if layers else "no geometries"
            raise InputError(f"labels {source.href} have {listed}")
        layer = source.layer or layers[0]
        info = pyogrio.read_info(source.href, layer=layer, force_feature_count=True, force_total_bounds=True)
        return list(info["fields"]), info["crs"], info["total_bounds"], int(info["features"]), layer


def _features(source: VectorLabels, layer: str | None, bounds: tuple[float, float, float, float]) -> GeoDataFrame:
    """Features that touch ``bounds``, with the class column, in the file's order."""
    with _reading(source.href):
        if _is_parquet(source.href):
            frame = _parquet(source.href, stamp(source.href))
            return frame.iloc[np.sort(frame.sindex.query(shapely.box(*bounds)))]
        import pyogrio

        # a spatial index may answer in its own order, but later features win
        return pyogrio.read_dataframe(
            source.href, layer=layer, columns=[source.column], bbox=bounds, force_2d=True, fid_as_index=True
        ).sort_index()


def _is_parquet(href: str) -> bool:
    return href.lower().endswith((".parquet", ".geoparquet"))


@lru_cache(maxsize=1)
def _parquet(href: str, _stamp: tuple[int, int] | None) -> GeoDataFrame:
    """Read a whole GeoParquet, once until it changes: few writers add the index that partial reads need."""
    import geopandas

    return geopandas.read_parquet(href)


@contextmanager
def _reading(href: str) -> Iterator[None]:
    """Whatever the vector libraries say becomes one line."""
    try:
        import geopandas  # noqa: F401  pyogrio gives its frames
        import pyarrow
        import pyogrio
    except ImportError as error:
        raise InputError(f"vector labels need {error.name}: pip install 's2seg[train]'") from error
    try:
        yield
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, pyarrow.ArrowException, OSError) as error:
        raise InputError(f"labels {href} cannot be read: {' '.join(str(error).split())}") from error
