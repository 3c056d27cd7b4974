"""Windows, and one scene end to end: what ``s2seg map`` costs."""

from __future__ import annotations

import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from odc.geo.geobox import GeoBox
from rich.console import Console
from rich.table import Table

from s2seg.inference import chunks_for, core_for, predict
from s2seg.models import ModelBundle, load_model, open_session
from s2seg.models.runtimes import Session
from s2seg.outputs.cog import write_cog
from s2seg.outputs.zarr import write_zarr
from s2seg.pipeline import MapOptions, map_area, plan_area
from s2seg.sources.composite import CompositeSpec, composite
from s2seg.sources.search import search
from s2seg.sources.stack import stack
from s2seg.windows import ChunkSpec
from tests.bench.fixtures import DATES, WORLD, fitted_network, grid_of, inner_box, piece, scene
from tests.bench.measuring import MEGA, THREADS, fresh, gib, rounds, spread, timed

__all__ = ["THREADS", "chain", "end_to_end", "fresh", "measure", "show", "whole_image"]

MARGIN = 128
"""Pixels around a reference image, so that it has no border of its own."""

CLASS = frozenset({"class"})

PACES = 5
"""How often the bare network is timed."""

Way = tuple[str, str]
"""Runtime and precision."""

WAYS: tuple[Way, ...] = (("auto", "auto"), ("auto", "float32"), ("torch", "float32"))


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``map``; returns the figures."""
    model = fitted_network(folder, 20 if quick else 120).path
    size, repeats = (1024, 1) if quick else (4096, 3)
    catalog = scene(folder, size)
    figures: dict[str, Any] = {
        "windows": windows(catalog, model, console, *((512, 1) if quick else (3072, 2))),
        "end_to_end": [end_to_end(catalog, size, model, folder, repeats, way) for way in WAYS],
    }
    show(figures["end_to_end"], console)
    return figures


# windows


def windows(catalog: Path, model: str, console: Console, size: int, repeats: int) -> list[dict[str, Any]]:
    """Agreement with the whole image, cost of the overlap, and what remains of the network's speed."""
    bundle = load_model(model)
    default = chunks_for(bundle, core_for(bundle, precision="float32"), (size, size))
    whole, whole_peak = fresh(whole_image, catalog, model, size)
    console.print(f"whole image of {size} px at once: {gib(whole_peak)} GiB")
    rows = []
    for step in sorted({512, 1024, default.core[0]}):  # all of them cut the image into equal blocks
        for depth in (0, 32, 64, 96, 128) if step == default.core[0] else (96,):
            if step > size:
                continue
            (seconds, codes), peak = fresh(_chunked, catalog, model, size, step, depth, repeats)
            spec = ChunkSpec.trimmed(step, depth)
            net = size * size / 1e6 / statistics.median(seconds)
            rows.append(
                {
                    "name": f"{spec.window[0]} px, margin of {depth}",
                    "step": step, "depth": depth, "window": spec.window[0], "overlap_cost": spec.overlap_cost,
                    "agreement": float((codes == whole).mean()), "net_mpx_s": net,
                    "network_mpx_s": net * spec.overlap_cost, "peak_bytes": peak, "seconds": seconds,
                    "default": (step, depth) == (default.core[0], default.before),
                }
            )  # fmt: skip
    table = Table("window", "depth", "overlap cost", "agreement %", "network Mpx/s", "net Mpx/s", "peak GiB", "",
                  title=f"windows, {size} px of real pixels (median of {repeats})")  # fmt: skip
    for r in rows:
        table.add_row(
            str(r["window"]), str(r["depth"]), f"{r['overlap_cost']:.2f}", f"{100 * r['agreement']:.3f}",
            f"{r['network_mpx_s']:.2f}", f"{r['net_mpx_s']:.2f}", gib(r["peak_bytes"]),
            "default" if r["default"] else "",
        )  # fmt: skip
    console.print(table)
    return rows


