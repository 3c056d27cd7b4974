from __future__ import annotations

import os

import pytest

from s2seg.sources import ranges, tiles
from s2seg.sources.ranges import RangeError, RemoteFile

KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("AWS_", "GDAL_HTTP_")):
            monkeypatch.delenv(name)
    ranges.forget_servers()


@pytest.mark.parametrize(
    "environment, bucket, expected",
    [
        ({}, "b", None),  # a profile or a role: GDAL finds it
        ({"AWS_PROFILE": "me"}, "b", None),
        (KEYS, "b", (False, "us-east-1", True, None)),
        ({**KEYS, "AWS_DEFAULT_REGION": "eu-central-1"}, "b", (False, "eu-central-1", True, None)),
        ({"AWS_NO_SIGN_REQUEST": "YES", "AWS_REGION": "us-west-2"}, "b.c", (True, "us-west-2", False, None)),
        ({**KEYS, "AWS_S3_ENDPOINT": "s3.test:9"}, "b", (False, "us-east-1", True, "https://b.s3.test:9")),
        (
            {**KEYS, "AWS_S3_ENDPOINT": "s3.test", "AWS_HTTPS": "NO", "AWS_VIRTUAL_HOSTING": "false"}, "b",
            (False, "us-east-1", False, "http://s3.test"),
        ),
    ],
)  # fmt: skip
def test_a_bucket_is_reached_as_gdal_would(
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    bucket: str,
    expected: tuple[bool, str, bool, str | None] | None,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    got = dict(ranges._s3_settings(bucket))
    names = ("skip_signature", "region", "virtual_hosted_style_request", "endpoint")
    assert got == ({k: v for k, v in zip(names, expected, strict=True) if v is not None} if expected else {})


@pytest.mark.skipif(not ranges.installed(), reason="obstore and deflate are not installed")
@pytest.mark.parametrize(
    "href, environment",
    [
        ("gs://bucket/a.tif", {}),
        ("/vsicurl/http://127.0.0.1:9/a.tif", {}),
        ("s3://bucket/a.tif", {}),
        ("http://me:secret@127.0.0.1:9/a.tif", {}),
        ("http://127.0.0.1:9/a%20b.tif", {}),
        ("http://127.0.0.1:9//a.tif", {}),
        ("http://127.0.0.1:9/a.jp2", {}),
        ("http://127.0.0.1:9/a/../b.tif", {}),
        ("http://127.0.0.1:9/a.tif", {"GDAL_HTTP_BEARER": "token"}),
        ("s3://bucket/a.tif", {**KEYS, "AWS_ENDPOINT_URL": "http://127.0.0.1:9"}),
    ],
)
def test_what_gdal_alone_can_reach_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, href: str, environment: dict[str, str]
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RangeError, match="is for GDAL"):
        RemoteFile(href).read([(0, 9)])
    assert tiles.tiles_of(href) is None


@pytest.mark.parametrize(
    "asked, joined",
    [
        ([(0, 9)], [(0, 9)]),
        ([(50, 60), (0, 9), (9, 50)], [(0, 60)]),
        ([(0, 9), (9 + ranges._GAP, 90_000), (200_000, 200_001)], [(0, 90_000), (200_000, 200_001)]),
        ([(0, 9), (10 + ranges._GAP, 90_000)], [(0, 9), (10 + ranges._GAP, 90_000)]),
    ],
)
def test_neighbours_are_asked_for_together(asked: list[ranges.Range], joined: list[ranges.Range]) -> None:
    assert ranges._joined(asked) == joined


def test_without_the_packages_gdal_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "installed", lambda: False)
    assert tiles.tiles_of("http://127.0.0.1:9/a.tif") is None
