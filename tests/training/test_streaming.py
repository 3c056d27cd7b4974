"""Chips without stored pixels: the same chips, from the same scenes, in bounded memory."""

import dataclasses
import pickle
from collections import Counter

import numpy as np
import pytest
import rasterio
import torch

from s2seg.errors import InputError, ReadError
from s2seg.testing import LEGEND as REGION_LEGEND
from s2seg.training import streaming
from s2seg.training.chips import ChipSpec, ChipStore, open_chips, write_chips
from s2seg.training.config import TrainConfig
from s2seg.training.cutting import Blocks
from s2seg.training.fit import fit
from s2seg.training.run import prepare
from s2seg.training.streaming import StreamedChips
from tests.training.conftest import BANDS, make_area
from tests.training.toy import toy_config

INDEX = ("origin", "size", "part", "area", "date", "histogram", "mean", "std", "items", "bands", "fingerprint")


def assert_same(chips: ChipStore, stored: ChipStore) -> None:
    assert isinstance(chips, StreamedChips) and not isinstance(stored, StreamedChips)
    assert not list(chips.path.glob("image*")) and not list(chips.path.glob("label*"))
    for name in INDEX:
        np.testing.assert_array_equal(getattr(chips, name), getattr(stored, name), err_msg=name)
    order = np.random.default_rng(0).permutation(len(chips))
    for ours, theirs in zip(chips.read(order), stored.read(order), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def areas():
    """Two dates of one place with holes in them, and a place that is smaller than a window; parts cross windows."""
    rng = np.random.default_rng(1)
    image = rng.integers(1, 9000, (2, 2, 100, 90)).astype(np.uint16)
    image[0, :, :20, 30:50] = 0
    image[1, 1, 60:, :10] = 0
    split = np.ones((100, 90), np.uint8)
    split[:, 50:] = 2
    first = make_area(image=image[0], split=split, chunk=37)
    second = make_area(image=image[1], split=split, chunk=37, date="2020-09", items=("other",))
    second = dataclasses.replace(second, labels=first.labels, split=first.split)
    return [first, second, make_area((20, 50), name="small")]


@pytest.fixture
def both(tmp_path, legend):
    """A store with pixels, and where the index of one without them is."""
    spec = ChipSpec(32, 16, sizes=(48, 16), min_labelled=0.2, max_nodata=0.6)
    stored, index = (
        write_chips(areas(), tmp_path / name, legend, spec, fingerprint="one", bands=BANDS, pixels=name == "stored")
        for name in ("stored", "index")
    )
    return stored, index


@pytest.mark.parametrize("cache", [2**30, 5000, 0])
def test_streamed_chips_are_those_of_the_store(both, monkeypatch, cache):
    stored, index = both
    computed = Counter()
    compute = Blocks.compute

    def counted(self, *block):
        computed[(id(self), *block)] += 1
        return compute(self, *block)

    monkeypatch.setattr(Blocks, "compute", counted)
    monkeypatch.setattr(streaming, "_CACHE_BYTES", cache)
    chips = StreamedChips(index.path, toy_config(), areas())
    assert_same(chips, stored)
    assert set(computed.values()) == {1}, "all chips of a batch share a block"
    assert len(computed) == 9 * 4 + 2 * 3  # blocks of labels, split and two images; and of the small area
    np.testing.assert_array_equal(chips.labels(3), stored.labels(3))
    assert (max(computed.values()) == 1) == (cache == 2**30)
    assert chips._cache._held == sum(array.nbytes for array in chips._cache._arrays.values()) <= cache


def test_what_changed_since_is_told(both):
    _, index = both
    first, second, small = areas()
    relabelled = dataclasses.replace(small, labels=small.labels % 3 + 1)
    for now, where in (
        ([first, dataclasses.replace(second, items=("newer",)), small], "here 2020-09"),
        ([first, second], "small 2020-08"),
        ([first, second, relabelled], "small 2020-08"),
    ):
        chips = StreamedChips(index.path, toy_config(), now)
        with pytest.raises(InputError, match=f"labels of {where} are not those from which .*index were chosen: train"):
            chips.read(slice(None))
    with pytest.raises(InputError, match=r"chosen with chips\.store: false"):
        open_chips(index.path).images(0)


def config_of(region, store, **areas):
    area = {"name": "toy", "catalog": str(region.catalog), "datetime": "2021", "labels": {"raster": str(region.truth)}}
    return toy_config(
        legend=REGION_LEGEND,
        bands=["blue", "red", "nir"],
        areas=[area | areas],
        split={"block": 64, "seed": 1},
        chips={"size": 32, "stride": 32, "store": store},
        fit={"epochs": 1, "steps_per_epoch": 3},
    )


def test_training_from_scenes_leads_to_the_same_weights(synthetic, tmp_path):
    weights = []
    stores = []
    for store in (True, False):
        config = config_of(synthetic, store)
        _, chips = prepare(config, tmp_path / f"{store}.zarr")
        weights.append(fit(config, chips, tmp_path / str(store)).network.state_dict())
        stores.append(chips)
    stored, chips = stores
    assert_same(chips, stored)
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)
    # another process opens the scenes anew
    assert_same(pickle.loads(pickle.dumps(chips)), stored)


def test_pixels_are_added_when_they_are_asked_for(synthetic, tmp_path):
    with_pixels, without = config_of(synthetic, True), config_of(synthetic, False)
    assert with_pixels.fingerprint() == without.fingerprint()
    path = tmp_path / "chips.zarr"
    kinds = [type(prepare(config, path)[1]) for config in (without, without, with_pixels, without)]
    assert kinds == [StreamedChips, StreamedChips, ChipStore, ChipStore]


def test_a_scene_that_went_missing_is_named(synthetic, tmp_path):
    _, chips = prepare(config_of(synthetic, False), tmp_path / "chips.zarr")
    (place,) = chips._places
    gone = dataclasses.replace(
        place, scene=place.scene.copy(data=place.scene.data.map_blocks(_missing, dtype=np.uint16))
    )
    with pytest.raises(ReadError, match="cannot read band red of item one"):
        StreamedChips(chips.path, chips._config, [gone]).images(0)


def _missing(block):
    raise ReadError("one", "red", "red.tif", "no such file")


def test_tiles_are_streamed_like_areas(tmp_path, legend):
    rng = np.random.default_rng(0)
    for folder, count in (("images", 2), ("labels", 1)):
        (tmp_path / folder).mkdir()
        for i in range(6):
            pixels = rng.integers(1, 4, (count, 40, 50)).astype(np.uint8)
            with rasterio.open(
                tmp_path / folder / f"{i}.tif", "w", driver="GTiff", width=50, height=40, count=count, dtype="uint8",
                transform=rasterio.Affine(10, 0, 0, 0, -10, 0),
            ) as file:  # fmt: skip
                file.write(pixels)
    values = {
        "name": "tiles",
        "legend": legend,
        "bands": ["red", "nir"],
        "tiles": {"images": str(tmp_path / "images"), "labels": str(tmp_path / "labels")},
    }
    stored, chips = (
        prepare(
            TrainConfig.model_validate(values | {"chips": {"size": 32, "stride": 32, "store": store}}),
            tmp_path / f"{store}.zarr",
        )[1]
        for store in (True, False)
    )
    assert_same(chips, stored)
    assert_same(pickle.loads(pickle.dumps(chips)), stored)
