import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pystac
import pytest
import rasterio
from rio_cogeo.cogeo import cog_validate

from s2seg.errors import InputError
from s2seg.testing import LEGEND, position_pixels, position_scene, synthetic_catalog

BANDS_10M = {"blue", "green", "red", "nir"}
BANDS_20M = {"rededge1", "rededge2", "rededge3", "nir08", "swir16", "swir22"}


def items_of(catalog: Path) -> list[pystac.Item]:
    return sorted(pystac.Catalog.from_file(str(catalog)).get_items(recursive=True), key=lambda i: i.id)


def read(item: pystac.Item, name: str) -> np.ndarray:
    with rasterio.open(item.assets[name].get_absolute_href()) as raster:
        return raster.read(1)


def truth_under(region, item: pystac.Item) -> np.ndarray:
    left, step, top = (item.assets["red"].extra_fields["proj:transform"][i] for i in (2, 0, 5))
    with rasterio.open(region.truth) as raster:
        row, col = (int(n) for n in raster.index(left + step / 2, top - step / 2))
        rows, cols = item.assets["red"].extra_fields["proj:shape"]
        return raster.read(1)[row : row + rows, col : col + cols]


def reflectance(item: pystac.Item, name: str) -> np.ndarray:
    """Masked where not seen or not clear, with the offset that the baseline implies taken off."""
    dn, scl = read(item, name).astype(float), read(item, "scl")
    if scl.shape != dn.shape:
        scl = scl.repeat(2, 0).repeat(2, 1)
    offset = 1000 if item.properties["s2:processing_baseline"] == "04.00" else 0
    return np.ma.masked_where((dn == 0) | ~np.isin(scl, [2, 4, 5, 6, 7]), (dn - offset) / 10_000)


def test_catalog_is_valid_static_stac_with_relative_links(synthetic):
    items = items_of(synthetic.catalog)
    assert len(items) == 2 * len(synthetic.dates)
    assert {i.properties["grid:code"] for i in items} == {"MGRS-33TWL", "MGRS-33TWM"}
    for item in items:
        text = json.loads(Path(item.get_self_href()).read_text())
        assert set(text["assets"]) == BANDS_10M | BANDS_20M | {"scl"}
        assert all(not link["href"].startswith(("/", "http")) for link in text["links"])
        assert all(asset["href"].startswith("./") for asset in text["assets"].values())
        assert text["properties"]["proj:code"] == "EPSG:32633"
        assert "earthsearch:boa_offset_applied" not in text["properties"]


def test_metadata_describes_the_pixels(synthetic):
    for item in items_of(synthetic.catalog):
        for name, asset in item.assets.items():
            with rasterio.open(asset.get_absolute_href()) as raster:
                assert list(raster.shape) == asset.extra_fields["proj:shape"], name
                assert list(raster.transform)[:6] == asset.extra_fields["proj:transform"], name
                assert raster.crs.to_epsg() == 32633
                assert raster.nodata == 0
                assert raster.res[0] == asset.extra_fields["gsd"] == (10 if name in BANDS_10M else 20)
                assert raster.dtypes[0] == asset.extra_fields["raster:bands"][0]["data_type"]
        scl = read(item, "scl")
        cloudy = 100 * np.isin(scl, [8, 9, 10]).sum() / (scl > 0).sum()
        assert item.properties["eo:cloud_cover"] == pytest.approx(cloudy, abs=1e-3)


def test_assets_are_cogs_with_overviews(synthetic):
    for path in (synthetic.truth, items_of(synthetic.catalog)[0].assets["red"].get_absolute_href()):
        valid, errors, _ = cog_validate(str(path))
        assert (valid, errors) == (True, [])
        with rasterio.open(path) as raster:
            assert raster.overviews(1)


def test_tiles_overlap_and_agree_there(synthetic):
    south, north = (i for i in items_of(synthetic.catalog) if synthetic.dates[0].replace("-", "") in i.id)
    (left, top), (left_north, top_north) = (
        np.array(i.assets["red"].extra_fields["proj:transform"])[[2, 5]] for i in (south, north)
    )
    above = int(top_north - top) // 10
    strip = read(north, "red").shape[0] - above
    assert left == left_north and strip > 20
    np.testing.assert_array_equal(read(north, "red")[above:], read(south, "red")[:strip])
    assert south.datetime > north.datetime


def test_offset_follows_the_baseline(synthetic):
    lows = {}
    for item in items_of(synthetic.catalog):
        dn = read(item, "blue")
        lows.setdefault(item.properties["s2:processing_baseline"], []).append(np.percentile(dn[dn > 0], 1))
        assert item.assets["blue"].extra_fields["raster:bands"][0]["offset"] == (
            -0.1 if item.properties["s2:processing_baseline"] == "04.00" else 0.0
        )
    assert min(lows["04.00"]) > 1000 > 600 > max(lows["03.01"])


def test_last_date_ends_at_the_edge_of_the_swath(synthetic):
    *whole, south, north = sorted(items_of(synthetic.catalog), key=lambda i: i.datetime.date())
    assert all(read(item, "red").all() for item in whole)
    for item in (south, north):
        seen = read(item, "red") > 0
        assert 0.5 < seen.mean() < 0.95
        assert seen[:, 0].all() and not seen[:, -1].any()
        assert all(after.sum() <= before.sum() for before, after in pairwise(seen))
        east = np.asarray(item.geometry["coordinates"][0])[:, 0].max()
        assert east < synthetic.bbox[2]
        np.testing.assert_array_equal(read(item, "scl") == 0, read(item, "swir16") == 0)


