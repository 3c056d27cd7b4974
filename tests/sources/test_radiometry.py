import json
import warnings
from datetime import UTC, datetime

import numpy as np
import pystac
import pytest
import rasterio
from affine import Affine

from s2seg.errors import ReadError, S2SegWarning
from s2seg.sources.items import normalize_items
from s2seg.sources.radiometry import Offset, decide_offsets, harmonize, offset_by_rule

EARTH_SEARCH, EARTH_SEARCH_V0 = "earthsearch:boa_offset_applied", "sentinel:boa_offset_applied"


def make(href="https://x.test/B04.tif", band="red", declared=None, **properties):
    item = pystac.Item(
        "scene", None, None, datetime(2023, 8, 15, tzinfo=UTC), {"grid:code": "MGRS-33TWL", **properties}
    )
    fields = {} if declared is None else {"raster:bands": [{"scale": 0.0001, "offset": declared}]}
    item.add_asset(band, pystac.Asset(str(href), extra_fields=fields))
    return item


def write(path, dn):
    profile = {"driver": "GTiff", "height": dn.shape[0], "width": dn.shape[1], "count": 1, "dtype": "uint16"}
    with rasterio.open(
        path, "w", crs="EPSG:32633", transform=Affine(10, 0, 5e5, 0, -10, 5.1e6), nodata=0, **profile
    ) as out:
        out.write(dn, 1)
    return path


def scene(low, high, seed=0, shape=(300, 320)):
    return np.random.default_rng(seed).integers(low, high, shape, dtype=np.uint16)


def read_catalog(path):
    return normalize_items(pystac.Catalog.from_file(str(path / "catalog.json")).get_items(recursive=True))


def flagged(item, applied):
    flipped = item.clone()
    flipped.properties[EARTH_SEARCH] = applied
    return flipped


@pytest.mark.parametrize(
    ("properties", "declared", "subtract"),
    [
        ({"s2:processing_baseline": "05.09", EARTH_SEARCH: True}, -0.1, 0),
        ({"s2:processing_baseline": "04.00", EARTH_SEARCH_V0: True}, None, 0),
        ({"s2:processing_baseline": "05.09", EARTH_SEARCH: False}, -0.1, 1000),
        ({"s2:processing_baseline": "04.00", EARTH_SEARCH_V0: False}, None, 1000),
        ({"s2:processing_baseline": "03.01", EARTH_SEARCH: False}, -0.1, 0),
        ({"s2:processing_baseline": "05.00"}, -0.1, 1000),
        ({"s2:processing_baseline": "05.11"}, None, 1000),
        ({"processing:version": "05.10"}, None, 1000),
        ({"s2:processing_baseline": "03.01"}, None, 0),
        ({"s2:processing_baseline": "02.14"}, -0.1, 0),
        ({EARTH_SEARCH: True}, -0.1, 0),
        ({}, -0.1, 1000),
        ({}, 0, 0),
        ({}, None, 0),
    ],
)
def test_the_rule(properties, declared, subtract):
    offset = offset_by_rule(make(declared=declared, **properties))
    assert offset.subtract == subtract
    assert not offset.checked
    assert ("unsure" in offset.reason) == ("processing" not in str(properties) and EARTH_SEARCH not in properties)


@pytest.mark.parametrize(
    ("asset", "subtract"),
    [({"bands": [{"raster:offset": -0.1}]}, 1000), ({"raster:offset": -0.1}, 1000), ({"raster:offset": 0}, 0)],
)
def test_the_declared_offset_of_stac_1_1(asset, subtract):
    item = make()
    item.assets["red"].extra_fields.update(asset)
    assert offset_by_rule(item).subtract == subtract


