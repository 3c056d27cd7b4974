"""What a map is made of, in one word: whether an earlier one is up to date, or an interrupted one can go on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shapely import to_wkt

from s2seg.models.runtimes import expected_session
from s2seg.pipeline.plan import Plan
from s2seg.sources.radiometry import Offset

_OTHERWISE = ("runtime", "device", "precision", "core", "check_offsets", "overwrite")
"""Options that change no pixel, or that count by what they come to: the session, the blocks, the offsets."""


def fingerprint(plan: Plan, offsets: Mapping[str, Offset]) -> str:
    """Sum up all that decides the pixels of a map: scenes, area, grid, blocks, model, runtime and options.

    Scenes count by their ids, links and offsets: pixels that change behind the same link go unnoticed.

    Parameters
    ----------
    plan
        What will be done.
    offsets
        Radiometric offsets by item id.

    Returns
    -------
    str
        A SHA-256 in hexadecimal.
    """
    options = asdict(plan.options)
    made_of = {
        "items": [
            [item.id, offsets[item.id].subtract, [item.assets[b].href for b in plan.bands if b in item.assets]]
            for item in plan.items
        ],
        "aoi": to_wkt(plan.aoi),
        "grid": [str(plan.geobox.crs), list(plan.geobox.shape), list(plan.geobox.affine[:6])],
        "chunks": asdict(plan.chunks),
        "model": plan.model.sha256,
        "session": expected_session(plan.model, plan.options.runtime, plan.options.device, plan.options.precision),
        "options": {name: value for name, value in options.items() if name not in _OTHERWISE},
    }
    return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()


def finished(folder: Path) -> dict[str, Any]:
    """Read the record of a run whose outputs are all there; empty if there is none."""
    path = folder / "run.json"
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        names = [made[kind] for made in record["maps"] for kind in ("land_cover", "item")]
    except (OSError, ValueError, KeyError, TypeError):  # none, or not one of ours
        return {}
    return record if all((folder / name).exists() for name in (*names, "land_cover.zarr", "quicklook.png")) else {}
