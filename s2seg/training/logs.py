"""Where the curves go beside ``history.csv``: TensorBoard, Weights & Biases, MLflow."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger

from s2seg.errors import InputError
from s2seg.outputs._files import writing
from s2seg.training.config import TrainConfig

LOGS = "logs"
_PROJECT = "s2seg"
_EXTRAS = {"tensorboard": "train", "wandb": "wandb", "mlflow": "mlflow"}
"""Log, which is also the name of its package -> the extra that brings it."""

_REFUSALS = {"wandb": ("wandb", "Error"), "mlflow": ("mlflow.exceptions", "MlflowException")}
"""What these raise for no key, no server, no such run."""

_SETTINGS = {"bands", "seasons", "resolution", "split", "chips", "network", "loss", "class_weights", "optimizer"} | {
    *("schedule", "fit", "augment"),
}
"""Sections that a run is found by; paths and legends are not."""


def check_logs(names: Sequence[str]) -> None:
    """Refuse logs whose package is missing.

    Raises
    ------
    InputError
        Naming the extra that brings it.
    """
    for name in names:
        if name in _EXTRAS and importlib.util.find_spec(name) is None:
            raise InputError(f"logs: {name} is not installed: pip install 's2seg[{_EXTRAS[name]}]'")


@contextmanager
def open_logs(config: TrainConfig, folder: Path, runs: Mapping[str, str]) -> Iterator[dict[str, Logger]]:
    """Open the logs that a configuration names, all but the CSV file; close them when the block ends.

    Parameters
    ----------
    config
        Its ``logs``, its name, and the settings that the runs are to be found by. Project and server come from the
        environment (``WANDB_PROJECT``, ``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``); without
        it the project is called s2seg, and MLflow writes a database into ``folder``.
    folder
        Where local files go.
    runs
        Name of a log -> the run in it that this training began in, as :func:`run_ids` returned it.

    Yields
    ------
    dict of str to Logger
        By name.

    Raises
    ------
    InputError
        When a log refuses: no key, no server, no such run; also when it does so later, within the block.
    """
    loggers: dict[str, Logger] = {}
    finished = False
    try:
        for name in config.logs:
            if name in _EXTRAS:
                loggers[name] = _open(name, config, folder, runs.get(name))
        yield loggers
        finished = True
    except Exception as error:
        refused = next((name for name in config.logs if isinstance(error, _refusal(name))), None)
        if refused is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"logs: {refused} refuses ({reason}); mend that, or leave it out of logs") from error
    finally:
        if "wandb" in loggers:  # or the next training in this process would go on in the same run
            importlib.import_module("wandb").finish(exit_code=0 if finished else 1)


def run_ids(loggers: Mapping[str, Logger]) -> dict[str, str]:
    """Name of a log -> its run, for those that would begin a new one after a restart."""
    return {name: str(logger.version) for name, logger in loggers.items() if name in _REFUSALS}


def _refusal(name: str) -> type[Exception] | tuple[()]:
    if name not in _REFUSALS:
        return ()
    module, error = _REFUSALS[name]
    return getattr(importlib.import_module(module), error)


def _open(name: str, config: TrainConfig, folder: Path, run: str | None) -> Logger:
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    logger: Any
    if name == "tensorboard":
        return TensorBoardLogger(folder, name="tensorboard", version="")
    if name == "wandb":
        project = os.environ.get("WANDB_PROJECT") or _PROJECT
        logger = WandbLogger(project=project, name=config.name, save_dir=folder, id=run)
    else:
        # a folder of files was MLflow's default once, and is refused by now
        logger = MLFlowLogger(
            experiment_name=os.environ.get("MLFLOW_EXPERIMENT_NAME") or _PROJECT,
            run_name=config.name,
            tracking_uri=os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').absolute()}",
            run_id=run,
        )
    logger.experiment  # noqa: B018  begins the run, so that a refusal shows before hours are spent
    if run is None:
        logger.log_hyperparams(config.model_dump(mode="json", include=_SETTINGS))
    return logger
