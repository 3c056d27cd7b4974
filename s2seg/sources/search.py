"""Which scenes cover an area at a time: one search for every kind of catalog, and an answer where there are none."""

from __future__ import annotations

import calendar
import datetime as dt
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pystac
import shapely
from shapely.geometry.base import BaseGeometry

from s2seg.errors import InputError, NoItemsError
from s2seg.sources.aoi import parse_aoi
from s2seg.sources.catalogs import SIGNERS, Catalog, resolve_catalog
from s2seg.sources.footprints import footprint
from s2seg.sources.holdings import Holdings, Interval, open_holdings
from s2seg.sources.items import baseline, cloud_cover, normalize_items, sensing_time, tile

_EXAMPLES = "such as 2023-08-01/2023-08-31, 2023-08, 2023 or ../2023-08-31"
_DATE = re.compile(r"(\d{4})(?:-(\d{2})(?:-(\d{2}))?)?", re.ASCII)
_INSTANT = re.compile(r"\d{4}-\d{2}-\d{2}[Tt]\d{2}:\d{2}.*", re.ASCII)
_ENOUGH = 100
"""How many items a diagnosis looks at per question."""

_NEARBY = (31, 366, None)


def search(
    catalog: str | Path | Catalog,
    aoi: str | Path | Sequence[float] | BaseGeometry | Mapping[str, Any],
    datetime: str,
    *,
    max_cloud_cover: float | None = None,
    collection: str | None = None,
    limit: int | None = None,
) -> list[pystac.Item]:
    """Find the Sentinel-2 scenes that cover an area at a time.

    Parameters
    ----------
    catalog
        A name (``earth-search``, ``planetary-computer``, ``cdse``), the URL of a STAC API, or the path or URL of a
        static catalog, a stac-geoparquet file or an ItemCollection.
    aoi
        The area, see `parse_aoi`.
    datetime
        As STAC writes it: a day, month or year, an instant, or two of them with ``/`` between; ``..`` leaves an
        end open.
    max_cloud_cover
        In percent. Items that do not tell their cloud cover are kept.
    collection
        Another collection than the catalog's usual one.
    limit
        Stop after so many matching items, in the catalog's order (for most APIs the newest first).

    Returns
    -------
    list of pystac.Item
        Normalised (see `normalize_items`), by time and then id.

    Raises
    ------
    InputError
        If an argument makes no sense, or the catalog has no such collection.
    NoItemsError
        If nothing matches; the text says what the catalog has instead.
    CatalogError
        If the catalog cannot be reached or read.
    """
    source = resolve_catalog(catalog)
    wanted = _Wanted(parse_aoi(aoi), parse_datetime(datetime), max_cloud_cover)
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise InputError(f"limit {limit!r} is not a number of items; give a whole number, at least 1")
    with open_holdings(source, collection) as holdings:
        found = _matching(holdings, wanted, limit)
        holdings.intake.report()
        if not found:
            raise NoItemsError(_diagnose(holdings, wanted, collection or source.collection, source.name, datetime))
    items = normalize_items(found)
    if source.sign is not None:
        hosts = {urlsplit(asset.href).netloc for item in items for asset in item.assets.values()}
        SIGNERS.update(dict.fromkeys(hosts - {"", *SIGNERS}, source.sign))  # local files have no host
    return items


def parse_datetime(text: str) -> tuple[dt.datetime | None, dt.datetime | None]:
    """Read a date range as STAC writes it.

    Parameters
    ----------
    text
        ``2023``, ``2023-08``, ``2023-08-15``, an RFC 3339 instant, or two of these with ``/`` between. ``..`` or
        nothing leaves an end open; the last day, month or year is part of the range.

    Returns
    -------
    tuple
        First and last instant in UTC, None where open.

    Raises
    ------
    InputError
        If it cannot be read, or ends before it begins.
    """
    if not isinstance(text, str):
        raise InputError(f"datetime {text!r} is not text; write it {_EXAMPLES}")
    ends = text.strip().split("/")
    if len(ends) > 2 or not any(ends):
        raise InputError(f"datetime {text!r} is not a date or a range of two; write it {_EXAMPLES}")
    start, end = _period(ends[0], text)[0], _period(ends[-1], text)[1]
    if start is not None and end is not None and start > end:
        raise InputError(f"datetime {text!r} runs backwards; write it {ends[1]}/{ends[0]}")
    return start, end


