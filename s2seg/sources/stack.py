"""Items -> one lazy (time, band, y, x) array of harmonised uint16 digital numbers on one grid."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import dask.array as da
import numpy as np
import odc.geo.xr
import pandas as pd
import pystac
import shapely
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import CRS, Transformer
from pyproj.exceptions import CRSError
from rasterio.warp import transform_bounds
from shapely.geometry.base import BaseGeometry
from stackstac.prepare import ASSET_TABLE_DT
from stackstac.raster_spec import RasterSpec
from stackstac.to_dask import items_to_dask

from s2seg.errors import InputError, MissingBandError, S2SegWarning
from s2seg.sources.ahead import AssetReader, Bounds, places
from s2seg.sources.footprints import footprint
from s2seg.sources.items import cloud_cover, epsg, sensing_time, sign_path
from s2seg.sources.radiometry import Offset, decide_offsets
from s2seg.sources.reader import AssetRef

Chunks = int | tuple[int, ...]
Resampling = Literal["nearest", "bilinear"]

_LON_LAT = 4326


def stack(
    items: Sequence[pystac.Item],
    geobox: GeoBox,
    bands: Sequence[str],
    *,
    chunksize: Chunks | tuple[Chunks, Chunks] = 1024,
    time_chunks: Chunks = -1,
    resampling: Resampling = "nearest",
    offsets: Mapping[str, Offset] | None = None,
) -> xr.DataArray:
    """Stack items lazily on one grid; no pixel is read until the result is computed or written.

    Bands whose grid nests with ``geobox`` are read pixel for pixel (coarser ones repeated or interpolated, finer ones
    averaged); the rest is warped. Radiometry is harmonised on the way, so that reflectance = DN / 10000 for every date.

    Parameters
    ----------
    items
        Normalised items, as :func:`s2seg.search` returns them.
    geobox
        The grid; :func:`geobox_for` makes one from an area.
    bands
        Canonical names, such as ``["blue", "green", "red", "nir", "scl"]``; ``scl`` must come last. Its codes are kept
        as they are.
    chunksize
        Pixels on a side of a chunk, or explicit chunks for (y, x).
    time_chunks
        Dates per chunk; all by default, so that a composite needs no shuffle.
    resampling
        How coarser or unaligned pixels reach the grid. SCL is always nearest.
    offsets
        Radiometric offsets by item id; by default :func:`~s2seg.sources.radiometry.decide_offsets` decides, which reads
        a thumbnail of those items whose metadata are known to err.

    Returns
    -------
    DataArray
        (time, band, y, x) uint16, nodata 0, y descending; coordinates ``item_id``, ``platform``, ``cloud_cover`` (%)
        along time; one chunk holds all reflectance bands, and one ``scl``.

    Raises
    ------
    InputError
        If there are no items or bands, the grid is not north up or its CRS has no EPSG code, or another argument
        makes no sense.
    MissingBandError
        If no item has a band. Where only some lack it, they stay empty for that band and a warning names them.
    ReadError
        When computed, for an asset that cannot be read.
    """
    if not items:
        raise InputError("nothing to stack: the list of items is empty")
    _check_arguments(bands, geobox, chunksize, resampling)
    items = sorted(items, key=lambda item: (sensing_time(item), item.id))
    _check_bands(items, bands)
    if offsets is None:
        offsets = decide_offsets(items)
    elif lacking := [item.id for item in items if item.id not in offsets]:
        raise InputError(f"offsets has no entry for item {lacking[0]}; leave offsets out, and they are decided")
    spec = _raster_spec(geobox)
    chunks = _pair(chunksize)
    groups = [[b for b in bands if b != "scl"], [b for b in bands if b == "scl"]]
    arrays = [
        _lazy(_asset_table(items, group, geobox, offsets, resampling), spec, (time_chunks, -1, *chunks))
        for group in groups
        if group
    ]
    return _label(da.concatenate(arrays, axis=1), items, bands, geobox)


def _check_arguments(bands: Sequence[str], geobox: GeoBox, chunksize: object, resampling: str) -> None:
    if isinstance(bands, str) or not bands:
        raise InputError(f"bands must be a list such as ['red', 'nir', 'scl'], not {bands!r}")
    if "scl" in bands[:-1]:
        raise InputError("put scl last in the list of bands")
    if not (geobox.affine.b == geobox.affine.d == 0 and geobox.affine.a > 0 > geobox.affine.e):
        raise InputError("the grid must be north up, its first row the northernmost; geobox_for makes such grids")
    sides = chunksize if isinstance(chunksize, tuple) else (chunksize,)
    if any(isinstance(side, int) and side < 1 and side != -1 for side in sides):
        raise InputError(f"chunksize {chunksize!r} is not a number of pixels; give at least 1, or -1 for one chunk")
    if resampling not in get_args(Resampling):
        raise InputError(f"unknown resampling {resampling!r}; choose {' or '.join(get_args(Resampling))}")


def aligned_chunks(items: Sequence[pystac.Item], geobox: GeoBox, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut a grid where the files of its items are cut, so that no block of a file is decoded for two chunks.

    Parameters
    ----------
    items
        Normalised items; the one with the most neighbours on its lattice counts. Files of Sentinel-2 are tiled from
        their upper left corner, in blocks of a power of two.
    geobox
        The grid.
    side
        Pixels on a side of a chunk; a power of two holds whole blocks.

    Returns
    -------
    tuple
        Chunks along y and x; the first and the last may be smaller.
    """
    corners = Counter(_corner(item, geobox) for item in items)
    (row, column), _ = corners.most_common(1)[0]
    return _cut(geobox.shape.y, row % side, side), _cut(geobox.shape.x, column % side, side)


