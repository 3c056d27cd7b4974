import datetime as dt
import json
import re
from pathlib import Path

import numpy as np
import pystac
import pytest
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from pystac.extensions.classification import ClassificationExtension
from pystac.extensions.projection import ProjectionExtension
from pystac.validation.stac_validator import JsonSchemaSTACValidator
from shapely.geometry import Point, shape

from s2seg.errors import OutputError
from s2seg.legend import Legend
from s2seg.outputs.stac import MapFacts, write_item
from tests.outputs.conftest import grid

DAY = dt.datetime(2023, 8, 6, 10, 7, 49, 24000, tzinfo=dt.UTC)


def source(item_id, href=None):
    return pystac.Item(item_id, {"type": "Point", "coordinates": [15, 46]}, [15, 46, 15, 46], DAY, {}, href=href)


def write(folder, assets=None, overwrite=False, **changes):
    facts = {
        "geobox": grid(300, 400),
        "legend": Legend.load("worldcover"),
        "datetime": DAY,
        "source_items": [source("S2A_1", "https://stac.example/S2A_1.json"), source("S2B_2")],
        "model": {"name": "unet", "sha256": "ab" * 32},
        "item_id": "map-2023",
        "created": dt.datetime(2024, 1, 2, 3, 4, 5, tzinfo=dt.UTC),
        "version": "0.1.0",
    }
    files = {
        "land_cover": folder / "land_cover.tif",
        "zarr": folder / "land_cover.zarr",
        "confidence": folder / "extra" / "confidence.tif",
        "quicklook": folder / "quicklook.png",
        "run": folder / "run.json",
    }
    return write_item(folder / "item.json", MapFacts(**(facts | changes)), assets or files, overwrite=overwrite)


def validate(values):
    """Core schema, from the package itself; the extensions' schemas are on the web only, so their rules are below."""
    JsonSchemaSTACValidator().validate_core(values, pystac.STACObjectType.ITEM, values["stac_version"])


def check_extensions(values):
    """The rules of projection 2.0, raster 2.0, classification 2.0 and processing 1.2 for the fields in use."""
    for name in ("projection/v2.0.0", "raster/v2.0.0", "classification/v2.0.0", "processing/v1.2.0"):
        assert f"https://stac-extensions.github.io/{name}/schema.json" in values["stac_extensions"]
    properties = values["properties"]
    code = properties["proj:code"]
    assert re.fullmatch(r"EPSG:\d+", code) if code else "proj:wkt2" in properties
    assert "proj:epsg" not in properties  # gone in 2.0
    assert all(isinstance(n, int) for n in properties["proj:shape"])
    assert [len(properties[f"proj:{k}"]) for k in ("shape", "transform", "bbox")] == [2, 6, 4]
    assert all(isinstance(n, float | int) for k in ("transform", "bbox") for n in properties[f"proj:{k}"])
    for asset in values["assets"].values():
        assert "raster:bands" not in asset  # gone in 2.0: fields stand on bands or assets
        if "classification:classes" in asset:
            classes = asset["classification:classes"]
            assert len({c["value"] for c in classes}) == len({c["name"] for c in classes}) == len(classes) > 0
            for c in classes:
                assert isinstance(c["value"], int)
                assert re.fullmatch(r"[0-9A-Za-z\-_]+", c["name"])
                assert re.fullmatch(r"[0-9A-F]{6}", c.get("color_hint", "000000"))
        if "raster:sampling" in asset:
            assert asset["raster:sampling"] in ("area", "point")
            assert asset["raster:spatial_resolution"] > 0
            assert asset["data_type"] == "uint8"
            assert isinstance(asset["nodata"], int)
    assert isinstance(properties["processing:level"], str)
    assert isinstance(properties["processing:lineage"], str)
    assert all(isinstance(v, str) for v in properties["processing:software"].values())


