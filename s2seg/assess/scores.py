"""Scores of a map, all from one confusion matrix: overall, per class, side by side, and over several seeds."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from s2seg.assess.confusion import Confusion
from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.outputs._files import check_writable, replacing, writing

Floats = npt.NDArray[np.float64]
Rows = list[tuple[str, ...]]
"""A table as text: the header, then one tuple per row."""

Measure = Literal["iou", "f1"]
_SUMMARY = {"overall_accuracy": "overall accuracy", "kappa": "kappa", "mean_iou": "mean IoU", "mean_f1": "mean F1"}


@dataclass(frozen=True, eq=False)
class Scores:
    """What a confusion matrix says about a map.

    With TP, FP and FN the pixels of a class that are found, wrongly claimed and missed: precision is TP / (TP + FP),
    recall TP / (TP + FN), IoU TP / (TP + FP + FN) and F1, which is also the Dice coefficient, 2 TP / (2 TP + FP + FN).

    A class that the truth does not have (support 0) cannot be found or missed: its recall, IoU and F1 are NaN and it
    is left out of the means. Where a map claims it nevertheless, those pixels are misses of the classes that they
    truly are, and its precision is 0. The precision of a class that is never predicted is NaN. Pixels without an
    answer (:attr:`Confusion.unmapped`) are in no score but :attr:`coverage`.

    Parameters
    ----------
    confusion
        Counts over all pixels.

    Examples
    --------
    >>> import numpy as np
    >>> from s2seg.assess.confusion import confusion
    >>> from s2seg.legend import LandClass, Legend
    >>> legend = Legend("two", (LandClass(1, "land", "#44aa44"), LandClass(2, "water", "#4444aa")))
    >>> scores = Scores(confusion(np.uint8([1, 1, 1, 2]), np.uint8([1, 1, 2, 2]), legend))
    >>> scores.overall_accuracy
    0.75
    >>> scores.iou.round(2).tolist(), scores.recall.round(2).tolist()
    ([0.67, 0.5], [0.67, 1.0])
    """

    confusion: Confusion

    @property
    def legend(self) -> Legend:
        """The classes, in the order of the per-class arrays."""
        return self.confusion.legend

    @property
    def support(self) -> npt.NDArray[np.int64]:
        """(classes,) int64: pixels of each class in the truth that have an answer."""
        return self.confusion.matrix.sum(axis=1)

    @property
    def precision(self) -> Floats:
        """(classes,) share of what is claimed that is right."""
        return _ratio(self._hits, self._claimed)

    @property
    def recall(self) -> Floats:
        """(classes,) share of what is there that is found."""
        return _ratio(self._hits, self.support)

    @property
    def iou(self) -> Floats:
        """(classes,) intersection over union."""
        return np.where(self.support > 0, _ratio(self._hits, self.support + self._claimed - self._hits), np.nan)

    @property
    def f1(self) -> Floats:
        """(classes,) harmonic mean of precision and recall, the Dice coefficient."""
        return np.where(self.support > 0, _ratio(2 * self._hits, self.support + self._claimed), np.nan)

    @property
    def overall_accuracy(self) -> float:
        """Share of the pixels that are right."""
        return float(_ratio(self._hits.sum(), self.confusion.pixels))

    @property
    def kappa(self) -> float:
        """Agreement beyond chance (Cohen 1960, doi:10.1177/001316446002000104); NaN where chance agrees fully."""
        chance = float(_ratio(self.support, self.confusion.pixels) @ _ratio(self._claimed, self.confusion.pixels))
        return (self.overall_accuracy - chance) / (1 - chance) if chance < 1 else math.nan

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that the truth has."""
        return _mean(self.iou)

    @property
    def mean_f1(self) -> float:
        """Mean over the classes that the truth has."""
        return _mean(self.f1)

    @property
    def coverage(self) -> float:
        """Share of the labelled pixels for which there is an answer."""
        return float(_ratio(self.confusion.pixels, self.confusion.pixels + int(self.confusion.unmapped.sum())))

    @property
    def _hits(self) -> npt.NDArray[np.int64]:
        return self.confusion.matrix.diagonal()

    @property
    def _claimed(self) -> npt.NDArray[np.int64]:
        return self.confusion.matrix.sum(axis=0)

    def table(self) -> Rows:
        """Return the scores per class as text, header first; a class without support shows a dash."""
        columns = (self.iou, self.f1, self.precision, self.recall)
        return [
            ("class", "IoU", "F1", "precision", "recall", "support"),
            *(
                (name, *(_text(column[i]) for column in columns), f"{self.support[i]:,}")
                for i, name in enumerate(self.legend.names)
            ),
        ]

    def summary(self) -> Rows:
        """Return the scores of the whole map as text, header first."""
        return [("score", "value"), *((name, _text(getattr(self, key))) for key, name in _SUMMARY.items())]

    def to_dict(self) -> dict[str, Any]:
        """JSON values: every score (null for NaN), and legend and counts, which :meth:`from_dict` reads back."""
        columns = {"iou": self.iou, "f1": self.f1, "precision": self.precision, "recall": self.recall}
        return {
            **{key: _json(getattr(self, key)) for key in (*_SUMMARY, "coverage")},
            "classes": [
                {"code": c.code, "name": c.name, "support": int(self.support[i])}
                | {key: _json(column[i]) for key, column in columns.items()}
                for i, c in enumerate(self.legend)
            ],
            "confusion": self.confusion.matrix.tolist(),
            "unmapped": self.confusion.unmapped.tolist(),
            "legend": self.legend.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Scores:
        """Build from :meth:`to_dict`'s form; the scores themselves are computed anew from the counts.

        Raises
        ------
        InputError
            If legend or counts are missing or do not fit.
        """
        try:
            legend = Legend.from_dict(values["legend"])
            return cls(Confusion(legend, values["confusion"], values["unmapped"]))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"these are not scores written by s2seg ({type(error).__name__}: {error})") from error