# What each file must give, from what is written in it. "flag" is earthsearch:boa_offset_applied.
REAL_ITEMS = {
    "mapchete_eo_earthsearch_v1": {
        "S2A_12RWT_20240106_0_L2A": 0,  # 05.10, flag true
        "S2A_32TMS_20221207_0_L2A": 0,  # 05.09, flag true
        "S2A_33TWN_20161202_0_L2A": 0,  # 00.01, flag false: nothing was there to subtract
        "S2A_33TWN_20171005_0_L2A": 0,  # 00.01
        "S2A_33TWN_20181119_0_L2A": 0,  # 02.10
        "S2A_33TWN_20190707_1_L2A": 0,  # 02.12
        "S2A_33TWN_20200202_0_L2A": 0,  # 02.13
        "S2A_33TWN_20210328_0_L2A": 0,  # 02.14
        "S2A_33TWN_20210629_0_L2A": 0,  # 03.00
        "S2A_33TWN_20220122_0_L2A": 0,  # 03.01, three days before 04.00 came into force
        "S2A_OPER_MSI_L2A_TL_2APS_20230602T025701_A041483_T01WCR": 1000,  # 05.09, no flag
        "S2B_33TWN_20180521_1_L2A": 0,  # 02.07
        "S2B_33TWN_20180806_0_L2A": 0,  # 00.01
        "S2B_33TWN_20181005_0_L2A": 0,  # 02.08
        "S2B_33TWN_20181104_0_L2A": 0,  # 02.09
        "S2B_33TWN_20190503_0_L2A": 0,  # 02.11
        "S2B_33TWN_20220130_0_L2A": 0,  # 04.00, flag true
        "S2B_33TWN_20220226_0_L2A": 1000,  # 04.00, flag false: the kind that the pixels must decide
    },
    "opendatacube+odc-stac": {
        "S2A_28QCH_20200714_0_L2A": 0,  # Earth Search v0; N0214 in sentinel:product_id
        "S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531": 0,  # Planetary Computer; 02.12, processed in 2020
        "S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531_raster_ext": 0,
    },
    "stactools-sentinel2": {
        "S2A_MSIL1C_20200717T221941_R029_T01LAC_20200717T234135.SAFE__expected_output": 0,  # 02.09
        "S2A_MSIL1C_20210908T042701_N0301_R133_T46RER_20210908T070248.SAFE__expected_output": 0,
        "S2A_MSIL2A_20190212T192651_N0212_R013_T07HFE_20201007T160857.SAFE__expected_output": 0,
        "S2A_MSIL2A_20230625T234621_N0509_R073_T01WCP_20230626T022157.SAFE__expected_output": 1000,
        "S2A_MSIL2A_20230625T234621_N0509_R073_T01WCP_20230626T022158.SAFE__expected_output": 1000,
        "S2A_MSIL2A_20230625T234621_N0509_R073_T01WCS_20230626T022157.SAFE__expected_output": 1000,
        "S2A_MSIL2A_20230821T221941_N0509_R029_T01KAB_20230822T021825.SAFE__expected_output": 1000,
        "S2A_OPER_MSI_L1C_TL_SGS__20181231T203637_A018414_T10SDG__expected_output": 0,  # 02.07
        "S2A_OPER_MSI_L2A_TL_2APS_20240108T121951_A044635_T34VEL__expected_output": 1000,  # 05.10
        "S2A_OPER_MSI_L2A_TL_SGS__20181231T210250_A018414_T10SDG__expected_output": 0,  # 02.11
        "S2A_OPER_MSI_L2A_TL_VGS1_20220401T110010_A035382_T34LBP__expected_output": 1000,  # 04.00
        "S2A_OPER_MSI_L2A_TL_VGS1_20220401T110010_A035382_T34LBQ__expected_output": 1000,  # 04.00
        "S2A_T60CWS_20240109T203651_L2A__expected_output": 1000,  # 05.10
        "S2B_MSIL2A_20191228T210519_N0212_R071_T01CCV_20201003T104658.SAFE__expected_output": 0,
        "S2B_MSIL2A_20200914T231559_N0500_R087_T01VCG_20230315T224658__expected_output": 1000,  # of 2020, but 05.00
        "S2B_MSIL2A_20220413T150759_N0400_R025_T33XWJ_20220414T082126.SAFE__expected_output": 1000,
        "esa_S2B_MSIL2A_20210122T133229_N0214_R081_T22HBD_20210122T155500.SAFE__expected_output": 0,
        "examples__sentinel2-l1c-example__S2A_T01LAC_20200717T221944_L1C__S2A_T01LAC_20200717T221944_L1C": 0,  # 02.09
        "examples__sentinel2-l2a-example__S2A_T07HFE_20190212T192646_L2A__S2A_T07HFE_20190212T192646_L2A": 0,  # 02.12
    },
}


