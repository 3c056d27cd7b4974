"""A map of three dates whose files lie elsewhere: whether reading goes on beside the network."""

from __future__ import annotations

import json
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import pystac
from rich.console import Console
from rich.table import Table

from s2seg.pipeline import MapOptions, build_prediction, build_scene, map_area, plan_area
from s2seg.sources.reader import close_files
from s2seg.sources.search import search
from s2seg.sources.stack import stack
from tests.bench.fixtures import BANDS, DATES, WORLD, inner_box, labelled_scene
from tests.bench.loopback import serving
from tests.bench.measuring import MEGA, fresh, spread, timed
from tests.bench.reading import drain, published

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Line:
    """What files come through: seconds by which every answer is late, bytes a second that all answers share."""

    name: str
    delay: float
    pace: float


LINE = Line("40 ms, 50 MB/s", 0.04, 50e6)
"""A good line, from another place than the archive's data centre."""


def measure(folder: Path, model: str, console: Console, size: int, repeats: int) -> dict[str, Any]:
    """Map a median of three dates over the line, beside its reading alone and its network alone."""
    (seconds, sent), _ = fresh(_over, LINE, labelled_scene(folder, size).catalog, model, folder / "afar", repeats)
    whole, read, network = (statistics.median(seconds[name]) for name in ("whole", "read", "network"))
    table = Table("line", "whole s", "min-max", "read", "network", "read MB/s", "whole / slower",
                  title=f"median of three dates from afar, {size} px")  # fmt: skip
    table.add_row(
        LINE.name, *spread(seconds["whole"]), f"{read:.2f}", f"{network:.2f}", f"{sent / MEGA / read:.0f}",
        f"{whole / max(read, network):.2f}",
    )  # fmt: skip
    console.print(table, "goal: the whole takes at most 1.15 times the slower of reading and network")
    return {"name": LINE.name, "seconds": seconds, "bytes": sent}


def _over(line: Line, catalog: Path, model: str, scratch: Path, repeats: int) -> tuple[dict[str, list[float]], int]:
    """Seconds of the whole and its parts, and the bytes that the last whole fetched."""
    box, files = inner_box(catalog), published(catalog, (*BANDS, "scl"))
    root = next(iter(files[0].values())).parents[1]
    seconds: dict[str, list[float]] = {"whole": [], "read": [], "network": []}
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    with dask.config.set(num_workers=None):  # as many threads as the plan wants
        near = plan_area(catalog, box, DATES, model, MapOptions())
        scene = build_scene(near).persist()
        classes = build_prediction(near, scene)
        classes.compute()
        for _ in range(repeats):
            with serving(root, line.delay, line.pace) as (address, _):
                seconds["read"].append(_read(_moved(catalog, files, address, scratch), box, model))
            with serving(root, line.delay, line.pace) as (address, traffic):
                seconds["whole"].append(_map(_moved(catalog, files, address, scratch), box, model, scratch / "map"))
            seconds["network"].append(timed(classes.compute))
    shutil.rmtree(scratch)
    return seconds, traffic.sent


def _read(items: Path, box: Box, model: str) -> float:
    """Seconds to read what the map reads, in its chunks and threads."""
    plan = plan_area(items, box, DATES, model, MapOptions())
    lazy = stack(plan.items, plan.padded, plan.bands, chunksize=plan.read_side)
    return timed(lambda: drain(lazy.data, plan.threads))


def _map(items: Path, box: Box, model: str, folder: Path) -> float:
    """Seconds from the catalog to the finished folder; no file is open yet."""
    close_files()
    return timed(lambda: map_area(items, box, DATES, model, folder, MapOptions(overwrite=True)))


def _moved(catalog: Path, files: list[dict[str, Path]], address: str, folder: Path) -> Path:
    """The items of a catalog with their files at an address."""
    items = search(catalog, WORLD, DATES)
    for item, bands in zip(items, files, strict=True):
        item.assets = {
            band: pystac.Asset(f"{address}/{file.parent.name}/{file.name}", extra_fields=item.assets[band].extra_fields)
            for band, file in bands.items()
        }
    path = folder / "items.json"
    path.write_text(json.dumps(pystac.ItemCollection(items).to_dict()))
    return path
