"""Choose the runtime, the device and the precision of a network; nothing is opened here."""

from __future__ import annotations

import importlib.util
import re
from typing import NamedTuple

from s2seg.errors import ModelError
from s2seg.models.bundle import ModelBundle
from s2seg.models.runtimes.drivers import may_have_gpu

_MODULES = {
    "torch": ("torch", "segmentation_models_pytorch"),
    "openvino": ("openvino",),
    "onnxruntime": ("onnxruntime",),
}
_EXTRAS = {
    "torch": "pip install 's2seg[torch]'",
    "openvino": "pip install 's2seg[openvino]'",
    "onnxruntime": "pip install onnxruntime",
}
COMPILED = "torch-compiled"
"""The torch runtime with its network compiled; it reads what torch reads, where torch runs."""


class Choice(NamedTuple):
    """What a network runs on, by the names of :func:`open_session`."""

    runtime: str
    device: str
    precision: str

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU computes, with memory of its own."""
        return self.device.startswith(("cuda", "tensorrt"))


def expected_session(
    bundle: ModelBundle, runtime: str = "auto", device: str = "auto", precision: str = "auto"
) -> Choice:
    """Name what :func:`open_session` tries first; nothing is opened.

    Where the runtime is not installed, device and precision are as they were asked for.

    Raises
    ------
    ModelError
        When a name is unknown, or the bundle, the device or the precision does not go with the others.
    """
    return first_choice(bundle, runtime, device, precision)[0]


def first_choice(bundle: ModelBundle, runtime: str, device: str, precision: str) -> tuple[Choice, str]:
    """Return what is tried first, as :func:`expected_session` names it, and why."""
    _check_names(bundle, runtime, device, precision)
    why = "asked for"
    if runtime == "auto":
        runtime, why = _first_runtime(bundle, device)
    return settle(bundle, Choice(runtime, device, precision)), why


def settle(bundle: ModelBundle, asked: Choice) -> Choice:
    """Put a device and a precision in the place of ``auto``, if the runtime is installed, and refuse what it lacks."""
    _check_kind(bundle, asked.runtime)
    if not _installed(asked.runtime):
        return asked
    device = _choose_device(bundle, asked.runtime, asked.device)
    choice = Choice(asked.runtime, device, asked.precision)
    if asked.precision != "auto":
        _check_precision(bundle.path, choice)
        return choice
    # torch takes bfloat16 on a CPU too, where it is asked for
    fast = (asked.runtime == "openvino" or choice.on_gpu) and _has_bfloat16(choice)
    return choice._replace(precision="bfloat16" if fast else "float32")


def check_installed(bundle: ModelBundle, runtime: str) -> None:
    """Raise a ModelError that names what to install, if a runtime needs it."""
    if not _installed(runtime):
        library = _library(runtime)
        raise ModelError(bundle.path, f"needs {library}, which is not installed: {_EXTRAS[library]}")


def own_runtime(bundle: ModelBundle) -> str:
    """Return the runtime that every network of this kind runs on, on any device."""
    return "onnxruntime" if bundle.is_onnx else "torch"


def available_runtimes() -> tuple[str, ...]:
    """Names of the runtimes that are installed; none of them is imported to find out.

    ``torch-compiled`` is not among them: whether there is a compiler shows when it is asked for.
    """
    return tuple(name for name in _MODULES if _installed(name))


def _library(runtime: str) -> str:
    return "torch" if runtime == COMPILED else runtime


def _installed(runtime: str) -> bool:
    return all(importlib.util.find_spec(module) for module in _MODULES[_library(runtime)])


def _check_names(bundle: ModelBundle, runtime: str, device: str, precision: str) -> None:
    if runtime not in ("auto", COMPILED, *_MODULES):
        raise ModelError(bundle.path, f"unknown runtime {runtime!r}: auto, {', '.join(_MODULES)}, {COMPILED}")
    if not re.fullmatch(r"auto|cpu|(cuda|tensorrt)(:\d+)?", device):
        raise ModelError(bundle.path, f"unknown device {device!r}: auto, cpu, cuda, cuda:1 or tensorrt")
    if precision not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(bundle.path, f"unknown precision {precision!r}: float32, bfloat16 or float16")
    if device.startswith("tensorrt") and not bundle.is_onnx:
        raise ModelError(bundle.path, f"device {device!r} needs an ONNX network: `s2seg export` it, or use 'cuda'")


def _first_runtime(bundle: ModelBundle, device: str) -> tuple[str, str]:
    """Which runtime ``auto`` tries, and why."""
    if device not in ("auto", "cpu"):
        return own_runtime(bundle), "a GPU is asked for"
    if device == "auto" and _sees_gpu(bundle):
        return own_runtime(bundle), "a GPU is there"
    if not _installed("openvino"):
        return own_runtime(bundle), f"OpenVINO is not installed: {_EXTRAS['openvino']}"
    return "openvino", "the fastest on a CPU of those installed"


def _sees_gpu(bundle: ModelBundle) -> bool:
    """Whether the network's own runtime sees a GPU.

    Where no driver can be there the runtime is not loaded to find out: with torch that takes seconds.
    """
    runtime = own_runtime(bundle)
    return may_have_gpu() and _installed(runtime) and _choose_device(bundle, runtime, "auto") != "cpu"


def _check_kind(bundle: ModelBundle, runtime: str) -> None:
    if _library(runtime) == "torch" and bundle.is_onnx:
        raise ModelError(bundle.path, "model.onnx does not run on torch: use runtime 'onnxruntime' or 'openvino'")
    if runtime == "onnxruntime" and not bundle.is_onnx:
        raise ModelError(
            bundle.path,
            "weights.safetensors do not run on onnxruntime: use runtime 'torch' or 'openvino', or `s2seg export` it",
        )


def _choose_device(bundle: ModelBundle, runtime: str, device: str) -> str:
    if runtime == "openvino":
        if device not in ("auto", "cpu"):
            other = own_runtime(bundle)
            raise ModelError(bundle.path, f"OpenVINO runs on 'cpu' here, not on {device!r}: use runtime {other!r}")
        return "cpu"
    if _library(runtime) == "torch":
        from s2seg.models.runtimes.pytorch import choose_device
    else:
        from s2seg.models.runtimes.onnxrt import choose_device
    return choose_device(bundle.path, device)


def _check_precision(path: str, choice: Choice) -> None:
    """Refuse what would be imitated, many times slower than float32, or cannot be had at all."""
    runtime, device, precision = choice
    if runtime == "onnxruntime" and precision != "float32":
        raise ModelError(path, f"an ONNX network has its own precision: use 'float32', not {precision!r}")
    has_float16 = _library(runtime) == "torch" and choice.on_gpu
    if precision == "float16" and not has_float16:
        instead = "bfloat16" if _has_bfloat16(choice) else "float32"
        raise ModelError(
            path, f"float16 needs torch on a CUDA device, not {runtime} on {device}: use precision {instead!r}"
        )
    if precision == "bfloat16" and not _has_bfloat16(choice):
        where = f"device {device!r}" if choice.on_gpu else "this processor"
        instead = "'float16' or 'float32'" if has_float16 else "'float32'"
        raise ModelError(path, f"{where} has no bfloat16 arithmetic: use precision {instead}")


def _has_bfloat16(choice: Choice) -> bool:
    """Whether the device calculates in bfloat16 with this runtime."""
    if choice.runtime == "onnxruntime":
        return False
    if choice.runtime == "openvino":
        from s2seg.models.runtimes.openvino import has_bfloat16

        return has_bfloat16()
    if not choice.on_gpu:
        from s2seg.models.runtimes.processor import has_bfloat16 as processor_has_bfloat16

        return processor_has_bfloat16()
    from s2seg.models.runtimes.pytorch import has_bfloat16 as gpu_has_bfloat16

    return gpu_has_bfloat16(choice.device)