def _corner(item: pystac.Item, geobox: GeoBox) -> tuple[int, int]:
    """Row and column of an item's upper left corner on the grid; of the grid's own where they do not nest."""
    for asset in item.assets.values():
        place = asset.extra_fields.get("proj:transform")
        if place and epsg(item) == epsg_of(geobox):
            column, row = ~geobox.affine @ (place[2], place[5])
            return round(row), round(column)
    return 0, 0


def _cut(size: int, first: int, side: int) -> tuple[int, ...]:
    edges = np.unique([0, *range(first, size, side), size])
    return tuple(np.diff(edges).tolist())


def _pair(chunksize: Chunks | tuple[Chunks, Chunks]) -> tuple[Any, Any]:
    if isinstance(chunksize, int):
        return chunksize, chunksize
    y, x = chunksize
    return y, x


def _check_bands(items: Sequence[pystac.Item], bands: Sequence[str]) -> None:
    for band in bands:
        lacking = [item for item in items if band not in item.assets]
        if len(lacking) == len(items):
            raise MissingBandError(band, lacking[0].id, sorted(lacking[0].assets))
        if lacking:
            warnings.warn(
                f"{len(lacking)} of {len(items)} items have no band {band!r} and stay empty there: "
                f"{', '.join(item.id for item in lacking[:3])}{' ...' if len(lacking) > 3 else ''}",
                S2SegWarning,
                stacklevel=3,
            )


def _raster_spec(geobox: GeoBox) -> RasterSpec:
    code = epsg_of(geobox)
    box = geobox.boundingbox
    return RasterSpec(
        epsg=code, bounds=(box.left, box.bottom, box.right, box.top), resolutions_xy=(geobox.affine.a, -geobox.affine.e)
    )


def epsg_of(geobox: GeoBox) -> int:
    """EPSG code of a grid.

    Raises
    ------
    InputError
        If its CRS has none.
    """
    code = geobox.crs.to_epsg() if geobox.crs is not None else None
    if code is None:
        raise InputError(f"the grid needs a CRS with an EPSG code, not {geobox.crs}")
    return int(code)


