"""The command line: parse, call one function, print. No logic."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from s2seg.allocator import WORKER_ENVIRONMENT, keep_freed_memory
from s2seg.errors import InputError, S2SegError, S2SegWarning

app = typer.Typer(
    name="s2seg",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(help="Look at model bundles, or make one from a foreign network.", no_args_is_help=True)
app.add_typer(models, name="models")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"s2seg {importlib.metadata.version('s2seg')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version, and stop.")
    ] = False,
) -> None:
    """Land-cover maps from Sentinel-2: search a STAC catalog, stack the bands, classify, write Zarr and COG."""


out, err = Console(markup=False, emoji=False), Console(stderr=True)

Catalog = Annotated[
    str,
    typer.Option(
        help="earth-search, planetary-computer or cdse; the URL of any STAC API; or the path of a catalog.json, a "
        "stac-geoparquet file or an ItemCollection."
    ),
]
Aoi = Annotated[
    str,
    typer.Option(help="west,south,east,north in degrees; a GeoJSON file; or WKT. A box may cross the antimeridian."),
]
Datetime = Annotated[
    str, typer.Option("--datetime", help="As STAC writes it: 2023-08, 2023-08-01/2023-08-31, ../2023-08-31.")
]
Collection = Annotated[str | None, typer.Option(help="STAC collection, such as sentinel-2-c1-l2a or sentinel-2-l1c.")]
MaxCloud = Annotated[float | None, typer.Option(min=0, max=100, help="Leave out scenes cloudier than this (percent).")]


def _local(path: str) -> Path:
    """Where to write; a URL would quietly become a folder of that name."""
    if "://" in str(path):
        raise InputError(f"{path}: results are written to a local path; copy them from there")
    return Path(path)


@app.command("search")
def search_command(
    aoi: Aoi,
    datetime: Datetime,
    catalog: Catalog = "earth-search",
    collection: Collection = None,
    max_cloud_cover: MaxCloud = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print an ItemCollection instead of a table.")] = False,
) -> None:
    """List the scenes that see an area.

    Example: `s2seg search --aoi 15.2,45.2,16.2,46.2 --datetime 2023-08 --max-cloud-cover 30`
    """
    import pystac

    from s2seg.sources.aoi import parse_aoi
    from s2seg.sources.search import describe, search

    area = parse_aoi(aoi)
    items = search(catalog, area, datetime, max_cloud_cover=max_cloud_cover, collection=collection)
    if as_json:
        print(json.dumps(pystac.ItemCollection(items).to_dict()))
        return
    table = Table("item", "date", "cloud %", "tile", "covers %")
    for row in describe(items, area):
        cloud = "-" if row["cloud_cover"] is None else f"{row['cloud_cover']:.1f}"
        table.add_row(row["id"], str(row["datetime"])[:16], cloud, row["tile"] or "-", f"{100 * row['coverage']:.0f}")
    out.print(table)
    out.print(f"{len(items)} items")


@app.command("map")
def map_command(
    aoi: Aoi,
    datetime: Datetime,
    model: Annotated[str, typer.Option(help="A model bundle: a folder or an fsspec URL (s3://, https://).")],
    output: Annotated[Path, typer.Option(parser=_local, help="Folder for the results.")],
    catalog: Catalog = "earth-search",
    collection: Collection = None,
    max_cloud_cover: MaxCloud = None,
    resolution: Annotated[float, typer.Option(help="Metres per pixel.")] = 10.0,
    crs: Annotated[str | None, typer.Option(help="Projected CRS of the map [default: the area's UTM zone].")] = None,
    composite: Annotated[
        str,
        typer.Option(
            help="How dates become one scene: median, mean, percentile, least-cloudy, max-ndvi, medoid; or per-date to "
            "map each pass by itself."
        ),
    ] = "median",
    percentile: Annotated[float, typer.Option(help="For --composite percentile.")] = 25.0,
    mask: Annotated[
        str | None, typer.Option(help="SCL classes to leave out, by name, separated by commas; '' keeps all.")
    ] = None,
    dilate: Annotated[float, typer.Option(help="Metres by which the cloud mask grows.")] = 0.0,
    layers: Annotated[
        str, typer.Option(help="What to write: class, and with commas confidence and probability.")
    ] = "class",
    resampling: Annotated[str, typer.Option(help="20 and 60 m bands to 10 m: nearest or bilinear.")] = "nearest",
    check_offsets: Annotated[
        bool,
        typer.Option(help="Compare the catalog's word on the radiometric offset with the pixels, where it can err."),
    ] = True,
    runtime: Annotated[
        str, typer.Option(help="torch, torch-compiled (needs a C++ compiler), openvino, onnxruntime or auto.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, tensorrt (onnxruntime) or auto.")] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="float32 for the same map on every machine; bfloat16, about three times as fast on a CPU with AMX; "
            "float16 (torch on a GPU); auto takes bfloat16 with OpenVINO and on a GPU where the processor has it."
        ),
    ] = "auto",
    core: Annotated[
        int | None,
        typer.Option(help="Pixels on a side of a block: memory grows with its square [default: near 2 GiB in all]."),
    ] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask scheduler, tcp://host:8786.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Start this many local worker processes instead of threads.")] = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, compute nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace results that are there already.")] = False,
) -> None:
    """Map the land cover of an area: search, stack, composite, classify, write.

    Writes land_cover.zarr, land_cover.tif (a COG with palette and class names), item.json (STAC), quicklook.png and
    run.json (what was done, and with what). Given again, the same command goes on with what was interrupted, and does
    nothing where the map is up to date.

    Example: `s2seg map --catalog earth-search --aoi field.geojson --datetime 2023-06/2023-08 --model m/ --output out/`
    """
    from s2seg.pipeline import MapOptions, map_area, plan_area
    from s2seg.pipeline.folder import finished_run
    from s2seg.sources.composite import DEFAULT_MASK, CompositeSpec

    if composite == "per-date" and (mask is not None or dilate):
        raise InputError("--mask and --dilate are for composites: per-date maps every pixel of each pass")
    masked = DEFAULT_MASK if mask is None else tuple(_names("mask", mask))
    options = MapOptions(
        resolution=resolution,
        crs=crs,
        collection=collection,
        max_cloud_cover=max_cloud_cover,
        composite="per-date"
        if composite == "per-date"
        else CompositeSpec(cast(Any, composite), masked, dilate, percentile),
        layers=cast(Any, tuple(_names("layers", layers))),
        resampling=cast(Any, resampling),
        check_offsets=check_offsets,
        runtime=runtime,
        device=device,
        precision=precision,
        core=core,
        overwrite=overwrite,
    )
    if dry_run:
        finished_run(output, overwrite=overwrite)  # what stands in the way of a run is told here, too
        out.print(_facts_table(plan_area(catalog, aoi, datetime, model, options).describe()))
        return
    with _cluster(scheduler, workers), _telling_notes(), _progress() as report:
        result = map_area(catalog, aoi, datetime, model, output, options, on_progress=report)
    if result.up_to_date:
        out.print("up to date: made of the same scenes, model and settings, so nothing was done")
    for made in result.record["maps"]:
        out.print(_class_table(made))
    ran = result.record["model"]
    out.print(f"classified with {ran['session']} ({ran['chosen']})")
    for path in (*result.land_cover, result.zarr, result.quicklook, *result.items, result.run):
        out.print(str(path), soft_wrap=True)


@app.command("train")
def train_command(
    config: Annotated[Path | None, typer.Argument(help="A YAML file; --template prints one.")] = None,
    output: Annotated[Path, typer.Option(parser=_local, help="Folder for the model and all about it.")] = Path("model"),
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A value in place of the file's: fit.epochs=3. Repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="In place of fit.seed.")] = None,
    chips: Annotated[
        Path | None, typer.Option(help="A chip store to share between trainings, made if it is not there.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted training.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier training.")] = False,
    preview_only: Annotated[
        bool, typer.Option("--preview", help="Draw augmented chips into preview.png, and stop.")
    ] = False,
    as_template: Annotated[bool, typer.Option("--template", help="Print a commented configuration, and stop.")] = False,
) -> None:
    """Train a model on scenes and labels, and score it on places it has not seen.

    The output folder is the model: `s2seg map --model` takes it as it is.

    Example: `s2seg train examples/alberta.yaml --output m/`
    """
    _needs("pydantic", "sklearn", "pytorch_lightning")
    from s2seg.training.config import load_config
    from s2seg.training.template import template

    if as_template:
        print(template(), end="")
        return
    if config is None:
        raise InputError("name a configuration; s2seg train --template > train.yaml writes one to begin with")
    overrides = [*(settings or []), *([f"fit.seed={seed}"] if seed is not None else [])]
    loaded = load_config(config, overrides)
    from s2seg.training.run import preview, train

    with _telling_notes(), _progress() as report:
        if preview_only:
            path = preview(loaded, output / "preview.png", chips=chips, overwrite=overwrite, on_progress=report)
        else:
            try:
                result = train(loaded, output, chips=chips, resume=resume, overwrite=overwrite, on_progress=report)
            except KeyboardInterrupt as stop:
                stop.add_note("the same command with --resume goes on from the last checkpoint")
                raise
    if preview_only:
        out.print(str(path), soft_wrap=True)
        return
    kept = result.fitted.kept_epoch
    score = result.fitted.history[kept - 1]["val_mean_iou"]
    out.print(f"{loaded.fit.keep} epoch, {kept}: mean IoU {score:.3f} of the validation part")
    if result.test is not None:
        _print_scores(result.test)
    out.print(f"{result.model.path}  {result.model.sha256[:12]}", soft_wrap=True)


@app.command("tune")
def tune_command(
    config: Annotated[Path, typer.Argument(help="A training configuration: what all trials share.")],
    output: Annotated[Path, typer.Option(parser=_local, help="Folder of the study; an interrupted one goes on.")],
    trials: Annotated[int, typer.Option(min=1, help="How many trainings, those already done included.")] = 20,
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no trial after this time.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for s2seg train. Repeatable.")] = None,
) -> None:
    """Search for a learning rate, loss mix, encoder, batch and chip size; best.yaml is what s2seg train takes next.

    The test part is not looked at.

    Example: `s2seg tune examples/alberta.yaml --output study/ --trials 20`
    """
    _needs("pydantic", "sklearn", "pytorch_lightning")
    from s2seg.training.config import load_config
    from s2seg.training.history import Standing
    from s2seg.training.run import chips_path, prepare
    from s2seg.training.tune import tune

    loaded = load_config(config, settings or [])
    with _progress() as report:

        def step(number: int, standing: Standing) -> None:
            if standing.row is None:  # the end of an epoch was told with its last batch
                report(f"trial {number}", standing.done, standing.total)

        result = tune(
            loaded,
            lambda wanted: prepare(wanted, chips_path(output, wanted), on_progress=report)[1],
            output,
            trials=trials,
            timeout=None if minutes is None else 60 * minutes,
            on_progress=step,
        )
    table = Table("trial", "state", "mean IoU", "settings")
    for trial in result.trials:
        score = "-" if trial.score is None else f"{trial.score:.3f}"
        table.add_row(str(trial.number), trial.state, score, ", ".join(f"{k}={v}" for k, v in trial.settings.items()))
    out.print(table, f"best: trial {result.best.number}, {output / 'best.yaml'}", soft_wrap=True)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Option(help="A model; one that s2seg train wrote knows its own test part.")],
    config: Annotated[
        Path | None, typer.Option(help="Areas and labels to score on [default: the model's own].")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="As for s2seg train. Repeatable.")] = None,
    part: Annotated[str, typer.Option(help="test, validation or train.")] = "test",
    baseline: Annotated[
        bool, typer.Option("--baseline", help="Fit and score a per-pixel random forest on the same split.")
    ] = False,
    chips: Annotated[
        Path | None, typer.Option(help="The chip store [default: the model's own; other settings get one of theirs].")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder for scores and pictures [default: the model's].")] = None,
) -> None:
    """Score a model on a part of the split: one confusion matrix over all of its labelled pixels.

    Example: `s2seg evaluate --model m/ --baseline`
    """
    _needs("pydantic", "sklearn", "pytorch_lightning")
    from s2seg.training.run import evaluate_model

    with _progress() as report:
        result, written = evaluate_model(
            model, output, config=config, overrides=settings or [], chips=chips, part=part, with_baseline=baseline,
            on_progress=report,
        )  # fmt: skip
    _print_scores(result)
    for path in written:
        out.print(str(path), soft_wrap=True)


@app.command("export")
def export_command(
    model: Annotated[str, typer.Option(help="A model bundle: a folder or an fsspec URL.")],
    kind: Annotated[str, typer.Option(help="onnx, torchscript or openvino.")],
    output: Annotated[
        Path,
        typer.Option(parser=_local, help="Where to write: a folder (onnx), a .pt (torchscript) or an .xml (openvino)."),
    ],
    chips: Annotated[Path | None, typer.Option(help="Chip store to compare on [default: the model's own].")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")] = False,
) -> None:
    """Convert a model for other programs; refused unless it answers as torch does.

    Example: `s2seg export --model m/ --kind onnx --output m-onnx/`
    """
    from s2seg.models.bundle import load_model
    from s2seg.models.export import export_model

    bundle = load_model(model)
    store = chips or _own_chips(bundle)
    images = None if store is None else _some_chips(store, bundle.spec.bands)
    made = export_model(bundle, cast(Any, kind), output, chips=images, overwrite=overwrite)
    out.print(
        f"{made.path}  agrees with torch on {100 * made.agreement:.3f} % of pixels, probabilities within "
        f"{made.max_difference:.1e}", soft_wrap=True,
    )  # fmt: skip


@models.command("show")
def models_show(
    path: Annotated[str, typer.Argument(help="A model bundle: a folder or an fsspec URL.")],
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Run it with every installed runtime: agreement with torch in float32 (an ONNX model: with "
            "onnxruntime), and speed.",
        ),
    ] = False,
    chips: Annotated[
        Path | None,
        typer.Option(
            help="For --check: a chip store with real pixels [default: the model's own, else a synthetic landscape]."
        ),
    ] = None,
) -> None:
    """Print what a bundle holds: bands, scaling, legend, geometry, provenance.

    Example: `s2seg models show m/ --check --chips m/chips.zarr`
    """
    from s2seg.models.bundle import describe, load_model

    bundle = load_model(path)
    out.print(_facts_table(describe(bundle)))
    if check:
        _print_checks(bundle, chips or _own_chips(bundle))


@models.command("import")
def models_import(
    source: Annotated[str, typer.Argument(help="An .onnx file, or csmask for the networks that ukis-csmask ships.")],
    output: Annotated[Path, typer.Option(parser=_local, help="Folder of the new bundle.")],
    bands: Annotated[str | None, typer.Option(help="Bands in channel order: blue,green,red,nir.")] = None,
    mean: Annotated[str | None, typer.Option(help="Mean reflectance of each band.")] = None,
    std: Annotated[str | None, typer.Option(help="Standard deviation of each band.")] = None,
    scale: Annotated[float, typer.Option(help="Reflectance of one digital number.")] = 1e-4,
    legend: Annotated[str | None, typer.Option(help="A legend's YAML file or built-in name.")] = None,
    activation: Annotated[str, typer.Option(help="What the network returns: logits or probabilities.")] = "logits",
    name: Annotated[str | None, typer.Option(help="Name of the model [default: the file's].")] = None,
    variant: Annotated[str, typer.Option(help="csmask: 4-band or 6-band.")] = "4-band",
    level: Annotated[str, typer.Option(help="csmask: l2a or l1c.")] = "l2a",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a bundle that is there already.")] = False,
) -> None:
    """Wrap a foreign ONNX network as a bundle, or take the cloud masks of the package ukis-csmask.

    Example: `s2seg models import net.onnx --bands red,green,blue --mean 0.1,0.1,0.1 --std 0.05,0.05,0.05 --legend
    worldcover --output m/`
    """
    from s2seg.legend import Legend
    from s2seg.models.importing import import_csmask, import_onnx

    if source == "csmask":
        bundle = import_csmask(output, variant=variant, level=level, overwrite=overwrite)
    else:
        if bands is None or mean is None or std is None or legend is None:
            raise InputError("an ONNX network does not say what it needs: give --bands, --mean, --std and --legend")
        bundle = import_onnx(
            source,
            output,
            name=name or Path(source).stem,
            bands=_names("bands", bands),
            mean=_numbers("mean", mean),
            std=_numbers("std", std),
            legend=Legend.load(legend),
            scale=scale,
            activation=activation,
            overwrite=overwrite,
        )
    out.print(f"{bundle.path}  {bundle.spec.name}  {bundle.sha256[:12]}", soft_wrap=True)


def _needs(*packages: str) -> None:
    """Say which extra is missing, if one is."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"training needs {', '.join(missing)}: pip install 's2seg[train]'")


