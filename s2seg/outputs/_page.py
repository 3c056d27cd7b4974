"""What all pictures share: a page that is drawn on in inches, and how maps and scenes become colours.

Everything is placed from the top left corner, so that a page looks alike for 3 and for 15 classes, for wide and for
tall areas. No pyplot: nothing here touches matplotlib's global state.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import PIL.Image
import xarray as xr
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath
from matplotlib.transforms import BboxBase

from s2seg.legend import Legend
from s2seg.outputs._files import replacing, writing

Image = npt.NDArray[np.uint8]
"""(y, x, 3) red, green and blue."""

MARGIN = 0.35
INK, FAINT, EDGE = "#222222", "#666666", "#999999"
BLANK = 255  # white: no data
_GREY = 178  # and where there are classes of clouds or snow
_NEARLY_WHITE = 230

_DPI = 200
_PNG_LEVEL = 1  # in half of the time of the usual 6, for a few percent more bytes
_SIZE = 8.5  # points, of text
_MIDDLE = 0.4  # how bright the median pixel of a scene should be
_ROW = 0.24  # of a key
_THIN = 20


# -- images -----------------------------------------------------------------------------------------------------------


def blank_of(legend: Legend) -> int:
    """Grey level of what a legend does not have: white, but where a class is nearly white."""
    return _GREY if any(min(c.rgb) > _NEARLY_WHITE for c in legend) else BLANK


def colored(codes: npt.NDArray[np.uint8], legend: Legend) -> Image:
    """(...) legend codes -> (..., 3) in the legend's colours; :func:`blank_of` what the legend does not have."""
    table = np.full((256, 3), blank_of(legend), np.uint8)
    for c in legend:
        table[c.code] = c.rgb
    return table[codes]


def scene_image(scene: xr.DataArray) -> tuple[Image, str]:
    """(..., band, y, x) DN with 0 for nodata -> (..., y, x, 3), and what it shows.

    In true colour, or in false colour where red, green or blue is missing; stretched from the 2nd to the 98th
    percentile of all three bands together, and brightened where clouds or water set the scale. Several dates share the
    stretch of the clearest.
    """
    bands, label = three_bands([str(b) for b in scene["band"].to_numpy()])
    planes = scene.sel(band=bands).transpose("band", ..., "y", "x").to_numpy().astype(np.uint16)
    valid = planes.min(axis=0) > 0
    image = np.full((*valid.shape, 3), BLANK, np.uint8)
    if valid.any():
        table = _stretch(planes[:, valid] if valid.ndim == 2 else _clearest(planes, valid))
        for channel, plane in enumerate(planes):
            np.copyto(image[..., channel], table[plane], where=valid)
    return image, label


def _clearest(planes: npt.NDArray[np.uint16], valid: npt.NDArray[np.bool_]) -> npt.NDArray[np.uint16]:
    """Values of the date with the fewest clouds: the least bright of those that see at least half of what any does."""
    seen = valid.sum(axis=(1, 2))
    dates = [planes[:, i][:, valid[i]] for i in np.flatnonzero(seen >= seen.max() / 2)]
    return min(dates, key=lambda values: float(np.percentile(values, 98)))