@pytest.mark.real_data
def test_the_rule_on_every_real_item(real_data):
    found = {}
    for path in sorted((real_data / "stac_items").glob("*/*.json")):
        document = json.loads(path.read_text())
        if document["type"] == "Feature":
            (item,) = normalize_items([pystac.Item.from_dict(document)])
            found.setdefault(path.parent.name, {})[path.stem] = offset_by_rule(item).subtract
    assert found == REAL_ITEMS


@pytest.mark.real_data
def test_the_rule_on_planetary_computer(real_data):
    rustac = pytest.importorskip("rustac")
    path = real_data / "stac_items" / "stac-utils+rustac-py" / "100-sentinel-2-items.parquet"
    items = normalize_items(pystac.Item.from_dict(d) for d in rustac.read_sync(str(path))["features"])
    # all of 2024: baselines 05.10 and 05.11, and this catalog passes on what ESA delivers
    assert [offset_by_rule(item).subtract for item in items] == [1000] * 100


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("catalog", "items", "subtract"),
    [
        ("slovenia", 10, 0),  # 05.09, flag true, although raster:bands declares -0.1
        ("mekong", 1, 0),  # 02.14
        ("congo", 1, 1000),  # 04.00, no flag
        ("alberta", 1, 0),  # 02.14
        ("labelled", 3, 0),  # 03.00
        ("flanders", 118, 0),  # 02.07
    ],
)
def test_real_catalogs_with_the_pixels_asked(real_data, catalog, items, subtract):
    offsets = decide_offsets(read_catalog(real_data / catalog))
    assert [offset.subtract for offset in offsets.values()] == [subtract] * items
    assert all(offset.checked == (catalog == "slovenia") for offset in offsets.values())


@pytest.mark.real_data
def test_slovenia_with_its_flags_flipped(real_data):
    items = [flagged(item, False) for item in read_catalog(real_data / "slovenia")]
    assert [offset_by_rule(item).subtract for item in items] == [1000] * 10
    with pytest.warns(S2SegWarning) as caught:
        offsets = decide_offsets(items)
    assert {item_id: offset.subtract for item_id, offset in offsets.items()} == {item.id: 0 for item in items}
    assert all(offset.checked and "overruled by the pixels" in offset.reason for offset in offsets.values())
    assert len(caught) == 10
    assert all(item.id in str(warning.message) for item, warning in zip(items, caught, strict=True))


@pytest.mark.real_data
def test_congo_with_its_flag_both_ways(real_data):
    (item,) = read_catalog(real_data / "congo")
    confirmed = decide_offsets([flagged(item, False)])[item.id]
    assert (confirmed.subtract, confirmed.checked) == (1000, True)
    assert "confirmed" in confirmed.reason
    with pytest.warns(S2SegWarning, match=item.id):
        overruled = decide_offsets([flagged(item, True)])[item.id]
    assert (overruled.subtract, overruled.checked) == (1000, True)
    assert decide_offsets([flagged(item, True)], check=False)[item.id].subtract == 0


PLAIN, ADDED = (50, 3000), (1050, 4000)


@pytest.mark.parametrize(
    ("dn", "clouds", "applied", "subtract", "checked"),
    [
        (PLAIN, 0, True, 0, True),
        (PLAIN, 0, False, 0, True),
        (PLAIN, 80, False, 0, True),
        (PLAIN, None, False, 0, True),
        (ADDED, 0, False, 1000, True),
        (ADDED, 0, True, 1000, True),
        (ADDED, 80, True, 0, False),  # could be cloud as well
        (ADDED, None, True, 0, False),
        ((4000, 9000), 0, True, 0, False),  # desert, snow or cloud: the rule stands either way
        ((4000, 9000), 0, False, 1000, False),
        ((940, 980), 0, False, 1000, False),
    ],
)
def test_what_pixels_can_tell(tmp_path, dn, clouds, applied, subtract, checked):
    properties = {"s2:processing_baseline": "05.09", EARTH_SEARCH: applied}
    if clouds is not None:
        properties["eo:cloud_cover"] = clouds
    item = make(write(tmp_path / "B04.tif", scene(*dn)), **properties)
    contradicted = subtract != offset_by_rule(item).subtract
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        offset = decide_offsets([item])["scene"]
    assert (offset.subtract, offset.checked) == (subtract, checked)
    assert [w.category for w in caught] == [S2SegWarning] * contradicted
    assert ("cannot tell" in offset.reason) == (not checked)


