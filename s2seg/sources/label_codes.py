"""What raster and vector labels share: which legend code a value stands for, and the grid's CRS."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from odc.geo.crs import CRS
from odc.geo.geobox import GeoBox

from s2seg.errors import InputError
from s2seg.legend import Legend

UNKNOWN = -1
_LISTED = 12


def code_table(legend: Legend, remap: Mapping[Any, Any] | None = None) -> dict[int | str, int]:
    """Say what each value means: the legend's own codes and names, then ``remap`` on top.

    Parameters
    ----------
    legend
        The target.
    remap
        Source value -> legend code, class name, or None to drop it (it becomes nodata).

    Returns
    -------
    dict
        Source value (int, or str for names) -> legend code.

    Raises
    ------
    InputError
        If ``remap`` points at something that the legend does not have.
    """
    own: dict[int | str, int] = dict(zip(legend.names, legend.codes, strict=True))
    own |= {code: code for code in (*legend.codes, legend.nodata)}
    return own | {plain(value): resolve(legend, target, f"remap {value!r}") for value, target in (remap or {}).items()}


def resolve(legend: Legend, target: Any, where: str) -> int:
    """Legend code of a code, a class name, or None (nodata).

    Raises
    ------
    InputError
        For anything else; it lists the legend.
    """
    if target is None:
        return legend.nodata
    if isinstance(target, int) and not isinstance(target, bool) and target in (*legend.codes, legend.nodata):
        return target
    if target in legend.names:
        return legend.codes[legend.names.index(target)]
    raise InputError(f"{where}: {target!r} is no code or name of {describe(legend)}; use null to drop the value")


def plain(value: Any) -> int | str:
    """Make values comparable: whole numbers are int, whether they come as text, NumPy's, or float (pandas' nulls)."""
    if isinstance(value, str):
        digits = value.strip().removeprefix("-")
        return int(value) if digits.isascii() and digits.isdigit() else value
    try:
        whole = int(value)
    except (TypeError, ValueError, OverflowError):
        return str(value)
    return whole if whole == value else str(value)


class UnknownLabelsError(InputError):
    """Labels hold values that nothing explains.

    Parameters
    ----------
    href
        The file.
    values
        The values, or colours packed as 0xrrggbb.
    legend
        What does not have them.
    what
        ``values`` or ``colors``.
    """

    def __init__(self, href: str, values: Collection[int | str], legend: Legend, what: str = "values") -> None:
        super().__init__(href, values, legend, what)
        self.href, self.values, self.legend, self.what = href, frozenset(values), legend, what

    def __str__(self) -> str:
        ordered = sorted(self.values, key=lambda value: (isinstance(value, str), value))
        more = f" and {len(ordered) - _LISTED} more" if len(ordered) > _LISTED else ""
        form, where = ("#{:06x}", "colors") if self.what == "colors" else ("{}", "remap")
        listed = ", ".join(map(form.format, ordered[:_LISTED])) + more
        return (
            f"labels {self.href}: {self.what} {listed} are not in {describe(self.legend)}; "
            f"add each to `{where}`, with a code or class name, or null to drop it"
        )


class Gathered:
    """Unknown labels of one piece after another, for one error that lists them all."""

    def __init__(self) -> None:
        self._error: UnknownLabelsError | None = None

    @contextmanager
    def piece(self) -> Iterator[None]:
        """Keep what a piece does not know, and go on after it."""
        try:
            yield
        except UnknownLabelsError as error:
            values = error.values | (self._error.values if self._error else frozenset())
            self._error = UnknownLabelsError(error.href, values, error.legend, error.what)

    def check(self) -> None:
        """Raise an UnknownLabelsError if there were any."""
        if self._error:
            raise self._error


def encode(pixels: npt.NDArray[Any], values: Mapping[int, int]) -> npt.NDArray[np.int16]:
    """Translate the integers of a mask, colours packed as 0xrrggbb, to legend codes, or to :data:`UNKNOWN`."""
    limits = np.iinfo(pixels.dtype)
    known = sorted(value for value in values if limits.min <= value <= limits.max)
    if not known:
        return np.full(pixels.shape, UNKNOWN, np.int16)
    keys = np.array(known, dtype=pixels.dtype)
    codes = np.array([values[value] for value in known], dtype=np.int16)
    if pixels.dtype in (np.uint8, np.uint16):
        table = np.full(limits.max + 1, UNKNOWN, dtype=np.int16)
        table[keys] = codes
        return table.take(pixels)
    at = np.minimum(np.searchsorted(keys, pixels), len(keys) - 1)
    return np.where(keys[at] == pixels, codes[at], np.int16(UNKNOWN))


def crs_of(geobox: GeoBox) -> CRS:
    """CRS of a grid.

    Raises
    ------
    InputError
        If it has none.
    """
    if geobox.crs is None:
        raise InputError("the grid for the labels needs a CRS")
    return geobox.crs


def describe(legend: Legend) -> str:
    """Name the legend and its classes in a few words."""
    listed = ", ".join(f"{c.code} {c.name}" for c in legend.classes[:_LISTED])
    return f"legend {legend.name!r} ({listed}{', ...' if len(legend) > _LISTED else ''})"
