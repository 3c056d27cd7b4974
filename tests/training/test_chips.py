"""The chip store: whose pixels are where, what is filtered, and that no label leaves its part."""

import dataclasses
import errno
import pickle
import tracemalloc
from collections import Counter

import dask.array as da
import numpy as np
import pytest
import xarray as xr
import zarr

from s2seg.errors import InputError, OutputError
from s2seg.training.chips import ChipSpec, _Sums, open_chips, write_chips
from s2seg.training.cutting import cut, starts
from s2seg.training.splits import PARTS, check_split

from .conftest import BANDS, make_area

SPEC = ChipSpec(size=32, stride=16, min_labelled=0.0, max_nodata=1.0)


@pytest.fixture
def store_of(tmp_path, legend):
    """Write areas to a store of 32 px chips, with the spec changed as asked."""

    def write(*areas, name="chips.zarr", fingerprint="one", keep=None, **spec):
        spec = dataclasses.replace(SPEC, **spec)
        return write_chips(
            areas, tmp_path / name, legend, spec, fingerprint=fingerprint, bands=BANDS, keep=keep, overwrite=True
        )

    return write


@pytest.mark.parametrize(
    ("length", "size", "stride", "expected"),
    [(100, 32, 32, [0, 32, 64, 68]), (96, 32, 32, [0, 32, 64]), (20, 32, 16, [0]), (33, 32, 16, [0, 1])],
)
def test_windows_start_on_the_stride_and_end_at_the_edge(length, size, stride, expected):
    assert starts(length, size, stride) == expected


