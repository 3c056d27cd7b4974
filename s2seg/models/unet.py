"""Networks by name: segmentation_models_pytorch's architectures for any number of bands and classes."""

from __future__ import annotations

import difflib
import inspect
from typing import TYPE_CHECKING, Any

from s2seg.errors import ModelError
from s2seg.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

# set by the spec, or not to be set at all: pretrained weights mean a download, an auxiliary head another output
_RESERVED = {"encoder_name", "encoder_weights", "in_channels", "classes", "activation", "aux_params"}


def build_network(spec: ModelSpec) -> torch.nn.Module:
    """Build the network that ``spec.architecture`` names, with fresh weights; nothing is downloaded.

    Parameters
    ----------
    spec
        ``architecture`` holds ``name`` (Unet, UnetPlusPlus, FPN, DeepLabV3Plus, Segformer, ...), ``encoder``
        (any of segmentation_models_pytorch's, or ``tu-`` and a timm name) and, if wanted, that architecture's own
        arguments such as ``encoder_depth`` or ``decoder_channels``, and ``full_resolution``, the channels of a
        :class:`~s2seg.models.full_resolution.FullResolution` branch.

    Raises
    ------
    ModelError
        For a name or argument that does not exist, with the nearest ones that do; or when torch is not installed.

    Notes
    -----
    An encoder of less than full depth is made without the layers that it does not use, which the library would keep: a
    ResNet-18 of depth 3 has 0.7 million weights and not 11. Of a state dict that was trained elsewhere take the names
    that this network has.
    """
    if spec.is_onnx:
        raise ModelError(spec.name, "an ONNX network is a file, not an architecture that can be built")
    try:
        import segmentation_models_pytorch as smp
    except ImportError as error:
        raise ModelError(spec.name, "needs torch: pip install 's2seg[torch]'") from error
    arguments = dict(spec.architecture)
    name, encoder = str(arguments.pop("name")), str(arguments.pop("encoder", "resnet34"))
    branch = arguments.pop("full_resolution", 0)
    if not isinstance(branch, int) or branch < 0:
        raise ModelError(spec.name, f"full_resolution is a number of channels, not {branch!r}")
    architecture = smp.MODEL_ARCHITECTURES_MAPPING.get(name.lower())
    if architecture is None:
        known = [cls.__name__ for cls in smp.MODEL_ARCHITECTURES_MAPPING.values()]
        raise ModelError(spec.name, f"unknown architecture {name!r}: {_nearest(name, known)}")
    _check_encoder(spec, encoder)
    _check_arguments(spec, architecture, arguments)
    try:
        network: torch.nn.Module = architecture(
            encoder_name=encoder,
            encoder_weights=None,
            in_channels=len(spec.bands),
            classes=branch or len(spec.legend),
            **arguments,
        )
        if arguments.get("encoder_depth", 5) < 5:
            _drop_unused(network.encoder, len(spec.bands))
    except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
        # what the library says of arguments that do not go together
        raise ModelError(spec.name, f"{name} with {encoder}: {' '.join(str(error).split())}") from error
    if branch:
        from s2seg.models.full_resolution import add_full_resolution  # not at the top: it imports torch

        add_full_resolution(network, len(spec.bands), branch, len(spec.legend))
    return network


def _drop_unused(encoder: Any, bands: int) -> None:
    """Empty the stages that nothing passes through: most of a ResNet's weights lie behind its third one.

    What is used is seen on a small image. Only whole stages go, and members of a list of stages: inside of a layer,
    weights can be used without a call. An encoder that takes no image so small keeps everything, whatever the window
    of its model: the names of its weights must not depend on that.
    """
    import torch

    called: set[torch.nn.Module] = set()
    hooks = [module.register_forward_hook(lambda used, *_: called.add(used)) for module in encoder.modules()]
    try:
        with torch.no_grad():
            encoder.eval()(torch.zeros(1, bands, 64, 64))
    except (RuntimeError, ValueError, AssertionError):  # how libraries put that a size does not suit them
        return
    finally:
        encoder.train()
        for hook in hooks:
            hook.remove()
    stages = [encoder]
    while stages:
        stage = stages.pop()
        for name, child in list(stage.named_children()):
            if called.isdisjoint(child.modules()):
                setattr(stage, name, torch.nn.Identity())
            elif isinstance(child, torch.nn.Sequential | torch.nn.ModuleList):
                stages.append(child)


def _check_encoder(spec: ModelSpec, encoder: str) -> None:
    from segmentation_models_pytorch.encoders import get_encoder_names

    known = list(get_encoder_names())
    if encoder.startswith("tu-"):
        import timm

        # a timm name can also be a hub address, which would be fetched: only timm's own list counts
        known = [f"tu-{name}" for name in timm.list_models()]
    if encoder not in known:
        raise ModelError(spec.name, f"unknown encoder {encoder!r}: {_nearest(encoder, known)}")


def _check_arguments(spec: ModelSpec, architecture: type, arguments: dict[str, Any]) -> None:
    """Let only the architecture's named arguments through: what lies beyond reaches timm, which loads files."""
    named = inspect.signature(architecture).parameters.values()
    allowed = sorted({p.name for p in named if p.kind is not p.VAR_KEYWORD} - _RESERVED)
    for argument in arguments:
        if argument not in allowed:
            raise ModelError(spec.name, f"unknown architecture argument {argument!r}: use {', '.join(allowed)}")


def _nearest(name: str, known: list[str]) -> str:
    lower = {k.lower(): k for k in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    return f"did you mean {', '.join(lower[c] for c in close)}?" if close else f"one of {', '.join(known[:12])}, ..."


def pools_globally(network: torch.nn.Module, bands: int, side: int = 64) -> bool:
    """Whether an answer depends on the whole window: what ``ModelSpec.global_context`` must then say.

    Runs the network once on a small window and watches for squeeze-and-excite, attention, pooling to a fixed size,
    and norms that take their statistics from the window.

    Parameters
    ----------
    network
        In evaluation mode.
    bands
        How many the network takes.
    side
        Pixels on a side of the window: one that the network takes.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
        found: bool = False

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            self.found |= _mixes_places(func.overloadpacket.__name__, args, result)
            return result

    at = next(network.parameters())
    watch = Watch()  # type: ignore[no-untyped-call]
    with torch.no_grad(), watch:  # inference mode would show fewer, composite operations
        network(torch.zeros(1, bands, side, side, device=at.device, dtype=at.dtype))
    return watch.found


def _mixes_places(operation: str, args: tuple[Any, ...], result: Any) -> bool:
    """Whether an operation lets every place of its input reach every place of its result."""
    if operation in ("mean", "sum", "amax", "amin"):
        source = args[0].shape
        return len(source) == 4 and source[-1] > 1 and result.shape[-2:] != source[-2:]
    if operation == "_softmax":
        return bool(args[1] % args[0].ndim >= 2)  # over places; axis 1 would be the classes
    if operation == "native_batch_norm":
        return bool(args[5])  # statistics of the input itself: an instance norm
    return operation == "native_group_norm" or operation.startswith(("_adaptive_", "adaptive_", "_scaled_dot_product"))
