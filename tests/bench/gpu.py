"""The whole chain beside the bare network, in bfloat16 on a GPU; needs one."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from s2seg.inference import chunks_for
from s2seg.models import load_model, open_session
from s2seg.pipeline import MapOptions, map_area
from s2seg.sources.composite import CompositeSpec
from tests.bench.fixtures import DATES, fitted_network, inner_box, piece, scene
from tests.bench.measuring import MEGA, fresh, gib, spread, timed

WAY = {"runtime": "torch", "device": "cuda", "precision": "bfloat16"}
CLASS = frozenset({"class"})


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``gpu``; returns the figures."""
    import torch

    if not torch.cuda.is_available():
        console.print("gpu: no GPU here: not measured")
        return {}
    size, repeats = (1024, 1) if quick else (10980, 3)
    model, catalog = fitted_network(folder, 20 if quick else 120).path, scene(folder, size)
    bare, _ = fresh(_network_alone, catalog, model)
    speeds, peak = fresh(_chain, catalog, model, folder / "gpu", repeats)
    name = torch.cuda.get_device_name()
    table = Table("", "Mpx/s", "min-max", "of the network", "peak GiB (host)", title=f"{name}, {size} px, bfloat16")
    table.add_row("network alone, in memory", *spread(bare, 1), "", "")
    share = statistics.median(speeds) / statistics.median(bare)
    table.add_row("s2seg map, local files", *spread(speeds, 1), f"{share:.2f}", gib(peak))
    console.print(table, "goal: 0.8")
    return {"card": name, "size": size, "network_mpx_s": bare, "map_mpx_s": speeds, "peak_bytes": peak}


def _network_alone(catalog: Path, model: str) -> list[float]:
    """Mpx/s of the default's windows, numbers in, classes out."""
    bundle = load_model(model)
    session, window = open_session(bundle, **WAY), min(chunks_for(bundle).window, 1024)
    pixels = piece(catalog, window).values[None]
    session.classify(pixels, 0, CLASS)
    return [window**2 / MEGA / timed(lambda: session.classify(pixels, 0, CLASS)) for _ in range(20)]


def _chain(catalog: Path, model: str, output: Path, repeats: int) -> list[float]:
    """Mpx/s of ``map_area``, after a first map that sets everything up."""
    options = MapOptions(composite=CompositeSpec(mask=()), overwrite=True, **WAY)
    box = inner_box(catalog)
    shape = map_area(catalog, box, DATES, model, output, options).record["grid"]["shape"]
    amount = shape[0] * shape[1] / MEGA
    return [amount / timed(lambda: map_area(catalog, box, DATES, model, output, options)) for _ in range(repeats)]
