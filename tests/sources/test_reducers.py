from __future__ import annotations

from functools import partial
from itertools import product

import numpy as np
import pytest

from s2seg.sources.reducers import Slab, _network, quantile

BANDS, SHAPE = 3, (31, 17)


def slab_of(dates: int, seed: int) -> Slab:
    """Every number of looks occurs, and values so close together that ties and halves are common."""
    rng = np.random.default_rng(seed)
    least = 65529 if seed % 2 else 0  # the greatest value, which also fills what is not usable, is real as well
    data = rng.integers(least, least + 7, (dates, BANDS, *SHAPE)).astype(np.uint16)
    usable = rng.random((dates, *SHAPE)) < rng.random(SHAPE)
    usable[:, 0] = True
    usable[:, 1] = False
    scratch = rng.integers(0, 65536, (dates + 2, BANDS, *SHAPE)).astype(np.uint16)
    return Slab(data, usable, usable.sum(axis=0, dtype=np.uint16), scratch)


def expected_quantile(slab: Slab, q: float) -> np.ndarray:
    """Sort the usable values of every pixel; interpolate in float32, and round half to even."""
    out = np.zeros(slab.data.shape[1:], np.uint16)
    for y, x in np.argwhere(slab.looks):
        ordered = np.sort(slab.data[slab.usable[:, y, x], :, y, x], axis=0).astype(np.float32)
        rank = q * (len(ordered) - 1)
        low, high = ordered[int(rank)], ordered[min(int(rank) + 1, len(ordered) - 1)]
        out[:, y, x] = np.rint(low + (high - low) * np.float32(rank - int(rank)))
    return out


@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.5, 0.9, 1.0])
def test_quantile_is_that_of_the_usable_dates_to_the_last_number(q: float) -> None:
    for dates in (*range(2, 10), 12, 19):
        for seed in range(2):
            slab = slab_of(dates, seed)
            before = slab.data.copy(), slab.usable.copy()
            expected = expected_quantile(slab, q)
            np.testing.assert_array_equal(quantile(slab, q), expected, err_msg=f"{dates} dates, seed {seed}")
            for array, kept in zip((slab.data, slab.usable), before, strict=True):
                np.testing.assert_array_equal(array, kept)  # others read the same pixels


@pytest.mark.parametrize("dates", [2, 3, 4, 7])
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # the oracle's, not ours
def test_median_is_numpys(dates: int) -> None:
    for slab in map(partial(slab_of, dates), range(4)):
        values = np.where(slab.usable[:, None], slab.data, np.nan)
        np.testing.assert_array_equal(quantile(slab, 0.5), np.rint(np.nan_to_num(np.nanmedian(values, axis=0))))


@pytest.mark.parametrize("size", range(1, 10))
def test_networks_find_every_rank(size: int) -> None:
    """What orders all zeros and ones orders everything (Knuth, TAOCP vol. 3, 5.3.4, theorem Z)."""
    inputs = np.array(list(product([0, 1], repeat=size)))
    for wanted in [tuple(range(size)), *((r, r + 1) for r in range(size - 1)), *((r,) for r in range(size))]:
        wires = inputs.T.copy()
        for low, high, low_used, high_used in _network(size, wanted):
            small, great = np.minimum(wires[low], wires[high]), np.maximum(wires[low], wires[high])
            wires[low], wires[high] = small if low_used else -1, great if high_used else -1
        np.testing.assert_array_equal(wires[list(wanted)], np.sort(inputs, axis=1).T[list(wanted)])


def test_networks_leave_out_what_nobody_asks_for() -> None:
    images = {n: sum(c.low_used + c.high_used for c in _network(n, (n // 2,))) for n in (3, 5, 7)}
    assert images == {3: 4, 5: 12, 7: 22}