def _stretch(values: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    """Brightness of each digital number, (65536,): from the 2nd to the 98th percentile of the values, then brightened.

    Under clouds the land would be black otherwise.
    """
    seen = np.cumsum(np.bincount(values.ravel()))
    low, middle, high = np.searchsorted(seen, np.multiply((0.02, 0.5, 0.98), seen[-1]))
    unit = np.clip((np.arange(2**16) - low) / max(high - low, 1), 0, 1)
    at = np.clip((middle - low) / max(high - low, 1), 0.01, 0.99)
    gamma = np.clip(np.log(_MIDDLE) / np.log(at), 0.45, 1)
    table: npt.NDArray[np.uint8] = (unit**gamma * 255).round().astype(np.uint8)
    return table


def three_bands(available: Sequence[str]) -> tuple[list[str], str]:
    """Bands to show as red, green and blue, and a name for such a picture."""
    if {"red", "green", "blue"} <= set(available):
        return ["red", "green", "blue"], "True colour"
    for bands in (["nir", "red", "green"], ["swir16", "nir", "red"], ["swir22", "swir16", "nir"]):
        if set(bands) <= set(available):
            return bands, f"False colour ({', '.join(bands)})"
    spectral = [b for b in available if b != "scl"] or list(available)
    bands = [*spectral[:3]] if len(spectral) >= 3 else [spectral[0]] * 3
    return bands, spectral[0] if len(spectral) < 3 else f"False colour ({', '.join(bands)})"


def fit(aspect: float, max_width: float, max_height: float) -> tuple[float, float]:
    """Width and height of the largest panel of an aspect (width / height) within bounds.

    An area thinner than one to twenty is drawn as wide as that, or it would not be seen.
    """
    aspect = min(max(aspect, 1 / _THIN), _THIN)
    width = min(max_width, max_height * aspect)
    return width, width / aspect


# -- page -------------------------------------------------------------------------------------------------------------


class Page:
    """A figure that is drawn on in inches from its top left corner.

    Parameters
    ----------
    width, height
        Inches.
    """

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self._figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
        self._canvas = FigureCanvasAgg(self._figure)

    def text(self, x: float, y: float, text: str, *, size: float = _SIZE, color: str = INK, **style: Any) -> None:
        """Write; ``y`` is the top of the first line unless ``va`` says otherwise."""
        style = {"va": "top", "ha": "left"} | style
        inches = self._figure.dpi_scale_trans
        self._figure.text(x, self.height - y, text, size=size, color=color, transform=inches, parse_math=False, **style)

    def box(self, x: float, y: float, width: float, height: float, color: str, edge: str = "none") -> None:
        """Draw a filled rectangle."""
        corner = (x, self.height - y - height)
        self._figure.add_artist(
            Rectangle(
                corner, width, height, facecolor=color, edgecolor=edge, linewidth=0.5,
                transform=self._figure.dpi_scale_trans,
            )
        )  # fmt: skip

    def axes(self, x: float, y: float, width: float, height: float) -> Axes:
        """Make room for a plot."""
        bottom = self.height - y - height
        return self._figure.add_axes((x / self.width, bottom / self.height, width / self.width, height / self.height))

    def image(self, x: float, y: float, width: float, height: float, image: Image) -> Axes:
        """Show pixels as they are, in a thin frame."""
        axes = self.axes(x, y, width, height)
        axes.add_artist(_Pixels(image, axes.bbox))
        height, width = image.shape[:2]
        axes.set(xticks=[], yticks=[], xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
        axes.spines[:].set(color=EDGE, linewidth=0.5)
        return axes

    def save(self, path: Path) -> Path:
        """Write a PNG; it appears under its name when it is complete."""
        self._canvas.draw()  # type: ignore[no-untyped-call]
        image = np.asarray(self._canvas.buffer_rgba())[..., :3]  # type: ignore[no-untyped-call]  # a page is opaque
        with replacing(path) as partial, writing(path):
            PIL.Image.fromarray(image).save(partial, "PNG", compress_level=_PNG_LEVEL, dpi=(_DPI, _DPI))
        return path


class _Pixels(Artist):
    """An image that fills a part of its page: each pixel of that is the nearest of the image.

    ``imshow`` draws the same, by way of floats and in ten times the time.
    """

    def __init__(self, image: Image, box: BboxBase) -> None:
        super().__init__()
        self._image, self._box = image, box

    def draw(self, renderer: RendererBase) -> None:
        left, bottom, right, top = np.rint(self._box.extents).astype(int).tolist()
        height, width = self._image.shape[:2]
        opaque = np.full((height, width, 4), 255, np.uint8)
        opaque[..., :3] = self._image
        # a pixel is one number, so that it is taken in one step; the renderer begins at the bottom
        rows, columns = _nearest(height, top - bottom)[::-1], _nearest(width, right - left)
        shown = opaque.view(np.uint32)[..., 0].take(columns, axis=1).take(rows, axis=0)
        renderer.draw_image(renderer.new_gc(), left, bottom, shown[..., None].view(np.uint8))


def _nearest(have: int, want: int) -> npt.NDArray[np.intp]:
    """Which of ``have`` pixels in a row are shown by each of ``want``."""
    return (2 * np.arange(want) + 1) * have // (2 * want)


class Head:
    """Title and subtitle, wrapped to the width of a page.

    Parameters
    ----------
    title, subtitle
        One line each, as long as they like.
    width
        Inches, of the page.
    """

    _TITLE, _LINE = 0.25, 0.18

    def __init__(self, title: str, subtitle: str, width: float) -> None:
        self._titles = textwrap.wrap(title, int((width - 2 * MARGIN) / 0.115))
        self._subtitles = textwrap.wrap(subtitle, int((width - 2 * MARGIN) / 0.076))
        self._below = MARGIN + self._TITLE * len(self._titles)
        self.height = self._below + self._LINE * len(self._subtitles) + 0.14

    def draw(self, page: Page) -> None:
        """Write at the top of a page."""
        for i, line in enumerate(self._titles):
            page.text(MARGIN, MARGIN + self._TITLE * i, line, size=13, weight="bold")
        for i, line in enumerate(self._subtitles):
            page.text(MARGIN, self._below + self._LINE * i, line, color=FAINT)


@dataclass(frozen=True)
class Swatch:
    """A colour and what it means."""

    name: str
    color: str
    edge: str = EDGE


class Key:
    """Swatches with their names, left to right, as many to a line as fit.

    Parameters
    ----------
    swatches
        What to explain.
    width
        Inches.
    """

    def __init__(self, swatches: Sequence[Swatch], width: float) -> None:
        self._swatches, self._places = swatches, list[tuple[int, float]]()
        line, x = 0, 0.0
        for swatch in swatches:
            needed = 0.32 + text_width(swatch.name)
            if x and x + needed > width:
                line, x = line + 1, 0.0
            self._places.append((line, x))
            x += needed + 0.3
        self.height = _ROW * (line + 1)

    def draw(self, page: Page, x: float, y: float) -> None:
        """Draw with the top left corner at a place."""
        for swatch, (line, right) in zip(self._swatches, self._places, strict=True):
            top = y + 0.06 + line * _ROW
            page.box(x + right, top, 0.24, 0.15, swatch.color, swatch.edge)
            page.text(x + right + 0.32, top + 0.075, swatch.name, va="center")


def text_width(text: str) -> float:
    """Inches that a line of text takes at the usual size."""
    plain = text.replace("$", "S")  # a dollar would start a formula
    return float(TextPath((0, 0), plain, size=_SIZE).get_extents().width) / 72 if plain.strip() else 0.0
