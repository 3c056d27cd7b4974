import copy
import json
import pickle
from datetime import UTC, datetime

import pystac
import pytest
from shapely.geometry import box, mapping

from s2seg.errors import InputError, S2SegWarning
from s2seg.sources.items import BANDS, baseline, cloud_cover, epsg, normalize_items, sensing_time, sign_path, tile

COG = "image/tiff; application=geotiff; profile=cloud-optimized"
GRID_33TWL = [10, 0, 499980, 0, -10, 5100000]
NATIVE_SHAPE = {10: [10980, 10980], 20: [5490, 5490], 60: [1830, 1830]}


def make(
    assets, item_id="S2A_33TWL_20230815_0_L2A", time=datetime(2023, 8, 15, 10, tzinfo=UTC), area=None, **properties
):
    area = area or box(15, 45, 16, 46)
    item = pystac.Item(item_id, mapping(area), list(area.bounds), time, {"platform": "sentinel-2a", **properties})
    for key, fields in assets.items():
        fields = dict(fields)
        href = fields.pop("href", f"https://x.test/{key}.tif")
        item.add_asset(
            key,
            pystac.Asset(
                href, media_type=fields.pop("type", COG), roles=fields.pop("roles", None), extra_fields=fields
            ),
        )
    return item


def normal(assets, **kwargs):
    (item,) = normalize_items([make(assets, **kwargs)])
    return item


def hrefs(item):
    return {band: asset.href.rsplit("/", 1)[-1] for band, asset in item.assets.items()}


def test_esa_keys():
    keys = [
        "B01",
        "B02",
        "B03",
        "B04",
        "B05",
        "B06",
        "B07",
        "B08",
        "B8A",
        "B09",
        "B10",
        "B11",
        "B12",
        "SCL",
        "AOT",
        "WVP",
    ]
    assert hrefs(normal({key: {} for key in keys})) == {
        "coastal": "B01.tif",
        "blue": "B02.tif",
        "green": "B03.tif",
        "red": "B04.tif",
        "rededge1": "B05.tif",
        "rededge2": "B06.tif",
        "rededge3": "B07.tif",
        "nir": "B08.tif",
        "nir08": "B8A.tif",
        "nir09": "B09.tif",
        "cirrus": "B10.tif",
        "swir16": "B11.tif",
        "swir22": "B12.tif",
        "scl": "SCL.tif",
    }


def test_the_variant_at_native_resolution_is_taken_whatever_the_order():
    keys = [
        "B02_60m",
        "B02_20m",
        "B02_10m",
        "B01_20m",
        "B01_60m",
        "B8A_60m",
        "B8A_20m",
        "SCL_60m",
        "SCL_20m",
        "TCI_10m",
    ]
    expected = {"coastal": "B01_60m.tif", "blue": "B02_10m.tif", "nir08": "B8A_20m.tif", "scl": "SCL_20m.tif"}
    assert hrefs(normal({key: {} for key in keys})) == expected
    assert hrefs(normal({key: {} for key in reversed(keys)})) == expected


def test_suffixed_and_jp2_twins_do_not_displace_the_main_asset():
    assets = {
        "blue-jp2": {"type": "image/jp2", "href": "https://x.test/B02.jp2", "gsd": 10},
        "blue_20m": {"proj:transform": [20, 0, 0, 0, -20, 0]},
        "blue": {"gsd": 10},
        "red-jp2": {"type": "image/jp2", "href": "https://x.test/B04.jp2"},
    }
    assert hrefs(normal(assets)) == {"blue": "blue.tif", "red": "B04.jp2"}
    assert hrefs(normal({"B04": {"type": "image/jp2", "href": "https://x.test/B04.jp2"}, "red": {}})) == {
        "red": "red.tif"
    }


