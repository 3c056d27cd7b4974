"""Pictures of how good a map is: the confusion matrix, learning curves, and maps beside the truth.

This module loads matplotlib; import it where a picture is drawn.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.ticker import MaxNLocator

from s2seg.assess.confusion import Confusion
from s2seg.assess.scores import Scores
from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.outputs._files import check_writable
from s2seg.outputs._page import (
    BLANK,
    EDGE,
    FAINT,
    INK,
    MARGIN,
    Head,
    Image,
    Key,
    Page,
    Swatch,
    colored,
    fit,
    scene_image,
    text_width,
)

Codes = npt.NDArray[np.uint8]
Color = tuple[float, float, float]

_GAP = 0.1
_CORRECT = 212  # grey
_RIGHT, _WRONG = (0.07, 0.36, 0.62), (0.78, 0.24, 0.05)
_SIDE = 1.9  # of a panel
_CELL = 0.62
_PRECISION = "precision, %"
_CURVES = ("#1f77b4", "#d1495b", "#3a7d44", "#8a5a9e", "#b8860b", "#555555")


# -- confusion --------------------------------------------------------------------------------------------------------


def write_confusion(path: str | Path, confusion: Confusion, title: str, *, overwrite: bool = False) -> Path:
    """Draw a confusion matrix: of each true class, how much the map calls what.

    Every row adds up to 100 %, so the diagonal is the recall; pixels are written below the percentages. Precision
    stands under the columns, IoU and the number of labelled pixels beside the rows, all shares in percent. Classes that
    are neither in the truth nor in the map are left out.

    Parameters
    ----------
    path
        Where the PNG goes.
    confusion
        Counts over all pixels.
    title
        The first line; the second gives the scores of the whole map.
    overwrite
        Replace what stands at ``path``.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    InputError
        If nothing was counted.
    OutputError
        If the path exists or cannot be written.
    """
    path = check_writable(path, overwrite=overwrite)
    if not confusion.pixels:
        raise InputError("the confusion matrix is empty: no pixel has both a label and an answer")
    scores = Scores(confusion)
    shown = np.flatnonzero(confusion.matrix.sum(axis=0) + confusion.matrix.sum(axis=1))
    names = [textwrap.wrap(confusion.legend.names[i], 24) or [""] for i in shown]
    lengths = [max(text_width(line) for line in name) for name in names]
    left = MARGIN + 0.3 + max(text_width(_PRECISION), *lengths)
    slanted = [0.3 + (length + 0.15 * len(name)) * math.sqrt(0.5) for length, name in zip(lengths, names, strict=True)]
    subtitle = (
        f"Overall accuracy {scores.overall_accuracy:.1%}, mean IoU {scores.mean_iou:.1%}, kappa {scores.kappa:.3f}. "
        "Rows: the truth. Columns: the map. Percent of the row, and pixels."
    )
    reach = max((k + 0.5) * _CELL + length for k, length in enumerate(slanted))
    width = left + max(_CELL * (len(shown) + 2) + 0.15, reach) + MARGIN
    head = Head(title, subtitle, width)
    top = head.height + max(slanted)
    page = Page(width, top + _CELL * len(shown) + 0.12 + 0.25 + MARGIN)
    head.draw(page)
    _matrix(page, scores, shown, left, top)
    _matrix_names(page, confusion.legend, shown, names, left, top)
    _matrix_margins(page, scores, shown, left, top)
    return page.save(path)


def _matrix(page: Page, scores: Scores, shown: npt.NDArray[np.intp], left: float, top: float) -> None:
    matrix = scores.confusion.matrix[np.ix_(shown, shown)]
    for (i, j), count in np.ndenumerate(matrix):
        support = int(matrix[i].sum())
        share = count / support if support else 0.0
        red, green, blue = _shade(_RIGHT if i == j else _WRONG, share**0.6)  # faint shares would all look white
        x, y = left + j * _CELL, top + i * _CELL
        page.box(x, y, _CELL, _CELL, to_hex((red, green, blue)), "#dddddd")
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else INK if count else "#bbbbbb"
        text = _percent(share) if support else "–"
        centre: dict[str, Any] = {"ha": "center", "va": "center", "color": ink}
        page.text(x + _CELL / 2, y + _CELL * (0.4 if count else 0.5), text, size=9.5 if count else 8, **centre)
        if count:
            page.text(x + _CELL / 2, y + _CELL * 0.72, _short(int(count)), size=6.5, **centre)


def _matrix_names(
    page: Page, legend: Legend, shown: npt.NDArray[np.intp], names: list[list[str]], left: float, top: float
) -> None:
    for k, (i, lines) in enumerate(zip(shown, names, strict=True)):
        middle = top + (k + 0.5) * _CELL
        page.box(left - 0.2, middle - 0.1, 0.12, 0.2, legend.colors[i], EDGE)
        page.text(left - 0.28, middle, "\n".join(lines), ha="right", va="center")
        page.box(left + (k + 0.5) * _CELL - 0.1, top - 0.18, 0.2, 0.1, legend.colors[i], EDGE)
        page.text(
            left + (k + 0.5) * _CELL, top - 0.24, "\n".join(lines), rotation=45, rotation_mode="anchor", va="baseline",
            linespacing=0.95,
        )  # fmt: skip


def _matrix_margins(page: Page, scores: Scores, shown: npt.NDArray[np.intp], left: float, top: float) -> None:
    bottom, right = top + _CELL * len(shown), left + _CELL * len(shown) + 0.15
    faint: dict[str, Any] = {"color": FAINT, "ha": "center", "va": "center"}
    for k, i in enumerate(shown):
        middle = (k + 0.5) * _CELL
        page.text(right + _CELL / 2, top + middle, _percent(float(scores.iou[i])), **faint)
        page.text(right + _CELL * 1.5, top + middle, _short(int(scores.support[i])), **faint)
        page.text(left + middle, bottom + 0.2, _percent(float(scores.precision[i])), **faint)
    for k, name in enumerate(("IoU, %", "pixels")):
        page.text(right + (k + 0.5) * _CELL, bottom + 0.2, name, **faint)
    page.text(left - 0.28, bottom + 0.2, _PRECISION, ha="right", va="center", color=FAINT)


# -- learning curves --------------------------------------------------------------------------------------------------


def write_curves(
    path: str | Path, history: Sequence[Mapping[str, float | None]], title: str, *, overwrite: bool = False
) -> Path:
    """Draw learning curves: losses on the left, validation scores on the right, the best epoch marked in both.

    Parameters
    ----------
    path
        Where the PNG goes.
    history
        One mapping per epoch: ``epoch``, losses (``train_loss``, ``val_loss``) and scores from 0 to 1 (``val_mean_iou``
        and any other ``val_...``). Other keys are ignored, what is missing or None leaves a gap.
    title
        The first line.
    overwrite
        Replace what stands at ``path``.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    InputError
        For an empty history.
    OutputError
        If the path exists or cannot be written.
    """
    path = check_writable(path, overwrite=overwrite)
    if not history:
        raise InputError("there is no epoch to draw: the history is empty")
    epochs = _column(history, "epoch")
    reach = (epochs.min() - 0.5, epochs.max() + 0.5)  # also around a single one
    keys = sorted({key for row in history for key in row}, key=lambda key: (not key.startswith("train"), key))
    losses = [key for key in keys if key.endswith("loss")]
    scores = [key for key in keys if key.startswith("val_") and key not in losses]
    best = _column(history, "val_mean_iou")
    at = None if np.isnan(best).all() else int(np.nanargmax(best))
    subtitle = "" if at is None else f"Best mean IoU {best[at]:.3f} after epoch {epochs[at]:g}"

    head = Head(title, subtitle, 10.0)
    page = Page(10.0, head.height + 3.75)
    head.draw(page)
    for k, (label, chosen) in enumerate((("Loss", losses), ("Validation scores", scores))):
        axes = _axes(page, 0.7 + k * 4.75, head.height + 0.3, 4.1, 2.8)
        axes.set_title(label, loc="left", size=9.5, color=INK)
        axes.set_xlim(*reach)
        for color, key in zip(_cycle(len(chosen)), chosen, strict=True):
            axes.plot(epochs, _column(history, key), color=color, lw=1.6, marker="o", ms=2.6, label=_curve_name(key))
        if at is not None:
            axes.axvline(epochs[at], color=EDGE, lw=0.9, ls=(0, (4, 3)), zorder=0)
        if chosen:
            axes.legend(fontsize=8, frameon=False, labelcolor=INK)
    if at is not None:
        axes.plot(epochs[at], best[at], "o", ms=8, mfc="none", mec=INK, mew=1.2)
    return page.save(path)


def _axes(page: Page, x: float, y: float, width: float, height: float) -> Axes:
    axes = page.axes(x, y, width, height)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(EDGE)
    axes.tick_params(labelsize=8, colors=FAINT)
    axes.grid(axis="y", color="#e5e5e5", lw=0.6)
    axes.set_axisbelow(True)
    axes.set_xlabel("epoch", size=8.5, color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    return axes


def _column(history: Sequence[Mapping[str, float | None]], key: str) -> npt.NDArray[np.float64]:
    return np.array([math.nan if row.get(key) is None else row[key] for row in history], float)


def _cycle(n: int) -> list[str]:
    return [_CURVES[i % len(_CURVES)] for i in range(n)]


def _curve_name(key: str) -> str:
    known = {"train_loss": "training", "val_loss": "validation", "val_accuracy": "overall accuracy"}
    return known.get(key, key.removeprefix("val_").replace("_", " ").replace("iou", "IoU"))


# -- maps beside the truth --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One place: what the network saw, what is there, and what one or more models say.

    Parameters
    ----------
    image
        (band, y, x) DN with 0 for nodata and named bands, drawn in true or false colour (of seasonal bands such as
        ``red@summer`` the middle season), or (y, x, 3) uint8 colours as they are.
    truth
        (y, x) uint8 legend codes.
    predictions
        Name of a model -> (y, x) uint8 legend codes.
    caption
        One short line below the row.
    """

    image: xr.DataArray | npt.NDArray[np.uint8]
    truth: Codes
    predictions: Mapping[str, Codes]
    caption: str = ""


