"""Accuracy and class areas of a map with their uncertainty, from a stratified random sample (Olofsson et al. 2014).

Counting a map's pixels gives biased areas, because its errors do not cancel out. A sample of places with a known truth,
drawn at random within each class of the map, gives unbiased ones with confidence intervals. The formulas are those of
Olofsson et al. 2014, Good practices for estimating area and assessing accuracy of land change, Remote Sensing of
Environment 148, doi:10.1016/j.rse.2014.02.015; equation numbers refer to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from s2seg.assess.confusion import Confusion
from s2seg.errors import InputError
from s2seg.legend import Legend

_Z = 1.96  # standard errors on either side of a 95 % confidence interval
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and the half width of its 95 % confidence interval, in the same unit; NaN where there is no estimate."""

    value: float
    margin: float


@dataclass(frozen=True)
class AreaEstimates:
    """What a stratified sample says about a map; per-class values are in the legend's order.

    Parameters
    ----------
    legend
        The classes.
    overall_accuracy
        Share of the map's area that is right.
    precision
        User's accuracy: share of the area mapped as a class that truly is of it.
    recall
        Producer's accuracy: share of a class's true area that is mapped as it.
    area
        True area of each class, in the unit that was asked for.
    """

    legend: Legend
    overall_accuracy: Estimate
    precision: tuple[Estimate, ...]
    recall: tuple[Estimate, ...]
    area: tuple[Estimate, ...]


def estimate_areas(sample: Confusion, mapped_pixels: Sequence[int], *, pixel_area: float = 1.0) -> AreaEstimates:
    """Estimate accuracy and class areas from a random sample stratified by the map's classes.

    Parameters
    ----------
    sample
        Counts of sample units by truth and mapped class, drawn at random within each mapped class. Units without an
        answer are left out.
    mapped_pixels
        Pixels of each class in the whole map, in the legend's order.
    pixel_area
        Area of a pixel, in any unit; areas come in it, and in pixels by default. For 10 m pixels and hectares: 0.01.

    Returns
    -------
    AreaEstimates

    Raises
    ------
    InputError
        If the counts do not match the legend, a mapped class has fewer than two sample units, or a class that the map
        does not have has any.
    """
    counts = sample.matrix.T.astype(float)  # rows are what the map says, as in the paper
    mapped = np.array(mapped_pixels, float)
    _check(sample.legend, counts, mapped)
    n = counts.sum(axis=1, keepdims=True)
    weight = (mapped / mapped.sum())[:, None]
    within = np.divide(counts, n, out=np.zeros_like(counts), where=n > 0)
    # the squared standard error of each cell's share of its stratum; a class that is not mapped adds nothing
    variance = np.divide(within * (1 - within), n - 1, out=np.zeros_like(counts), where=n > 1)
    shares = weight * within  # eq. 4
    right, true = shares.diagonal(), shares.sum(axis=0)

    precision = np.where(n[:, 0] > 0, within.diagonal(), np.nan)
    recall = np.divide(right, true, out=np.full_like(true, np.nan), where=true > 0)
    total = mapped.sum() * pixel_area
    return AreaEstimates(
        legend=sample.legend,
        overall_accuracy=Estimate(float(right.sum()), _Z * float(np.sqrt(weight[:, 0] ** 2 @ variance.diagonal()))),
        precision=_estimates(precision, variance.diagonal()),  # eq. 2, eq. 6
        recall=_estimates(recall, _recall_variance(weight**2 * variance, recall, true)),
        area=_estimates(total * true, total**2 * (weight**2 * variance).sum(axis=0)),  # eq. 9, eq. 10
    )


def _check(legend: Legend, counts: Floats, mapped: Floats) -> None:
    if mapped.shape != (len(legend),) or not mapped.sum() > 0 or (mapped < 0).any():
        raise InputError(
            f"legend {legend.name!r} needs {len(legend)} counts of mapped pixels, of which some are above 0"
        )
    for name, units, pixels in zip(legend.names, counts.sum(axis=1), mapped, strict=True):
        if pixels and units < 2:
            raise InputError(f"mapped class {name!r} has {units:.0f} sample units; an estimate needs at least two")
        if units and not pixels:
            raise InputError(f"{units:.0f} sample units are of class {name!r}, which the map does not have")


def _recall_variance(variance: Floats, recall: Floats, true: Floats) -> Floats:
    """Variance of the producer's accuracy (eq. 7), from that of each cell's share of the whole area (map, truth)."""
    own = variance.diagonal()
    others = variance.sum(axis=0) - own
    squared = (1 - recall) ** 2 * own + recall**2 * others
    return np.divide(squared, true**2, out=np.full_like(true, np.nan), where=true > 0)


def _estimates(values: Floats, variances: Floats) -> tuple[Estimate, ...]:
    return tuple(
        Estimate(float(value), float(_Z * np.sqrt(variance)) if not np.isnan(value) else float("nan"))
        for value, variance in zip(values, variances, strict=True)
    )
