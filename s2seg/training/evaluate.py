"""Score a model where it was not trained: the same windows as mapping, one confusion matrix over all pixels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr

from s2seg.assess.confusion import Confusion, confusion_of
from s2seg.assess.forest import Forest, fit_forest
from s2seg.assess.pictures import Comparison, write_comparison, write_confusion
from s2seg.assess.scores import Scores, write_scores
from s2seg.errors import InputError
from s2seg.inference import predict
from s2seg.legend import Legend
from s2seg.models.bundle import ModelBundle
from s2seg.progress import Progress, silent
from s2seg.training.chips import ChipStore
from s2seg.training.cutting import Place
from s2seg.training.splits import PARTS

_FOREST_CHIPS = 4000
"""Chips of which the forest's pixels are drawn, at most: they are held in memory."""

_SHOWN = 4
"""Places in the picture."""


@dataclass(frozen=True)
class Evaluation:
    """What was counted, and pictures of some of it.

    Parameters
    ----------
    part
        ``test``, ``validation`` or ``train``.
    confusions
        Name of a model -> counts over all labelled pixels of the part.
    pictures
        Windows of the part, for :func:`s2seg.assess.pictures.write_comparison`.
    """

    part: str
    confusions: Mapping[str, Confusion]
    pictures: Sequence[Comparison]

    @property
    def scores(self) -> dict[str, Scores]:
        """Name of a model -> its scores."""
        return {name: Scores(counts) for name, counts in self.confusions.items()}


def baseline(chips: ChipStore, seed: int = 0) -> Forest:
    """Fit the per-pixel random forest on the training chips.

    Parameters
    ----------
    chips
        What the network was trained on.
    seed
        Of the pixels and the trees.
    """
    train = chips.indices("train")
    if len(train) > _FOREST_CHIPS:
        train = np.sort(np.random.default_rng(seed).choice(train, _FOREST_CHIPS, replace=False))
    return fit_forest(*chips.read(train), chips.legend, seed=seed)


def check_evaluation(model: ModelBundle, part: str, legend: Legend, bands: Sequence[str]) -> None:
    """Refuse to score a model on a part that does not exist, or on labels and scenes that are not for it.

    Parameters
    ----------
    model
        What is scored.
    part
        ``test``, ``validation`` or ``train``.
    legend
        Of the labels.
    bands
        Of the scenes.

    Raises
    ------
    InputError
        Which of them does not fit, and how to mend it.
    """
    if part not in PARTS:
        raise InputError(f"there is no part {part!r}: choose {', '.join(PARTS)}")
    if model.spec.legend != legend:
        raise InputError(
            f"the model's legend {model.spec.legend.name!r} is not that of the labels, {legend.name!r}: "
            "give the labels the model's legend, with remap where their codes differ"
        )
    if missing := [band for band in model.spec.bands if band not in bands]:
        raise InputError(
            f"the model needs {', '.join(missing)}, and the configuration has {', '.join(bands)}: name all of the "
            "model's in bands; its own configuration does (leave out --config and --set)"
        )


