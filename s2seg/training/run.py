"""From a configuration to a scored model: the stage calls, in order."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from s2seg.assess.pictures import write_curves
from s2seg.assess.scores import Scores
from s2seg.errors import InputError, OutputError
from s2seg.models.bundle import CONFIG_FILE, SPEC_FILE, ModelBundle, load_model, save_bundle
from s2seg.outputs._files import check_writable, replacing, writing
from s2seg.progress import Progress, silent
from s2seg.training.checkpoints import FOLDER as CHECKPOINTS
from s2seg.training.checkpoints import LAST
from s2seg.training.chips import ChipStore, holds_chips, open_chips, write_chips
from s2seg.training.config import TrainConfig, load_config
from s2seg.training.cutting import Place
from s2seg.training.evaluate import Evaluation, baseline, check_evaluation, evaluate, write_evaluation
from s2seg.training.fit import FitResult, check_fit, fit
from s2seg.training.history import Standing
from s2seg.training.regions import chip_spec, open_places, split_spec, warn_of_empty_classes
from s2seg.training.split_map import draw_split, draw_tiles
from s2seg.training.splits import check_split
from s2seg.training.streaming import StreamedChips

CHIPS = "chips.zarr"
_VERSIONS = 4  # of each chip in a preview


@dataclass(frozen=True)
class TrainResult:
    """A trained model and how good it is.

    Parameters
    ----------
    model
        The bundle, in the output folder.
    fitted
        The course of the training.
    test
        Scores on the test part; None where the split has none.
    """

    model: ModelBundle
    fitted: FitResult
    test: Evaluation | None


def prepare(
    config: TrainConfig, path: str | Path, *, overwrite: bool = False, on_progress: Progress | None = None
) -> tuple[Sequence[Place], ChipStore]:
    """Open the regions or tiles, and their chips; choose and cut these if they are not there yet.

    With ``chips.store: false`` what is written is which chips there are and what is in them, and their pixels are read
    from the scenes when they are asked for.

    Parameters
    ----------
    config
        What and where.
    path
        The chip store. One that was made from the same configuration is used as it is.
    overwrite
        Replace a store of another configuration.
    on_progress
        Called with (stage, done, total).

    Raises
    ------
    S2SegError
        If data are missing or do not fit, the split cannot teach, or the store is of another configuration.
    """
    path, report = Path(path), on_progress or silent
    fingerprint = config.fingerprint("data")
    places = open_places(config, lambda done, total: report("search", done, total))
    if path.exists() and not overwrite:
        chips = open_chips(path, fingerprint)
        if chips.has_pixels or not config.chips.store:
            return places, _readable(chips, config, places)
        overwrite = True  # the same chips, but without the pixels that are now asked for
    warn_of_empty_classes(check_split(places, config.legend, split_spec(config).required), config)
    chips = write_chips(
        places, path, config.legend, chip_spec(config), fingerprint=fingerprint, bands=config.channels,
        pixels=config.chips.store, overwrite=overwrite, on_progress=lambda done, total: report("chips", done, total),
    )  # fmt: skip
    return places, _readable(chips, config, places)


def _readable(chips: ChipStore, config: TrainConfig, places: Sequence[Place]) -> ChipStore:
    return chips if chips.has_pixels else StreamedChips(chips.path, config, places)


def chips_path(folder: str | Path, config: TrainConfig) -> Path:
    """Where in a folder the chips of a configuration go, if those of others may be there too."""
    return Path(folder) / f"chips-{config.fingerprint('data')[:8]}.zarr"


def _check_chips(path: str | Path, config: TrainConfig) -> Path:
    """Refuse a store that was named and is of another configuration: others may share it, so it is not replaced."""
    path = Path(path)
    if path.exists() and ChipStore(path).fingerprint != config.fingerprint("data"):
        raise InputError(
            f"the chips in {path} were made from another configuration: leave out --chips, and new ones are cut into "
            "the output folder"
        )
    return path


def preview(
    config: TrainConfig,
    path: str | Path,
    *,
    chips: str | Path | None = None,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Path:
    """Draw training chips beside augmented versions of them.

    Parameters
    ----------
    config
        What and where.
    path
        Where the PNG goes.
    chips
        A chip store to share between trainings, made if it is not there; by default one beside ``path``.
    overwrite
        Replace what stands at ``path``, and chips beside it that are of another configuration.
    on_progress
        Called with (stage, done, total).

    Raises
    ------
    S2SegError
        As :func:`prepare`.
    """
    from s2seg.training.augment import Augment, AugmentSpec
    from s2seg.training.data import MixedChips, date_plan
    from s2seg.training.preview import write_preview

    path = check_writable(path, overwrite=overwrite)
    if chips is not None:
        _, store = prepare(config, _check_chips(chips, config), on_progress=on_progress)
    else:
        own = path.with_name(CHIPS)
        outdated = overwrite and not holds_chips(own, config.fingerprint("data"))
        _, store = prepare(config, own, overwrite=outdated, on_progress=on_progress)
    train = store.indices("train")
    shown = np.sort(np.random.default_rng(config.fit.seed).permutation(train)[:6])
    augment = Augment(
        AugmentSpec(**config.augment.model_dump()), config.channels, store.histogram[train].sum(axis=0).tolist()
    )
    dates = date_plan(store, train, config.augment.mixed_dates, config.fit.seed)
    mixes = [] if dates is None else dates.draw(0, [np.searchsorted(train, shown)] * _VERSIONS)
    return write_preview(
        path, *store.read(shown), augment, config.legend, mixed=[MixedChips(store).read(m.among(train)) for m in mixes],
        seed=config.fit.seed, rows=len(shown), columns=2 + _VERSIONS, overwrite=overwrite,
    )  # fmt: skip


def train(
    config: TrainConfig,
    output: str | Path,
    *,
    chips: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> TrainResult:
    """Train a model and score it on the test part.

    Writes a bundle (``model.json``, ``weights.safetensors``), ``config.yaml``, ``chips.zarr``, ``split.png``,
    ``curves.png``, scores and pictures of the test part, ``checkpoints/`` and ``logs/``. The bundle appears last.

    Parameters
    ----------
    config
        From :func:`~s2seg.training.config.load_config`.
    output
        The folder; ``s2seg map --model`` takes it as it is.
    chips
        A chip store to share between trainings, made if it is not there; by default one in ``output``.
    resume
        Go on with an interrupted training.
    overwrite
        Replace what is in ``output``, the chips there included.
    on_progress
        Called with (stage, done, total).

    Raises
    ------
    S2SegError
        A subclass that names what is wrong with the configuration, the data or the output folder.
    """
    folder, report = Path(output), on_progress or silent
    _check_folder(folder, config, resume, overwrite)
    check_fit(config)
    path = folder / CHIPS if chips is None else _check_chips(chips, config)
    anew = overwrite and not resume and chips is None
    places, store = prepare(config, path, overwrite=anew, on_progress=on_progress)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / CONFIG_FILE) as partial:
            partial.write_text(config.to_yaml())
    if config.tiles is None:
        draw_split(places, folder / "split.png", config.legend, overwrite=True)
    else:
        draw_tiles(store, folder / "split.png", overwrite=True)

    def step(standing: Standing) -> None:
        if standing.row is None:  # the end of an epoch was told with its last batch
            report("train", standing.done, standing.total)

    fitted = fit(config, store, folder, resume=resume, on_progress=step)
    write_curves(folder / "curves.png", fitted.history, config.name, overwrite=True)
    scratch = folder / ".bundle"
    try:
        weights = fitted.network.state_dict()
        model = save_bundle(scratch, fitted.spec, weights, overwrite=True)
        test = None
        if len(store.indices("test")):
            test = evaluate(model, store, places, part="test", on_progress=on_progress)
            write_evaluation(test, folder, config.name)
            spec = replace(fitted.spec, metrics={**fitted.spec.metrics, "test": _summary(test)})
            model = save_bundle(scratch, spec, weights, overwrite=True)
        with writing(folder):
            for name in (model.spec.weights_file, SPEC_FILE):
                (scratch / name).replace(folder / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return TrainResult(load_model(folder), fitted, test)


def _check_folder(folder: Path, config: TrainConfig, resume: bool, overwrite: bool) -> None:
    """Refuse to mix two trainings in one folder."""
    check_writable(folder / SPEC_FILE, overwrite=True)
    if overwrite and not resume:
        return
    settings = folder / CONFIG_FILE
    other = settings.exists() and load_config(settings).fingerprint() != config.fingerprint()
    if resume:
        if other and (folder / CHECKPOINTS / LAST).exists():  # said before that training's settings are written over
            raise InputError(f"{folder} holds another configuration's training: go on with {settings}")
        return
    for name in (SPEC_FILE, CHECKPOINTS):
        if (folder / name).exists():
            raise OutputError(
                str(folder), f"{name} is there already; pass --resume to go on, or --overwrite to replace"
            )
    if other:
        raise OutputError(str(folder), "it holds another configuration's training; pass --overwrite to replace it")


def _summary(evaluation: Evaluation) -> dict[str, object]:
    scores: Scores = next(iter(evaluation.scores.values()))
    return {
        "overall_accuracy": scores.overall_accuracy,
        "mean_iou": scores.mean_iou,
        "kappa": scores.kappa,
        "iou": dict(zip(scores.legend.names, np.asarray(scores.iou).tolist(), strict=True)),
        "pixels": int(scores.support.sum()),
    }


def evaluate_model(
    model: str | Path,
    output: str | Path | None = None,
    *,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    chips: str | Path | None = None,
    part: str = "test",
    with_baseline: bool = False,
    on_progress: Progress | None = None,
) -> tuple[Evaluation, list[Path]]:
    """Score a trained model again, beside a forest if asked, or on the places of another configuration.

    Parameters
    ----------
    model
        A folder that :func:`train` wrote, or any bundle with a ``config``.
    output
        Where scores and pictures go; by default the model's folder.
    config
        A configuration; by default the model's own.
    overrides
        For ``config``; see :func:`~s2seg.training.config.load_config`.
    chips
        Its chip store; by default the model's own, or for other data one in ``output`` that is named by them.
    part
        Which part of the split.
    with_baseline
        Fit and score the per-pixel forest too.
    on_progress
        Called with (stage, done, total).

    Raises
    ------
    S2SegError
        If there is no configuration, or data are missing or do not fit.
    """
    bundle = load_model(model)
    folder = Path(output or bundle.folder)
    own = bundle.folder / CONFIG_FILE
    if config is None and not own.is_file():
        raise InputError(f"{bundle.folder} holds no {CONFIG_FILE}: pass --config with areas and labels to score it on")
    settings = load_config(config or own, overrides)
    check_evaluation(bundle, part, settings.legend, settings.channels)
    check_writable(folder / f"scores_{part}.json", overwrite=True)
    scored = _chips_to_score(chips, bundle.folder, folder, settings)
    if output is None and chips is None and scored != bundle.folder / CHIPS and (bundle.folder / CHIPS).exists():
        raise InputError(f"these are not the chips of {bundle.folder}, whose scores are its own: pass --output")
    places, store = prepare(settings, scored, on_progress=on_progress)
    forest = baseline(store, settings.fit.seed) if with_baseline else None
    result = evaluate(bundle, store, places, part=part, forest=forest, on_progress=on_progress)
    return result, write_evaluation(result, folder, bundle.spec.name)


def _chips_to_score(named: str | Path | None, model: Path, output: Path, config: TrainConfig) -> Path:
    """The store that was named, the one of the model if its chips are of this configuration, or one in the output."""
    if named is not None:
        if not Path(named).exists():
            raise InputError(
                f"there are no chips in {named}: leave out --chips to use the model's own, or to cut new ones"
            )
        return _check_chips(named, config)
    own = model / CHIPS
    return own if holds_chips(own, config.fingerprint("data")) else chips_path(output, config)
