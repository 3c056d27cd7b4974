"""What a catalog holds, behind one interface: STAC APIs, trees of JSON files, stac-geoparquet, ItemCollections."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

import pystac
import pystac_client
import rustac
import shapely
from pystac.stac_io import DefaultStacIO
from pystac.utils import make_absolute_href
from pystac_client.errors import ClientTypeError
from pystac_client.exceptions import APIError
from pystac_client.stac_api_io import StacApiIO
from pystac_client.warnings import PystacClientWarning
from shapely.geometry import mapping
from shapely.geometry.base import BaseGeometry
from urllib3 import Retry

from s2seg.errors import InputError
from s2seg.sources.catalogs import Catalog, CatalogError, features_of, stac_kind
from s2seg.sources.footprints import footprint, outline
from s2seg.sources.intake import Intake
from s2seg.sources.item_checks import BROKEN
from s2seg.sources.items import sensing_time

Interval = tuple[datetime | None, datetime | None]

_PAGE = 100
_TIMEOUT = (10.0, 60.0)
_L2A = "sentinel-2-l2a"
_BYTE_ORDER_MARK = "\ufeff"
"""What editors on Windows begin a file with, and JSON does not know."""


class Holdings(Protocol):
    """What a search needs of a catalog."""

    intake: Intake
    """The account of the items that were parsed so far."""

    def find(self, area: BaseGeometry, interval: Interval, clouds: float | None = None, /) -> Iterator[pystac.Item]:
        """Yield the items that touch an area within an interval; `clouds`, in percent, is no more than a hint."""
        ...

    def extent(self) -> BaseGeometry | None:
        """Outline what is held, in lon/lat; None where that is unknown or nothing."""
        ...


@contextmanager
def open_holdings(catalog: Catalog, collection: str | None = None) -> Iterator[Holdings]:
    """Open a catalog for searching.

    Parameters
    ----------
    catalog
        Which one.
    collection
        Which of its collections; by default the catalog's own choice.

    Raises
    ------
    InputError
        If it has no such collection.
    CatalogError
        If it cannot be reached or read.
    """
    web = StacApiIO(timeout=_TIMEOUT, max_retries=_retries())
    try:
        with _readable(catalog.url):
            holdings = _open(catalog, collection or catalog.collection, web)
        yield holdings
    finally:
        web.session.close()


def _open(catalog: Catalog, collection: str | None, web: StacApiIO) -> Holdings:
    if catalog.kind == "geoparquet":
        return _listed(_read_parquet(catalog.url), catalog, collection)
    if catalog.kind == "api":
        client = _client(catalog.url, web)
        if client.conforms_to("ITEM_SEARCH") or client.get_single_link("search"):
            return _api(client, catalog, collection)
    reader = _Reader(web)
    document = json.loads(reader.read_text_from_href(catalog.url))
    # a URL that ends in .json was not looked into before
    if catalog.kind != "api" and stac_kind(document, catalog.url) == "items":
        return _listed(features_of(document, catalog.url), catalog, collection)
    root_type = pystac.Collection if document["type"] == "Collection" else pystac.Catalog
    return _tree(root_type.from_file(catalog.url, stac_io=reader), reader, catalog, collection)


@dataclass
class _Api:
    """A STAC API with item search."""

    client: pystac_client.Client
    collection: pystac.Collection
    intake: Intake

    def find(self, area: BaseGeometry, interval: Interval, clouds: float | None = None, /) -> Iterator[pystac.Item]:
        query = self.client.search(
            collections=[self.collection.id],
            intersects=mapping(area),
            datetime=None if interval == (None, None) else "/".join(map(_stamp, interval)),
            limit=_PAGE,
            **self._cloud_filter(clouds),
        )
        with _readable(self.intake.url):
            yield from _within(self.intake.items(query.items_as_dicts()), area, interval)

    def extent(self) -> BaseGeometry | None:
        with _readable(self.intake.url):
            return _union(outline(bbox) for bbox in self.collection.extent.spatial.bboxes)

    def _cloud_filter(self, clouds: float | None) -> dict[str, Any]:
        """Ask the server to leave cloudy items out, in the language that it says it speaks, or not at all."""
        if clouds is None:
            return {}
        if self.client.conforms_to("QUERY"):
            return {"query": {"eo:cloud_cover": {"lte": clouds}}}
        if self.client.conforms_to("FILTER"):
            condition = {"op": "<=", "args": [{"property": "eo:cloud_cover"}, clouds]}
            return {"filter": condition, "filter_lang": "cql2-json"}
        return {}


@dataclass
class _Tree:
    """A static catalog: JSON files that link to one another."""

    root: pystac.Catalog
    reader: _Reader
    collection: str | None
    intake: Intake
    known: dict[str, pystac.Item | None] = field(default_factory=dict)

    def find(self, area: BaseGeometry, interval: Interval, _clouds: float | None = None, /) -> Iterator[pystac.Item]:
        def open_to(node: pystac.Catalog) -> bool:
            return not isinstance(node, pystac.Collection) or _may_hold(node, area, interval)

        with _readable(self.intake.url):
            yield from _within(self._items(open_to), area, interval)

    def extent(self) -> BaseGeometry | None:
        with _readable(self.intake.url):
            stated = [node.extent.spatial.bboxes for node in self.collections() if self.collection in (None, node.id)]
            if stated:  # saves reading every item
                return _union(outline(bbox) for bboxes in stated for bbox in bboxes)
            return _union(map(footprint, self._items(_any_node)))

    def collections(self) -> Iterator[pystac.Collection]:
        return (node for node in _walk(self.root, _any_node, set()) if isinstance(node, pystac.Collection))

    def _items(self, enter: Callable[[pystac.Catalog], bool]) -> Iterator[pystac.Item]:
        for node in _walk(self.root, enter, set()):
            if self.collection in (None, node.id):
                yield from filter(None, map(self._item, node.get_item_links()))

    def _item(self, link: pystac.Link) -> pystac.Item | None:
        """Read an item, once."""
        href = link.get_absolute_href() or link.href
        if href not in self.known:
            try:
                document = self.reader.json_loads(self.reader.read_text_from_href(href))
            except (ValueError, RecursionError) as error:  # the first also where it is not text
                self.intake.refuse(href, f"it is not JSON ({_line(error)})")
                self.known[href] = None
            else:
                self.known[href] = self.intake.item(document, href)
        return self.known[href]


def _walk(
    node: pystac.Catalog, enter: Callable[[pystac.Catalog], bool], seen: set[str | None]
) -> Iterator[pystac.Catalog]:
    """Visit a catalog and those under it, each once: some lead back to where one was."""
    href = node.get_self_href()
    if href in seen or not enter(node):
        return
    seen.add(href)
    yield node
    for child in node.get_children():
        yield from _walk(child, enter, seen)


def _any_node(_: pystac.Catalog) -> bool:
    return True


@dataclass
class _Listed:
    """Items that are all at hand."""

    items: list[pystac.Item]
    intake: Intake

    def find(self, area: BaseGeometry, interval: Interval, _clouds: float | None = None, /) -> Iterator[pystac.Item]:
        return _within(self.items, area, interval)

    def extent(self) -> BaseGeometry | None:
        return _union(map(footprint, self.items))


def _api(client: pystac_client.Client, catalog: Catalog, wanted: str | None) -> _Api:
    if not client.conforms_to("ITEM_SEARCH"):
        client.add_conforms_to("ITEM_SEARCH")  # it has a search link, so it only forgot to say so
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PystacClientWarning)  # an API may list its collections as plain links
        found = client.get_collection(wanted) if wanted else None
        if found is None:
            known = {one.id: one for one in client.get_collections()}
            found = None if wanted else known.get(_L2A) or (next(iter(known.values())) if len(known) == 1 else None)
    if found is None:
        raise InputError(_no_collection(catalog, wanted, known))
    return _Api(client, found, Intake(catalog.url))


def _tree(root: pystac.Catalog, reader: _Reader, catalog: Catalog, wanted: str | None) -> _Tree:
    tree = _Tree(root, reader, wanted, Intake(catalog.url))
    if wanted is not None:
        known = [node.id for node in tree.collections()]
        if wanted not in known:
            raise InputError(_no_collection(catalog, wanted, known))
    return tree


def _listed(documents: Iterable[Any], catalog: Catalog, wanted: str | None) -> _Listed:
    intake = Intake(catalog.url)
    items = [_anchor(item, catalog.url) for item in intake.items(documents)]
    known = {item.collection_id for item in items if item.collection_id}
    if wanted is not None and wanted not in known and (items or not intake.broken):
        raise InputError(_no_collection(catalog, wanted, known))
    return _Listed([item for item in items if wanted in (None, item.collection_id)], intake)


def _anchor(item: pystac.Item, origin: str) -> pystac.Item:
    """Relative links of an item that does not say where it lives are relative to the file that it came in."""
    if item.get_self_href() is None:
        for asset in item.assets.values():
            asset.href = make_absolute_href(asset.href, origin)
    return item


def _no_collection(catalog: Catalog, wanted: str | None, known: Iterable[str]) -> str:
    names = sorted(known, key=lambda name: ("sentinel-2" not in name, name))
    listing = ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "") or "none"
    if wanted is None:
        return f"catalog {catalog.name} has several collections, choose one: {listing}"
    return f"catalog {catalog.name} has no collection {wanted!r}; it has {listing}"


def _within(items: Iterable[pystac.Item], area: BaseGeometry, interval: Interval) -> Iterator[pystac.Item]:
    """Keep what truly matches, whatever a server made of the question."""
    shapely.prepare(area)
    for item in items:
        time = sensing_time(item)
        if _meet(interval, (time, time)) and (covered := footprint(item)) is not None and area.intersects(covered):
            yield item


def _may_hold(collection: pystac.Collection, area: BaseGeometry, interval: Interval) -> bool:
    """Whether a collection's extents allow for items there and then; extents that say nothing allow for all."""
    outlines = _union(outline(bbox) for bbox in collection.extent.spatial.bboxes if bbox)
    if outlines is not None and not outlines.intersects(area):
        return False
    spans = [span for span in collection.extent.temporal.intervals if span]
    return not spans or any(_meet(interval, (span[0], span[1])) for span in spans)


