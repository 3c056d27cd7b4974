from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.vrt import WarpedVRT

from s2seg.errors import InputError, MissingBandError, ReadError, S2SegWarning
from s2seg.sources.clip import inside, needs_clip
from s2seg.sources.items import normalize_items
from s2seg.sources.stack import geobox_for, stack
from s2seg.testing import position_scene

NORTH_UP = GeoBox((64, 64), Affine(10, 0, 499980, 0, -10, 5100000), "EPSG:32633")


def items_in(catalog: Path) -> list[pystac.Item]:
    return normalize_items(pystac.Catalog.from_file(str(catalog)).get_items(recursive=True))


def native(item: pystac.Item, band: str) -> np.ndarray:
    with rasterio.open(item.assets[band].href) as dataset:
        return dataset.read(1)


def own_grid(item: pystac.Item, band: str) -> GeoBox:
    with rasterio.open(item.assets[band].href) as dataset:
        return GeoBox(dataset.shape, dataset.transform, f"EPSG:{dataset.crs.to_epsg()}")


@pytest.mark.real_data
@pytest.mark.parametrize("chunk", [512, 300])
def test_mekong_at_10_m_is_rasterios_pixels_bit_for_bit(real_data: Path, chunk: int) -> None:
    (item,) = items_in(real_data / "mekong" / "catalog.json")
    bands = ["blue", "nir", "rededge1", "swir16", "coastal"]
    got = stack([item], own_grid(item, "blue"), bands, chunksize=chunk).values[0]
    for i, (band, factor) in enumerate(zip(bands, [1, 1, 2, 2, 6], strict=True)):
        np.testing.assert_array_equal(got[i], np.kron(native(item, band), np.ones((factor, factor), np.uint16)))


