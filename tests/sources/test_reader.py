from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window

from s2seg.errors import ReadError
from s2seg.sources.reader import AssetRef, read_window

EPSG = 32633
LEFT, TOP = 500_000.0, 5_100_000.0


def write(path: Path, pixels: np.ndarray, resolution: float, left: float = LEFT, top: float = TOP) -> str:
    profile = {
        "driver": "GTiff", "height": pixels.shape[0], "width": pixels.shape[1], "count": 1, "dtype": pixels.dtype,
        "crs": f"EPSG:{EPSG}", "transform": Affine(resolution, 0, left, 0, -resolution, top), "nodata": 0,
    }  # fmt: skip
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(pixels, 1)
    return str(path)


def positions(height: int, width: int) -> np.ndarray:
    """Every pixel says where it is."""
    return (np.arange(height * width, dtype=np.uint16) + 1).reshape(height, width)


def grid(resolution: float, left: float = LEFT, top: float = TOP) -> Affine:
    return Affine(resolution, 0, left, 0, -resolution, top)


def paste(source: np.ndarray, row: int, col: int, height: int, width: int) -> np.ndarray:
    """The window (row, col, height, width) of an endless canvas that holds ``source`` at its origin."""
    out = np.zeros((height, width), source.dtype)
    for i in range(height):
        for j in range(width):
            if 0 <= row + i < source.shape[0] and 0 <= col + j < source.shape[1]:
                out[i, j] = source[row + i, col + j]
    return out


WINDOWS = [
    (0, 0, 40, 40),
    (3, 5, 20, 17),
    (-7, -3, 30, 30),
    (25, 30, 40, 40),
    (60, 60, 8, 8),
    (-20, 0, 8, 8),
    (39, 39, 1, 1),
]


@pytest.mark.parametrize("window", WINDOWS)
def test_aligned_pixels_are_copied(tmp_path: Path, window: tuple[int, int, int, int]) -> None:
    source = positions(40, 40)
    ref = AssetRef("item", "red", write(tmp_path / "a.tif", source, 10))
    row, col, height, width = window
    got = read_window(ref, EPSG, grid(10), Window(col, row, width, height))
    np.testing.assert_array_equal(got, paste(source, *window))


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("factor", [2, 6])
def test_coarser_pixels_are_repeated(tmp_path: Path, window: tuple[int, int, int, int], factor: int) -> None:
    source = positions(20, 20)
    ref = AssetRef("item", "swir16", write(tmp_path / "a.tif", source, 10 * factor))
    row, col, height, width = window
    got = read_window(ref, EPSG, grid(10), Window(col, row, width, height))
    np.testing.assert_array_equal(got, paste(np.kron(source, np.ones((factor, factor), np.uint16)), *window))


@pytest.mark.parametrize("window", [(0, 0, 40, 40), (3, 5, 20, 17), (-7, -3, 30, 30), (35, 38, 4, 1)])
def test_bilinear_agrees_with_gdal_and_does_not_depend_on_the_window(
    tmp_path: Path, window: tuple[int, int, int, int]
) -> None:
    source = np.random.default_rng(0).integers(500, 4000, (20, 20)).astype(np.uint16)
    path = write(tmp_path / "a.tif", source, 20)
    with (
        rasterio.open(path) as dataset,
        WarpedVRT(dataset, transform=grid(10), height=40, width=40, resampling=Resampling.bilinear) as warped,
    ):
        expected = warped.read(1)
    row, col, height, width = window
    got = read_window(
        AssetRef("i", "swir16", path, resampling="bilinear"), EPSG, grid(10), Window(col, row, width, height)
    )
    np.testing.assert_allclose(got.astype(int), paste(expected, *window).astype(int), atol=1)


def test_bilinear_keeps_nodata_apart(tmp_path: Path) -> None:
    source = np.full((6, 6), 1000, np.uint16)
    source[:, 3:] = 0
    path = write(tmp_path / "a.tif", source, 20)
    got = read_window(AssetRef("i", "swir16", path, resampling="bilinear"), EPSG, grid(10), Window(0, 0, 12, 12))
    np.testing.assert_array_equal(got, np.kron(source, np.ones((2, 2), np.uint16)))


@pytest.mark.parametrize("window", [(0, 0, 10, 10), (2, 3, 5, 4), (-2, -1, 20, 20)])
def test_finer_pixels_are_averaged_and_codes_are_not(tmp_path: Path, window: tuple[int, int, int, int]) -> None:
    source = positions(40, 40)
    path = write(tmp_path / "a.tif", source, 10)
    row, col, height, width = window
    at = Window(col, row, width, height)
    mean = source.reshape(10, 4, 10, 4).mean(axis=(1, 3))
    got = read_window(AssetRef("i", "red", path), EPSG, grid(40), at)
    np.testing.assert_allclose(got.astype(float), paste(mean, *window), atol=1)
    codes = read_window(AssetRef("i", "scl", path), EPSG, grid(40), at)
    assert set(codes[codes > 0].tolist()) <= set(source.ravel().tolist())
    blocks = source.reshape(10, 4, 10, 4).swapaxes(1, 2).reshape(10, 10, 16)
    for i, j in np.argwhere(codes > 0):
        assert codes[i, j] in blocks[row + i, col + j]


