"""Measure s2seg on this machine and print tables; without a name, all of them.

  map        windows: what they cost and how well they agree; one scene end to end
  train      chips, training steps, a kill and a resume
  read       the reader beside plain rasterio and stackstac's; requests and bytes over slow HTTP
  composite  median, percentile and medoid of 12 dates beside xarray's
  runtime    the bare network in every runtime, precision and window
  peers      the same file and weights beside geo-inference, odc-stac and a plain loop (after make bench-peers)
  scale      seconds per megapixel and peak memory from 2048 to 10980 px; the graph of 500 items
  gpu        the whole chain beside the bare network, on a GPU
  profile    where the time of a map goes, part by part

Scenes are grown from real pixels where the tool that does it lies beside the real data, else synthesised. They and the
fitted network stay in build/bench, with the figures of each suite's last run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path

from rich.console import Console

from tests.bench.measuring import clock, compare, keep, machine

SUITES = {
    "map": "mapping",
    "train": "train",
    "read": "reading",
    "composite": "compositing",
    "runtime": "runtimes",
    "peers": "peering",
    "scale": "scale",
    "gpu": "gpu",
    "profile": "profile",
}
"""Name -> module of tests.bench with ``measure(folder, console, quick) -> figures``."""

ENDLESS = 10_000
"""Columns where nobody watches: a file has no edge, so each table is as wide as it needs to be."""

FULL = {"peers", "scale"}
"""Suites that can go on to sizes that take longer."""


def main(arguments: list[str] | None = None) -> None:
    """Run the suites that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", nargs="*", choices=[[], *SUITES], default=[], metavar="SUITE", help=", ".join(SUITES))
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small scenes: whether it works, not how fast it is")
    size.add_argument("--full", action="store_true", help="peers: 4096 px; scale: 21960 px as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the figures here [FOLDER/figures.json]")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare with the figures that --json has kept")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"), help="scenes and scratch [build/bench]")
    options = parser.parse_args(arguments)
    if options.against and not options.against.exists():
        parser.error(f"{options.against} does not exist: a run with --json {options.against} makes it")
    then = json.loads(options.against.read_text()) if options.against else {}
    console = Console(width=None if sys.stdout.isatty() else ENDLESS)
    console.print(f"[bold]s2seg bench[/] on {machine()}")
    options.folder.mkdir(parents=True, exist_ok=True)
    kept = options.json or options.folder / "figures.json"
    began = time.perf_counter()
    for name in options.suite or SUITES:
        more = {"full": True} if options.full and name in FULL else {}
        start = time.perf_counter()
        figures = import_module(f"tests.bench.{SUITES[name]}").measure(options.folder, console, options.quick, **more)
        took = time.perf_counter() - start
        keep(kept, name, figures, took)
        if then:
            compare(name, figures, then, console)
        console.print(f"{name} took {clock(took)}")
    console.print(f"all of it took {clock(time.perf_counter() - began)}; figures in {kept}")


if __name__ == "__main__":
    main()