@pytest.mark.real_data
def test_mekong_at_20_m_is_native_or_the_mean_of_native(real_data: Path) -> None:
    (item,) = items_in(real_data / "mekong" / "catalog.json")
    got = stack([item], own_grid(item, "swir16"), ["swir16", "blue"], chunksize=200).values[0]
    np.testing.assert_array_equal(got[0], native(item, "swir16"))
    mean = native(item, "blue").reshape(534, 2, 534, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(got[1], mean, atol=0.51)


@pytest.mark.real_data
def test_the_grid_for_an_area_lies_on_the_sensors_pixels(real_data: Path) -> None:
    (item,) = items_in(real_data / "mekong" / "catalog.json")
    area = shapely.geometry.shape(item.geometry).buffer(-0.01)
    for resolution in (10, 20, 60):
        grid = geobox_for(area, resolution, [item])
        origin = own_grid(item, "blue").affine
        for mine, theirs in ((grid.affine.c, origin.c), (grid.affine.f, origin.f)):
            assert (mine - theirs) / 10 == pytest.approx(round((mine - theirs) / 10), abs=1e-6)
        row, col = round((origin.f - grid.affine.f) / 10), round((grid.affine.c - origin.c) / 10)
        if resolution == 10:
            got = stack([item], grid, ["red"]).values[0, 0]
            np.testing.assert_array_equal(got, native(item, "red")[row : row + got.shape[0], col : col + got.shape[1]])


@pytest.mark.real_data
def test_slovenia_has_two_tiles_side_by_side_and_the_unaligned_one_is_warped(real_data: Path) -> None:
    items = [i for i in items_in(real_data / "slovenia" / "catalog.json") if "20230818" in i.id]
    south, north = sorted(items, key=lambda i: i.assets["red"].extra_fields["proj:transform"][5])
    grid = geobox_for(shapely.box(15.2, 45.8, 16.2, 46.2), 120, [south, north])
    got = stack(items, grid, ["red", "scl"], chunksize=256)
    for item in (south, north):
        values = got.isel(time=list(got.item_id.values).index(item.id))
        for band, how in (("red", Resampling.nearest), ("scl", Resampling.nearest)):
            with (
                rasterio.open(item.assets[band].href) as dataset,
                WarpedVRT(
                    dataset, crs="EPSG:32633", transform=grid.affine, height=grid.shape[0], width=grid.shape[1],
                    resampling=how, src_nodata=0, nodata=0,
                ) as warped,
            ):  # fmt: skip
                np.testing.assert_array_equal(values.sel(band=band).values, warped.read(1))
    # the same ground in the overlap of the two tiles
    overlap = (got.sel(band="red") > 0).all("time").values
    assert overlap.sum() > 1000
    a, b = got.sel(band="red").values[:, overlap].astype(float)
    assert np.corrcoef(a, b)[0, 1] > 0.9


@pytest.mark.real_data
def test_congo_loses_its_offset_and_straddles_the_equator(real_data: Path) -> None:
    (item,) = items_in(real_data / "congo" / "catalog.json")
    raw = native(item, "red")
    got = stack([item], own_grid(item, "red"), ["red"]).values[0, 0]
    np.testing.assert_array_equal(got, np.where(raw == 0, 0, np.maximum(raw.astype(int) - 1000, 1)))


def test_an_area_in_two_utm_zones_comes_on_one_grid(tmp_path: Path) -> None:
    west = position_scene(tmp_path / "w", crs="EPSG:32632", origin=(798_000, 5_103_000), tile="32TQS")
    east = position_scene(tmp_path / "e", crs="EPSG:32633", origin=(330_000, 5_103_000), tile="33TUM")
    items = items_in(west) + items_in(east)
    area = shapely.union_all([shapely.geometry.shape(i.geometry) for i in items])
    grid = geobox_for(area, 10, items)
    assert grid.crs.to_epsg() in (32632, 32633)
    got = stack(items, grid, ["red"], chunksize=500)
    for i, item_id in enumerate(got.item_id.values):
        item = next(x for x in items if x.id == item_id)
        seen = int((got[i] > 0).sum())
        assert seen == pytest.approx(256 * 256, rel=0.03)
        if item.properties["proj:epsg"] == grid.crs.to_epsg():
            np.testing.assert_array_equal(
                np.sort(got[i].values[got[i].values > 0]), np.sort(native(item, "red").ravel())
            )


def test_the_antimeridian_does_not_widen_the_grid() -> None:
    area = shapely.MultiPolygon([shapely.box(179.9, -16.2, 180, -16), shapely.box(-180, -16.2, -179.9, -16)])
    grid = geobox_for(area, 10)
    assert grid.crs.to_epsg() in (32701, 32760)
    assert max(grid.shape) < 3000


def test_items_outside_or_beside_the_grid_are_empty(tmp_path: Path) -> None:
    (item,) = items_in(position_scene(tmp_path))
    grid = GeoBox((64, 64), Affine(10, 0, 499980 - 320, 0, -10, 5100000 + 320), "EPSG:32633")
    got = stack([item], grid, ["red"], chunksize=32).values[0, 0]
    np.testing.assert_array_equal(got[32:, 32:], native(item, "red")[:32, :32])
    assert not got[:32].any() and not got[:, :32].any()
    away = GeoBox((64, 64), Affine(10, 0, 600_000, 0, -10, 5100000), "EPSG:32633")
    assert not stack([item], away, ["red"]).values.any()


def test_an_area_smaller_than_a_chunk_and_one_of_a_single_pixel(tmp_path: Path) -> None:
    (item,) = items_in(position_scene(tmp_path))
    for n in (1, 7):
        grid = GeoBox((n, n), Affine(10, 0, 499980 + 50, 0, -10, 5100000 - 30), "EPSG:32633")
        got = stack([item], grid, ["red"])
        np.testing.assert_array_equal(got.values[0, 0], native(item, "red")[3 : 3 + n, 5 : 5 + n])
        assert got.odc.geobox == grid


def test_items_without_projection_metadata_are_still_found(tmp_path: Path) -> None:
    (item,) = items_in(position_scene(tmp_path))
    for asset in item.assets.values():
        asset.extra_fields.pop("proj:transform", None)
        asset.extra_fields.pop("proj:shape", None)
    grid = own_grid(item, "red")
    np.testing.assert_array_equal(stack([item], grid, ["red"]).values[0, 0], native(item, "red"))


def test_the_graph_is_one_task_a_chunk_and_travels_to_other_processes(tmp_path: Path) -> None:
    bands = {"red": 10, "nir": 10, "scl": 20}
    items = items_in(position_scene(tmp_path, dates=("2023-07-01", "2023-07-06", "2023-07-11"), bands=bands))
    got = stack(items, own_grid(items[0], "red"), ["red", "nir", "scl"], chunksize=64)
    assert got.data.numblocks == (1, 2, 4, 4)
    assert len(dict(got.data.__dask_graph__())) <= 4 * 2 * 16
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(got)).values, got.values)


