"""Servers on the loopback: a real STAC API, and one whose answers and conformance a test chooses."""

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pystac
import pytest
from shapely.geometry import box, mapping

CONFORMS = "https://api.stacspec.org/v1.0.0"


@pytest.fixture
def make_item():
    """A Sentinel-2 item with one red asset."""

    def make(item_id, day="2023-08-15", area=(15, 45, 16, 46), clouds=None, collection="sentinel-2-l2a", **properties):
        area = box(*area) if isinstance(area, tuple) else area
        when = datetime.fromisoformat(f"{day}T10:00:00").replace(tzinfo=UTC)
        properties = {"platform": "sentinel-2a", "proj:code": "EPSG:32633", **properties}
        if clouds is not None:
            properties["eo:cloud_cover"] = clouds
        item = pystac.Item(item_id, mapping(area), list(area.bounds), when, properties, collection=collection)
        item.add_asset("red", pystac.Asset(f"https://x.test/{item_id}/B04.tif"))
        return item

    return make


@pytest.fixture
def save_items(tmp_path):
    """Write items as an ItemCollection."""

    def save(items, name="items.json"):
        path = tmp_path / name
        features = [item.to_dict(include_self_link=False) for item in items]
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        return path

    return save


@pytest.fixture(scope="session")
def free_port():
    def find():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return probe.getsockname()[1]

    return find


@pytest.fixture(scope="session")
def slovenia_api(real_data, tmp_path_factory, free_port):
    """The URL of rustac's STAC API, serving the Slovenian items; it conforms to item search and to no extension."""
    features = []
    for path in sorted((real_data / "slovenia" / "sentinel-2-l2a").glob("*/*.json")):
        document = json.loads(path.read_text())
        document["links"] = []
        for asset in document["assets"].values():
            asset["href"] = str((path.parent / asset["href"]).resolve())
        features.append(document)
    source = tmp_path_factory.mktemp("api") / "items.json"
    source.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    command = shutil.which("rustac", path=str(Path(sys.executable).parent)) or shutil.which("rustac")
    address = f"127.0.0.1:{free_port()}"
    with subprocess.Popen(
        [command, "serve", "--create-collections", "--addr", address, str(source)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        try:
            _wait_for(f"http://{address}/", server)
            yield f"http://{address}"
        finally:
            server.terminate()


def _wait_for(url, server):
    for _ in range(100):
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            if server.poll() is not None:
                pytest.fail(f"the STAC API ended with {server.returncode}")
            time.sleep(0.1)
    pytest.fail("the STAC API did not answer within 10 s")


class FakeApi:
    """A STAC API that answers every search with what `answer(body)` returns, and keeps what it was asked."""

    def __init__(self, answer, conforms, status, collections):
        self.answer, self.conforms, self.status, self.collections = answer, conforms, status, collections
        self.asked, self.url = [], ""

    def landing(self):
        links = [{"rel": rel, "href": f"{self.url}/", "type": "application/json"} for rel in ("root", "self")]
        links += [{"rel": "search", "href": f"{self.url}/search", "type": "application/geo+json", "method": "POST"}]
        links += [{"rel": "data", "href": f"{self.url}/collections", "type": "application/json"}]
        classes = [f"{CONFORMS}/{name}" for name in ("core", "collections", "ogcapi-features", *self.conforms)]
        base = {"type": "Catalog", "id": "fake", "stac_version": "1.0.0", "description": "fake"}
        return {**base, "conformsTo": classes, "links": links}

    def collection(self, name):
        extent = {"spatial": {"bbox": [[10, 40, 20, 50]]}, "temporal": {"interval": [["2017-01-01T00:00:00Z", None]]}}
        base = {"type": "Collection", "id": name, "stac_version": "1.0.0", "description": "fake", "license": "other"}
        return {**base, "extent": extent, "links": []}

    def get(self, path):
        if path.startswith("/collections/"):
            name = path.rsplit("/", 1)[-1]
            return self.collection(name) if name in self.collections else None
        if path == "/collections":
            return {"collections": [self.collection(name) for name in self.collections], "links": []}
        return self.landing()

    def search(self, body):
        self.asked.append(body)
        features = [item.to_dict(include_self_link=False) for item in self.answer(body)]
        return {"type": "FeatureCollection", "features": features, "links": []}


@pytest.fixture
def fake_api():
    """A context manager that serves a FakeApi."""

    @contextmanager
    def serve(answer, conforms=("item-search",), status=200, collections=("sentinel-2-l2a",)):
        api = FakeApi(answer, conforms, status, collections)

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.reply(api.get(self.path.split("?")[0]))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(api.search(body), api.status)

            def reply(self, document, status=200):
                content = json.dumps(document).encode()
                self.send_response(404 if document is None else status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args):
                pass

        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            api.url = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
            thread.start()
            try:
                yield api
            finally:
                server.shutdown()
                thread.join()

    return serve
