from __future__ import annotations

import dask.array as da
import numpy as np
import odc.geo.xr
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from scipy import ndimage

from s2seg.errors import InputError
from s2seg.sources.composite import METHODS, SCL_CLASSES, CompositeSpec, composite, pass_chunks, passes, per_date

BANDS = ["blue", "red", "nir", "scl"]


@pytest.fixture(autouse=True)
def several_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    # of three dates seven rows of a chunk at a time, and the last slab not full
    monkeypatch.setattr("s2seg.sources.composite._SLAB_PIXELS", 450)


def make_stack(
    scenes: int = 6, size: int = 50, chunk: int = 20, seed: int = 0, minutes: list[int] | None = None
) -> xr.DataArray:
    """Random DN with nodata holes, and a random SCL."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(1, 9000, (scenes, 4, size, size)).astype(np.uint16)
    pixels[:, :3][np.broadcast_to(rng.random((scenes, 1, size, size)) < 0.2, (scenes, 3, size, size))] = 0
    pixels[:, 3] = rng.integers(0, 12, (scenes, size, size))
    grid = GeoBox((size, size), Affine(10, 0, 500000, 0, -10, 5100000), "EPSG:32633")
    days = np.datetime64("2023-08-01T10:00", "ns") + np.arange(scenes) * np.timedelta64(5, "D")
    if minutes is not None:
        days = np.datetime64("2023-08-01T10:00", "ns") + np.array(minutes) * np.timedelta64(60, "s")
    return xr.DataArray(
        da.from_array(pixels, chunks=(-1, (3, 1), chunk, chunk)),
        dims=("time", "band", "y", "x"),
        coords=odc.geo.xr.xr_coords(grid, dims=("y", "x")),
    ).assign_coords(
        time=days,
        band=BANDS,
        platform=("time", ["sentinel-2a"] * scenes),
        cloud_cover=("time", rng.random(scenes).astype(np.float32) * 100),
        item_id=("time", [f"item{i}" for i in range(scenes)]),
    )


def clear_values(stack: xr.DataArray, spec: CompositeSpec) -> np.ndarray:
    """The oracle's view: float (time, band, y, x), NaN where a look is not clear."""
    pixels = stack.values.astype(float)
    masked = np.isin(pixels[:, 3], [SCL_CLASSES[n] for n in spec.mask]) | (pixels[:, :3] == 0).any(axis=1)
    values = pixels[:, :3]
    values[np.broadcast_to(masked[:, None], values.shape)] = np.nan
    return values


@pytest.mark.parametrize("scenes", [1, 2, 3, 5, 6, 20])
@pytest.mark.parametrize("method", ["median", "mean", "percentile"])
@pytest.mark.filterwarnings("ignore:All-NaN slice|Mean of empty slice:RuntimeWarning")  # the oracle's, not ours
def test_statistics_agree_with_numpy(scenes: int, method: str) -> None:
    stack = make_stack(scenes)
    spec = CompositeSpec(method, percentile=30)
    values = clear_values(stack, spec)
    expected = {
        "median": lambda: np.nanmedian(values, axis=0),
        "mean": lambda: np.nanmean(values, axis=0),
        "percentile": lambda: np.nanpercentile(values, 30, axis=0),
    }[method]()
    got = composite(stack, spec)
    assert got.dtype == np.uint16
    if method == "percentile":  # interpolated in single precision: a half may go either way
        np.testing.assert_allclose(got.values, np.nan_to_num(expected), atol=0.501)
    else:
        np.testing.assert_array_equal(got.values, np.rint(np.nan_to_num(expected)))
    np.testing.assert_array_equal(got.observations.values, (~np.isnan(values[:, 0])).sum(axis=0))


@pytest.mark.parametrize("method", ["least-cloudy", "max-ndvi", "medoid"])
def test_selections_take_all_bands_from_the_best_date(method: str) -> None:
    stack = make_stack()
    spec = CompositeSpec(method)
    values = clear_values(stack, spec)
    got = composite(stack, spec).values
    order = np.argsort(stack.cloud_cover.values)
    for y, x in np.ndindex(got.shape[1:]):
        looks = [t for t in range(len(values)) if not np.isnan(values[t, 0, y, x])]
        if not looks:
            assert not got[:, y, x].any()
            continue
        pixel = values[looks, :, y, x]
        if method == "least-cloudy":
            best = values[next(t for t in order if t in looks), :, y, x]
        elif method == "max-ndvi":
            best = pixel[np.argmax((pixel[:, 2] - pixel[:, 1]) / (pixel[:, 2] + pixel[:, 1]))]
        else:
            centre = np.rint(np.median(pixel, axis=0))
            best = pixel[np.argmin(((pixel - centre) ** 2).sum(axis=1))]
        np.testing.assert_array_equal(got[:, y, x], best)


