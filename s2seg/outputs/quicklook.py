"""One picture of a result: the image that the network saw beside the map it made, with classes, shares and scale.

Everything is placed in inches from the top left corner, so that a page looks alike for 3 and for 15 classes, for wide
and for tall areas. No pyplot: nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import odc.geo.xr  # noqa: F401  registers .odc
import xarray as xr
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from s2seg.legend import LandClass, Legend
from s2seg.outputs._files import check_writable, replacing, writing

Image = npt.NDArray[np.uint8]
_Array = TypeVar("_Array", xr.DataArray, xr.Dataset)

_DPI = 200
_MARGIN, _GAP = 0.35, 0.3
_LABEL, _BELOW = 0.24, 0.34  # above a panel its name, below the last one the scale
_NAME_CHARS, _LEGEND_WIDTH, _ROW, _LINE = 28, 3.0, 0.25, 0.155
_INK, _FAINT = "#222222", "#666666"
_NODATA = 255  # white
_MIDDLE = 0.4  # how bright the median pixel of a composite should be
_COLUMNS = 6  # dates in a row
_DEGREE = 111_320.0  # metres on a meridian


@dataclass(frozen=True)
class _Panel:
    """One image on the page; place and size in inches, from the top left of the panels' area."""

    image: Image
    label: str
    x: float
    y: float
    width: float
    height: float


