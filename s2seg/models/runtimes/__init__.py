"""Run a model: one Protocol, with torch, OpenVINO and onnxruntime behind it; one session per process and model."""

from __future__ import annotations

import importlib.util
import re
import sys
import threading
import warnings
from collections.abc import Set
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from s2seg.errors import ModelError, S2SegWarning
from s2seg.models.bundle import ModelBundle, load_model
from s2seg.models.runtimes.answers import LAYERS, summarize

__all__ = [
    "LAYERS",
    "Session",
    "SessionRef",
    "available_runtimes",
    "choose_session",
    "expected_session",
    "open_session",
    "summarize",
]

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

_GPU_DRIVERS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""What Linux shows where there is a driver for NVIDIA's or AMD's GPUs, or WSL's for either."""


class Session(Protocol):
    """A network ready to run; safe to call from several threads."""

    @property
    def name(self) -> str:
        """Runtime, device and precision, such as ``openvino cpu float32``."""

    @property
    def parallel(self) -> int:
        """How many threads gain by calling at once.

        One where a call uses the whole device; on a GPU two, since the numbers of one batch cross while another
        computes.
        """

    def batch(self, height: int, width: int) -> int:
        """Return how many windows of this size, in pixels, suit one call; every number of them is answered."""

    def classify(
        self, windows: npt.NDArray[np.uint16], crop: int, layers: Set[str]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """Map windows to what is stored.

        Parameters
        ----------
        windows
            Stored numbers (n, band, y, x) uint16, bands in the model's order, sides multiples of its stride.
        crop
            Pixels to drop on each side of the answer.
        layers
            What to return: ``class`` (n, y, x) legend codes; ``confidence`` (n, y, x), the highest probability,
            0 to 100; ``probability`` (n, class, y, x), 0 to 250.
        """

    def probabilities(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """Return (n, class, y, x) float32 that sums to 1 over the classes, for blending overlapping windows."""


@dataclass(frozen=True)
class SessionRef:
    """The way to a session, small enough to travel in a task graph: every process opens its own, once.

    Parameters
    ----------
    path, sha256
        The bundle, and the digest that it must still have.
    runtime, device, precision
        As in :func:`open_session`; ``auto`` is settled where the session opens.
    """

    path: str
    sha256: str
    runtime: str = "auto"
    device: str = "auto"
    precision: str = "auto"

    def open(self) -> Session:
        """Return this process's session.

        Raises
        ------
        ModelError
            When the bundle has gone or is another one now, or the runtime cannot run it here.
        """
        with _lock:
            if self not in _by_ref:
                bundle = load_model(self.path)
                if bundle.sha256 != self.sha256:
                    raise ModelError(self.path, "has changed since this run began: start the run again")
                _by_ref[self] = open_session(bundle, self.runtime, self.device, self.precision)
            return _by_ref[self]


def open_session(bundle: ModelBundle, runtime: str = "auto", device: str = "auto", precision: str = "auto") -> Session:
    """Return this process's session for a bundle, made on first use.

    Parameters
    ----------
    bundle
        From :func:`s2seg.load_model`.
    runtime
        ``torch``, ``torch-compiled``, ``openvino``, ``onnxruntime`` or ``auto``. ``auto`` takes OpenVINO on a CPU where
        it is installed and can convert the network; else, and on a GPU, onnxruntime for an ONNX bundle and torch for
        the others. ``torch-compiled`` needs a C++ compiler (on a GPU: Triton) and 5 to 15 s for each shape of window;
        then it is 1.8 times as fast as torch on a CPU with AMX in bfloat16, and 1.1 times in float32.
    device
        ``cpu``, ``cuda``, ``cuda:1`` or ``auto``: the first CUDA device that the runtime sees, else the CPU. For ONNX
        bundles also ``tensorrt`` or ``tensorrt:1``, never chosen by ``auto``: TensorRT takes minutes to prepare each
        window shape, once, and may round to TF32.
    precision
        ``float32``, ``bfloat16`` (torch and OpenVINO: 2.7 times as fast on a CPU with AMX, where about one pixel in a
        thousand gets another class), ``float16`` (torch on CUDA devices that lack bfloat16) or ``auto``: bfloat16 in
        OpenVINO and on a GPU where the processor has it, else float32. For the same map on every machine, say
        ``float32``.

    Warns
    -----
    S2SegWarning
        When ``auto`` wanted OpenVINO and had to fall back on another runtime: says why.

    Raises
    ------
    ModelError
        When the runtime is unknown, not installed (with the command that installs it) or cannot run this bundle,
        or when the device or precision is not to be had.
    """
    return choose_session(bundle, runtime, device, precision)[0]


def choose_session(
    bundle: ModelBundle, runtime: str = "auto", device: str = "auto", precision: str = "auto"
) -> tuple[Session, str]:
    """Do as :func:`open_session`; return the session, and why it is this one, for people and for the record."""
    _check_names(bundle.path, runtime, device, precision)
    with _lock:
        request = (bundle.sha256, runtime, device, precision)
        if request not in _by_request:
            _by_request[request] = _choose(bundle, runtime, device, precision)
        return _by_request[request]


def expected_session(
    bundle: ModelBundle, runtime: str = "auto", device: str = "auto", precision: str = "auto"
) -> tuple[str, str, str]:
    """Name the runtime, the device and the precision that :func:`open_session` tries first; nothing is opened."""
    _check_names(bundle.path, runtime, device, precision)
    runtime = runtime if runtime != "auto" else _first_choice(bundle, device)[0]
    _check_kind(bundle, runtime)
    if not _installed(runtime):
        return runtime, device, precision
    device, precision = _settle(bundle, runtime, device, precision)
    return runtime, device, precision


def available_runtimes() -> tuple[str, ...]:
    """Names of the runtimes that are installed; none of them is imported to find out.

    ``torch-compiled`` is not among them: whether there is a compiler shows when it is asked for.
    """
    return tuple(name for name in _MODULES if _installed(name))


_lock = threading.RLock()
_sessions: dict[tuple[str, str, str, str], Session] = {}
_by_request: dict[tuple[str, str, str, str], tuple[Session, str]] = {}
_by_ref: dict[SessionRef, Session] = {}


def _library(runtime: str) -> str:
    return "torch" if runtime == COMPILED else runtime


def _installed(runtime: str) -> bool:
    return all(importlib.util.find_spec(module) for module in _MODULES[_library(runtime)])


def _check_names(path: str, runtime: str, device: str, precision: str) -> None:
    if runtime not in ("auto", COMPILED, *_MODULES):
        raise ModelError(path, f"unknown runtime {runtime!r}: auto, {', '.join(_MODULES)}, {COMPILED}")
    if not re.fullmatch(r"auto|cpu|(cuda|tensorrt)(:\d+)?", device):
        raise ModelError(path, f"unknown device {device!r}: auto, cpu, cuda, cuda:1 or tensorrt")
    if precision not in ("auto", "float32", "bfloat16", "float16"):
        raise ModelError(path, f"unknown precision {precision!r}: float32, bfloat16 or float16")


def _choose(bundle: ModelBundle, runtime: str, device: str, precision: str) -> tuple[Session, str]:
    if device.startswith("tensorrt") and not bundle.is_onnx:
        raise ModelError(bundle.path, f"device {device!r} needs an ONNX network: `s2seg export` it, or use 'cuda'")
    if runtime != "auto":
        return _open(bundle, runtime, device, precision), "asked for"
    runtime, why = _first_choice(bundle, device)
    if runtime != "openvino":
        return _open(bundle, runtime, device, precision), why
    from s2seg.models.conversion import ConversionError

    try:
        return _open(bundle, "openvino", "cpu", precision), why
    except ConversionError as error:
        why = f"OpenVINO does not run it: {error.reason}"
    runtime = _own_runtime(bundle)
    warnings.warn(f"model {bundle.path}: runs on {runtime}, as {why}", S2SegWarning, stacklevel=4)
    return _open(bundle, runtime, "cpu", precision), why


def _own_runtime(bundle: ModelBundle) -> str:
    """The runtime that every network of this kind runs on, on any device."""
    return "onnxruntime" if bundle.is_onnx else "torch"


def _first_choice(bundle: ModelBundle, device: str) -> tuple[str, str]:
    """Which runtime ``auto`` tries, and why."""
    if device not in ("auto", "cpu"):
        return _own_runtime(bundle), "a GPU is asked for"
    if device == "auto" and _sees_gpu(bundle):
        return _own_runtime(bundle), "a GPU is there"
    if not _installed("openvino"):
        return _own_runtime(bundle), f"OpenVINO is not installed: {_EXTRAS['openvino']}"
    return "openvino", "the fastest on a CPU of those installed"


def _sees_gpu(bundle: ModelBundle) -> bool:
    """Whether the network's own runtime sees a GPU.

    Where no driver can be there the runtime is not loaded to find out: with torch that takes seconds.
    """
    if sys.platform == "darwin" or (sys.platform == "linux" and not any(Path(d).exists() for d in _GPU_DRIVERS)):
        return False
    runtime = _own_runtime(bundle)
    return _installed(runtime) and _choose_device(bundle, runtime, "auto") != "cpu"


def _open(bundle: ModelBundle, runtime: str, device: str, precision: str) -> Session:
    """Return the one session of these choices; device and precision can still be ``auto``."""
    _check_kind(bundle, runtime)
    if not _installed(runtime):
        library = _library(runtime)
        raise ModelError(bundle.path, f"needs {library}, which is not installed: {_EXTRAS[library]}")
    device, precision = _settle(bundle, runtime, device, precision)
    key = (bundle.sha256, runtime, device, precision)
    if key not in _sessions:
        _sessions[key] = _make(bundle, runtime, device, precision)
    return _sessions[key]


def _check_kind(bundle: ModelBundle, runtime: str) -> None:
    if _library(runtime) == "torch" and bundle.is_onnx:
        raise ModelError(bundle.path, "model.onnx does not run on torch: use runtime 'onnxruntime' or 'openvino'")
    if runtime == "onnxruntime" and not bundle.is_onnx:
        raise ModelError(
            bundle.path,
            "weights.safetensors do not run on onnxruntime: use runtime 'torch' or 'openvino', or `s2seg export` it",
        )


def _settle(bundle: ModelBundle, runtime: str, device: str, precision: str) -> tuple[str, str]:
    """Put a device and a precision in the place of ``auto``."""
    device = _choose_device(bundle, runtime, device)
    precision = _choose_precision(runtime, device, precision)
    if precision == "float16" and not (_library(runtime) == "torch" and device.startswith("cuda")):
        raise ModelError(
            bundle.path, f"float16 needs torch on a CUDA device, not {runtime} on {device}: use precision 'bfloat16'"
        )
    return device, precision


def _choose_device(bundle: ModelBundle, runtime: str, device: str) -> str:
    if runtime == "openvino":
        return "cpu" if device == "auto" else device
    if _library(runtime) == "torch":
        from s2seg.models.runtimes.pytorch import choose_device
    else:
        from s2seg.models.runtimes.onnxrt import choose_device
    return choose_device(bundle.path, device)


def _choose_precision(runtime: str, device: str, precision: str) -> str:
    if precision != "auto":
        return precision
    fast = False
    if runtime == "openvino":
        from s2seg.models.runtimes.openvino import has_bfloat16

        fast = has_bfloat16()
    elif _library(runtime) == "torch" and device != "cpu":
        from s2seg.models.runtimes.pytorch import has_bfloat16 as gpu_has_bfloat16

        fast = gpu_has_bfloat16(device)
    return "bfloat16" if fast else "float32"


def _make(bundle: ModelBundle, runtime: str, device: str, precision: str) -> Session:
    if runtime == "torch":
        from s2seg.models.runtimes.pytorch import TorchSession

        return TorchSession(bundle, device, precision)
    if runtime == COMPILED:
        from s2seg.models.runtimes.compiling import CompiledSession

        return CompiledSession(bundle, device, precision)
    if runtime == "openvino":
        from s2seg.models.runtimes.openvino import OpenVinoSession

        return OpenVinoSession(bundle, device, precision)
    from s2seg.models.runtimes.onnxrt import OnnxSession

    return OnnxSession(bundle, device, precision)
