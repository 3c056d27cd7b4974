"""One area from catalog to map: the stage calls, in order. What the CLI calls."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dask
from dask.delayed import delayed
from shapely.geometry.base import BaseGeometry

from s2seg.client import current_client
from s2seg.errors import S2SegError, S2SegWarning
from s2seg.inference import gpu_annotations
from s2seg.legend import Legend
from s2seg.models.bundle import ModelBundle, load_model
from s2seg.models.runtimes import SessionRef, choose_session
from s2seg.outputs._files import writing
from s2seg.outputs.zarr import write_zarr
from s2seg.pipeline.build import build_prediction, build_scene
from s2seg.pipeline.fingerprint import fingerprint
from s2seg.pipeline.folder import QUICKLOOK, RUN, ZARR, check_up_to_date, finished_run, publish, staging
from s2seg.pipeline.plan import MapOptions, Plan, plan_area
from s2seg.pipeline.products import Product, describe_run, read_picture, write_products
from s2seg.progress import Progress, Steps, silent
from s2seg.sources.catalogs import Catalog, resolve_catalog
from s2seg.sources.radiometry import decide_offsets


class NothingMappedError(S2SegError):
    """Every pixel came out as nodata."""


@dataclass(frozen=True)
class MapResult:
    """Where a run's outputs are.

    Parameters
    ----------
    zarr, land_cover, items, quicklook, run
        Paths; one COG and one STAC item per date in ``per-date`` mode, else one of each.
    record
        What ``run.json`` holds.
    up_to_date
        Whether all of it was there already, made of the same scenes, model and settings, so that nothing was done.
    """

    zarr: Path
    land_cover: tuple[Path, ...]
    items: tuple[Path, ...]
    quicklook: Path
    run: Path
    record: Mapping[str, Any]
    up_to_date: bool = False


def map_area(
    catalog: str | Path | Catalog,
    aoi: str | Path | Sequence[float] | BaseGeometry | Mapping[str, Any],
    datetime: str,
    model: str | Path | ModelBundle,
    output: str | Path,
    options: MapOptions | None = None,
    on_progress: Progress | None = None,
) -> MapResult:
    """Map the land cover of an area and write everything about it.

    Writes ``land_cover.zarr``, ``land_cover.tif`` (a COG), ``item.json`` (STAC), ``quicklook.png`` and ``run.json``; in
    ``per-date`` mode the Zarr has a time axis, and there is one COG and one item per date. Nothing appears under these
    names before all of it is complete. An interrupted run leaves its blocks in ``.partial``, and the next one that is
    to make the same map goes on from there; what is up to date is left as it is.

    On a cluster one worker settles the runtime, the device and the precision that are left to ``auto``, and all of them
    run the network so. Where only some have a GPU, let these announce it: see :func:`s2seg.inference.gpu_annotations`.

    Parameters
    ----------
    catalog, aoi, datetime
        Where, what and when; see :func:`s2seg.search`.
    model
        A bundle, or its path or URL.
    output
        Folder to write to; it is made if it does not exist.
    options
        How to map.
    on_progress
        Called with (stage, done, total).

    Raises
    ------
    S2SegError
        A subclass that names what is wrong with the input, the data or the output folder.
    """
    options = options or MapOptions()
    folder = Path(output)
    report = on_progress or silent
    earlier = finished_run(folder, overwrite=options.overwrite)
    clock = _Clock()
    with _noted_warnings() as notes:
        with clock("search"):
            report("search", 0, 1)
            plan = plan_area(catalog, aoi, datetime, model, options)
            report("search", 1, 1)
        with clock("prepare"):
            offsets = decide_offsets(plan.items, check=options.check_offsets)
            # this process by itself opens no network for a map that is there already
            opened = None if current_client() is None else _open_session(plan)
            made_of = fingerprint(plan, offsets, opened and _kind(opened[0]))
            if earlier:
                check_up_to_date(folder, earlier, made_of)
                return _result(folder, earlier, up_to_date=True)
            session, why = opened or _open_session(plan)
        scene = build_scene(plan, offsets)
        prediction = build_prediction(_settled(plan, session) if opened else plan, scene)
        with (
            staging(folder) as staged,
            dask.config.set(num_workers=plan.threads),
            ThreadPoolExecutor(1) as aside,
        ):
            picture = aside.submit(read_picture, plan, offsets)
            with clock("map"):
                write_zarr(
                    prediction, staged / ZARR, tile=plan.tile, overwrite=True, fingerprint=made_of,
                    on_progress=_noting_the_start(lambda done, total: report("map", done, total)),
                )  # fmt: skip
            with clock("outputs"):
                products = write_products(plan, staged, picture.result(), lambda d, n: report("outputs", d, n))
            _refuse_empty(products, plan.model.spec.legend)
            record = {"fingerprint": made_of} | describe_run(
                plan,
                _lasting(str(resolve_catalog(catalog).url)),
                datetime,
                offsets,
                products,
                {"session": session, "chosen": why},
                list(dict.fromkeys(notes)),
                clock.seconds,
            )
            with writing(folder):
                (staged / RUN).write_text(json.dumps(record, indent=2) + "\n")
                publish(staged, folder)
    return _result(folder, record)


def _result(folder: Path, record: Mapping[str, Any], *, up_to_date: bool = False) -> MapResult:
    return MapResult(
        zarr=folder / ZARR,
        land_cover=tuple(folder / made["land_cover"] for made in record["maps"]),
        items=tuple(folder / made["item"] for made in record["maps"]),
        quicklook=folder / QUICKLOOK,
        run=folder / RUN,
        record=record,
        up_to_date=up_to_date,
    )


def _open_session(plan: Plan) -> tuple[str, str]:
    """Open the network where it will run, on a cluster one of its workers; return its session's name and why it is."""
    options = plan.options
    session = SessionRef(plan.model.path, plan.model.sha256, options.runtime, options.device, options.precision)
    if current_client() is None:
        opened, why = choose_session(plan.model, options.runtime, options.device, options.precision)
        return opened.name, why
    with gpu_annotations(session):
        name, why = delayed(_name_session)(session).compute(optimize_graph=False)
    return name, why