def coverage(item: pystac.Item, aoi: BaseGeometry) -> float:
    """Measure the share of an area, 0 to 1, that an item's footprint covers.

    Parameters
    ----------
    item
        An item with a geometry.
    aoi
        Area in lon/lat.
    """
    covered = footprint(item)
    if covered is None or aoi.is_empty:
        return 0.0
    return min(1.0, _area(covered.intersection(aoi)) / _area(aoi))


def describe(items: Iterable[pystac.Item], aoi: BaseGeometry) -> list[dict[str, Any]]:
    """Tabulate items for people: one row each, of plain values that JSON can hold.

    Parameters
    ----------
    items
        Items, normalised or not.
    aoi
        Area in lon/lat, for the coverage.

    Returns
    -------
    list of dict
        With ``id, datetime, cloud_cover, tile, coverage, platform, baseline``; None where an item does not tell.
    """
    return [
        {
            "id": item.id,
            "datetime": sensing_time(item).isoformat(timespec="seconds").replace("+00:00", "Z"),
            "cloud_cover": cloud_cover(item),
            "tile": tile(item),
            "coverage": round(coverage(item, aoi), 4),
            "platform": item.properties.get("platform"),
            "baseline": "{:02d}.{:02d}".format(*version) if (version := baseline(item)) else None,
        }
        for item in items
    ]


def _period(text: str, whole: str) -> Interval:
    """First and last instant of one end of a range."""
    text = text.strip()
    if text in ("", ".."):
        return None, None
    try:
        if match := _DATE.fullmatch(text):
            year, month, day = (int(part) if part else None for part in match.groups())
            first = dt.datetime(year or 0, month or 1, day or 1, tzinfo=dt.UTC)
            last_month = month or 12
            last_day = day or calendar.monthrange(first.year, last_month)[1]
            return first, dt.datetime(first.year, last_month, last_day, 23, 59, 59, 999999, tzinfo=dt.UTC)
        # Python knows more ways to write a day or a week, and would take them for their first instant
        if not _INSTANT.fullmatch(text):
            raise ValueError(f"{text!r} is neither a date nor a time")
        instant = dt.datetime.fromisoformat(text.upper())
    except ValueError as error:
        raise InputError(f"datetime {whole!r} cannot be read ({error}); write it {_EXAMPLES}") from None
    instant = instant.replace(tzinfo=dt.UTC) if instant.tzinfo is None else instant.astimezone(dt.UTC)
    return instant, instant


@dataclass(frozen=True)
class _Wanted:
    """What was asked for."""

    area: BaseGeometry
    interval: Interval
    clouds: float | None

    def __post_init__(self) -> None:
        if self.clouds is not None and not 0 <= self.clouds <= 100:
            raise InputError(f"max_cloud_cover {self.clouds:g} is not a percentage; give 0 to 100")

    def clear(self, item: pystac.Item) -> bool:
        clouds = cloud_cover(item)
        return self.clouds is None or clouds is None or clouds <= self.clouds


def _matching(holdings: Holdings, wanted: _Wanted, limit: int | None) -> list[pystac.Item]:
    # a server that does not know a cloud filter may answer it with nothing: then ask again without
    for clouds in dict.fromkeys((wanted.clouds, None)):
        candidates = holdings.find(wanted.area, wanted.interval, clouds)
        if found := list(islice(filter(wanted.clear, candidates), limit)):
            return found
    return []


