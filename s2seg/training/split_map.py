"""A picture of a split: where a model learns, where it is tuned, and where it is judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from s2seg.legend import Legend
from s2seg.outputs._files import check_writable, replacing, writing
from s2seg.training.cutting import Place
from s2seg.training.splits import PARTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#3b3b3b", "#1f6fd6", "#e0301e")  # outlines of train, validation, test
_TINTS = (0.0, 0.45, 0.45)
_DIMMED = 0.5  # how far the labels fade to white
_SIDE = 1000  # pixels of a panel
_PANELS = 12
_DPI = 150


def draw_split(regions: Sequence[Place], path: str | Path, legend: Legend, *, overwrite: bool = False) -> Path:
    """Draw the labels of each area, dimmed, with the parts of the split tinted and outlined.

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
    figure = _figure(list({r.name: r for r in regions}.values())[:_PANELS], legend)
    with replacing(path) as partial, writing(path):
        figure.savefig(partial, format="png", dpi=_DPI, bbox_inches="tight", pad_inches=0.15)
    return path


def _figure(areas: Sequence[Place], legend: Legend) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = min(len(areas), 3)
    rows = math.ceil(len(areas) / columns)
    side = 6.6 if columns == 1 else 4.0
    figure = Figure(figsize=(side * columns, (side + 0.3) * rows), dpi=_DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    present: set[int] = set()
    for axes, area in zip(panels, areas, strict=False):
        labels, split = _small(area)
        present |= set(np.unique(labels).tolist())
        _panel(axes, labels, split, legend)
        axes.set_title(f"{area.name}\n{_shares(labels, split, legend)}", fontsize=9, loc="left", parse_math=False)
    for axes in panels[len(areas) :]:
        axes.axis("off")
    parts = [
        Patch(facecolor=_faded(color, 1 - tint), edgecolor=color, linewidth=1.5, label=part)
        for part, color, tint in zip(PARTS, _COLORS, _TINTS, strict=True)
    ]
    classes = [Patch(facecolor=_faded(c.color, _DIMMED), label=c.name) for c in legend if c.code in present]
    entries = [*parts, Patch(facecolor="white", edgecolor="#bbbbbb", label="no part, no label"), *classes]
    figure.legend(handles=entries, loc="outside lower left", ncols=min(4, 2 + 2 * columns), fontsize=8, frameon=False)
    return figure


def _small(area: Place) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
    """Labels and split, every n-th pixel."""
    step = max(1, math.ceil(max(area.labels.sizes["y"], area.labels.sizes["x"]) / _SIDE))
    labels, split = (
        plane.isel(y=slice(step // 2, None, step), x=slice(step // 2, None, step)).transpose("y", "x").to_numpy()
        for plane in (area.labels, area.split)
    )
    return labels, split


def _shares(labels: npt.NDArray[np.uint8], split: npt.NDArray[np.uint8], legend: Legend) -> str:
    counts = np.bincount(split[np.isin(labels, legend.codes)], minlength=len(PARTS) + 1)
    total = max(counts.sum(), 1)
    buffer = f", {counts[0] / total:.0%} unused" if counts[0] else ""
    return ", ".join(f"{n / total:.0%} {part}" for part, n in zip(PARTS, counts[1:], strict=True)) + buffer


def _panel(axes: Any, labels: npt.NDArray[np.uint8], split: npt.NDArray[np.uint8], legend: Legend) -> None:
    axes.imshow(_image(labels, split, legend), interpolation="nearest")
    for code, color in enumerate(_COLORS, 1):
        # one pixel of nothing around, so that outlines close at the edge
        mask = np.pad(split == code, 1).astype(np.uint8)
        if mask.any():
            at = [np.arange(n) - 1 for n in mask.shape]
            axes.contour(at[1], at[0], mask, levels=[0.5], colors=color, linewidths=0.6 if code == 1 else 1.4)
    axes.set(xticks=[], yticks=[], xlim=(-1, labels.shape[1]), ylim=(labels.shape[0], -1))
    axes.spines[:].set(color="#bbbbbb", linewidth=0.5)


def _image(labels: npt.NDArray[np.uint8], split: npt.NDArray[np.uint8], legend: Legend) -> npt.NDArray[np.uint8]:
    table = np.full((256, 3), 255.0)
    for c in legend:
        table[c.code] = c.rgb
    image = table[labels] * (1 - _DIMMED) + 255 * _DIMMED
    image[split == 0] = image[split == 0] * 0.25 + 255 * 0.75
    for code, (color, tint) in enumerate(zip(_COLORS, _TINTS, strict=True), 1):
        image[split == code] = image[split == code] * (1 - tint) + _rgb(color) * tint
    return image.astype(np.uint8)


def _rgb(color: str) -> npt.NDArray[np.float64]:
    return np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], np.float64)


def _faded(color: str, share: float) -> str:
    red, green, blue = (_rgb(color) * (1 - share) + 255 * share).round().astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"
