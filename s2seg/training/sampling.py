"""Which chips an epoch shows, how often, and how much each class counts. Pure functions of a seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from s2seg.errors import InputError

CLASS_WEIGHTS = ("none", "inverse_frequency", "inverse_samples", "effective_number")

_MOST = 20.0  # a chip is drawn at most this many times as often as by chance, however rare its classes are

Histogram = npt.NDArray[np.int64]
Positions = npt.NDArray[np.int64]


def class_weights(kind: str, histogram: Histogram, beta: float | None = None) -> npt.NDArray[np.float32]:
    """Weigh the classes in the loss against their frequency.

    Parameters
    ----------
    kind
        ``none``: all 1. ``inverse_frequency``: one over the class's pixels. ``inverse_samples``: one over the number of
        chips that hold the class. ``effective_number``: one over the effective number of pixels,
        ``(1 - beta**n) / (1 - beta)`` (Cui et al. 2019, doi:10.1109/CVPR.2019.00949), which levels off for classes
        that are common anyway.
    histogram
        (chip, class) int64: labelled pixels, as a chip store's ``histogram``.
    beta
        For ``effective_number``: between 0 and 1; ``(N - 1) / N`` of all N pixels by default, as that paper derives it.

    Returns
    -------
    ndarray
        (class,) float32. The mean over the classes that occur is 1; a class that does not occur weighs 1, since it
        is never a target and another weight would only shift the scale of the loss.

    Raises
    ------
    InputError
        For a kind that does not exist, or a beta out of range.
    """
    if kind not in CLASS_WEIGHTS:
        raise InputError(f"unknown class weights {kind!r}: choose {', '.join(CLASS_WEIGHTS)}")
    if beta is not None and not 0 <= beta < 1:
        raise InputError(f"beta must be at least 0 and below 1, not {beta:g}")
    pixels = histogram.sum(axis=0).astype(np.float64)
    weights = np.ones(len(pixels))
    present = pixels > 0
    if kind == "none" or not present.any():
        return weights.astype(np.float32)
    if kind == "inverse_frequency":
        counts = pixels
    elif kind == "inverse_samples":
        counts = (histogram > 0).sum(axis=0).astype(np.float64)
    else:
        counts = _effective_number(pixels, 1 - 1 / pixels.sum() if beta is None else beta)
    weights[present] = 1 / counts[present]
    weights[present] /= weights[present].mean()
    return weights.astype(np.float32)


def _effective_number(pixels: npt.NDArray[np.float64], beta: float) -> npt.NDArray[np.float64]:
    if beta == 0:
        return (pixels > 0).astype(np.float64)
    # beta is so close to 1 that its powers need the logarithm
    return -np.expm1(pixels * np.log(beta)) / (1 - beta)


def chip_weights(histogram: Histogram) -> npt.NDArray[np.float64]:
    """Probability of each chip in a class-balanced draw.

    As if a class were drawn first, each that occurs equally likely, and then one of its chips in proportion to the
    class's pixels in it. No chip gets more than 20 times its share in a uniform draw: a class of a handful of pixels
    would otherwise fill the epoch with one chip.

    Parameters
    ----------
    histogram
        (chip, class) int64: labelled pixels of the chips to draw from.

    Returns
    -------
    ndarray
        (chip,) float64, sums to 1; uniform where nothing is labelled.
    """
    n = len(histogram)
    pixels = histogram.sum(axis=0)
    if not pixels.any():
        return np.full(n, 1 / n)
    shares = (histogram[:, pixels > 0] / pixels[pixels > 0]).mean(axis=1)
    capped = np.minimum(shares, _MOST / n)
    weights: npt.NDArray[np.float64] = capped / capped.sum()
    return weights


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The batches of every epoch, known beforehand: a function of seed and epoch and of nothing else.

    A run that starts again at any epoch therefore sees what it would have seen.

    Parameters
    ----------
    n
        Chips to draw from; batches hold positions from 0 to ``n - 1``.
    batch_size
        Chips in a batch. All batches are full: the few chips that an epoch leaves over come in another epoch.
    steps
        Batches in an epoch; by default as many as the chips fill, and at least one.
    seed
        Start of all draws.
    weights
        (n,) probabilities for a draw with replacement, such as :func:`chip_weights`; None shows every chip once
        before any chip comes again.

    Raises
    ------
    InputError
        If there is nothing to draw, or a number is not positive.
    """

    n: int
    batch_size: int
    steps: int | None = None
    seed: int = 0
    weights: npt.NDArray[np.float64] | None = None

    def __post_init__(self) -> None:
        for name, value in (("chips", self.n), ("batch_size", self.batch_size), ("steps", self.steps)):
            if value is not None and value < 1:
                raise InputError(f"an epoch needs at least one: {name} is {value}")
        if self.weights is not None and self.weights.shape != (self.n,):
            raise InputError(f"there are {self.n} chips but {len(self.weights)} sampling weights")

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.steps or max(1, self.n // self.batch_size)

    def batches(self, epoch: int) -> list[npt.NDArray[np.int64]]:
        """Positions of the chips of each batch of an epoch: ``len(self)`` arrays (batch_size,) int64."""
        rng = np.random.default_rng([self.seed, epoch])
        wanted = len(self) * self.batch_size
        if self.weights is not None:
            drawn = rng.choice(self.n, size=wanted, p=self.weights)
        else:
            rounds = -(-wanted // self.n)
            drawn = np.concatenate([rng.permutation(self.n) for _ in range(rounds)])[:wanted]
        return list(drawn.reshape(-1, self.batch_size))


@dataclass(frozen=True, eq=False)
class DateMix:
    """The chips of a batch, and the rectangles that they get of other dates.

    Parameters
    ----------
    chips
        (n,) int64.
    others
        (n,) int64: the same places at other dates, or the chip itself where it stays as it is.
    squares
        (n, 3) float64: centre (down, across) and side of the rectangle, in sides of the chip.
    """

    chips: Positions
    others: Positions
    squares: npt.NDArray[np.float64]

    def share(self, rank: int, world: int) -> DateMix:
        """Every ``world``-th chip, from ``rank`` on."""
        mine = slice(rank, None, world)
        return DateMix(self.chips[mine], self.others[mine], self.squares[mine])

    def among(self, indices: Positions) -> DateMix:
        """The same with positions among ``indices`` replaced by these."""
        return replace(self, chips=indices[self.chips], others=indices[self.others])


class DatePlan:
    """Which chips of an epoch get a rectangle of another date: a function of seed and epoch, as :class:`EpochPlan`.

    Parameters
    ----------
    places
        (n, k) int64: rows are equal where chips show the same place; these are of different dates.
    share
        Of the chips that get one, of those that there are at several dates.
    seed
        Start of all draws.
    """

    def __init__(self, places: npt.NDArray[np.int64], share: float, seed: int = 0) -> None:
        self._share, self._seed = share, seed
        _, place, count = np.unique(places, axis=0, return_inverse=True, return_counts=True)
        self._by_place = np.argsort(place, kind="stable")
        self._count = count[place]
        self._first = (np.cumsum(count) - count)[place]
        self._rank = np.empty(len(places), np.int64)
        self._rank[self._by_place] = np.arange(len(places)) - self._first[self._by_place]

    @property
    def mixes(self) -> bool:
        """Whether any place is there at two dates."""
        return bool((self._count > 1).any())

    def draw(self, epoch: int, batches: Sequence[Positions]) -> list[DateMix]:
        """Draw for the batches of an epoch: a mix for each.

        As in CutMix (Yun et al. 2019, arXiv:1905.04899) the rectangle's area is uniform from nothing to all, and what
        of it lies beyond the chip is cut off.
        """
        rng = np.random.default_rng([self._seed, epoch, 1])  # not the numbers that draw the batches
        return [self._mix(rng, chips) for chips in batches]

    def _mix(self, rng: np.random.Generator, chips: Positions) -> DateMix:
        hit, step, side, *centre = rng.random((5, len(chips)))
        count, first, rank = self._count[chips], self._first[chips], self._rank[chips]
        # one of the others; it is the chip itself where there is no other
        away = 1 + (step * (count - 1)).astype(np.int64)
        others = self._by_place[first + (rank + away) % count]
        squares = np.stack([*centre, np.sqrt(side)], axis=1)
        return DateMix(chips, np.where(hit < self._share, others, chips), squares)
