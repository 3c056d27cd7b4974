"""What makes a torch network on a CPU about twice as fast without changing its answers."""

from __future__ import annotations

import copy
import ctypes
import functools
import platform
from itertools import pairwise

import torch
from torch.nn.utils.fusion import fuse_conv_bn_eval

# glibc's <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

_TRIAL_SIDE = 64


@functools.cache
def keep_freed_memory() -> bool:
    """Make glibc reuse large buffers instead of handing them back to the kernel; return whether it did.

    A U-Net on a large window allocates and frees hundreds of megabytes per layer. By default each goes to the kernel
    and comes back as untouched pages, one fault each, which costs as much as the arithmetic: 1152 px windows ran at
    1.2 Mpx/s with it and at 2.0 without (two cores, mobilenet_v2). One arena serves all threads, so that a buffer freed
    by one is there for the next. Peak memory stays what it was; it is given back when the process ends. Holds for the
    whole process; elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_ARENA_MAX, 1))
    done = [mallopt(option, value) for option, value in settings]
    return all(done)


@torch.no_grad()
def fold_batch_norm(network: torch.nn.Module, bands: int) -> torch.nn.Module:
    """Fold each batch normalisation into the convolution before it: a pass over memory less per layer.

    Parameters
    ----------
    network
        In evaluation mode, on its device; it is not changed.
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
