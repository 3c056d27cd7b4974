import doctest

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from s2seg.assess import confusion as module
from s2seg.assess.confusion import Confusion, confusion, confusion_of
from s2seg.errors import InputError
from s2seg.legend import LandClass, Legend

# a class with code 0, and codes that are not in order: channels are not codes
LEGEND = Legend(
    "odd", (LandClass(7, "seven", "#ff0000"), LandClass(0, "zero", "#00ff00"), LandClass(3, "three", "#0000ff")), 255
)
CODES = np.array([7, 0, 3, 255], "uint8")


def some_maps(shape=(70, 50)):
    return np.random.default_rng(1).choice(CODES, (2, *shape))


def on_grid(values, chunks=None, left=500_000, epsg=32633):
    ny, nx = values.shape
    grid = GeoBox.from_bbox((left, 5_000_000, left + 10 * nx, 5_000_000 + 10 * ny), f"EPSG:{epsg}", resolution=10)
    data = values if chunks is None else da.from_array(values, chunks=chunks)
    return xr.DataArray(data, dims=("y", "x"), coords=xr_coords(grid))


def same(a, b):
    return np.array_equal(a.matrix, b.matrix) and np.array_equal(a.unmapped, b.unmapped)


def test_counts_follow_the_channels_and_nodata_has_rules():
    truth = np.array([7, 7, 7, 0, 3, 3, 255, 255], "uint8")
    predicted = np.array([7, 0, 255, 3, 3, 255, 7, 255], "uint8")
    counts = confusion(truth, predicted, LEGEND)
    assert counts.matrix.tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 1]]
    assert counts.unmapped.tolist() == [1, 0, 1]
    assert (counts.pixels, counts.matrix.dtype) == (4, np.int64)


def test_a_sum_of_parts_is_the_whole():
    truth, predicted = some_maps()
    whole = confusion(truth, predicted, LEGEND)
    assert same(sum(confusion(t, p, LEGEND) for t, p in zip(truth, predicted, strict=True)), whole)
    assert [int(whole.matrix[i, j]) for i, j in np.ndindex(3, 3)] == [
        int(((truth == t) & (predicted == p)).sum()) for t in LEGEND.codes for p in LEGEND.codes
    ]


@pytest.mark.parametrize("chunks", [((70,), (50,)), ((32, 38), (7, 43)), ((1,) * 70, (50,))])
def test_blocks_count_what_the_whole_does(chunks):
    truth, predicted = some_maps()
    steps = []
    lazy = confusion_of(
        on_grid(truth, 16), on_grid(predicted, chunks), LEGEND, on_progress=lambda *step: steps.append(step)
    )
    assert same(lazy, confusion(truth, predicted, LEGEND))
    total = len(chunks[0]) * len(chunks[1])
    assert steps == [(i + 1, total) for i in range(total)]


def test_each_block_of_the_prediction_is_computed_once_and_the_mask_chooses():
    truth, predicted = some_maps()
    calls = []

    def block(values):
        calls.append(values.shape)
        return values

    lazy = on_grid(predicted, (35, 25)).copy(
        data=da.from_array(predicted, chunks=(35, 25)).map_blocks(block, dtype="uint8", meta=np.empty((0, 0), "uint8"))
    )
    where = np.random.default_rng(2).random(truth.shape) < 0.3
    counts = confusion_of(on_grid(truth), lazy, LEGEND, where=on_grid(where))
    assert calls == [(35, 25)] * 4
    assert same(counts, confusion(truth[where], predicted[where], LEGEND))


def test_what_makes_no_sense_is_refused():
    truth, predicted = some_maps()
    strange = truth.copy()
    strange[0, :2] = 9, 200
    cases = [
        (lambda: confusion(strange, predicted, LEGEND), r"the truth has codes .*'odd' does not: 9, 200;"),
        (lambda: confusion(np.full(2, 7, "uint8"), np.array([1, 2], "uint8"), LEGEND), "the prediction .*: 1, 2;"),
        (lambda: confusion(truth.astype(float), predicted, LEGEND), "the truth holds float64"),
        (lambda: confusion(truth, predicted[1:], LEGEND), r"\(70, 50\) pixels and the prediction \(69, 50\)"),
        (lambda: confusion_of(on_grid(strange, 16), on_grid(predicted, 16), LEGEND), "codes that legend"),
        (lambda: confusion_of(on_grid(truth), on_grid(predicted[1:]), LEGEND), "bring both onto one grid"),
        (lambda: confusion_of(on_grid(truth, left=500_010), on_grid(predicted), LEGEND), "x starts at 500015 and at"),
        (lambda: confusion_of(on_grid(truth, epsg=32634), on_grid(predicted), LEGEND), "EPSG:32634 and"),
        (lambda: Confusion(LEGEND, np.zeros((2, 2))), "3 x 3"),
        (lambda: Confusion(LEGEND, np.eye(3)) + Confusion(Legend.load("corine-1"), np.eye(5)), "cannot add"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    # what the truth says nothing about is not looked at
    assert confusion(np.uint8([255]), np.uint8([99]), LEGEND).pixels == 0


def test_the_example_runs():
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0
