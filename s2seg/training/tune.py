"""Search for good settings: short trainings that learn from each other, in a study that can be interrupted."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from s2seg.errors import InputError
from s2seg.outputs._files import remove, replacing, writing
from s2seg.training.checkpoints import FOLDER as CHECKPOINTS
from s2seg.training.checkpoints import MONITOR
from s2seg.training.chips import ChipStore
from s2seg.training.config import TrainConfig
from s2seg.training.fit import Progress, fit
from s2seg.training.module import DivergedError
from s2seg.training.weights import IMAGENET

if TYPE_CHECKING:
    import optuna

JOURNAL, TABLE, BEST = "study.journal", "study.csv", "best.yaml"
_STARTUP = 4  # trials before any is compared with the others
_WARMUP = 3  # epochs that every trial gets


@dataclass(frozen=True)
class SearchSpace:
    """What may be chosen; all else stays as it is configured.

    Parameters
    ----------
    learning_rate
        Least and greatest, drawn on a logarithmic scale.
    region_losses
        A loss of these is mixed with cross entropy, in shares of 0, 0.2 ... 1.
    encoders
        Names as in ``network.encoder``.
    batch_sizes
        Chips in a batch.
    chip_sizes
        Pixels on a side; each needs a chip store. Empty keeps the configured one.

    Raises
    ------
    InputError
        For a range that is none.
    """

    learning_rate: tuple[float, float] = (1e-4, 1e-2)
    region_losses: tuple[str, ...] = ("dice", "focal_tversky", "lovasz")
    encoders: tuple[str, ...] = ("resnet18", "resnet34", "mobilenet_v2", "efficientnet-b0")
    batch_sizes: tuple[int, ...] = (8, 16, 32)
    chip_sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < self.learning_rate[0] <= self.learning_rate[1]:
            raise InputError(f"learning rates from {self.learning_rate[0]:g} to {self.learning_rate[1]:g}: not a range")
        for name in ("region_losses", "encoders", "batch_sizes"):
            if not getattr(self, name):
                raise InputError(f"{name}: give at least one to choose from")


@dataclass(frozen=True)
class Trial:
    """One training of a study.

    Parameters
    ----------
    number
        From 0.
    state
        ``complete``, ``pruned`` or ``fail``.
    score
        The highest ``val_mean_iou``; None if it never got there.
    settings
        What was chosen.
    """

    number: int
    state: str
    score: float | None
    settings: dict[str, Any]


@dataclass(frozen=True)
class TuneResult:
    """A study.

    Parameters
    ----------
    trials
        In the order in which they were started.
    best
        The complete one with the highest score.
    config
        The configuration with the best settings, which is also in ``best.yaml``.
    """

    trials: tuple[Trial, ...]
    best: Trial
    config: TrainConfig


def tune(
    config: TrainConfig,
    chips_for: Callable[[TrainConfig], ChipStore],
    folder: str | Path,
    *,
    trials: int,
    timeout: float | None = None,
    space: SearchSpace | None = None,
    on_progress: Callable[[int, Progress], None] | None = None,
) -> TuneResult:
    """Search for the settings with the highest ``val_mean_iou``; the test part is not looked at.

    Optuna's tree-structured Parzen estimator chooses. A trial that after three epochs or more does worse than the
    median of those before it did at the same epoch is ended early, as is one whose loss is no longer a number.

    Parameters
    ----------
    config
        Where the search starts: its own settings are the first trial, and what is not in the space stays. A trial has
        as many epochs as it says, so give fewer than for the final training.
    chips_for
        Returns the chip store of a configuration; called once for each chip size.
    folder
        The study goes there (``study.journal``, ``study.csv``, ``best.yaml``), and the trials below ``trials/``.
    trials
        How many the study shall have. Running it again adds what is missing, also after an interruption; one process
        at a time.
    timeout
        Seconds after which no further trial begins.
    space
        What may be chosen; by default the usual choices, and those of ``config``.
    on_progress
        Called with the trial's number and where its training stands.

    Raises
    ------
    InputError
        Without optuna, for a study of another configuration in the folder, or if no trial was completed.
    S2SegError
        What a training raises: a choice that cannot be trained ends the search.
    """
    optuna = _optuna()
    folder, space = Path(folder), space or _usual_space(config)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    chips = functools.cache(lambda size: chips_for(_changed(config, {"chip_size": size})))

    def objective(trial: Any) -> float:
        chosen = _changed(config, _suggest(trial, space))

        def report(progress: Progress) -> None:
            if on_progress is not None:
                on_progress(trial.number, progress)
            if progress.row is not None:
                trial.report(progress.row[MONITOR], progress.epoch)
                if progress.epoch < progress.epochs and trial.should_prune():
                    raise optuna.TrialPruned

        place = _place(folder, trial.number)
        try:
            result = fit(chosen, chips(chosen.chips.size), place, on_progress=report)
        except DivergedError as error:  # as bad as settings can be, which is worth knowing
            raise optuna.TrialPruned from error
        finally:  # only the settings matter: the weights of many trials would fill the disk
            remove(place / CHECKPOINTS, ignore_errors=True)
        return result.history[result.kept_epoch - 1][MONITOR]

    study = _study(config, folder, space)
    missing = trials - sum(t.state in _over() for t in study.trials)
    if missing > 0:
        for size in space.chip_sizes:
            _changed(config, {"chip_size": size})  # raises before hours are spent
        study.optimize(objective, n_trials=missing, timeout=timeout, callbacks=[lambda s, _: _write_table(folder, s)])
    return _summary(config, folder, study)


def _usual_space(config: TrainConfig) -> SearchSpace:
    usual, network, size = SearchSpace(), config.network, config.fit.batch_size
    # weights from a file fit one encoder only
    others = usual.encoders if network.weights in (None, IMAGENET) else ()
    return replace(
        usual,
        encoders=tuple(dict.fromkeys((network.encoder, *others))),
        batch_sizes=tuple(sorted({size, *usual.batch_sizes})),
    )


def _place(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError("a search needs optuna: pip install 's2seg[tune]'") from error
    return optuna


def _study(config: TrainConfig, folder: Path, space: SearchSpace) -> optuna.Study:
    """Open the folder's study or begin one; a trial that a kill interrupted is tried again."""
    optuna = _optuna()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = optuna.storages.journal.JournalFileBackend(str(folder / JOURNAL))
    study: Any = optuna.create_study(
        storage=optuna.storages.JournalStorage(journal),
        study_name="s2seg",
        direction="maximize",
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP, n_warmup_steps=_WARMUP),
    )
    about = {"configuration": config.fingerprint(), "space": str(space)}
    if study.user_attrs and study.user_attrs != about:
        raise InputError(f"{folder / JOURNAL} is a search from another configuration or space: choose another folder")
    for key, value in about.items():
        study.set_user_attr(key, value)
    if not study.trials:
        study.enqueue_trial(_start(config, space))
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        remove(_place(folder, trial.number) / CHECKPOINTS, ignore_errors=True)
        study.enqueue_trial(trial.params)
    # a seed of its own for each run of the search: the same draws again would bring nothing new
    study.sampler = optuna.samplers.TPESampler(seed=config.fit.seed + len(study.trials))
    return study


