"""Open a session: one per process and model, of the runtime that is asked for or fits best."""

from __future__ import annotations

import threading
import warnings
from dataclasses import dataclass

from s2seg.errors import ModelError, S2SegWarning
from s2seg.models.bundle import ModelBundle, load_model
from s2seg.models.runtimes.choosing import COMPILED, Choice, check_installed, first_choice, own_runtime, settle
from s2seg.models.runtimes.session import Session
from s2seg.models.runtimes.threads import set_torch_threads


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
        When ``auto`` wanted OpenVINO and had to fall back on another runtime, or a GPU on which onnxruntime does not
        start: says why.

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
    with _lock:
        request = (bundle.sha256, runtime, device, precision)
        if request not in _by_request:
            _by_request[request] = _choose(bundle, runtime, device, precision)
        return _by_request[request]


_lock = threading.RLock()

_sessions: dict[tuple[str, Choice], Session] = {}
"""Sessions by digest and choice: requests that come to the same share one."""

_by_request: dict[tuple[str, str, str, str], tuple[Session, str]] = {}
"""What was chosen for a digest and a request, and why, so that nothing is tried or warned of twice."""

_by_ref: dict[SessionRef, Session] = {}
"""Sessions of tasks, which shall not read the bundle for every block."""


def _choose(bundle: ModelBundle, runtime: str, device: str, precision: str) -> tuple[Session, str]:
    choice, why = first_choice(bundle, runtime, device, precision)
    if runtime != "auto" or choice.runtime != "openvino":
        return _open(bundle, choice), why
    from s2seg.models.conversion import ConversionError

    try:
        return _open(bundle, choice), why
    except ConversionError as error:
        why = f"OpenVINO does not run it: {error.reason}"
    choice = settle(bundle, Choice(own_runtime(bundle), "cpu", precision))
    warnings.warn(f"model {bundle.path}: runs on {choice.runtime}, as {why}", S2SegWarning, stacklevel=4)
    return _open(bundle, choice), why


def _open(bundle: ModelBundle, choice: Choice) -> Session:
    """Return the one session of this choice."""
    check_installed(bundle, choice.runtime)
    key = bundle.sha256, choice
    if key not in _sessions:
        _sessions[key] = _make(bundle, choice)
    return _sessions[key]


def _make(bundle: ModelBundle, choice: Choice) -> Session:
    runtime, device, precision = choice
    if runtime in ("torch", COMPILED):
        set_torch_threads()
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