def whole_image(catalog: Path, model: str, size: int) -> np.ndarray:
    """(y, x) codes of the middle ``size`` pixels from one run of the network over all of them, torch float32."""
    session = open_session(load_model(model), "torch", "cpu", "float32")
    return session.classify(piece(catalog, size, MARGIN).values[None], MARGIN, CLASS)["class"][0]


def _chunked(
    catalog: Path, model: str, size: int, step: int, depth: int, repeats: int
) -> tuple[list[float], np.ndarray]:
    scene_ = piece(catalog, size, depth)
    margin = ((depth, depth), (depth, depth))
    spec = ChunkSpec.trimmed(step, depth, shape=(size, size))
    lazy = predict(scene_, load_model(model), chunks=spec, margin=margin, precision="float32").land_cover
    lazy[:step, :step].compute()  # the first window pays for set-up
    made: list[xr.DataArray] = []
    return [timed(lambda: made.append(lazy.compute())) for _ in range(repeats)], made[-1].values


# end to end


def chain(
    catalog: Path, grid: GeoBox, model: ModelBundle, target: Path, spec: CompositeSpec, way: Way = WAYS[0]
) -> None:
    """From a catalog to ``target``.zarr and ``target``.tif with overviews: what ``map_area`` does, on a given grid."""
    items = search(catalog, WORLD, DATES)
    bands = [*model.spec.bands, "scl"] if spec.mask else model.spec.bands
    runtime, precision = way
    chunks = chunks_for(model, core_for(model, runtime, precision=precision), grid.shape.yx)
    scene_ = composite(stack(items, grid, bands, chunksize=chunks.cores(grid.shape.yx)), spec)
    classes = predict(scene_, model, chunks=chunks, runtime=runtime, precision=precision)
    zarr = write_zarr(classes, target.with_suffix(".zarr"), overwrite=True)
    write_cog(zarr, target.with_suffix(".tif"), legend=model.spec.legend, overwrite=True)


def end_to_end(catalog: Path, size: int, model: str, folder: Path, repeats: int, way: Way = WAYS[0]) -> dict[str, Any]:
    """``map_area`` in a process of its own, then the network alone on the same pixels, in memory."""
    runtime, precision = way
    options = MapOptions(composite=CompositeSpec(mask=()), runtime=runtime, precision=precision, overwrite=True)
    plan = plan_area(catalog, inner_box(catalog), DATES, model, options)
    (stages, seconds, first), peak = fresh(_map, catalog, size, model, folder / "map", options, repeats)
    height, width = plan.geobox.shape
    (session, bare, overlap_time), _ = fresh(_network_alone, catalog, model, way, plan.chunks)
    unchanged, _ = fresh(_unchanged_network, catalog, model, session, plan.chunks.window)
    return {
        "name": f"{session}, {size} px", "size": size,
        "mpx": height * width / MEGA, "seconds": seconds, "first_seconds": first, "stages": stages,
        "peak_bytes": peak, "planned_bytes": plan.peak_memory, "session": session, "network_mpx_s": bare,
        "unchanged_mpx_s": unchanged, "window": plan.chunks.window, "overlap_cost": plan.overlap_cost,
        "overlap_time": overlap_time,
    }  # fmt: skip


def _map(
    catalog: Path, size: int, model: str, output: Path, options: MapOptions, repeats: int
) -> tuple[list[dict[str, float]], list[float], float]:
    box = inner_box(catalog)
    # a first map pays for imports and for opening the network, once per process; a small one: for its windows, too, the
    # network stays compiled
    west, south, east, north = box
    corner = west, south, west + (east - west) * 128 / size, south + (north - south) * 128 / size
    first = timed(lambda: map_area(catalog, corner, DATES, model, output, options))
    stages: list[dict[str, float]] = []
    seconds = [
        timed(lambda: stages.append(map_area(catalog, box, DATES, model, output, options).record["seconds"]))
        for _ in range(repeats)
    ]
    shutil.rmtree(output)
    return stages, seconds, first


