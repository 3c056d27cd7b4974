"""Search for good settings: short trainings that learn from each other, in a study that can be interrupted."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from s2seg.errors import InputError
from s2seg.outputs._files import remove, replacing, writing
from s2seg.training.checkpoints import FOLDER as CHECKPOINTS
from s2seg.training.checkpoints import MONITOR
from s2seg.training.chips import ChipStore
from s2seg.training.config import TrainConfig
from s2seg.training.fit import fit
from s2seg.training.history import Standing
from s2seg.training.joined import JoinedChips
from s2seg.training.module import DivergedError
from s2seg.training.search_space import SearchSpace, Settings, changed, configured, search_space

if TYPE_CHECKING:
    import optuna

JOURNAL, TABLE, BEST = "study.journal", "study.csv", "best.yaml"
_ABOUT = "about"  # the attribute of a study that says what it searches
_STARTUP = 4  # trials before any is compared with the others
_WARMUP = 3  # epochs that every trial gets


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
        ``val_mean_iou`` of the weights that are kept, for a pruned trial the highest; None if it never got there.
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
    on_progress: Callable[[int, Standing], None] | None = None,
) -> TuneResult:
    """Search for the settings with the highest ``val_mean_iou``; the test part is not looked at.

    The first trial is the configured training itself, so the best one is at least as good. After it optuna's
    tree-structured Parzen estimator chooses. A trial that after three epochs or more does worse than the median of
    those before it did at the same epoch is ended early, as is one whose loss is no longer a number or that needs more
    memory than the GPU has.

    Whatever the size of the chips that a trial learns from, the split is the same, and so are the chips that score it:
    the validation chips of the configured size. (In a map, a network that pools globally sees windows of the size that
    it learned from; its scores here are those of the configured size.)

    Parameters
    ----------
    config
        Where the search starts, and in its section ``tune`` what is tried beside; all else stays. A trial has as many
        epochs as it says, so give fewer than for the final training.
    chips_for
        Returns the chip store of a configuration; called once for each chip size, before the first trial.
    folder
        The study goes there (``study.journal``, ``study.csv``, ``best.yaml``), and the trials below ``trials/``.
    trials
        How many the study shall have. Running it again adds what is missing, also after an interruption; one process
        at a time. What a study chooses from is settled when it begins.
    timeout
        Seconds after which no further trial begins.
    on_progress
        Called with the trial's number and where its training stands.

    Raises
    ------
    InputError
        Without optuna, for a study of another configuration in the folder, or if no trial was completed.
    S2SegError
        What :func:`~s2seg.training.search_space.search_space` and a training raise.
    """
    optuna = _optuna()
    folder = Path(folder)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    store = functools.cache(lambda size: chips_for(changed(config, {"chip_size": size})))
    study, space = _study(config, folder, store)

    def objective(trial: Any) -> float:
        chosen = changed(config, _suggest(trial, space, config))

        def report(standing: Standing) -> None:
            if on_progress is not None:
                on_progress(trial.number, standing)
            if standing.row is not None:
                trial.report(standing.row[MONITOR], standing.epoch)
                if standing.epoch < standing.epochs and trial.should_prune():
                    raise optuna.TrialPruned

        place = _place(folder, trial.number)
        chips = _scored_alike(store(chosen.chips.size), store(config.chips.size))
        try:
            result = fit(chosen, chips, place, on_progress=report)
        except (DivergedError, torch.OutOfMemoryError) as error:  # as bad as settings can be, which is worth knowing
            raise optuna.TrialPruned from error
        finally:  # only the settings matter: the weights of many trials would fill the disk
            remove(place / CHECKPOINTS, ignore_errors=True)
        return float(result.spec.metrics[MONITOR])

    missing = trials - sum(t.state in _over() for t in study.trials)
    if missing > 0:
        study.optimize(
            objective, n_trials=missing, timeout=timeout, callbacks=[lambda s, _: _write_table(config, folder, s)]
        )
    return _summary(config, folder, study)


def _scored_alike(train: ChipStore, reference: ChipStore) -> ChipStore:
    return reference if train is reference else JoinedChips(train, reference)


def _place(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}"


def _optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise InputError("a search needs optuna: pip install 's2seg[tune]'") from error
    return optuna


def _study(config: TrainConfig, folder: Path, cut: Callable[[int], object]) -> tuple[optuna.Study, SearchSpace]:
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
    about = {"configuration": config.fingerprint(), "tune": config.tune.model_dump(mode="json")}
    stored = study.user_attrs.get(_ABOUT)
    if stored is None:
        stored = about | {"space": search_space(config, cut).to_dict()}
        study.set_user_attr(_ABOUT, stored)
    if changes := [name for name in about if stored[name] != about[name]]:
        what = "another configuration" if "configuration" in changes else "another section tune"
        raise InputError(f"{folder / JOURNAL} is a search with {what}: choose another folder, or go on with its own")
    for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,)):
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        remove(_place(folder, trial.number) / CHECKPOINTS, ignore_errors=True)
        if trial.params:
            study.enqueue_trial(trial.params)
    if not _holds(study, configured(config)):
        study.enqueue_trial(configured(config))
    # a seed of its own for each run of the search: the same draws again would bring nothing new
    study.sampler = optuna.samplers.TPESampler(seed=config.fit.seed + len(study.trials))
    return study, SearchSpace.from_dict(stored["space"])


def _holds(study: optuna.Study, settings: Settings) -> bool:
    """Whether a trial with these settings is over or waits for its turn; one that failed does not count."""
    fail = _optuna().trial.TrialState.FAIL
    # a trial that waits has them where optuna keeps what enqueue_trial was given
    found = [t.system_attrs.get("fixed_params", t.params) for t in study.trials if t.state != fail]
    return settings in found


def _over() -> tuple[Any, ...]:
    state = _optuna().trial.TrialState
    return state.COMPLETE, state.PRUNED


def _suggest(trial: optuna.Trial, space: SearchSpace, config: TrainConfig) -> Settings:
    drawn = {
        "learning_rate": trial.suggest_float("learning_rate", *space.learning_rate, log=True),
        "loss": trial.suggest_categorical("loss", space.loss),
        "encoder": trial.suggest_categorical("encoder", space.encoder),
        "batch_size": trial.suggest_categorical("batch_size", space.batch_size),
        "chip_size": trial.suggest_categorical("chip_size", space.chip_size),
    }
    return _readable(drawn, config)


def _readable(settings: Settings, config: TrainConfig) -> Settings:
    """Round a learning rate that was drawn to three digits: what a person would write, and as good."""
    rate = settings.get("learning_rate")
    if rate is None or rate == config.optimizer.learning_rate:
        return settings
    return settings | {"learning_rate": float(f"{rate:.3g}")}


def _trials(config: TrainConfig, study: optuna.Study) -> tuple[Trial, ...]:
    return tuple(
        # a pruned trial's value is that of its last epoch
        Trial(
            t.number,
            t.state.name.lower(),
            t.value if t.state.name == "COMPLETE" else max(t.intermediate_values.values(), default=None),
            _readable(t.params, config),
        )
        for t in study.trials
        if t.state.is_finished()
    )


def _write_table(config: TrainConfig, folder: Path, study: optuna.Study) -> None:
    trials = _trials(config, study)
    names = list(dict.fromkeys(name for trial in trials for name in trial.settings))
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["trial", "state", MONITOR, *names])
    for trial in trials:
        writer.writerow([trial.number, trial.state, trial.score, *(trial.settings.get(name) for name in names)])
    with replacing(folder / TABLE) as partial, writing(folder / TABLE):
        partial.write_text(text.getvalue())


def _summary(config: TrainConfig, folder: Path, study: optuna.Study) -> TuneResult:
    _write_table(config, folder, study)
    trials = _trials(config, study)
    complete = [t for t in trials if t.state == "complete" and t.score is not None]
    if not complete:
        raise InputError(f"no trial in {folder} was completed: give the search more time or trials")
    best = max(complete, key=lambda t: t.score or 0.0)
    chosen = changed(config, best.settings)
    with replacing(folder / BEST) as partial, writing(folder / BEST):
        partial.write_text(chosen.to_yaml())
    return TuneResult(trials, best, chosen)
