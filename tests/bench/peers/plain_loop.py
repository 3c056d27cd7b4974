"""A map by a loop over rasterio windows: read with a margin, run the network, keep the middle, write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.windows import Window
from task import Network, run


def way(task: dict, network: Network) -> str:
    core, halo = task["core"], task["halo"]
    path = Path(task["folder"]) / "plain.tif"
    with rasterio.open(task["image"]) as source:
        profile = {
            "driver": "GTiff", "height": source.height, "width": source.width, "count": 1, "dtype": "uint8",
            "crs": source.crs, "transform": source.transform, "compress": "deflate", "tiled": True,
        }  # fmt: skip
        with rasterio.open(path, "w", **profile) as target:
            for top in range(0, source.height, core):
                for left in range(0, source.width, core):
                    block = read(source, top, left, core, halo)
                    kept = network.channels(block)[halo : halo + core, halo : halo + core]
                    height, width = min(core, source.height - top), min(core, source.width - left)
                    target.write(kept[:height, :width], 1, window=Window(left, top, width, height))
    return str(path)


def read(source: rasterio.DatasetReader, top: int, left: int, core: int, halo: int) -> np.ndarray:
    """(band, y, x) of a block with its margin; what lies outside the file mirrors what lies within."""
    rows, cols = (top - halo, top + core + halo), (left - halo, left + core + halo)
    limits = source.height, source.width
    inside = [(max(low, 0), min(high, n)) for (low, high), n in zip((rows, cols), limits, strict=True)]
    pixels = source.read(window=Window.from_slices(*inside))
    missing = [(a - low, high - b) for (low, high), (a, b) in zip((rows, cols), inside, strict=True)]
    return np.pad(pixels, [(0, 0), *missing], mode="symmetric")


if __name__ == "__main__":
    run(way, torch.__version__)
