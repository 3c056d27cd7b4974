"""Sentinel-2 without Sentinel-2: regions whose land cover is known, and scenes whose pixels say where they are.

For tests of s2seg, for the demo, and for tests of whatever is built on s2seg. Nothing here touches the network.
"""

from s2seg.testing.catalog import (
    SyntheticRegion,
    position_pixels,
    position_scene,
    synthetic_catalog,
    synthetic_item,
    write_asset,
)
from s2seg.testing.landscape import LEGEND

__all__ = [
    "LEGEND",
    "SyntheticRegion",
    "position_pixels",
    "position_scene",
    "synthetic_catalog",
    "synthetic_item",
    "write_asset",
]
