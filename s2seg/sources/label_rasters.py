"""Raster labels onto a grid, without inventing classes.

Every pixel of the grid is looked at in s x s sample points: one (its centre) for nearest, so many for mode that no
finer label pixel within it is missed. Each point takes the code of the label pixel that it lies in; the majority wins.
GDAL's warper can do this too, but decides anew for every window where to approximate and where a pixel begins; here
positions follow from the row and column of the whole grid alone, so that no result depends on the chunks. It also
leaves room to translate codes *before* the vote, as merged classes must vote together.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, hypot
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pystac
import rasterio
from affine import Affine
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox
from pystac.errors import STACError
from rasterio.enums import MaskFlags
from rasterio.errors import RasterioError
from rasterio.windows import Window

from s2seg.errors import InputError, ReadError
from s2seg.legend import Legend
from s2seg.sources.catalogs import load_signer
from s2seg.sources.items import sign_path
from s2seg.sources.label_codes import UNKNOWN, Gathered, UnknownLabelsError, code_table, crs_of, encode, resolve
from s2seg.sources.reader import GDAL_ENV

Resampling = Literal["mode", "nearest"]

_COLOR = re.compile(r"#[0-9a-fA-F]{6}")
_FINER = 1.05
"""Labels count as finer from this ratio on: the scale of two projections differs by less."""
_FEWEST, _MOST = 6, 64
"""Sample points along a pixel's side where grids do not nest, and at most."""
_STRIP = 1 << 22
"""Sample points handled at a time, which bounds memory: some 20 bytes each."""
_LATTICE = 16
"""Between grids in two CRSs, every 16th pixel corner is projected and the rest interpolated: at 10 m pixels within
a millimetre, at 60 m within centimetres."""
_NUDGE = 1e-6
"""Share of a label pixel by which points are moved off pixel edges, so that rounding cannot decide."""


@dataclass(frozen=True)
class RasterLabels:
    """Labels in a raster file.

    Parameters
    ----------
    href
        Path or URL of a GeoTIFF or whatever GDAL reads, or of a STAC item (``.json``).
    resampling
        How labels finer than the grid get there: by majority (``mode``) or the pixel under the centre (``nearest``).
        Coarser ones are always read by nearest.
    band
        Band number, from 1.
    colors
        For a mask in colours: ``"#rrggbb"`` -> legend code, class name, or None to drop it.
    asset
        Asset key, for a STAC item with more than one.

    Raises
    ------
    InputError
        For a resampling or a colour that does not exist.
    """

    href: str
    resampling: Resampling = "mode"
    band: int = 1
    colors: Mapping[str, Any] | None = None
    asset: str | None = None

    def __post_init__(self) -> None:
        if self.resampling not in get_args(Resampling):
            raise InputError(f"unknown resampling of labels {self.resampling!r}: choose mode or nearest")
        for color in self.colors or ():
            if not _COLOR.fullmatch(str(color)):
                raise InputError(f"labels {self.href}: color {color!r} is not of the form #rrggbb")


@dataclass(frozen=True)
class _File:
    """What must be known of a label file before a pixel is read."""

    href: str
    sign: str | None
    bands: tuple[int, ...]
    crs: CRS
    transform: Affine
    bounds: tuple[float, float, float, float]


