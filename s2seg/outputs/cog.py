"""A map as a Cloud-Optimized GeoTIFF that opens coloured and named, streamed block by block.

GDAL's own COG driver does the layout, so a file has exactly the map's shape and every write error is heard.
Class names go where GDAL looks for them (``.aux.xml``: categories and attribute table) and where QGIS does (``.qml``).
"""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import numpy.typing as npt
import odc.geo.xr  # noqa: F401  registers .odc
import rasterio
import rasterio.shutil
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio._err import CPLE_BaseError
from rasterio.errors import RasterioError
from rasterio.windows import Window

from s2seg.errors import InputError, OutputError
from s2seg.legend import Legend
from s2seg.outputs._files import check_writable, replacing, writing
from s2seg.outputs.zarr import open_stored, pieces

_BLOCK = 512
_HALVED = 1024  # coarse pixels on a side that are made at once
_CACHE_MB = 128  # GDAL's default is 5 % of the machine
_FULL = 2**20  # a disk with less free than this is full
_CONFIDENCE_NODATA = 255


def write_cog(
    source: xr.DataArray | str | Path,
    path: str | Path,
    *,
    legend: Legend | None,
    time: str | np.datetime64 | None = None,
    tags: Mapping[str, str] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write one map as a COG: 512 px blocks, deflate, overviews down to one block.

    With a legend: palette, nodata, class names, and overviews by majority. A coarse pixel is the most frequent class
    of the valid pixels it covers (nodata only where there is none); of tied classes, the one that first reaches that
    count, row by row. Each level is made from the one above it. Without a legend (``confidence``): grey, nodata 255,
    overviews by average.

    Parameters
    ----------
    source
        (y, x) or (time, y, x) uint8 with a geobox, computed block by block; or what
        :func:`s2seg.outputs.zarr.write_zarr` wrote, of which ``land_cover`` (``confidence`` without a legend) is taken.
    path
        Where the ``.tif`` goes; with a legend, ``.tif.aux.xml`` and ``.qml`` go beside it.
    legend
        Classes of the map.
    time
        Which date of a map with several.
    tags
        More TIFF metadata, such as the model's name.
    overwrite
        Replace what stands at ``path``.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    OutputError
        If the path exists or cannot be written; nothing is left behind.
    InputError
        If there are several dates and ``time`` names none of them.
    """
    path = check_writable(path, overwrite=overwrite)
    data = _one_date(_open(source, legend), time)
    nodata = legend.nodata if legend else _CONFIDENCE_NODATA
    name = str(data.name or ("land_cover" if legend else "confidence"))
    with (
        replacing(path) as partial,
        TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch,
        _gdal(path),
    ):
        pixels, cog = Path(scratch, "pixels.tif"), Path(scratch, "cog.tif")
        written = _write_pixels(data, pixels, nodata)
        _label(pixels, name, legend, tags or {})
        _to_cog(_with_majorities(pixels, nodata) if legend else pixels, cog)
        _verify(cog, written, path)
        _write_sidecars(path, name, legend)
        cog.rename(partial)
    return path


def _open(source: xr.DataArray | str | Path, legend: Legend | None) -> xr.DataArray:
    if isinstance(source, xr.DataArray):
        return source
    return open_stored(source)["land_cover" if legend else "confidence"]


def _one_date(data: xr.DataArray, time: str | np.datetime64 | None) -> xr.DataArray:
    if "time" not in data.dims:
        return data
    dates = data["time"].to_numpy()
    if time is None and len(dates) == 1:
        return data.isel(time=0)
    found = [i for i, date in enumerate(dates) if time is not None and date == np.datetime64(time)]
    if len(found) != 1:
        raise InputError(f"the map has the dates {', '.join(map(str, dates))}: pass one of them as time=, not {time}")
    return data.isel(time=found[0])


@contextmanager
def _gdal(path: Path) -> Iterator[None]:
    """GDAL with bounded memory, whose complaints are about our output: the input has been read by others."""
    try:
        # the COG driver gathers overviews in a file of its own, at Zstandard's level 9 unless told otherwise
        with rasterio.Env(GDAL_CACHEMAX=_CACHE_MB * 2**20, GDAL_NUM_THREADS="ALL_CPUS", ZSTD_LEVEL_OVERVIEW=1):
            yield
    except (RasterioError, CPLE_BaseError) as error:
        raise OutputError(str(path), _reason(path, " ".join(str(error).split()))) from error


def _reason(path: Path, said: str) -> str:
    """Say what is wrong: GDAL's last word on a full disk is about directories and offsets."""
    full = shutil.disk_usage(path.parent).free < _FULL
    return f"{'no space left on the disk' if full else said}; free some space or choose another path"


def _write_pixels(data: xr.DataArray, path: Path, nodata: int) -> list[tuple[Window, int]]:
    """Stream the blocks into a plain tiled GeoTIFF; return where each went, with its checksum.

    It is not compressed: a byte per pixel on the disk, for the seconds it lives, costs less than packing it.
    """
    geobox: GeoBox = data.odc.geobox
    profile = {
        "driver": "GTiff",
        "height": data.sizes["y"],
        "width": data.sizes["x"],
        "count": 1,
        "dtype": data.dtype.name,
        "nodata": nodata,
        "crs": geobox.crs.to_wkt() if geobox.crs else None,
        "transform": geobox.transform,
        "tiled": True,
        "blockxsize": _BLOCK,
        "blockysize": _BLOCK,
        "bigtiff": "IF_SAFER",
    }
    written = []
    with rasterio.open(path, "w", **profile) as out:
        data = data.transpose("y", "x")
        for rows, columns in pieces(data):
            window, block = Window.from_slices(rows, columns), data[rows, columns].to_numpy()
            out.write(block, 1, window=window)
            written.append((window, _checksum(block)))
    return written


def _checksum(block: npt.NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(block).data)


def _verify(cog: Path, written: list[tuple[Window, int]], path: Path) -> None:
    """Read everything back: a write that fails while GDAL closes a file raises nothing, and leaves nodata."""
    with rasterio.open(cog) as src:
        for window, checksum in written:
            if _checksum(src.read(1, window=window)) != checksum:
                raise OutputError(str(path), _reason(path, "it does not hold the pixels that were written"))


def _label(path: Path, name: str, legend: Legend | None, tags: Mapping[str, str]) -> None:
    with rasterio.open(path, "r+") as out:
        out.set_band_description(1, name)
        out.update_tags(**tags)
        if legend:
            out.write_colormap(1, legend.colormap())


def _with_majorities(pixels: Path, nodata: int) -> Path:
    """Halve a map until a block holds it; returns a VRT of all its sizes, whose overviews the COG driver takes.

    GDAL makes overviews by mode as well, in three times the time.
    """
    vrt, level = pixels.with_suffix(".vrt"), pixels
    rasterio.shutil.copy(pixels, vrt, driver="VRT")
    tree = ET.parse(vrt)
    band = next(tree.iter("VRTRasterBand"))
    while (coarser := _halve(level, nodata)) is not None:
        level = coarser
        overview = _element(band, "Overview")
        _element(overview, "SourceFilename", level.name, relativeToVRT=1)
        _element(overview, "SourceBand", 1)
    tree.write(vrt)
    return vrt


def _halve(finer: Path, nodata: int) -> Path | None:
    """Write the majorities of 2 x 2 pixels to a file of their own; None where a block holds them all already."""
    coarser = finer.with_stem(f"{finer.stem}-2")
    with rasterio.open(finer) as source:
        if max(source.shape) <= _BLOCK:
            return None
        height, width = (-(-size // 2) for size in source.shape)
        profile = source.profile | {"height": height, "width": width, "bigtiff": "IF_SAFER"}
        profile["transform"] = source.transform @ Affine.scale(2)
        with rasterio.open(coarser, "w", **profile) as out:
            for top, left in product(range(0, height, _HALVED), range(0, width, _HALVED)):
                here = Window(left, top, min(_HALVED, width - left), min(_HALVED, height - top))
                above = Window(2 * left, 2 * top, 2 * here.width, 2 * here.height)
                out.write(_majority(source.read(1, window=above), nodata), 1, window=here)
    return coarser


def _majority(codes: npt.NDArray[np.uint8], nodata: int) -> npt.NDArray[np.uint8]:
    """Most frequent valid code of 2 x 2 pixels; an odd row or column at the end stands for itself."""
    even = np.pad(codes, [(0, size % 2) for size in codes.shape], constant_values=nodata)
    a, b, c, d = (np.ascontiguousarray(even[y::2, x::2]) for y, x in np.ndindex(2, 2))
    first = np.where(a != nodata, a, np.where(b != nodata, b, np.where(c != nodata, c, d)))
    # the first two that are alike win; if one of them is a, it is the first of all anyway, but comes before d's pairs
    pair_at_c = (b == c) & (b != nodata)
    pair_at_d = ((b == d) | (c == d)) & (d != nodata) & ~(((a == b) | (a == c)) & (a != nodata))
    return np.where(pair_at_d, d, np.where(pair_at_c, b, first))


def _to_cog(source: Path, cog: Path) -> None:
    """Lay out a file as GDAL's driver does, with the overviews that it has, or else averages."""
    rasterio.shutil.copy(
        source,
        cog,
        driver="COG",
        blocksize=_BLOCK,
        compress="DEFLATE",
        predictor="NO",
        overview_resampling="AVERAGE",
        bigtiff="IF_SAFER",
        num_threads="ALL_CPUS",
    )


def _write_sidecars(path: Path, name: str, legend: Legend | None) -> None:
    """Write (or, for a file without classes, clear away) what names the codes."""
    sidecars = {
        path.with_name(f"{path.name}.aux.xml"): _aux_xml(name, legend) if legend else None,
        path.with_suffix(".qml"): _qml(legend) if legend else None,
    }
    for sidecar, root in sidecars.items():
        with writing(sidecar):
            if root is None:
                sidecar.unlink(missing_ok=True)
                continue
            ET.indent(root)
            with replacing(sidecar) as partial:
                ET.ElementTree(root).write(partial, encoding="utf-8", xml_declaration=root.tag == "qgis")


def _element(parent: ET.Element, tag: str, text: object = None, **attributes: object) -> ET.Element:
    child = ET.SubElement(parent, tag, {k: str(v) for k, v in attributes.items()})
    child.text = None if text is None else str(text)
    return child


def _aux_xml(name: str, legend: Legend) -> ET.Element:
    """Build GDAL's side file (PAM): category i names code i; the attribute table lists the codes and colours."""
    root = ET.Element("PAMDataset")
    band = _element(root, "PAMRasterBand", band=1)
    _element(band, "Description", name)
    labels = {legend.nodata: "no data"} | dict(zip(legend.codes, legend.names, strict=True))
    categories = _element(band, "CategoryNames")
    for code in range(max(labels) + 1):
        _element(categories, "Category", labels.get(code, ""))
    table = _element(band, "GDALRasterAttributeTable", tableType="thematic")
    # name, GDALRATFieldType (0 integer, 2 string), GDALRATFieldUsage (5 value, 2 name, 6 to 9 red, green, blue, alpha)
    fields = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8), ("Alpha", 0, 9))
    for index, (title, kind, usage) in enumerate(fields):
        field = _element(table, "FieldDefn", index=index)
        for tag, text in (("Name", title), ("Type", kind), ("Usage", usage)):
            _element(field, tag, text)
    for index, (code, rgba) in enumerate(sorted(legend.colormap().items())):
        row = _element(table, "Row", index=index)
        for value in (code, labels[code], *rgba):
            _element(row, "F", value)
    return root


def _qml(legend: Legend) -> ET.Element:
    """Build a QGIS style, which QGIS loads by itself for its name: a paletted renderer with labels."""
    root = ET.Element("qgis", {"version": "3.28.0", "styleCategories": "Symbology"})
    renderer = _element(
        _element(root, "pipe"), "rasterrenderer", type="paletted", band=1, opacity=1, alphaBand=-1, nodataColor=""
    )
    palette = _element(renderer, "colorPalette")
    for c in legend.classes:
        _element(palette, "paletteEntry", value=c.code, label=c.name, color=c.color, alpha=255)
    _element(palette, "paletteEntry", value=legend.nodata, label="no data", color="#000000", alpha=0)
    return root