def _kind(name: str) -> tuple[str, str, str]:
    """Runtime, device and precision from a session's name; all GPUs count as one, since each worker has its own."""
    runtime, device, precision = name.split()
    return runtime, device.partition(":")[0], precision


def _settled(plan: Plan, name: str) -> Plan:
    """Put what a session's name says in the place of ``auto``; a device that was asked for keeps its number."""
    runtime, device, precision = _kind(name)
    if plan.options.device != "auto":
        device = plan.options.device
    return replace(plan, options=replace(plan.options, runtime=runtime, device=device, precision=precision))


def _name_session(ref: SessionRef) -> tuple[str, str]:
    session, why = choose_session(load_model(ref.path), ref.runtime, ref.device, ref.precision)
    return session.name, why


def _lasting(url: str) -> str:
    """A local path that means the same in another folder."""
    return url if "://" in url else str(Path(url).absolute())


class _Clock:
    """Seconds spent in each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - start, 3)


@contextmanager
def _noted_warnings() -> Iterator[list[str]]:
    """Collect our own warnings for run.json, and pass every warning on when done."""
    notes: list[str] = []
    shown = warnings.showwarning

    def note(message: Warning | str, category: type[Warning], *rest: Any) -> None:
        if issubclass(category, S2SegWarning):
            notes.append(str(message))
        shown(message, category, *rest)

    with warnings.catch_warnings():
        warnings.showwarning = note  # type: ignore[assignment]
        yield notes


def _noting_the_start(report: Steps) -> Steps:
    """Say so if the first report is not of nothing."""
    told = False

    def step(done: int, total: int) -> None:
        nonlocal told
        if done and not told:
            warnings.warn(S2SegWarning(f"goes on from {done} of {total} blocks of an interrupted run"), stacklevel=2)
        told = True
        report(done, total)

    return step


def _refuse_empty(products: Sequence[Product], legend: Legend) -> None:
    """Raise a NothingMappedError if every pixel of every map is nodata."""
    if all(product.counts.sum() == product.counts[legend.nodata] for product in products):
        raise NothingMappedError(
            "nothing to map: no scene has a clear pixel in this area; widen the dates, or mask fewer SCL classes"
        )