def test_missing_bands_are_told(tmp_path: Path) -> None:
    full, poor = items_in(position_scene(tmp_path, dates=("2023-07-01", "2023-07-06")))
    grid = own_grid(full, "red")
    with pytest.raises(MissingBandError, match=r"no band 'swir16'.*blue, green"):
        stack([full, poor], grid, ["red", "swir16"])
    del poor.assets["nir"]
    with pytest.warns(S2SegWarning, match="1 of 2 items have no band 'nir'"):
        got = stack([full, poor], grid, ["nir"]).values
    assert got[0].any() and not got[1].any()


def test_a_missing_asset_is_named_when_it_is_read(tmp_path: Path) -> None:
    (item,) = items_in(position_scene(tmp_path))
    Path(item.assets["red"].href).unlink()
    lazy = stack([item], own_grid(item, "nir"), ["nir", "red"])
    with pytest.raises(ReadError) as caught:
        lazy.compute()
    assert (caught.value.item_id, caught.value.band) == (item.id, "red")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"bands": []}, "bands must be a list"),
        ({"bands": "red"}, "bands must be a list"),
        ({"chunksize": 0}, "chunksize 0"),
        ({"chunksize": (0, 64)}, "chunksize"),
        ({"resampling": "cubic"}, "unknown resampling 'cubic'; choose nearest or bilinear"),
        ({"offsets": {}}, "offsets has no entry for item"),
        ({"geobox": NORTH_UP.flipy()}, "north up"),
        ({"geobox": NORTH_UP.rotate(20)}, "north up"),
    ],
)
def test_arguments_that_make_no_sense(tmp_path: Path, change: dict, says: str) -> None:
    (item,) = items_in(position_scene(tmp_path))
    with pytest.raises(InputError, match=says):
        stack([item], **{"bands": ["red"], "geobox": own_grid(item, "red"), **change})


def test_a_file_in_another_zone_than_its_item_is_told(tmp_path: Path) -> None:
    (item,) = items_in(position_scene(tmp_path))
    grid = own_grid(item, "red")
    item.properties |= {"proj:epsg": 32634, "proj:code": "EPSG:32634"}
    for asset in item.assets.values():  # so that its bounds come from its footprint, and it is read
        del asset.extra_fields["proj:transform"]
    with pytest.raises(ReadError, match="the file is in EPSG:32633, its item says EPSG:32634; mend") as caught:
        stack([item], grid, ["red"]).compute()
    assert (caught.value.item_id, caught.value.band) == (item.id, "red")


def test_a_file_elsewhere_in_the_zone_than_its_item_is_told(tmp_path: Path) -> None:
    (item,) = items_in(position_scene(tmp_path))
    grid = own_grid(item, "red")
    item.assets["red"].extra_fields["proj:transform"][2] += 20
    with pytest.raises(ReadError, match=r"the file begins at .*, by its item at .*; mend the item's proj:transform"):
        stack([item], grid, ["red"]).compute()


@pytest.mark.parametrize("resolution", [0, -10, float("nan"), (10, 10), "10"])
def test_a_resolution_must_be_a_positive_number(resolution: float) -> None:
    with pytest.raises(InputError, match="resolution must be one positive number of metres"):
        geobox_for(shapely.box(15, 45, 15.1, 45.1), resolution)


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:999999", "moon"])
def test_a_crs_must_be_projected_and_known(crs: str) -> None:
    with pytest.raises(InputError, match="CRS"):
        geobox_for(shapely.box(15, 45, 15.1, 45.1), 10, crs=crs)


def test_clipping_marks_the_pixels_that_touch_a_polygon() -> None:
    box = shapely.box(15.0, 45.0, 15.02, 45.02)
    triangle = shapely.Polygon([(15.0, 45.0), (15.02, 45.0), (15.0, 45.02)])
    assert not needs_clip(box) and needs_clip(triangle)
    grid = geobox_for(box, 10)
    whole = inside(triangle, grid, ((grid.shape[0],), (grid.shape[1],))).compute()
    assert whole.mean() == pytest.approx(0.5, abs=0.03) and whole[-5, 5] and not whole[5, -5]
    rows = (100, grid.shape[0] - 100)
    parts = inside(triangle, grid, (rows, (50, grid.shape[1] - 50))).compute()
    np.testing.assert_array_equal(parts, whole)
    wide = inside(triangle, grid, ((grid.shape[0],), (grid.shape[1],)), grow=200).compute()
    assert wide[whole].all() and wide.sum() > whole.sum() + 20 * 200