def _asset_table(
    items: Sequence[pystac.Item],
    bands: Sequence[str],
    geobox: GeoBox,
    offsets: Mapping[str, Offset],
    resampling: Resampling,
) -> np.ndarray[Any, Any]:
    """stackstac's table (items, bands): what to read, and where it lies on the target grid."""
    table = np.full((len(items), len(bands)), None, dtype=ASSET_TABLE_DT)
    for i, item in enumerate(items):
        for j, band in enumerate(bands):
            asset = item.assets.get(band)
            if asset is None:
                continue
            subtract = 0 if band == "scl" else offsets[item.id].subtract
            ref = AssetRef(
                item.id, band, asset.href, subtract, resampling, sign_path(item), epsg(item), _corners(asset)
            )
            table[i, j] = ref, _asset_bounds(item, asset, geobox), (1, 0)
    return table


def _asset_bounds(item: pystac.Item, asset: pystac.Asset, geobox: GeoBox) -> Bounds:
    """Bounds in the target CRS, a little too wide rather than too narrow."""
    own, code, corners = epsg(item), epsg_of(geobox), _corners(asset)
    if own is None or len(corners) < 2:
        area = footprint(item)
        if area is None:
            box = geobox.boundingbox
            return box.left, box.bottom, box.right, box.top
        left, bottom, right, top = transform_bounds(_LON_LAT, code, *area.bounds, densify_pts=21)
        # a footprint follows the data; the raster around it may reach further
        return left - 10_000, bottom - 10_000, right + 10_000, top + 10_000
    (left, top), (right, bottom) = corners
    if own == code:
        return left, bottom, right, top
    bounds: Bounds = transform_bounds(own, code, left, bottom, right, top, densify_pts=21)
    return bounds


def _corners(asset: pystac.Asset) -> tuple[tuple[float, float], ...]:
    """Upper left and lower right corner (x, y) in the asset's own CRS, as far as its metadata tell."""
    affine, shape = asset.extra_fields.get("proj:transform"), asset.extra_fields.get("proj:shape")
    if affine is None:
        return ()
    to_map = Affine(*affine[:6])
    return (to_map @ (0, 0), *([to_map @ (shape[1], shape[0])] if shape else []))


def _lazy(table: np.ndarray[Any, Any], spec: RasterSpec, chunks: tuple[Any, ...]) -> da.Array:
    lazy: da.Array = items_to_dask(
        _in_batches(table, chunks[0]),
        spec,
        chunksize=chunks,
        dtype=np.dtype("uint16"),
        fill_value=np.uint16(0),
        rescale=False,
        reader=AssetReader,
    )
    return lazy


def _in_batches(table: np.ndarray[Any, Any], time_chunks: Chunks) -> np.ndarray[Any, Any]:
    """Give each asset of stackstac's table its place among those that are read with it: one chunk of dates."""
    (sizes,) = da.core.normalize_chunks(time_chunks, (len(table),))
    for rows in np.split(table, np.cumsum(sizes)[:-1]):
        held = rows["url"].astype(bool)
        rows["url"][held] = places(rows["url"][held], rows["bounds"][held].tolist())
    return table


def _label(data: da.Array, items: Sequence[pystac.Item], bands: Sequence[str], geobox: GeoBox) -> xr.DataArray:
    times = (
        pd.to_datetime([sensing_time(item) for item in items], utc=True).tz_localize(None).to_numpy("datetime64[ns]")
    )
    clouds = [cloud_cover(item) for item in items]
    grid = odc.geo.xr.xr_coords(geobox, dims=("y", "x"))
    return (
        xr.DataArray(data, dims=("time", "band", "y", "x"), coords=grid)
        .assign_coords(
            time=times,
            band=list(bands),
            item_id=("time", [item.id for item in items]),
            platform=("time", [str(item.properties.get("platform", "")) for item in items]),
            cloud_cover=("time", np.array([np.nan if c is None else c for c in clouds], dtype=np.float32)),
        )
        .rename("stack")
    )


