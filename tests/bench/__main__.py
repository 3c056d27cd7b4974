"""Measure s2seg on this machine and print tables: ``python -m tests.bench [map] [train] [--quick]``.

Scenes are grown from real pixels where the tool that does it lies beside the real data, else synthesised. They, the
fitted network and the figures (JSON) stay in ``build/bench``.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from tests.bench import mapping, train

SUITES = {"map": mapping.measure, "train": train.measure}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("suite", nargs="*", choices=[[], *SUITES], default=[], help="what to measure [default: all]")
    parser.add_argument("--quick", action="store_true", help="small scenes: whether it works, not how fast it is")
    parser.add_argument("--folder", type=Path, default=Path("build/bench"))
    options = parser.parse_args()
    console = Console()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    console.print(f"[bold]s2seg bench[/] on {machine}")
    options.folder.mkdir(parents=True, exist_ok=True)
    for name in options.suite or SUITES:
        figures = SUITES[name](options.folder, console, options.quick)
        saved = options.folder / f"{name}.json"
        when = datetime.now(UTC).isoformat(timespec="seconds")
        saved.write_text(json.dumps({"when": when, "machine": machine, **figures}, indent=2))
        console.print(f"figures in {saved}")


if __name__ == "__main__":
    main()
