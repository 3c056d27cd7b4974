"""Checkpoints that survive what happens to long runs: a kill at any moment, a full disk."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins import CheckpointIO
from pytorch_lightning.callbacks import Checkpoint

from s2seg.errors import InputError, OutputError
from s2seg.outputs._files import remove, replacing, writing

FOLDER = "checkpoints"
BEST, LAST = "best.ckpt", "last.ckpt"
MONITOR = "val_mean_iou"
"""What "best" means: the highest of this."""

_UNREADABLE = (
    OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError, struct.error,
    pickle.UnpicklingError,
)  # fmt: skip
"""What torch raises on damaged files: what Python says where its unpickler stumbles."""


class WholeFiles(CheckpointIO):
    """Write a checkpoint beside its place, flush it to the disk, then rename: the old one or the new one, never half.

    Loading unpickles tensors and plain values only (``weights_only``), so that a checkpoint runs no code.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write ``checkpoint`` to ``path``.

        Raises
        ------
        OutputError
            When the disk is full or not writable; what stood at ``path`` is untouched.
        """
        if storage_options is not None:
            raise InputError("checkpoints are local files and take no storage options")
        try:
            with replacing(Path(path)) as partial, writing(path), partial.open("wb") as file:
                _save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except OutputError as error:
            last = Path(path).with_name(LAST).exists()
            way_on = "the checkpoint before it is whole (--resume)" if last else "train anew, with --overwrite"
            raise OutputError(error.path, f"{error.reason}; {way_on}") from error

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read what :meth:`save_checkpoint` wrote; anything but tensors and plain values is refused."""
        del weights_only  # Lightning's choice does not count: nothing here needs more
        return load_checkpoint(path, map_location)

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint, if it is there."""
        remove(Path(path))


def _save(checkpoint: dict[str, Any], file: Any) -> None:
    try:
        torch.save(checkpoint, file)
    except RuntimeError as error:
        # torch's writer hides what the file said behind a complaint about positions
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """Read a checkpoint without running code from it.

    Raises
    ------
    InputError
        When it is damaged, another program's, or holds more than tensors and plain values.
    """
    try:
        # what is no archive would be tried as a bare pickle, which fails in as many ways as there are bytes
        whole = zipfile.is_zipfile(path)
        content = torch.load(path, map_location=map_location, weights_only=True) if whole else None
    except _UNREADABLE as error:
        raise InputError(
            f"checkpoint {path} cannot be read ({type(error).__name__}): train anew, with --overwrite"
        ) from error
    if not (isinstance(content, dict) and _is_ours(content)):
        raise InputError(f"{path} is damaged, or no checkpoint of s2seg: train anew, with --overwrite")
    return content


def _is_ours(content: dict[str, Any]) -> bool:
    """Whether it holds weights of our module and, if any callbacks' states, that of what keeps the best."""
    weights, states = content.get("state_dict"), content.get("callbacks", {BestAndLast.state_key: None})
    if not isinstance(weights, dict) or not isinstance(states, dict):
        return False
    return BestAndLast.state_key in states and any(str(name).startswith("network.") for name in weights)


class BestAndLast(Checkpoint):
    """Keep two files: ``best.ckpt``, the weights with the highest score, and ``last.ckpt``, to go on from.

    Both are written when an epoch and its validation are over. The best one comes first: after a kill in between,
    the epoch is repeated from the last one and gives the same best again.

    Parameters
    ----------
    folder
        Where the two files go.
    patience
        End the training after this many epochs without a better score, or None. It is counted here and not by
        Lightning's own callback, which would train on after a restart from the last epoch.
    """

    state_key = "s2seg_best_and_last"

    def __init__(self, folder: Path, patience: int | None = None) -> None:
        self.folder, self.patience = folder, patience
        self.best_epoch = -1
        self.best_score = float("-inf")

    def on_train_epoch_end(self, trainer: pl.Trainer, _: pl.LightningModule) -> None:
        """Save, as Lightning calls it after every epoch's validation."""
        epoch, score = trainer.current_epoch, float(trainer.callback_metrics[MONITOR])
        if score > self.best_score or self.best_epoch < 0:  # NaN is never higher, but something must be the best
            self.best_epoch, self.best_score = epoch, score
            trainer.save_checkpoint(self.folder / BEST, weights_only=True)
        trainer.should_stop = self.gives_up(epoch)
        trainer.save_checkpoint(self.folder / LAST)

    def gives_up(self, epoch: int) -> bool:
        """Whether nothing is to be hoped for after ``epoch``, counted from 0."""
        return self.patience is not None and epoch - self.best_epoch >= self.patience

    def state_dict(self) -> dict[str, Any]:
        """Return what must survive a restart."""
        return {"best_epoch": self.best_epoch, "best_score": self.best_score}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
        self.best_epoch, self.best_score = state_dict["best_epoch"], state_dict["best_score"]
