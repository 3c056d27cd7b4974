"""How things are measured: in a process of their own, several times, against figures that were kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dask
from rich.console import Console
from rich.table import Table

THREADS = 2
GIB = 2**30
MEGA = 1e6

SINGLE = (
    "agreement", "bytes", "first_seconds", "network_pixels", "overlap_cost", "overlap_time", "requests", "same",
    "seam_error",
)  # fmt: skip
"""Figures that were measured, though they are one number each; peaks of memory are, too."""


def machine() -> str:
    """Processor, cores, GPU and Python, in a line; the GPU only where torch is loaded, which takes seconds."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = name[1] if name else platform.machine()
    torch = sys.modules.get("torch")
    card = f", {torch.cuda.get_device_name()}" if torch is not None and torch.cuda.is_available() else ""
    return f"{os.cpu_count()} cores, {processor}{card}, {platform.system()}, Python {platform.python_version()}"


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process, so that its peak memory is its own; returns (result, peak bytes)."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_with_peak, function, arguments).result()


def _with_peak(function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, int]:
    with dask.config.set(scheduler="threads", num_workers=THREADS):
        result = function(*arguments)
    return result, peak_memory()


def peak_memory() -> int:
    """Bytes that this process held at most so far; 0 where the system does not say."""
    # not getrusage: its maximum begins with what the parent had when it started this process
    status = Path("/proc/self/status")
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(peak[1]) * 1024 if peak else 0


def timed(way: Callable[[], Any]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    way()
    return time.perf_counter() - start


def rounds(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, turn by turn, so that what disturbs the machine disturbs them all."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            seconds[name].append(timed(way))
    return seconds


def spread(values: Sequence[float], digits: int = 2) -> tuple[str, str]:
    """Cells of a table: the median, and least to greatest."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f}", f"{low:.{digits}f}-{high:.{digits}f}"


def gib(count: float) -> str:
    """Cell of a table: bytes as GiB."""
    return f"{count / GIB:.2f}"


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


# figures that are kept: {suite: {"when", "machine", "took_seconds", "figures"}}


def keep(file: Path, suite: str, figures: dict[str, Any], took: float) -> None:
    """Put a suite's figures, and the seconds that it took, into the file, beside those of other suites."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[suite] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "took_seconds": round(took, 1),
        "figures": figures,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=2) + "\n")


def compare(suite: str, now: dict[str, Any], then: dict[str, Any], console: Console) -> None:
    """Print what was measured, now and in a kept run; whether more is better is for the reader to say."""
    if suite not in then:
        console.print(f"{suite}: not in the kept run")
        return
    # through JSON, so that both have gone the same way
    before, after = (dict(samples(json.loads(json.dumps(f)))) for f in (then[suite]["figures"], now))
    table = Table("measured", "then", "now", "now / then", title=f"{suite}, against {then[suite]['when']}")
    for name in after:
        if name in before:
            ratio = f"{after[name] / before[name]:.2f}" if before[name] else ""
            table.add_row(name, f"{before[name]:.4g}", f"{after[name]:.4g}", ratio)
    console.print(table)
    if then[suite]["machine"] != machine():
        console.print(f"[bold]another machine then[/]: {then[suite]['machine']}")


def samples(figures: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield what was measured, each with its path: the median of repeats, and single numbers.

    Repeats are lists of floats; a list of integers, such as a window's shape, says what was measured. A row of a table
    goes by its ``name``.
    """
    if isinstance(figures, dict):
        for key, value in figures.items():
            yield from samples(value, f"{name}/{key}" if name else key)
    elif isinstance(figures, list) and figures and all(isinstance(v, float) for v in figures):
        yield name, statistics.median(figures)
    elif isinstance(figures, list):
        for row in figures:
            if isinstance(row, dict) and "name" in row:
                yield from samples(row, f"{name}/{row['name']}")
    elif isinstance(figures, int | float) and (name.split("/")[-1] in SINGLE or name.endswith("peak_bytes")):
        yield name, figures
