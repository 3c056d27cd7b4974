"""What a map is made of, in one word: tells whether it is up to date, and whether an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict

from shapely import to_wkt

from s2seg.models.runtimes import expected_session
from s2seg.pipeline.plan import Plan
from s2seg.sources.radiometry import Offset

_OTHERWISE = ("runtime", "device", "precision", "core", "check_offsets", "overwrite")
"""Options that change no pixel, or that count by what they come to: the session, the blocks, the offsets."""


def fingerprint(plan: Plan, offsets: Mapping[str, Offset], session: tuple[str, str, str] | None = None) -> str:
    """Sum up all that decides the pixels of a map: scenes, area, grid, blocks, model, runtime and options.

    Scenes count by their ids, links and offsets: pixels that change behind the same link go unnoticed.

    Parameters
    ----------
    plan
        What will be done.
    offsets
        Radiometric offsets by item id.
    session
        Runtime, device and precision of the network, where another process settles them; else what this one would take.

    Returns
    -------
    str
        A SHA-256 in hexadecimal.
    """
    options = asdict(plan.options)
    if session is None:
        session = expected_session(plan.model, plan.options.runtime, plan.options.device, plan.options.precision)
    made_of = {
        "items": [
            [item.id, offsets[item.id].subtract, [item.assets[b].href for b in plan.bands if b in item.assets]]
            for item in plan.items
        ],
        "aoi": to_wkt(plan.aoi),
        "grid": [str(plan.geobox.crs), list(plan.geobox.shape), list(plan.geobox.affine[:6])],
        "chunks": asdict(plan.chunks),
        "model": plan.model.sha256,
        "session": session,
        "options": {name: value for name, value in options.items() if name not in _OTHERWISE},
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