def test_truth_has_every_class_in_both_halves(synthetic):
    with rasterio.open(synthetic.truth) as raster:
        truth = raster.read(1)
        assert raster.colormap(1)[2][:3] == LEGEND[2].rgb
        assert raster.shape == synthetic.geobox.shape == (384, 384)
    for half in np.split(truth, 2, axis=1):
        assert set(np.unique(half)) == set(LEGEND.codes)


def test_classes_look_like_themselves(synthetic):
    """Ratios that hold on any real scene in late June, on clear pixels."""
    june = [i for i in items_of(synthetic.catalog) if synthetic.dates[1].replace("-", "") in i.id]
    by_class = {}
    for item in june:
        truth = truth_under(synthetic, item)
        red, nir, blue = (reflectance(item, b) for b in ("red", "nir", "blue"))
        index = (nir - red) / (nir + red)
        for land_class in LEGEND.classes:
            here = truth == land_class.code
            by_class.setdefault(land_class.name, []).append(
                [np.ma.median(v[here]) for v in (index, nir, blue) if v[here].count()]
            )
    median = {name: np.mean([v for v in values if v], axis=0) for name, values in by_class.items()}
    assert median["water"][1] < 0.08 < 0.15 < median["forest"][1]
    assert median["forest"][0] > 0.7
    assert median["grassland"][0] > 0.5
    assert median["built-up"][0] < 0.5
    assert median["bare"][0] < 0.3
    assert median["bare"][2] > 2 * median["forest"][2]


def test_clouds_are_bright_and_mostly_flagged(synthetic):
    for item in items_of(synthetic.catalog):
        if item.properties["eo:cloud_cover"] < 5:
            continue
        offset = 1000 if item.properties["s2:processing_baseline"] == "04.00" else 0
        red = read(item, "red").astype(float)
        red = np.where(red > 0, (red - offset) / 10_000, 0).reshape(red.shape[0] // 2, 2, -1, 2).mean((1, 3))
        scl = read(item, "scl")
        assert np.median(red[scl == 9]) > 0.4
        assert np.isin(scl[red > 0.45], [8, 9, 10]).mean() > 0.9
        shadow, lit = red[scl == 3], red[np.isin(scl, [4, 5])]
        assert shadow.size and np.median(shadow) < 0.75 * np.median(lit)
        return
    pytest.fail("no cloudy item to look at")


def test_bbox_lies_inside_the_region(synthetic):
    from rasterio.warp import transform_bounds

    left, bottom, right, top = transform_bounds("EPSG:4326", synthetic.crs, *synthetic.bbox, densify_pts=21)
    outer = synthetic.geobox.boundingbox
    # the box leans against the grid: a corner may pass by the meridian's slant over the side, not more
    lean = 0.02 * (outer.right - outer.left)
    assert outer.left - 1 <= left < outer.left + lean and outer.right - lean < right <= outer.right + 1
    assert outer.bottom - 1 <= bottom < outer.bottom + lean and outer.top - lean < top <= outer.top + 1


def test_same_seed_same_pixels(tmp_path):
    def digest(folder, seed):
        region = synthetic_catalog(tmp_path / folder, size=128, dates=("2021-06-15",), seed=seed)
        arrays = [read(i, n) for i in items_of(region.catalog) for n in sorted(i.assets)]
        return hashlib.sha256(b"".join(a.tobytes() for a in arrays)).hexdigest()

    first = digest("a", 1)
    assert digest("b", 1) == first
    assert digest("c", 2) != first


@pytest.mark.parametrize("size", [127, 100, 0])
def test_sizes_that_cannot_be_are_refused(tmp_path, size):
    with pytest.raises(InputError, match=f"size {size} "):
        synthetic_catalog(tmp_path / "x", size=size)
    assert not (tmp_path / "x").exists()


def test_position_scene(tmp_path):
    catalog = position_scene(
        tmp_path,
        crs="EPSG:32634",
        origin=(300000.0, 5100000.0),
        shape=(96, 60),
        bands={"blue": 10, "swir16": 20, "coastal": 60, "scl": 20},
        dates=("2023-07-01", "2023-07-06"),
        baseline="05.09",
        boa_offset_applied=True,
        tile="34TBS",
    )
    first, second = items_of(catalog)
    assert first.properties["earthsearch:boa_offset_applied"] is True
    assert first.properties["proj:code"] == "EPSG:32634"
    np.testing.assert_array_equal(read(first, "blue"), np.arange(96 * 60).reshape(96, 60) + 1)
    assert read(first, "swir16").shape == (48, 30)
    assert read(first, "coastal").shape == (16, 10)
    assert first.assets["coastal"].extra_fields["proj:transform"] == [60, 0, 300000, 0, -60, 5100000]
    assert (read(first, "scl") == 4).all()
    np.testing.assert_array_equal(read(second, "swir16"), position_pixels((48, 30), band=1, date=1))
    assert read(second, "blue")[0, 0] != read(first, "blue")[0, 0]


def test_position_pixels_wrap_without_reaching_nodata():
    pixels = position_pixels((300, 300))
    assert pixels.min() == 1 and pixels.max() == 65535
    assert pixels[0, 0] == 1 and pixels[299, 299] == (300 * 300 - 1) % 65535 + 1
