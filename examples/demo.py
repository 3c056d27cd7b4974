"""From nothing to a land-cover map: synthesise a region, train a small U-Net in its west, map it all, score its east.

    python examples/demo.py [FOLDER] [--size 1024] [--epochs 4]

Needs neither network nor data. The region's true land cover is known, so the score is the map's real accuracy: the
network was trained on the western half only, and the score counts pixels of the eastern half only.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import rasterio
import yaml
from odc.geo.geobox import GeoBox
from rasterio.windows import from_bounds
from rich.console import Console
from rich.table import Table

from s2seg import cli
from s2seg.assess.confusion import Confusion, confusion
from s2seg.assess.scores import Scores
from s2seg.testing import LEGEND, SyntheticRegion, synthetic_catalog

BANDS = ["blue", "green", "red", "rededge2", "nir", "swir16"]
SEASON = "2021-04-01/2021-10-31"
console = Console()


def configuration(region: SyntheticRegion, folder: Path, epochs: int) -> Path:
    """Write what is trained on what: the west trains, its southern fifth validates, the east is out of bounds."""
    height, width = region.geobox.shape
    west = region.geobox[:, : width // 2]
    settings = {
        "name": "demo",
        "legend": LEGEND.to_dict(),
        "bands": BANDS,
        "areas": [
            {
                "name": "west",
                "catalog": str(region.catalog.resolve()),
                "datetime": SEASON,
                "aoi": list(west.boundingbox.to_crs("EPSG:4326").bbox),
                "labels": {"raster": str(Path(region.truth).resolve())},
            }
        ],
        "split": {
            "by": "geometries",
            "geometries": {
                "validation": outline(folder / "validation.geojson", west[height * 4 // 5 :]),
                "test": outline(folder / "test.geojson", region.geobox[:, width // 2 :]),
            },
        },
        "chips": {"size": 96, "stride": 24},
        "network": {
            "encoder": "resnet18",
            "arguments": {"encoder_depth": 4, "decoder_channels": [128, 64, 32, 16]},
        },
        "optimizer": {"learning_rate": 3e-3, "weight_decay": 1e-2},
        "fit": {"epochs": epochs, "steps_per_epoch": 75, "batch_size": 8},
        "augment": {"scale": None, "gain": 0.0, "offset": 0.0},
        "logs": ["csv"],
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(settings, sort_keys=False))
    return path


def outline(path: Path, box: GeoBox) -> str:
    """Write the box's outline as GeoJSON; returns its path."""
    geometry = box.extent.to_crs("EPSG:4326").json
    features = [{"type": "Feature", "properties": {}, "geometry": geometry}]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path.resolve())


def eastern_confusion(land_cover: Path, region: SyntheticRegion) -> Confusion:
    """Count the eastern half's pixels by (true class, mapped class)."""
    with rasterio.open(land_cover) as mapped, rasterio.open(region.truth) as truth:
        window = from_bounds(*mapped.bounds, truth.transform).round()
        known = truth.read(1, window=window, boundless=True, fill_value=0, out_shape=mapped.shape)
        answer, middle = mapped.read(1), truth.shape[1] // 2 - int(window.col_off)
    return confusion(np.ascontiguousarray(known[:, middle:]), np.ascontiguousarray(answer[:, middle:]), LEGEND)


def report(counts: Confusion) -> None:
    """Print precision, recall and intersection over union of each class, from one confusion matrix."""
    scores = Scores(counts)
    share = 100 * scores.support / scores.support.sum()
    table = Table("class", "share %", "precision", "recall", "IoU", title="eastern half, never seen in training")
    for name, *values in zip(LEGEND.names, share, scores.precision, scores.recall, scores.iou, strict=True):
        table.add_row(name, f"{values[0]:.1f}", *(f"{value:.3f}" for value in values[1:]))
    console.print(table, f"overall accuracy {scores.overall_accuracy:.3f} of {scores.support.sum():,} pixels")


def run(*arguments: str) -> None:
    """Show a command and run it; what goes wrong has been said by then."""
    console.print("s2seg", *arguments, soft_wrap=True)
    if code := cli.main(list(arguments)):
        raise SystemExit(code)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo"))
    parser.add_argument("--size", type=int, default=1024, help="pixels on a side of the region")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of 75 steps")
    options = parser.parse_args()
    folder, start = options.folder, time.monotonic()

    console.print(f"make a region of {options.size / 100:g} km x {options.size / 100:g} km")
    region = synthetic_catalog(folder / "region", size=options.size)

    shutil.rmtree(folder / "model", ignore_errors=True)
    run("train", str(configuration(region, folder, options.epochs)), "--output", str(folder / "model"))

    where = ["--catalog", str(region.catalog), "--aoi", ",".join(map(str, region.bbox)), "--datetime", SEASON]
    what = ["--model", str(folder / "model"), "--output", str(folder / "map"), "--layers", "class,confidence"]
    run("map", *where, *what, "--overwrite")
    report(eastern_confusion(folder / "map" / "land_cover.tif", region))
    console.print(f"truth    {region.truth}\npicture  {folder / 'map' / 'quicklook.png'}", soft_wrap=True)
    console.print(f"done in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