def test_a_shifted_grid_is_warped(tmp_path: Path) -> None:
    source = positions(40, 40)
    path = write(tmp_path / "a.tif", source, 10, left=LEFT + 3)
    got = read_window(AssetRef("i", "red", path), EPSG, grid(10), Window(0, 0, 40, 40))
    np.testing.assert_array_equal(got[:, :39], source[:, :39])


def test_another_zone_is_warped_to_where_it_lies(tmp_path: Path) -> None:
    source = positions(40, 40)
    path = write(tmp_path / "a.tif", source, 10)
    with rasterio.open(path) as dataset, WarpedVRT(dataset, crs="EPSG:32632") as warped:
        transform, shape, expected = warped.transform, warped.shape, warped.read(1)
    got = read_window(AssetRef("i", "red", path), 32632, transform, Window(0, 0, shape[1], shape[0]))
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("resolution", [5, 10, 20, 40])
@pytest.mark.parametrize("window", [(0, 0, 8, 8), (-3, 2, 9, 20), (70, 70, 4, 4)])
def test_one_byte_a_pixel_is_widened(tmp_path: Path, resolution: int, window: tuple[int, int, int, int]) -> None:
    source = np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4) + 1, 4, 0).repeat(4, 1)
    row, col, height, width = window
    at = Window(col, row, width, height)
    pixels = (source, source.astype(np.uint16))
    small, large = (
        read_window(AssetRef("i", "scl", write(tmp_path / f"{a.dtype}.tif", a, resolution)), EPSG, grid(10), at)
        for a in pixels
    )
    assert small.dtype == np.uint16
    np.testing.assert_array_equal(small, large)


def test_the_offset_is_taken_off_valid_pixels_only(tmp_path: Path) -> None:
    source = np.array([[0, 1, 1000, 1001, 3000]], np.uint16)
    path = write(tmp_path / "a.tif", source, 10)
    got = read_window(AssetRef("i", "red", path, subtract=1000), EPSG, grid(10), Window(0, 0, 5, 1))
    np.testing.assert_array_equal(got, [[0, 1, 1, 1, 2000]])


def bad_assets(folder: Path) -> dict[str, str]:
    good = Path(write(folder / "good.tif", positions(200, 200), 10)).read_bytes()
    (folder / "truncated.tif").write_bytes(good[: len(good) // 2])
    (folder / "text.tif").write_text("this is not a raster")
    floats = write(folder / "floats.tif", np.ones((8, 8), np.float32), 10)
    return {
        "missing": str(folder / "missing.tif"), "truncated": str(folder / "truncated.tif"),
        "text": str(folder / "text.tif"), "floats": floats,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["missing", "truncated", "text", "floats"])
def test_a_bad_asset_is_named(tmp_path: Path, kind: str) -> None:
    href = bad_assets(tmp_path)[kind]
    with pytest.raises(ReadError) as caught:
        read_window(AssetRef("S2A_33TWL", "nir", href), EPSG, grid(10), Window(0, 0, 200, 200))
    assert (caught.value.item_id, caught.value.band, caught.value.href) == ("S2A_33TWL", "nir", href)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("grid_epsg", [EPSG, 32634])
def test_a_file_that_contradicts_its_item_is_not_read(tmp_path: Path, grid_epsg: int) -> None:
    href = write(tmp_path / "a.tif", positions(40, 40), 10)
    window = Window(0, 0, 8, 8)
    for stated in (None, EPSG):
        read_window(AssetRef("item", "red", href, epsg=stated), grid_epsg, grid(10), window)
    with pytest.raises(ReadError, match="the file is in EPSG:32633, its item says EPSG:32634"):
        read_window(AssetRef("item", "red", href, epsg=32634), grid_epsg, grid(10), window)


@pytest.mark.parametrize("stated", [(), ((0.5, -9.9),), ((-9.9, 0), (0, 9.9))])
@pytest.mark.parametrize("grid_epsg", [EPSG, 32634])
def test_an_item_may_err_by_less_than_a_pixel(tmp_path: Path, grid_epsg: int, stated: tuple) -> None:
    ref = AssetRef("item", "red", write(tmp_path / "a.tif", positions(40, 40), 10), epsg=EPSG, corners=off(*stated))
    read_window(ref, grid_epsg, grid(10), Window(0, 0, 8, 8))


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        (((5000, 0),), "the file begins at 500000, 5100000 (EPSG:32633), by its item at 505000, 5100000; mend"),
        (((0, -11), (0, -11)), "the file begins at 500000, 5100000 (EPSG:32633), by its item at 500000, 5099989; mend"),
        (((0, 0), (400, -400)), "the file ends at 500400, 5099600 (EPSG:32633), by its item at 500800, 5099200; mend"),
    ],
)
@pytest.mark.parametrize("grid_epsg", [EPSG, 32634])
def test_a_file_elsewhere_than_its_item_says_is_not_read(
    tmp_path: Path, grid_epsg: int, stated: tuple, says: str
) -> None:
    ref = AssetRef("item", "red", write(tmp_path / "a.tif", positions(40, 40), 10), epsg=EPSG, corners=off(*stated))
    with pytest.raises(ReadError) as caught:
        read_window(ref, grid_epsg, grid(10), Window(0, 0, 8, 8))
    assert says in str(caught.value)


def off(*shifts: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    """Corners of a file of 40 x 40 pixels, as an item states them that is so many metres off."""
    true = (LEFT, TOP), (LEFT + 400, TOP - 400)
    return tuple((x + dx, y + dy) for (x, y), (dx, dy) in zip(true, shifts, strict=False))