def evaluate(
    model: ModelBundle,
    chips: ChipStore,
    regions: Sequence[Place],
    *,
    part: str = "test",
    forest: Forest | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Map every region as :func:`s2seg.predict` does, and count the labelled pixels of one part of the split.

    Parameters
    ----------
    model
        With the legend of the chips.
    chips
        The store that the model was trained on; it knows the windows of each part.
    regions
        The regions or tiles of that store, in its order.
    part
        ``test``, ``validation`` or ``train``.
    forest
        A baseline to count as well; see :func:`baseline`.
    on_progress
        Called with (stage, done, total).

    Raises
    ------
    InputError
        If the part has no chips, or the model has another legend or other bands.
    """
    check_evaluation(model, part, chips.legend, chips.bands)
    if not len(chips.indices(part)):
        raise InputError(f"the split has no chips for {part}: give it a share in split.fractions")
    report = on_progress or silent
    counts: dict[str, Confusion] = {}
    maps: dict[int, dict[str, xr.DataArray]] = {}
    for index, region in enumerate(regions):
        report("evaluate", index + 1, len(regions))
        asked = region.split == PARTS.index(part) + 1
        if not bool(asked.any()):
            continue  # nothing of it is in this part
        maps[index] = {_name(model): predict(region.scene, model).land_cover}
        if forest:
            maps[index]["forest"] = forest.predict(region.scene)
        for name, found in _count(region, maps[index], asked, chips.legend, report):
            counts[name] = counts[name] + found if name in counts else found
    shown = [(chip, int(chips.origin[chip, 0])) for chip in _telling(chips, part)]
    return Evaluation(part, counts, [_picture(chips, chip, regions[i], maps[i], part) for chip, i in shown])


def _name(model: ModelBundle) -> str:
    name = str(model.spec.architecture["name"])
    return "U-Net" if name.lower() == "unet" else name


def _count(
    region: Place, maps: Mapping[str, xr.DataArray], asked: xr.DataArray, legend: Legend, report: Progress
) -> Iterator[tuple[str, Confusion]]:
    for name, codes in maps.items():
        # a tile is done in a moment: its number will do
        step = partial(report, f"{name}, {region.name} {region.date}") if region.date else None
        yield name, confusion_of(region.labels, codes, legend, where=asked, on_progress=step)


def _picture(chips: ChipStore, chip: int, region: Place, maps: Mapping[str, xr.DataArray], part: str) -> Comparison:
    """A window with the labels of its part alone: what lies in it of other parts may have been learned."""
    _, row, col = (int(v) for v in chips.origin[chip])
    at = {"y": slice(row, row + int(chips.size[chip])), "x": slice(col, col + int(chips.size[chip]))}
    where = [region.name, *([region.date] if region.date else []), f"row {row}", f"column {col}"]
    return Comparison(
        image=region.scene.isel(at).compute(),
        truth=np.where(
            region.split.isel(at) == PARTS.index(part) + 1, region.labels.isel(at), np.uint8(chips.legend.nodata)
        ),
        predictions={name: codes.isel(at).values for name, codes in maps.items()},
        caption=", ".join(where),
    )


def _telling(chips: ChipStore, part: str) -> list[int]:
    """Chips with many labels of this part and many classes in even shares, at places that do not overlap."""
    indices = chips.indices(part)
    labels = chips.histogram[indices].sum(axis=1, keepdims=True)
    shares = chips.histogram[indices] / labels
    worth = -(labels * shares * np.log(np.maximum(shares, 1e-9))).sum(axis=1)
    chosen: list[int] = []
    for i in indices[np.argsort(-worth, kind="stable")]:
        apart = np.abs(chips.origin[chosen, 1:] - chips.origin[i, 1:]).max(axis=1, initial=0) >= chips.size[i]
        elsewhere = chips.area[chosen] != chips.area[i]
        if (apart | elsewhere).all():
            chosen.append(int(i))
        if len(chosen) == _SHOWN:
            break
    return chosen


def write_evaluation(evaluation: Evaluation, folder: str | Path, title: str) -> list[Path]:
    """Write ``scores_PART.json``, ``confusion_PART_MODEL.png`` and ``maps_PART.png``, over earlier ones.

    Parameters
    ----------
    evaluation
        From :func:`evaluate`.
    folder
        Where to; it is made if it does not exist.
    title
        First line of the pictures.

    Returns
    -------
    list of Path
        What was written.

    Raises
    ------
    OutputError
        If a file cannot be written.
    """
    folder, part = Path(folder), evaluation.part
    written = [write_scores(folder / f"scores_{part}.json", evaluation.scores, overwrite=True)]
    for name, counts in evaluation.confusions.items():
        picture = folder / f"confusion_{part}_{name.lower()}.png"
        written.append(write_confusion(picture, counts, f"{title}: {name}, {part} part", overwrite=True))
    legend = next(iter(evaluation.confusions.values())).legend
    maps = folder / f"maps_{part}.png"
    subtitle = f"{part} part" if part == "train" else f"{part} part, never trained on"
    written.append(write_comparison(maps, evaluation.pictures, legend, title, subtitle=subtitle, overwrite=True))
    return written