def test_band_metadata_of_stac_1_0_and_1_1():
    assets = {
        "a": {"eo:bands": [{"name": "B8A", "common_name": "rededge"}]},
        "b": {"eo:bands": [{"name": "band 3", "common_name": "green"}]},
        "c": {"bands": [{"name": "x", "eo:common_name": "rededge071"}]},
        "d": {"bands": [{"name": "x", "eo:common_name": "rededge075"}]},
        "e": {"bands": [{"eo:common_name": "rededge078"}]},
        "f": {"bands": [{"name": "B12"}]},
        "g": {"eo:bands": [{"name": "x", "common_name": "rededge", "center_wavelength": 0.865}]},
    }
    found = hrefs(normal(assets))
    assert found.pop("nir08") in ("a.tif", "g.tif")
    assert found == {"green": "b.tif", "rededge1": "c.tif", "rededge2": "d.tif", "rededge3": "e.tif", "swir22": "f.tif"}


def test_rededge_without_a_wavelength_is_no_band():
    assert hrefs(normal({"a": {"eo:bands": [{"common_name": "rededge"}]}, "red": {}})) == {"red": "red.tif"}


def test_pictures_and_metadata_are_dropped():
    rgb = {"eo:bands": [{"name": n} for n in ("B04", "B03", "B02")]}
    assets = {
        "visual": rgb,
        "TCI": {"bands": [{"name": "B04"}, {"name": "B03"}]},
        "red": {"type": "application/xml"},
        "green": {"roles": ["overview"]},
        "blue": {"type": "image/jpeg", "roles": ["thumbnail"]},
        "nir": {},
    }
    assert list(normal(assets).assets) == ["nir"]


def test_no_band_at_all():
    with pytest.raises(InputError, match=r"S2A_33TWL_20230815_0_L2A has no Sentinel-2 band \(vv, vh\)"):
        normal({"vv": {}, "vh": {}})
    with pytest.warns(S2SegWarning, match="1 of 2 items have no Sentinel-2 band.*radar"):
        kept = normalize_items([make({"vv": {}}, item_id="radar"), make({"red": {}})])
    assert [item.id for item in kept] == ["S2A_33TWL_20230815_0_L2A"]


def test_normalising_twice_changes_nothing_and_the_input_is_left_alone():
    item = make(
        {"B02_10m": {"gsd": 10, "proj:bbox": [0, 0, 100, 200]}}, area=box(10, -1, 11, 1), **{"proj:epsg": 32633}
    )
    before = copy.deepcopy(item.to_dict())
    once = normalize_items([item])
    assert item.to_dict() == before
    assert [i.to_dict() for i in normalize_items(once)] == [i.to_dict() for i in once]
    assert pickle.loads(pickle.dumps(once[0])).assets["blue"].href == "https://x.test/B02_10m.tif"


@pytest.mark.parametrize(
    ("properties", "item_id", "expected"),
    [
        ({"proj:epsg": 32633}, "x", 32633),
        ({"proj:code": "EPSG:32733"}, "x", 32733),
        ({"grid:code": "MGRS-33TWL"}, "x", 32633),
        ({"grid:code": "MGRS-1WCR"}, "x", 32601),
        ({"s2:mgrs_tile": "01LAC"}, "x", 32701),
        ({"mgrs:utm_zone": 1, "mgrs:latitude_band": "C", "mgrs:grid_square": "CV"}, "x", 32701),
        ({"sentinel:utm_zone": 48, "sentinel:latitude_band": "Q", "sentinel:grid_square": "UE"}, "x", 32648),
        ({}, "S2A_33TWL_20230815_0_L2A", 32633),
        ({}, "S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531", 32606),
        ({"s2:product_uri": "S2A_MSIL2A_20230815T095031_N0509_R079_T33TWL_20230815T155057.SAFE"}, "x", 32633),
    ],
)
def test_projection(properties, item_id, expected):
    item = normal({"red": {}}, item_id=item_id, **properties)
    assert item.properties["proj:epsg"] == expected
    assert item.properties["proj:code"] == f"EPSG:{expected}"
    assert epsg(item) == expected


