"""What the measurements need: scenes of any size, and a network that is fitted to something."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import rasterio
import xarray as xr
from odc.geo.geobox import GeoBox
from rasterio.enums import Resampling
from rasterio.merge import merge

from s2seg.legend import Legend
from s2seg.models import ModelBundle, ModelSpec, build_network, load_model, open_session, save_bundle
from s2seg.models.export import export_model
from s2seg.sources.composite import CompositeSpec, composite
from s2seg.sources.search import search
from s2seg.sources.stack import stack
from s2seg.testing import LEGEND, position_scene, synthetic_catalog, write_asset

BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")
DATES = "2000/2100"
WORLD = (-180, -80, 180, 80)
BLOCK = 1024


def real_data() -> Path:
    return Path(os.environ.get("S2SEG_REAL_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))


def scene(folder: Path, size: int) -> Path:
    """A one-date catalog of ``size`` x ``size`` pixels at 10 m, with overviews as published scenes have; made once."""
    catalog = folder / f"scene-{size}-overviews" / "catalog.json"
    tool = real_data().parent / "tools" / "make_scene.py"
    if catalog.exists():
        return catalog
    if tool.exists():
        command = [sys.executable, "-W", "ignore", str(tool), str(catalog.parent), "--size", str(size), "--dates", "1"]
        subprocess.run([*command, "--bands", ",".join(BANDS)], check=True, stdout=subprocess.DEVNULL)
    else:
        _synthetic_scene(catalog.parent, size)
    for path in catalog.parent.rglob("*.tif"):
        with rasterio.Env(GDAL_NUM_THREADS="ALL_CPUS"), rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as out:
            if not out.overviews(1):
                out.build_overviews([2, 4, 8, 16], Resampling.average)
    return catalog


def _synthetic_scene(folder: Path, size: int) -> None:
    """Write a catalog of one item: the tiles of a synthetic region, put together."""
    date = "2022-02-01"
    resolutions = dict.fromkeys(BANDS, 10.0) | {"swir16": 20.0, "swir22": 20.0}
    with tempfile.TemporaryDirectory() as scratch:
        region = synthetic_catalog(scratch, size=size, dates=(date,), cloud_cover=(0.0,), baselines=("03.01",))
        left, _, _, top = region.geobox.boundingbox.bbox
        catalog = position_scene(
            folder, crs=str(region.geobox.crs), origin=(left, top), shape=(size, size), bands=resolutions, dates=(date,)
        )
        (whole,), tiles = (search(made, WORLD, DATES) for made in (catalog, region.catalog))
        for band in BANDS:
            (pixels,), transform = merge([tile.assets[band].href for tile in tiles])
            write_asset(whole.assets[band].href, pixels, str(region.geobox.crs), transform)


@dataclass(frozen=True)
class LabelledScene:
    """Three dates of one place, and its land cover on the same grid."""

    catalog: Path
    labels: Path
    legend: Legend
    dates: tuple[str, ...] = ("2022-02-01", "2022-02-06", "2022-02-11")


def labelled_scene(folder: Path, size: int) -> LabelledScene:
    """A catalog of ``size`` x ``size`` pixels at 10 m on three dates, with a label COG; made once."""
    place = folder / f"labelled-{size}"
    catalog, labels = place / "catalog.json", place / "land_cover.tif"
    tool, truth = real_data().parent / "tools" / "make_scene.py", real_data() / "mekong" / "labels"
    real = tool.exists() and truth.exists()
    scene = LabelledScene(catalog, labels, Legend.load("dynamic-world") if real else LEGEND)
    if labels.exists() and catalog.exists():
        return scene
    if not real:
        synthetic_catalog(place, size=size, dates=scene.dates, cloud_cover=(0.0,), baselines=("03.01",))
        return scene
    command = [sys.executable, "-W", "ignore", str(tool), str(place), "--size", str(size), "--dates", "3"]
    subprocess.run([*command, "--bands", ",".join(BANDS)], check=True, stdout=subprocess.DEVNULL)
    with rasterio.open(truth / "dynamicworld_10m.tif") as source, rasterio.open(next(place.rglob("B02.tif"))) as like:
        # mirrored until it fills the scene, as the tool does with the pixels
        there_and_back = np.r_[: source.height, source.height - 1 : -1 : -1]
        at = np.resize(there_and_back, size)
        profile = {"crs": like.crs, "transform": like.transform, "nodata": source.nodata, "compress": "deflate"}
        with rasterio.open(
            labels, "w", driver="COG", height=size, width=size, count=1, dtype="uint8", blocksize=1024,
            overviews="NONE", **profile,
        ) as out:  # fmt: skip
            out.write(source.read(1)[np.ix_(at, at)], 1)
    return scene


def inner_box(catalog: Path) -> tuple[float, float, float, float]:
    """A lon/lat box just within the catalog's scene, so that its grid holds no empty border."""
    west, south, east, north = search(catalog, WORLD, DATES)[0].bbox
    dx, dy = 0.02 * (east - west), 0.02 * (north - south)
    return west + dx, south + dy, east - dx, north - dy