def test_a_map_of_one_date(tmp_path):
    item = write(tmp_path)
    values = json.loads((tmp_path / "item.json").read_text())
    validate(values)
    check_extensions(values)
    assert (values["id"], values["stac_version"]) == ("map-2023", "1.1.0")
    properties = values["properties"]
    assert properties["datetime"] == "2023-08-06T10:07:49.024000Z"
    assert properties["created"] == "2024-01-02T03:04:05Z"
    assert properties["proj:code"] == "EPSG:32633"
    assert properties["proj:shape"] == [300, 400]
    assert properties["proj:transform"] == [10, 0, 500_000, 0, -10, 5_100_000]
    assert properties["proj:bbox"] == [500_000, 5_097_000, 504_000, 5_100_000]
    assert properties["gsd"] == 10
    assert properties["processing:software"] == {"s2seg": "0.1.0"}
    assert properties["s2seg:model"] == {"name": "unet", "sha256": "ab" * 32}
    assert properties["s2seg:source_items"] == ["S2A_1", "S2B_2"]
    assert [(k["rel"], k["href"], k["title"]) for k in values["links"]] == [
        ("derived_from", "https://stac.example/S2A_1.json", "S2A_1")
    ]
    assert str(tmp_path) not in json.dumps(values), "the folder could not be moved"
    assert item.get_self_href() == str(tmp_path / "item.json")


def test_assets_say_what_they_hold(tmp_path):
    files = {
        "land_cover": tmp_path / "a/land_cover.tif",
        "zarr": "s3://maps/a.zarr",
        "confidence": tmp_path / "c.tif",
        "quicklook": tmp_path.parent / "q.png",
        "style": tmp_path / "land_cover.qml",
    }
    write(tmp_path, assets=files)
    assets = json.loads((tmp_path / "item.json").read_text())["assets"]
    assert {k: a["href"] for k, a in assets.items()} == {
        "land_cover": "./a/land_cover.tif",
        "zarr": "s3://maps/a.zarr",
        "confidence": "./c.tif",
        "quicklook": "./../q.png",
        "style": "./land_cover.qml",
    }
    cover = assets["land_cover"]
    assert cover["type"] == "image/tiff; application=geotiff; profile=cloud-optimized"
    assert (cover["roles"], cover["bands"], cover["nodata"]) == (["data"], [{"name": "land_cover"}], 0)
    assert cover["raster:spatial_resolution"] == 10
    classes = {c["value"]: c for c in cover["classification:classes"]}
    assert classes[60] == {
        "value": 60,
        "name": "bare_sparse_vegetation",
        "title": "bare / sparse vegetation",
        "color_hint": "B4B4B4",
    }
    assert classes[0]["nodata"] is True
    assert len(classes) == 12
    assert assets["zarr"]["type"] == "application/vnd.zarr; version=3"
    assert assets["zarr"]["classification:classes"] == cover["classification:classes"]
    assert assets["confidence"]["nodata"] == 255
    assert "classification:classes" not in assets["confidence"]
    assert (assets["quicklook"]["type"], assets["quicklook"]["roles"]) == ("image/png", ["overview"])


def test_a_composite_holds_for_a_range(tmp_path):
    write(tmp_path, datetime=(DAY, DAY + dt.timedelta(days=20)))
    values = json.loads((tmp_path / "item.json").read_text())
    validate(values)
    assert values["properties"]["datetime"] is None
    assert values["properties"]["start_datetime"] == "2023-08-06T10:07:49.024000Z"
    assert values["properties"]["end_datetime"] == "2023-08-26T10:07:49.024000Z"


def test_pystac_reads_it_back(tmp_path):
    write(tmp_path)
    item = pystac.Item.from_file(str(tmp_path / "item.json"))
    assert item.assets["land_cover"].get_absolute_href() == str(tmp_path / "land_cover.tif")
    assert item.assets["confidence"].get_absolute_href() == str(tmp_path / "extra/confidence.tif")
    assert ProjectionExtension.ext(item).code == "EPSG:32633"
    classes = ClassificationExtension.ext(item.assets["land_cover"]).classes
    assert [c.value for c in classes] == [*Legend.load("worldcover").codes, 0]
    assert item.datetime == DAY


