"""From nothing to a land-cover map: make a synthetic region, fit a small U-Net in its west, map it all, score its east.

    python examples/demo.py [FOLDER] [--size 1024] [--steps 300]

Needs neither network nor data. The region's true land cover is known, so the score is the map's real accuracy: the
network was fitted on the western half only, and the score counts pixels of the eastern half only.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import rasterio
import torch
from rasterio.windows import from_bounds
from rich.console import Console
from rich.progress import track
from rich.table import Table

from s2seg import cli, composite, search, stack
from s2seg.models import ModelSpec, build_network, save_bundle
from s2seg.testing import LEGEND, SyntheticRegion, synthetic_catalog

BANDS = ("blue", "green", "red", "rededge2", "nir", "swir16")
SEASON = "2021-04-01/2021-10-31"
CHIP, BATCH, UNKNOWN = 96, 8, 255
console = Console()


def western_half(region: SyntheticRegion) -> tuple[np.ndarray, np.ndarray]:
    """Reflectance (band, y, x) of the cloud-free composite, and the true class (y, x) as a channel number."""
    half = region.geobox[:, : region.geobox.shape[1] // 2]
    items = search(region.catalog, region.bbox, SEASON)
    scene = composite(stack(items, half, [*BANDS, "scl"], chunksize=512)).compute()
    with rasterio.open(region.truth) as raster:
        truth = raster.read(1)[:, : half.shape[1]]
    channel = np.searchsorted(LEGEND.codes, truth)
    channel[(scene.values == 0).any(axis=0)] = UNKNOWN
    return scene.values.astype(np.float32) * 1e-4, channel


def chips(x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """One batch: crops around pixels of classes drawn evenly, flipped and turned at random."""
    images, labels = [], []
    for channel in rng.integers(0, len(LEGEND), BATCH):
        rows, columns = np.nonzero(y == channel)
        i = rng.integers(len(rows))
        row, column = (
            int(np.clip(at - rng.integers(CHIP), 0, n - CHIP))
            for at, n in zip((rows[i], columns[i]), y.shape, strict=True)
        )
        turns, flip = rng.integers(4), rng.integers(2)
        for source, chosen in ((x, images), (y[None], labels)):
            chip = np.rot90(source[:, row : row + CHIP, column : column + CHIP], turns, axes=(1, 2))
            chosen.append((chip[:, ::-1] if flip else chip).copy())
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.concatenate(labels)).long()


def fit(spec: ModelSpec, x: np.ndarray, y: np.ndarray, steps: int) -> torch.nn.Module:
    """Fit a network from scratch: AdamW, one cycle of the learning rate, cross entropy."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    mean, std = (torch.tensor(v)[:, None, None] for v in (spec.mean, spec.std))
    network = build_network(spec).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    # roads are few and thin: without a larger say they would drown in what lies beside them
    share = np.bincount(y[y != UNKNOWN], minlength=len(LEGEND)) / y.size
    weight = torch.tensor((share.max() / share) ** 0.4, dtype=torch.float32)
    fast = torch.cpu.get_capabilities().get("amx_bf16", False)  # elsewhere bfloat16 would be slower than float32
    loss_of = torch.nn.CrossEntropyLoss(weight, ignore_index=UNKNOWN)
    for _ in track(range(steps), "fit", console=console):
        images, labels = chips(x, y, rng)
        images = ((images - mean) / std).contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=fast):
            scores = network(images)
        loss = loss_of(scores.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return network.eval()


def eastern_confusion(land_cover: Path, region: SyntheticRegion) -> np.ndarray:
    """Count the eastern half's pixels by (true class, mapped class)."""
    with rasterio.open(land_cover) as mapped, rasterio.open(region.truth) as truth:
        window = from_bounds(*mapped.bounds, truth.transform).round()
        known = truth.read(1, window=window, boundless=True, fill_value=0, out_shape=mapped.shape)
        answer, middle = mapped.read(1), truth.shape[1] // 2 - int(window.col_off)
    known, answer = known[:, middle:], answer[:, middle:]
    both = (known > 0) & (answer > 0)
    pairs = [np.searchsorted(LEGEND.codes, values[both]) for values in (known, answer)]
    return np.bincount(np.ravel_multi_index(pairs, (len(LEGEND),) * 2), minlength=len(LEGEND) ** 2).reshape(
        -1, len(LEGEND)
    )


def report(confusion: np.ndarray) -> None:
    """Print precision, recall and intersection over union of each class, from one confusion matrix."""
    right, true, mapped = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    table = Table("class", "share %", "precision", "recall", "IoU", title="eastern half, never seen in fitting")
    for i, name in enumerate(LEGEND.names):
        scores = (right[i] / max(1, n) for n in (mapped[i], true[i], mapped[i] + true[i] - right[i]))
        table.add_row(name, f"{100 * true[i] / true.sum():.1f}", *(f"{score:.3f}" for score in scores))
    console.print(table, f"overall accuracy {right.sum() / true.sum():.3f} of {true.sum():,} pixels")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--size", type=int, default=1024, help="pixels on a side of the region")
    parser.add_argument("--steps", type=int, default=300, help="steps of fitting")
    options = parser.parse_args()
    folder, start = options.folder, time.monotonic()

    console.print(f"make a region of {options.size / 100:g} km x {options.size / 100:g} km")
    region = synthetic_catalog(folder / "region", size=options.size)

    x, y = western_half(region)
    clear = x[:, y != UNKNOWN]
    spec = ModelSpec(
        name="demo",
        bands=BANDS,
        legend=LEGEND,
        mean=tuple(clear.mean(axis=1).tolist()),
        std=tuple(clear.std(axis=1).tolist()),
        architecture={"name": "Unet", "encoder": "resnet18", "encoder_depth": 4, "decoder_channels": [128, 64, 32, 16]},
        stride=16,
        provenance={"data": "s2seg.testing.synthetic_catalog, western half", "license": "Apache-2.0"},
    )
    network = fit(spec, x, y, options.steps)
    model = save_bundle(folder / "model", spec, network.state_dict(), overwrite=True)

    arguments = ["--catalog", str(region.catalog), "--aoi", ",".join(map(str, region.bbox)), "--datetime", SEASON]
    arguments += ["--model", model.path, "--output", str(folder / "map"), "--layers", "class,confidence", "--overwrite"]
    console.print("s2seg map", *arguments, soft_wrap=True)
    if code := cli.main(["map", *arguments]):
        return code
    report(eastern_confusion(folder / "map" / "land_cover.tif", region))
    console.print(f"truth    {region.truth}\npicture  {folder / 'map' / 'quicklook.png'}", soft_wrap=True)
    console.print(f"done in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
