import json
import threading
from datetime import UTC, datetime
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pystac
import pytest
from shapely.geometry import MultiPolygon, Polygon, box, mapping

from s2seg.errors import InputError, NoItemsError, S2SegWarning
from s2seg.sources.aoi import parse_aoi
from s2seg.sources.catalogs import SIGNERS, Catalog, CatalogError
from s2seg.sources.items import sign_path
from s2seg.sources.search import coverage, describe, parse_datetime, search

AOI, AUGUST = "15.2,45.2,15.8,45.8", "2023-08-01/2023-08-31"
SLOVENIA_AOI = "15.2,45.2,16.2,46.2"
CLEAR = {
    "S2A_33TWL_20230815_0_L2A",
    "S2A_33TWM_20230815_0_L2A",
    "S2B_33TWL_20230813_0_L2A",
    "S2B_33TWM_20230813_0_L2A",
    "S2B_33TWL_20230820_0_L2A",
    "S2B_33TWM_20230820_0_L2A",
}


def ids(items):
    return [item.id for item in items]


def one_line(caught):
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("2023", "2023-01-01T00:00:00", "2023-12-31T23:59:59.999999"),
        ("2024-02", "2024-02-01T00:00:00", "2024-02-29T23:59:59.999999"),
        ("2023-08-15", "2023-08-15T00:00:00", "2023-08-15T23:59:59.999999"),
        ("2023-08-01/2023-08-31", "2023-08-01T00:00:00", "2023-08-31T23:59:59.999999"),
        ("2023-08/2023-09", "2023-08-01T00:00:00", "2023-09-30T23:59:59.999999"),
        ("../2023-08-31", None, "2023-08-31T23:59:59.999999"),
        ("/2023-08-31", None, "2023-08-31T23:59:59.999999"),
        ("2023-08-31/..", "2023-08-31T00:00:00", None),
        ("../..", None, None),
        ("2023-08-15T10:00:00Z", "2023-08-15T10:00:00", "2023-08-15T10:00:00"),
        ("2023-08-15T10:00:00+02:00/2023-08-15t10:00:00.5z", "2023-08-15T08:00:00", "2023-08-15T10:00:00.500000"),
        ("2023-08-15T10:00:00", "2023-08-15T10:00:00", "2023-08-15T10:00:00"),
    ],
)
def test_parse_datetime(text, start, end):
    expected = tuple(time and datetime.fromisoformat(time).replace(tzinfo=UTC) for time in (start, end))
    assert parse_datetime(text) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("2023-08-31/2023-08-01", "runs backwards; write it 2023-08-01/2023-08-31"),
        ("2024/2023", "runs backwards"),
        ("last summer", "such as 2023-08-01/2023-08-31"),
        ("2023-13", "cannot be read"),
        ("2023-02-30", "cannot be read"),
        ("0000", "cannot be read"),
        ("01.08.2023", "cannot be read"),
        # Python reads these as one instant
        ("20230801/20230820", "'20230801' is neither a date nor a time"),
        ("2023-W31", "neither a date"),
        ("2023-08-13 10:07", "neither a date"),
        ("２０２３", "neither a date"),
        (("2023-08-01", "2023-08-31"), "is not text"),
        (datetime(2023, 8, 1), "is not text"),
        ("2023-08-01/2023-08-02/2023-08-03", "range of two"),
        ("", "not a date"),
        ("/", "not a date"),
    ],
)
def test_dates_that_make_no_sense(text, says):
    with pytest.raises(InputError, match=says) as caught:
        parse_datetime(text)
    one_line(caught)