def _meet(one: Interval, other: Interval) -> bool:
    def before(end: datetime | None, start: datetime | None) -> bool:
        return end is not None and start is not None and end < start

    return not before(one[1], other[0]) and not before(other[1], one[0])


def _union(outlines: Iterable[BaseGeometry | None]) -> BaseGeometry | None:
    found = [outline for outline in outlines if outline is not None]
    return shapely.union_all(found) if found else None


def _stamp(time: datetime | None) -> str:
    return ".." if time is None else time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _Reader(DefaultStacIO):
    """Reads a static catalog's files, with the retries and time limits of the API client for those on the web."""

    def __init__(self, web: StacApiIO) -> None:
        super().__init__()
        self.web = web

    def read_text_from_href(self, href: str) -> str:
        if href.startswith(("http://", "https://")):
            with _readable(href):
                return self.web.request(href).removeprefix(_BYTE_ORDER_MARK)
        try:
            return super().read_text_from_href(href).removeprefix(_BYTE_ORDER_MARK)
        except OSError as error:
            raise CatalogError(href, error.strerror or str(error)) from None


def _client(url: str, web: StacApiIO) -> pystac_client.Client:
    with _readable(url):
        return pystac_client.Client.from_file(url, stac_io=web)


def _read_parquet(url: str) -> list[Any]:
    # rustac's own search needs an extension that DuckDB downloads; a file that fits a laptop is read whole just as well
    try:
        return features_of(rustac.read_sync(url), url)
    except rustac.RustacError as error:
        raise CatalogError(url, _line(error)) from None


def _retries() -> Retry:
    return Retry(
        total=4,
        connect=2,
        backoff_factor=0.2,
        status_forcelist=(429, 502, 503, 504),
        allowed_methods=None,
        raise_on_status=False,
    )


@contextmanager
def _readable(url: str) -> Iterator[None]:
    """Turn what the STAC libraries raise on a broken catalog into one line that names it."""
    try:
        yield
    except (APIError, ClientTypeError, *BROKEN) as error:
        if isinstance(error.__cause__, CatalogError):  # pystac wraps what a link's file raised; that one names the file
            raise error.__cause__ from None
        if isinstance(error, APIError):
            status = getattr(error, "status_code", None)  # missing where no answer came at all
            raise CatalogError(url, f"HTTP {status}: {_line(error)}" if status else _line(error)) from error
        raise CatalogError(url, f"it is not valid STAC ({type(error).__name__}: {_line(error)})") from error


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]} ..."
