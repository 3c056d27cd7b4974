"""Train on ready-cut tiles: a folder with images/ and labels/, as most published data sets come.

    python examples/train_from_tiles.py
    python examples/train_from_tiles.py FOLDER --legend LEGEND --bands red,green,blue

Without a folder two small data sets are made and trained on, one after the other: 8-bit RGB pictures (PNG) whose masks
have the colours of the DeepGlobe challenge, and GeoTIFFs of six bands whose masks hold class numbers.

FOLDER/images holds GeoTIFF files of any number of bands, or PNG or JPEG files of one or three (a PNG's fourth is alpha,
where 0 is no data), of 8 bits (white is a reflectance of 1) or of 16 (reflectance times 10000, 0 is no data).
FOLDER/labels holds a mask of the same name for each: one band of the legend's codes, or three bands of the legend's
colours, where black means no label. Sub-folders train, val and test in both are the split; without them whole tiles are
drawn at random, 70, 15 and 15 percent.

LEGEND is a YAML file like those in examples/legends, or the name of a built-in legend. The same can be written as a
configuration for `s2seg train`, with `tiles:` in place of `areas:`; `s2seg train --template` explains all keys.
"""

from __future__ import annotations

import argparse
import datetime as dt
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
import yaml
from PIL import Image
from rasterio.transform import from_origin
from rich.console import Console
from rich.table import Table

from s2seg.errors import S2SegError
from s2seg.legend import Legend
from s2seg.testing.landscape import LEGEND, make_landscape
from s2seg.testing.scene import make_scene
from s2seg.training.config import TrainConfig, load_config
from s2seg.training.run import train

DEEPGLOBE = Path(__file__).parent / "legends" / "deepglobe.yaml"
DEEPGLOBE_NAMES = {
    "water": "water", "forest": "forest land", "cropland": "agriculture land", "grassland": "rangeland",
    "built-up": "urban land", "road": "urban land", "bare": "barren land",
}  # fmt: skip
RGB = ("red", "green", "blue")
BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")
TILE = 128
console = Console()


@dataclass(frozen=True)
class DataSet:
    """A folder of pairs, what its images show, and what its masks mean: a legend's name, file or content."""

    folder: Path
    bands: tuple[str, ...]
    legend: str | dict[str, object]


def configuration(data: DataSet, output: Path, epochs: int) -> TrainConfig:
    """Describe the training in ``train.yaml``; everything that is not said there has a default."""
    folder, legend = data.folder.absolute(), data.legend
    if isinstance(legend, str) and Path(legend).suffix:  # a file: in a configuration, paths count from its own folder
        legend = str(Path(legend).absolute())
    values = {
        "name": folder.name,
        "legend": legend,
        "bands": list(data.bands),
        "tiles": {"images": str(folder / "images"), "labels": str(folder / "labels")},
        "chips": {"size": 64, "stride": 32},
        "network": {"encoder": "resnet18", "arguments": {"encoder_depth": 3, "decoder_channels": [64, 32, 16]}},
        "optimizer": {"learning_rate": 3e-3},
        "fit": {"epochs": epochs, "batch_size": 8},
        "logs": ["csv"],
    }
    output.mkdir(parents=True, exist_ok=True)
    file = output / "train.yaml"
    file.write_text(yaml.safe_dump(values, sort_keys=False))
    return load_config(file)


def train_and_score(data: DataSet, output: Path, epochs: int) -> None:
    """Train, and print how good the model is on tiles that it has not seen."""
    console.rule(f"{data.folder}: {', '.join(data.bands)}")
    result = train(configuration(data, output.parent, epochs), output, overwrite=True)
    if result.test is None:
        console.print("no tile is left for a test")
        return
    (scores,) = result.test.scores.values()
    header, *rows = scores.table()
    table = Table(*header, title="tiles never trained on", title_justify="left")
    for row in rows:
        table.add_row(*row)
    console.print(table, ", ".join(f"{name} {value}" for name, value in scores.summary()[1:]))
    for picture in sorted(output.glob("*.png")):
        console.print(str(picture), soft_wrap=True)
    console.print(f"{result.model.path}  for s2seg map --model", soft_wrap=True)