@dataclass(frozen=True)
class RasterOnGrid:
    """Raster labels seen through a grid; picklable, opens the file for each read.

    Parameters
    ----------
    file
        The label file.
    geobox
        The grid.
    legend
        Names the classes in errors, and says what nodata is.
    values
        Source value (colours packed as 0xrrggbb) -> legend code.
    samples
        Sample points along a grid pixel's side.
    """

    file: _File
    geobox: GeoBox
    legend: Legend
    values: Mapping[int, int]
    samples: int

    @classmethod
    def open(
        cls, source: RasterLabels, geobox: GeoBox, legend: Legend, remap: Mapping[Any, Any] | None
    ) -> RasterOnGrid:
        """Check the file and settle how it is read.

        Raises
        ------
        InputError
            For a file that cannot be read, has no CRS, or holds no whole numbers; see :func:`s2seg.sources.labels`.
        """
        values = _values(source, legend, remap)
        file = _inspect(source)
        samples = _samples(file, geobox) if source.resampling == "mode" else 1
        return cls(file, geobox, legend, values, samples)

    @property
    def extent(self) -> tuple[CRS, tuple[float, float, float, float]]:
        """CRS and bounds of the file."""
        return self.file.crs, self.file.bounds

    def read(self, rows: slice, cols: slice) -> npt.NDArray[np.uint8]:
        """Legend codes (rows, columns) uint8 of a part of the grid.

        Raises
        ------
        UnknownLabelsError
            For values that neither the legend nor the remap explains.
        ReadError
            If the file cannot be read.
        """
        s, unknown = self.samples, Gathered()
        out = np.full((rows.stop - rows.start, cols.stop - cols.start), self.legend.nodata, dtype=np.uint8)
        u = (np.arange(cols.start * s, cols.stop * s) + 0.5) / s
        height = max(1, _STRIP // (len(u) * s))
        with _opened(self.file.href, self.file.sign) as dataset:
            for top in range(rows.start, rows.stop, height):
                bottom = min(top + height, rows.stop)
                v = (np.arange(top * s, bottom * s) + 0.5) / s
                with unknown.piece():
                    points = self._sample(dataset, *_locate(self.file, self.geobox, v, u))
                    if points is not None:
                        out[top - rows.start : bottom - rows.start] = self._vote(points)
        unknown.check()
        return out

    def _sample(
        self, dataset: rasterio.DatasetReader, row: npt.NDArray[np.int64], col: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int16] | None:
        """Codes at label pixels ``row``, ``col`` (broadcast together); None where all lie outside the file."""
        row_in, col_in = (row >= 0) & (row < dataset.height), (col >= 0) & (col < dataset.width)
        if not (row_in.any() and col_in.any()):
            return None
        top, left = int(row[row_in].min()), int(col[col_in].min())
        window = Window(left, top, int(col[col_in].max()) - left + 1, int(row[row_in].max()) - top + 1)
        pixels, valid = _pixels(dataset, self.file, window)
        codes = self._encode(pixels, valid)
        points = _taken(codes, np.clip(row - top, 0, codes.shape[0] - 1), np.clip(col - left, 0, codes.shape[1] - 1))
        if not (row_in.all() and col_in.all()):
            points[~(row_in & col_in)] = self.legend.nodata
        if (points == UNKNOWN).any():
            raise self._unknown(pixels[codes == UNKNOWN])
        return points

    def _encode(self, pixels: npt.NDArray[Any], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.int16]:
        """Translate source values to legend codes, or to unknown; what is not valid is nodata, whatever its value."""
        found = encode(pixels, self.values)
        np.copyto(found, np.int16(self.legend.nodata), where=~valid)
        return found

    def _unknown(self, pixels: npt.NDArray[Any]) -> UnknownLabelsError:
        what = "values" if len(self.file.bands) == 1 else "colors"
        return UnknownLabelsError(self.file.href, np.unique(pixels).tolist(), self.legend, what)

    def _vote(self, points: npt.NDArray[np.int16]) -> npt.NDArray[np.uint8]:
        """Majority of the points of each pixel; nodata has no vote.

        A tie goes to the class at the centre, which favours no class; failing that, to the first in the legend.
        """
        s = self.samples
        if s == 1:
            return points.astype(np.uint8)
        height, width = points.shape[0] // s, points.shape[1] // s
        winner = np.full((height, width), self.legend.nodata, dtype=np.uint8)
        most = np.zeros((height, width), dtype=np.uint16)
        centre = points[s // 2 :: s, s // 2 :: s]
        for code in self.legend.codes:
            votes = (points == code).reshape(height * s, width, s).sum(axis=2, dtype=np.uint16)
            votes = votes.reshape(height, s, width).sum(axis=1, dtype=np.uint16)
            np.copyto(winner, np.uint8(code), where=(votes > most) | ((votes == most) & (centre == code)))
            np.maximum(most, votes, out=most)
        return winner


def raster_extent(source: RasterLabels) -> tuple[CRS, tuple[float, float, float, float]]:
    """CRS and bounds of a label file.

    Raises
    ------
    InputError
        For a file that cannot be used as labels.
    """
    file = _inspect(source)
    return file.crs, file.bounds


def _values(source: RasterLabels, legend: Legend, remap: Mapping[Any, Any] | None) -> dict[int, int]:
    if source.colors is None:
        return {value: code for value, code in code_table(legend, remap).items() if isinstance(value, int)}
    if remap:
        raise InputError(f"labels {source.href}: give `colors` or `remap`, not both; `colors` can name legend classes")
    return {int(c[1:], 16): resolve(legend, target, f"color {c}") for c, target in source.colors.items()}


def _inspect(source: RasterLabels) -> _File:
    """Open a label file once, and refuse what cannot be labels."""
    href, sign = _link(source)
    with _opened(href, sign) as dataset:
        bands = (1, 2, 3) if source.colors is not None else (source.band,)
        if max(bands) > dataset.count or min(bands) < 1:
            raise InputError(
                f"labels {href}: `colors` needs three bands, and there is {dataset.count}; codes need `remap` instead"
                if source.colors is not None
                else f"labels {href}: there is no band {source.band}; choose 1 to {dataset.count}"
            )
        if dataset.crs is None:
            raise InputError(f"labels {href} have no CRS; give them one: gdal_edit.py -a_srs EPSG:CODE {href}")
        dtype = np.dtype(dataset.dtypes[bands[0] - 1])
        if dtype.kind not in "ui":
            raise InputError(
                f"labels {href} hold {dtype.name}, and whole-number codes are needed; "
                f"convert them: gdal_translate -ot Byte {href} codes.tif"
            )
        if source.colors is not None and dtype != np.uint8:
            raise InputError(f"labels {href}: `colors` needs 8-bit bands, not {dtype.name}")
        if source.colors is None and dataset.count in (3, 4) and dtype == np.uint8 and source.band == 1:
            raise _undeclared_colors(dataset, href)
        return _File(href, sign, bands, CRS(dataset.crs.to_wkt()), dataset.transform, tuple(dataset.bounds))


def _taken(
    codes: npt.NDArray[np.int16], row: npt.NDArray[np.int64], col: npt.NDArray[np.int64]
) -> npt.NDArray[np.int16]:
    """``codes[row, col]``, in a third of its time where all points of a row, or of a column, share theirs.

    Where the grids are the same, and no point lies outside, it is all of the codes.
    """
    if row.shape[1] == 1 and col.shape[0] == 1:
        if np.array_equal(row[:, 0], np.arange(len(codes))) and np.array_equal(col[0], np.arange(codes.shape[1])):
            return codes
        return codes.take(row[:, 0], axis=0).take(col[0], axis=1)
    return codes[row, col]


def _link(source: RasterLabels) -> tuple[str, str | None]:
    """Href of the raster, and the function that signs it (both from the STAC item, where there is one)."""
    if not source.href.lower().endswith(".json"):
        return source.href, None
    try:
        item = pystac.Item.from_file(source.href)
    except (OSError, ValueError, KeyError, STACError) as error:
        raise InputError(f"labels {source.href} are not a STAC item: {_one_line(error)}") from error
    only = next(iter(item.assets)) if len(item.assets) == 1 else ""
    key = source.asset or only
    if key not in item.assets:
        raise InputError(f"labels {source.href}: name one asset of {', '.join(item.assets)} with `asset`, not {key!r}")
    return item.assets[key].get_absolute_href() or item.assets[key].href, sign_path(item)


@contextmanager
def _opened(href: str, sign: str | None) -> Iterator[rasterio.DatasetReader]:
    """Open a label file; whatever GDAL says about it becomes one line."""
    # beside a local file may lie what it needs: a world file, a mask
    sidecars = {} if "://" in href or href.startswith("/vsi") else {"GDAL_DISABLE_READDIR_ON_OPEN": "FALSE"}
    with rasterio.Env(**(GDAL_ENV | sidecars)):
        try:
            dataset = rasterio.open(load_signer(sign)(href) if sign else href)
        except (RasterioError, OSError) as error:
            raise InputError(f"labels {href} cannot be opened: {_one_line(error)}") from error
        with dataset:
            yield dataset


def _pixels(
    dataset: rasterio.DatasetReader, file: _File, window: Window
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Source values (rows, columns), colours packed as 0xrrggbb, and where they are valid."""
    try:
        pixels = dataset.read(list(file.bands), window=window)
        masked = MaskFlags.per_dataset in dataset.mask_flag_enums[file.bands[0] - 1]
        valid = dataset.dataset_mask(window=window) > 0 if masked else np.ones(pixels.shape[1:], dtype=bool)
    except (RasterioError, OSError) as error:
        raise ReadError("labels", str(file.bands[0]), file.href, _one_line(error)) from error
    nodata = dataset.nodatavals[file.bands[0] - 1]
    if len(file.bands) == 3:
        red, green, blue = pixels.astype(np.uint32)
        return (red << 16) | (green << 8) | blue, valid
    return pixels[0], valid if nodata is None else valid & (pixels[0] != nodata)


def _undeclared_colors(dataset: rasterio.DatasetReader, href: str) -> InputError:
    """Show the colours of a corner, ready to be copied into a configuration."""
    corner = dataset.read([1, 2, 3], window=Window(0, 0, min(512, dataset.width), min(512, dataset.height)))
    seen = Counter(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in corner[:, ::4, ::4].reshape(3, -1).T.tolist())
    listed = ", ".join(f"'{color}': CODE" for color, _ in seen.most_common(6))
    return InputError(
        f"labels {href} are an image of {dataset.count} bands, not codes; say what its colours mean, "
        f"such as colors: {{{listed}}}, or choose a `band` other than 1"
    )


def _samples(file: _File, geobox: GeoBox) -> int:
    """Choose how many sample points along a pixel's side see every finer label pixel: 1 if labels are not finer."""
    middle = np.array([geobox.shape[0] / 2, geobox.shape[1] / 2])
    if file.crs == geobox.crs:
        to_label = ~file.transform @ geobox.affine
        if to_label.is_rectilinear and to_label.b == 0 and _whole(to_label):
            return min(_MOST, round(max(abs(to_label.a), abs(to_label.e))))
    rows, cols = _positions(file, geobox, middle[0] + np.array([0.0, 1.0]), middle[1] + np.array([0.0, 1.0]))
    rows, cols = np.broadcast_to(rows, (2, 2)), np.broadcast_to(cols, (2, 2))
    steps = [hypot(rows[i, j] - rows[0, 0], cols[i, j] - cols[0, 0]) for i, j in ((0, 1), (1, 0))]
    finer = max(steps)
    return min(_MOST, max(_FEWEST, ceil(finer))) if np.isfinite(finer) and finer > _FINER else 1


def _whole(to_label: Affine) -> bool:
    """Whether every grid pixel is made of whole label pixels."""
    return all(abs(n - round(n)) < 1e-3 and round(n) != 0 for n in (to_label.a, to_label.e)) and all(
        abs(n - round(n)) < 1e-3 for n in (to_label.c, to_label.f)
    )


def _locate(
    file: _File, geobox: GeoBox, v: npt.NDArray[np.float64], u: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Row and column of the label pixel under each point (v, u) of the grid, to be broadcast together.

    What projects to nowhere is at -1.
    """
    row, col = _positions(file, geobox, v, u)
    return _index(row), _index(col)


def _index(position: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    found = np.isfinite(position) & (np.abs(position) < 2**53)
    return np.floor(np.where(found, position, -1.0) + _NUDGE).astype(np.int64)


def _positions(
    file: _File, geobox: GeoBox, v: npt.NDArray[np.float64], u: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Rows and columns, as fractions, in the label file; v, u in grid pixels, increasing."""
    if file.crs == geobox.crs:
        return _apply(~file.transform @ geobox.affine, v[:, None], u[None])
    y, x = _project(file, geobox, v, u)
    return _apply(~file.transform, y, x)


def _apply(
    affine: Affine, v: npt.NDArray[np.float64], u: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Apply (u, v) -> (column, row); an axis that depends on one coordinate alone stays one-dimensional."""
    col = affine.a * u + affine.c if affine.b == 0 else affine.a * u + affine.b * v + affine.c
    row = affine.e * v + affine.f if affine.d == 0 else affine.d * u + affine.e * v + affine.f
    return row, col


def _project(
    file: _File, geobox: GeoBox, v: npt.NDArray[np.float64], u: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Coordinates (y, x) in the labels' CRS, bilinear between nodes that every chunk shares."""
    i, j = (np.floor(at / _LATTICE).astype(np.int64) for at in (v, u))
    node_v, node_u = (np.arange(n[0], n[-1] + 2) * float(_LATTICE) for n in (i, j))
    map_y, map_x = _apply(geobox.affine, node_v[:, None], node_u[None])
    x, y = crs_of(geobox).transformer_to_crs(file.crs)(*np.broadcast_arrays(map_x, map_y))
    known = x[np.isfinite(x)]
    if file.crs.geographic and known.size and np.ptp(known) > 180:
        x = np.where(x < 0, x + 360, x)  # across the antimeridian
    y, x = (_between(node, i - i[0], v / _LATTICE - i, j - j[0], u / _LATTICE - j) for node in (y, x))
    return y, np.where(x > 180, x - 360, x) if file.crs.geographic else x


def _between(
    node: npt.NDArray[np.float64],
    i: npt.NDArray[np.int64],
    down: npt.NDArray[np.float64],
    j: npt.NDArray[np.int64],
    right: npt.NDArray[np.float64],
) -> npt.NDArray[np.float64]:
    """Interpolate between nodes: ``i``, ``j`` number the node above and left, ``down``, ``right`` are shares."""
    with np.errstate(invalid="ignore"):  # infinite where a node projects to nowhere
        part = node[i] * (1 - down[:, None]) + node[i + 1] * down[:, None]
        inner: npt.NDArray[np.float64] = part[:, j] * (1 - right) + part[:, j + 1] * right
    return inner


def _one_line(error: BaseException) -> str:
    return " ".join(str(error.__cause__ or error).split()) or type(error).__name__