def _over() -> tuple[Any, ...]:
    state = _optuna().trial.TrialState
    return state.COMPLETE, state.PRUNED


def _suggest(trial: optuna.Trial, space: SearchSpace) -> dict[str, Any]:
    settings = {
        "learning_rate": trial.suggest_float("learning_rate", *space.learning_rate, log=True),
        "region_loss": trial.suggest_categorical("region_loss", space.region_losses),
        "region_share": trial.suggest_float("region_share", 0, 1, step=0.2),
        "encoder": trial.suggest_categorical("encoder", space.encoders),
        "batch_size": trial.suggest_categorical("batch_size", space.batch_sizes),
    }
    if space.chip_sizes:
        settings["chip_size"] = trial.suggest_categorical("chip_size", space.chip_sizes)
    return _readable(settings)


def _readable(settings: dict[str, Any]) -> dict[str, Any]:
    """Three digits of the learning rate: what a person would write, and as good."""
    return {name: float(f"{v:.3g}") if name == "learning_rate" else v for name, v in settings.items()}


def _start(config: TrainConfig, space: SearchSpace) -> dict[str, Any]:
    """The configured settings, as far as the space holds them; the rest of the first trial is drawn."""
    low, high = space.learning_rate
    start: dict[str, Any] = {"learning_rate": min(max(config.optimizer.learning_rate, low), high)}
    choices = (
        ("encoder", config.network.encoder, space.encoders),
        ("batch_size", config.fit.batch_size, space.batch_sizes),
        ("chip_size", config.chips.size, space.chip_sizes),
    )
    start |= {name: value for name, value, allowed in choices if value in allowed}
    if config.loss == "cross_entropy":
        start["region_share"] = 0.0
    return start


def _changed(config: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    """Return a configuration with a trial's settings; chips of another size keep their overlap."""
    values = config.model_dump()
    if "chip_size" in settings:
        size = settings["chip_size"]
        values["chips"] |= {"size": size, "stride": max(1, round(size * config.chips.stride / config.chips.size))}
    if "learning_rate" in settings:
        values["optimizer"]["learning_rate"] = settings["learning_rate"]
        values["network"]["encoder"] = settings["encoder"]
        values["fit"]["batch_size"] = settings["batch_size"]
        values["loss"] = _mix(settings["region_loss"], settings["region_share"])
    try:
        return TrainConfig.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{settings} cannot be trained: {error.errors(include_url=False)[0]['msg']}") from error


def _mix(region: str, share: float) -> str:
    """``0.4*dice + 0.6*cross_entropy``, or one of the two alone."""
    parts = [(round(share, 3), region), (round(1 - share, 3), "cross_entropy")]
    used = [(weight, name) for weight, name in parts if weight > 0]
    return used[0][1] if len(used) == 1 else " + ".join(f"{weight:g}*{name}" for weight, name in used)


def _trials(study: optuna.Study) -> tuple[Trial, ...]:
    return tuple(
        # a pruned trial's value is that of its last epoch
        Trial(t.number, t.state.name.lower(), max(t.intermediate_values.values(), default=None), _readable(t.params))
        for t in study.trials
    )


def _write_table(folder: Path, study: optuna.Study) -> None:
    trials = _trials(study)
    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["trial", "state", MONITOR, *names])
    for trial in trials:
        writer.writerow([trial.number, trial.state, trial.score, *(trial.settings.get(name) for name in names)])
    with replacing(folder / TABLE) as partial, writing(folder / TABLE):
        partial.write_text(text.getvalue())


def _summary(config: TrainConfig, folder: Path, study: optuna.Study) -> TuneResult:
    _write_table(folder, study)
    trials = _trials(study)
    complete = [t for t in trials if t.state == "complete" and t.score is not None]
    if not complete:
        raise InputError(f"no trial in {folder} was completed: give the search more time or trials")
    best = max(complete, key=lambda t: t.score or 0.0)
    chosen = _changed(config, best.settings)
    with replacing(folder / BEST) as partial, writing(folder / BEST):
        partial.write_text(chosen.to_yaml())
    return TuneResult(trials, best, chosen)
