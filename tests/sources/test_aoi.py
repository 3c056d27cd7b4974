import json

import pytest
import shapely
from shapely.geometry import MultiPolygon, Point, Polygon, box, mapping

from s2seg.errors import InputError
from s2seg.sources.aoi import parse_aoi

SQUARE = box(15.2, 45.2, 16.2, 46.2)
BOWTIE = Polygon([(15, 45), (16, 46), (16, 45), (15, 46)])
WEST_OF_180, EAST_OF_180 = box(179, -17, 180, -16), box(-180, -17, -179, -16)


def feature(geometry):
    return {"type": "Feature", "properties": {}, "geometry": mapping(geometry)}


def collection(*geometries, **members):
    return {"type": "FeatureCollection", "features": [feature(g) for g in geometries], **members}


@pytest.mark.parametrize(
    "given",
    [
        "15.2,45.2,16.2,46.2",
        "15.2 45.2 16.2 46.2",
        " 15.2, 45.2, 16.2, 46.2 ",
        [15.2, 45.2, 16.2, 46.2],
        (15.2, 45.2, 16.2, 46.2),
        SQUARE.wkt,
        f"SRID=4326;{SQUARE.wkt}",
        SQUARE,
        mapping(SQUARE),
        feature(SQUARE),
        collection(SQUARE),
        json.dumps(mapping(SQUARE)),
        shapely.force_3d(SQUARE, 7.0),
        shapely.GeometryCollection([SQUARE]),
    ],
)
def test_every_way_of_saying_one_square(given):
    area = parse_aoi(given)
    assert area.equals(SQUARE)
    assert not area.has_z


@pytest.mark.parametrize("wrap", [mapping, feature, collection])
@pytest.mark.parametrize("as_text", [True, False])
def test_geojson_files(tmp_path, wrap, as_text):
    path = tmp_path / "area.geojson"
    path.write_text(json.dumps(wrap(SQUARE)))
    assert parse_aoi(str(path) if as_text else path).equals(SQUARE)


def test_features_are_merged():
    halves = box(15.2, 45.2, 15.7, 46.2), box(15.7, 45.2, 16.2, 46.2)
    assert parse_aoi(collection(*halves)).equals(SQUARE)
    apart = parse_aoi(collection(box(0, 0, 1, 1), box(5, 5, 6, 6)))
    assert apart.geom_type == "MultiPolygon"
    assert apart.area == pytest.approx(2)


def test_a_crs_member_that_says_lon_lat_is_fine():
    for name in ("urn:ogc:def:crs:OGC:1.3:CRS84", "EPSG:4326", "urn:ogc:def:crs:EPSG::4326"):
        assert parse_aoi(collection(SQUARE, crs={"type": "name", "properties": {"name": name}})).equals(SQUARE)


def test_bbox_across_the_antimeridian():
    area = parse_aoi("179,-17,-179,-16")
    assert isinstance(area, MultiPolygon)
    assert len(area.geoms) == 2
    assert area.equals(MultiPolygon([WEST_OF_180, EAST_OF_180]))
    assert parse_aoi("180,-17,-179,-16").equals(EAST_OF_180)
    assert parse_aoi("179,-17,-180,-16").equals(WEST_OF_180)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("", "empty"),
        (Polygon(), "empty"),
        (collection(), "empty"),
        ({"type": "Feature", "geometry": None}, "empty"),
        ("POLYGON EMPTY", "empty"),
        (BOWTIE, r"Self-intersection at lon 15\.5, lat 45\.5"),
        (BOWTIE.wkt, r"Self-intersection at lon 15\.5"),
        (collection(SQUARE, BOWTIE), "Self-intersection"),
        ("15,46,16,45", "south .* greater than north"),
        ("45.2,115.2,46.2,116.2", "latitudes .* look swapped"),
        (Polygon([(45, 115), (46, 115), (46, 116)]), "look swapped"),
        ("120,100,121,101", "latitudes must lie within"),
        ("190,45,191,46", "longitudes must lie within .* west > east"),
        ("500000,5000000,510000,5010000", "looks projected"),
        (box(500000, 5000000, 510000, 5010000), "looks projected"),
        ("15,45,15,46", "no area"),
        ("15,45,15,45", "no area"),
        (Point(15, 45), "Point has no area; buffer it"),
        ("LINESTRING (15 45, 16 46)", "LineString has no area"),
        (collection(SQUARE, Point(15, 45)), "Point has no area"),
        ("nowhere/area.geojson", "no file"),
        ("1,2,3", "not four numbers"),
        ([1, 2, 3, None], "not four numbers"),
        ("nan,45,16,46", "not finite"),
        ("POLYGON ((15 45, 16", "not valid WKT"),
        ("SRID=32633;" + box(5e5, 5e6, 6e5, 6e6).wkt, "is in EPSG:32633; reproject it"),
        ("{broken", "not JSON"),
        ({"features": []}, "no 'type'"),
        ({"type": "Blob"}, "not a GeoJSON geometry"),
        ({"type": "Polygon", "coordinates": [[[1, 2]]]}, "not a GeoJSON geometry"),
        ({"type": "Polygon"}, "not a GeoJSON geometry"),
        (collection(SQUARE, crs={"type": "name", "properties": None}), "is in CRS .*reproject it"),
        (collection(SQUARE, crs={"type": "name", "properties": [1]}), "is in CRS .*reproject it"),
        ({"type": "FeatureCollection", "features": 5}, "features are no list"),
        ('{"a":' * 100_000, "nested too deeply"),
        (Polygon([(179, 45), (-179, 45), (-179, 46), (179, 46)]), "edge of more than 180 degrees .*cut it there"),
        (box(-170, 0, 170, 10), "edge of more than 180 degrees"),
    ],
)
def test_bad_areas_say_the_fix_in_one_line(given, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_aoi(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "area", [box(-180, -90, 180, 90), shapely.segmentize(box(-170, 0, 170, 10), 90), parse_aoi("-170,0,170,10")]
)
def test_areas_that_go_far_around_the_globe(area):
    assert parse_aoi(area).equals(area)


@pytest.mark.parametrize("name", ["polygon.geojson", "point.geojson", "polygon (1).geojson", "multipolygon z.geojson"])
def test_files_named_like_geometries(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(json.dumps(mapping(SQUARE)), encoding="utf-8-sig")  # as QGIS writes it
    assert parse_aoi(name).equals(SQUARE)


@pytest.mark.parametrize("head", ["POLYGONZ", "POLYGON Z", "polygon z "])
def test_wkt_in_three_dimensions(head):
    assert parse_aoi(f"{head}((15 45 1,16 45 1,16 46 1,15 46 1,15 45 1))").equals(box(15, 45, 16, 46))


def test_swap_is_not_suggested_where_it_would_not_help():
    with pytest.raises(InputError) as caught:
        parse_aoi("120,100,121,101")
    assert "swapped" not in str(caught.value)


def test_bad_files(tmp_path):
    path = tmp_path / "area.geojson"
    path.write_text("POLYGON ((15 45")
    with pytest.raises(InputError, match=r"area\.geojson is not JSON"):
        parse_aoi(path)
    path.write_bytes(b"\xff\xfe\x00PK")
    with pytest.raises(InputError, match="not text"):
        parse_aoi(path)
    path.write_text(json.dumps(collection(SQUARE, crs={"type": "name", "properties": {"name": "EPSG:32633"}})))
    with pytest.raises(InputError, match="EPSG:32633; reproject"):
        parse_aoi(path)
    with pytest.raises(InputError, match="cannot be read"):
        parse_aoi(tmp_path)
