"""The whole chain beside the bare network, in bfloat16 on a GPU; needs one."""

from __future__ import annotations

import os
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask
import numpy as np
from rich.console import Console
from rich.table import Table

from s2seg.models import load_model, open_session
from s2seg.pipeline import MapOptions, map_area, plan_area
from s2seg.sources.composite import CompositeSpec
from tests.bench.fixtures import DATES, fitted_network, inner_box, scene
from tests.bench.mapping import window_of
from tests.bench.measuring import MEGA, fresh, gib, spread, timed

WAY = {"runtime": "torch", "device": "cuda", "precision": "bfloat16"}
CLASS = frozenset({"class"})
CALLS = 20
SAMPLE = 0.2
"""Seconds between two looks at how busy the GPU is."""


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``gpu``; returns the figures."""
    import torch

    if not torch.cuda.is_available():
        console.print("gpu: no GPU here: not measured")
        return {}
    size, repeats = (2048, 1) if quick else (10980, 3)
    model, catalog = fitted_network(folder, 20 if quick else 120).path, scene(folder, size)
    (windows, bare), _ = fresh(_network_alone, catalog, model)
    (speeds, busy), peak = fresh(_chain, catalog, model, folder / "gpu", repeats)
    name = torch.cuda.get_device_name()
    columns = ("", "Mpx/s", "min-max", "of the network", "GPU busy %", "peak GiB (host)")
    table = Table(*columns, title=f"{name}, {size} px, bfloat16")
    table.add_row(f"network alone, in memory, {windows}", *spread(bare, 1), "", "", "")
    share = statistics.median(speeds) / statistics.median(bare)
    said = f"{statistics.mean(busy):.0f}" if busy else "-"
    table.add_row("s2seg map, local files", *spread(speeds, 1), f"{share:.2f}", said, gib(peak))
    console.print(table, "goals: 0.8 of the network, GPU busy 90 %; the network alone answers all of a window, while "
                         "the map's own leaves out part of the margin's work")  # fmt: skip
    return {
        "card": name, "size": size, "windows": windows, "network_mpx_s": bare, "map_mpx_s": speeds,
        "busy_percent": busy, "peak_bytes": peak,
    }  # fmt: skip


def _network_alone(catalog: Path, model: str) -> tuple[str, list[float]]:
    """The windows that a map takes, and Mpx/s, numbers in and classes out, as many at a time as the session likes."""
    bundle = load_model(model)
    session, (height, width) = open_session(bundle, **WAY), _window(catalog, model)
    count = session.batch(height, width)
    pixels = np.concatenate([window_of(catalog, (height, width))] * count)

    def rounds() -> None:
        with ThreadPoolExecutor(session.parallel) as pool:
            list(pool.map(lambda _: session.classify(pixels, 0, CLASS), range(CALLS)))

    rounds()
    amount = CALLS * count * height * width / MEGA
    return f"{count} x {height} x {width} px", [amount / timed(rounds) for _ in range(5)]


def _window(catalog: Path, model: str) -> tuple[int, int]:
    """Pixels (down, across) that the network sees at once when the scene is mapped."""
    height, width = plan_area(catalog, inner_box(catalog), DATES, model, _options()).chunks.window
    return height, width


def _options() -> MapOptions:
    return MapOptions(composite=CompositeSpec(mask=()), overwrite=True, **WAY)


def _chain(catalog: Path, model: str, output: Path, repeats: int) -> tuple[list[float], list[float]]:
    """Mpx/s of ``map_area``, after a first map that sets everything up, and how busy the GPU was, in per cent."""
    box, options = inner_box(catalog), _options()
    with dask.config.set(num_workers=os.cpu_count()):  # a GPU wants more readers than the other suites have
        shape = map_area(catalog, box, DATES, model, output, options).record["grid"]["shape"]
        amount = shape[0] * shape[1] / MEGA
        with _watching() as busy:
            speeds = [
                amount / timed(lambda: map_area(catalog, box, DATES, model, output, options)) for _ in range(repeats)
            ]
    return speeds, busy


@contextmanager
def _watching() -> Iterator[list[float]]:
    """Fill a list with the share of time, in per cent, in which a kernel ran; it stays empty without nvidia-smi."""
    import torch

    busy: list[float] = []
    card = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
    ask = ["nvidia-smi", card, "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    with tempfile.TemporaryFile("w+") as said:
        try:
            watcher = subprocess.Popen([*ask, f"--loop-ms={SAMPLE * 1000:.0f}"], stdout=said)
        except FileNotFoundError:
            yield busy
            return
        try:
            yield busy
        finally:
            watcher.terminate()
            watcher.wait()
            said.seek(0)
            busy += [float(line) for line in said if line.strip().isdecimal()]