def test_scenes_of_one_pass_count_once() -> None:
    stack = make_stack(4, minutes=[0, 1, 60 * 24 * 5, 60 * 24 * 5 + 1])
    assert passes(stack).tolist() == [0, 0, 1, 1]
    assert pass_chunks(stack.time.values, stack.platform.values) == (2, 2)
    values = clear_values(stack, CompositeSpec())
    usable = ~np.isnan(values[:, 0])
    looks = (usable[0] | usable[1]).astype(int) + (usable[2] | usable[3])
    got = composite(stack)
    np.testing.assert_array_equal(got.observations.values, looks)
    merged = np.where(usable[[0, 2]][:, None], values[[0, 2]], values[[1, 3]])
    one = looks == 1
    expected = np.nan_to_num(merged).sum(axis=0)
    np.testing.assert_array_equal(got.values[:, one], expected[:, one])


def test_two_platforms_within_minutes_are_two_passes() -> None:
    stack = make_stack(2, minutes=[0, 5]).assign_coords(platform=("time", ["sentinel-2a", "sentinel-2b"]))
    assert passes(stack).tolist() == [0, 1]


def test_per_date_mosaics_each_pass_and_keeps_clouds() -> None:
    stack = make_stack(4, minutes=[0, 1, 60 * 24 * 5, 60 * 24 * 5 + 1])
    pixels = stack.values[:, :3]
    seen = (pixels != 0).all(axis=1)
    expected = np.where(
        seen[[0, 2]][:, None], pixels[[0, 2]], np.where(seen[[1, 3]][:, None], pixels[[1, 3]], pixels[[0, 2]])
    )
    got = per_date(stack)
    np.testing.assert_array_equal(got.values, expected)
    np.testing.assert_array_equal(got.time.values, stack.time.values[[0, 2]])
    np.testing.assert_array_equal(got.observations.values, (seen[[0, 2]] | seen[[1, 3]]).astype(int))


@pytest.mark.parametrize("radius", [1, 2, 7, 70])
def test_the_mask_grows_by_a_disc_across_chunk_borders(radius: int) -> None:
    stack = make_stack(2, size=60, chunk=16)
    pixels = stack.values
    pixels[:, 3] = 4
    pixels[0, 3, [15, 16, 40, 59], [15, 33, 0, 59]] = 9
    stack = stack.copy(data=da.from_array(pixels, chunks=stack.data.chunks))
    disc = np.hypot(*np.mgrid[-radius : radius + 1, -radius : radius + 1]) <= radius
    cloudy = np.stack([ndimage.binary_dilation(layer == 9, disc) for layer in pixels[:, 3]])
    clear = ~cloudy & (pixels[:, :3] != 0).all(axis=1)
    got = composite(stack, CompositeSpec(dilate=radius * 10))
    np.testing.assert_array_equal(got.observations.values, clear.sum(axis=0))


def test_codes_that_are_no_class_are_clear() -> None:
    stack = make_stack(3)
    pixels = stack.values
    pixels[:, 3] = np.random.default_rng(1).choice([*SCL_CLASSES.values(), 12, 15, 16, 40, 255, 65535], (3, 50, 50))
    stack = stack.copy(data=da.from_array(pixels, chunks=stack.data.chunks))
    for mask in (("no_data",), ("snow", "water"), tuple(SCL_CLASSES)):
        spec = CompositeSpec(mask=mask)
        looks = (~np.isnan(clear_values(stack, spec)[:, 0])).sum(axis=0)
        np.testing.assert_array_equal(composite(stack, spec).observations.values, looks)


def test_without_scl_only_nodata_is_masked() -> None:
    stack = make_stack().isel(band=slice(0, 3))
    got = composite(stack)
    np.testing.assert_array_equal(got.observations.values, (stack.values != 0).all(axis=1).sum(axis=0))
    with pytest.raises(InputError, match="no scl"):
        composite(stack, CompositeSpec(dilate=20))


def test_the_graph_has_one_task_a_block() -> None:
    stack = make_stack(6, size=200, chunk=20)
    blocks = 100
    assert len(dict(composite(stack).data.__dask_graph__())) < 12 * blocks


def test_every_method_is_known_and_others_are_refused() -> None:
    for method in METHODS:
        composite(make_stack(2), CompositeSpec(method)).compute()
    for bad in ({"method": "best"}, {"mask": ("clouds",)}, {"percentile": 101.0}):
        with pytest.raises(InputError):
            CompositeSpec(**bad)
    for metres in (-1.0, np.nan, np.inf):
        with pytest.raises(InputError, match="the mask can grow by 0 to 10,000 metres"):
            CompositeSpec(dilate=metres)
    with pytest.raises(InputError, match="no reflectance band"):
        composite(make_stack().sel(band=["scl"]))
    with pytest.raises(InputError, match="red and nir"):
        composite(make_stack().isel(band=[0, 3]), CompositeSpec("max-ndvi"))
