"""Static STAC catalogs of single-band COGs, written as the public Sentinel-2 archives write theirs."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
import rasterio
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.shutil import copy as copy_raster
from shapely.geometry import Polygon, box, mapping

from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.testing.landscape import LEGEND, make_landscape
from s2seg.testing.scene import BANDS_10M, Scene, make_scene, swath_edge

COLLECTION = "sentinel-2-l2a"
_CRS = "EPSG:32633"
_LATITUDE = 46.0
_SEAM = (550020.0, 5100000.0)  # west end of the line where tiles 33TWM (north) and 33TWL (south) meet

# canonical name -> ESA's name, common name, centre wavelength in micrometres
_BANDS: dict[str, tuple[str, str, float]] = {
    "coastal": ("B01", "coastal", 0.443),
    "blue": ("B02", "blue", 0.49),
    "green": ("B03", "green", 0.56),
    "red": ("B04", "red", 0.665),
    "rededge1": ("B05", "rededge", 0.704),
    "rededge2": ("B06", "rededge", 0.74),
    "rededge3": ("B07", "rededge", 0.783),
    "nir": ("B08", "nir", 0.842),
    "nir08": ("B8A", "nir08", 0.865),
    "nir09": ("B09", "nir09", 0.945),
    "swir16": ("B11", "swir16", 1.61),
    "swir22": ("B12", "swir22", 2.19),
    "scl": ("SCL", "", 0.0),
}
_EXTENSIONS = [
    "https://stac-extensions.github.io/eo/v1.1.0/schema.json",
    "https://stac-extensions.github.io/grid/v1.1.0/schema.json",
    "https://stac-extensions.github.io/projection/v2.0.0/schema.json",
    "https://stac-extensions.github.io/raster/v1.1.0/schema.json",
    "https://stac-extensions.github.io/view/v1.0.0/schema.json",
]


@dataclass(frozen=True)
class SyntheticRegion:
    """A region made by :func:`synthetic_catalog`.

    Parameters
    ----------
    catalog
        Path of ``catalog.json``.
    truth
        Path of the true land cover, a COG on `geobox` with the codes of `legend`.
    bbox
        West, south, east, north in lon/lat: the largest box that lies inside the region.
    legend
        What the codes mean.
    dates
        One per pass, ``YYYY-MM-DD``.
    geobox
        The region's grid.
    """

    catalog: Path
    truth: Path
    bbox: tuple[float, float, float, float]
    legend: Legend
    dates: tuple[str, ...]
    geobox: GeoBox

    @property
    def crs(self) -> str:
        """The grid's CRS, such as ``EPSG:32633``."""
        return str(self.geobox.crs)