@pytest.mark.real_data
@pytest.mark.parametrize("kind", ["static", "api", "items"])
def test_slovenia_by_every_road(real_data, slovenia_api, save_items, kind):
    tree = pystac.Catalog.from_file(str(real_data / "slovenia" / "catalog.json"))
    items = list(tree.get_items(recursive=True))
    catalog = {
        "static": real_data / "slovenia" / "catalog.json",
        "api": slovenia_api,
        "items": save_items([item.clone() for item in items]),
    }[kind]
    found = search(catalog, SLOVENIA_AOI, AUGUST)
    assert ids(found) == [item.id for item in sorted(items, key=lambda item: (item.datetime, item.id))]
    assert all(list(item.assets) == ["blue", "green", "red", "nir", "scl"] for item in found)
    assert set(ids(search(catalog, SLOVENIA_AOI, AUGUST, max_cloud_cover=10))) == CLEAR
    assert ids(search(catalog, SLOVENIA_AOI, "2023-08-15/2023-08-15", max_cloud_cover=0.205)) == [
        "S2A_33TWL_20230815_0_L2A"
    ]
    assert set(ids(search(catalog, "15.5,46.2,15.6,46.3", "2023-08-15"))) == {"S2A_33TWM_20230815_0_L2A"}
    assert len(search(catalog, SLOVENIA_AOI, AUGUST, limit=3)) == 3
    assert len(search(catalog, SLOVENIA_AOI, AUGUST, collection="sentinel-2-l2a")) == 10


@pytest.mark.real_data
@pytest.mark.parametrize("kind", ["static", "api"])
def test_what_slovenia_says_when_there_is_nothing(real_data, slovenia_api, kind):
    catalog = real_data / "slovenia" / "catalog.json" if kind == "static" else slovenia_api

    def refusal(aoi=SLOVENIA_AOI, when=AUGUST, **kwargs):
        with pytest.raises(NoItemsError) as caught:
            search(catalog, aoi, when, **kwargs)
        text = one_line(caught)
        assert str(catalog) in text
        return text

    assert "all 10 items are cloudier than 0.1 %" in (text := refusal(max_cloud_cover=0.1))
    assert "(the clearest has 0.20399 %, on 2023-08-15)" in text
    assert "2023-09" in (text := refusal(when="2023-09"))
    assert text.endswith("at other dates 10 do, nearest 2023-08-20")
    assert refusal(when="../2023-08-01").endswith("nearest 2023-08-10")
    assert refusal(when="2023-08-16/2023-08-17").endswith("nearest 2023-08-15 and 2023-08-18")
    assert "covers the aoi (lon 5 to 6, lat 5 to 6); it covers lon 15 to 16.44, lat 45.06 to 46.95" in refusal(
        "5,5,6,6"
    )
    assert "lat and lon swapped" not in refusal("5,5,6,6")
    assert "lat and lon swapped" in refusal("45.2,15.2,46.2,16.2")


@pytest.mark.real_data
@pytest.mark.parametrize("kind", ["static", "api"])
def test_an_unknown_collection_lists_those_there_are(real_data, slovenia_api, kind):
    catalog = real_data / "slovenia" / "catalog.json" if kind == "static" else slovenia_api
    with pytest.raises(InputError, match="no collection 'landsat'; it has sentinel-2-l2a") as caught:
        search(catalog, SLOVENIA_AOI, AUGUST, collection="landsat")
    one_line(caught)


@pytest.mark.real_data
def test_geoparquet(real_data):
    path = real_data / "stac_items" / "stac-utils+rustac-py" / "100-sentinel-2-items.parquet"
    found = search(path, "-105,40,-104.9,40.1", "2024-03")
    assert [item.datetime.date().isoformat() for item in found] == ["2024-03-26", "2024-03-28", "2024-03-31"]
    assert {sign_path(item) for item in found} == {"planetary_computer.sign_url"}
    with pytest.raises(NoItemsError, match="at other dates 100 do, nearest 2024-03-26"):
        search(path, "-105,40,-104.9,40.1", "2020")


def test_geoparquet_that_is_none(tmp_path):
    path = tmp_path / "items.parquet"
    path.write_text("no parquet")
    with pytest.raises(CatalogError, match=r"items\.parquet") as caught:
        search(path, AOI, AUGUST)
    one_line(caught)