def _own_chips(bundle: Any) -> Path | None:
    """The chip store that a training has left beside a model, where there is one."""
    own = Path(bundle.folder / "chips.zarr")
    return own if own.exists() else None


def _some_chips(store: Path, bands: Sequence[str]) -> Any:
    """A few real pixels to compare runtimes on, in a model's bands."""
    _needs("pydantic")
    from s2seg.training.chips import open_chips

    chips = open_chips(store)
    if missing := [band for band in bands if band not in chips.bands]:
        raise InputError(
            f"the model needs {', '.join(missing)}, and the chips in {store} have {', '.join(chips.bands)}"
        )
    return chips.images(slice(0, 8))[:, [chips.bands.index(band) for band in bands]]


def _print_checks(bundle: Any, store: Path | None) -> None:
    """A table of all runtimes, run on a few chips of a store or on a synthetic landscape."""
    from s2seg.models.checking import GOALS, check_runtimes, reference

    pixels = None if store is None else _some_chips(store, bundle.spec.bands)
    goals = ", ".join(f"{100 * goal:g} % in {precision}" for precision, goal in GOALS.items())
    caption = f"agreement with {reference(bundle)} in float32 on the CPU; ! below the goal of {goals}"
    table = Table("runtime", "device", "precision", "agreement %", "Mpx/s", "why not", caption=caption)
    with _progress() as report:
        rows = check_runtimes(bundle, pixels, lambda done, total: report("check", done, total))
    for row in rows:
        mark = "" if row.agrees else " !"
        said = ("-", "-") if row.reason else (f"{100 * row.agreement:.4f}{mark}", f"{row.speed:.2f}")
        table.add_row(row.runtime, row.device or "-", row.precision, *said, row.reason)
    seen = "a synthetic landscape" if pixels is None else f"{len(pixels)} chips of {store}"
    out.print(table)
    out.print(f"compared on {seen}", soft_wrap=True)


