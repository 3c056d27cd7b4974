"""Splits by place: the same on every run, whatever the chunks; nothing near a border; faults found early."""

import dataclasses

import dask
import numpy as np
import pytest
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from s2seg.errors import InputError, OutputError
from s2seg.training.split_map import draw_split
from s2seg.training.splits import (
    PARTS,
    SplitSpec,
    check_split,
    count_blocks,
    split_by_area,
    split_by_blocks,
    split_by_geometries,
)

from .conftest import Area, make_area

CODES = (1, 2, 3)
SPEC = SplitSpec(block=32, seed=1)


def patchy(shape=(330, 300), seed=0):
    """Classes in patches of 30 pixels; the third is rare; a corner is unlabelled."""
    rng = np.random.default_rng(seed)
    cells = rng.choice([1, 2, 3], p=[0.5, 0.47, 0.03], size=(12, 12)).astype(np.uint8)
    labels = cells.repeat(30, 0).repeat(30, 1)[: shape[0], : shape[1]]
    labels[:100, :100] = 0
    return labels


def test_blocks_are_counted_whatever_the_chunks():
    labels = patchy()
    counts = count_blocks(make_area(labels.shape, 47, labels=labels).labels, 32, CODES)
    assert counts.shape == (11, 10, 3)
    assert counts.sum() == (labels > 0).sum()
    assert counts[4, 9].tolist() == [(labels[128:160, 288:] == c).sum() for c in CODES]


@pytest.mark.parametrize("buffer", [0, 5])
def test_a_split_by_blocks(buffer):
    labels = patchy()
    spec = dataclasses.replace(SPEC, buffer=buffer)
    (split, counted), (again, _), (other, _) = (
        split_by_blocks(make_area(labels.shape, chunk, labels=labels).labels, s, CODES)
        for chunk, s in ((47, spec), (330, spec), (47, dataclasses.replace(spec, seed=2)))
    )
    assert dask.is_dask_collection(split)
    assert split.data.chunks[0][0] == 47
    np.testing.assert_array_equal(split, again)
    assert (split.values != other.values).any()

    whole = split_by_blocks(make_area(labels.shape, labels=labels).labels, SPEC, CODES)[0].values
    blocks = {
        (r, c): set(np.unique(whole[r : r + 32, c : c + 32])) for r in range(0, 330, 32) for c in range(0, 300, 32)
    }
    assert all(len(parts) == 1 for parts in blocks.values())
    assert blocks[0, 0] == {0}  # no labels, no part
    shares = np.bincount(whole[labels > 0], minlength=4)[1:] / (labels > 0).sum()
    np.testing.assert_allclose(shares, SPEC.fractions, atol=0.05)
    assert {tuple(np.unique(labels[(whole == p) & (labels > 0)])) for p in (1, 2, 3)} == {CODES}
    if not buffer:
        known = [[((whole == p) & (labels == c)).sum() for c in CODES] for p in (1, 2, 3)]
        np.testing.assert_array_equal(counted[1:, CODES], known)
    else:
        assert counted is None  # the buffer takes some away
        assert_apart(split.values, buffer)
        kept = split.values > 0
        assert (split.values[kept] == whole[kept]).all()
        assert kept.sum() > 0.4 * (whole > 0).sum()


def assert_apart(split, buffer):
    """No pixel has one of another part nearer than twice the buffer, and the buffer takes no more than that."""
    for part in (1, 2, 3):
        near = np.zeros(split.shape, bool)
        rows, cols = np.nonzero(split == part)
        reach = 2 * buffer
        for d in range(-reach, reach + 1):
            near[np.clip(rows + d, 0, split.shape[0] - 1), cols] = True
            near[rows, np.clip(cols + d, 0, split.shape[1] - 1)] = True
        assert not (near & (split > 0) & (split != part)).any()