@pytest.mark.parametrize("chunk", [7, 40, 64, 200])
def test_chips_hold_the_pixels_they_say_whatever_the_blocks_are(store_of, chunk):
    area = make_area((100, 90), chunk)
    chips = store_of(area)
    places = [(r, c) for r in starts(100, 32, 16) for c in starts(90, 32, 16)]
    assert [tuple(o[1:]) for o in chips.origin] == places
    image, labels = area.scene.values, area.labels.values
    for i, (r, c) in enumerate(places):
        np.testing.assert_array_equal(chips.images(i)[0], image[:, r : r + 32, c : c + 32])
        np.testing.assert_array_equal(chips.labels(i)[0], labels[r : r + 32, c : c + 32])
    counts = [np.bincount(label.ravel(), minlength=4)[1:] for label in chips.labels(slice(None))]
    np.testing.assert_array_equal(chips.histogram, counts)
    pixels = chips.images(slice(None)) / 1e4
    np.testing.assert_allclose(chips.mean, pixels.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(chips.std, pixels.std(axis=(0, 2, 3)))


def test_no_label_leaves_its_part(store_of):
    """Random parts, pixel by pixel: every chip straddles all of them."""
    split = np.random.default_rng(0).integers(0, 4, (100, 90)).astype(np.uint8)
    area = make_area((100, 90), split=split)
    chips = store_of(area)
    seen = np.zeros((4, 100, 90), bool)
    for i in range(len(chips)):
        _, r, c = chips.origin[i]
        seen[chips.part[i], r : r + 32, c : c + 32] |= chips.labels(i)[0] != chips.legend.nodata
    for part in range(1, 4):
        np.testing.assert_array_equal(seen[part], split == part)  # all of its own, and nothing else
    assert sorted(np.concatenate([chips.indices(p) for p in PARTS])) == list(range(len(chips)))


def test_filters(store_of):
    image = make_area((32, 160)).scene.values.copy()
    labels = np.ones((32, 160), np.uint8)
    image[0, :, :20] = 0  # chip 0: 20 of 32 columns lack one band
    labels[:, 32:62] = 0  # chip 1: 2 of 32 columns labelled
    labels[:, 96:128] = 2  # chip 3: another class
    labels[0, 128] = 3  # chip 4: one pixel of a third
    area = make_area((32, 160), labels=labels, image=image)

    def kept(**filters):
        return (store_of(area, stride=32, **filters).origin[:, 2] // 32).tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(max_nodata=0.6) == [1, 2, 3, 4]
    assert kept(min_labelled=0.1) == [0, 2, 3, 4]
    assert kept(drop_only=(1,)) == [3, 4]
    assert kept(keep=lambda image, label: (label == 1).all()) == [2]
    first = store_of(area, stride=32)
    assert (first.images(0)[0, :, :, :20] == 0).all()  # nodata in one band is nodata in all, and unlabelled
    assert (first.labels(0)[0, :, :20] == 0).all()
    assert first.histogram[0].tolist() == [12 * 32, 0, 0]


def test_sums_are_exact_whatever_the_number_of_chips():
    sums = _Sums(1)
    sums.add(np.array([[[65535, 65533, 0]]], np.uint16))  # nodata counts as nothing
    for _ in range(40):  # 2 ** 41 pixels: their squares do not fit any number of NumPy's
        sums.add_all(sums)
    mean, std = sums.mean_and_std()
    assert (mean, std) == ([6.5534], [1e-4])


def test_areas_smaller_than_a_chip_are_padded_with_nodata(store_of):
    chips = store_of(make_area((20, 50)), min_labelled=1.0, max_nodata=0.0)  # padding counts as neither
    assert chips.origin[:, 1:].tolist() == [[0, 0], [0, 16], [0, 18]]
    assert (chips.images(2)[0, :, 20:] == 0).all()
    assert (chips.labels(2)[0, 20:] == 0).all()
    assert (chips.images(2)[0, 1, :20] == np.arange(18, 50) + 1).all()


def test_several_sizes(store_of):
    rows, cols = np.indices((128, 128)) * 40 + 1000
    image = np.stack([rows, cols]).astype(np.uint16)
    image[:, 65, 65] = 0  # one missing pixel does not darken a coarser one
    chips = store_of(make_area((128, 128), 50, image=image), stride=32, sizes=(64, 16))
    assert Counter(chips.size.tolist()) == {32: 16, 64: 4, 16: 64}
    coarse = np.flatnonzero(chips.size == 64)
    np.testing.assert_array_equal(chips.images(coarse[0])[0, 0], np.repeat(1020 + np.arange(32)[:, None] * 80, 32, 1))
    assert (chips.images(coarse[3])[0] >= 1000).all()
    fine = chips.images(np.flatnonzero(chips.size == 16)[0])[0, 1]
    assert (np.diff(fine[:, 1:-1].astype(int), axis=1) == 20).all()  # half a pixel's step, linear
    labels = chips.labels(coarse[0])[0]
    np.testing.assert_array_equal(labels, (np.arange(64) // 10 % 3 + 1)[1::2][None].repeat(32, 0))


def test_dates_and_areas_are_kept_apart(store_of):
    june, july = (make_area((32, 32), name="a", date=d, items=(d, "both")) for d in ("2021-06", "2021-07"))
    chips = store_of(june, july, make_area((40, 32), name="b", date="2021-06"))
    assert list(zip(chips.area, chips.date, chips.origin[:, 1].tolist(), strict=True)) == [
        ("a", "2021-06", 0),
        ("a", "2021-07", 0),
        ("b", "2021-06", 0),
        ("b", "2021-06", 8),
    ]
    assert chips.items == ("2021-06", "both", "2021-07", "item")


def test_stores_reopen_alike(store_of, monkeypatch):
    monkeypatch.setattr("s2seg.training.chips._SHARD_BYTES", 2**17)  # several shards, the last not full
    area = make_area((200, 200), split=np.random.default_rng(1).integers(0, 4, (200, 200)).astype(np.uint8))
    chips = store_of(area)
    some = [300, 2, 2, 117]
    images, labels = chips.images(some), chips.labels(slice(3, 9))
    again = pickle.loads(pickle.dumps(open_chips(chips.path, "one")))
    np.testing.assert_array_equal(again.images(some), images)
    np.testing.assert_array_equal(again.labels(slice(3, 9)), labels)
    assert again.images([]).shape == (0, 2, 32, 32)
    assert (again.spec, again.legend, again.bands, again.items) == (chips.spec, chips.legend, BANDS, ("item",))
    assert repr(chips).endswith("2 bands, 32 px)")


def test_zarr_reads_the_store_as_we_do(store_of, monkeypatch):
    monkeypatch.setattr("s2seg.training.chips._SHARD_BYTES", 2**17)
    split = np.random.default_rng(1).integers(0, 4, (200, 200)).astype(np.uint8)
    june, july = make_area((200, 200), split=split, date="2021-06"), make_area((200, 200), date="2021-07")
    chips = store_of(june, july, dataclasses.replace(june, date="2021-08"))
    group = zarr.open_group(str(chips.path), mode="r")
    assert group["image"].chunks[0] == 1 and len(chips) > 10 * group["image"].shards[0]
    assert len(chips) % group["image"].shards[0]
    place = [group[name][:] for name in ("part", "origin", "size")]
    order = np.lexsort((place[0], place[1][:, 2], place[1][:, 1], place[2], place[1][:, 0]))
    np.testing.assert_array_equal(chips.images(slice(None)), group["image"][:][order])
    np.testing.assert_array_equal(chips.labels(slice(None)), group["label"][:][order])


def test_blocks_without_windows_of_their_own_are_passed_over(store_of):
    """Blocks far smaller than a chip: most complete none, some complete many, at every date."""
    june, july = (make_area((40, 40), 5, date=date) for date in ("2021-06", "2021-07"))
    seen = []
    chips = store_of(june, july, keep=lambda image, label: seen.append(image.shape) is None)
    assert len(chips) == len(seen) == 8
    np.testing.assert_array_equal(chips.images(slice(0, 4)), chips.images(slice(4, 8)))


def test_a_lost_or_short_file_is_one_line(store_of):
    chips = store_of(make_area())
    file = chips.path / "image" / "c" / "0" / "0" / "0" / "0"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match=r"chips are missing from .*; make the store anew with --overwrite"):
        chips.images(0)
    file.unlink()
    with pytest.raises(InputError, match="chips are missing from"):
        open_chips(chips.path).images(0)


def test_dates_of_an_area_share_one_reading_of_its_labels(store_of):
    reads: Counter = Counter()

    def load(block_id=None):
        reads[block_id] += 1
        return np.ones((50, 50), np.uint8)

    labels = da.map_blocks(load, chunks=((50, 50), (50, 50)), dtype=np.uint8, meta=np.empty((0, 0), np.uint8))
    june = dataclasses.replace(make_area((100, 100), 50), labels=xr.DataArray(labels, dims=("y", "x")))
    july = dataclasses.replace(june, date="2021-07", scene=june.scene + np.uint16(7))
    chips = store_of(june, july)
    assert set(reads.values()) == {1}
    first, second = (chips.images(np.flatnonzero(chips.date == date)) for date in (june.date, july.date))
    assert len(first) == 36
    np.testing.assert_array_equal(first + 7, second)


def test_a_gap_in_one_date_takes_no_label_from_another(store_of):
    split = np.random.default_rng(2).integers(1, 3, (64, 64)).astype(np.uint8)
    whole = make_area((64, 64), split=split)
    image = whole.scene.values.copy()
    image[1, 5:9, 40] = 0
    gap = dataclasses.replace(whole, date="2021-07", scene=whole.scene.copy(data=da.from_array(image)))
    for dates in ([whole, gap], [gap, whole]):
        chips = store_of(*dates)
        for i in range(len(chips)):
            date, r, c = chips.origin[i]
            at = np.s_[r : r + 32, c : c + 32]
            seen = (dates[date].scene.values[:, *at] > 0).all(axis=0) & (split[at] == chips.part[i])
            np.testing.assert_array_equal(chips.labels(i)[0], np.where(seen, whole.labels.values[at], 0))


def test_the_same_input_gives_the_same_bytes(store_of):
    area = make_area((200, 200))
    one, two = (store_of(area, name=name) for name in ("one.zarr", "two.zarr"))
    files = [{p.relative_to(s.path): p.read_bytes() for p in s.path.rglob("*") if p.is_file()} for s in (one, two)]
    assert files[0] == files[1]
    assert sum(p.name != "zarr.json" for p in files[0]) > 5


def test_each_block_is_computed_once_and_memory_does_not_grow_with_the_area(legend):
    loads: Counter = Counter()

    def area(blocks):
        def load(block_id=None):
            loads[block_id] += 1
            return np.full((2, 256, 256), 7, np.uint16)

        scene = da.map_blocks(
            load, chunks=((2,), (256,) * blocks, (256,) * 4), dtype=np.uint16, meta=np.empty((0, 0, 0))
        )
        ones = da.ones(scene.shape[1:], np.uint8, chunks=256)
        return dataclasses.replace(
            make_area((1, 1)),
            scene=xr.DataArray(scene, dims=("band", "y", "x")),
            labels=xr.DataArray(ones, dims=("y", "x")),
            split=xr.DataArray(ones, dims=("y", "x")),
        )

    def peak(blocks):
        loads.clear()
        tracemalloc.start()
        windows = sum(len(block) for _, block in cut([area(blocks)], [(64, 32), (300, 150)]))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert set(loads.values()) == {1}
        assert len(loads) == 4 * blocks
        assert windows == sum(len(starts(256 * blocks, *s)) * len(starts(1024, *s)) for s in ((64, 32), (300, 150)))
        return highest

    peak(2)  # warm up
    assert peak(16) < 1.5 * peak(4)


@pytest.mark.parametrize(
    ("area", "spec", "says"),
    [
        (make_area(labels=np.zeros((100, 90), np.uint8)), {}, "no chip passes .* of 30 windows .* 30 have too few"),
        (make_area(split=np.full((100, 90), 2, np.uint8)), {}, "no chip for training passes"),
        (make_area(labels=np.full((100, 90), 9, np.uint8)), {}, "labels of here hold 9, which the legend 'three'"),
        (make_area(image=np.ones((3, 100, 90), np.uint16)), {}, "here has 3 bands, not 2"),
        (make_area(), {"stride": 33}, "stride from 1 to the size"),
        (make_area(), {"min_labelled": 2.0}, "min_labelled must lie between 0 and 1"),
    ],
)
def test_refusals(store_of, tmp_path, area, spec, says):
    with pytest.raises(InputError, match=says):
        store_of(area, **spec)
    assert list(tmp_path.iterdir()) == []


def test_stores_of_another_configuration_are_refused(store_of, tmp_path):
    chips = store_of(make_area())
    with pytest.raises(InputError, match=r"made from another configuration: delete them, or .* pass --overwrite"):
        open_chips(chips.path, "two")
    with pytest.raises(InputError, match="no chips in"):
        open_chips(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is not a chip store"):
        open_chips(tmp_path / "empty")
    other = zarr.open_group(str(tmp_path / "other"), mode="w")
    for attributes, says in (({}, "is not a chip store"), ({"s2seg_chips": 1}, "of another version of s2seg; delete")):
        other.attrs.update(attributes)
        with pytest.raises(InputError, match=says):
            open_chips(tmp_path / "other")


def test_a_full_disk_is_one_line_and_leaves_nothing(store_of, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("s2seg.training.chips.ShardedPixels.write", full)
    with pytest.raises(OutputError, match="No space left on device; free some space"):
        store_of(make_area((300, 300)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.real_data
def test_chips_of_a_real_scene(real_data, tmp_path):
    """Alberta at 240 m: every labelled pixel outside the buffer is in some chip, once per part at most."""
    from s2seg.training.config import TrainConfig
    from s2seg.training.regions import chip_spec, open_regions

    area = {"name": "alberta", "catalog": str(real_data / "alberta" / "catalog.json"), "datetime": "2020-08"}
    config = TrainConfig(
        name="alberta",
        legend={
            "name": "alberta",
            "classes": [{"code": i, "name": str(i), "color": "#123456"} for i in (1, 2, 3, 4)],
        },
        bands=["green", "red", "nir08"],
        resolution=240,
        areas=[area | {"labels": {"raster": str(real_data / "alberta" / "labels" / "landcover_30m.tif")}}],
        split={"by": "blocks", "block": 64, "buffer": 4},
        chips={"size": 64, "stride": 32, "min_labelled": 0.0, "max_nodata": 1.0},
    )
    (region,) = open_regions(config)
    check_split([region], config.legend)
    chips = write_chips(
        [region], tmp_path / "chips", config.legend, chip_spec(config), fingerprint="x", bands=config.bands
    )
    split, labels = region.split.values, region.labels.values
    usable = (region.scene.values > 0).all(axis=0) & (labels > 0)
    for code, part in enumerate(PARTS, 1):
        seen = np.zeros(split.shape, np.uint8)
        for i in chips.indices(part):
            _, r, c = chips.origin[i]
            view = seen[r : r + 64, c : c + 64]
            np.copyto(view, chips.labels(i)[0][: view.shape[0], : view.shape[1]], where=view == 0)
        np.testing.assert_array_equal(seen, np.where(usable & (split == code), labels, 0))
    assert (chips.mean > 0.01).all()
    assert (chips.mean < 0.5).all()