def _print_scores(result: Any) -> None:
    """A table for each model, and one for all of them."""
    from s2seg.assess.scores import compare_table

    for name, scores in result.scores.items():
        out.print(_rows_table(scores.table(), f"{name}, {result.part} part"))
    if len(result.scores) == 1:
        out.print(*(f"{what} {value}" for what, value in scores.summary()[1:]), sep=", ")
    else:
        out.print(_rows_table(compare_table(result.scores), "IoU of each class, and the whole map"))


def _rows_table(rows: list[tuple[str, ...]], title: str) -> Table:
    header, *others = rows
    table = Table(*header, title=title, title_justify="left")
    for row in others:
        table.add_row(*row)
    return table


def _names(option: str, text: str) -> list[str]:
    names = [part.strip() for part in text.split(",")] if text.strip() else []
    if "" in names or len(set(names)) < len(names):
        raise InputError(f"--{option} must be different names separated by commas, not {text!r}")
    return names


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"--{option} must be numbers separated by commas, not {text!r}") from error


def _class_table(made: dict[str, Any]) -> Table:
    """Areas in one map."""
    mapped = sum(c["pixels"] for c in made["classes"]) or 1
    table = Table("code", "class", "km2", "share %", title=made["land_cover"], title_justify="left")
    for c in made["classes"]:
        table.add_row(str(c["code"]), c["name"], f"{c['km2']:,.1f}", f"{100 * c['pixels'] / mapped:.1f}")
    return table


