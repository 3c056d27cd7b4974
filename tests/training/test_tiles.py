"""Folders of ready-cut pairs: what is matched, what pixels and masks mean, what is refused."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image

from s2seg.errors import InputError, S2SegWarning
from s2seg.training.chips import ChipSpec, write_chips
from s2seg.training.split_map import draw_tiles
from s2seg.training.splits import PARTS, check_split
from s2seg.training.tiles import TileSpec, read_tiles
from tests.pictures import pixels

RGB = ("red", "green", "blue")
CODES = np.arange(40 * 50).reshape(40, 50) // 7 % 4  # 0 is nodata


def save_tif(path: Path, pixels, nodata=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = pixels if pixels.ndim == 3 else pixels[None]
    bands, height, width = pixels.shape
    with rasterio.open(
        path, "w", "GTiff", width, height, bands, dtype=pixels.dtype, nodata=nodata, crs="EPSG:32631",
        transform=rasterio.transform.from_origin(500000, 5000000, 10, 10),
    ) as file:  # fmt: skip
        file.write(pixels)


def save_png(path: Path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def dn(bands=6, seed=0):
    return np.random.default_rng(seed).integers(1, 9000, (bands, 40, 50)).astype(np.uint16)


@pytest.fixture
def folders(tmp_path) -> TileSpec:
    return TileSpec(tmp_path / "images", tmp_path / "labels")


def test_six_band_geotiffs_with_integer_masks(folders, legend):
    pixels = dn()
    pixels[2, 5, 5] = 0
    save_tif(folders.images / "a.tif", pixels)
    save_tif(folders.labels / "a.tif", CODES.astype(np.int16))
    (tile,) = read_tiles(folders, legend, "abcdef", fractions=(1.0, 0.0, 0.0))
    assert tile.scene.chunks is not None
    np.testing.assert_array_equal(tile.scene, pixels)
    np.testing.assert_array_equal(tile.labels, CODES)
    assert tile.labels.dtype == np.uint8
    assert (tile.split == 1).all()
    assert (tile.name, tile.items) == ("a", ("a",))


def test_pictures_are_reflectance_and_black_is_dark_not_missing(folders, legend):
    picture = np.zeros((40, 50, 3), np.uint8)
    picture[0, 0], picture[0, 1] = (255, 51, 0), (1, 2, 3)
    save_png(folders.images / "a.png", picture)
    save_png(folders.labels / "a.png", CODES)
    save_png(folders.images / "b.PNG", np.dstack([picture, np.where(CODES == 2, 0, 255)]))  # alpha is a mask
    save_png(folders.labels / "b.png", CODES)
    save_tif(folders.images / "c.tif", np.moveaxis(picture, -1, 0), nodata=0)
    save_png(folders.labels / "c.png", CODES)
    a, b, c = (tile.scene.values for tile in read_tiles(folders, legend, RGB))
    assert a[:, 0, 0].tolist() == [10000, 2000, 1]
    assert (a[:, 1:] == 1).all()
    np.testing.assert_array_equal(b == 0, np.broadcast_to(CODES == 2, (3, 40, 50)))
    assert c[:, 0, 1].min() > 0  # a declared nodata value is missing, in all bands
    assert c[:, 0, 0].tolist() == [0, 0, 0]
    assert not c[:, 1:].any()


@pytest.mark.parametrize("given", [False, True])
def test_coloured_masks(folders, legend, given):
    """The legend's own colours, or those that the data set's paper gives."""
    palette = np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)])
    colors = None
    if given:
        palette = np.array([(9, 9, 9), (0, 255, 255), (255, 255, 0), (1, 2, 3)])
        colors = {"#090909": None, "#00ffff": 1, "#FFFF00": "b", "#010203": 3}
    save_png(folders.images / "a.jpg", np.full((40, 50, 3), 100))
    save_png(folders.labels / "a.png", palette[CODES])
    spec = TileSpec(folders.images, folders.labels, colors=colors)
    np.testing.assert_array_equal(read_tiles(spec, legend, RGB)[0].labels, CODES)
    palette[2] = (7, 7, 7)
    save_png(folders.labels / "a.png", palette[CODES])
    with pytest.raises(InputError, match=r"a\.png: colors #070707 are not in legend 'three'"):
        read_tiles(spec, legend, RGB)[0].labels.compute()


def test_integer_masks_are_remapped(folders, legend):
    save_tif(folders.images / "a.tif", dn(3))
    save_tif(folders.labels / "a.tif", (CODES * 1000).astype(np.uint16), nodata=0)
    with pytest.raises(InputError, match="values 1000, 2000, 3000 are not in"):
        read_tiles(folders, legend, RGB)[0].labels.compute()
    spec = TileSpec(folders.images, folders.labels, remap={1000: "c", 2000: 2, 3000: None})
    np.testing.assert_array_equal(read_tiles(spec, legend, RGB)[0].labels, np.array([0, 3, 2, 0])[CODES])


def many(folders, names):
    for name in names:
        save_png(folders.images / f"{name}.png", np.full((40, 50, 3), 100))
        save_png(folders.labels / f"{name}.png", CODES)


def test_the_split_is_over_tiles(folders, legend):
    many(folders, [f"t{i:02}" for i in range(20)])

    def parts(seed):
        return [PARTS[int(t.split[0, 0]) - 1] for t in read_tiles(folders, legend, RGB, seed=seed)]

    assert Counter(parts(0)) == {"train": 14, "validation": 3, "test": 3}
    assert parts(0) == parts(0) != parts(1)


def test_few_tiles_fill_every_part(folders, legend):
    many(folders, "abc")
    assert sorted(int(t.split[0, 0]) for t in read_tiles(folders, legend, RGB)) == [1, 2, 3]


def test_sub_folders_are_the_split(folders, legend, tmp_path):
    many(folders, ["train/a", "train/b", "val/a", "test/a"])
    tiles = read_tiles(folders, legend, RGB)
    assert {t.name: int(t.split[0, 0]) for t in tiles} == {"train/a": 1, "train/b": 1, "val/a": 2, "test/a": 3}
    assert check_split(tiles, legend)["train"] == {c: 2 * int((c == CODES).sum()) for c in legend.codes}
    spec = ChipSpec(size=32, stride=32)
    chips = write_chips(tiles, tmp_path / "chips", legend, spec, fingerprint="x", bands=RGB)
    assert [len(chips.indices(p)) for p in PARTS] == [8, 4, 4]
    assert set(chips.area[chips.indices("validation")]) == {"val/a"}
    drawn = pixels(draw_tiles(chips, tmp_path / "split.png"))
    shares = [(drawn == c.rgb).all(-1).sum() for c in legend]  # three bars, each with the classes in equal parts
    assert 50_000 < min(shares) <= max(shares) < 1.2 * min(shares)
    many(folders, ["stray"])
    with pytest.raises(InputError, match="sub-folders train, validation, test and others do not"):
        read_tiles(folders, legend, RGB)


def test_lonely_files_are_left_out_aloud(folders, legend):
    many(folders, ["a"])
    save_png(folders.images / "b.png", np.full((40, 50, 3), 100))
    with pytest.warns(S2SegWarning, match="1 images without a mask are left out: b"):
        assert [t.name for t in read_tiles(folders, legend, RGB)] == ["a"]


@pytest.mark.parametrize(
    ("image", "mask", "says"),
    [
        (dn(6)[:, :30], CODES.astype(np.uint8), "its mask"),
        (dn(5), CODES.astype(np.uint8), r"a\.tif has 5 bands, and 6 are named: a, b"),
        (dn(6).astype(np.float32), CODES.astype(np.uint8), r"a\.tif holds float32: convert it"),
        (dn(6), CODES.astype(np.float32), r"a\.tif holds float32, and classes are integers"),
    ],
)
def test_pairs_that_do_not_fit(folders, legend, image, mask, says):
    save_tif(folders.images / "a.tif", image)
    save_tif(folders.labels / "a.tif", mask)
    with pytest.raises(InputError, match=says):
        read_tiles(folders, legend, "abcdef")


def test_a_fourth_band_of_a_png_is_alpha(folders, legend):
    save_png(folders.images / "a.png", np.full((40, 50, 4), 100))
    save_png(folders.labels / "a.png", CODES)
    with pytest.raises(InputError, match=r"has 3 bands and alpha, and 4 are named: .*; a PNG holds 1 or 3 besides"):
        read_tiles(folders, legend, (*RGB, "nir"))


def test_folders_that_do_not_fit(folders, legend):
    with pytest.raises(InputError, match="there is no folder"):
        read_tiles(folders, legend, RGB)
    save_png(folders.images / "a.png", np.full((40, 50, 3), 100))
    save_png(folders.labels / "b.png", CODES)
    with pytest.raises(InputError, match="no pairs: none of the 1 images"):
        read_tiles(folders, legend, RGB)
    (folders.labels / "a.png").write_bytes(b"not a picture")
    with pytest.warns(S2SegWarning), pytest.raises(InputError, match=r"a\.png cannot be read"):
        read_tiles(folders, legend, RGB)
    many(folders, ["a"])
    save_png(folders.images / "a.jpg", np.full((40, 50, 3), 100))
    with pytest.raises(InputError, match=r"a is there twice \(a\.jpg, a\.png\)"):
        read_tiles(folders, legend, RGB)
    (folders.images / "a.jpg").unlink()
    (folders.labels / "b.png").unlink()
    with pytest.raises(InputError, match="'red' is not of the form"):
        read_tiles(TileSpec(folders.images, folders.labels, colors={"red": 1}), legend, RGB)
