"""Losses for maps with holes: pixels without a label count for nothing, and a batch without any label costs zero.

All of them are ours but for torch's cross entropy. Those of segmentation-models-pytorch were looked at and left: there
Dice and Tversky divide by the classes that a batch lacks too, the focal exponent is applied to the mean over classes
instead of to each, the focal loss trains one sigmoid per class although a map is made with softmax, and the focal and
Lovasz losses answer a batch without labels with NaN or with no number at all.

Class weights mean the same in every loss, a weighted mean instead of a plain one. In the losses that are a mean over
pixels (cross entropy, focal) the pixels are weighted by their class; in those that are a mean over classes (Dice,
Tversky, Lovasz) the classes are weighted, among those that the batch has labels of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  what every torch code base calls it

from s2seg.errors import InputError
from s2seg.training.loss_names import parse_loss

_TINY = 1e-7
_FOCUS = 2.0  # gamma that Lin et al. found best
_FALSE_POSITIVE, _FALSE_NEGATIVE = 0.3, 0.7  # alpha and beta that Salehi et al. found best
_TVERSKY_POWER = 0.75  # 1 / gamma, with the gamma of 4/3 that Abraham and Khan found best

_Loss = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def build_loss(text: str, classes: int, class_weights: Tensor | None, ignore_index: int) -> nn.Module:
    """Make a loss from its text.

    Parameters
    ----------
    text
        One of :data:`s2seg.training.loss_names.LOSSES`, or a sum such as ``0.6*focal_tversky + 0.4*cross_entropy``.
    classes
        Output channels of the network.
    class_weights
        (classes,) not negative, or None for equal ones. Only their ratios matter.
    ignore_index
        The target value of pixels without a label; not a channel.

    Returns
    -------
    nn.Module
        Called with logits (n, classes, h, w) of any float type and target (n, h, w) int64 channel indices; returns a
        float32 scalar. The weights move with the module from device to device and are no part of its state.

    Raises
    ------
    InputError
        For a text that is no loss, or class weights that are not one number of zero or more per class.
    """
    terms = parse_loss(text)
    weights = torch.ones(classes) if class_weights is None else class_weights.detach().float()
    if weights.shape != (classes,):
        raise InputError(f"class weights: {list(weights.shape)} numbers for {classes} classes; give one per class")
    if not bool(torch.isfinite(weights).all() and (weights >= 0).all() and weights.any()):
        raise InputError("class weights: give numbers of zero or more, at least one of them above zero")
    return _WeightedSum(terms, weights, ignore_index)


class _WeightedSum(nn.Module):
    class_weights: Tensor

    def __init__(self, terms: Sequence[tuple[float, str]], class_weights: Tensor, ignore_index: int) -> None:
        super().__init__()
        self.terms, self.ignore_index = tuple(terms), ignore_index
        self.register_buffer("class_weights", class_weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        logits = logits.float()  # sums over a batch of pixels do not fit into half precision
        values = [
            factor * _BY_NAME[name](logits, target, self.class_weights, self.ignore_index)
            for factor, name in self.terms
        ]
        return torch.stack(values).sum()


# -- means over pixels ------------------------------------------------------------------------------------------------


def cross_entropy(logits: Tensor, target: Tensor, class_weights: Tensor, ignore_index: int) -> Tensor:
    """Cross entropy, the mean over labelled pixels weighted by class.

    Parameters
    ----------
    logits
        (n, c, h, w) float32.
    target
        (n, h, w) int64 channel indices, or ``ignore_index``.
    class_weights
        (c,) float32.
    ignore_index
        The value of pixels that do not count.

    Returns
    -------
    Tensor
        Scalar; 0 where nothing is labelled.
    """
    total = F.cross_entropy(logits, target, class_weights, ignore_index=ignore_index, reduction="sum")
    # torch's own mean is 0 / 0 where nothing is labelled
    return total / _pixel_weights(target, class_weights, ignore_index).sum().clamp_min(_TINY)


def focal(logits: Tensor, target: Tensor, class_weights: Tensor, ignore_index: int) -> Tensor:
    """Focal loss on softmax, ``-(1 - p)**2 log p`` with p the probability of the true class.

    Lin et al. 2017, Focal Loss for Dense Object Detection, arXiv:1708.02002, eq. 5; the class weights are its alpha.
    Parameters and result as in :func:`cross_entropy`.
    """
    surprise = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    weights = _pixel_weights(target, class_weights, ignore_index)
    # (1 - p) from log p without the loss of digits near p = 1
    values = (-torch.expm1(-surprise)) ** _FOCUS * surprise
    return (weights * values).sum() / weights.sum().clamp_min(_TINY)


def _pixel_weights(target: Tensor, class_weights: Tensor, ignore_index: int) -> Tensor:
    """Weight of each pixel's class (n, h, w), 0 where there is none."""
    labelled = target != ignore_index
    return class_weights[torch.where(labelled, target, 0)] * labelled


