"""What the peers' scripts share: JSON in on standard input, the same map made several times, JSON out.

They run in the peers' environment (``make bench-peers``) and import nothing of s2seg.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch


class Network:
    """The TorchScript network, for any kind of numbers; counts the pixels that it is given."""

    def __init__(self, path: str) -> None:
        self.network = torch.jit.load(path, map_location="cpu")
        self.pixels = 0

    def __call__(self, numbers: torch.Tensor) -> torch.Tensor:
        self.pixels += numbers.shape[0] * numbers.shape[-2] * numbers.shape[-1]
        return self.network(numbers.float())

    def __dask_tokenize__(self) -> str:
        return "network"

    def channels(self, block: np.ndarray) -> np.ndarray:
        """(band, y, x) -> (y, x) uint8, the channel that scores highest."""
        with torch.inference_mode():
            return self(torch.from_numpy(block)[None]).argmax(1)[0].to(torch.uint8).numpy()


def run(way: Callable[[dict, Network], str], version: str) -> None:
    """Make ``task["rounds"]`` maps with ``way(task, network)``, which returns where the map is; tell how it went.

    The file ``task["warm_up"]``, if there is one, is mapped ahead of the clock.
    """
    task = json.load(sys.stdin)
    network, seconds = Network(task["network"]), []
    with redirect_stdout(sys.stderr):  # whatever else is said is not the answer
        if task["warm_up"] is not None:
            way({**task, "image": task["warm_up"]}, network)
        for _ in range(task["rounds"]):
            network.pixels = 0
            start = time.perf_counter()
            path = way(task, network)
            seconds.append(time.perf_counter() - start)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    answer = {
        "version": version, "seconds": seconds, "peak_bytes": int(peak[1]) * 1024 if peak else 0,
        "network_pixels": network.pixels, "map": path,
    }  # fmt: skip
    print(json.dumps(answer))
