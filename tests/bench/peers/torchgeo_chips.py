"""Chips per second from torchgeo's RandomGeoSampler: JSON in on standard input, JSON out.

Runs in the peers' environment (``make bench-peers``), so it imports nothing of s2seg. A place is one folder with a
single-band raster per band and a label raster on the same ground; a sample is an image float32 and a mask int64, as
torchgeo's own trainers take them.
"""

from __future__ import annotations

import json
import re
import sys
import time

import torch
import torchgeo
from torch.utils.data import DataLoader
from torchgeo.datasets import RasterDataset, stack_samples
from torchgeo.samplers import RandomGeoSampler


def main() -> None:
    task = json.load(sys.stdin)
    torch.manual_seed(0)
    first = task["bands"][0]

    class Images(RasterDataset):
        filename_glob = f"{first}.tif"
        filename_regex = rf"(?P<band>{'|'.join(map(re.escape, task['bands']))})\.tif"
        separate_files = True
        all_bands = tuple(task["bands"])

    class Labels(RasterDataset):
        is_image = False

    dataset = Images(task["images"]) & Labels([task["labels"]])
    speeds = {workers: speed(dataset, task, workers) for workers in task["workers"]}
    print(json.dumps({"version": torchgeo.__version__, "speeds": speeds}))


def speed(dataset: RasterDataset, task: dict, workers: int) -> list[float]:
    """Chips per second of every repeat; the clock starts when the first batch is there."""
    sampler = RandomGeoSampler(dataset, size=task["size"], length=task["batch"] * (task["batches"] + 1))
    loader = DataLoader(
        dataset, task["batch"], sampler=sampler, num_workers=workers, collate_fn=stack_samples,
        persistent_workers=workers > 0,
    )  # fmt: skip
    seen = []
    for _ in range(task["repeats"]):
        batches = iter(loader)
        check(next(batches), task)
        start = time.perf_counter()
        count = sum(len(batch["image"]) for batch in batches)
        seen.append(count / (time.perf_counter() - start))
    return seen


def check(batch: dict[str, torch.Tensor], task: dict) -> None:
    side = task["size"]
    assert batch["image"].shape == (task["batch"], len(task["bands"]), side, side), batch["image"].shape
    assert batch["mask"].shape == (task["batch"], side, side), batch["mask"].shape
    assert batch["image"].any()


if __name__ == "__main__":
    main()