# -- means over classes -----------------------------------------------------------------------------------------------


def dice(logits: Tensor, target: Tensor, class_weights: Tensor, ignore_index: int) -> Tensor:
    """One minus the soft Dice coefficient of each class, over all pixels of the batch.

    Milletari et al. 2016, V-Net, arXiv:1606.04797, with plain instead of squared sums.
    Parameters and result as in :func:`cross_entropy`.
    """
    return _class_mean(1 - _tversky_index(logits, target, ignore_index, 0.5, 0.5), target, class_weights)


def tversky(logits: Tensor, target: Tensor, class_weights: Tensor, ignore_index: int) -> Tensor:
    """One minus the soft Tversky index: Dice with a missed pixel (0.7) dearer than a false one (0.3).

    Salehi et al. 2017, Tversky loss function for image segmentation using 3D fully convolutional deep networks,
    arXiv:1706.05721. Parameters and result as in :func:`cross_entropy`.
    """
    index = _tversky_index(logits, target, ignore_index, _FALSE_POSITIVE, _FALSE_NEGATIVE)
    return _class_mean(1 - index, target, class_weights)


def focal_tversky(logits: Tensor, target: Tensor, class_weights: Tensor, ignore_index: int) -> Tensor:
    """Tversky loss of each class to the power of 3/4, which keeps pushing a class that is nearly right.

    Abraham and Khan 2019, A Novel Focal Tversky Loss Function with Improved Attention U-Net for Lesion Segmentation,
    arXiv:1810.07842. Parameters and result as in :func:`cross_entropy`.
    """
    index = _tversky_index(logits, target, ignore_index, _FALSE_POSITIVE, _FALSE_NEGATIVE)
    # the power's slope is infinite at 0; the clamp's is 0
    return _class_mean((1 - index).clamp_min(_TINY) ** _TVERSKY_POWER, target, class_weights)


def lovasz(logits: Tensor, target: Tensor, class_weights: Tensor, ignore_index: int) -> Tensor:
    """Lovasz-Softmax: the convex stand-in for one minus the IoU of each class, over all pixels of the batch.

    Berman et al. 2018, The Lovasz-Softmax loss, arXiv:1705.08790, algorithm 1.
    Parameters and result as in :func:`cross_entropy`.
    """
    probability, truth, labelled = _one_hot(logits, target, ignore_index)
    errors = ((truth - probability).abs() * labelled).transpose(0, 1).flatten(1)  # (class, pixel)
    errors, order = errors.sort(dim=1, descending=True)
    truth = truth.transpose(0, 1).flatten(1).gather(1, order)
    total = truth.sum(1, keepdim=True)
    # IoU lost once the pixels up to here are wrong; those without a label have no error to multiply it with
    lost = 1 - (total - truth.cumsum(1)) / (total + (1 - truth).cumsum(1)).clamp_min(1)
    steps = torch.diff(lost, dim=1, prepend=torch.zeros_like(total))
    return _class_mean((errors * steps).sum(1), target, class_weights)


def _tversky_index(logits: Tensor, target: Tensor, ignore_index: int, alpha: float, beta: float) -> Tensor:
    """TP / (TP + alpha FP + beta FN) of each class (c,), with probabilities for counts."""
    probability, truth, labelled = _one_hot(logits, target, ignore_index)
    probability = probability * labelled
    over = (0, 2, 3)
    hits, claimed, there = (probability * truth).sum(over), probability.sum(over), truth.sum(over)
    wrong = alpha * (claimed - hits) + beta * (there - hits)
    return hits / (hits + wrong).clamp_min(_TINY)


def _one_hot(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probability and truth (n, c, h, w), and where there is a label (n, 1, h, w), all float32."""
    labelled = (target != ignore_index).unsqueeze(1)
    channels = torch.arange(logits.shape[1], device=target.device).view(1, -1, 1, 1)
    truth = (target.unsqueeze(1) == channels).to(logits.dtype)
    return logits.softmax(1), truth, labelled.to(logits.dtype)


def _class_mean(values: Tensor, target: Tensor, class_weights: Tensor) -> Tensor:
    """Weighted mean of (c,) over the classes that the batch has labels of.

    A class without a true pixel has no overlap to speak of: Dice is 0 / 0 there, or 1 for a single false pixel.
    """
    channels = torch.arange(len(values), device=target.device)
    present = (target.flatten().unsqueeze(0) == channels.unsqueeze(1)).any(1)
    weights = class_weights * present
    return (values * weights).sum() / weights.sum().clamp_min(_TINY)


_BY_NAME: dict[str, _Loss] = {
    "cross_entropy": cross_entropy,
    "dice": dice,
    "focal": focal,
    "focal_tversky": focal_tversky,
    "tversky": tversky,
    "lovasz": lovasz,
}
