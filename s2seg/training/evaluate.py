"""Score a model where it was not trained: the same windows as mapping, one confusion matrix over all pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xarray as xr

from s2seg.assess.confusion import Confusion, confusion, confusion_of
from s2seg.assess.forest import Forest, fit_forest
from s2seg.assess.scores import Scores, write_scores
from s2seg.errors import InputError
from s2seg.inference import predict
from s2seg.models.bundle import ModelBundle
from s2seg.models.runtimes import open_session
from s2seg.training.chips import ChipStore
from s2seg.training.regions import Region
from s2seg.training.splits import PARTS

_FOREST_CHIPS = 4000
"""Chips of which the forest's pixels are drawn, at most: they are held in memory."""

_SHOWN = 4
"""Places in the picture."""

_BATCH = 16

Progress = Callable[[str, int, int], None]
"""Called with a stage's name, what is done, and the total."""


def silent(stage: str, done: int, total: int) -> None:
    """Report to nobody."""


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
        What :func:`s2seg.assess.pictures.write_comparison` draws.
    """

    part: str
    confusions: Mapping[str, Confusion]
    pictures: Sequence[Place]

    @property
    def scores(self) -> dict[str, Scores]:
        """Name of a model -> its scores."""
        return {name: Scores(counts) for name, counts in self.confusions.items()}


@dataclass(frozen=True)
class Place:
    """A window of the part: (band, y, x) pixels, (y, x) labels, and each model's (y, x) codes."""

    image: xr.DataArray
    truth: npt.NDArray[np.uint8]
    predictions: Mapping[str, npt.NDArray[np.uint8]]
    caption: str


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
    return fit_forest(chips.images(train), chips.labels(train), chips.legend, seed=seed)