def test_the_outline_follows_the_curved_edges(tmp_path):
    geobox = GeoBox(
        (3000, 3000), Affine(100, 0, 200_000, 0, -100, 6_700_000), "EPSG:32633"
    )  # 300 km, north, off centre
    write(tmp_path, geobox=geobox)
    values = json.loads((tmp_path / "item.json").read_text())
    outline = shape(values["geometry"])
    assert outline.is_valid
    assert outline.exterior.is_ccw
    to_lonlat = Transformer.from_crs(32633, 4326, always_xy=True)
    edge = np.linspace(200_000, 500_000, 201)
    for y in (6_700_000, 6_400_000):
        for lon, lat in np.column_stack(to_lonlat.transform(edge, np.full(201, y))):
            assert outline.exterior.distance(Point(lon, lat)) < 0.001  # four corners alone are 0.03 degrees off
            assert values["bbox"][0] - 1e-3 <= lon <= values["bbox"][2] + 1e-3
            assert values["bbox"][1] - 1e-3 <= lat <= values["bbox"][3] + 1e-3


def test_the_antimeridian_splits_the_outline(tmp_path):
    x, y = Transformer.from_crs(4326, 32601, always_xy=True).transform(180, 65)
    geobox = GeoBox((1000, 1000), Affine(100, 0, round(x) - 50_000, 0, -100, round(y)), "EPSG:32601")
    write(tmp_path, geobox=geobox)
    values = json.loads((tmp_path / "item.json").read_text())
    validate(values)
    west, south, east, north = values["bbox"]
    assert 178 < west < 180
    assert -180 < east < -178
    assert south < north
    outline = shape(values["geometry"])
    assert outline.is_valid
    assert outline.geom_type == "MultiPolygon"
    assert outline.bounds[0] == -180
    assert outline.bounds[2] == 180
    assert outline.area < 4  # not a band around the globe
    rng = np.random.default_rng(0)
    to_lonlat = Transformer.from_crs(32601, 4326, always_xy=True)
    left, bottom, right, top = geobox.boundingbox
    for lon, lat in np.column_stack(to_lonlat.transform(rng.uniform(left, right, 200), rng.uniform(bottom, top, 200))):
        assert outline.buffer(1e-3).contains(Point(lon, lat))


def test_a_crs_without_a_code_is_spelt_out(tmp_path):
    crs = "+proj=laea +lat_0=47 +lon_0=14 +ellps=GRS80 +units=m"
    write(tmp_path, geobox=GeoBox((10, 10), Affine(20, 0, 0, 0, -20, 0), crs))
    values = json.loads((tmp_path / "item.json").read_text())
    validate(values)
    check_extensions(values)
    assert values["properties"]["proj:code"] is None
    assert "Lambert Azimuthal" in values["properties"]["proj:wkt2"]


def test_names_that_collide_as_identifiers_stay_apart(tmp_path):
    legend = Legend.from_dict(
        {
            "name": "x",
            "nodata": 255,
            "classes": [
                {"code": 0, "name": "snow/ice", "color": "#ffffff"},
                {"code": 7, "name": "snow ice", "color": "#eeeeee"},
                {"code": 9, "name": "水", "color": "#0000ff"},
                {"code": 1, "name": "no data", "color": "#000000"},
            ],
        }
    )
    write(tmp_path, legend=legend)
    values = json.loads((tmp_path / "item.json").read_text())
    check_extensions(values)
    classes = values["assets"]["land_cover"]["classification:classes"]
    assert [c["name"] for c in classes] == ["snow_ice_0", "snow_ice_7", "class", "no_data", "no_data_255"]
    assert [c["title"] for c in classes[:4]] == list(legend.names)


def test_what_exists_is_replaced_only_on_request(tmp_path):
    write(tmp_path)
    before = (tmp_path / "item.json").read_bytes()
    with pytest.raises(OutputError, match="pass --overwrite"):
        write(tmp_path, item_id="other")
    assert (tmp_path / "item.json").read_bytes() == before
    write(tmp_path, item_id="other", overwrite=True)
    assert json.loads(Path(tmp_path / "item.json").read_text())["id"] == "other"
