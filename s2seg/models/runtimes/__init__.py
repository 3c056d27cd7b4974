"""Run a model: one Protocol, with torch and onnxruntime behind it, and one session per process for each model."""

from __future__ import annotations

import importlib.util
import re
import threading
from collections.abc import Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from s2seg.errors import ModelError
from s2seg.models.bundle import ModelBundle, load_model
from s2seg.models.runtimes.answers import LAYERS, summarize

__all__ = [
    "LAYERS",
    "Session",
    "SessionRef",
    "available_runtimes",
    "open_session",
    "summarize",
]

_MODULES = {"torch": ("torch", "segmentation_models_pytorch"), "onnxruntime": ("onnxruntime",)}
_EXTRAS = {"torch": "pip install 's2seg[torch]'", "onnxruntime": "pip install onnxruntime"}


class Session(Protocol):
    """A network ready to run; safe to call from several threads."""

    @property
    def name(self) -> str:
        """Runtime, device and precision, such as ``torch cpu float32``."""

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
        ``torch``, ``onnxruntime`` or ``auto``: onnxruntime for an ONNX bundle, torch for the others.
    device
        ``cpu``, ``cuda``, ``cuda:1`` or ``auto``: the first CUDA device that the runtime sees, else the CPU.
    precision
        ``float32``, also for ``auto``, so that a map does not depend on the machine; or ``bfloat16`` (torch), about
        2.7 times as fast on a CPU with AMX, where about one pixel in a thousand gets another class.

    Raises
    ------
    ModelError
        When the runtime is unknown, not installed (with the command that installs it) or cannot run this bundle,
        or when the device or precision is not to be had.
    """
    runtime = _choose_runtime(bundle, runtime)
    if precision not in ("auto", "float32", "bfloat16"):
        raise ModelError(bundle.path, f"unknown precision {precision!r}: float32 or bfloat16")
    precision = "float32" if precision == "auto" else precision
    with _lock:
        device = _choose_device(bundle, runtime, device)
        key = (bundle.sha256, runtime, device, precision)
        if key not in _sessions:
            _sessions[key] = _make(bundle, runtime, device, precision)
        return _sessions[key]


def available_runtimes() -> tuple[str, ...]:
    """Names of the runtimes that are installed; none of them is imported to find out."""
    return tuple(name for name in _MODULES if _installed(name))


_lock = threading.RLock()
_sessions: dict[tuple[str, str, str, str], Session] = {}
_by_ref: dict[SessionRef, Session] = {}


def _installed(runtime: str) -> bool:
    return all(importlib.util.find_spec(module) for module in _MODULES[runtime])


def _choose_runtime(bundle: ModelBundle, runtime: str) -> str:
    needed: str = "onnxruntime" if bundle.is_onnx else "torch"
    if runtime not in ("auto", *_MODULES):
        raise ModelError(bundle.path, f"unknown runtime {runtime!r}: auto, {', '.join(_MODULES)}")
    if runtime not in ("auto", needed):
        raise ModelError(bundle.path, f"{bundle.spec.weights_file} does not run on {runtime}: use runtime {needed!r}")
    if not _installed(needed):
        raise ModelError(bundle.path, f"needs {needed}, which is not installed: {_EXTRAS[needed]}")
    return needed


def _choose_device(bundle: ModelBundle, runtime: str, device: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ModelError(bundle.path, f"unknown device {device!r}: auto, cpu, cuda or cuda:1")
    if runtime == "torch":
        from s2seg.models.runtimes.pytorch import choose_device
    else:
        from s2seg.models.runtimes.onnxrt import choose_device
    return choose_device(bundle.path, device)


def _make(bundle: ModelBundle, runtime: str, device: str, precision: str) -> Session:
    if runtime == "torch":
        from s2seg.models.runtimes.pytorch import TorchSession

        return TorchSession(bundle, device, precision)
    from s2seg.models.runtimes.onnxrt import OnnxSession

    return OnnxSession(bundle, device, precision)
