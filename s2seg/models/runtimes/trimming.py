"""A decoder that computes no more of a window than what is kept of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from segmentation_models_pytorch.decoders.unet.decoder import UnetDecoder
from torch import nn

from s2seg.models.full_resolution import FullResolution
from s2seg.models.runtimes.tuning import TRIAL_SIDE, answers_alike, trial_window

_CONTEXT = 4
"""Pixels of its coarse image that a block sees beyond those that count. Three are enough: to be right 3 px beyond what
counts in its own, twice as fine image, its convolutions see 2 px more and interpolation half a coarse one: (3 + 2) / 2
+ 1 / 2 = 3. With four the sides stay multiples of 16, which processors like."""


@torch.no_grad()
def trim_decoder(network: nn.Module, bands: int, margin: int) -> nn.Module:
    """Let the decoder of a U-Net leave out the margin that is cut from its answer.

    A window needs its context where the network looks far, in the coarse images of the encoder. The decoder looks a few
    pixels far at each level, and the finer the level, the more it costs: here each level gets the coarse image and the
    one beside it cut to what counts, and a few pixels around it.

    Parameters
    ----------
    network
        In evaluation mode; it is not changed, and shares its weights with what is returned.
    bands
        Input channels, for a trial run.
    margin
        Pixels on each side of a window that are cut from the answer.

    Returns
    -------
    torch.nn.Module
        A network whose answer lacks most of the margin on each side, and is the same within it; or the network itself
        where it has no decoder of this kind, the margin leaves nothing out, or a trial window gives another answer.
    """
    if not isinstance(getattr(network, "decoder", None), UnetDecoder):
        return network
    trimmed: Any = copy.deepcopy(network, {id(p): p for p in network.parameters()})
    cut = _trim(trimmed.decoder.blocks, margin)
    if not cut:
        return network
    if isinstance(getattr(trimmed, "full_resolution", None), FullResolution):
        trimmed.full_resolution.cut = cut
    trial = trial_window(network, bands, TRIAL_SIDE + 2 * margin)
    expected = network(trial)[..., margin:-margin, margin:-margin]
    return trimmed if answers_alike(expected, middle(trimmed(trial), expected.shape)) else network


def middle(image: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Cut (..., y, x) evenly on all sides, to the height and width of ``shape``, which are no larger."""
    down, across = ((have - wanted) // 2 for have, wanted in zip(image.shape[-2:], shape[-2:], strict=True))
    return image[..., down : image.shape[-2] - down, across : image.shape[-1] - across]


class TrimmedBlock(nn.Module):
    """A decoder's block that gets less than there is.

    Parameters
    ----------
    block
        Of a Unet's decoder.
    coarse
        Pixels to cut on each side of the image that it enlarges.
    fine
        Pixels that its own answer lacks on each side, and so those to cut of the image beside it.
    """

    def __init__(self, block: nn.Module, coarse: int, fine: int) -> None:
        super().__init__()
        self.block, self.coarse, self.fine = block, coarse, fine

    def forward(
        self, image: torch.Tensor, height: int, width: int, skip_connection: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map the coarse image, and the one of double size beside it, to one of double size, less ``fine``."""
        beside = None if skip_connection is None else _cut(skip_connection, self.fine)
        lost = 2 * self.fine
        answer: torch.Tensor = self.block(_cut(image, self.coarse), height - lost, width - lost, skip_connection=beside)
        return answer


def _trim(blocks: nn.ModuleList, margin: int) -> int:
    """Replace the blocks, the coarsest first; return how much the last one's answer lacks on each side."""
    lacking = 0  # of the block's coarse image, in its pixels
    for level, block in enumerate(blocks):
        scale = 2 ** (len(blocks) - level)
        wanted = max(margin // scale - _CONTEXT, lacking)
        blocks[level] = TrimmedBlock(block, coarse=wanted - lacking, fine=2 * wanted)
        lacking = 2 * wanted
    return lacking


def _cut(image: torch.Tensor, pixels: int) -> torch.Tensor:
    return image[..., pixels:-pixels, pixels:-pixels] if pixels else image