def _network_alone(catalog: Path, model: str, way: Way, chunks: ChunkSpec) -> tuple[str, list[float], float]:
    """The session; Mpx/s of whole windows laid side by side; what the margin of a window costs in time.

    That is the seconds per pixel kept of a window whose margin is cropped, over those of a window as large as the
    core, all of which is kept.
    """
    session = open_session(load_model(model), way[0], precision=way[1])
    pixels, core = window_of(catalog, chunks.window), window_of(catalog, chunks.step)
    paces = _paces(session, pixels)
    # two ways at a time: a session keeps the network compiled for as many shapes
    ways = {
        "cropped": lambda: session.classify(pixels, chunks.before, CLASS),
        "core": lambda: session.classify(core, 0, CLASS),
    }
    rounds(ways, 1)  # pays for set-up
    seconds = rounds(ways, PACES)
    return session.name, paces, statistics.median(seconds["cropped"]) / statistics.median(seconds["core"])


def _unchanged_network(catalog: Path, model: str, session: str, window: tuple[int, int]) -> list[float]:
    """Mpx/s of the network as its library makes it, without what s2seg does to its layers, in the same runtime."""
    from tests.bench.unchanged import unchanged_session  # not at the top: other processes do without torch

    return _paces(unchanged_session(load_model(model), session), window_of(catalog, window))


def window_of(catalog: Path, shape: tuple[int, int]) -> np.ndarray:
    """(1, band, y, x) pixels from the middle of a scene, mirrored where it is smaller."""
    pixels = piece(catalog, min(*shape, *grid_of(catalog).shape)).values[None]
    missing = [(0, want - have) for want, have in zip(shape, pixels.shape[2:], strict=True)]
    return np.pad(pixels, [(0, 0), (0, 0), *missing], mode="symmetric")


def _paces(session: Session, pixels: np.ndarray) -> list[float]:
    session.classify(pixels, 0, CLASS)  # pays for set-up
    mpx = pixels[0, 0].size / MEGA
    return [mpx / timed(lambda: session.classify(pixels, 0, CLASS)) for _ in range(PACES)]


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """Print wall time and memory against size, the bare network and what the plan predicted."""
    table = Table("session", "size", "window", "wall s", "min-max", "s / Mpx", "bare Mpx/s", "of the bare network",
                  "unchanged Mpx/s", "of it", "overlap cost", "overlap, in time", "peak GiB", "planned GiB",
                  title="s2seg map, end to end")  # fmt: skip
    for r in rows:
        pace = r["mpx"] / statistics.median(r["seconds"])
        share, gain = (pace / statistics.median(r[name]) for name in ("network_mpx_s", "unchanged_mpx_s"))
        table.add_row(
            r["session"].replace(" cpu", ""), str(r["size"]), "x".join(map(str, r["window"])), *spread(r["seconds"], 1),
            f"{statistics.median(r['seconds']) / r['mpx']:.3f}", spread(r["network_mpx_s"])[0], f"{share:.2f}",
            spread(r["unchanged_mpx_s"])[0], f"{gain:.2f}", f"{r['overlap_cost']:.2f}", f"{r['overlap_time']:.2f}",
            gib(r["peak_bytes"]), gib(r["planned_bytes"]),
        )  # fmt: skip
    console.print(
        table, "bare: all of a window is answered, while the map's own network leaves out part of the margin's work; "
        "unchanged: the network as its library makes it",
        "overlap cost: pixels that the network sees over pixels of the map; in time: seconds per pixel kept, a "
        "window's margin cropped, over those of a window that is all kept",
        "goals: 0.85 of the bare network and under 2.5 GiB at 10980 px, overlap cost 1.15; with torch, 0.8 of the "
        "model's own speed", sep="\n",
    )  # fmt: skip
