"""Starting weights: from ImageNet, from a model of ours, from a safetensors file; for any number of bands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from s2seg.errors import ModelError
from s2seg.models.bundle import SPEC_FILE, load_model, refuse_pickle
from s2seg.models.spec import ModelSpec

IMAGENET = "imagenet"
_RGB = ("red", "green", "blue")
_HEADS = ("segmentation_head.", "full_resolution.")
"""What answers with classes; the branch at full resolution does so as a whole."""
_PARTS = ("encoder.", "decoder.", *_HEADS)
_PICKLES = (".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".bin")


@dataclass(frozen=True)
class _Source:
    """Weights as they were found.

    ``bands`` names the input channels of the first convolution, where that is known; ``whole`` tells a whole network
    from an encoder alone. Names of layers are those of the whole network.
    """

    name: str
    tensors: dict[str, torch.Tensor]
    bands: tuple[str, ...] = ()
    whole: bool = False


def start_from(network: torch.nn.Module, spec: ModelSpec, weights: str | Path | None) -> None:
    """Load starting weights into a network, in place.

    Parameters
    ----------
    network
        From :func:`s2seg.models.build_network` for ``spec``.
    spec
        Its bands, legend and architecture.
    weights
        * None: leave the fresh weights.
        * ``imagenet``: the encoder's weights that segmentation_models_pytorch publishes; they are downloaded.
        * a folder or URL of a model of ours (with ``model.json``): the whole network. A head for other classes, by
          code or by name, is left fresh.
        * a file or URL of safetensors: a whole network, or an encoder alone, with or without ``encoder.`` before its
          layers' names. What a file of an encoder has beyond this encoder (a classifier) is left aside.

    Raises
    ------
    ModelError
        When they cannot be read, are pickled, or do not fit: naming the layer and both shapes.

    Notes
    -----
    A first convolution for other bands is rewritten: a band with a name that the source knows (``red``, ``green`` and
    ``blue`` for ImageNet) takes over that band's filter, with or without the same season; every other one takes the
    mean over the source's. All are then multiplied by (source bands / bands), so that activations keep their size.
    """
    if weights is None:
        return
    source = _imagenet(spec) if str(weights) == IMAGENET else _read(str(weights), spec)
    own = network.state_dict()
    found = _adapt_first_convolution(network, spec, source)
    wanted = [name for name in own if source.whole or name.startswith("encoder.")]
    if source.whole and not any(name.startswith(_HEADS) for name in found):
        wanted = [name for name in wanted if not name.startswith(_HEADS)]
    _check_fit(source, {name: own[name] for name in wanted}, found)
    network.load_state_dict({name: found[name] for name in wanted}, strict=False)


def _imagenet(spec: ModelSpec) -> _Source:
    from segmentation_models_pytorch.encoders import get_encoder

    name = str(spec.architecture.get("encoder", "resnet34"))
    depth = int(spec.architecture.get("encoder_depth", 5))
    try:
        # timm's encoders name their weights themselves and want a mere yes
        encoder = get_encoder(name, in_channels=3, depth=depth, weights=True if name.startswith("tu-") else IMAGENET)
    except KeyError as error:
        raise ModelError(IMAGENET, f"{name} has no such weights ({error.args[0]}): use weights null") from error
    except (OSError, RuntimeError, ValueError) as error:  # all that downloads raise, and timm for a model without any
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            IMAGENET, f"the weights of {name} cannot be downloaded ({reason}): use weights null, or a file"
        ) from error
    return _Source(IMAGENET, {f"encoder.{key}": value for key, value in encoder.state_dict().items()}, _RGB)


def _read(path: str, spec: ModelSpec) -> _Source:
    if path.lower().endswith(_PICKLES) and "://" in path:
        raise ModelError(path, "refused: pickled weights can run code when they are loaded; give safetensors")
    if not path.lower().endswith(".safetensors"):
        return _read_bundle(path, spec)
    try:
        tensors = safetensors.torch.load(_read_bytes(path))
    except safetensors.SafetensorError as error:
        raise ModelError(path, f"not safetensors, or damaged ({error})") from error
    whole = any(name.startswith(_PARTS[1:]) for name in tensors)
    if not any(name.startswith(_PARTS) for name in tensors):
        tensors = {f"encoder.{name}": tensor for name, tensor in tensors.items()}
    return _Source(path, tensors, whole=whole)


def _read_bundle(path: str, spec: ModelSpec) -> _Source:
    if "://" not in path and Path(path).is_file():
        refuse_pickle(path, Path(path))
        raise ModelError(path, f"give a .safetensors file or a folder with {SPEC_FILE}")
    bundle = load_model(path)
    if bundle.is_onnx:
        raise ModelError(path, "an ONNX network cannot be trained further: use safetensors")
    tensors = safetensors.torch.load_file(bundle.weights_path)
    if _meaning(bundle.spec) != _meaning(spec):
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_HEADS)}
    return _Source(path, tensors, bundle.spec.bands, whole=True)


def _meaning(spec: ModelSpec) -> list[tuple[int, str]]:
    """What each channel of an answer stands for; colours do not matter."""
    return [(c.code, c.name) for c in spec.legend]


def _read_bytes(path: str) -> bytes:
    import fsspec  # only here: most runs start from none of these

    try:
        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
    except (OSError, ImportError, ValueError) as error:
        raise ModelError(path, f"cannot be read: {' '.join(str(error).split()) or type(error).__name__}") from error
    return content


def _adapt_first_convolution(network: torch.nn.Module, spec: ModelSpec, source: _Source) -> dict[str, torch.Tensor]:
    """Return the source's tensors with the first convolution rewritten for the spec's bands, where that is needed."""
    tensors = dict(source.tensors)
    for part in ("encoder.", "full_resolution."):
        name = _first_convolution(network, part, len(spec.bands))
        weight = tensors.get(name)
        if weight is None or weight.ndim != 4:
            continue
        known = source.bands if len(source.bands) == weight.shape[1] else ()
        if known or weight.shape[1] != len(spec.bands):
            tensors[name] = adapt_bands(weight, known, spec.bands)
    return tensors


def _first_convolution(network: torch.nn.Module, part: str, bands: int) -> str:
    """Name of the weight that meets the image: the part's first convolution that takes that many channels."""
    for name, module in network.named_modules():
        if name.startswith(part) and isinstance(module, torch.nn.Conv2d) and module.in_channels == bands:
            return f"{name}.weight"
    return ""