def write_scores(path: str | Path, scores: Mapping[str, Scores], *, overwrite: bool = False) -> Path:
    """Write the scores of one or more models as JSON.

    Parameters
    ----------
    path
        The file; it appears under this name when it is complete.
    scores
        Name of a model -> its scores.
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
    values = {name: of.to_dict() for name, of in scores.items()}
    text = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False)
    with replacing(path) as partial, writing(path):
        partial.write_text(text + "\n", encoding="utf-8")
    return path


def read_scores(path: str | Path) -> dict[str, Scores]:
    """Read what :func:`write_scores` wrote, ``s2seg evaluate``'s ``scores_test.json`` among it.

    Raises
    ------
    InputError
        If the file cannot be read or is something else.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"scores {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"scores {path} are not JSON: {error}") from error
    if not values or not isinstance(values, dict):
        raise InputError(f"{path}: these are not scores written by s2seg")
    try:
        return {str(name): Scores.from_dict(of) for name, of in values.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


# -- several models, several seeds ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a score over several runs; the deviation of one run is NaN."""

    mean: float
    sd: float

    def __str__(self) -> str:
        return _text(self.mean) if math.isnan(self.sd) else f"{_text(self.mean)} ± {self.sd:.3f}"


@dataclass(frozen=True)
class SeedScores:
    """Scores over several runs on one test set; per-class values are in the legend's order."""

    legend: Legend
    runs: int
    overall_accuracy: Spread
    kappa: Spread
    mean_iou: Spread
    mean_f1: Spread
    iou: tuple[Spread, ...]
    f1: tuple[Spread, ...]


def mean_over_seeds(runs: Sequence[Scores]) -> SeedScores:
    """Mean and spread of every score over runs that differ in their seed.

    Parameters
    ----------
    runs
        At least one, of one legend. A run in whose truth a class is absent (NaN) does not count for that class.

    Returns
    -------
    SeedScores

    Raises
    ------
    InputError
        For no run, or runs of different legends.
    """
    if not runs:
        raise InputError("there are no runs to average")
    _same_legend(runs)
    whole = {key: _spread([getattr(run, key) for run in runs]) for key in _SUMMARY}
    per_class = {
        key: tuple(_spread(values) for values in np.stack([getattr(run, key) for run in runs], axis=1))
        for key in ("iou", "f1")
    }
    return SeedScores(runs[0].legend, len(runs), **whole, iou=per_class["iou"], f1=per_class["f1"])


def compare_table(models: Mapping[str, Scores | Sequence[Scores]], measure: Measure = "iou") -> Rows:
    """Models side by side: one row per class that any of them was tested on, then the scores of the whole map.

    Parameters
    ----------
    models
        Name -> scores, or the scores of several seeds, which are shown as mean ± standard deviation.
    measure
        What stands in the rows of the classes.

    Returns
    -------
    list of tuple of str
        Header first: ``class`` and the names of the models.

    Raises
    ------
    InputError
        For no model, or models of different legends.
    """
    columns = {name: mean_over_seeds([s] if isinstance(s, Scores) else s) for name, s in models.items()}
    if not columns:
        raise InputError("there are no models to compare")
    _same_legend(list(columns.values()))
    per_class = [getattr(column, measure) for column in columns.values()]
    names = next(iter(columns.values())).legend.names
    rows = [(name, *map(str, row)) for name, row in zip(names, zip(*per_class, strict=True), strict=True)]
    return [
        ("class", *columns),
        *(row for row in rows if set(row[1:]) != {_text(math.nan)}),
        *((text, *(str(getattr(c, key)) for c in columns.values())) for key, text in _SUMMARY.items()),
    ]


def _same_legend(of: Sequence[Scores] | Sequence[SeedScores]) -> None:
    other = next((scores.legend for scores in of if scores.legend != of[0].legend), None)
    if other is not None:
        raise InputError(f"scores of legend {other.name!r} and of legend {of[0].legend.name!r} cannot be compared")


def _spread(values: Sequence[float] | Floats) -> Spread:
    known = np.asarray(values, float)
    known = known[~np.isnan(known)]
    return Spread(_mean(known), float(known.std(ddof=1)) if known.size > 1 else math.nan)


def _mean(values: Floats) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


def _ratio(part: Any, whole: Any) -> Floats:
    """Divide, with NaN for n / 0."""
    part, whole = np.asarray(part, float), np.asarray(whole, float)
    return np.divide(part, whole, out=np.full(np.broadcast_shapes(part.shape, whole.shape), np.nan), where=whole > 0)


def _text(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.3f}"


def _json(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