def test_items_are_matched_by_their_true_footprint(make_item, save_items):
    # the bounding box of this half covers the aoi, the half itself does not
    triangle = Polygon([(15, 45), (17, 47), (15, 47)])
    path = save_items([make_item("half", area=triangle), make_item("whole", area=(15, 45, 17, 47))])
    assert ids(search(path, "16.5,45.2,16.6,45.3", AUGUST)) == ["whole"]


def test_unknown_cloud_cover_is_kept(make_item, save_items):
    path = save_items(
        [make_item("clear", "2023-08-01", clouds=0), make_item("unknown", "2023-08-02"), make_item("cloudy", clouds=90)]
    )
    assert ids(search(path, AOI, AUGUST, max_cloud_cover=5)) == ["clear", "unknown"]


def test_the_only_item_is_too_cloudy(make_item, save_items):
    with pytest.raises(NoItemsError, match=r"^the only item is cloudier than 5 %"):
        search(save_items([make_item("cloudy", clouds=90)]), AOI, AUGUST, max_cloud_cover=5)


def test_relative_links_of_an_item_collection(make_item, save_items, tmp_path):
    item = make_item("here")
    item.assets["red"].href = "./here/B04.tif"
    (found,) = search(save_items([item]), AOI, AUGUST)
    assert found.assets["red"].href == str(tmp_path / "here" / "B04.tif")


def test_an_empty_catalog(save_items):
    with pytest.raises(NoItemsError, match="holds no items"):
        search(save_items([]), AOI, AUGUST)


@pytest.mark.parametrize(
    ("kwargs", "says"),
    [
        ({"max_cloud_cover": 101}, "0 to 100"),
        ({"max_cloud_cover": -1}, "0 to 100"),
        ({"limit": 0}, "at least 1"),
        ({"limit": 1.5}, "at least 1"),
    ],
)
def test_numbers_that_make_no_sense(make_item, save_items, kwargs, says):
    with pytest.raises(InputError, match=says):
        search(save_items([make_item("a")]), AOI, AUGUST, **kwargs)


UNCUT = Polygon([(179.5, -17), (-179.5, -17), (-179.5, -16), (179.5, -16)])
BEYOND = box(179.5, -17, 180.5, -16)
CUT = MultiPolygon([box(179.5, -17, 180, -16), box(-180, -17, -179.5, -16)])


@pytest.mark.parametrize("area", [UNCUT, BEYOND, CUT], ids=["uncut", "beyond 180", "cut"])
@pytest.mark.parametrize(
    ("aoi", "share"),
    [
        ("179.8,-16.8,-179.8,-16.2", 1.0),
        ("179.4,-16.8,179.6,-16.2", 0.5),
        ("-179.6,-16.8,-179.4,-16.2", 0.5),
        ("0,-16.8,1,-16.2", 0),
    ],
)
def test_footprints_across_the_antimeridian(make_item, save_items, area, aoi, share):
    item = make_item("fiji", area=area)
    assert coverage(item, parse_aoi(aoi)) == pytest.approx(share, abs=1e-9)
    path = save_items([item])
    if share:
        assert ids(search(path, aoi, AUGUST)) == ["fiji"]
    else:
        with pytest.raises(NoItemsError):
            search(path, aoi, AUGUST)


@pytest.mark.real_data
def test_real_items_across_the_antimeridian(real_data, save_items):
    name = "S2A_MSIL2A_20230625T234621_N0509_R073_T01WCP_20230626T022157.SAFE__expected_output.json"
    path = real_data / "stac_items" / "stactools-sentinel2" / name
    for aoi in ("179,66,179.5,66.2", "-179.5,66,-179.2,66.2", "179.5,66,-179.5,66.2"):
        (item,) = search(path, aoi, "2023-06-25")
        assert coverage(item, parse_aoi(aoi)) == 1.0
    with pytest.raises(NoItemsError):
        search(path, "0,66,1,66.2", "2023-06-25")


