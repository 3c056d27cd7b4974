"""The +1000: which scenes carry it, and how it is taken off.

From processing baseline 04.00 on (January 2022, and every older scene that was processed again since) ESA adds 1000
to the digital numbers of Level-1C and Level-2A, so that reflectance = (DN - 1000) / 10000. Some catalogs take it off
again. One rule decides from what an item says; where that is known to err, a cheap look at the pixels decides.

The scene classification (scl) holds codes and is never touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pystac
import rasterio
from rasterio.errors import RasterioError

from s2seg.errors import ReadError, S2SegWarning
from s2seg.sources.catalogs import load_signer
from s2seg.sources.items import baseline, cloud_cover, sign_path
from s2seg.sources.stamps import stamp

ADDED = 1000
"""What processing baselines from 04.00 on add to digital numbers (ESA's ``BOA_ADD_OFFSET``, ``RADIO_ADD_OFFSET``)."""

_FIRST_WITH_OFFSET = (4, 0)
_FLAGS = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")
_VISIBLE = ("red", "green", "blue")

# What the pixels can tell, from the 1st percentile of the valid DN of red (of green or blue where there is no red):
#
# - Below 900 nothing was added: with the +1000, 1 % of the pixels would have reflectances under -0.01. Scenes without
#   it lie far below: 84 to 245 on the ten Slovenian ones (up to 71 % cloud), 196 and 152 on Mekong and Alberta, 88 to
#   834 on the three labelled places. Averaging, as in overviews, does not move this.
# - From 1000 to 2000 it was added, unless cloud hides the ground. Hazy Congo, which has it, is at 1865. The full scenes
#   without it never lie there; cut into windows of 228 px 1 in 238 does, of 64 px 26 in 2914, all but one of these in
#   scenes of 50 % cloud or more. Of 54 Flemish dates with at least 80 % cloud, none of which has it, 14 lie in this
#   band, of the 58 with less than half none: so under cloud the band means nothing.
# - Deserts, snow and cloud lie above 2000 with it or without. There and in between, the rule stands.
_LOW_PERCENTILE = 1.0
_CERTAINLY_PLAIN = 900
_PLAUSIBLY_ADDED = (1000, 2000)
_MOST_CLOUD = 50.0
_LEAST_PIXELS = 500

_LOOK_SIZE = 256
_LOOK_THREADS = 4


@dataclass(frozen=True)
class Offset:
    """What to take off an item's valid digital numbers so that reflectance = DN / 10000.

    Parameters
    ----------
    subtract
        0 or 1000.
    reason
        Why, in one line.
    checked
        Whether the pixels confirmed it, or overruled what the item says.
    """

    subtract: int
    reason: str
    checked: bool = False


def offset_by_rule(item: pystac.Item) -> Offset:
    """Decide from an item's metadata alone what must be subtracted.

    A catalog's flag that it has subtracted already counts for more than the declared ``raster:bands`` offset, which
    Earth Search leaves at -0.1 on such items; the processing baseline counts for more than the date, because old scenes
    were processed again.

    Parameters
    ----------
    item
        A Sentinel-2 item.
    """
    version, (flag, applied) = baseline(item), _flag(item)
    if applied:
        return Offset(0, f"{flag} is true: the catalog has subtracted {ADDED} already")
    if version is None:
        declared = _declares_offset(item)
        says = "an offset of -0.1 is declared" if declared else "no offset is declared"
        return Offset(ADDED if declared else 0, f"unsure: the processing baseline is unknown, {says}")
    number = f"processing baseline {version[0]:02d}.{version[1]:02d}"
    if version >= _FIRST_WITH_OFFSET:
        unless = f" and {flag} is false" if flag else ""
        return Offset(ADDED, f"{number} adds {ADDED}{unless}")
    return Offset(0, f"{number} adds nothing")


def decide_offsets(items: Iterable[pystac.Item], *, check: bool = True) -> dict[str, Offset]:
    """Decide for each item what must be subtracted, and look at the pixels where the metadata are known to err.

    Those are Earth Search's flag ``boa_offset_applied`` at baseline 04.00 and later (false on some scenes from which
    1000 was subtracted: its issues 66 and 71), and items whose baseline is unknown. The look is one decimated read of
    one visible band, kept until the file changes. Where it contradicts the rule, the pixels win, with a warning.

    Parameters
    ----------
    items
        Normalised items.
    check
        False trusts the metadata and reads nothing.

    Returns
    -------
    dict
        Offset by item id.

    Raises
    ------
    ReadError
        If a look fails.
    """
    known = list(items)
    offsets = {item.id: offset_by_rule(item) for item in known}
    doubtful = [item for item in known if check and _may_err(item)]
    if doubtful:
        with ThreadPoolExecutor(_LOOK_THREADS) as pool:
            looks = list(pool.map(_look_at, doubtful))
        for item, look in zip(doubtful, looks, strict=True):
            offsets[item.id] = _weigh(item, offsets[item.id], look)
    return offsets


def forget_looks() -> None:
    """Forget what the pixels looked like, for files that are replaced."""
    _low_percentile.cache_clear()


def harmonize(dn: npt.NDArray[np.uint16], subtract: int) -> npt.NDArray[np.uint16]:
    """Take an offset off valid pixels: nodata 0 stays 0, and what would fall to 0 or below becomes 1.

    Parameters
    ----------
    dn
        Digital numbers, uint16, of any shape, nodata 0. They are not changed.
    subtract
        What to take off, such as `Offset.subtract`; 0 returns `dn` itself.

    Returns
    -------
    numpy.ndarray
        uint16 of the same shape; reflectance = value / 10000.
    """
    if dn.dtype != np.uint16:
        raise TypeError(f"digital numbers are uint16, not {dn.dtype}")
    if subtract == 0:
        return dn
    amount = np.uint16(subtract)
    plain = np.maximum(dn, amount)
    plain -= amount
    # min(dn, 1) is 0 on nodata and 1 on pixels, which is their floor
    return np.maximum(plain, np.minimum(dn, np.uint16(1)), out=plain)


def _flag(item: pystac.Item) -> tuple[str | None, bool]:
    for name in _FLAGS:
        if item.properties.get(name) is not None:
            return name, bool(item.properties[name])
    return None, False


def _declares_offset(item: pystac.Item) -> bool:
    for asset in (item.assets[band] for band in _VISIBLE if band in item.assets):
        bands: Sequence[dict[str, Any]] = (
            asset.extra_fields.get("raster:bands") or asset.extra_fields.get("bands") or [{}]
        )
        offset = bands[0].get("offset", bands[0].get("raster:offset", asset.extra_fields.get("raster:offset")))
        if offset is not None:
            return float(offset) < 0
    return False


def _may_err(item: pystac.Item) -> bool:
    version = baseline(item)
    if version is None:
        return True
    return _flag(item)[0] is not None and version >= _FIRST_WITH_OFFSET


@dataclass(frozen=True)
class _Look:
    band: str
    pixels: int
    low: float

    def found(self, clouds: float | None) -> int | None:
        """Tell from the pixels what was added; None where they cannot say."""
        if self.pixels < _LEAST_PIXELS:
            return None
        if self.low < _CERTAINLY_PLAIN:
            return 0
        clear = clouds is not None and clouds < _MOST_CLOUD
        return ADDED if clear and _PLAUSIBLY_ADDED[0] <= self.low < _PLAUSIBLY_ADDED[1] else None


def _look_at(item: pystac.Item) -> _Look | None:
    band = next((band for band in _VISIBLE if band in item.assets), None)
    if band is None:
        return None
    href = item.assets[band].href
    try:
        pixels, low = _low_percentile(href, sign_path(item), stamp(href))
    except (RasterioError, OSError) as error:
        raise ReadError(item.id, band, href, " ".join(str(error).split())) from error
    return _Look(band, pixels, low)


@lru_cache(maxsize=4096)
def _low_percentile(href: str, sign: str | None, _stamp: tuple[int, int] | None) -> tuple[int, float]:
    """How many valid pixels a decimated read finds, and their low percentile."""
    with (
        rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR", GDAL_HTTP_MAX_RETRY=3, GDAL_HTTP_RETRY_DELAY=1),
        rasterio.open(load_signer(sign)(href) if sign else href) as source,
    ):
        dn = source.read(1, out_shape=(min(source.height, _LOOK_SIZE), min(source.width, _LOOK_SIZE)))
    valid = dn[dn > 0]
    return valid.size, float(np.percentile(valid, _LOW_PERCENTILE)) if valid.size else 0.0


def _weigh(item: pystac.Item, rule: Offset, look: _Look | None) -> Offset:
    found = look.found(cloud_cover(item)) if look else None
    if look is None or found is None:
        return Offset(rule.subtract, f"{rule.reason}; the pixels cannot tell")
    seen = f"{_LOW_PERCENTILE:g} % of the pixels in {look.band} lie below {look.low:.0f}"
    if found == rule.subtract:
        return Offset(rule.subtract, f"{rule.reason}; confirmed: {seen}", checked=True)
    warnings.warn(
        f"item {item.id}: its metadata mean that {rule.subtract} must be subtracted ({rule.reason}), but {seen}; "
        f"{found} is subtracted",
        S2SegWarning,
        stacklevel=3,
    )
    return Offset(found, f"{rule.reason}; overruled by the pixels: {seen}", checked=True)
