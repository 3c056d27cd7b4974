"""One picture of a result: the image that the network saw beside the map it made, with classes, shares and scale."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import odc.geo.xr  # noqa: F401  registers .odc
import xarray as xr

from s2seg.legend import LandClass, Legend
from s2seg.outputs._files import check_writable
from s2seg.outputs._page import BLANK, EDGE, FAINT, INK, MARGIN, Head, Image, Page, blank_of, colored, fit, scene_image

_Array = TypeVar("_Array", xr.DataArray, xr.Dataset)

_GAP = 0.3
_LABEL, _BELOW = 0.24, 0.34  # above a panel its name, below the last one the scale
_NAME_CHARS, _LEGEND_WIDTH, _ROW, _LINE = 28, 3.0, 0.25, 0.155
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
    step = stride(data.sizes["y"], data.sizes["x"], max_side)
    return data.isel(y=slice(step // 2, None, step), x=slice(step // 2, None, step))


def stride(height: int, width: int, max_side: int) -> int:
    """Pixels from one that :func:`thumbnail` takes to the next; the first is half a stride from the edge."""
    return max(1, math.ceil(max(height, width) / max_side))


def write_quicklook(
    path: str | Path,
    *,
    composite: xr.DataArray | None,
    land_cover: xr.DataArray,
    legend: Legend,
    title: str,
    subtitle: str = "",
    inside: npt.NDArray[np.bool_] | None = None,
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
    inside
        (y, x) which pixels of ``land_cover`` are of the area, if not all: the others are neither counted nor drawn.
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
    images = [] if composite is None else [scene_image(composite)]
    images.append((_map_image(codes, legend, inside), "Land cover"))
    aspect = codes.shape[1] / codes.shape[0]
    wide = aspect > 1.7 and len(images) > 1
    width, height = fit(aspect, 8.5 if wide else 5.2, 3.4 if wide else 6.0)
    cell = max(width, 1.3)
    panels = [
        _Panel(image, label, *((0.0, i * (height + _LABEL + 0.1)) if wide else (i * (cell + _GAP), 0.0)), width, height)
        for i, (image, label) in enumerate(images)
    ]
    counted = codes if inside is None else codes[..., inside]
    _draw(path, panels, _metres_across(land_cover), _entries(counted, legend), title, subtitle)
    return path


def write_quicklook_series(
    path: str | Path,
    *,
    composites: xr.DataArray | None,
    land_cover: xr.DataArray,
    legend: Legend,
    title: str,
    subtitle: str = "",
    inside: npt.NDArray[np.bool_] | None = None,
    overwrite: bool = False,
) -> Path:
    """Draw maps of several dates in columns, each below its image, up to six to a row, with one legend for all.

    Parameters
    ----------
    path
        Where the PNG goes.
    composites
        (time, band, y, x), as in :func:`write_quicklook`; one stretch for all dates, that of the clearest.
    land_cover
        (time, y, x) codes with a geobox.
    legend, title, subtitle, inside, overwrite
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
    rows_of_images = [_map_image(codes, legend, inside)]
    if composites is not None:
        rows_of_images.insert(0, scene_image(composites)[0])
    aspect = codes.shape[2] / codes.shape[1]
    width, height = fit(aspect, 2.2, 2.6)
    columns = math.ceil(len(dates) / math.ceil(len(dates) / _COLUMNS))
    cell, band = max(width, 1.3) + 0.12, len(rows_of_images) * (height + 0.08) + _LABEL + 0.12
    panels = [
        _Panel(images[i], label, column * cell, row * band + k * (height + 0.08), width, height)
        for i, date in enumerate(dates)
        for row, column in [divmod(i, columns)]
        for k, (images, label) in enumerate(zip(rows_of_images, (date.replace("T", " "), ""), strict=False))
    ]
    counted = codes if inside is None else codes[..., inside]
    _draw(path, panels, _metres_across(land_cover), _entries(counted, legend), title, subtitle)
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


# -- page -------------------------------------------------------------------------------------------------------------


def _map_image(codes: npt.NDArray[np.uint8], legend: Legend, inside: npt.NDArray[np.bool_] | None) -> Image:
    image = colored(codes, legend)
    if inside is not None:
        image[..., ~inside, :] = BLANK
    return image


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
    entries: Sequence[_Entry],
    title: str,
    subtitle: str,
) -> None:
    right = max(p.x + max(p.width, 1.3) for p in panels)
    bottom = max(p.y + p.height for p in panels)
    page_width = MARGIN + right + _GAP + _LEGEND_WIDTH + MARGIN
    head = Head(title, subtitle, page_width)
    top = head.height + _LABEL
    page_height = top + max(bottom + _BELOW, sum(e.height for e in entries) + 0.05) + MARGIN / 2

    page = Page(page_width, page_height)
    head.draw(page)
    for panel in panels:
        x, y = MARGIN + panel.x, top + panel.y
        page.image(x, y, panel.width, panel.height, panel.image)
        page.text(x, y - 0.07, panel.label, va="bottom")
    last_row = max(p.y for p in panels)
    under = next(p for p in reversed(panels) if p.y == last_row)
    first_in_row = next(p for p in panels if p.y == last_row) if len(panels) > 2 else under
    _scale(page, MARGIN + first_in_row.x, top + bottom + 0.12, first_in_row.width, metres)
    _legend(page, MARGIN + right + _GAP, top, entries)
    page.save(path)


def _scale(page: Page, x: float, y: float, width: float, metres: float) -> None:
    """A bar of a round length, about a third of the panel, and north."""
    length = _round_length(metres / 3)
    inches = width * length / metres
    for i, color in enumerate((INK, "white")):
        page.box(x + i * inches / 2, y, inches / 2, 0.05, color, INK)
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
    return next((step * power for step in (5, 2) if step * power <= at_most), power)


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
        entries.append(_Entry((f"no data ({amount} of all)",), "", str(blank_of(legend) / 255), EDGE))
    return entries


def _legend(page: Page, x: float, y: float, entries: Sequence[_Entry]) -> None:
    for entry, (row, _) in zip(entries, pairwise(np.cumsum([0, *(e.height for e in entries)])), strict=True):
        page.box(x, y + row, 0.24, 0.15, entry.color, entry.edge)
        for i, line in enumerate(entry.lines):
            page.text(x + 0.34, y + row + 0.075 + i * _LINE, line, va="center", color=INK if entry.share else FAINT)
        page.text(x + _LEGEND_WIDTH, y + row + 0.075, entry.share, ha="right", va="center")
