import sys
import threading

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from s2seg.assess.forest import fit_forest
from s2seg.errors import InputError
from s2seg.legend import LandClass, Legend

# a class with code 0, which must not be taken for nodata
LEGEND = Legend("two", (LandClass(5, "bright", "#eeeeee"), LandClass(0, "dark", "#111111")), nodata=255)


def toy(n=3, size=24, seed=0):
    """Chips whose class is plain from the second band, with some nodata in either."""
    rng = np.random.default_rng(seed)
    labels = rng.choice(np.uint8([5, 0]), (n, size, size))
    images = rng.integers(100, 3000, (n, 2, size, size)).astype("uint16")
    images[:, 1] = np.where(labels == 5, 2000, 500) + rng.integers(0, 300, labels.shape)
    images[:, :, 0], labels[:, 1] = 0, 255
    return images, labels


def as_scene(image, chunks=(1, 10, 7)):
    grid = GeoBox.from_bbox((0, 0, 10 * image.shape[2], 10 * image.shape[1]), "EPSG:32633", resolution=10)
    coords = xr_coords(grid) | {"band": [f"b{i}" for i in range(len(image))]}
    return xr.DataArray(da.from_array(image, chunks=chunks), dims=("band", "y", "x"), coords=coords)


@pytest.fixture(scope="module")
def forest():
    return fit_forest(*toy(), LEGEND, trees=15)


def test_it_learns_what_a_pixel_shows_and_keeps_nodata(forest):
    image, truth = (a[0] for a in toy(seed=1))
    scene = as_scene(image)
    answer = forest.predict(scene)
    assert (answer.dtype, answer.dims, answer.chunks) == (np.uint8, ("y", "x"), scene.chunks[1:])
    assert answer.odc.geobox == scene.odc.geobox
    codes = answer.to_numpy()
    assert (codes[0] == 255).all()
    np.testing.assert_array_equal(codes[2:], truth[2:])


def test_blocks_answer_as_scikit_learn_does_in_one_piece(forest):
    image = np.random.default_rng(4).integers(1, 4000, (2, 31, 45)).astype("uint16")
    whole = forest.classifier.predict(image.reshape(2, -1).T.astype("float32")).reshape(31, 45)
    np.testing.assert_array_equal(forest.predict(as_scene(image)).to_numpy(), whole)


def test_the_seed_decides_and_few_pixels_are_enough():
    images, labels = toy(size=40)
    scene = as_scene(np.random.default_rng(4).integers(1, 4000, (2, 40, 40)).astype("uint16"))
    one, again, other = (fit_forest(images, labels, LEGEND, pixels=60, trees=3, seed=s) for s in (1, 1, 2))
    np.testing.assert_array_equal(one.predict(scene), again.predict(scene))
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert (one.predict(scene) != other.predict(scene)).any()
    assert one.classifier.estimators_[0].tree_.weighted_n_node_samples[0] == 60


def test_nothing_is_computed_before_it_is_asked_for(forest):
    read = threading.Event()

    def block(values):
        read.set()
        return values

    scene = as_scene(np.ones((2, 20, 20), "uint16"))
    scene = scene.copy(data=scene.data.map_blocks(block, dtype="uint16", meta=np.empty((0, 0, 0), "uint16")))
    lazy = forest.predict(scene)
    assert not read.is_set()
    lazy.compute()
    assert read.is_set()


def test_what_makes_no_sense_is_refused(forest, monkeypatch):
    images, labels = toy()
    for call, message in (
        (lambda: fit_forest(images, labels[:1], LEGEND), "do not match"),
        (lambda: fit_forest(images, np.full_like(labels, 9), LEGEND), "'two' does not: 9"),
        (lambda: fit_forest(images, np.full_like(labels, 255), LEGEND), "no pixel"),
        (lambda: forest.predict(as_scene(np.ones((3, 8, 8), "uint16"))), "fitted on 2 bands and the scene has 3"),
    ):
        with pytest.raises(InputError, match=message):
            call()
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(InputError, match=r"pip install 's2seg\[train\]'"):
        fit_forest(images, labels, LEGEND)