def evaluate(
    model: ModelBundle,
    chips: ChipStore,
    regions: Sequence[Region],
    *,
    part: str = "test",
    forest: Forest | None = None,
    on_progress: Progress | None = None,
) -> Evaluation:
    """Map every region as :func:`s2seg.predict` does, and count the labelled pixels of one part of the split.

    Ready-cut tiles have no region around them: their chips are classified one by one.

    Parameters
    ----------
    model
        With the legend of the chips.
    chips
        The store that the model was trained on; it knows the windows of each part.
    regions
        The regions of that store, in its order; none for ready-cut tiles.
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
    if part not in PARTS:
        raise InputError(f"there is no part {part!r}: choose {', '.join(PARTS)}")
    if model.spec.legend != chips.legend:
        raise InputError(
            f"the model's legend {model.spec.legend.name!r} is not that of the labels, {chips.legend.name!r}"
        )
    if not len(chips.indices(part)):
        raise InputError(f"the split has no chips for {part}: give it a share in split.fractions")
    report = on_progress or silent
    if regions:
        return _of_regions(model, chips, regions, part, forest, report)
    return _of_chips(model, chips, part, forest, report)


def _of_regions(
    model: ModelBundle, chips: ChipStore, regions: Sequence[Region], part: str, forest: Forest | None, report: Progress
) -> Evaluation:
    names = ["U-Net" if model.spec.architecture["name"] == "Unet" else str(model.spec.architecture["name"])]
    names += ["forest"] if forest else []
    counts: dict[str, Confusion] = {}
    maps: list[dict[str, xr.DataArray]] = []
    for index, region in enumerate(regions):
        lazy = [predict(region.scene, model).land_cover]
        if forest:
            lazy.append(forest.predict(region.scene))
        maps.append(dict(zip(names, lazy, strict=True)))
        asked = region.split == PARTS.index(part) + 1
        for name, prediction in maps[-1].items():
            step = partial(report, f"{name}, {region.name} {region.date}")
            found = confusion_of(region.labels, prediction, chips.legend, where=asked, on_progress=step)
            counts[name] = counts[name] + found if index else found
    places = [_place(chips, i, regions, maps) for i in _telling(chips, part)]
    return Evaluation(part, counts, places)


def _place(chips: ChipStore, chip: int, regions: Sequence[Region], maps: Sequence[Mapping[str, xr.DataArray]]) -> Place:
    index, row, col = (int(v) for v in chips.origin[chip])
    region, side = regions[index], int(chips.size[chip])
    at = {"y": slice(row, row + side), "x": slice(col, col + side)}
    return Place(
        image=region.scene.isel(at).compute(),
        truth=region.labels.isel(at).values,
        predictions={name: codes.isel(at).values for name, codes in maps[index].items()},
        caption=f"{region.name}, {region.date}, row {row}, column {col}",
    )


def _of_chips(model: ModelBundle, chips: ChipStore, part: str, forest: Forest | None, report: Progress) -> Evaluation:
    name = str(model.spec.architecture["name"])
    session = open_session(model)
    counts: dict[str, Confusion] = {}
    indices = chips.indices(part)
    for start in range(0, len(indices), _BATCH):
        batch = indices[start : start + _BATCH]
        images, labels = chips.images(batch), chips.labels(batch)
        answers = {name: session.classify(images, 0, frozenset({"class"}))["class"]}
        if forest:
            answers["forest"] = _classify(forest, images)
        for who, codes in answers.items():
            found = confusion(labels, _without_nodata(codes, images, chips.legend.nodata), chips.legend)
            counts[who] = counts[who] + found if who in counts else found
        report("evaluate", start + len(batch), len(indices))
    places = []
    for chip in _telling(chips, part):
        images = chips.images(chip)
        predictions = {name: session.classify(images, 0, frozenset({"class"}))["class"][0]}
        if forest:
            predictions["forest"] = _classify(forest, images)[0]
        image = xr.DataArray(images[0], dims=("band", "y", "x"), coords={"band": list(chips.bands)})
        places.append(Place(image, chips.labels(chip)[0], predictions, str(chips.area[chip])))
    return Evaluation(part, counts, places)


def _classify(forest: Forest, images: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    n, bands, height, width = images.shape
    tall = images.transpose(1, 0, 2, 3).reshape(bands, n * height, width)
    codes = forest.predict(xr.DataArray(tall, dims=("band", "y", "x")).chunk()).values
    answer: npt.NDArray[np.uint8] = codes.reshape(n, height, width)
    return answer


def _without_nodata(codes: npt.NDArray[np.uint8], images: npt.NDArray[np.uint16], nodata: int) -> npt.NDArray[np.uint8]:
    return np.where((images != 0).all(axis=1), codes, np.uint8(nodata))


def _telling(chips: ChipStore, part: str) -> list[int]:
    """Chips with many classes in even shares, at places that do not overlap."""
    indices = chips.indices(part)
    shares = chips.histogram[indices] / chips.histogram[indices].sum(axis=1, keepdims=True)
    evenness = -(shares * np.log(np.maximum(shares, 1e-9))).sum(axis=1)
    chosen: list[int] = []
    for i in indices[np.argsort(-evenness, kind="stable")]:
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
    from s2seg.assess.pictures import Comparison, write_comparison, write_confusion

    folder, part = Path(folder), evaluation.part
    written = [write_scores(folder / f"scores_{part}.json", evaluation.scores, overwrite=True)]
    for name, counts in evaluation.confusions.items():
        picture = folder / f"confusion_{part}_{name.lower()}.png"
        written.append(write_confusion(picture, counts, f"{title}: {name}, {part} part", overwrite=True))
    rows = [Comparison(p.image, p.truth, p.predictions, p.caption) for p in evaluation.pictures]
    legend = next(iter(evaluation.confusions.values())).legend
    maps = folder / f"maps_{part}.png"
    written.append(
        write_comparison(maps, rows, legend, title, subtitle=f"{part} part, never trained on", overwrite=True)
    )
    return written
