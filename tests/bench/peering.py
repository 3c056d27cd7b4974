"""s2seg beside what else makes a map from a scene and a network: the same file, the same weights, end to end."""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from rasterio.windows import Window
from rich.console import Console
from rich.table import Table

from s2seg.inference import chunks_for, core_for
from s2seg.models import ModelBundle, load_model
from s2seg.models.runtimes import choose_session
from s2seg.sources.composite import CompositeSpec
from tests.bench.fixtures import BANDS, BLOCK, converted, fitted_network, grid_of, scene, stacked
from tests.bench.mapping import WAYS, Way, chain, whole_image
from tests.bench.measuring import MEGA, fresh, gib, spread, timed

PEERS = Path("build/venv-peers/bin/python")
CORNER = 1024
"""Pixels on a side of what peers that run once have seen before."""

SCRIPTS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Peer:
    """A script of ``tests/bench/peers``, what it is told, and where it runs.

    Slow ones run once, after a small map; those of a full run in no other.
    """

    script: str
    told: dict[str, Any]
    python: Path = PEERS
    slow: bool = False
    full: bool = False


OTHERS = {
    "geo-inference, patch 512": Peer("geo_inference_map", {"patch": 512}, slow=True),
    "geo-inference, patch 1024": Peer("geo_inference_map", {"patch": 1024}, slow=True, full=True),
    "odc-stac, map_blocks": Peer("odc_map_blocks", {"core": BLOCK}),
    "plain loop, rasterio": Peer("plain_loop", {"core": BLOCK}, Path(sys.executable)),
}


def measure(folder: Path, console: Console, quick: bool, full: bool = False) -> dict[str, Any]:
    """Run all measurements of ``peers``; returns the figures."""
    size, inner, repeats = (1024, 768, 1) if quick else (4096, 2048, 3) if full else (2048, 1536, 3)
    model = fitted_network(folder, 20 if quick else 120)
    catalog = scene(folder, size)
    scratch = folder / "peers"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    expected = fresh(whole_image, catalog, model.path, inner)[0]
    rows = {f"s2seg, {' '.join(way)}": _ours(catalog, model, way, scratch, repeats) for way in WAYS}
    wanted = {name: peer for name, peer in OTHERS.items() if full or not peer.full}
    others = {name: peer for name, peer in wanted.items() if peer.python.exists()}
    if len(others) < len(wanted):
        console.print(f"peers: {', '.join(n for n in wanted if n not in others)} are not installed: make bench-peers")
    for name, peer in others.items():
        rows[name] = _theirs(peer, catalog, model, scratch, repeats)
    for row in rows.values():
        if "map" in row:
            row["seam_error"] = _differing(_codes(Path(row.pop("map")), model), expected)
    shutil.rmtree(scratch)
    _show(rows, size, inner, repeats, console)
    return {"size": size, "rows": rows}


def _ours(catalog: Path, model: ModelBundle, way: Way, scratch: Path, repeats: int) -> dict[str, Any]:
    target = scratch / "-".join(way)
    (session, seconds), peak = fresh(_map, catalog, model.path, way, target, repeats)
    shape = grid_of(catalog).shape.yx
    cost = chunks_for(model, core_for(model, way[0], precision=way[1]), shape).cost(shape)
    return {
        "version": session, "seconds": seconds, "peak_bytes": peak, "network_pixels": cost * shape[0] * shape[1],
        "map": str(target.with_suffix(".tif")),
    }  # fmt: skip


def _map(catalog: Path, model: str, way: Way, target: Path, repeats: int) -> tuple[str, list[float]]:
    """The session's name, and seconds from the catalog to a Zarr and a COG with overviews."""
    bundle, grid, mask = load_model(model), grid_of(catalog), CompositeSpec(mask=())
    # the peers' network is loaded before their clock starts, too
    session, _ = choose_session(bundle, way[0], precision=way[1])
    return session.name, [timed(lambda: chain(catalog, grid, bundle, target, mask, way)) for _ in range(repeats)]


def _theirs(peer: Peer, catalog: Path, model: ModelBundle, scratch: Path, repeats: int) -> dict[str, Any]:
    image = stacked(catalog)
    task = {
        "image": str(image.resolve()), "catalog": str(catalog.resolve()), "bands": BANDS,
        "network": str(converted(model, "torchscript").resolve()), "classes": len(model.spec.legend),
        "folder": str(scratch.resolve()), "rounds": 1 if peer.slow else repeats, "halo": model.spec.depth,
        "warm_up": str(_corner(image, scratch / "corner.tif").resolve()) if peer.slow else None, **peer.told,
    }  # fmt: skip
    command = [str(peer.python), "-W", "ignore", str(SCRIPTS / f"{peer.script}.py")]
    done = subprocess.run(command, input=json.dumps(task), capture_output=True, text=True, check=False)
    if done.returncode:
        return {"why": (done.stderr.strip().splitlines() or ["it failed and does not say why"])[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _corner(image: Path, path: Path) -> Path:
    """A small piece of an image, on which software can load and compile what it needs."""
    if not path.exists():
        with rasterio.open(image) as source:
            profile = {**source.profile, "driver": "GTiff", "height": CORNER, "width": CORNER}
            with rasterio.open(path, "w", **profile) as out:
                out.write(source.read(window=Window(0, 0, CORNER, CORNER)))
    return path


def _codes(path: Path, model: ModelBundle) -> npt.NDArray[np.uint8]:
    """A map's codes; the peers write the network's channels."""
    with rasterio.open(path) as raster:
        values = raster.read(1)
    if path.stem in map("-".join, WAYS):
        return values
    codes = np.full(256, model.spec.legend.nodata, np.uint8)
    codes[: len(model.spec.legend)] = model.spec.legend.channel_to_code()
    return codes[values]


def _differing(codes: npt.NDArray[np.uint8], expected: npt.NDArray[np.uint8]) -> float:
    """Share of the pixels in the middle of a map that are not what the network makes of the whole image."""
    at = slice((len(codes) - len(expected)) // 2, (len(codes) + len(expected)) // 2)
    return float((codes[at, at] != expected).mean())


def _show(rows: dict[str, dict[str, Any]], size: int, inner: int, repeats: int, console: Console) -> None:
    amount = size**2 / MEGA
    speeds = {name: [amount / s for s in row["seconds"]] for name, row in rows.items() if "seconds" in row}
    theirs = [statistics.median(speeds[name]) for name in speeds if name.startswith("geo-inference")]
    table = Table("", "Mpx/s", "min-max", "x geo-inference", "peak GiB", "overlap cost", "seam error %",
                  title=f"a map end to end, {size} px, {len(BANDS)} bands, one date; median of {repeats}, "
                        "geo-inference once, after a small map")  # fmt: skip
    for name, row in rows.items():
        if "why" in row:
            table.add_row(name, row["why"], *[""] * 5)
            continue
        ratio = f"{statistics.median(speeds[name]) / max(theirs):.1f}" if theirs else ""
        table.add_row(
            f"{name} ({row['version']})", *spread(speeds[name]), ratio, gib(row["peak_bytes"]),
            f"{row['network_pixels'] / size**2:.2f}", f"{100 * row['seam_error']:.3f}",
        )  # fmt: skip
    console.print(table, f"seam error: pixels of the middle {inner} px that differ from the network run once over all "
                         "of it, torch float32; goal: 10 x geo-inference, and fewer of them")  # fmt: skip
