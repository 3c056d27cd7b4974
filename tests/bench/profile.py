"""Where the time of a map goes: each part alone, on the same pixels, beside the whole and beside its own limit.

The last table is of files that lie elsewhere (:mod:`tests.bench.afar`).
"""

from __future__ import annotations

import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
import xarray as xr
from rich.console import Console
from rich.table import Table

from s2seg.inference import chunks_for, core_for, predict
from s2seg.models import load_model, open_session
from s2seg.outputs.cog import write_cog
from s2seg.outputs.zarr import write_zarr
from s2seg.sources.composite import CompositeSpec, composite
from s2seg.sources.search import search
from s2seg.sources.stack import stack
from tests.bench import afar
from tests.bench.fixtures import BANDS, BLOCK, DATES, WORLD, fitted_network, grid_of, labelled_scene, scene
from tests.bench.mapping import CLASS, chain
from tests.bench.measuring import MEGA, fresh, gib, rounds, spread
from tests.bench.reading import drain, plain_windows


@dataclass(frozen=True)
class Case:
    """What is mapped."""

    name: str
    catalog: Path
    spec: CompositeSpec

    @property
    def bands(self) -> list[str]:
        """What is read."""
        return [*BANDS, "scl"] if self.spec.mask else list(BANDS)


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``profile``; returns the figures."""
    size, repeats = (1024, 1) if quick else (4096, 3)
    model = fitted_network(folder, 20 if quick else 120).path
    cases = [
        Case("one date", scene(folder, size), CompositeSpec(mask=())),
        Case("median of three dates", labelled_scene(folder, size).catalog, CompositeSpec()),
    ]
    scratch = folder / "profile"
    figures = {}
    for case in cases:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        (seconds, session), peak = fresh(_parts, case, model, scratch, repeats)
        _show(case, seconds, session, size, console)
        figures[case.name] = {"seconds": seconds, "session": session, "whole_and_parts_peak_bytes": peak}
        console.print(f"peak of the process, the pixels of all parts included: {gib(peak)} GiB")
    shutil.rmtree(scratch)
    return figures | {"from afar": afar.measure(folder, model, console, size, min(repeats, 2))}


def _parts(case: Case, model: str, scratch: Path, repeats: int) -> tuple[dict[str, list[float]], str]:
    """Seconds of every part, and the session's name."""
    bundle, grid = load_model(model), grid_of(case.catalog)
    session, spec = open_session(bundle), chunks_for(bundle, core_for(bundle), grid.shape.yx)
    items = search(case.catalog, WORLD, DATES)
    files = [Path(item.assets[band].href) for item in items for band in case.bands]
    lazy = stack(items, grid, case.bands, chunksize=BLOCK)
    pixels = lazy.copy(data=lazy.data.persist())
    clear = composite(pixels, case.spec)
    clear = clear.compute().chunk({"band": -1, "y": BLOCK, "x": BLOCK})
    classes = predict(clear, bundle).compute()
    in_blocks = classes.chunk({"y": BLOCK, "x": BLOCK})
    zarr = write_zarr(in_blocks, scratch / "parts.zarr", overwrite=True)
    plain = _plain_tiff(classes.land_cover, bundle.spec.legend.nodata, scratch / "plain.tif")
    window = np.ascontiguousarray(clear.values[None, :, : spec.window[0], : spec.window[1]])
    seconds = rounds(
        {
            "whole": lambda: chain(case.catalog, grid, bundle, scratch / "whole", case.spec),
            "read: bytes of the files": lambda: [path.read_bytes() for path in files],
            "read: plain rasterio windows": lambda: plain_windows([str(path) for path in files], grid),
            "read and decode": lambda: drain(lazy.data),
            "composite": lambda: (
                composite(pixels, case.spec).data.map_blocks(_nothing, dtype="u2", chunks=(1, 1, 1)).compute()
            ),
            "network: bare": lambda: session.classify(window, 0, CLASS),
            "network with windows and overlap": lambda: predict(clear, bundle).land_cover.data.compute(),
            "write Zarr": lambda: write_zarr(in_blocks, scratch / "parts.zarr", overwrite=True),
            "write COG": lambda: write_cog(zarr, scratch / "p.tif", legend=bundle.spec.legend, overwrite=True),
            "write COG: GDAL's own": lambda: _gdal_cog(plain, scratch / "gdal.tif"),
        },
        repeats,
    )
    share = window[0, 0].size / (grid.shape[0] * grid.shape[1])
    seconds["network: bare"] = [s / share for s in seconds["network: bare"]]
    return seconds, session.name


def _nothing(block: np.ndarray) -> np.ndarray:
    """Keep nothing of a block."""
    return block[:1, :1, :1].copy()


def _plain_tiff(classes: xr.DataArray, nodata: int, path: Path) -> Path:
    """A map as GDAL likes to read it: tiled and not compressed."""
    height, width = classes.shape
    with rasterio.open(
        path, "w", driver="GTiff", height=height, width=width, count=1, dtype="uint8", tiled=True, blockxsize=512,
        blockysize=512, nodata=nodata, crs=str(classes.odc.crs), transform=classes.odc.transform,
    ) as out:  # fmt: skip
        out.write(classes.values, 1)
    return path


def _gdal_cog(source: Path, target: Path) -> None:
    """What ``gdal_translate -of COG`` does, overviews by majority included."""
    rasterio.shutil.copy(
        source, target, driver="COG", compress="deflate", blocksize=512, overview_resampling="mode",
        num_threads="ALL_CPUS",
    )  # fmt: skip


def _show(case: Case, seconds: dict[str, list[float]], session: str, size: int, console: Console) -> None:
    """Print every part beside the whole, and the whole beside its slowest part."""
    median = {name: statistics.median(values) for name, values in seconds.items()}
    whole = median["whole"]
    table = Table("part, alone", "s", "min-max", "Mpx/s", "of the whole", title=f"{case.name}, {size} px, {session}")
    for name, values in seconds.items():
        table.add_row(name, *spread(values), f"{size**2 / MEGA / median[name]:.1f}", f"{median[name] / whole:.2f}")
    slowest = max(median["read and decode"], median["network with windows and overlap"])
    console.print(table, f"the whole over the slower of reading and network: {whole / slowest:.2f} (goal 1.15)")
    speed = median["write COG: GDAL's own"] / median["write COG"]
    console.print(f"COG from the Zarr: {speed:.2f} of the speed of gdal_translate -of COG (goal 0.9)")
