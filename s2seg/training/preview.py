"""What the network is about to see: chips, their labels, and what augmentation makes of them, on one page."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from s2seg.legend import Legend
from s2seg.outputs._files import check_writable
from s2seg.outputs._page import BLANK, FAINT, MARGIN, Image, Key, Page, Swatch, colored, three_bands
from s2seg.training.augment import IGNORE_INDEX, Augment

_CELL, _GAP, _LINE = 1.5, 0.06, 0.2  # inches
_UNLABELLED = 0.35  # how much of its brightness a pixel without a label keeps
_TRIES = 8  # for a version that a chip does not have yet


def write_preview(
    path: str | Path,
    images: npt.NDArray[np.uint16],
    labels: npt.NDArray[np.uint8],
    augment: Augment,
    legend: Legend,
    *,
    mixed: Sequence[tuple[npt.NDArray[np.uint16], npt.NDArray[np.uint8]]] = (),
    seed: int = 0,
    rows: int = 6,
    columns: int = 6,
    overwrite: bool = False,
) -> Path:
    """Draw a row for each chip: as it is, its labels, and augmented versions of it outlined in the labels' colours.

    No version of a chip is shown twice, as far as there are others. All pictures share one stretch, so that brightness
    and haze can be compared. Augmented versions are darkened where they have no label, and white where they have no
    data.

    Parameters
    ----------
    path
        Where the PNG goes.
    images
        (n, band, h, w) stored numbers, 0 for nodata. The first ``rows`` are drawn, and borrow from each other.
    labels
        (n, h, w) legend codes.
    augment
        What changes them; its bands are the images'. Shown in true colour, or in false colour where red, green or blue
        is missing; of seasonal bands the first season.
    legend
        Classes and colours.
    mixed
        The same chips with rectangles of other dates, images and labels: what is augmented in the first column, in the
        second, and so on, and over again. By default the chips themselves are.
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
    channel_of, code_of = np.full(256, IGNORE_INDEX, np.uint8), np.full(256, legend.nodata, np.uint8)
    channel_of[list(legend.codes)] = range(len(legend))
    code_of[: len(legend)] = legend.codes
    codes = code_of[channel_of[labels]]

    pictures = [_picture(images[:, shown], low, high), colored(codes, legend)]
    generator = torch.Generator().manual_seed(seed)
    batches = [
        (torch.from_numpy(np.ascontiguousarray(a[:rows])), torch.from_numpy(channel_of[b[:rows]].astype(np.int64)))
        for a, b in mixed or [(images, labels)]
    ]
    for changed, moved in _versions(augment, list(islice(cycle(batches), columns - 2)), images, generator):
        picture, valid = _picture(changed[:, shown], low, high), (changed != 0).all(1)
        pictures.append(_outlined(picture, code_of[moved], valid, legend))
    title = (f"Augmented: {augment.spec}", f"shown: {', '.join(augment.bands[i] for i in shown)}; seed {seed}")
    return _draw(path, pictures, title, [Swatch(c.name, c.color) for c in legend if (codes == c.code).any()])


def _versions(
    augment: Augment,
    batches: Sequence[tuple[torch.Tensor, torch.Tensor]],
    images: npt.NDArray[np.uint16],
    generator: torch.Generator,
) -> Iterator[tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
    """Augment each batch; where a chip would look as before, or as it is, it is drawn again a few times."""
    seen: list[npt.NDArray[Any]] = [images]
    for batch in batches:
        changed, moved = (values.numpy().copy() for values in augment(*batch, generator))
        for _ in range(_TRIES):
            same = np.any([(changed == before).all((1, 2, 3)) for before in seen], axis=0)
            if not same.any():
                break
            for values, others in zip((changed, moved), augment(*batch, generator), strict=True):
                values[same] = others.numpy()[same]
        seen.append(changed)
        yield changed, moved


def _shown(bands: Sequence[str]) -> list[int]:
    """Indices of the bands for red, green and blue."""
    names = [band.partition("@")[0] for band in bands]
    return [names.index(name) for name in three_bands(names)[0]]


# -- pictures, all (n, h, w, 3) ---------------------------------------------------------------------------------------


def _limits(images: npt.NDArray[np.uint16]) -> tuple[float, float]:
    """2nd and 98th percentile of what is not nodata."""
    values = images[images > 0]
    low, high = np.percentile(values, (2, 98)) if len(values) else (0.0, 1.0)
    return float(low), max(float(high), float(low) + 1)


def _picture(images: npt.NDArray[np.uint16] | npt.NDArray[np.float32], low: float, high: float) -> Image:
    values = np.moveaxis(images, 1, -1).astype(np.float32)
    picture = (np.clip((values - low) / (high - low), 0, 1) * 255).round().astype(np.uint8)
    picture[(values == 0).any(-1)] = BLANK
    return picture


def _outlined(picture: Image, codes: npt.NDArray[np.uint8], valid: npt.NDArray[np.bool_], legend: Legend) -> Image:
    """Draw each class's rim in its colour, and darken what has data but no label."""
    labelled = codes != legend.nodata
    dark = (picture * _UNLABELLED).astype(np.uint8)
    picture = np.where((valid & ~labelled)[..., None], dark, picture)
    # one pixel wide, on the side that is above or left of the border: fine patterns stay visible
    rim = np.zeros(codes.shape, bool)
    rim[:, :-1] |= codes[:, 1:] != codes[:, :-1]
    rim[:, :, :-1] |= codes[:, :, 1:] != codes[:, :, :-1]
    rim &= labelled
    picture[rim] = colored(codes[rim], legend)
    return picture


def _draw(path: Path, pictures: Sequence[Image], title: tuple[str, str], classes: Sequence[Swatch]) -> Path:
    rows, height, width = pictures[0].shape[:3]
    cell = _CELL * height / width
    across = len(pictures) * (_CELL + _GAP) - _GAP
    heads = textwrap.wrap(title[0], int(across / 0.095))
    key = Key(classes, across)
    top = MARGIN + (len(heads) + 2) * _LINE + 0.05
    bottom = top + rows * (cell + _GAP) + 0.05
    page = Page(across + 2 * MARGIN, bottom + key.height + MARGIN)
    for i, line in enumerate(heads):
        page.text(MARGIN, MARGIN + i * _LINE, line, size=10)
    page.text(MARGIN, MARGIN + len(heads) * _LINE, title[1], size=8, color=FAINT)
    names = ("chip", "labels", *(f"augmented {i + 1}" for i in range(len(pictures) - 2)))
    for column, (picture, name) in enumerate(zip(pictures, names, strict=True)):
        x = MARGIN + column * (_CELL + _GAP)
        page.text(x, top - _LINE, name, size=8)
        for row, image in enumerate(picture):
            page.image(x, top + row * (cell + _GAP), _CELL, cell, image)
    key.draw(page, MARGIN, bottom)
    return page.save(path)
