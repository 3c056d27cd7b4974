"""What an item must hold for the package to use it: each field that is read has its type checked here, and only here.

What is missing may be missing; what is there must be of the kind that the STAC specification and its extensions
(projection, raster, eo) give it. Numbers may be text, as some catalogs write them.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice
from math import isfinite
from typing import Any

import pystac
from pystac.utils import str_to_datetime

from s2seg.errors import InputError, S2SegWarning
from s2seg.sources.footprints import footprint

BROKEN = (pystac.STACError, pystac.STACTypeError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
"""What pystac raises on broken documents: beside its own errors whatever Python says where it stumbles."""

_NAMED = 3
"""How many of the items that are left out are named, each with its reason."""


class ItemError(InputError):
    """An item cannot be used.

    Parameters
    ----------
    item_id
        Which one: its id, or the path or URL of its file.
    reason
        What is wrong with it, in one line.
    """

    def __init__(self, item_id: str, reason: str) -> None:
        super().__init__(item_id, reason)
        self.item_id, self.reason = item_id, reason

    def __str__(self) -> str:
        return f"item {self.item_id} cannot be used: {self.reason}; mend its metadata, or leave it out"


def parse_item(document: Any, href: str | None = None) -> pystac.Item:
    """Read an item of which nothing is known.

    Parameters
    ----------
    document
        What came as JSON; it may be changed.
    href
        Where it came from, where its links are relative to that.

    Raises
    ------
    ItemError
        If it is not an item, does not say where it lies, or :func:`check_item` refuses it.
    """
    name = _name(document, href)
    if reason := _misshapen(document):
        raise ItemError(name, reason)
    try:
        item = pystac.Item.from_dict(document, href=href, preserve_dict=False)
    except BROKEN as error:
        raise ItemError(
            name, f"it is not valid STAC ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
    check_item(item)
    if footprint(item) is None:  # no question for a place would ever find it
        raise ItemError(name, "it has neither a geometry that can be read nor a bbox")
    return item


def check_item(item: pystac.Item) -> None:
    """Refuse an item with a field of a type that nothing can be made of.

    Raises
    ------
    ItemError
        For the first such field.
    """
    if reason := _misplaced(item.bbox) or next(_wrong(item), None):
        raise ItemError(item.id, reason)


def leave_out(broken: Mapping[str, str]) -> None:
    """Warn of items that are left out: of the first few by name, of the others by number.

    Parameters
    ----------
    broken
        Id -> what is wrong.
    """
    for name, reason in islice(broken.items(), _NAMED):
        warnings.warn(f"item {name} is left out: {reason}", S2SegWarning, stacklevel=3)
    if len(broken) > _NAMED:
        warnings.warn(f"{len(broken) - _NAMED} more broken items are left out", S2SegWarning, stacklevel=3)


def _name(document: Any, href: str | None) -> str:
    told = document.get("id") if isinstance(document, Mapping) else None
    if told is None or told == "":
        return href or f"without an id ({_shown(document)})"
    return str(told)


def _misshapen(document: Any) -> str | None:
    """Tell what is wrong with a document before anything can be made of it."""
    if not isinstance(document, Mapping):
        return f"it is {_shown(document)}, not a JSON object"
    if document.get("type") != "Feature":
        return f"its type is {_shown(document.get('type'))}, not 'Feature'"
    if not _is_text(document.get("id")):
        return f"its id is {_shown(document.get('id'))}, not text"
    for key in ("properties", "assets"):
        if not isinstance(document.get(key), Mapping):
            return f"its {key} are {_shown(document.get(key))}, not a JSON object"
    for key, kind in (("geometry", Mapping), ("collection", str)):
        if not isinstance(document.get(key), kind | None):
            return f"its {key} is {_shown(document[key])}"
    for key, asset in document["assets"].items():
        if not isinstance(asset, Mapping) or not _is_text(asset.get("href")):
            return f"its asset {key!r} has no href"
    properties = document["properties"]
    if not (properties.get("datetime") or (properties.get("start_datetime") and properties.get("end_datetime"))):
        return "it has no datetime"
    return next(_misfits(properties), None)


def _misplaced(bbox: Any) -> str | None:
    if not bbox or (_is_numbers(bbox, 4, 6) and all(isinstance(value, int | float) for value in bbox)):
        return None
    return f"its bbox is {_shown(bbox)}, not 4 or 6 numbers"


def _wrong(item: pystac.Item) -> Iterator[str]:
    yield from _misfits(item.properties)
    for key, asset in item.assets.items():
        where = f" (asset {key!r})"
        if not isinstance(asset.media_type, str | None) or not _is_texts(asset.roles or []):
            yield f"its type or roles are not text{where}"
        yield from _misfits(asset.extra_fields, where)
        for band in chain.from_iterable(asset.extra_fields.get(name) or [] for name in _BANDS):
            yield from _misfits(band, where)


def _misfits(fields: Mapping[str, Any], where: str = "") -> Iterator[str]:
    for name, (fits, expected) in _EXPECTED.items():
        value = fields.get(name)
        if value is not None and not fits(value):
            yield f"its {name}{where} is {_shown(value)}, not {expected}"


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:60]} ..."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)


def _is_number(value: Any) -> bool:
    try:
        return isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False


def _is_whole(value: Any) -> bool:
    return _is_number(value) and str(value).strip().lstrip("+-").isdigit()


def _is_numbers(value: Any, *sizes: int) -> bool:
    return isinstance(value, list | tuple) and len(value) in sizes and all(map(_is_number, value))


def _is_transform(value: Any) -> bool:
    if not _is_numbers(value, 6, 9):
        return False
    a, b, _, d, e, _ = map(float, value[:6])
    return a != 0 and a * e != b * d


def _is_shape(value: Any) -> bool:
    return _is_numbers(value, 2) and all(float(side) >= 1 and float(side).is_integer() for side in value)


def _is_objects(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(one, Mapping) for one in value)


def _is_time(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(str_to_datetime(value))
    except (ValueError, OverflowError):
        return False


_BANDS = ("eo:bands", "bands", "raster:bands")
_NUMBER, _OBJECTS = (_is_number, "a number"), (_is_objects, "a list of objects")
_EXPECTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("datetime", "start_datetime", "end_datetime"), (_is_time, "a time such as 2023-08-15T10:00:00Z")),
    **dict.fromkeys(_BANDS, _OBJECTS),
    **dict.fromkeys(("eo:cloud_cover", "gsd", "eo:center_wavelength", "center_wavelength"), _NUMBER),
    **dict.fromkeys(("spatial_resolution", "raster:spatial_resolution", "offset", "raster:offset"), _NUMBER),
    **dict.fromkeys(("s2:sequence", "sentinel:sequence"), (_is_whole, "a whole number")),
    "proj:transform": (_is_transform, "6 or 9 numbers with pixels of some size"),
    "proj:shape": (_is_shape, "two whole numbers above 0"),
    "proj:bbox": (lambda value: _is_numbers(value, 4), "4 numbers"),
}
"""Field of an item's properties, of an asset or of one of its bands -> whether a value fits, and what would."""
