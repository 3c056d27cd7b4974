"""Where scenes come from: a few catalogs by name, and any other by its URL or path."""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import url2pathname

from s2seg.errors import InputError, S2SegError

Kind = Literal["api", "static", "geoparquet", "items"]

_PARQUET = (".parquet", ".geoparquet")
_JSON = (".json", ".geojson")


class CatalogError(S2SegError):
    """A catalog cannot be read: a server that is down or refuses, a file that is broken.

    Parameters
    ----------
    url
        What was asked for.
    reason
        What went wrong, in one line.
    """

    def __init__(self, url: str, reason: str) -> None:
        super().__init__(url, reason)
        self.url, self.reason = url, reason

    def __str__(self) -> str:
        return f"cannot read catalog {self.url}: {self.reason}"


@dataclass(frozen=True)
class Catalog:
    """One source of STAC items.

    Parameters
    ----------
    name
        What messages call it.
    url
        The root of a STAC API, or the URL or path of a file.
    collection
        The collection that is searched unless another is asked for; None means all that a file has, or the
        Sentinel-2 Level-2A collection of an API.
    kind
        ``api``, ``static`` (a tree of JSON files), ``geoparquet`` or ``items`` (an ItemCollection or one item).
    sign
        Dotted path of a function that turns an asset's href into one that can be read. It is called inside the
        reading task, because what it returns expires.
    """

    name: str
    url: str
    collection: str | None = None
    kind: Kind = "api"
    sign: str | None = None


CATALOGS: dict[str, Catalog] = {
    catalog.name: catalog
    for catalog in (
        # also serves sentinel-2-c1-l2a (reprocessed, with the +1000) and sentinel-2-l1c
        Catalog("earth-search", "https://earth-search.aws.element84.com/v1", "sentinel-2-l2a"),
        Catalog(
            "planetary-computer",
            "https://planetarycomputer.microsoft.com/api/stac/v1",
            "sentinel-2-l2a",
            sign="planetary_computer.sign_url",
        ),
        Catalog("cdse", "https://stac.dataspace.copernicus.eu/v1", "sentinel-2-l2a"),
    )
}

SIGNERS: dict[str, str] = {"sentinel2l2a01.blob.core.windows.net": "planetary_computer.sign_url"}
"""Host of an asset -> dotted path of the function that signs its links.

The host decides, never a field of an item: what an item says must not choose which code runs. A search adds the hosts
of a Catalog that names its own function.
"""


def resolve_catalog(spec: str | Path | Catalog) -> Catalog:
    """Find a catalog by name, URL or path.

    Parameters
    ----------
    spec
        A key of `CATALOGS`; the URL of a STAC API; the URL or path of a ``catalog.json`` or ``collection.json``, of a
        stac-geoparquet file, or of an ItemCollection; a folder that holds a ``catalog.json``; or a Catalog. Paths may
        be ``file://`` URLs.

    Raises
    ------
    InputError
        If the name is unknown, or the path is missing or holds no STAC.
    """
    if isinstance(spec, Catalog):
        return spec
    text = str(spec).strip()
    if text in CATALOGS:
        return CATALOGS[text]
    if not text:
        raise InputError(f"the catalog is empty; give a name ({', '.join(CATALOGS)}), URL or path")
    if text.lower().startswith("file://"):
        return _local(url2pathname(urlsplit(text).path))
    return _remote(text) if "://" in text else _local(text)


@lru_cache
def load_signer(path: str) -> Callable[[str], str]:
    """Import a function that signs hrefs by its dotted path.

    Raises
    ------
    InputError
        If it cannot be imported.
    """
    module, _, function = path.rpartition(".")
    try:
        sign: Callable[[str], str] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is needed to sign links ({error}): pip install 's2seg[planetary]'") from None
    return sign


def _remote(url: str) -> Catalog:
    for sibling in CATALOGS.values():  # the same server under its URL keeps its collection and its signing
        if url.rstrip("/") == sibling.url:
            return sibling
    path = url.split("?", 1)[0].lower()
    if path.endswith(_PARQUET):
        return Catalog(url, url, kind="geoparquet")
    if not url.startswith(("http://", "https://")):
        raise InputError(f"catalog {url}: only http(s) URLs, paths and stac-geoparquet files can be read")
    if not _host(url):
        raise InputError(f"catalog {url} names no server; a URL such as {CATALOGS['earth-search'].url} is expected")
    # a .json may be a tree or an ItemCollection: the search looks at it when it has fetched it
    return Catalog(url, url, kind="static" if path.endswith(_JSON) else "api")


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:  # such as a bracket that is not closed
        return None


def _local(text: str) -> Catalog:
    path, found = Path(text), False
    with suppress(OSError, RuntimeError, ValueError):  # it is too long, of an unknown ~user, or no path at all
        path = path.expanduser()
        path = path / "catalog.json" if path.is_dir() else path
        found = path.is_file()
    if not found:
        raise InputError(_unknown(text if len(text) <= 200 else f"{text[:200]} ...", path))
    if path.suffix.lower() in _PARQUET:
        return Catalog(text, str(path), kind="geoparquet")
    return Catalog(text, str(path), kind=stac_kind(_load(path), str(path)))


def _load(path: Path) -> object:
    try:
        document: object = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"catalog {path} is not JSON ({error}); a STAC catalog is expected") from None
    except OSError as error:
        raise InputError(f"catalog {path} cannot be read: {error.strerror or error}") from None
    return document


def stac_kind(document: object, name: str) -> Kind:
    """Tell from its ``type`` whether a STAC document is a tree's root or a list of items.

    Raises
    ------
    InputError
        If it is neither.
    """
    kind = document.get("type") if isinstance(document, dict) else None
    if kind in ("FeatureCollection", "Feature"):
        return "items"
    if kind in ("Catalog", "Collection"):
        return "static"
    raise InputError(f"catalog {name} is not STAC: its type is {kind!r}, not Catalog, Collection or FeatureCollection")


def features_of(document: Mapping[str, Any], name: str) -> list[Any]:
    """List the items of an ItemCollection, or the one item that a document is; they may be anything.

    Raises
    ------
    CatalogError
        If it is an ItemCollection without a list of them.
    """
    if document.get("type") == "Feature":
        return [document]
    features = document.get("features")
    if not isinstance(features, list):
        raise CatalogError(name, "it is a FeatureCollection without a list of features")
    return features


def _unknown(text: str, path: Path) -> str:
    if "/" in text or path.suffix:
        return f"catalog {text}: there is no such file ({path.name}); give a name ({', '.join(CATALOGS)}), URL or path"
    near = difflib.get_close_matches(text.lower(), CATALOGS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown catalog {text!r}; known are {', '.join(CATALOGS)}, or give a URL or path{hint}"