def test_projection_from_an_asset_and_none_at_all():
    assert epsg(normal({"red": {"proj:code": "EPSG:32631"}}, item_id="x")) == 32631
    with pytest.raises(InputError, match="item x cannot be used: it states neither a projection"):
        normal({"red": {}}, item_id="x")


def test_tile_is_written_as_grid_code():
    assert normal({"red": {}}, **{"grid:code": "MGRS-1WCR"}).properties["grid:code"] == "MGRS-01WCR"
    assert tile(make({}, item_id="no tile")) is None


@pytest.mark.parametrize(
    ("asset", "properties", "transform", "shape"),
    [
        ({"proj:transform": [10, 0, 5, 0, -10, 7, 0, 0, 1], "proj:shape": [3, 4]}, {}, [10, 0, 5, 0, -10, 7], [3, 4]),
        ({"proj:bbox": [100, 200, 140, 230], "proj:shape": [3, 4]}, {}, [10, 0, 100, 0, -10, 230], [3, 4]),
        ({"proj:bbox": [100, 200, 140, 230], "gsd": 10}, {}, [10, 0, 100, 0, -10, 230], [3, 4]),
        ({"gsd": 10}, {"proj:bbox": [100, 200, 140, 230]}, [10, 0, 100, 0, -10, 230], [3, 4]),
        ({}, {"proj:transform": [10, 0, 5, 0, -10, 7], "proj:shape": [3, 4]}, [10, 0, 5, 0, -10, 7], [3, 4]),
        ({"gsd": 20}, {"proj:transform": [10, 0, 5, 0, -10, 7], "proj:shape": [3, 4]}, None, None),
        ({}, {}, None, None),
    ],
)
def test_grid_of_an_asset(asset, properties, transform, shape):
    fields = normal({"red": asset}, area=box(10, -1, 11, 1), **properties).assets["red"].extra_fields
    assert fields.get("proj:transform") == transform
    assert fields.get("proj:shape") == shape


@pytest.mark.parametrize(
    ("asset", "properties", "says"),
    [
        ({"proj:transform": "abc"}, {}, r"proj:transform \(asset 'red'\) is \"abc\", not 6 or 9 numbers"),
        ({"proj:transform": [10, 0]}, {}, "not 6 or 9 numbers"),
        ({"proj:transform": [0] * 6}, {}, "with pixels of some size"),
        ({"proj:shape": "ab"}, {}, "not two whole numbers"),
        ({"proj:shape": [0, 5]}, {}, "not two whole numbers"),
        ({"proj:bbox": [1, 2]}, {}, "proj:bbox .* not 4 numbers"),
        ({"eo:bands": ["blue"]}, {}, "not a list of objects"),
        ({"bands": [{"center_wavelength": "abc"}]}, {}, "center_wavelength .* not a number"),
        ({"raster:bands": [{"offset": []}]}, {}, "offset .* not a number"),
        ({"roles": "data"}, {}, "roles are not text"),
        ({}, {"eo:cloud_cover": [1]}, r"eo:cloud_cover is \[1\], not a number"),
        ({}, {"s2:sequence": "abc"}, "s2:sequence is .* not a whole number"),
        ({}, {"proj:code": "EPSG:99999"}, "EPSG:99999 is unknown"),
        # a transform of zone 33, under the code of zone 34 and of the south
        ({"proj:transform": GRID_33TWL, "proj:shape": [10980, 10980]}, {"proj:code": "EPSG:32634"}, "lies elsewhere"),
        ({"proj:transform": GRID_33TWL, "proj:shape": [10980, 10980]}, {"proj:code": "EPSG:32733"}, "lies elsewhere"),
        # 20 km to the south of the footprint
        (
            {"proj:transform": [10, 0, 499980, 0, -10, 5080000], "proj:shape": [10980, 10980]},
            {"area": box(15.1, 45.2, 16.3, 46)},
            "lies elsewhere",
        ),
        ({"proj:transform": [10, 0, 1e300, 0, -10, 1e300], "proj:shape": [9, 9]}, {}, "nowhere on earth"),
    ],
)
def test_a_broken_item_is_named_and_left_out_among_others(asset, properties, says):
    broken, sound = make({"red": asset}, item_id="b_33TWL_x", **properties), make({"red": {}}, item_id="a_33TWL_x")
    with pytest.raises(InputError, match=f"^item b_33TWL_x cannot be used: its .*{says}") as caught:
        normalize_items([broken])
    assert "\n" not in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    with pytest.warns(S2SegWarning, match=f"item b_33TWL_x is left out: its .*{says}"):
        assert [item.id for item in normalize_items([broken, sound])] == ["a_33TWL_x"]