def _facts_table(facts: Iterable[tuple[str, str]]) -> Table:
    table = Table("what", Column("how much", overflow="fold"), show_header=False)
    for name, value in facts:
        table.add_row(name, value)
    return table


@contextmanager
def _cluster(scheduler: str | None, workers: int) -> Iterator[None]:
    """Run dask where asked: threads of this process, local worker processes, or a running scheduler."""
    if scheduler is None and workers == 0:
        yield
        return
    import dask
    from dask.system import CPU_COUNT
    from distributed import Client, LocalCluster

    from s2seg.models.runtimes.threads import THREADS

    if scheduler is not None:
        try:
            client = Client(scheduler, timeout=20)
        except (OSError, ValueError) as error:
            raise InputError(f"no Dask scheduler answers at {scheduler}: start one with `dask scheduler`") from error
        with client:
            yield
        return
    default = dask.config.get("distributed.nanny.pre-spawn-environ")
    settings = {
        "distributed.nanny.pre-spawn-environ": default | WORKER_ENVIRONMENT,
        THREADS: max(1, CPU_COUNT // workers),  # networks share the CPUs
    }
    threads = max(2, CPU_COUNT // workers)  # one reads while another runs the network
    with (
        dask.config.set(settings),
        LocalCluster(n_workers=workers, threads_per_worker=threads, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        yield


@contextmanager
def _progress() -> Iterator[Any]:
    """One bar per stage, on stderr; where nobody watches, a line when a stage is done."""
    if not err.is_terminal:
        yield lambda stage, done, total: err.print(f"{stage} {done}/{total}") if done == total else None
        return
    columns = (
        TextColumn("{task.description:8}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err) as bars:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


@contextmanager
def _telling_notes() -> Iterator[None]:
    """When someone interrupts, say what can be done next, which the parser would not."""
    try:
        yield
    except KeyboardInterrupt as stop:
        _print_notes(stop)
        raise


def _print_notes(error: BaseException) -> None:
    for note in getattr(error, "__notes__", ()):
        _tell("[yellow]note[/]", note)


def _show_warnings() -> Callable[..., None]:
    """What warnings are to call: it tells each of ours once."""
    told: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *_: Any) -> None:
        if issubclass(category, S2SegWarning) and str(message) not in told:
            told.add(str(message))
            _tell("[yellow]note[/]", str(message))

    return show


def _tell(what: str, text: str) -> None:
    err.print(what, end=" ")
    err.print(text, soft_wrap=True, highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments
        Without the program's name; ``sys.argv`` by default.

    Returns
    -------
    int
        0, or 2 for a mistake of the user or in the data, told in one line.
    """
    keep_freed_memory()  # before any thread starts
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", S2SegWarning)
        warnings.showwarning = _show_warnings()
        try:
            app(arguments)
        except S2SegError as error:
            _tell("[red]error[/]", str(error))
            _print_notes(error)
            return 2
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            _tell("[red]error[/]", f"a path is too long for this system: {str(error.filename)[:60]}...")
            return 2
        except SystemExit as stop:  # how the parser ends: 0 after a command, 2 for a wrong option
            return int(stop.code or 0)
    return 0