def test_coverage_is_a_share_of_true_area(make_item):
    # the southern half in degrees is more than half of the ground: cos(60) / cos(70) per degree
    aoi = box(0, 60, 1, 80)
    share = coverage(make_item("south", area=(0, 60, 1, 70)), aoi)
    assert share == pytest.approx((0.9396926 - 0.8660254) / (0.9848078 - 0.8660254), abs=1e-6)
    assert coverage(make_item("far", area=(5, 60, 6, 61)), aoi) == 0


def test_describe(make_item):
    item = make_item("a", clouds=12.5, **{"grid:code": "MGRS-33TWL", "s2:processing_baseline": "05.09"})
    rows = describe([item, make_item("bare", area=(15, 45, 16, 45.5))], box(15, 45, 16, 46))
    assert rows[0] == {
        "id": "a",
        "datetime": "2023-08-15T10:00:00Z",
        "cloud_cover": 12.5,
        "tile": "33TWL",
        "coverage": 1.0,
        "platform": "sentinel-2a",
        "baseline": "05.09",
    }
    assert (rows[1]["cloud_cover"], rows[1]["tile"], rows[1]["baseline"]) == (None, None, None)
    assert rows[1]["coverage"] == pytest.approx(0.5, abs=0.01)
    json.dumps(rows)


def asked(fake_api, make_item, conforms, **kwargs):
    with fake_api(lambda body: [make_item("a", clouds=1), make_item("b", "2023-08-20", clouds=99)], conforms) as api:
        found = search(api.url, AOI, AUGUST, **kwargs)
    return ids(found), api.asked


def test_what_an_api_is_asked(fake_api, make_item):
    found, (body,) = asked(fake_api, make_item, ["item-search"])
    assert found == ["a", "b"]
    assert body["collections"] == ["sentinel-2-l2a"]
    assert body["datetime"] == "2023-08-01T00:00:00.000Z/2023-08-31T23:59:59.999Z"
    assert Polygon(body["intersects"]["coordinates"][0]).equals(box(15.2, 45.2, 15.8, 45.8))
    assert not {"query", "filter", "bbox"} & body.keys()


@pytest.mark.parametrize(
    ("conforms", "sent"),
    [
        (["item-search"], {}),
        (["item-search", "item-search#query"], {"query": {"eo:cloud_cover": {"lte": 50}}}),
        (
            ["item-search", "item-search#filter"],
            {"filter": {"op": "<=", "args": [{"property": "eo:cloud_cover"}, 50]}, "filter-lang": "cql2-json"},
        ),
    ],
    ids=["nothing", "query", "filter"],
)
def test_the_cloud_limit_is_sent_as_the_server_understands_it_and_applied_here(fake_api, make_item, conforms, sent):
    found, (body,) = asked(fake_api, make_item, conforms, max_cloud_cover=50)
    assert found == ["a"]
    assert {key: body[key] for key in ("query", "filter", "filter-lang") if key in body} == sent


def test_a_server_that_answers_a_cloud_limit_with_nothing_is_asked_again(fake_api, make_item):
    conforms = ["item-search", "item-search#query"]
    with fake_api(lambda body: [] if "query" in body else [make_item("a", clouds=1)], conforms) as api:
        assert ids(search(api.url, AOI, AUGUST, max_cloud_cover=50)) == ["a"]
    assert len(api.asked) == 2


def test_an_api_that_ignores_place_and_time(fake_api, make_item):
    strays = [make_item("a"), make_item("late", "2024-08-15"), make_item("far", area=(5, 5, 6, 6))]
    with fake_api(lambda body: strays) as api:
        assert ids(search(api.url, AOI, AUGUST)) == ["a"]


def test_open_ends_and_parts_of_an_area(fake_api, make_item):
    with fake_api(lambda body: [make_item("fiji", area=CUT)]) as api:
        search(api.url, "179.8,-16.8,-179.8,-16.2", "../2023-08-31")
        search(api.url, "179.8,-16.8,-179.8,-16.2", "../..")
    assert api.asked[0]["datetime"] == "../2023-08-31T23:59:59.999Z"
    assert "datetime" not in api.asked[1]
    assert api.asked[0]["intersects"]["type"] == "MultiPolygon"


