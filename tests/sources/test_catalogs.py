import json
import pickle

import pytest

from s2seg.errors import InputError
from s2seg.sources.catalogs import CATALOGS, Catalog, CatalogError, load_signer, resolve_catalog


@pytest.mark.parametrize("name", ["earth-search", "planetary-computer", "cdse"])
def test_named(name):
    catalog = resolve_catalog(name)
    assert catalog is CATALOGS[name]
    assert (catalog.kind, catalog.collection) == ("api", "sentinel-2-l2a")
    assert resolve_catalog(catalog.url + "/") is catalog
    assert resolve_catalog(catalog) is catalog


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("https://stac.test/v1", "api"),
        ("http://127.0.0.1:7822", "api"),
        ("https://stac.test/catalog.json", "static"),
        ("https://stac.test/items.geojson?token=1", "static"),
        ("https://stac.test/items.parquet", "geoparquet"),
        ("s3://bucket/items.geoparquet", "geoparquet"),
    ],
)
def test_urls_are_told_apart_without_fetching(url, kind):
    assert resolve_catalog(url) == Catalog(url, url, kind=kind)


@pytest.mark.parametrize(
    ("stac_type", "kind"),
    [("Catalog", "static"), ("Collection", "static"), ("FeatureCollection", "items"), ("Feature", "items")],
)
def test_local_json_is_looked_into(tmp_path, stac_type, kind):
    path = tmp_path / "some.json"
    path.write_text(json.dumps({"type": stac_type}))
    assert resolve_catalog(path).kind == kind
    assert resolve_catalog(str(path)).url == str(path)


def test_a_folder_means_its_catalog(tmp_path):
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog"}))
    assert resolve_catalog(tmp_path) == Catalog(str(tmp_path), str(tmp_path / "catalog.json"), kind="static")


def test_parquet_file(tmp_path):
    (tmp_path / "items.parquet").write_bytes(b"PAR1")
    assert resolve_catalog(tmp_path / "items.parquet").kind == "geoparquet"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("earth-serch", "unknown catalog 'earth-serch'.*planetary-computer.*did you mean earth-search"),
        ("qqqqqq", "unknown catalog 'qqqqqq'; known are earth-search, planetary-computer, cdse"),
        ("nowhere/catalog.json", "no such file"),
        ("s3://bucket/catalog.json", "only http"),
        ("http://", "names no server"),
        ("https://[::1", "names no server"),
        ("file:///nowhere/catalog.json", "no such file"),
        ("x" * 5000, "unknown catalog 'x{200} [.]{3}'"),
        ("~nobody-there/catalog.json", "no such file"),
        (" ", "empty"),
    ],
)
def test_unknown(given, says):
    with pytest.raises(InputError, match=says) as caught:
        resolve_catalog(given)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_stac(tmp_path):
    path = tmp_path / "some.json"
    path.write_text("{")
    with pytest.raises(InputError, match="not JSON"):
        resolve_catalog(path)
    path.write_text("[1]")
    with pytest.raises(InputError, match="not STAC"):
        resolve_catalog(path)


def test_load_signer():
    assert load_signer("posixpath.basename")("a/b") == "b"


@pytest.mark.parametrize("path", ["no_such_package.sign_url", "posixpath.no_such_function", "no_dot"])
def test_a_signer_that_is_not_there(path):
    with pytest.raises(InputError, match=rf"{path} is needed .*s2seg\[planetary\]"):
        load_signer(path)


def test_planetary_computer_signs_late():
    planetary_computer = pytest.importorskip("planetary_computer")
    assert load_signer(CATALOGS["planetary-computer"].sign) is planetary_computer.sign_url


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(CatalogError("http://x", "gone")))
    assert str(error) == "cannot read catalog http://x: gone"