def _diagnose(holdings: Holdings, wanted: _Wanted, collection: str | None, name: str, when: str) -> str:
    """Say in one line what the catalog holds instead, with a bounded number of questions."""
    where = f"catalog {name}" + (f" (collection {collection})" if collection else "")
    cloudy = list(islice(holdings.find(wanted.area, wanted.interval), _ENOUGH))
    if cloudy:
        return _too_cloudy(cloudy, wanted, where, when)
    others = list(islice(holdings.find(wanted.area, (None, None)), _ENOUGH + 1))
    if others:
        return _other_dates(others, holdings, wanted, where, when)
    return _elsewhere(holdings, wanted, where)


def _too_cloudy(items: list[pystac.Item], wanted: _Wanted, where: str, when: str) -> str:
    clearest = min(items, key=lambda item: cloud_cover(item) or 0.0)
    subject = "the only item is" if len(items) == 1 else f"all {len(items)}{_more(items)} items are"
    return (
        f"{subject} cloudier than {wanted.clouds:g} % in {where}, {when} (the clearest has "
        f"{cloud_cover(clearest):g} %, on {_day(clearest)}); raise max_cloud_cover or widen the dates"
    )


def _other_dates(items: list[pystac.Item], holdings: Holdings, wanted: _Wanted, where: str, when: str) -> str:
    start, end = wanted.interval
    if len(items) > _ENOUGH:  # too many to have seen them all: ask for those around the dates
        items = [*_around(holdings, wanted, start, before=True), *_around(holdings, wanted, end, before=False)] or items
        count = f"more than {_ENOUGH} do"
    else:
        count = f"{len(items)} {'does' if len(items) == 1 else 'do'}"
    before = [item for item in items if start is not None and sensing_time(item) < start]
    after = [item for item in items if end is not None and sensing_time(item) > end]
    nearest = [_day(max(before, key=sensing_time))] if before else []
    nearest += [_day(min(after, key=sensing_time))] if after else []
    return f"no item covers the aoi in {where}, {when}; at other dates {count}, nearest {' and '.join(nearest)}"


def _around(holdings: Holdings, wanted: _Wanted, edge: dt.datetime | None, *, before: bool) -> list[pystac.Item]:
    """Items on one side of the dates, from the narrowest window that has any."""
    if edge is None:
        return []
    for days in _NEARBY:
        far = None if days is None else edge + dt.timedelta(days=-days if before else days)
        window = (far, edge) if before else (edge, far)
        if found := list(islice(holdings.find(wanted.area, window), _ENOUGH)):
            return found
    return []


def _elsewhere(holdings: Holdings, wanted: _Wanted, where: str) -> str:
    held = holdings.extent()
    if held is None or held.is_empty:
        return f"{where} holds no items"
    swapped = shapely.transform(wanted.area, lambda xy: xy[:, ::-1])
    in_degrees = max(map(abs, swapped.bounds[1::2])) <= 90
    found = in_degrees and next(holdings.find(swapped, (None, None)), None)
    hint = "; with lat and lon swapped something does: west,south,east,north is expected" if found else ""
    return f"nothing in {where} covers the aoi ({_extent(wanted.area)}); it covers {_extent(held)}{hint}"


def _extent(geometry: BaseGeometry) -> str:
    west, south, east, north = geometry.bounds
    return f"lon {west:.4g} to {east:.4g}, lat {south:.4g} to {north:.4g}"


def _day(item: pystac.Item) -> str:
    return sensing_time(item).date().isoformat()


def _more(items: list[pystac.Item]) -> str:
    return "+" if len(items) >= _ENOUGH else ""


def _area(geometry: BaseGeometry) -> float:
    """Area up to a constant: (lon, sin lat) is Lambert's cylindrical equal-area projection of the sphere."""
    flat = shapely.transform(geometry, lambda xy: np.column_stack((np.radians(xy[:, 0]), np.sin(np.radians(xy[:, 1])))))
    return float(flat.area)
