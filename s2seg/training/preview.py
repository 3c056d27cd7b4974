"""What the network is about to see: chips, their labels, and what augmentation makes of them, on one page."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from s2seg.legend import LandClass, Legend
from s2seg.outputs._files import check_writable, replacing, writing
from s2seg.training.augment import IGNORE_INDEX, Augment

Picture = npt.NDArray[np.uint8]

_DPI = 150
_CELL, _GAP, _MARGIN, _LINE = 1.5, 0.06, 0.25, 0.2  # inches
_INK, _FAINT = "#222222", "#666666"
_NODATA = 255  # white
_UNLABELLED = 0.35  # how much of its brightness a pixel without a label keeps
_SWATCHES = 5  # classes in a line of the legend


def write_preview(
    path: str | Path,
    images: npt.NDArray[np.uint16],
    labels: npt.NDArray[np.uint8],
    augment: Augment,
    legend: Legend,
    *,
    seed: int = 0,
    rows: int = 6,
    columns: int = 6,
    overwrite: bool = False,
) -> Path:
    """Draw a row for each chip: as it is, its labels, and augmented versions of it outlined in the labels' colours.

    All pictures share one stretch, so that brightness and haze can be compared. Augmented versions are darkened where
    they have no label, and white where they have no data.

    Parameters
    ----------
    path
        Where the PNG goes.
    images
        (n, band, h, w) stored numbers, 0 for nodata. The first ``rows`` are drawn, and borrow from each other.
    labels
        (n, h, w) legend codes.
    augment
        What changes them; its bands are the images'. Red, green and blue are shown, or else the first three.
    legend
        Classes and colours.
    seed
        Of the random numbers.
    rows, columns
        Pictures down and across, the chip itself and its labels included.
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
    images, labels = images[:rows], labels[:rows]
    shown = _shown(augment.bands)
    low, high = _limits(images[:, shown])
    table = np.full(256, IGNORE_INDEX, np.uint8)
    table[list(legend.codes)] = range(len(legend))
    channels = table[labels]

    pictures = [_picture(images[:, shown], low, high), _classes(channels, legend)]
    generator = torch.Generator().manual_seed(seed)
    batch = torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(channels.astype(np.int64))
    for _ in range(columns - 2):
        changed, moved = (values.numpy() for values in augment(*batch, generator))
        picture, valid = _picture(changed[:, shown], low, high), (changed != 0).all(1)
        pictures.append(_outlined(picture, moved.astype(np.uint8), valid, legend))
    title = (f"Augmented: {augment.spec}", f"shown: {', '.join(augment.bands[i] for i in shown)}; seed {seed}")
    _draw(path, pictures, title, [c for i, c in enumerate(legend) if (channels == i).any()])
    return path


def _shown(bands: Sequence[str]) -> list[int]:
    """Indices of the bands for red, green and blue; of several dates the first one's."""
    names = [band.partition("@")[0] for band in bands]
    if {"red", "green", "blue"} <= set(names):
        return [names.index(name) for name in ("red", "green", "blue")]
    return [0, 1, 2] if len(names) >= 3 else [0, 0, 0]


# -- pictures, all (n, h, w, 3) ---------------------------------------------------------------------------------------


def _limits(images: npt.NDArray[np.uint16]) -> tuple[float, float]:
    """2nd and 98th percentile of what is not nodata."""
    values = images[images > 0]
    low, high = np.percentile(values, (2, 98)) if len(values) else (0.0, 1.0)
    return float(low), max(float(high), float(low) + 1)


def _picture(images: npt.NDArray[np.uint16] | npt.NDArray[np.float32], low: float, high: float) -> Picture:
    values = np.moveaxis(images, 1, -1).astype(np.float32)
    picture = (np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    picture[(values == 0).any(-1)] = _NODATA
    return picture


def _colors(legend: Legend) -> Picture:
    """(256, 3): the colour of each channel."""
    table = np.full((256, 3), _NODATA, np.uint8)
    table[: len(legend)] = [c.rgb for c in legend]
    return table


def _classes(channels: npt.NDArray[np.uint8], legend: Legend) -> Picture:
    picture: Picture = _colors(legend)[channels]
    return picture


def _outlined(
    picture: Picture, channels: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_], legend: Legend
) -> Picture:
    """Draw each class's rim in its colour, and darken what has data but no label."""
    labelled = channels != IGNORE_INDEX
    dark = (picture * _UNLABELLED).astype(np.uint8)
    picture = np.where((valid & ~labelled)[..., None], dark, picture)
    # one pixel wide, on the side that is above or left of the border: fine patterns stay visible
    rim = np.zeros(channels.shape, bool)
    rim[:, :-1] |= channels[:, 1:] != channels[:, :-1]
    rim[:, :, :-1] |= channels[:, :, 1:] != channels[:, :, :-1]
    rim &= labelled
    picture[rim] = _colors(legend)[channels[rim]]
    return picture


# -- page, in inches from the top left corner -------------------------------------------------------------------------


def _draw(path: Path, pictures: Sequence[Picture], title: tuple[str, str], classes: Sequence[LandClass]) -> None:
    rows, height, width = pictures[0].shape[:3]
    cell = _CELL * height / width
    across = len(pictures) * (_CELL + _GAP) - _GAP
    heads = textwrap.wrap(title[0], int(across / 0.095))
    top = _MARGIN + (len(heads) + 2) * _LINE + 0.05
    bottom = top + rows * (cell + _GAP) + 0.05
    page = _Page(across + 2 * _MARGIN, bottom + math.ceil(len(classes) / _SWATCHES) * _LINE + _MARGIN)
    for i, line in enumerate(heads):
        page.text(_MARGIN, _MARGIN + i * _LINE, line, 10)
    page.text(_MARGIN, _MARGIN + len(heads) * _LINE, title[1], 8, _FAINT)
    names = ("chip", "labels", *(f"augmented {i + 1}" for i in range(len(pictures) - 2)))
    for column, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        x = _MARGIN + column * (_CELL + _GAP)
        page.text(x, top - _LINE, name, 8)
        for row, image in enumerate(picture):
            page.image(x, top + row * (cell + _GAP), cell, image)
    step = across / _SWATCHES
    for i, c in enumerate(classes):
        x, y = _MARGIN + i % _SWATCHES * step, bottom + i // _SWATCHES * _LINE
        page.swatch(x, y, c.color)
        page.text(x + 0.2, y, textwrap.shorten(c.name, int(step / 0.075), placeholder="…"), 7)
    with replacing(path) as partial, writing(path):
        page.figure.savefig(partial, format="png", dpi=_DPI)


class _Page:
    """A figure that is drawn on in inches from its top left corner."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
        FigureCanvasAgg(self.figure)

    def text(self, x: float, y: float, text: str, size: float, color: str = _INK) -> None:
        middle, inches = self.height - y - _LINE / 2, self.figure.dpi_scale_trans
        self.figure.text(x, middle, text, size=size, color=color, va="center", transform=inches, parse_math=False)

    def swatch(self, x: float, y: float, color: str) -> None:
        corner, inches = (x, self.height - y - _LINE / 2 - 0.05), self.figure.dpi_scale_trans
        self.figure.add_artist(Rectangle(corner, 0.14, 0.1, facecolor=color, transform=inches))

    def image(self, x: float, y: float, height: float, image: Picture) -> None:
        bottom = (self.height - y - height) / self.height
        axes = self.figure.add_axes((x / self.width, bottom, _CELL / self.width, height / self.height))
        axes.imshow(image, interpolation="nearest", aspect="auto")
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set(color="#999999", linewidth=0.5)
