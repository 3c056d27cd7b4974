"""Chips, steps, the chip store, a kill and a resume: what ``s2seg train`` costs, and whether it can be trusted."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import rasterio
import torch
from rasterio.windows import Window
from rich.console import Console
from rich.table import Table

from s2seg.errors import S2SegWarning
from s2seg.sources.search import search
from s2seg.training.checkpoints import FOLDER, LAST, load_checkpoint
from s2seg.training.chips import open_chips
from s2seg.training.config import TrainConfig
from s2seg.training.data import Feed
from s2seg.training.fit import fit
from s2seg.training.history import Standing
from s2seg.training.module import SegmentationModule
from s2seg.training.run import prepare
from s2seg.training.sampling import EpochPlan
from tests.bench.fixtures import BANDS, LabelledScene, labelled_scene
from tests.bench.measuring import MEGA, THREADS, fresh, gib, peak_memory, spread

PEERS = Path("build/venv-peers/bin/python")
PEER = Path(__file__).parent / "peers" / "torchgeo_chips.py"
BLOCK = 1024
SIZE, BATCH = 128, 16
MEDIUM = {"encoder_depth": 3, "decoder_channels": [128, 64, 48]}
SMALL = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}


def measure(folder: Path, console: Console, quick: bool) -> dict[str, Any]:
    """Run all measurements of ``train``; returns the figures."""
    sizes = (512, 1024) if quick else (2048, 4096)
    scratch = folder / "train"
    shutil.rmtree(scratch, ignore_errors=True)
    half, whole = (labelled_scene(folder, size) for size in sizes)
    figures: dict[str, Any] = {
        "store": building({sizes[0]: half, sizes[1]: whole}, scratch, console, repeats=1 if quick else 4)
    }
    stores = {"0.2 GB": scratch / "one.zarr", "2.3 GB": scratch / "overlapping.zarr"}
    figures["chips"] = delivery(whole, stores, console, batches=4 if quick else 20, repeats=2 if quick else 3)
    figures["steps"] = steps(whole, stores["0.2 GB"], scratch, console, count=3 if quick else 15)
    figures["resume"] = resume(whole, stores["0.2 GB"], scratch, console, kills=1 if quick else 2)
    shutil.rmtree(scratch)
    return figures


def config(
    scene: LabelledScene, *, dates: int = 3, median: bool = False, stride: int = SIZE, **sections: Any
) -> TrainConfig:
    """Nothing masked; dates apart, so that chips hold the very pixels of the files, or the median of all."""
    when = f"{scene.dates[0]}/{scene.dates[dates - 1]}" if median else scene.dates[:dates]
    area = {"name": "bench", "catalog": str(scene.catalog), "datetime": when,
            "labels": {"raster": str(scene.labels)}}  # fmt: skip
    values = {
        "name": "bench", "legend": scene.legend, "bands": BANDS, "composite": {"mask": []}, "areas": [area],
        "chips": {"size": SIZE, "stride": stride}, "logs": ["csv"], **sections,
    }  # fmt: skip
    return TrainConfig.model_validate(values, context={"folder": None})


def _told_apart(seconds: list[float]) -> tuple[float, list[float]]:
    """The first round, and the others if there are any."""
    return seconds[0], seconds[1:] or seconds


# the chip store


def building(scenes: dict[int, LabelledScene], scratch: Path, console: Console, repeats: int) -> dict[str, Any]:
    """Time ``prepare``, from the catalog to the finished store, against plain reads of the same files.

    All rounds of a row run in one process. The first is told apart: it loads what is loaded late, and what it writes
    goes to memory that a virtual machine may have to ask its host for.
    """
    small, large = scenes
    scene = scenes[large]
    plans = {  # rows of the table; the goal is the first, and each store keeps its name
        "each pixel once": (large, 3, config(scene), "once", repeats),
        "each pixel once, smaller": (small, 3, config(scenes[small]), "smaller", repeats),
        "overlap of half a chip": (large, 3, config(scene, stride=SIZE // 2), "overlapping", min(repeats, 3)),
        "one date": (large, 1, config(scene, dates=1), "one", repeats),
        "median of the dates": (large, 3, config(scene, median=True), "median", repeats),
    }
    amounts = {size: size * size * len(BANDS) * len(scene.dates) / 1e6 for size in scenes}
    plain = {threads: fresh(_plain, _files(scene), threads, repeats)[0] for threads in (1, THREADS)}
    rows = {
        name: _build(size, dates, what, scratch / f"{store}.zarr", times)
        for name, (size, dates, what, store, times) in plans.items()
    }
    pace = amounts[large] / statistics.median(_told_apart(plain[1])[1])
    table = Table("", "Mpx-band/s", "min-max", "of plain", "the first", "chips", "MB", "peak GiB", "of it imports",
                  title=f"chips from {large} px, {len(scene.dates)} dates, {len(BANDS)} bands")  # fmt: skip

    def speeds(seconds: list[float], amount: float) -> list[str]:
        first, later = _told_apart([amount / s for s in seconds])
        return [*spread(later, 0), *(f"{speed / pace:.2f}" for speed in (statistics.median(later), first))]

    for threads, seconds in plain.items():
        name = "plain loop of reads" if threads == 1 else f"plain reads, {threads} threads"
        table.add_row(name, *speeds(seconds, amounts[large]), *[""] * 4)
    for name, row in rows.items():
        amount = amounts[row["size"]] / len(scene.dates) * row["dates"]
        table.add_row(name, *speeds([row["first_seconds"], *row["seconds"]], amount), str(row["chips"]),
                      f"{row['bytes'] / MEGA:.0f}", gib(row["peak_bytes"]), gib(row["imports_bytes"]))  # fmt: skip
    grown = [rows[name]["peak_bytes"] for name in ("each pixel once", "each pixel once, smaller")]
    console.print(table, "medians of all rounds of a process but the first, and the first, over the plain loop; goal: "
                         f"0.9. Peak memory, {large} px over {small} px: {grown[0] / grown[1]:.2f} (the area: "
                         f"{large**2 / small**2:.0f})")  # fmt: skip
    return {"plain_seconds": plain, "builds": rows}


def _files(scene: LabelledScene) -> list[str]:
    items = search(scene.catalog, (-180, -80, 180, 80), "2000/2100")
    return [item.assets[band].href for item in items for band in BANDS] + [str(scene.labels)]


def _plain(hrefs: list[str], threads: int, repeats: int) -> list[float]:
    """Seconds to read every block of every file, once, with nothing but rasterio."""

    def one(href: str) -> None:
        with rasterio.open(href) as dataset:  # what GDAL keeps of it goes when it is closed
            for row, col in itertools.product(range(0, dataset.height, BLOCK), range(0, dataset.width, BLOCK)):
                dataset.read(1, window=Window(col, row, BLOCK, BLOCK))

    def run() -> float:
        start = time.perf_counter()
        if threads == 1:
            for href in hrefs:
                one(href)
        else:
            with ThreadPoolExecutor(threads) as pool:
                list(pool.map(one, hrefs))
        return time.perf_counter() - start

    return [run() for _ in range(repeats)]


def _build(size: int, dates: int, what: TrainConfig, path: Path, repeats: int) -> dict[str, Any]:
    (seconds, chips, imports), peak = fresh(_prepare, what, path, repeats)
    first, later = _told_apart(seconds)
    return {
        "size": size, "dates": dates, "chips": chips, "peak_bytes": peak,
        "imports_bytes": imports, "first_seconds": first, "seconds": later,
        "bytes": sum(file.stat().st_size for file in path.rglob("*") if file.is_file()),
    }  # fmt: skip


def _prepare(what: TrainConfig, path: Path, repeats: int) -> tuple[list[float], int, int]:
    """Seconds of each round, chips, and the peak before anything was done; the last store stays."""
    imports, seconds = peak_memory(), []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", S2SegWarning)  # not every class is in every cut
        for _ in range(repeats):
            shutil.rmtree(path, ignore_errors=True)
            start = time.perf_counter()
            _, chips = prepare(what, path)
            seconds.append(time.perf_counter() - start)
    return seconds, len(chips), imports


# chips per second


def delivery(
    scene: LabelledScene, stores: dict[str, Path], console: Console, batches: int, repeats: int
) -> dict[str, Any]:
    """Batches as ``fit`` takes them, with nobody computing, against torchgeo's sampler on the same files."""
    speeds = {f"s2seg, store of {much}": fresh(_feed, path, batches * 5, repeats)[0] for much, path in stores.items()}
    large, path = list(stores.items())[-1]
    speeds[f"s2seg, store of {large}, from the disk"] = _feed_from_disk(path, batches * 5, repeats)
    theirs = _torchgeo(scene, batches, repeats)
    best = 0.0
    table = Table("", "chips/s", "min-max", "of torchgeo's best",
                  title=f"chips of {SIZE} px, {len(BANDS)} bands and labels, in batches of {BATCH}")  # fmt: skip
    if theirs is not None:
        for workers, values in theirs["speeds"].items():
            speeds[f"torchgeo {theirs['version']}, {workers} workers"] = values
            best = max(best, statistics.median(values))
    for name, values in speeds.items():
        median = statistics.median(values)
        ratio = f"{median / best:.1f}" if best else "run make bench-peers"
        table.add_row(name, f"{median:.0f}", f"{min(values):.0f}-{max(values):.0f}", ratio)
    console.print(table, "goal: 5")
    return speeds