def test_few_blocks_still_fill_every_part():
    labels = np.ones((60, 20), np.uint8)
    split, _ = split_by_blocks(make_area((60, 20), labels=labels).labels, SplitSpec(block=20), CODES)
    assert sorted(np.unique(split).tolist()) == [1, 2, 3]
    no_test = SplitSpec(block=20, fractions=(0.5, 0.5, 0.0))
    assert 3 not in split_by_blocks(make_area((60, 20), labels=labels).labels, no_test, CODES)[0].values


def on_grid(labels, chunk=40):
    area = make_area(labels.shape, chunk, labels=labels)
    coords = xr_coords(
        GeoBox.from_bbox((500000, 0, 500000 + 10 * labels.shape[1], 10 * labels.shape[0]), "EPSG:32631", resolution=10)
    )
    return dataclasses.replace(area, labels=area.labels.assign_coords(coords))


def test_a_split_by_geometries(tmp_path):
    import geopandas
    from shapely import box

    def save(name, *boxes, crs="EPSG:4326"):
        frame = geopandas.GeoDataFrame(geometry=list(boxes), crs="EPSG:32631").to_crs(crs)
        frame.to_file(tmp_path / name, driver="GPKG")
        return tmp_path / name

    area = on_grid(np.ones((100, 90), np.uint8))
    files = {
        "validation": save("v.gpkg", box(500300, 0, 500600, 1000)),  # columns 30 to 60
        "test": save("t.gpkg", box(500500, 0, 500900, 500), crs="EPSG:32631"),  # columns 50 to 90, the lower half
    }
    split = split_by_geometries(area.labels, SplitSpec(by="geometries", geometries=files)).values
    expected = np.ones((100, 90), np.uint8)
    expected[:, 30:60] = 2
    expected[50:, 50:] = 3
    np.testing.assert_array_equal(split, expected)
    buffered = split_by_geometries(area.labels, SplitSpec(by="geometries", geometries=files, buffer=3)).values
    assert buffered[10, 24:36].tolist() == [1] * 3 + [0] * 6 + [2] * 3
    whole = on_grid(np.ones((100, 90), np.uint8), chunk=100).labels
    np.testing.assert_array_equal(
        buffered, split_by_geometries(whole, SplitSpec(by="geometries", geometries=files, buffer=3))
    )
    only = split_by_geometries(area.labels, SplitSpec(by="geometries", geometries={"train": files["test"]})).values
    np.testing.assert_array_equal(only, (expected == 3).astype(np.uint8))
    for path, says in ((tmp_path / "none.gpkg", "cannot be read"), (save("e.gpkg"), "holds no geometry")):
        with pytest.raises(InputError, match=says):
            split_by_geometries(area.labels, SplitSpec(by="geometries", geometries={"validation": path}))


def test_the_check_counts_each_area_once():
    labels = patchy((64, 64), seed=5)
    labels[:] = 1
    labels[::2] = 2
    one, two = (split_by_area(make_area((64, 64), labels=labels).labels, part) for part in ("train", "validation"))
    areas = [
        make_area((64, 64), labels=labels, split=s.values, name=n, date=d)
        for s, n, d in ((one, "a", "2020"), (one, "a", "2021"), (two, "b", "2020"))
    ]
    half = {1: 2048, 2: 2048, 3: 0}
    assert check_split(areas, three()) == {"train": half, "validation": half, "test": dict.fromkeys(CODES, 0)}


def test_the_check_spares_itself_what_the_split_has_counted(monkeypatch):
    labels = patchy()
    area = make_area(labels.shape, labels=labels)
    split, counted = split_by_blocks(area.labels, SPEC, CODES)
    told = check_split([dataclasses.replace(area, split=split)], three(), PARTS)
    monkeypatch.setattr("s2seg.training.splits._count_parts", None)
    assert check_split([CountedArea(area.scene, area.labels, split, counted=counted)], three(), PARTS) == told


@dataclasses.dataclass(frozen=True)
class CountedArea(Area):
    counted: np.ndarray | None = None


