"""What makes a torch network faster without changing its answers."""

from __future__ import annotations

import copy
from itertools import pairwise

import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

_TRIAL_SIDE = 64


@torch.no_grad()
def fold_batch_norm(network: torch.nn.Module, bands: int) -> torch.nn.Module:
    """Fold each batch normalisation into the convolution before it: a pass over memory less per layer.

    Parameters
    ----------
    network
        In evaluation mode; it is not changed.
    bands
        Input channels, for a trial run.

    Returns
    -------
    torch.nn.Module
        A folded copy, or the network itself if its layers do not run in the order in which they are listed: the copy
        must give the same answers on a trial window.
    """
    folded = copy.deepcopy(network)
    for module in list(folded.modules()):
        for (first, conv), (second, norm) in pairwise(list(module.named_children())):
            if not isinstance(conv, torch.nn.Conv2d) or not isinstance(norm, torch.nn.BatchNorm2d):
                continue
            if conv.out_channels == norm.num_features:
                setattr(module, first, fuse_conv_bn_eval(conv, norm))
                setattr(module, second, torch.nn.Identity())
    device = next(network.parameters()).device
    trial = torch.randn(1, bands, _TRIAL_SIDE, _TRIAL_SIDE, generator=torch.Generator().manual_seed(0)).to(device)
    expected, got = network(trial), folded(trial)
    scale = float(expected.abs().max())
    return folded if bool((got - expected).abs().max() <= 1e-4 * scale) else network