def thumbnail(data: _Array, max_side: int = 1200) -> _Array:
    """Take every n-th pixel, lazily, so that neither side is longer than ``max_side``.

    Classes cannot be averaged, and a strided map keeps the colours and (nearly) the shares of the whole one. Of a
    dask-backed array the blocks are still computed in full: pass what is cheap to read, such as the written Zarr or a
    stack on a coarse grid.

    Parameters
    ----------
    data
        Anything with dimensions y and x.
    max_side
        Pixels.

    Returns
    -------
    xr.DataArray or xr.Dataset
        The same kind, with its coordinates.
    """
    step = max(1, math.ceil(max(data.sizes["y"], data.sizes["x"]) / max_side))
    return data.isel(y=slice(step // 2, None, step), x=slice(step // 2, None, step))


def write_quicklook(
    path: str | Path,
    *,
    composite: xr.DataArray | None,
    land_cover: xr.DataArray,
    legend: Legend,
    title: str,
    subtitle: str = "",
    overwrite: bool = False,
) -> Path:
    """Draw composite and map side by side (a wide area: one above the other), with a legend of what is present.

    Parameters
    ----------
    path
        Where the PNG goes.
    composite
        (band, y, x) DN with 0 for nodata, already small (see :func:`thumbnail`); None leaves it out. Shown in true
        colour, or in false colour where red, green or blue is missing, stretched from the 2nd to the 98th percentile
        of all three bands together and brightened where clouds or water set the scale.
    land_cover
        (y, x) codes on any grid of the same area, with a geobox; already small too.
    legend
        Classes; shares are percentages of the pixels that have one.
    title, subtitle
        Two lines at the top: what and where; date and model.
    overwrite
        Replace what stands at ``path``.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    OutputError
        If the path exists or cannot be written.
    """
    path = check_writable(path, overwrite=overwrite)
    codes = land_cover.transpose("y", "x").to_numpy()
    images = [] if composite is None else [_rgb(composite)]
    images.append((_colored(codes, legend), "Land cover"))
    aspect = codes.shape[1] / codes.shape[0]
    wide = aspect > 1.7 and len(images) > 1
    width, height = _fit(aspect, 8.5 if wide else 5.2, 3.4 if wide else 6.0)
    cell = max(width, 1.3)
    panels = [
        _Panel(image, label, *((0.0, i * (height + _LABEL + 0.1)) if wide else (i * (cell + _GAP), 0.0)), width, height)
        for i, (image, label) in enumerate(images)
    ]
    _draw(path, panels, _metres_across(land_cover), codes, legend, title, subtitle)
    return path


def write_quicklook_series(
    path: str | Path,
    *,
    composites: xr.DataArray | None,
    land_cover: xr.DataArray,
    legend: Legend,
    title: str,
    subtitle: str = "",
    overwrite: bool = False,
) -> Path:
    """Draw maps of several dates in columns, each below its image, up to six to a row, with one legend for all.

    Parameters
    ----------
    path
        Where the PNG goes.
    composites
        (time, band, y, x), as in :func:`write_quicklook`; one stretch for all dates.
    land_cover
        (time, y, x) codes with a geobox.
    legend, title, subtitle, overwrite
        As in :func:`write_quicklook`; shares are over all dates.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    OutputError
        If the path exists or cannot be written.
    """
    path = check_writable(path, overwrite=overwrite)
    codes = land_cover.transpose("time", "y", "x").to_numpy()
    dates = np.datetime_as_string(land_cover["time"].to_numpy().astype("datetime64[m]"))
    rows_of_images = [_colored(codes, legend)]
    if composites is not None:
        rows_of_images.insert(0, _rgb(composites)[0])
    aspect = codes.shape[2] / codes.shape[1]
    width, height = _fit(aspect, 2.2, 2.6)
    columns = math.ceil(len(dates) / math.ceil(len(dates) / _COLUMNS))
    cell, band = max(width, 1.3) + 0.12, len(rows_of_images) * (height + 0.08) + _LABEL + 0.12
    panels = [
        _Panel(images[i], label, column * cell, row * band + k * (height + 0.08), width, height)
        for i, date in enumerate(dates)
        for row, column in [divmod(i, columns)]
        for k, (images, label) in enumerate(zip(rows_of_images, (date.replace("T", " "), ""), strict=False))
    ]
    _draw(path, panels, _metres_across(land_cover), codes, legend, title, subtitle)
    return path


def class_shares(codes: npt.NDArray[np.uint8], legend: Legend) -> list[tuple[LandClass, float]]:
    """Percent of the mapped pixels per class that is present, largest first.

    Rounded to tenths so that they sum to exactly 100 (largest remainder), or an empty list where nothing is mapped.
    """
    counts = np.bincount(codes.ravel(), minlength=256)
    present = sorted((c for c in legend.classes if counts[c.code]), key=lambda c: -counts[c.code])
    if not present:
        return []
    tenths = np.array([counts[c.code] for c in present]) * 1000 / sum(counts[c.code] for c in present)
    rounded = np.floor(tenths)
    rounded[np.argsort(rounded - tenths, kind="stable")[: round(1000 - rounded.sum())]] += 1
    return [(c, float(share) / 10) for c, share in zip(present, rounded, strict=True)]


# -- images -----------------------------------------------------------------------------------------------------------


def _colored(codes: npt.NDArray[np.uint8], legend: Legend) -> Image:
    table = np.full((256, 3), _NODATA, np.uint8)
    for c in legend.classes:
        table[c.code] = c.rgb
    return table[codes]


def _rgb(composite: xr.DataArray) -> tuple[Image, str]:
    """(..., y, x, 3) uint8 and what it shows."""
    bands, label = _three_bands([str(b) for b in composite["band"].to_numpy()])
    values = composite.sel(band=bands).transpose(..., "y", "x", "band").to_numpy().astype("float32")
    valid = (values > 0).all(axis=-1)
    image = np.full(values.shape, _NODATA, np.uint8)
    if valid.any():
        image[valid] = _stretch(values[valid])
    return image, label


def _stretch(values: npt.NDArray[np.float32]) -> Image:
    """Stretch from the 2nd to the 98th percentile, then brighten: under clouds the land would be black otherwise."""
    low, middle, high = np.percentile(values, (2, 50, 98))
    unit = np.clip((values - low) / max(high - low, 1), 0, 1)
    at = np.clip((middle - low) / max(high - low, 1), 0.01, 0.99)
    gamma = np.clip(np.log(_MIDDLE) / np.log(at), 0.45, 1)
    stretched: Image = (unit**gamma * 255).round().astype(np.uint8)
    return stretched


def _three_bands(available: Sequence[str]) -> tuple[list[str], str]:
    if {"red", "green", "blue"} <= set(available):
        return ["red", "green", "blue"], "True colour"
    for bands in (["nir", "red", "green"], ["swir16", "nir", "red"], ["swir22", "swir16", "nir"]):
        if set(bands) <= set(available):
            return bands, f"False colour ({', '.join(bands)})"
    spectral = [b for b in available if b != "scl"] or list(available)
    bands = [*spectral[:3]] if len(spectral) >= 3 else [spectral[0]] * 3
    return bands, spectral[0] if len(spectral) < 3 else f"False colour ({', '.join(bands)})"


# -- page -------------------------------------------------------------------------------------------------------------


def _fit(aspect: float, max_width: float, max_height: float) -> tuple[float, float]:
    width = min(max_width, max_height * aspect)
    return width, width / aspect


def _metres_across(land_cover: xr.DataArray) -> float:
    geobox = land_cover.odc.geobox
    across: float = abs(geobox.resolution.x) * geobox.shape.x
    if geobox.crs is None or not geobox.crs.geographic:
        return across
    latitude: float = (geobox.boundingbox.bottom + geobox.boundingbox.top) / 2
    return across * _DEGREE * math.cos(math.radians(latitude))


def _draw(
    path: Path,
    panels: Sequence[_Panel],
    metres: float,
    codes: npt.NDArray[np.uint8],
    legend: Legend,
    title: str,
    subtitle: str,
) -> None:
    right = max(p.x + max(p.width, 1.3) for p in panels)
    bottom = max(p.y + p.height for p in panels)
    entries = _entries(codes, legend)
    page_width = _MARGIN + right + _GAP + _LEGEND_WIDTH + _MARGIN
    titles = textwrap.wrap(title, int((page_width - 2 * _MARGIN) / 0.115))
    subtitles = textwrap.wrap(subtitle, int((page_width - 2 * _MARGIN) / 0.076))
    head = _MARGIN + 0.25 * len(titles) + 0.18 * len(subtitles) + 0.14
    top = head + _LABEL
    page_height = top + max(bottom + _BELOW, sum(e.height for e in entries) + 0.05) + _MARGIN / 2

    page = _Page(page_width, page_height)
    for i, line in enumerate(titles):
        page.text(_MARGIN, _MARGIN + 0.25 * i, line, size=13, weight="bold")
    for i, line in enumerate(subtitles):
        page.text(_MARGIN, _MARGIN + 0.25 * len(titles) + 0.18 * i, line, size=8.5, color=_FAINT)
    for panel in panels:
        page.image(_MARGIN + panel.x, top + panel.y, panel)
    last_row = max(p.y for p in panels)
    under = next(p for p in reversed(panels) if p.y == last_row)
    first_in_row = next(p for p in panels if p.y == last_row) if len(panels) > 2 else under
    _scale(page, _MARGIN + first_in_row.x, top + bottom + 0.12, first_in_row.width, metres)
    _legend(page, _MARGIN + right + _GAP, top, entries)
    with replacing(path) as partial, writing(path):
        page.save(partial)


class _Page:
    """A figure that is drawn on in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def text(self, x: float, y: float, text: str, *, size: float = 8.5, color: str = _INK, **style: Any) -> None:
        style = {"va": "top", "ha": "left"} | style
        inches = self.figure.dpi_scale_trans
        self.figure.text(x, self.height - y, text, size=size, color=color, transform=inches, parse_math=False, **style)

    def box(self, x: float, y: float, width: float, height: float, color: str, edge: str = "none") -> None:
        inches = self.figure.dpi_scale_trans
        corner = (x, self.height - y - height)
        self.figure.add_artist(
            Rectangle(corner, width, height, facecolor=color, edgecolor=edge, linewidth=0.5, transform=inches)
        )

    def image(self, x: float, y: float, panel: _Panel) -> None:
        bottom = self.height - y - panel.height
        place = (x / self.width, bottom / self.height, panel.width / self.width, panel.height / self.height)
        axes = self.figure.add_axes(place, xticks=[], yticks=[])
        axes.imshow(panel.image, interpolation="nearest", aspect="auto")
        axes.spines[:].set(color="#999999", linewidth=0.5)
        self.text(x, y - 0.07, panel.label, size=8.5, color=_INK, va="bottom")

    def save(self, path: Path) -> None:
        self.figure.savefig(path, format="png", dpi=_DPI)


def _scale(page: _Page, x: float, y: float, width: float, metres: float) -> None:
    """A bar of a round length, about a third of the panel, and north."""
    length = _round_length(metres / 3)
    inches = width * length / metres
    for i, color in enumerate((_INK, "white")):
        page.box(x + i * inches / 2, y, inches / 2, 0.05, color, _INK)
    page.text(
        x + inches + 0.07,
        y + 0.025,
        f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m",
        size=7.5,
        va="center",
    )
    page.text(x + max(width, 1.3), y + 0.025, "N \N{BLACK UP-POINTING TRIANGLE}", size=7.5, ha="right", va="center")


def _round_length(at_most: float) -> float:
    power = 10.0 ** math.floor(math.log10(at_most))
    return next(step * power for step in (5, 2, 1) if step * power <= at_most)


@dataclass(frozen=True)
class _Entry:
    """A line of the legend: a swatch, a name of one or more lines, a share."""

    lines: tuple[str, ...]
    share: str
    color: str
    edge: str = "none"

    @property
    def height(self) -> float:
        return _ROW + _LINE * (len(self.lines) - 1)


def _entries(codes: npt.NDArray[np.uint8], legend: Legend) -> list[_Entry]:
    entries = [
        _Entry(
            tuple(textwrap.wrap(c.name, _NAME_CHARS, break_on_hyphens=False)) or ("",),
            f"{share:.1f} %" if share else "< 0.1 %",
            c.color,
        )
        for c, share in class_shares(codes, legend)
    ]
    empty = int((~np.isin(codes, legend.codes)).sum()) / codes.size * 100
    if empty:
        amount = f"{empty:.1f} %" if empty >= 0.05 else "< 0.1 %"
        entries.append(_Entry((f"no data ({amount} of all)",), "", "white", "#999999"))
    return entries


def _legend(page: _Page, x: float, y: float, entries: Sequence[_Entry]) -> None:
    for entry, (row, _) in zip(entries, pairwise(np.cumsum([0, *(e.height for e in entries)])), strict=True):
        page.box(x, y + row, 0.24, 0.15, entry.color, entry.edge)
        for i, line in enumerate(entry.lines):
            page.text(x + 0.34, y + row + 0.075 + i * _LINE, line, va="center", color=_INK if entry.share else _FAINT)
        page.text(x + _LEGEND_WIDTH, y + row + 0.075, entry.share, ha="right", va="center")
