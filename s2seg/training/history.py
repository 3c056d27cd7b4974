"""The course of a training: where it stands, and the rows of its history, in checkpoints and as CSV."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from s2seg.outputs._files import replacing, writing
from s2seg.training.config import TrainConfig
from s2seg.training.data import ChipData

SCORES = ("train_loss", "val_loss", "val_mean_iou", "val_accuracy")
"""What a row of the history says of how good the epoch was."""


@dataclass(frozen=True)
class Standing:
    """Where a training stands.

    Parameters
    ----------
    epoch, epochs
        The current one, counted from 1, and how many there are at most.
    step, steps
        Batches done in this epoch, and how many it has.
    row
        At the end of an epoch: what :attr:`~s2seg.training.fit.FitResult.history` gets; None before.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    row: Mapping[str, float] | None = None

    @property
    def done(self) -> int:
        """Batches done since the training began."""
        return (self.epoch - 1) * self.steps + self.step

    @property
    def total(self) -> int:
        """Batches of all epochs."""
        return self.epochs * self.steps


class Recorder(pl.Callback):
    """Keep the history, across restarts too; write it as CSV; tell how far the training is.

    Parameters
    ----------
    config
        What is trained; its ``logs`` say whether there is a CSV.
    folder
        ``history.csv`` goes there.
    data
        Knows how long the training waited for chips.
    on_progress
        Called after every batch and at the end of every epoch.
    log_runs
        Name of a log -> its run; kept in the checkpoint for a training that goes on with it.
    """

    state_key = "s2seg_history"

    def __init__(
        self,
        config: TrainConfig,
        folder: Path,
        data: ChipData,
        on_progress: Callable[[Standing], None],
        log_runs: Mapping[str, str],
    ) -> None:
        self.history: list[dict[str, float]] = []
        self._log_runs = dict(log_runs)
        self._fingerprint, self._epochs = config.fingerprint(), config.fit.epochs
        self._csv = folder / "history.csv" if "csv" in config.logs else None
        self._data, self._on_progress = data, on_progress
        self._started = self._waited = self._learning_rate = 0.0

    def on_train_epoch_start(self, *_: Any) -> None:
        """Start the clock."""
        self._started, self._waited = time.perf_counter(), self._data.waited

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Note the learning rate that the batch is trained with; after it the schedule moves on."""
        self._learning_rate = float(trainer.optimizers[0].param_groups[-1]["lr"])

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Tell about a batch."""
        self._tell(trainer, trainer.fit_loop.batch_idx + 1, None)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Add a row to the history, and tell about the epoch."""
        scores = {name: float(trainer.callback_metrics[name]) for name in SCORES}
        facts = {
            "learning_rate": self._learning_rate,
            "seconds": time.perf_counter() - self._started,
            "data_wait": self._data.waited - self._waited,
        }
        pl_module.log_dict(facts, sync_dist=True)
        row = {"epoch": trainer.current_epoch + 1, "step": trainer.global_step, **scores, **facts}
        self.history.append(row)
        if trainer.is_global_zero and self._csv is not None:
            _write_csv(self._csv, self.history)
        self._tell(trainer, int(trainer.num_training_batches), row)

    def _tell(self, trainer: pl.Trainer, step: int, row: Mapping[str, float] | None) -> None:
        if trainer.is_global_zero:
            steps = int(trainer.num_training_batches)
            self._on_progress(Standing(trainer.current_epoch + 1, self._epochs, step, steps, row))

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {"history": self.history, "fingerprint": self._fingerprint, "log_runs": self._log_runs}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self.history = list(state_dict["history"])


def _write_csv(path: Path, history: list[dict[str, float]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, history[0])
    writer.writeheader()
    writer.writerows(history)
    with replacing(path) as partial, writing(path):
        partial.write_text(text.getvalue())


def epochs_of(states: dict[str, Any]) -> int:
    """How many epochs were trained before the checkpoint with these states of the callbacks."""
    return len(states[Recorder.state_key]["history"])


def runs_of(states: dict[str, Any]) -> dict[str, str]:
    """Where the logs of that training are."""
    return dict(states[Recorder.state_key].get("log_runs", {}))