def write_comparison(
    path: str | Path,
    rows: Sequence[Comparison],
    legend: Legend,
    title: str,
    *,
    subtitle: str = "",
    overwrite: bool = False,
) -> Path:
    """Draw places row by row: image, labels, each model's map, and where each of them errs.

    In the panels of errors what is right is grey, what is wrong has the colour of the class that the map claims, and
    pixels without a label or without an answer are white; below stands the share that is right.

    Parameters
    ----------
    path
        Where the PNG goes.
    rows
        At least one place; all with the same models.
    legend
        The classes; those that occur are explained at the bottom.
    title, subtitle
        Two lines at the top.
    overwrite
        Replace what stands at ``path``.

    Returns
    -------
    Path
        The path.

    Raises
    ------
    InputError
        For no row, rows with different models, or layers of a row that differ in size.
    OutputError
        If the path exists or cannot be written.
    """
    path = check_writable(path, overwrite=overwrite)
    _check_rows(rows)
    models = list(rows[0].predictions)
    errors = ["Errors, in the map's colour"] if len(models) == 1 else [f"Errors of {m}, in its colour" for m in models]
    columns = ["Image", "Labels", *models, *errors]
    sizes = [fit(row.truth.shape[1] / row.truth.shape[0], _SIDE, _SIDE) for row in rows]
    cell = max(width for width, _ in sizes) + _GAP
    width = max(2 * MARGIN + cell * len(columns) - _GAP, 5.5)
    head = Head(title, subtitle, width)
    key = Key(_classes_in(rows, legend), width - 2 * MARGIN)
    heights = [height + 0.34 for _, height in sizes]
    headers = [textwrap.wrap(name, int(cell / 0.088)) or [""] for name in columns]
    top = head.height + 0.1 + 0.16 * max(map(len, headers))
    page = Page(width, top + sum(heights) + key.height + MARGIN)
    head.draw(page)
    for k, header in enumerate(headers):
        page.text(MARGIN + k * cell, top - 0.08, "\n".join(header), size=9, va="bottom", weight="bold")
    y = top
    for row, size, height in zip(rows, sizes, heights, strict=True):
        _comparison_row(page, row, legend, y, size, cell)
        y += height
    key.draw(page, MARGIN, y)
    return page.save(path)


