"""Seconds per megapixel and peak memory as the scene grows; the graph of many items."""

from __future__ import annotations

import json
import statistics
from datetime import timedelta
from pathlib import Path
from typing import Any

import pystac
from rich.console import Console

from s2seg.pipeline import MapOptions, build_prediction, build_scene, plan_area
from s2seg.sources.radiometry import decide_offsets
from s2seg.sources.search import search
from tests.bench.fixtures import DATES, WORLD, fitted_network, inner_box, scene
from tests.bench.mapping import end_to_end, show
from tests.bench.measuring import fresh, spread, timed

ITEMS = 500


def measure(folder: Path, console: Console, quick: bool, full: bool = False) -> dict[str, Any]:
    """Run all measurements of ``scale``; returns the figures."""
    sizes = (1024, 2048) if quick else (2048, 4096, 10980, 21960) if full else (2048, 4096, 10980)
    model = fitted_network(folder, 20 if quick else 120).path
    rows = [
        end_to_end(scene(folder, size), size, model, folder, 3 if size <= 4096 and not quick else 1) for size in sizes
    ]
    show(rows, console)
    pace = [statistics.median(row["seconds"]) / row["mpx"] for row in rows]
    peaks = [row["peak_bytes"] for row in rows]
    planned = [row["peak_bytes"] / row["planned_bytes"] for row in rows]
    console.print(
        f"slowest over fastest, per megapixel: {max(pace) / min(pace):.2f} (goal 1.10); largest over smallest peak: "
        f"{max(peaks) / min(peaks):.2f}; peak over plan: {min(planned):.2f}-{max(planned):.2f} (goal 0.8-1.2)"
    )
    many = _many_items(folder, scene(folder, min(sizes[-1], 10980)))
    seconds, _ = fresh(_graph, many, inner_box(many), model)
    console.print(f"graph of {ITEMS} items: {spread(seconds)[0]} s ({spread(seconds)[1]}); goal: 1 s")
    return {"rows": rows, "graph_seconds": seconds}


def _many_items(folder: Path, catalog: Path) -> Path:
    """The one item of a scene, as if the satellite had passed every five days; an ItemCollection."""
    (item,) = search(catalog, WORLD, DATES)
    items = []
    for i in range(ITEMS):
        copy = item.full_copy()
        copy.datetime = item.datetime + timedelta(days=5 * i)
        copy.id = f"{item.id}-{i}"
        copy.properties["datetime"] = copy.datetime.isoformat().replace("+00:00", "Z")
        items.append(copy)
    path = folder / "many.json"
    path.write_text(json.dumps(pystac.ItemCollection(items).to_dict()))
    return path


def _graph(items: Path, box: tuple[float, float, float, float], model: str) -> list[float]:
    """Seconds from the plan to the lazy map, without the search."""
    plan = plan_area(items, box, DATES, model, MapOptions(check_offsets=False))
    offsets = decide_offsets(plan.items, check=False)
    return [timed(lambda: build_prediction(plan, build_scene(plan, offsets))) for _ in range(3)]