def grid_of(catalog: Path) -> GeoBox:
    """Return the grid of the catalog's 10 m bands."""
    item = search(catalog, WORLD, DATES)[0]
    with rasterio.open(item.assets["blue"].href) as dataset:
        return GeoBox(dataset.shape, dataset.transform, f"EPSG:{dataset.crs.to_epsg()}")


def piece(catalog: Path, size: int, margin: int = 0) -> xr.DataArray:
    """(band, y, x) pixels in memory, with a margin, from the middle of a one-date scene."""
    (item,) = search(catalog, WORLD, DATES)
    grid = grid_of(catalog)
    at = slice((grid.shape[0] - size) // 2 - margin, (grid.shape[0] + size) // 2 + margin)
    return stack([item], grid[at, at], list(BANDS), chunksize=BLOCK).isel(time=0).compute()


def stacked(catalog: Path) -> Path:
    """The bands of a one-date scene in one file, all at 10 m, as software for ordinary images wants them; made once."""
    path = catalog.parent / "stacked.tif"
    if path.exists():
        return path
    (item,) = search(catalog, WORLD, DATES)
    grid = grid_of(catalog)
    pixels = stack([item], grid, list(BANDS), chunksize=BLOCK).isel(time=0).compute()
    partial = path.with_suffix(".partial")
    with rasterio.open(
        partial, "w", driver="COG", height=grid.shape[0], width=grid.shape[1], count=len(BANDS), dtype="uint16",
        crs=f"EPSG:{grid.crs.to_epsg()}", transform=grid.affine, nodata=0, compress="deflate", predictor=2,
        blocksize=512, interleave="band", overviews="NONE", num_threads="ALL_CPUS",
    ) as out:  # fmt: skip
        out.write(pixels.values)
    partial.rename(path)
    return path


def converted(model: ModelBundle, kind: Literal["onnx", "torchscript"]) -> Path:
    """The network in another form, beside its folder; made once."""
    path = Path(model.path).with_name(Path(model.path).name + {"onnx": "-onnx", "torchscript": ".pt"}[kind])
    return path if path.exists() else Path(export_model(model, kind, path).path)


def fitted_network(folder: Path, steps: int) -> ModelBundle:
    """A U-Net (mobilenet_v2) fitted for a minute to real or synthetic labels, so that its answers mean something."""
    path = folder / f"network-{steps}"
    if not (path / "model.json").exists():
        fit(folder, path, steps)
    model = load_model(path)
    open_session(model)  # converts it, where a runtime needs that: no process that is measured shall do it
    return model


def fit(folder: Path, path: Path, steps: int, side: int = 160) -> None:
    """Fit a network in so many steps of eight chips of ``side`` pixels, and write its bundle."""
    import torch  # here: processes whose memory is measured import this module, and need no torch

    pixels, labels, legend = _training_pixels(folder)
    spec = ModelSpec(
        name="bench", bands=BANDS, legend=legend, architecture={"name": "Unet", "encoder": "mobilenet_v2"},
        mean=tuple((pixels.mean(axis=(1, 2)) * 1e-4).tolist()), std=tuple((pixels.std(axis=(1, 2)) * 1e-4).tolist()),
    )  # fmt: skip
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    network = build_network(spec).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3)
    image = torch.from_numpy(
        (pixels - pixels.mean(axis=(1, 2), keepdims=True)) / pixels.std(axis=(1, 2), keepdims=True)
    )
    target = torch.from_numpy(labels)
    for _ in range(steps):
        corners = rng.integers(0, np.array(labels.shape) - side, (8, 2))
        batch = torch.stack([image[:, y : y + side, x : x + side] for y, x in corners])
        wanted = torch.stack([target[y : y + side, x : x + side] for y, x in corners])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(batch), wanted, ignore_index=255).backward()
        optimizer.step()
    save_bundle(path, spec, network.state_dict())


def _training_pixels(folder: Path) -> tuple[np.ndarray, np.ndarray, Legend]:
    """Pixels (band, y, x) float32, channel numbers (y, x) int64, and what they mean."""
    mekong = real_data() / "mekong"
    if (mekong / "catalog.json").exists():
        (item,) = search(mekong / "catalog.json", WORLD, DATES)
        legend, truth = Legend.load("dynamic-world"), mekong / "labels" / "dynamicworld_10m.tif"
        items = [item]
    else:
        region = synthetic_catalog(folder / "fit", size=768, dates=("2022-06-20",), cloud_cover=(0.0,))
        items, legend, truth = search(region.catalog, region.bbox, DATES), region.legend, region.truth
    with rasterio.open(truth) as raster:
        labels = raster.read(1)
        grid = GeoBox(raster.shape, raster.transform, f"EPSG:{raster.crs.to_epsg()}")
    channel = np.full(256, 255, dtype=np.int64)
    channel[list(legend.codes)] = np.arange(len(legend))
    scene = composite(stack(items, grid, BANDS), CompositeSpec(mask=()))
    return scene.values.astype(np.float32), channel[labels], legend