def _check_rows(rows: Sequence[Comparison]) -> None:
    if not rows:
        raise InputError("there is nothing to compare: no rows were given")
    for number, row in enumerate(rows, 1):
        if list(row.predictions) != list(rows[0].predictions):
            raise InputError(f"row {number} compares other models than row 1; give every row the same ones")
        image = row.image.transpose(..., "y", "x").shape[1:] if isinstance(row.image, xr.DataArray) else row.image.shape
        shapes = {"image": image[:2], "truth": row.truth.shape} | {k: v.shape for k, v in row.predictions.items()}
        if len(set(shapes.values())) > 1:
            sizes = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise InputError(f"the layers of row {number} differ in size: {sizes}")


def _comparison_row(
    page: Page, row: Comparison, legend: Legend, y: float, size: tuple[float, float], cell: float
) -> None:
    predictions = row.predictions.values()
    images = [_image(row.image), *(colored(codes, legend) for codes in (row.truth, *predictions))]
    marked = [_errors(row.truth, codes, legend) for codes in predictions]
    for k, image in enumerate([*images, *(image for image, _ in marked)]):
        page.image(MARGIN + k * cell, y, *size, image)
    page.text(MARGIN, y + size[1] + 0.06, row.caption, size=7.5, color=FAINT)
    for k, (_, share) in enumerate(marked, len(images)):
        text = "nothing to compare" if math.isnan(share) else f"{100 * share:.1f} % right"
        page.text(MARGIN + k * cell, y + size[1] + 0.06, text, size=7.5, color=FAINT)