def test_a_diagnosis_asks_few_questions_even_of_a_large_catalog(fake_api, make_item):
    many = [make_item(f"i{n:03}", f"{2018 + n // 60}-{n // 5 % 12 + 1:02}-{n % 5 * 5 + 1:02}") for n in range(300)]

    def answer(body):
        start, end = body["datetime"].split("/") if "datetime" in body else ("..", "..")
        times = {item.id: item.to_dict()["properties"]["datetime"] for item in many}
        return [i for i in many if (start == ".." or times[i.id] >= start) and (end == ".." or times[i.id] <= end)]

    with fake_api(answer) as api, pytest.raises(NoItemsError) as caught:
        search(api.url, AOI, "2020-06-22/2020-06-25")
    assert one_line(caught).endswith("at other dates more than 100 do, nearest 2020-06-21 and 2020-07-01")
    assert len(api.asked) <= 6


def test_an_api_without_items_there_tells_its_extent(fake_api):
    with fake_api(lambda body: []) as api, pytest.raises(NoItemsError, match="it covers lon 10 to 20, lat 40 to 50"):
        search(api.url, AOI, AUGUST)


def test_the_collection_of_an_unknown_api(fake_api, make_item):
    def answer(body):
        return [make_item("a", collection=body["collections"][0])]

    with fake_api(answer, collections=("landsat", "sentinel-2-l2a")) as api:
        search(api.url, AOI, AUGUST)
        search(api.url, AOI, AUGUST, collection="landsat")
    assert [body["collections"] for body in api.asked] == [["sentinel-2-l2a"], ["landsat"]]
    with fake_api(answer, collections=("only",)) as api:
        search(api.url, AOI, AUGUST)
    assert api.asked[0]["collections"] == ["only"]
    with fake_api(answer, collections=("b", "a")) as api, pytest.raises(InputError, match="choose one: a, b"):
        search(api.url, AOI, AUGUST)


def test_a_server_that_fails(fake_api, make_item):
    with (
        fake_api(lambda body: [make_item("a")], status=400) as api,
        pytest.raises(CatalogError, match="HTTP 400") as caught,
    ):
        search(api.url, AOI, AUGUST)
    assert api.url in one_line(caught)


def test_a_server_that_is_down(free_port):
    url = f"http://127.0.0.1:{free_port()}"
    for address in (url, f"{url}/catalog.json"):
        with pytest.raises(CatalogError, match="refused") as caught:
            search(address, AOI, AUGUST)
        assert address in one_line(caught)


@pytest.fixture
def web_folder(tmp_path):
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path))) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


def extent(bbox, interval=(None, None)):
    span = [time and datetime.fromisoformat(time).replace(tzinfo=UTC) for time in interval]
    return pystac.Extent(pystac.SpatialExtent([bbox]), pystac.TemporalExtent([span]))


def tree(path, **collections):
    """A static catalog; each collection is given as its items and its extent."""
    catalog = pystac.Catalog("root", "test")
    for name, (items, where) in collections.items():
        collection = pystac.Collection(name, "test", where)
        catalog.add_child(collection)
        collection.add_items(items)
    catalog.normalize_and_save(str(path), pystac.CatalogType.SELF_CONTAINED)
    return path / "catalog.json"


HERE = extent([15, 45, 16, 46])


def test_static_catalogs_and_item_collections_on_the_web(web_folder, tmp_path, make_item, save_items):
    tree(tmp_path / "tree", s2=([make_item("a")], HERE))
    save_items([make_item("b")])
    assert ids(search(f"{web_folder}/tree/catalog.json", AOI, AUGUST)) == ["a"]
    assert ids(search(f"{web_folder}/tree/s2/collection.json", AOI, AUGUST)) == ["a"]
    assert ids(search(f"{web_folder}/items.json", AOI, AUGUST)) == ["b"]
    with pytest.raises(CatalogError, match="HTTP 404"):
        search(f"{web_folder}/none/catalog.json", AOI, AUGUST)