def three():
    from s2seg.legend import LandClass, Legend

    return Legend(
        "three", tuple(LandClass(c, n, "#123456") for c, n in zip(CODES, ("water", "wood", "rock"), strict=True))
    )


@pytest.mark.parametrize(
    ("labels", "split", "required", "says"),
    [
        ([0, 0, 0], [1, 2, 3], PARTS, "no pixel is labelled"),
        ([2, 2, 2], [1, 2, 3], PARTS, "all labels are 'wood'"),
        ([1, 2, 1], [1, 1, 3], PARTS[:2], "the validation part of the split has no labels"),
        ([1, 2, 0], [1, 2, 3], PARTS, "the test part .* more areas or tiles; a test part is left out with a share"),
        ([1, 2, 3], [1, 2, 3], PARTS, "no label of 'wood', 'rock' is in train"),
    ],
)
def test_the_check_refuses(labels, split, required, says):
    rows = [np.array(v, np.uint8).repeat(20)[:, None].repeat(60, 1) for v in (labels, split)]
    with pytest.raises(InputError, match=says):
        check_split([make_area((60, 60), labels=rows[0], split=rows[1])], three(), required)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"fractions": (0.7, 0.2, 0.2)}, "sum to 1"),
        ({"fractions": (0.0, 0.5, 0.5)}, "some for training"),
        ({"block": 0}, "blocks of 0"),
        ({"geometries": {"val": "v.gpkg"}}, "'val' is no part"),
        ({"by": "geometries"}, "needs a vector file"),
    ],
)
def test_specs_refuse(spec, says):
    with pytest.raises(InputError, match=says):
        SplitSpec(**spec)
    with pytest.raises(InputError, match="no part"):
        split_by_area(make_area().labels, "val")


def test_required_parts():
    assert SplitSpec().required == PARTS
    assert SplitSpec(fractions=(0.8, 0.2, 0.0)).required == PARTS[:2]
    assert SplitSpec(by="area").required == PARTS[:2]
    assert SplitSpec(by="geometries", geometries={"test": "t"}).required == PARTS


def test_the_split_is_drawn(tmp_path):
    from matplotlib.image import imread

    labels = patchy()
    areas = [
        make_area(
            labels.shape,
            labels=labels,
            name=f"area {i}",
            split=split_by_blocks(
                make_area(labels.shape, labels=labels).labels, dataclasses.replace(SPEC, seed=i), CODES
            )[0].values,
        )
        for i in range(4)
    ]
    path = draw_split(areas, tmp_path / "split.png", three())
    image = imread(path)[..., :3]
    assert image.shape[1] > image.shape[0] > 1000
    ink = (np.abs(image * 255 - 0x26).max(axis=-1) < 2).sum()
    whole = [dataclasses.replace(area, split=area.split * 0 + 1) for area in areas]
    bare = imread(draw_split(whole, tmp_path / "whole.png", three()))[..., :3]
    # hatches and outlines; of classes and parts only classes have a colour
    assert ink > 20_000 + (np.abs(bare * 255 - 0x26).max(axis=-1) < 2).sum()
    hues = np.unique(image[np.ptp(image, axis=-1) > 0.2].round(1), axis=0)
    assert {tuple(hue) for hue in hues} <= {tuple(hue) for hue in np.unique(bare.reshape(-1, 3).round(1), axis=0)}
    with pytest.raises(OutputError, match="exists already"):
        draw_split(areas, path, three())


def test_what_the_parts_mean_fits_beside_a_narrow_area(tmp_path):
    from matplotlib.image import imread

    labels = patchy()[:, :40]
    area = make_area(labels.shape, labels=labels, split=np.ones(labels.shape, np.uint8))
    image = imread(draw_split([area], tmp_path / "split.png", three()))[..., :3]
    margin = image[:, -20:]
    assert margin.min() == 1, "something is cut off at the right"