def test_numbers_may_be_text_and_all_may_be_missing():
    grid = {"proj:transform": list(map(str, GRID_33TWL)), "proj:shape": ["10980", 10980.0], "gsd": None}
    fields = {"eo:cloud_cover": "12.5", "s2:sequence": "0", "proj:bbox": None}
    (item,) = normalize_items([make({"red": grid}, **fields)])
    assert item.assets["red"].extra_fields["proj:transform"] == GRID_33TWL
    assert cloud_cover(item) == 12.5


def test_only_a_few_broken_items_are_named():
    broken = [make({"red": {}}, item_id=f"b{i}", **{"eo:cloud_cover": "n/a"}) for i in range(9)]
    with pytest.warns(S2SegWarning) as caught:
        normalize_items([*broken, make({"red": {}})])
    assert len(caught) == 4
    assert str(caught[3].message) == "6 more broken items are left out"


def test_relative_links_become_absolute(tmp_path):
    item = make({"red": {"href": "./B04.tif"}})
    item.set_self_href(str(tmp_path / "a" / "item.json"))
    (found,) = normalize_items([item])
    assert found.assets["red"].href == str(tmp_path / "a" / "B04.tif")
    assert found.get_self_href() == str(tmp_path / "a" / "item.json")


def version(item_id, second=0, microsecond=0, area=None, **properties):
    time = datetime(2023, 8, 15, 10, 0, second, microsecond, tzinfo=UTC)
    return make({"red": {}}, item_id, time, area, **{"grid:code": "MGRS-33TWL", **properties})


def kept(*items):
    ids = [item.id for item in normalize_items(items)]
    assert ids == [item.id for item in normalize_items(items[::-1])]
    return ids


def test_newest_baseline_wins_over_newer_stamps():
    old = version("old", **{"s2:processing_baseline": "02.14", "s2:generation_time": "2024-01-01T00:00:00Z"})
    new = version(
        "new", microsecond=400, **{"s2:processing_baseline": "05.00", "s2:generation_time": "2023-01-01T00:00:00Z"}
    )
    assert kept(old, new) == ["new"]


def test_then_generation_time_then_sequence():
    stamps = [version(f"v{day}", **{"s2:generation_time": f"2023-08-{day}T00:00:00.5Z"}) for day in (15, 17, 16)]
    assert kept(*stamps) == ["v17"]
    assert kept(*(version(f"v{n}", **{"s2:sequence": str(n)}) for n in (0, 2, 10))) == ["v10"]


def test_platform_names_compare_without_case():
    assert len(kept(version("a", platform="Sentinel-2A"), version("b", platform="sentinel-2a"))) == 1


def test_other_tiles_times_and_platforms_are_not_duplicates():
    others = [
        version("a"),
        version("b", second=1),
        version("c", platform="sentinel-2b"),
        version("d", **{"grid:code": "MGRS-33TWM"}),
    ]
    assert kept(*others) == ["a", "c", "d", "b"]


def test_two_halves_of_a_tile_from_two_ground_stations_are_both_kept():
    north, south = version("north", area=box(15, 45.5, 16, 46)), version("south", area=box(15, 45, 16, 45.55))
    assert kept(north, south) == ["north", "south"]


