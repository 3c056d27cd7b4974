"""A branch that sees each pixel as it is, beside a network that halves the image before it looks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class FullResolution(nn.Module):
    """Join what a network says of a place with what its pixels say by themselves.

    Most networks of segmentation_models_pytorch halve the image in their first layer and bring nothing of the whole
    one back at the end, so that things of one or two pixels (roads, houses at 60 m) are lost. This takes the spectrum
    of each pixel past the network, and two layers decide from both.

    Parameters
    ----------
    bands
        Input channels.
    channels
        Of this branch, and of what the network answers to it.
    classes
        Output channels.
    """

    def __init__(self, bands: int, channels: int, classes: int) -> None:
        super().__init__()
        self.pixels = nn.Sequential(*_layer(bands, channels, side=3), *_layer(channels, channels))
        self.head = nn.Sequential(*_layer(2 * channels, channels), nn.Conv2d(channels, classes, 1))
        self.cut = 0
        """Pixels that ``context`` lacks on each side of the image."""

    def forward(self, image: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Map (n, bands, y, x) and the network's (n, channels, y, x) to scores (n, classes, y, x)."""
        cut = self.cut
        seen = image[..., cut:-cut, cut:-cut] if cut else image
        scores: torch.Tensor = self.head(torch.cat([self.pixels(seen), context], dim=1))
        return scores


def add_full_resolution(network: nn.Module, bands: int, channels: int, classes: int) -> None:
    """Let a network with ``channels`` outputs end in a :class:`FullResolution`, in place.

    Its own layers keep their names, so that weights of an encoder fit as before.
    """
    network.full_resolution = FullResolution(bands, channels, classes)
    network.register_forward_hook(_join)


def _join(network: nn.Module, images: tuple[torch.Tensor], context: torch.Tensor) -> Any:
    branch: Any = network.full_resolution
    return branch(images[0], context)


def _layer(source: int, target: int, side: int = 1) -> tuple[nn.Module, ...]:
    return nn.Conv2d(source, target, side, padding=side // 2, bias=False), nn.BatchNorm2d(target), nn.ReLU(inplace=True)
