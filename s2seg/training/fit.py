"""Fit a network to a chip store: everything that a configuration asks for, in the order in which it happens."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from lightning_fabric.plugins.environments.lightning import LightningEnvironment, find_free_network_port
from pytorch_lightning.loggers import Logger
from pytorch_lightning.strategies import DDPStrategy, Strategy

from s2seg.allocator import keep_freed_memory
from s2seg.errors import InputError, S2SegWarning
from s2seg.models.spec import ModelSpec
from s2seg.models.unet import build_network
from s2seg.outputs._files import remove, writing
from s2seg.progress import silent
from s2seg.training.augment import IGNORE_INDEX, Augment, AugmentSpec
from s2seg.training.checkpoints import BEST, FOLDER, LAST, BestAndLast, WholeFiles, load_checkpoint
from s2seg.training.chips import ChipStore
from s2seg.training.config import TrainConfig
from s2seg.training.data import ChipData, date_plan
from s2seg.training.history import SCORES, Recorder, Standing, epochs_of, runs_of
from s2seg.training.logs import LOGS, check_logs, open_logs, run_ids
from s2seg.training.losses import build_loss
from s2seg.training.machine import interruptible, machine, quiet, reproducible
from s2seg.training.module import Descent, SegmentationModule
from s2seg.training.processes import Tell, run_processes
from s2seg.training.sampling import EpochPlan, chip_weights, class_weights
from s2seg.training.spec import build_spec, spec_of
from s2seg.training.weights import start_from


@dataclass(frozen=True, eq=False)
class FitResult:
    """A fitted network and how it came about.

    Parameters
    ----------
    network
        With the weights of the kept epoch, in evaluation mode, on the CPU.
    spec
        What it expects and answers, for :func:`s2seg.models.save_bundle`; with provenance and validation scores.
    history
        One row per epoch: ``epoch`` (from 1), ``step`` (optimizer steps so far), ``train_loss``, ``val_loss``,
        ``val_mean_iou``, ``val_accuracy``, ``learning_rate`` (of the last batch, not the encoder's), ``seconds`` (with
        the validation), and ``data_wait``, the seconds of these in which training waited for chips.
    best_epoch
        The epoch with the highest ``val_mean_iou``, from 1.
    kept_epoch
        The epoch whose weights these are, from 1: the best one or the last one, as ``fit.keep`` says.
    """

    network: torch.nn.Module
    spec: ModelSpec
    history: tuple[dict[str, float], ...]
    best_epoch: int
    kept_epoch: int


def fit(
    config: TrainConfig,
    chips: ChipStore,
    folder: str | Path,
    *,
    resume: bool = False,
    on_progress: Callable[[Standing], None] | None = None,
) -> FitResult:
    """Train the network that a configuration describes.

    Parameters
    ----------
    config
        What to do. On a CPU the same configuration and chips give the same weights to the bit (with the same number
        of threads); a GPU rounds differently from run to run.
    chips
        Training and validation chips; the test part is not looked at.
    folder
        ``checkpoints/best.ckpt``, ``checkpoints/last.ckpt`` and ``logs/`` go there. Without ``resume`` those of an
        earlier training are removed first.
    resume
        Go on after the last whole epoch of a training that was interrupted, at any moment and in any way; the result
        is that of a training without interruption, to the bit on a CPU.
    on_progress
        Called after every batch and at the end of every epoch; may raise to end the training.

    Raises
    ------
    InputError
        For chips without training or validation part, a log whose package is missing, a machine that is not there, a
        loss that is not a number, a checkpoint of another configuration, or a process that was ended from outside.
    ModelError
        For a network that cannot be built, or starting weights that do not fit.
    OutputError
        When a checkpoint cannot be written; the one before it is whole.
    """
    folder = Path(folder)
    arguments = machine(config)
    check_logs(config.logs)
    with reproducible(), quiet():
        # also for a network that is trained in other processes: so that a mistake shows before they start
        module, data = _module(config, chips)
        keeper = BestAndLast((folder / FOLDER).absolute(), config.fit.patience)
        start = _last_checkpoint(config, keeper.folder, resume)
        if start is None:
            _clear(folder)
        else:
            keeper.load_state_dict(start[keeper.state_key])
        if start is None or not _is_over(config, keeper, epochs_of(start)):
            done, runs = (0, {}) if start is None else (epochs_of(start), runs_of(start))
            training = _Training(config, chips, folder, arguments, done, runs)
            if config.fit.devices == 1:
                with open_logs(config, folder / LOGS, runs) as loggers:
                    training.run(module, data, loggers, on_progress or silent)
            else:
                _run_processes(training, on_progress or silent)
    return _result(module, keeper, config.fit.keep)


@dataclass(frozen=True)
class _Training:
    """What a process is to do; it is pickled for one of several."""

    config: TrainConfig
    chips: ChipStore
    folder: Path
    machine: Mapping[str, Any]
    epochs_done: int
    log_runs: Mapping[str, str]

    def run(
        self,
        module: SegmentationModule,
        data: ChipData,
        loggers: Mapping[str, Logger],
        on_progress: Callable[[Standing], None],
        strategy: str | Strategy = "auto",
    ) -> None:
        """Train from the last checkpoint or from the beginning."""
        if self.machine["accelerator"] == "cpu":
            keep_freed_memory()
        settings = self.config.fit
        keeper = BestAndLast((self.folder / FOLDER).absolute(), settings.patience)
        recorder = Recorder(self.config, self.folder / LOGS, data, on_progress, run_ids(loggers))
        trainer = pl.Trainer(
            **self.machine,
            strategy=strategy,
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulate,
            logger=list(loggers.values()) or False,
            callbacks=[recorder, keeper],
            plugins=[WholeFiles()],
            default_root_dir=self.folder,
            log_every_n_steps=1,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with interruptible():
            trainer.fit(module, datamodule=data, ckpt_path=keeper.folder / LAST if self.epochs_done else None)


def _run_processes(training: _Training, on_progress: Callable[[Standing], None]) -> None:
    """Train in one process per device of this machine."""
    devices = training.config.fit.devices
    environment = {
        # what Lightning asks to know of processes that it did not start
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(find_free_network_port()),
        "NODE_RANK": "0",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP complains of weights that may be unused once all of them are used
    }
    if training.machine["accelerator"] == "cpu":
        environment["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // devices))
    run_processes(partial(_run_share, training), devices, on_progress, environment)


def _run_share(training: _Training, rank: int, tell: Tell) -> None:
    """Train as one of several processes."""
    os.environ["LOCAL_RANK"] = str(rank)
    with reproducible(), quiet():
        module, data = _module(training.config, training.chips)
        # weights may have no gradient: those of a frozen encoder, and of layers that nothing uses
        strategy = DDPStrategy(cluster_environment=LightningEnvironment(), find_unused_parameters=True)
        logs: AbstractContextManager[dict[str, Logger]] = nullcontext({})
        if rank == 0:
            logs = open_logs(training.config, training.folder / LOGS, training.log_runs)
        with logs as loggers:
            training.run(module, data, loggers, tell, strategy)


# -- what is trained --------------------------------------------------------------------------------------------------


def check_fit(config: TrainConfig) -> None:
    """Refuse, before any data are read, what cannot be trained here.

    Raises
    ------
    InputError
        For a machine or a log's package that is not there, or a batch that the devices cannot share.
    ModelError
        For a network that cannot be built or does not fit the chips, or starting weights that do not fit it.
    """
    machine(config)
    check_logs(config.logs)
    bands = len(config.channels)
    with reproducible():
        spec = spec_of(config, (0.0,) * bands, (1.0,) * bands, {})
        start_from(build_network(spec), spec, config.network.weights)


def _module(config: TrainConfig, chips: ChipStore) -> tuple[SegmentationModule, ChipData]:
    """Make the network with its starting weights, and the batches that it is shown."""
    if chips.bands != config.channels or chips.legend != config.legend:
        raise InputError(f"the chips in {chips.path} have other bands or another legend than the configuration")
    train, validation = chips.indices("train"), chips.indices("validation")
    for part, indices in (("training", train), ("validation", validation)):
        if not len(indices):
            raise InputError(f"there is no chip for {part}: change split.seed, split.block or the chips' filters")
    if len(validation) < config.fit.devices:
        raise InputError(
            f"fit.devices: {len(validation)} validation chips are too few for {config.fit.devices} devices"
        )
    plan = _plan(config, chips.histogram[train])
    torch.manual_seed(config.fit.seed)
    spec = build_spec(config, chips)
    network = build_network(spec)
    start_from(network, spec, config.network.weights)
    seen = chips.histogram[train]
    weights = None if config.class_weights == "none" else torch.from_numpy(class_weights(config.class_weights, seen))
    module = SegmentationModule(
        network.to(memory_format=torch.channels_last),
        spec,
        build_loss(config.loss, len(spec.legend), weights, IGNORE_INDEX),
        _descent(config, len(plan)),
        augment=Augment(AugmentSpec(**config.augment.model_dump()), spec.bands, seen.sum(axis=0).tolist()),
        seed=config.fit.seed,
    )
    dates = date_plan(chips, train, config.augment.mixed_dates, config.fit.seed)
    return module, ChipData(chips, train, validation, plan, dates)


def _plan(config: TrainConfig, histogram: Any) -> EpochPlan:
    settings = config.fit
    weights = chip_weights(histogram) if settings.sampling == "balanced" else None
    return EpochPlan(len(histogram), settings.batch_size, settings.steps_per_epoch, settings.seed, weights)


def _descent(config: TrainConfig, batches: int) -> Descent:
    settings = config.optimizer
    return Descent(
        steps=-(-batches // config.fit.accumulate) * config.fit.epochs,  # an epoch's rest of batches counts as a step
        optimizer=settings.name,
        learning_rate=settings.learning_rate,
        encoder_learning_rate=settings.encoder_learning_rate,
        weight_decay=settings.weight_decay,
        freeze_encoder=settings.freeze_encoder,
        schedule=config.schedule,
        average=config.fit.average,
    )


def _result(module: SegmentationModule, keeper: BestAndLast, keep: Literal["best", "last"]) -> FitResult:
    """Take everything from the two files: where several processes trained, this one knows nothing else."""
    last = load_checkpoint(keeper.folder / LAST)
    keeper.load_state_dict(last["callbacks"][keeper.state_key])
    history = tuple(last["callbacks"][Recorder.state_key]["history"])
    best_epoch = keeper.best_epoch + 1
    kept_epoch, kept = (best_epoch, load_checkpoint(keeper.folder / BEST)) if keep == "best" else (len(history), last)
    module.cpu().load_state_dict(kept["state_dict"])
    row = history[kept_epoch - 1]
    spec = replace(
        module.spec,
        provenance={
            **module.spec.provenance,
            "epochs": len(history),
            "best_epoch": best_epoch,
            "kept_epoch": kept_epoch,
        },
        metrics={name: row[name] for name in SCORES},
    )
    return FitResult(module.fitted.eval(), spec, history, best_epoch, kept_epoch)


# -- what an earlier training left ------------------------------------------------------------------------------------


def _last_checkpoint(config: TrainConfig, folder: Path, resume: bool) -> dict[str, Any] | None:
    """Return the states of the callbacks in the last checkpoint, if there is one to go on from."""
    if not resume:
        return None
    if not (folder / LAST).is_file():
        warnings.warn(f"there is no checkpoint in {folder} to resume from: training starts anew", S2SegWarning, 4)
        return None
    states: dict[str, Any] = load_checkpoint(folder / LAST).get("callbacks", {})
    if states.get(Recorder.state_key, {}).get("fingerprint") != config.fingerprint():
        raise InputError(
            f"{folder / LAST} was made with another configuration: resume with that one (config.yaml beside it), "
            "or train anew in another folder"
        )
    return states


def _is_over(config: TrainConfig, keeper: BestAndLast, epochs: int) -> bool:
    """Whether a training of so many epochs had come to its end, by these or by the keeper's patience."""
    return epochs >= config.fit.epochs or keeper.gives_up(epochs - 1)


def _clear(folder: Path) -> None:
    for name in (FOLDER, LOGS):
        with writing(folder / name):
            remove(folder / name)