@pytest.mark.parametrize(
    ("properties", "item_id", "expected"),
    [
        ({"s2:processing_baseline": "05.09"}, "x", (5, 9)),
        ({"sentinel2:processing_baseline": "05.10"}, "x", (5, 10)),
        ({"sentinel:processing_baseline": "02.08"}, "x", (2, 8)),
        ({"processing:version": "05.11"}, "x", (5, 11)),
        ({"processing:version": "1.2.3-beta"}, "x", None),
        ({"s2:product_uri": "S2A_MSIL2A_20230815T095031_N0509_R079_T33TWL_20230815T155057.SAFE"}, "x", (5, 9)),
        ({"sentinel:product_id": "S2A_MSIL2A_20200714T115221_N0214_R123_T28QCH_20200714T191310"}, "x", (2, 14)),
        ({"s2:granule_id": "S2A_OPER_MSI_L2A_TL_2APS_20230815T155057_A042547_T33TWL_N05.09"}, "x", (5, 9)),
        ({}, "S2A_MSIL2A_20230815T095031_N0400_R079_T33TWL_20230815T155057", (4, 0)),
        ({}, "S2A_33TWL_20230815_0_L2A", None),
    ],
)
def test_baseline(properties, item_id, expected):
    assert baseline(make({}, item_id, **properties)) == expected


def test_the_host_decides_who_signs_and_never_the_item():
    assert sign_path(make({"red": {}})) is None
    assert sign_path(make({"red": {}}, **{"s2seg:sign": "os.system"})) is None
    azure = make({"red": {"href": "https://sentinel2l2a01.blob.core.windows.net/sentinel2-l2/B04.tif"}})
    assert sign_path(azure) == "planetary_computer.sign_url"


def test_cloud_cover_and_time():
    assert cloud_cover(make({}, **{"eo:cloud_cover": 12})) == 12.0
    assert cloud_cover(make({})) is None
    naive = make({}, time=datetime(2023, 8, 15, 10))
    assert sensing_time(naive) == datetime(2023, 8, 15, 10, tzinfo=UTC)


@pytest.mark.real_data
def test_every_real_item(real_data):
    paths = [
        p for p in sorted((real_data / "stac_items").glob("*/*.json")) if json.loads(p.read_text())["type"] == "Feature"
    ]
    assert len(paths) == 40
    for path in paths:
        (item,) = normalize_items([pystac.Item.from_dict(json.loads(path.read_text()))])
        level_1c = "L1C" in path.name
        assert list(item.assets) == [b for b in BANDS if b != ("scl" if level_1c else "cirrus")], path.name
        assert tile(item) in path.name or f"T{tile(item)}" in item.id, path.name
        for band, asset in item.assets.items():
            assert asset.extra_fields["proj:shape"] == NATIVE_SHAPE[BANDS[band][1]], (path.name, band)
            assert asset.extra_fields["proj:transform"][0] == BANDS[band][1], (path.name, band)
            # Earth Search keeps a JPEG 2000 twin of each GeoTIFF
            assert not asset.href.endswith(".jp2") or "earthsearch" not in str(path) or "OPER" in path.name
        assert baseline(item) is not None
        assert epsg(item) // 100 in (326, 327)


@pytest.mark.real_data
def test_planetary_computer_items(real_data):
    rustac = pytest.importorskip("rustac")
    path = real_data / "stac_items" / "stac-utils+rustac-py" / "100-sentinel-2-items.parquet"
    items = normalize_items(pystac.Item.from_dict(d) for d in rustac.read_sync(str(path))["features"])
    # the 100 hold no two versions of one scene: 100 distinct sensing times of one tile
    assert len(items) == 100
    for item in items:
        assert (tile(item), epsg(item)) == ("13TDE", 32613)
        assert hrefs(item)["nir08"].endswith("_B8A_20m.tif")
        assert hrefs(item)["rededge1"].endswith("_B05_20m.tif")
        assert len(item.assets) == 13
    assert [i.datetime for i in items] == sorted(i.datetime for i in items)