def test_nodata_is_not_evidence(tmp_path):
    dn = scene(4000, 9000)
    dn[:150] = 0
    item = make(write(tmp_path / "B04.tif", dn), **{"s2:processing_baseline": "05.09", EARTH_SEARCH: False})
    assert "cannot tell" in decide_offsets([item])["scene"].reason
    item = make(
        write(tmp_path / "empty.tif", np.zeros_like(dn)), **{EARTH_SEARCH: False, "s2:processing_baseline": "05.09"}
    )
    assert decide_offsets([item])["scene"].subtract == 1000


def test_an_unknown_baseline_is_looked_into(tmp_path):
    path = write(tmp_path / "B03.tif", scene(*ADDED))
    item = make(path, band="green", **{"eo:cloud_cover": 3.0})
    assert offset_by_rule(item).subtract == 0
    with pytest.warns(S2SegWarning, match="in green"):
        assert decide_offsets([item])["scene"].subtract == 1000


def test_a_file_that_is_replaced_is_looked_at_again(tmp_path):
    for low_and_high, subtract in ((ADDED, 1000), (PLAIN, 0)):
        item = make(write(tmp_path / "B04.tif", scene(*low_and_high)), **{"eo:cloud_cover": 3.0})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", S2SegWarning)
            assert decide_offsets([item])["scene"].subtract == subtract


def test_sure_items_and_unchecked_ones_are_not_read(tmp_path):
    missing = tmp_path / "none.tif"
    sure = make(missing, **{"s2:processing_baseline": "02.14", EARTH_SEARCH: False})
    assert decide_offsets([sure]) == {"scene": offset_by_rule(sure)}
    doubtful = make(missing, **{"s2:processing_baseline": "05.09", EARTH_SEARCH: True})
    assert decide_offsets([doubtful], check=False)["scene"].subtract == 0


def test_a_look_that_fails_names_item_band_and_href(tmp_path):
    doubtful = make(tmp_path / "none.tif", **{"s2:processing_baseline": "05.09", EARTH_SEARCH: True})
    with pytest.raises(ReadError) as caught:
        decide_offsets([doubtful])
    assert (caught.value.item_id, caught.value.band, caught.value.href) == ("scene", "red", str(tmp_path / "none.tif"))
    (tmp_path / "text.tif").write_text("no raster")
    with pytest.raises(ReadError, match=r"text\.tif"):
        decide_offsets([make(tmp_path / "text.tif", **{EARTH_SEARCH: True, "s2:processing_baseline": "05.09"})])


def test_an_item_without_a_visible_band_keeps_its_rule(tmp_path):
    item = make(tmp_path / "none.tif", band="nir", **{"s2:processing_baseline": "05.09", EARTH_SEARCH: True})
    assert decide_offsets([item])["scene"] == Offset(0, f"{offset_by_rule(item).reason}; the pixels cannot tell")


def test_harmonize():
    dn = np.array([0, 1, 999, 1000, 1001, 1002, 65535], "uint16")
    expected = np.array([0, 1, 1, 1, 1, 2, 64535], "uint16")
    before = dn.copy()
    found = harmonize(dn, 1000)
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(dn, before)
    assert harmonize(dn, 0) is dn
    np.testing.assert_array_equal(harmonize(dn[::2].reshape(2, 2), 1000), expected[::2].reshape(2, 2))


def test_harmonize_against_plain_arithmetic_on_every_value():
    dn = np.arange(65536, dtype="uint16")
    wide = dn.astype("int64")
    np.testing.assert_array_equal(harmonize(dn, 1000), np.where(wide == 0, 0, np.maximum(wide - 1000, 1)))


def test_harmonize_wants_digital_numbers():
    with pytest.raises(TypeError, match="uint16, not float32"):
        harmonize(np.ones(3, "float32"), 1000)