@pytest.mark.parametrize(
    "other", [extent([100, 0, 110, 10]), extent([15, 45, 16, 46], ("2020-01-01", "2020-12-31"))], ids=["place", "time"]
)
def test_collections_of_other_places_and_times_are_not_walked(tmp_path, make_item, other):
    catalog = tree(tmp_path, here=([make_item("a")], HERE), other=([make_item("b")], other))
    (tmp_path / "other" / "b" / "b.json").write_text("broken, and never read")
    assert ids(search(catalog, AOI, AUGUST)) == ["a"]


def test_one_collection_of_several(tmp_path, make_item):
    catalog = tree(tmp_path, one=([make_item("a")], HERE), two=([make_item("b", "2023-08-16")], HERE))
    assert ids(search(catalog, AOI, AUGUST)) == ["a", "b"]
    assert ids(search(catalog, AOI, AUGUST, collection="two")) == ["b"]
    with pytest.raises(InputError, match="it has one, two"):
        search(catalog, AOI, AUGUST, collection="three")


def test_broken_links_of_a_static_catalog_name_the_file(tmp_path, make_item):
    catalog = tree(tmp_path, s2=([make_item("a")], HERE))
    item = tmp_path / "s2" / "a" / "a.json"
    item.write_text("broken")
    with pytest.raises(CatalogError, match=r"none of its items can be used; item .*a\.json: it is not JSON") as caught:
        search(catalog, AOI, AUGUST)
    one_line(caught)
    item.unlink()
    with pytest.raises(CatalogError, match=r"a\.json: No such file"):
        search(catalog, AOI, AUGUST)


def spoil(path, key, value):
    """Change the first item of an ItemCollection, or put another in its place."""
    document = json.loads(path.read_text())
    if key is None:
        document["features"][0] = value
    elif ":" in key or key == "datetime":
        document["features"][0]["properties"][key] = value
    else:
        document["features"][0][key] = value
    path.write_text(json.dumps(document))
    return path


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        (None, "<html>", 'item without an id .*: it is "<html>", not a JSON object'),
        (None, 5, "item without an id .5.: it is 5, not a JSON object"),
        ("type", "Catalog", 'item a: its type is "Catalog"'),
        ("id", 5, "item 5: its id is 5, not text"),
        ("properties", None, "item a: its properties are null"),
        ("assets", [1], r"item a: its assets are \[1\]"),
        ("assets", {"red": {}}, "item a: its asset 'red' has no href"),
        ("geometry", "x", 'item a: its geometry is "x"'),
        ("bbox", [1, 2], r"item a: its bbox is \[1, 2\]"),
        ("bbox", "abc", "item a: its bbox is"),
        ("links", [{"rel": "item"}], r"item a: it is not valid STAC \(KeyError: 'href'\)"),
        ("datetime", None, "item a: it has no datetime"),
        ("datetime", "yesterday", 'item a: its datetime is "yesterday", not a time'),
        ("eo:cloud_cover", "n/a", 'item a: its eo:cloud_cover is "n/a", not a number'),
    ],
)
def test_a_broken_item_of_a_catalog_is_named_and_left_out(make_item, save_items, key, value, says):
    with pytest.raises(CatalogError, match=f"none of its items can be used; {says}") as caught:
        search(spoil(save_items([make_item("a")]), key, value), AOI, AUGUST)
    one_line(caught)
    with pytest.warns(S2SegWarning, match=says.replace(": ", " is left out: ", 1)):
        assert ids(search(spoil(save_items([make_item("a"), make_item("b")]), key, value), AOI, AUGUST)) == ["b"]


