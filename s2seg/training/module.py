"""A network in training, as Lightning drives it: the same scaling as in mapping, one matrix for all scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from s2seg.assess.confusion import Confusion
from s2seg.assess.scores import Scores
from s2seg.errors import InputError
from s2seg.models.spec import ModelSpec
from s2seg.training.augment import IGNORE_INDEX, Augment, AugmentSpec
from s2seg.training.data import Batch

_OPTIMIZERS: dict[str, Any] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam, "sgd": torch.optim.SGD}
_MOMENTUM = 0.9  # of sgd
_PLATEAU = {"factor": 0.3, "patience": 3}  # epochs without a better mean IoU, and what the rate is multiplied by then


class DivergedError(InputError):
    """The loss of a training is no longer a number."""


@dataclass(frozen=True)
class Descent:
    """How the weights move.

    Parameters
    ----------
    steps
        Optimizer steps of the whole training, which one_cycle and cosine are stretched over.
    optimizer
        ``adamw``, ``adam`` or ``sgd`` (with Nesterov momentum of 0.9).
    learning_rate, encoder_learning_rate
        The highest that the schedule reaches; the encoder's is the same where it is None.
    weight_decay
        As the optimizer means it.
    freeze_encoder
        Epochs for which neither the encoder's weights nor its batch statistics change.
    schedule
        ``none``; ``plateau``: times 0.3 after 3 epochs without a better validation mean IoU; ``cosine`` (Loshchilov
        and Hutter 2017, arXiv:1608.03983, without restarts); ``one_cycle`` (Smith and Topin 2018, arXiv:1708.07120).
    average
        Decay, in each step, of an exponential moving average of the weights and batch statistics (Polyak and Juditsky
        1992, doi:10.1137/0330046), which is what is validated and kept; 0 for none.
    """

    steps: int
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    encoder_learning_rate: float | None = None
    weight_decay: float = 1e-4
    freeze_encoder: int = 0
    schedule: str = "one_cycle"
    average: float = 0.0


class SegmentationModule(pl.LightningModule):
    """Fit a network to chips.

    Parameters
    ----------
    network
        From :func:`s2seg.models.build_network`; it has an ``encoder``.
    spec
        Scaling, bands and legend; channel ``i`` is ``spec.legend.codes[i]``.
    loss
        Called with logits (n, class, h, w) float32 and channels (n, h, w) int64, 255 where there is no label.
    descent
        How the weights move.
    augment
        What happens to training chips; None for nothing.
    seed
        All chance comes from it: dropout from seed and epoch, augmentation from seed, epoch and batch. A training
        that starts again at any epoch therefore goes on exactly.

    Notes
    -----
    Logged per epoch: ``train_loss``, the mean over batches, all of as many chips; ``val_loss``, the mean over batches
    weighted by their labelled pixels; and from one confusion matrix over all validation pixels ``val_mean_iou`` and
    ``val_accuracy``.
    """

    network: nn.Module
    loss: nn.Module
    _channels: Tensor
    _a: Tensor
    _b: Tensor
    _counts: Tensor

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        loss: nn.Module,
        descent: Descent,
        *,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.network, self.spec, self.loss, self.descent, self.seed = network, spec, loss, descent, seed
        self._average: AveragedModel | None = None
        if descent.average:
            decay = get_ema_multi_avg_fn(descent.average)  # type: ignore[no-untyped-call]
            # a part of this module, so that it goes into checkpoints and to devices with the rest
            self._average = AveragedModel(network, multi_avg_fn=decay, use_buffers=True)
            self._average.requires_grad_(False)
        unchanged = Augment(AugmentSpec(flips=False), spec.bands)
        self._augment, self._unchanged = augment or unchanged, unchanged
        self._plateau: ReduceLROnPlateau | None = None
        self._saved_plateau: dict[str, Any] = {}
        self.scores: Scores | None = None
        """Of the latest validation."""
        channels = torch.full((256,), IGNORE_INDEX)
        channels[list(spec.legend.codes)] = torch.arange(len(spec.legend))
        classes = len(spec.legend)
        a, b = (torch.from_numpy(values[:, None, None]) for values in spec.affine())
        for name, tensor in {
            "_channels": channels,
            "_a": a,
            "_b": b,
            "_counts": torch.zeros(classes, classes, dtype=torch.int64),
        }.items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (n, class, h, w) float32 of stored numbers (n, band, h, w) of any type.

        What mapping does: see :class:`s2seg.models.runtimes.pytorch.TorchSession`.
        """
        x = images.to(torch.float32, memory_format=torch.channels_last) * self._a + self._b
        logits: Tensor = (self.network if self.training else self.fitted)(x)
        return logits.float()

    @property
    def fitted(self) -> nn.Module:
        """What is validated and kept: the network, or the average of its weights over the training."""
        return self.network if self._average is None else self._average.module

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch of stored chips."""
        images, target = self._varied(self._augment, batch, batch_idx)
        loss = self._loss(self(images), target)
        self.log("train_loss", loss.detach(), on_step=False, on_epoch=True, batch_size=len(images), sync_dist=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Count one batch of stored chips into the confusion matrix."""
        images, target = self._varied(self._unchanged, batch, batch_idx)
        logits = self(images)
        known = target != IGNORE_INDEX
        weight = max(1, int(known.sum()))
        self.log("val_loss", self._loss(logits, target), on_epoch=True, batch_size=weight, sync_dist=True)
        pairs = target[known] * len(self._counts) + logits.argmax(dim=1)[known]
        self._counts += torch.bincount(pairs, minlength=self._counts.numel()).view_as(self._counts)

    def _varied(self, augment: Augment, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        images, codes = batch
        generator = torch.Generator().manual_seed(_mix(self.seed, self.current_epoch, batch_idx, int(self.global_rank)))
        return augment(images, self._channels[codes.long()], generator)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):  # sums over many pixels need all digits
            loss: Tensor = self.loss(logits, target)
        return loss

    def on_train_epoch_start(self) -> None:
        """Start the epoch's chance, and hold the encoder still for as long as it is to be frozen."""
        torch.manual_seed(_mix(self.seed, self.current_epoch, int(self.global_rank)))
        frozen = self.current_epoch < self.descent.freeze_encoder
        self._encoder.requires_grad_(not frozen)
        self._encoder.train(not frozen)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self._counts.zero_()

    def on_validation_epoch_end(self) -> None:
        """Score the whole validation, of all processes, at once."""
        counts = self.trainer.strategy.reduce(self._counts.clone(), reduce_op="sum")
        self.scores = Scores(Confusion(self.spec.legend, counts.cpu().numpy()))
        mean_iou = self.scores.mean_iou
        self.log("val_mean_iou", mean_iou, sync_dist=True)
        self.log("val_accuracy", self.scores.overall_accuracy, sync_dist=True)
        if self._plateau is not None:
            self._plateau.step(mean_iou)

    def on_train_epoch_end(self) -> None:
        """Refuse to go on with weights that are no numbers; this comes before they are saved.

        Raises
        ------
        DivergedError
            Saying what may help.
        """
        for name in ("train_loss", "val_loss"):
            if not bool(torch.isfinite(self.trainer.callback_metrics[name])):
                raise DivergedError(
                    f"{name} is not a number in epoch {self.current_epoch + 1}: lower optimizer.learning_rate, "
                    "or set fit.precision to float32"
                )

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        """Move the weights, and their average after them."""
        super().optimizer_step(*arguments, **named)
        if self._average is not None:
            self._average.update_parameters(self.network)

    def configure_optimizers(self) -> Any:
        """Make the optimizer, with the encoder's weights as its first group, and the schedule."""
        optimizer = self._make_optimizer()
        steps, schedule = self.descent.steps, self.descent.schedule
        if schedule == "plateau":
            # not handed to Lightning, which steps it only after the epoch's checkpoint is written
            self._plateau = ReduceLROnPlateau(optimizer, mode="max", **_PLATEAU)  # type: ignore[arg-type]
            self._plateau.load_state_dict(self._saved_plateau)
        if schedule in ("none", "plateau"):
            return optimizer
        scheduler = (
            CosineAnnealingLR(optimizer, steps)
            if schedule == "cosine"
            else OneCycleLR(optimizer, [group["lr"] for group in optimizer.param_groups], total_steps=steps)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _make_optimizer(self) -> Optimizer:
        descent = self.descent
        encoder = list(self._encoder.parameters())
        inside = {id(p) for p in encoder}
        rest = [p for p in self.network.parameters() if id(p) not in inside]
        own = {"momentum": _MOMENTUM, "nesterov": True} if descent.optimizer == "sgd" else {}
        groups = [
            {"params": encoder, "lr": descent.encoder_learning_rate or descent.learning_rate},
            {"params": rest, "lr": descent.learning_rate},
        ]
        made: Optimizer = _OPTIMIZERS[descent.optimizer](
            groups, lr=descent.learning_rate, weight_decay=descent.weight_decay, fused=True, **own
        )
        return made

    @property
    def _encoder(self) -> nn.Module:
        encoder = self.network.encoder
        assert isinstance(encoder, nn.Module)  # all of segmentation_models_pytorch's networks have one
        return encoder

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the plateau's state, which Lightning does not know of."""
        if self._plateau is not None:
            checkpoint["plateau"] = self._plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the plateau's state until there is an optimizer for it."""
        self._saved_plateau = checkpoint.get("plateau", {})


def _mix(*numbers: int) -> int:
    """Make one seed of several numbers, such that neighbours have nothing in common."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))
