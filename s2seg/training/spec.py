"""What a configured network expects and answers, before it is trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from s2seg.errors import ModelError
from s2seg.models.spec import ModelSpec
from s2seg.models.unet import build_network, pools_globally
from s2seg.training.chips import ChipStore
from s2seg.training.config import TrainConfig


def build_spec(config: TrainConfig, chips: ChipStore) -> ModelSpec:
    """Return what the configured network expects and answers: scaling from the training chips, geometry from itself.

    A network that pools globally is bound to the chips' size: elsewhere its answers would be others.

    Raises
    ------
    ModelError
        For a network that cannot be built, or does not answer a chip pixel by pixel.
    """
    return spec_of(config, tuple(map(float, chips.mean)), tuple(map(float, chips.std)), _provenance(config, chips))


def spec_of(
    config: TrainConfig, mean: tuple[float, ...], std: tuple[float, ...], provenance: Mapping[str, Any]
) -> ModelSpec:
    """Return what :func:`build_spec` does, with this scaling (a mean and a spread per band) and this provenance."""
    network, size = config.network, config.chips.size
    # said even where it is the default, so that layers beyond it are not built
    levels = {"encoder_depth": network.levels} if network.levels < 5 else {}
    branch = {"full_resolution": network.full_resolution} if network.full_resolution else {}
    spec = ModelSpec(
        name=config.name,
        bands=config.channels,
        legend=config.legend,
        mean=mean,
        std=std,
        architecture={
            "name": network.architecture, "encoder": network.encoder, **levels, **network.arguments, **branch
        },
        stride=network.stride,
        depth=3 * network.stride if network.depth is None else network.depth,
        seasons=config.seasons,
        provenance=dict(provenance),
    )  # fmt: skip
    if not _is_bound_to_size(spec, size):
        return spec
    inside = (size - 1) // 2 // spec.stride * spec.stride  # so that something is left between two depths
    return replace(spec, global_context=True, window=size, depth=min(spec.depth, inside))


def _is_bound_to_size(spec: ModelSpec, size: int) -> bool:
    """Whether the network's answers depend on the window's size; raise where it has none for a chip at all."""
    name = f"{spec.architecture['name']} with {spec.architecture['encoder']}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Initializing zero-element tensors")  # said below, with what to do
        network = build_network(spec).eval()
    if empty := next((layer for layer, weight in network.named_parameters() if not weight.numel()), None):
        raise ModelError(
            spec.name,
            f"{name}: layer {empty.rpartition('.')[0]} has no channels left: give decoder_channels of more channels "
            "in network.arguments (scse attention divides each by 16)",
        )
    try:
        with torch.no_grad():
            answer = network(torch.zeros(1, len(spec.bands), size, size))
    except (RuntimeError, ValueError, AssertionError) as error:  # how libraries put that a size does not suit them
        reason = " ".join(str(error).split())
        raise ModelError(spec.name, f"{name} takes no chips of {size} px ({reason}): change chips.size") from error
    if answer.shape[2:] != (size, size):
        raise ModelError(
            spec.name,
            f"{name} answers {size} px with {answer.shape[2]}: make encoder_depth and upsampling agree in "
            "network.arguments",
        )
    try:
        return pools_globally(network, len(spec.bands))
    except (RuntimeError, ValueError, AssertionError):  # it is looked at in a small window, which some do not take
        return True


def _provenance(config: TrainConfig, chips: ChipStore) -> dict[str, Any]:
    return {
        "configuration": config.fingerprint(),
        "chips": chips.fingerprint,
        "areas": list(dict.fromkeys(map(str, chips.area))),
        "items": list(chips.items),
        "split": config.split.model_dump(mode="json", exclude_none=True),
        "resolution": config.resolution,
        "starting_weights": config.network.weights or "none",
        "loss": config.loss,
        "seed": config.fit.seed,
    }