def geobox_for(
    aoi: BaseGeometry, resolution: float, items: Iterable[pystac.Item] = (), crs: str | int | None = None
) -> GeoBox:
    """Make the grid that covers an area.

    Parameters
    ----------
    aoi
        Area in lon/lat, as :func:`~s2seg.sources.aoi.parse_aoi` returns it.
    resolution
        Pixel size in metres.
    items
        Where the resolution allows it, pixel edges are put on the edges of these items' pixels, so that no resampling
        is needed.
    crs
        A projected CRS with an EPSG code; by default the UTM zone, of those of the items, that holds most of the area.

    Raises
    ------
    InputError
        For a resolution that is not positive, or a CRS that is unknown, geographic or not in metres.
    """
    if not isinstance(resolution, int | float | np.number) or not 0 < resolution < np.inf:
        raise InputError(f"resolution must be one positive number of metres, as pixels are square, not {resolution!r}")
    items = list(items)
    code = _utm_for(aoi, items) if crs is None else _projected(crs)
    left, bottom, right, top = project(aoi, code).bounds
    x0, y0 = _anchor(items, code, resolution)
    # a tolerance of a thousandth of a pixel: bounds on a pixel edge must not gain a row by rounding
    col0, col1 = np.floor((left - x0) / resolution + 1e-3), np.ceil((right - x0) / resolution - 1e-3)
    row0, row1 = np.floor((y0 - top) / resolution + 1e-3), np.ceil((y0 - bottom) / resolution - 1e-3)
    shape = max(int(row1 - row0), 1), max(int(col1 - col0), 1)
    origin = Affine(resolution, 0, x0 + col0 * resolution, 0, -resolution, y0 - row0 * resolution)
    return GeoBox(shape, origin, f"EPSG:{code}")


def _projected(crs: str | int) -> int:
    try:
        parsed = CRS.from_user_input(crs)
    except CRSError as error:
        raise InputError(f"unknown CRS {crs!r}: give an EPSG code such as EPSG:32633") from error
    code = parsed.to_epsg()
    if code is None or not parsed.is_projected:
        raise InputError(f"CRS {crs!r} must be projected and have an EPSG code, such as EPSG:32633")
    if (unit := parsed.axis_info[0]).unit_conversion_factor != 1:
        raise InputError(f"CRS {crs!r} is in {unit.unit_name}, not in metres: choose another")
    return code


def project(aoi: BaseGeometry, code: int) -> BaseGeometry:
    """Reproject an area from lon/lat with its edges densified: a straight line there is a curve on the map."""
    transformer = Transformer.from_crs(_LON_LAT, code, always_xy=True)
    dense = shapely.segmentize(aoi, 0.02)
    return shapely.transform(dense, lambda xy: np.column_stack(transformer.transform(xy[:, 0], xy[:, 1])))


def _utm_for(aoi: BaseGeometry, items: Sequence[pystac.Item]) -> int:
    """The zone with the largest share of the area; only zones that the items come in, if there are items."""
    shares: defaultdict[int, float] = defaultdict(float)
    west, south, east, north = aoi.bounds
    for zone in range(int(np.floor((west + 180) // 6)), int(np.floor((east + 180 - 1e-9) // 6)) + 1):
        strip = shapely.box(zone * 6 - 180, south, zone * 6 - 174, north)
        part = aoi.intersection(strip)
        if not part.is_empty:
            shares[(32600 if part.centroid.y >= 0 else 32700) + zone % 60 + 1] += part.area
    present = Counter(code for item in items if (code := epsg(item)) is not None)
    if not present:
        return max(shares, key=shares.__getitem__)
    covered = {code: shares.get(code, 0.0) for code in present}
    return max(covered, key=lambda code: (covered[code], present[code]))


def _anchor(items: Sequence[pystac.Item], code: int, resolution: float) -> tuple[float, float]:
    """A pixel corner of the sensor's own grid, if pixels of ``resolution`` can nest with it; else the CRS's origin."""
    for item in items:
        if epsg(item) != code:
            continue
        transforms = [
            a.extra_fields["proj:transform"] for a in item.assets.values() if "proj:transform" in a.extra_fields
        ]
        if transforms:
            finest = min(transforms, key=lambda t: t[0])
            ratio = max(resolution / finest[0], finest[0] / resolution)
            if abs(ratio - round(ratio)) < 1e-6:
                return finest[2], finest[5]
    return 0.0, 0.0
