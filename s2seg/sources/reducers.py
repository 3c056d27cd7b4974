"""Dates of a few rows of pixels -> one image, by arithmetic on whole arrays of uint16 that stay in the cache.

Nothing here gathers, branches or turns to float pixel by pixel, where that can be helped: a choice between arrays is
made with bit masks, and order statistics come from networks of minima and maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Pixels = npt.NDArray[np.uint16]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Slab:
    """What is reduced at once.

    Parameters
    ----------
    data
        (time, band, y, x) uint16.
    usable
        (time, y, x) bool: which pixels count.
    looks
        (y, x) uint16: how many of them do.
    scratch
        (time + 2, band, y, x) uint16 to write on; what a reducer returns may lie in it.
    """

    data: Pixels
    usable: Flags
    looks: Pixels
    scratch: Pixels


Reducer = Callable[[Slab], Pixels]
"""Makes (band, y, x) uint16 of a slab; 0 where no date is usable."""


def bits(flags: Flags) -> Pixels:
    """Masks for bitwise arithmetic, uint16: all bits where a flag is set, none elsewhere."""
    masks: Pixels = np.negative(flags.astype(np.uint16))
    return masks


def mean(slab: Slab) -> Pixels:
    """Mean of the usable dates, rounded half to even."""
    total = np.where(slab.usable[:, None], slab.data, np.uint16(0)).sum(axis=0, dtype=np.uint32)
    rounded: Pixels = np.rint(total / np.maximum(slab.looks, 1)).astype(np.uint16)
    return rounded


def first_clear(slab: Slab, clouds: Sequence[float]) -> Pixels:
    """Each pixel from the least cloudy date that is usable there; ``clouds`` is the cloud cover of every date."""
    order = np.argsort(clouds, kind="stable")
    return _pick(slab, order[np.argmax(slab.usable[order], axis=0)])


def max_ndvi(slab: Slab, red: int, nir: int) -> Pixels:
    """Each pixel from its greenest usable date; ``red`` and ``nir`` are the indices of the bands."""
    r, n = slab.data[:, red].astype(np.float32), slab.data[:, nir].astype(np.float32)
    ndvi = np.where(slab.usable, (n - r) / np.maximum(n + r, 1), -np.inf)
    return _pick(slab, ndvi.argmax(axis=0))


def medoid(slab: Slab) -> Pixels:
    """The date nearest to the band-wise median (Flood 2013, doi:10.3390/rs5126481, with the median as the centre)."""
    distance = np.zeros(slab.usable.shape, dtype=np.float32)
    centre = quantile(slab, q=0.5)
    for b in range(slab.data.shape[1]):
        distance += (slab.data[:, b].astype(np.float32) - centre[b]) ** 2
    distance[~slab.usable] = np.inf
    return _pick(slab, distance.argmin(axis=0))


def _pick(slab: Slab, chosen: npt.NDArray[np.intp]) -> Pixels:
    """All bands of a pixel from its chosen date; 0 where that is not usable."""
    picked, part = slab.scratch[:2]
    picked[...] = 0
    for t, pixels in enumerate(slab.data):
        picked |= np.bitwise_and(pixels, bits(slab.usable[t] & (chosen == t)), out=part)
    return picked


# -- order statistics -------------------------------------------------------------------------------------------------


def quantile(slab: Slab, q: float) -> Pixels:
    """Quantile of the usable dates with linear interpolation, rounded half to even.

    It lies at rank ``q * (looks - 1)``, between two neighbours in order. In place of what is not usable come zeros and
    greatest values, as many of each as it takes to bring these two to the same two ranks in every pixel: two ranks are
    all that must be found, however many dates a pixel has.
    """
    ranks = _Ranks.of(q, len(slab.data))
    dates, spare, free = _filled(slab, ranks.lows), *slab.scratch[-2:]
    between = _among(slab.looks, ranks.between)
    if not between.any():
        return _select(dates, spare, (ranks.below,))[0]
    below, above = _select(dates, spare, (ranks.below, ranks.below + 1))
    if q == 0.5:
        return _middle(below, above, bits(between), free)
    return _interpolated(below, above, ranks.shares.take(slab.looks))


@dataclass(frozen=True)
class _Ranks:
    """Where a quantile of some dates lies.

    Parameters
    ----------
    below
        Rank of the lower neighbour, from 0, once what is not usable is filled.
    lows
        Which of the unusable dates of a pixel, counted from 0, are filled with 0.
    between
        Numbers of looks for which it lies between two dates.
    shares
        (dates + 1,) float32: how far it lies above the lower neighbour, by looks.
    """

    below: int
    lows: tuple[int, ...]
    between: tuple[int, ...]
    shares: npt.NDArray[np.float32]

    @classmethod
    @cache
    def of(cls, q: float, dates: int) -> _Ranks:
        rank = q * np.arange(dates)
        # without a look, more zeros than ranks below bring 0 there
        below = [-1, *rank.astype(int).tolist()]
        shares = np.array([0, *(rank - below[1:])], np.float32)
        # a look less lowers the rank, or else it keeps it
        lows = [j for j in range(dates) if below[dates - j] > below[dates - j - 1]]
        return cls(below[-1], tuple(lows), tuple(np.flatnonzero(shares).tolist()), shares)


def _filled(slab: Slab, lows: Sequence[int]) -> list[Pixels]:
    """Copy the dates; of what is not usable, the ``lows`` of every pixel are 0 and the others the greatest value."""
    filled = slab.scratch[:-2]
    if slab.usable.all():
        filled[...] = slab.data
        return list(filled)
    np.bitwise_and(slab.data, bits(slab.usable)[:, None], out=filled)
    unusable = ~slab.usable
    numbers = unusable.astype(np.uint16)
    for before, number in pairwise(numbers):
        number += before  # of the unusable dates of a pixel, from 1
    high = unusable & ~_among(numbers, [low + 1 for low in lows])
    for pixels, flags in zip(filled, high, strict=True):
        if flags.any():
            pixels |= bits(flags)
    return list(filled)


def _among(counts: Pixels, values: Sequence[int]) -> Flags:
    """Where a count is one of a few values."""
    found = np.zeros(counts.shape, dtype=bool)
    for value in values:
        found |= counts == value
    return found


def _middle(below: Pixels, above: Pixels, between: Pixels, free: Pixels) -> Pixels:
    """Mean of two neighbours, half to even, where the mask ``between`` says so, else the lower; overwrites them all."""
    difference = np.subtract(above, below, out=above)
    difference &= between
    below += np.right_shift(difference, 1, out=free)
    difference &= below
    difference &= 1  # what was cut off was a half, and the result is odd
    below += difference
    return below


def _interpolated(below: Pixels, above: Pixels, share: npt.NDArray[np.float32]) -> Pixels:
    """A share of the way from one neighbour to the other, rounded half to even; overwrites the lower."""
    for low, high in zip(below, above, strict=True):
        low[...] = np.rint(low.astype(np.float32) + (high - low) * share)
    return below


class _Comparator(NamedTuple):
    """Puts two dates in order; one of the results may be of no use to anyone."""

    low: int
    high: int
    low_used: bool
    high_used: bool


def _select(dates: list[Pixels], spare: Pixels, wanted: tuple[int, ...]) -> list[Pixels]:
    """Find the values of certain ranks along the dates; overwrites dates and the spare image."""
    for low, high, low_used, high_used in _network(len(dates), wanted):
        a, b = dates[low], dates[high]
        if low_used and high_used:
            np.minimum(a, b, out=spare)
            np.maximum(a, b, out=b)
            dates[low], spare = spare, a
        elif low_used:
            np.minimum(a, b, out=a)
        else:
            np.maximum(a, b, out=b)
    return [dates[rank] for rank in wanted]


@cache
def _network(size: int, wanted: tuple[int, ...]) -> tuple[_Comparator, ...]:
    """Comparators that bring the wanted ranks to their places: of a sorting network, those that matter to them."""
    needed, comparators = set(wanted), []
    for low, high in reversed(list(_merge_exchange(size))):
        if low in needed or high in needed:
            comparators.append(_Comparator(low, high, low in needed, high in needed))
            needed |= {low, high}
    return tuple(reversed(comparators))


def _merge_exchange(size: int) -> Iterator[tuple[int, int]]:
    """Batcher's sorting network for any number of wires (Knuth, TAOCP vol. 3, 5.2.2, algorithm M)."""
    half = 1 << max(0, (size - 1).bit_length() - 1)
    p = half
    while p:
        q, r, d = half, 0, p
        while True:
            yield from ((i, i + d) for i in range(size - d) if i & p == r)
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
