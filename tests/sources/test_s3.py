"""Reads from a server that speaks S3's protocol and wants signed requests, with obstore and with GDAL."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from rasterio.windows import Window

from s2seg.sources import ranges, reader, tiles
from s2seg.sources.reader import AssetRef, close_files, read_window
from s2seg.testing import position_scene
from tests.sources.test_stack import items_in, own_grid

boto3 = pytest.importorskip("boto3", reason="moto's server is not installed")
moto_server = pytest.importorskip("moto.server", reason="moto's server is not installed")


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An empty S3 server's address; the environment tells GDAL, and so obstore, where it is."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    server = moto_server.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_S3_ENDPOINT": f"{host}:{port}", "AWS_HTTPS": "NO", "AWS_VIRTUAL_HOSTING": "FALSE",
        "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "eu-central-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    close_files()
    yield f"http://{host}:{port}"
    close_files()
    server.stop()


@pytest.mark.skipif(not ranges.installed(), reason="obstore and deflate are not installed")
def test_obstore_reads_what_gdal_reads(endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (item,) = items_in(position_scene(tmp_path / "scene", bands={"red": 10}))
    s3 = boto3.client("s3", endpoint_url=endpoint, region_name="eu-central-1")
    s3.create_bucket(Bucket="scenes", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    s3.upload_file(item.assets["red"].href, "scenes", "a/red.tif")
    fetched: list[int] = []
    read = ranges.RemoteFile.read
    monkeypatch.setattr(ranges.RemoteFile, "read", lambda self, asked: fetched.append(len(asked)) or read(self, asked))
    far, grid = AssetRef("i", "red", "s3://scenes/a/red.tif"), own_grid(item, "red")
    window = Window(3, 5, grid.shape.x - 10, grid.shape.y - 20)
    got = read_window(far, grid.crs.to_epsg(), grid.affine, window)
    assert tiles.tiles_of(far.href) is not None and len(fetched) >= 2, "the header, and the tiles"
    fetched.clear()
    monkeypatch.setattr(reader, "tiles_of", lambda *_: None)
    close_files()
    np.testing.assert_array_equal(read_window(far, grid.crs.to_epsg(), grid.affine, window), got)
    near = AssetRef("i", "red", item.assets["red"].href)
    np.testing.assert_array_equal(read_window(near, grid.crs.to_epsg(), grid.affine, window), got)
    assert got.any() and not fetched