def adapt_bands(weight: torch.Tensor, known: Sequence[str], bands: Sequence[str]) -> torch.Tensor:
    """Rewrite a first convolution for other bands.

    Parameters
    ----------
    weight
        (out, source bands, height, width).
    known
        Names of the source's bands, ``red`` or ``red@spring``; empty if unknown.
    bands
        Names of the bands that the result takes, likewise.

    Returns
    -------
    Tensor
        (out, bands, height, width): the filter of the band of that name and season; else the mean of that band's
        filters, whatever their seasons; else the mean of all. Each times (source bands / bands).
    """
    filters = [weight[:, _alike(band, known) or slice(None)].mean(dim=1) for band in bands]
    return torch.stack(filters, dim=1) * (weight.shape[1] / len(bands))


def _alike(band: str, known: Sequence[str]) -> list[int]:
    """Where a band is among the known ones: as it is called, or if it is not, in any season."""
    exact = [i for i, name in enumerate(known) if name == band]
    return exact or [i for i, name in enumerate(known) if name.partition("@")[0] == band.partition("@")[0]]


def _check_fit(source: _Source, own: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]) -> None:
    """Raise ModelError on the first layer that is missing, too much, or of another shape."""
    for name, tensor in own.items():
        if name not in found:
            raise ModelError(source.name, f"does not fit: layer {name} {_shape(tensor)} is missing from it")
        if found[name].shape != tensor.shape:
            raise ModelError(
                source.name, f"does not fit: layer {name} is {_shape(found[name])} there and {_shape(tensor)} here"
            )
    if source.whole:
        for name in sorted(found.keys() - own.keys()):
            raise ModelError(source.name, f"does not fit: this network has no layer {name} {_shape(found[name])}")


def _shape(tensor: torch.Tensor) -> str:
    return " x ".join(map(str, tensor.shape)) or "scalar"