def _feed(path: Path, batches: int, repeats: int) -> list[float]:
    """Chips per second of several epochs; the clock starts when the first batch is there."""
    chips = open_chips(path)
    train = chips.indices("train")
    plan = EpochPlan(len(train), BATCH, batches + 1)
    epoch = 0
    feed = Feed(chips, lambda e: [train[batch] for batch in plan.batches(e)], lambda: epoch)
    seen = []
    for epoch in range(repeats):  # noqa: B007  the feed asks for it
        ready = iter(feed)
        next(ready)
        start = time.perf_counter()
        count = sum(len(images) for images, _ in ready)
        seen.append(count / (time.perf_counter() - start))
    return seen


def _feed_from_disk(path: Path, batches: int, repeats: int) -> list[float]:
    """Chips per second of first epochs, each in a new process, of a store that the system has been made to forget."""
    speeds = []
    for _ in range(repeats):
        for file in path.rglob("*"):
            if file.is_file():
                with file.open("rb") as kept:
                    os.posix_fadvise(kept.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        speeds += fresh(_feed, path, batches, 1)[0]
    return speeds


def _torchgeo(scene: LabelledScene, batches: int, repeats: int) -> dict[str, Any] | None:
    """Version, and speeds by number of workers; None where it is not installed."""
    if not PEERS.exists():
        return None
    items = search(scene.catalog, (-180, -80, 180, 80), scene.dates[0])
    files = [[Path(item.assets[band].href) for band in BANDS] for item in items]
    task = {
        "images": [str(of_item[0].parent) for of_item in files], "bands": [file.stem for file in files[0]],
        "labels": str(scene.labels), "size": SIZE, "batch": BATCH, "batches": batches, "repeats": repeats,
        "workers": [0, THREADS],
    }  # fmt: skip
    command = [str(PEERS), "-W", "ignore", str(PEER)]
    answer = subprocess.run(command, input=json.dumps(task), stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(answer.stdout)
    return result


# steps


def steps(scene: LabelledScene, store: Path, scratch: Path, console: Console, count: int) -> dict[str, float]:
    """Where the time of a training step goes, and what ``history.csv`` says of it."""
    what = config(
        scene, network={"encoder": "resnet18", "arguments": MEDIUM},
        fit={"epochs": 2, "steps_per_epoch": count, "batch_size": BATCH, "accelerator": "cpu"},
    )  # fmt: skip
    figures: dict[str, float] = fresh(_steps, what, store, scratch / "steps")[0]
    step = figures["step"]
    table = Table("", "ms", "of the step", title=f"a training step of {BATCH} chips, {what.network.encoder}, CPU")
    for name in ("step", "model", "augmentation", "data_wait"):
        table.add_row(name.replace("_", " "), f"{1e3 * figures[name]:.1f}", f"{figures[name] / step:.4f}")
    console.print(table, f"data wait in history.csv: {figures['history_wait']:.4f} of an epoch's seconds; goal: 0.95 "
                         "of the step in the model, which includes its augmentation")  # fmt: skip
    return figures


def _steps(what: TrainConfig, store: Path, folder: Path) -> dict[str, float]:
    """Mean seconds per step, after the first of each epoch."""
    ends: dict[int, list[float]] = {}
    spent: dict[str, list[float]] = {"optimizer_step": [], "_varied": []}

    def tell(standing: Standing) -> None:
        if standing.row is None:
            ends.setdefault(standing.epoch, []).append(time.perf_counter())

    with _timed_calls(SegmentationModule, spent):
        result = fit(what, open_chips(store), folder, on_progress=tell)
    epochs = len(ends)
    between = [b - a for times in ends.values() for a, b in itertools.pairwise(times)]
    number = len(spent["optimizer_step"])
    training = spent["_varied"][: number // epochs]  # of the first epoch; the validation that follows varies nothing
    seconds, waited = (sum(row[key] for row in result.history) for key in ("seconds", "data_wait"))
    return {
        "step": statistics.mean(between), "model": statistics.mean(spent["optimizer_step"]),
        "augmentation": statistics.mean(training), "data_wait": waited / number, "history_wait": waited / seconds,
    }  # fmt: skip


@contextmanager
def _timed_calls(owner: type, spent: dict[str, list[float]]) -> Iterator[None]:
    """Note the seconds of every call of the owner's methods that ``spent`` names."""

    def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            start = time.perf_counter()
            try:
                return method(*arguments, **named)
            finally:
                seconds.append(time.perf_counter() - start)

        return call

    with patch.multiple(owner, **{name: timed(getattr(owner, name), seconds) for name, seconds in spent.items()}):
        yield


# kill and resume


def resume(scene: LabelledScene, store: Path, scratch: Path, console: Console, kills: int) -> dict[str, Any]:
    """Kill a training at random moments, let it go on, and compare it with one that nobody touched."""
    what = config(
        scene, network={"arguments": SMALL},
        fit={"epochs": 4, "steps_per_epoch": 6, "batch_size": 4, "accelerator": "cpu"},
    )  # fmt: skip
    total = 4 * 6
    _train(what, store, scratch / "whole")
    moments = sorted(random.sample(range(1, total - 3), kills))
    for moment in moments:
        _train(what, store, scratch / "killed", kill_at=moment)
    _train(what, store, scratch / "killed")
    whole, killed = (load_checkpoint(scratch / name / FOLDER / LAST) for name in ("whole", "killed"))
    same = all(_same(whole[part], killed[part]) for part in ("state_dict", "optimizer_states", "lr_schedulers"))
    console.print(
        f"kill -9 after steps {', '.join(map(str, moments))} of {total}, then resume: "
        f"same to the bit: {'yes' if same else '[bold red]NO[/]'}"
    )
    return {"killed_after": moments, "steps": total, "same_to_the_bit": same}


def _train(what: TrainConfig, store: Path, folder: Path, kill_at: int | None = None) -> None:
    """Train in a new process, on from where an earlier one stopped; kill it soon after ``kill_at`` steps."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_fit, args=(what, store, folder, theirs))
    process.start()
    theirs.close()
    stop = sys.maxsize if kill_at is None else kill_at
    with suppress(EOFError):  # it has ended
        while ours.recv() < stop:
            pass
        time.sleep(random.random() * 0.02)
        process.kill()
    process.join()
    expected = 0 if kill_at is None else -signal.SIGKILL
    if process.exitcode != expected:
        raise RuntimeError(f"the training ended with {process.exitcode}, not with {expected}")


def _fit(what: TrainConfig, store: Path, folder: Path, steps_done: Connection) -> None:
    torch.set_num_threads(THREADS)  # sums round differently with another number
    warnings.simplefilter("ignore", S2SegWarning)  # the first time there is nothing to resume from

    def tell(standing: Standing) -> None:
        if standing.row is None:
            steps_done.send(standing.done)

    fit(what, open_chips(store), folder, resume=True, on_progress=tell)


def _same(a: Any, b: Any) -> bool:
    """Whether two trees of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)