def _image(image: xr.DataArray | npt.NDArray[np.uint8]) -> Image:
    return scene_image(_one_season(image))[0] if isinstance(image, xr.DataArray) else image


def _one_season(image: xr.DataArray) -> xr.DataArray:
    """Bands of the middle season, under their plain names."""
    bands = [str(band).partition("@") for band in image["band"].to_numpy()]
    seasons = list(dict.fromkeys(season for *_, season in bands))
    season = seasons[len(seasons) // 2]
    chosen = [i for i, (*_, of) in enumerate(bands) if of == season]
    return image.isel(band=chosen).assign_coords(band=[bands[i][0] for i in chosen])


def _errors(truth: Codes, predicted: Codes, legend: Legend) -> tuple[npt.NDArray[np.uint8], float]:
    """Picture of the errors, and the share of the comparable pixels that is right."""
    comparable, right = (truth != legend.nodata) & (predicted != legend.nodata), truth == predicted
    image = colored(predicted, legend)
    image[right] = _CORRECT
    image[~comparable] = BLANK
    return image, float(right[comparable].mean()) if comparable.any() else math.nan


def _classes_in(rows: Sequence[Comparison], legend: Legend) -> list[Swatch]:
    """What the colours of the page mean."""
    present = set(np.unique(np.concatenate([c.ravel() for r in rows for c in (r.truth, *r.predictions.values())])))
    swatches = [Swatch(c.name, c.color) for c in legend if c.code in present]
    swatches.append(Swatch("right", to_hex(str(_CORRECT / 255))))
    return [*swatches, Swatch("no data", "white")] if legend.nodata in present else swatches


# -- colours and numbers ----------------------------------------------------------------------------------------------


def _shade(color: Color, strength: float) -> Color:
    red, green, blue = (1 - strength * (1 - channel) for channel in color)
    return red, green, blue


def _percent(share: float) -> str:
    if math.isnan(share):
        return "–"
    return "0" if share == 0 else "< 0.1" if share < 0.0005 else f"{100 * share:.1f}"


def _short(count: int) -> str:
    """1234567 as 1.23 M."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return str(count)
