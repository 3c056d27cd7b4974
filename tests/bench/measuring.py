"""How things are measured: in a process of their own, several times, against figures that were kept."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import re
import statistics
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


def machine() -> str:
    """Processor, cores and Python, in a line."""
    cpuinfo = Path("/proc/cpuinfo")
    name = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    processor = name[1] if name else platform.machine()
    return f"{os.cpu_count()} cores, {processor}, {platform.system()}, Python {platform.python_version()}"


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


# figures that are kept: {suite: {"when", "machine", "figures"}}


def keep(file: Path, suite: str, figures: dict[str, Any]) -> None:
    """Put a suite's figures into the file, beside those of other suites."""
    kept = json.loads(file.read_text()) if file.exists() else {}
    kept[suite] = {
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "figures": figures,
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(kept, indent=2) + "\n")


def compare(suite: str, now: dict[str, Any], then: dict[str, Any], console: Console) -> None:
    """Print the medians of what was measured several times, now and in a kept run."""
    if suite not in then:
        console.print(f"{suite}: not in the kept run")
        return
    # through JSON, so that both have gone the same way
    before, after = (dict(samples(json.loads(json.dumps(f)))) for f in (then[suite]["figures"], now))
    table = Table("measured", "then", "now", "now / then", title=f"{suite}, against {then[suite]['when']}")
    for name in after:
        if before.get(name):
            ratio = after[name] / before[name]
            table.add_row(name, f"{before[name]:.4g}", f"{after[name]:.4g}", f"{ratio:.2f}")
    console.print(table)
    if then[suite]["machine"] != machine():
        console.print(f"[bold]another machine then[/]: {then[suite]['machine']}")


def samples(figures: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """Yield the path and the median of every list of numbers, and of every row's peak memory."""
    if isinstance(figures, dict):
        for key, value in figures.items():
            yield from samples(value, f"{name}/{key}" if name else key)
    elif isinstance(figures, list) and figures and all(isinstance(v, int | float) for v in figures):
        yield name, statistics.median(figures)
    elif isinstance(figures, list):
        for i, row in enumerate(figures):
            label = row.get("name", row.get("size", i)) if isinstance(row, dict) else i
            yield from samples(row, f"{name}/{label}")
    elif name.endswith("peak_bytes"):
        yield name, figures