# -- two small data sets ----------------------------------------------------------------------------------------------


def synthesise(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a clear summer scene, (band, y, x) uint16 DN, and its land cover, (y, x) codes of the synthetic legend."""
    land = make_landscape(size, 10, seed=0)
    summer = dt.datetime(2021, 6, 15, 10, tzinfo=dt.UTC)
    scene = make_scene(land, summer, cloud_cover=0, latitude=45, cut=False, seed=0)
    at_10_m = [scene.bands[band] for band in BANDS]
    at_10_m = [np.kron(pixels, np.ones((size // len(pixels),) * 2, np.uint16)) for pixels in at_10_m]
    return np.stack(at_10_m), land.land_cover


def make_pictures(folder: Path, size: int) -> DataSet:
    """Write RGB pictures and masks in the colours of DeepGlobe."""
    scene, land_cover = synthesise(size)
    legend = Legend.load(DEEPGLOBE)
    color_of = {c.name: c.rgb for c in legend}
    colors = np.zeros((256, 3), np.uint8)
    for c in LEGEND:
        colors[c.code] = color_of[DEEPGLOBE_NAMES[c.name]]
    red_green_blue = np.stack([scene[BANDS.index(band)] for band in RGB], axis=-1)
    picture = np.clip(red_green_blue / 3000 * 255, 0, 255).astype(np.uint8)
    for name, here in tiles(size):
        for kind, pixels in (("images", picture[here]), ("labels", colors[land_cover[here]])):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / kind / f"{name}.png")
    return DataSet(folder, RGB, str(DEEPGLOBE))


def make_geotiffs(folder: Path, size: int) -> DataSet:
    """Write six bands in 16 bits, and masks of class numbers."""
    scene, land_cover = synthesise(size)
    for name, (rows, columns) in tiles(size):
        place = {
            "crs": "EPSG:32633",
            "transform": from_origin(500_000 + 10 * columns.start, 5_000_000 - 10 * rows.start, 10, 10),
        }
        for kind, pixels in (("images", scene[:, rows, columns]), ("labels", land_cover[None, rows, columns])):
            (folder / kind).mkdir(parents=True, exist_ok=True)
            with rasterio.open(
                folder / kind / f"{name}.tif", "w", driver="GTiff", height=TILE, width=TILE, count=len(pixels),
                dtype=pixels.dtype, nodata=0, **place,
            ) as file:  # fmt: skip
                file.write(pixels)
    return DataSet(folder, BANDS, LEGEND.to_dict())


def tiles(size: int) -> list[tuple[str, tuple[slice, slice]]]:
    """Cut a square into tiles: their names, rows and columns."""
    starts = range(0, size, TILE)
    return [(f"{y}_{x}", (slice(y, y + TILE), slice(x, x + TILE))) for y in starts for x in starts]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="with images/ and labels/")
    parser.add_argument("--legend", default=str(DEEPGLOBE), help="what the masks mean [default: DeepGlobe's classes]")
    parser.add_argument("--bands", default=",".join(RGB), help="names of the images' bands, in their order")
    parser.add_argument("--output", type=Path, default=Path("tiles"), help="folder for what is made")
    parser.add_argument("--size", type=int, default=768, help=f"pixels on a side that are cut into tiles of {TILE}")
    parser.add_argument("--epochs", type=int, default=6, help="times that each chip is seen")
    options = parser.parse_args()
    start, output = time.monotonic(), options.output

    try:
        if options.folder is not None:
            data = DataSet(options.folder, tuple(options.bands.split(",")), options.legend)
            train_and_score(data, output / "model", options.epochs)
        else:
            pictures, geotiffs = output / "pictures", output / "geotiffs"
            train_and_score(make_pictures(pictures, options.size), pictures / "model", options.epochs)
            train_and_score(make_geotiffs(geotiffs, options.size), geotiffs / "model", options.epochs)
    except (S2SegError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    console.print(f"done in {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
