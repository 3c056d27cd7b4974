"""A picture of a split: where a model learns, where it is tuned, and where it is judged.

Hue says the class, hatching the part: a tint would look like one class or another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.colors import to_hex, to_rgb
from matplotlib.patches import Rectangle

from s2seg.legend import Legend
from s2seg.outputs._files import check_writable
from s2seg.outputs._page import BLANK, EDGE, FAINT, MARGIN, Image, Key, Page, Swatch, colored, fit, text_width
from s2seg.outputs.quicklook import thumbnail
from s2seg.training.chips import ChipStore
from s2seg.training.cutting import Place
from s2seg.training.splits import PARTS

_INK = "#262626"
_HATCHES = ("", "///", "xxx")  # over the classes of train, validation, test
_NEITHER = "no label; paler: in no part"
_DIMMED = 0.5  # how far the labels fade to white
_SIDE = 1000  # pixels of a panel
_PANELS, _COLUMNS = 12, 3
_GAP, _NAMES = 0.25, 0.42  # inches between panels, and above each one
_BAR, _BAR_ROW = 7.0, 0.62  # width of a bar of classes, and height of its row
_PARTS_KEY = 0.28  # height of the parts' line below the panels
_LEAST = 3.3  # inches that the text above a panel needs

Codes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Panel:
    """One area, every n-th pixel: (y, x) labels and parts."""

    name: str
    labels: Codes
    split: Codes
    width: float
    height: float


def draw_split(regions: Sequence[Place], path: str | Path, legend: Legend, *, overwrite: bool = False) -> Path:
    """Draw the labels of each area, dimmed, with the parts of the split outlined and all but train hatched.

    Parameters
    ----------
    regions
        Dates of one area are drawn once; of more than twelve areas the first twelve are drawn.
    path
        Where the PNG goes.
    legend
        Of the labels.
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
    areas = list({r.name: r for r in regions}.values())[:_PANELS]
    columns = min(len(areas), _COLUMNS)
    panels = [_panel(area, 6.6 if columns == 1 else 4.0) for area in areas]
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    cell = max(_LEAST, *(p.width for p in panels)) + _GAP
    heights = [_NAMES + max(p.height for p in row) + _GAP for row in rows]
    width = max(columns * cell - _GAP, _parts_key_width())
    classes = _classes(panels, legend)
    key = Key(classes, width)
    page = Page(width + 2 * MARGIN, MARGIN + sum(heights) + _PARTS_KEY + key.height + MARGIN)
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for k, panel in enumerate(row):
            _draw(page, MARGIN + k * cell, y, panel, legend)
        y += height
    _draw_parts_key(page, MARGIN, y, [swatch.color for swatch in classes])
    key.draw(page, MARGIN, y + _PARTS_KEY)
    return page.save(path)


def draw_tiles(chips: ChipStore, path: str | Path, *, overwrite: bool = False) -> Path:
    """Draw the split of ready-cut tiles: how many each part has, and a bar of its classes.

    Parameters
    ----------
    chips
        What was cut from the tiles.
    path
        Where the PNG goes.
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
    key = Key([Swatch(c.name, c.color) for c in chips.legend], _BAR)
    page = Page(_BAR + 2 * MARGIN, MARGIN + len(PARTS) * _BAR_ROW + key.height + MARGIN)
    for row, part in enumerate(PARTS):
        y, indices = MARGIN + row * _BAR_ROW, chips.indices(part)
        tiles = len(set(chips.area[indices]))
        page.text(MARGIN, y, f"{part}: {tiles} tiles, {len(indices)} chips")
        _bar(page, y + 0.2, chips.histogram[indices].sum(axis=0), chips.legend)
    key.draw(page, MARGIN, MARGIN + len(PARTS) * _BAR_ROW)
    return page.save(path)


def _bar(page: Page, y: float, pixels: npt.NDArray[np.int64], legend: Legend) -> None:
    """Draw each class as wide as its share."""
    widths = pixels * (_BAR / max(pixels.sum(), 1))
    for color, width, right in zip(legend.colors, widths, np.cumsum(widths), strict=True):
        page.box(MARGIN + float(right - width), y, float(width), 0.25, color)
    page.box(MARGIN, y, _BAR, 0.25, "none", EDGE)


def _panel(area: Place, side: float) -> _Panel:
    labels, split = (thumbnail(plane, _SIDE).transpose("y", "x").to_numpy() for plane in (area.labels, area.split))
    return _Panel(area.name, labels, split, *fit(labels.shape[1] / labels.shape[0], side, side))


def _classes(panels: Sequence[_Panel], legend: Legend) -> list[Swatch]:
    """Colours of the classes that occur."""
    present = {int(code) for panel in panels for code in np.unique(panel.labels)}
    return [Swatch(c.name, _faded(c.color, _DIMMED)) for c in legend if c.code in present]


def _draw_parts_key(page: Page, x: float, y: float, colors: Sequence[str]) -> None:
    """Show each part as it looks on a few classes, and what is in none."""
    some = np.array([[np.multiply(to_rgb(color), 255) for color in colors[:3] or ["white"]]]).round().astype(np.uint8)
    for part, hatch in zip(PARTS, _HATCHES, strict=True):
        axes = page.image(x, y + 0.05, 0.42, 0.17, some)
        axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, fill=False, hatch=hatch, color=_INK))
        page.text(x + 0.5, y + 0.135, part, va="center")
        x += 0.8 + text_width(part)
    page.box(x, y + 0.05, 0.42, 0.17, "white", EDGE)
    page.text(x + 0.5, y + 0.135, _NEITHER, va="center")


def _parts_key_width() -> float:
    return sum(0.8 + text_width(part) for part in PARTS) + 0.5 + text_width(_NEITHER)


def _draw(page: Page, x: float, y: float, panel: _Panel, legend: Legend) -> None:
    page.text(x, y, panel.name)
    page.text(x, y + 0.18, _shares(panel, legend), size=7.5, color=FAINT)
    axes = page.image(x, y + _NAMES, panel.width, panel.height, _image(panel, legend))
    for code, hatch in enumerate(_HATCHES, 1):
        # one pixel of nothing around, so that outlines close at the edge
        mask = np.pad(panel.split == code, 1).astype(np.uint8)
        if mask.any():
            rows, cols = (np.arange(n) - 1 for n in mask.shape)
            axes.contour(cols, rows, mask, levels=[0.5], colors=_INK, linewidths=0.6 if code == 1 else 1.4)
        if mask.any() and hatch:
            filled = axes.contourf(cols, rows, mask, levels=[0.5, 1.5], colors="none", hatches=[hatch])
            filled.set(edgecolor=_INK, linewidth=0)


def _shares(panel: _Panel, legend: Legend) -> str:
    counts = np.bincount(panel.split[np.isin(panel.labels, legend.codes)], minlength=len(PARTS) + 1)
    total = max(counts.sum(), 1)
    buffer = f", {counts[0] / total:.0%} unused" if counts[0] else ""
    return ", ".join(f"{n / total:.0%} {part}" for part, n in zip(PARTS, counts[1:], strict=True)) + buffer


def _image(panel: _Panel, legend: Legend) -> Image:
    image = colored(panel.labels, legend) * (1 - _DIMMED) + BLANK * _DIMMED
    image[panel.split == 0] = image[panel.split == 0] * 0.25 + BLANK * 0.75
    return image.astype(np.uint8)


def _faded(color: str, share: float) -> str:
    """Mix a colour with a share of white."""
    red, green, blue = (channel * (1 - share) + share for channel in to_rgb(color))
    return to_hex((red, green, blue))