@pytest.mark.parametrize("geometry", [None, {"type": "Polygon", "coordinates": []}, {"type": "Polygon"}])
def test_an_item_that_lies_nowhere_is_named_and_left_out(make_item, save_items, geometry):
    boxed = spoil(save_items([make_item("a"), make_item("b")]), "geometry", geometry)
    assert ids(search(boxed, AOI, AUGUST)) == ["a", "b"]
    with pytest.warns(S2SegWarning, match="item a is left out: it has neither a geometry that can be read nor a bbox"):
        assert ids(search(spoil(boxed, "bbox", None), AOI, AUGUST)) == ["b"]


def test_broken_items_of_trees_and_apis_are_left_out(tmp_path, fake_api, make_item):
    catalog = tree(tmp_path, s2=([make_item("a"), make_item("b"), make_item("c")], HERE))
    (tmp_path / "s2" / "a" / "a.json").write_text("<html>")
    (tmp_path / "s2" / "c" / "c.json").write_bytes(b"\xff\xfe")
    with pytest.warns(S2SegWarning, match=r"[ac]\.json is left out: it is not JSON"):
        assert ids(search(catalog, AOI, AUGUST)) == ["b"]
    items = [make_item("a"), make_item("b")]
    items[0].properties["eo:cloud_cover"] = "n/a"
    with fake_api(lambda body: items) as api, pytest.warns(S2SegWarning, match="item a is left out"):
        assert ids(search(api.url, AOI, AUGUST)) == ["b"]


def test_a_catalog_that_leads_back_to_itself_is_walked_once(tmp_path, make_item):
    catalog = tree(tmp_path, s2=([make_item("a")], HERE))
    collection = tmp_path / "s2" / "collection.json"
    document = json.loads(collection.read_text())
    document["links"] += [{"rel": "child", "href": href} for href in ("../catalog.json", "./collection.json")]
    collection.write_text(json.dumps(document))
    assert ids(search(catalog, AOI, AUGUST)) == ["a"]
    with pytest.raises(NoItemsError, match="it covers lon 15"):
        search(catalog, "5,5,6,6", AUGUST)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ({"type": "FeatureCollection"}, "without a list of features"),
        ({"type": "FeatureCollection", "features": None}, "without a list of features"),
        ({"type": "Feature"}, "none of its items can be used; item without an id"),
        ({"type": "Catalog"}, "not valid STAC"),
        ({"type": "Collection"}, "not valid STAC"),
    ],
)
def test_documents_that_say_no_more_than_their_type(tmp_path, document, says):
    path = tmp_path / "catalog.json"
    path.write_text(json.dumps(document))
    with pytest.raises(CatalogError, match=says) as caught:
        search(path, AOI, AUGUST)
    one_line(caught)


@pytest.mark.parametrize("write", ["static", "items"])
def test_a_byte_order_mark_does_no_harm(tmp_path, make_item, save_items, write):
    path = tree(tmp_path, s2=([make_item("a")], HERE)) if write == "static" else save_items([make_item("a")])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert ids(search(path, AOI, AUGUST)) == ["a"]
    assert ids(search(path.as_uri(), AOI, AUGUST)) == ["a"]


def test_a_catalog_with_its_own_signing(make_item, save_items, monkeypatch):
    monkeypatch.delitem(SIGNERS, "x.test", raising=False)  # and so that it is gone again afterwards
    catalog = Catalog("mine", str(save_items([make_item("a")])), kind="items", sign="posixpath.normpath")
    (item,) = search(catalog, AOI, AUGUST)
    assert sign_path(item) == "posixpath.normpath"
    local = make_item("local")
    local.assets["red"].href = "B04.tif"
    (item,) = search(Catalog("mine", str(save_items([local])), kind="items", sign="posixpath.normpath"), AOI, AUGUST)
    assert sign_path(item) is None
    del SIGNERS["x.test"]


def test_the_aoi_may_come_in_any_form(make_item, save_items):
    path = save_items([make_item("a")])
    for aoi in (box(15.2, 45.2, 15.8, 45.8), mapping(box(15.2, 45.2, 15.8, 45.8)), [15.2, 45.2, 15.8, 45.8]):
        assert ids(search(path, aoi, "2023")) == ["a"]
