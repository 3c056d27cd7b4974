"""Byte ranges of remote files through obstore: those of one read are asked for at once, neighbours in one request.

What obstore would do otherwise than GDAL is left to GDAL: other protocols than HTTP and S3, credentials that do not
stand in the environment, and whatever GDAL alone has been told of how to reach a server.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from datetime import timedelta
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from s2seg.sources.catalogs import load_signer

if TYPE_CHECKING:
    from obstore.store import HTTPStore, S3Store

RETRIES: dict[str, Any] = {
    "max_retries": 2,
    "backoff": {"init_backoff": timedelta(seconds=0.5), "max_backoff": timedelta(seconds=8), "base": 2},
    "retry_timeout": timedelta(seconds=60),
}
"""How obstore goes on after throttling (429), 5xx and connections that break; what fails after that, GDAL tries."""

_CLIENT: dict[str, Any] = {
    "allow_http": True,
    "connect_timeout": timedelta(seconds=20),
    "read_timeout": timedelta(seconds=30),
    "timeout": timedelta(minutes=5),  # of a whole answer; obstore's 30 s would be too few on a slow line
}

_GAP = 16_384
"""Ranges that lie no further apart, in bytes, are one request."""

_PATH = re.compile(r"[\w.+=@,:()-]+(/[\w.+=@,:()-]+)*\.tiff?", re.ASCII | re.IGNORECASE)
"""Paths of TIFFs that mean the same to everybody: obstore would encode others anew."""

_FOR_GDAL = (
    *(f"GDAL_HTTP_{name}" for name in ("AUTH", "USERPWD", "BEARER", "HEADERS", "HEADER_FILE", "COOKIE", "COOKIEFILE")),
    *(f"GDAL_HTTP_{name}" for name in ("PROXY", "HTTPS_PROXY", "PROXYUSERPWD", "UNSAFESSL", "SSLCERT", "CAPATH")),
)
"""Variables of the environment by which GDAL is told how to reach a server, and obstore is not."""

_FOR_OBSTORE = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT")
"""Variables by which obstore is told of another server for buckets, and GDAL is not."""

Range = tuple[int, int]
"""First byte, and the one after the last."""


class RangeError(OSError):
    """Ranges that cannot be had, or not what they should hold; GDAL has the last word."""


class RemoteFile:
    """A file elsewhere, of which ranges are read; several threads may.

    Parameters
    ----------
    href
        Its address, unsigned.
    sign
        Dotted path of the function that makes of the href a link that can be read, or None. A link is kept until it is
        refused.
    """

    def __init__(self, href: str, sign: str | None = None) -> None:
        self.href = href
        self._sign = load_signer(sign) if sign else None
        self._place: tuple[HTTPStore | S3Store, str] | None = None

    def read(self, ranges: Sequence[Range]) -> list[memoryview]:
        """Read the bytes of some ranges: fewer where the file ends.

        Raises
        ------
        RangeError
            If the server does not give them, or the href is one for GDAL.
        """
        from obstore.exceptions import BaseError, PermissionDeniedError

        try:
            try:
                return self._ask(ranges)
            except PermissionDeniedError:
                self._place = None
                if self._sign is None:
                    raise
                return self._ask(ranges)  # by a new link: the one before may have expired
        except (BaseError, OSError, ValueError) as error:
            raise RangeError(str(error)) from error

    def _ask(self, ranges: Sequence[Range]) -> list[memoryview]:
        from obstore import get_ranges

        place = self._place
        if place is None:
            place = self._place = _locate(self._sign(self.href) if self._sign else self.href)
        store, path = place
        spans = _joined(ranges)
        starts, ends = zip(*spans, strict=True)
        # obstore would join them itself (coalesce), but panics where a joined range goes beyond the end of the file
        parts = [memoryview(part) for part in get_ranges(store, path, starts=starts, ends=ends, coalesce=0)]
        return [
            part[start - first : end - first]
            for start, end in ranges
            for (first, last), part in zip(spans, parts, strict=True)
            if first <= start < last
        ]


def _joined(ranges: Sequence[Range]) -> list[Range]:
    """Make one of ranges between which there is little."""
    spans: list[Range] = []
    for start, end in sorted(ranges):
        if spans and start - spans[-1][1] <= _GAP:
            spans[-1] = spans[-1][0], max(end, spans[-1][1])
        else:
            spans.append((start, end))
    return spans


@cache
def installed() -> bool:
    """Whether the packages of the extra ``remote`` are here."""
    return all(find_spec(name) for name in ("obstore", "deflate"))


def usable() -> bool:
    """Whether this process can read ranges: not if it was forked from one that did, whose threads it lacks."""
    return installed() and _home() == os.getpid()


def forget_servers() -> None:
    """Connect anew, and look at the environment anew, when a file is read next."""
    _http.cache_clear()
    _s3.cache_clear()


@cache
def _home() -> int:
    return os.getpid()


# where a link leads


def _locate(link: str) -> tuple[HTTPStore | S3Store, str]:
    """Split a link into a server and a path there."""
    scheme, server, path, query, _ = urlsplit(link)
    path = path.removeprefix("/")
    if not _PATH.fullmatch(path) or {".", ".."} & set(path.split("/")) or any(map(os.environ.get, _FOR_GDAL)):
        raise RangeError(f"{link} is for GDAL")
    if scheme in ("http", "https") and "@" not in server:
        return _http(f"{scheme}://{server}/" + (f"?{query}" if query else "")), path
    if scheme == "s3" and (settings := _s3_settings(server)):
        return _s3(server, settings), path
    raise RangeError(f"{link} is for GDAL")


def _client() -> dict[str, Any]:
    """Options of a client, which trusts whom GDAL trusts."""
    bundle = os.environ.get("CURL_CA_BUNDLE") or os.environ.get("SSL_CERT_FILE")
    return {**_CLIENT, "root_certificate": Path(bundle).read_bytes()} if bundle else _CLIENT


@lru_cache(64)
def _http(root: str) -> HTTPStore:
    """Return the files of a server; a query, which may sign them all, is that of every request."""
    from obstore.store import HTTPStore

    return HTTPStore(root, client_options=_client(), retry_config=RETRIES)  # type: ignore[arg-type]


@lru_cache(64)
def _s3(bucket: str, settings: tuple[tuple[str, str | bool], ...]) -> S3Store:
    from obstore.store import S3Store

    return S3Store(bucket, client_options=_client(), retry_config=RETRIES, **dict(settings))  # type: ignore[arg-type]


def _s3_settings(bucket: str) -> tuple[tuple[str, str | bool], ...]:
    """Tell obstore what GDAL's variables of the environment say; nothing where credentials come from elsewhere."""
    given = os.environ.get
    unsigned = _is_on("AWS_NO_SIGN_REQUEST", "NO")
    if not unsigned and not (given("AWS_ACCESS_KEY_ID") and given("AWS_SECRET_ACCESS_KEY")):
        return ()  # a profile, or the role of a machine
    if any(map(given, _FOR_OBSTORE)):
        return ()
    hosted = _is_on("AWS_VIRTUAL_HOSTING", "YES") and "." not in bucket
    settings: dict[str, str | bool] = {
        "skip_signature": unsigned,
        "region": given("AWS_REGION") or given("AWS_DEFAULT_REGION") or "us-east-1",
        "virtual_hosted_style_request": hosted,
    }
    if endpoint := given("AWS_S3_ENDPOINT"):
        protocol = "https" if _is_on("AWS_HTTPS", "YES") else "http"
        host = endpoint.partition("://")[2] or endpoint
        settings["endpoint"] = f"{protocol}://{bucket}.{host}" if hosted else f"{protocol}://{host}"
    return tuple(settings.items())


def _is_on(variable: str, default: str) -> bool:
    return os.environ.get(variable, default).upper() in ("YES", "TRUE", "ON", "1")