def synthetic_catalog(
    folder: str | Path,
    *,
    size: int = 1024,
    resolution: float = 10,
    dates: Sequence[str] = ("2021-04-21", "2021-06-15", "2021-08-04", "2021-09-18"),
    cloud_cover: Sequence[float] = (0.08, 0.3, 0.03, 0.15),
    baselines: Sequence[str] = ("04.00", "03.01"),
    seed: int = 0,
) -> SyntheticRegion:
    """Write a Sentinel-2-like region, seen on several dates in two overlapping tiles, and its true land cover.

    The last of three or more dates was seen only in part: the swath's edge crosses the region. From baseline 04.00 on,
    DN carry +1000, as in Planetary Computer, and no flag says whether that was undone.

    Parameters
    ----------
    folder
        Where ``catalog.json`` and ``land_cover.tif`` go; made if missing.
    size
        Pixels along each side, even, at least 128.
    resolution
        Metres per pixel of the sharp bands; the others have twice that.
    dates
        One pass each, ``YYYY-MM-DD``; they decide the season.
    cloud_cover
        Share under clouds per date, 0 to 1; repeated if shorter than `dates`.
    baselines
        Processing baseline per date; repeated if shorter than `dates`.
    seed
        The same seed gives the same bytes of pixels.

    Raises
    ------
    InputError
        For an odd or tiny `size`.
    """
    if size % 2 or size < 128:
        raise InputError(f"size {size} of a synthetic region must be even and at least 128")
    folder = Path(folder)
    land = make_landscape(size, resolution, seed)
    top = _SEAM[1] + resolution * (size // 2)
    geobox = _grid((size, size), resolution, (_SEAM[0], top), _CRS)
    truth = write_asset(folder / "land_cover.tif", land.land_cover, _CRS, geobox.affine, legend=LEGEND)

    items = []
    for i, date in enumerate(dates):
        when = dt.datetime.fromisoformat(date).replace(hour=10, minute=0, second=31, tzinfo=dt.UTC)
        cut = len(dates) > 2 and i == len(dates) - 1
        cover = cloud_cover[i % len(cloud_cover)]
        scene = make_scene(land, when, cloud_cover=cover, latitude=_LATITUDE, cut=cut, seed=seed * 1000 + i)
        platform, baseline = f"sentinel-2{'ab'[i % 2]}", baselines[i % len(baselines)]
        items += [_write_tile(folder, tile, scene, when, platform, baseline, cut) for tile in _tiles(geobox)]
    catalog = _write_catalog(folder, items, "Synthetic Sentinel-2 scenes with known land cover")
    return SyntheticRegion(catalog, truth, _inner_bbox(geobox), LEGEND, tuple(dates), geobox)


@dataclass(frozen=True)
class _Tile:
    """Rows of the region that one MGRS tile holds."""

    name: str
    first: int
    last: int
    geobox: GeoBox
    delay: dt.timedelta  # a pass goes south: the southern tile is sensed a little later


def _tiles(region: GeoBox) -> list[_Tile]:
    size, overlap = region.shape[0], max(2, region.shape[0] // 32 * 2)
    half = size // 4 * 2
    left, _, _, top = region.boundingbox.bbox

    def tile(name: str, first: int, last: int, seconds: float) -> _Tile:
        step = float(region.resolution.x)
        geobox = _grid((last - first, size), step, (left, top - first * step), str(region.crs))
        return _Tile(name, first, last, geobox, dt.timedelta(seconds=seconds))

    return [tile("33TWM", 0, half + overlap, 0), tile("33TWL", half - overlap, size, 14)]


def _grid(shape: tuple[int, int], resolution: float, origin: tuple[float, float], crs: str) -> GeoBox:
    return GeoBox(shape, Affine(resolution, 0, origin[0], 0, -resolution, origin[1]), crs)


def _write_tile(
    folder: Path, tile: _Tile, scene: Scene, when: dt.datetime, platform: str, baseline: str, cut: bool
) -> pystac.Item:
    offset = 1000 if baseline >= "04.00" else 0
    whole: dict[str, npt.NDArray[Any]] = {**scene.bands, "scl": scene.scl}
    pixels = {}
    for name, dn in whole.items():
        step = 1 if name in BANDS_10M else 2
        pixels[name] = dn[tile.first // step : tile.last // step]
        if name != "scl" and offset:
            pixels[name] = np.where(pixels[name] > 0, pixels[name] + np.uint16(offset), 0).astype(np.uint16)
    classes = np.bincount(pixels["scl"].ravel(), minlength=12)
    seen = max(1, int(classes[1:].sum()))
    item = synthetic_item(
        f"S2{platform[-1].upper()}_{tile.name}_{when:%Y%m%d}_0_L2A",
        when + tile.delay,
        tile.geobox,
        {name: float(tile.geobox.resolution.x) * (1 if name in BANDS_10M else 2) for name in pixels},
        baseline=baseline,
        properties={
            "platform": platform,
            "grid:code": f"MGRS-{tile.name}",
            "eo:cloud_cover": round(100 * float(classes[8:11].sum()) / seen, 3),
            "s2:nodata_pixel_percentage": round(100 * float(classes[0]) / classes.sum(), 3),
            "view:sun_elevation": round(scene.sun.elevation, 3),
            "view:sun_azimuth": round(scene.sun.azimuth, 3),
        },
    )
    if cut:
        footprint = _seen_footprint(tile, scene.bands["blue"].shape[0])
        item.geometry, item.bbox = mapping(footprint), list(footprint.bounds)
    _write_assets(folder, item, pixels)
    return item


def _seen_footprint(tile: _Tile, size: int) -> Polygon:
    """Outline the part of the tile west of the swath's edge, in lon/lat."""
    left, bottom, _, top = tile.geobox.boundingbox.bbox
    north, south = left + tile.geobox.resolution.x * swath_edge(size, [tile.first, tile.last])
    return _to_lonlat(Polygon([(left, top), (north, top), (south, bottom), (left, bottom)]), tile.geobox)


def position_scene(
    folder: str | Path,
    *,
    crs: str = "EPSG:32633",
    origin: tuple[float, float] = (499980.0, 5100000.0),
    shape: tuple[int, int] = (256, 256),
    bands: Mapping[str, float] | None = None,
    dates: Sequence[str] = ("2023-07-01",),
    baseline: str = "03.01",
    boa_offset_applied: bool | None = None,
    tile: str = "33TWL",
) -> Path:
    """Write a catalog whose pixels encode their own position, so that a wrong sample is visible.

    Every asset holds :func:`position_pixels` of its own grid, its place in `bands` and its date's place in `dates`;
    ``scl`` is 4 (vegetation) everywhere. DN are written as they are, whatever `baseline` says.

    Parameters
    ----------
    folder
        Where ``catalog.json`` goes; made if missing.
    crs
        A projected CRS.
    origin
        Projected x and y of the upper left corner.
    shape
        Rows and columns at 10 m.
    bands
        Canonical name -> native resolution in metres; blue, green, red and nir at 10 m by default.
    dates
        One item each, ``YYYY-MM-DD``.
    baseline
        ``s2:processing_baseline``.
    boa_offset_applied
        ``earthsearch:boa_offset_applied``; None leaves it out.
    tile
        MGRS tile, for ids and ``grid:code``.

    Returns
    -------
    Path
        The path of ``catalog.json``.
    """
    folder = Path(folder)
    native = dict.fromkeys(BANDS_10M, 10.0) if bands is None else dict(bands)
    geobox = _grid(shape, 10, origin, crs)
    properties: dict[str, Any] = {"platform": "sentinel-2b", "grid:code": f"MGRS-{tile}", "eo:cloud_cover": 0.0}
    if boa_offset_applied is not None:
        properties["earthsearch:boa_offset_applied"] = boa_offset_applied
    items = []
    for i, date in enumerate(dates):
        when = dt.datetime.fromisoformat(date).replace(hour=10, tzinfo=dt.UTC)
        id_ = f"S2B_{tile}_{when:%Y%m%d}_0_L2A"
        item = synthetic_item(id_, when, geobox, native, baseline=baseline, properties=properties)
        pixels: dict[str, npt.NDArray[Any]] = {
            name: position_pixels(item.assets[name].extra_fields["proj:shape"], band=k, date=i)
            for k, name in enumerate(native)
        }
        if "scl" in pixels:
            pixels["scl"] = np.full(pixels["scl"].shape, 4, np.uint8)
        _write_assets(folder, item, pixels)
        items.append(item)
    return _write_catalog(folder, items, "Pixels that encode their own position")


def position_pixels(shape: Sequence[int], *, band: int = 0, date: int = 0) -> npt.NDArray[np.uint16]:
    """Return (rows, columns) uint16: ``row * columns + column``, shifted per band and date, wrapped to 1..65535."""
    rows, columns = shape
    place = np.arange(rows * columns, dtype=np.int64).reshape(rows, columns)
    return ((place + 7919 * band + 20_011 * date) % 65_535 + 1).astype(np.uint16)


def synthetic_item(
    id_: str,
    when: dt.datetime,
    geobox: GeoBox,
    bands: Mapping[str, float],
    *,
    baseline: str = "03.01",
    properties: Mapping[str, Any] | None = None,
) -> pystac.Item:
    """Describe one tile on one date; nothing is written.

    Parameters
    ----------
    id_
        The item's id, also the name of its folder.
    when
        Sensing time.
    geobox
        The tile's grid at its finest resolution.
    bands
        Canonical name -> native resolution in metres; ``scl`` is a band like others.
    baseline
        ``s2:processing_baseline``; from 04.00 on ``raster:bands`` declares an offset of -0.1.
    properties
        More properties, such as ``grid:code`` or ``eo:cloud_cover``.
    """
    footprint = _to_lonlat(box(*geobox.boundingbox.bbox), geobox)
    item = pystac.Item(
        id_,
        mapping(footprint),
        list(footprint.bounds),
        when,
        {
            "constellation": "sentinel-2",
            "instruments": ["msi"],
            "proj:code": str(geobox.crs),
            "s2:processing_baseline": baseline,
            **(properties or {}),
        },
        stac_extensions=list(_EXTENSIONS),
    )
    for name, resolution in bands.items():
        item.add_asset(name, _asset(name, geobox, resolution, -0.1 if baseline >= "04.00" else 0.0))
    return item


def _asset(name: str, geobox: GeoBox, resolution: float, offset: float) -> pystac.Asset:
    esa, common, wavelength = _BANDS[name]
    step = resolution / geobox.resolution.x
    rows, columns = (round(n / step) for n in geobox.shape)
    affine = _grid(
        (rows, columns), resolution, (geobox.boundingbox.left, geobox.boundingbox.top), str(geobox.crs)
    ).affine
    fields: dict[str, Any] = {"gsd": resolution, "proj:shape": [rows, columns], "proj:transform": list(affine)[:6]}
    if name == "scl":
        fields["raster:bands"] = [{"nodata": 0, "data_type": "uint8", "spatial_resolution": resolution}]
        return pystac.Asset(f"./{esa}.tif", "Scene classification", None, pystac.MediaType.COG, ["data"], fields)
    fields["eo:bands"] = [{"name": name, "common_name": common, "center_wavelength": wavelength}]
    fields["raster:bands"] = [
        {"nodata": 0, "data_type": "uint16", "spatial_resolution": resolution, "scale": 0.0001, "offset": offset}
    ]
    roles = ["data", "reflectance"]
    return pystac.Asset(f"./{esa}.tif", f"{name} ({esa})", None, pystac.MediaType.COG, roles, fields)


def write_asset(
    path: str | Path,
    array: npt.NDArray[Any],
    crs: str,
    transform: Affine,
    *,
    nodata: int = 0,
    legend: Legend | None = None,
) -> Path:
    """Write a (y, x) array as a single-band COG with overviews.

    Parameters
    ----------
    path
        Its folder is made if missing.
    array
        uint8 or uint16.
    crs, transform
        Where the pixels lie.
    nodata
        The stored value of pixels not seen.
    legend
        Makes it a map: a palette, and overviews by majority instead of by mean.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    categorical = legend is not None or array.dtype == np.uint8
    profile = {"height": array.shape[0], "width": array.shape[1], "count": 1, "dtype": array.dtype.name}
    with rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", crs=crs, transform=transform, nodata=nodata, **profile) as raster:
            raster.write(array, 1)
            if legend is not None:
                raster.write_colormap(1, legend.colormap())
        copy_raster(
            memory.name,
            path,
            driver="COG",
            compress="DEFLATE",
            level=1,
            predictor="NO" if categorical else "STANDARD",
            blocksize=256,
            overview_resampling=(Resampling.mode if categorical else Resampling.average).name,
        )
    return path


def _write_assets(folder: Path, item: pystac.Item, pixels: Mapping[str, npt.NDArray[Any]]) -> None:
    def write(name: str) -> None:
        asset = item.assets[name]
        affine = Affine(*asset.extra_fields["proj:transform"])
        path = folder / COLLECTION / item.id / asset.href
        write_asset(path, pixels[name], item.properties["proj:code"], affine)

    with ThreadPoolExecutor() as pool:  # compression lets go of the interpreter
        list(pool.map(write, pixels))


def _write_catalog(folder: Path, items: Sequence[pystac.Item], description: str) -> Path:
    """Write catalog, collection and items with relative links beside the assets."""
    extent = pystac.Extent.from_items(items)
    collection = pystac.Collection(COLLECTION, description, extent, license="Apache-2.0")
    catalog = pystac.Catalog("synthetic", description)
    catalog.add_child(collection)
    collection.add_items(items)
    catalog.normalize_and_save(str(folder.resolve()), pystac.CatalogType.SELF_CONTAINED)
    return folder / "catalog.json"


def _to_lonlat(geometry: Polygon, geobox: GeoBox) -> Polygon:
    """Project a polygon to lon/lat, with points along its edges so that they stay where they are."""
    project = Transformer.from_crs(str(geobox.crs), "EPSG:4326", always_xy=True).transform
    lon, lat = project(*shapely.get_coordinates(geometry.segmentize(geometry.length / 64)).T)
    return Polygon(np.stack([lon, lat], axis=1))


def _inner_bbox(geobox: GeoBox) -> tuple[float, float, float, float]:
    """Return the largest lon/lat box whose four sides stay inside the grid."""
    left, bottom, right, top = geobox.boundingbox.bbox
    project = Transformer.from_crs(str(geobox.crs), "EPSG:4326", always_xy=True).transform
    xs, ys = np.linspace(left, right, 33), np.linspace(bottom, top, 33)
    west, east = (project(np.full(33, x), ys)[0] for x in (left, right))
    south, north = (project(xs, np.full(33, y))[1] for y in (bottom, top))
    return float(west.max()), float(south.max()), float(east.min()), float(north.min())
