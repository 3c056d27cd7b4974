"""The onnxruntime runtime: foreign networks, with any batch and any window or a fixed one."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Set
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as state

from s2seg.errors import ModelError, S2SegWarning
from s2seg.models.bundle import ModelBundle, cache_folder
from s2seg.models.runtimes.answers import argmax, softmax, summarize, trim
from s2seg.models.runtimes.batching import batch_for_caches
from s2seg.models.runtimes.drivers import may_have_gpu
from s2seg.models.runtimes.threads import threads_of_process

# onnxruntime's errors have no common base of their own
ERRORS: tuple[type[Exception], ...] = tuple(
    error for error in vars(state).values() if isinstance(error, type) and issubclass(error, Exception)
)

_PROVIDERS = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
_UNKNOWN = "its driver or one of its libraries is missing, or of another version"

# an ONNX file whose network is one Identity, from x to y
_NOTHING = (
    b'\x08\x08:+\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\t\n\x01x\x12\x04\n\x02\x08\x01'
    b"b\t\n\x01y\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\x11"
)


def choose_device(path: str, device: str) -> str:
    """Settle ``auto``, and refuse what this onnxruntime lacks; ``path`` is what an error calls the model.

    The list of providers tells what onnxruntime was built with, not what the machine has.
    """
    available = onnxruntime.get_available_providers()
    if device == "auto":
        return "cuda" if _PROVIDERS["cuda"] in available and may_have_gpu() and _cuda_starts() else "cpu"
    kind = device.partition(":")[0]
    if kind in _PROVIDERS and _PROVIDERS[kind] not in available:
        has = {"cuda": "CUDA", "tensorrt": "TensorRT"}[kind]
        raise ModelError(path, f"this onnxruntime has no {has}: pip install onnxruntime-gpu, or use device 'cpu'")
    return device


@cache
def _cuda_starts() -> bool:
    """Whether CUDA takes a network that does nothing; warns, once, where it does not."""
    try:
        start("", _NOTHING, "cuda")
    except ModelError as error:
        warnings.warn(f"the GPU is left out: {error.reason}", S2SegWarning, stacklevel=3)
        return False
    return True


@cache
def _preload() -> str:
    """Load CUDA's libraries from where pip puts them, which opening a network does not; return what is missing."""
    said = io.StringIO()
    if hasattr(onnxruntime, "preload_dlls"):
        with redirect_stdout(said):
            onnxruntime.preload_dlls()
    return textwrap.shorten(said.getvalue().strip().partition("\n")[0], 400)


def providers(device: str) -> list[tuple[str, dict[str, str]]]:
    """Return what runs a network on a device, best first: each takes the operators that those before it lack.

    TensorRT comes before CUDA only where it is the device: it is prepared for minutes for each window shape, which
    pays for a large area alone. What it prepared is kept under ``S2SEG_CACHE``.
    """
    kind, _, number = device.partition(":")
    numbered = {"device_id": number or "0"}
    found: list[tuple[str, dict[str, str]]] = [("CPUExecutionProvider", {})]
    if kind in _PROVIDERS:
        found.insert(0, (_PROVIDERS["cuda"], numbered | {"use_tf32": "0"}))  # float32 keeps all its digits
    if kind == "tensorrt":
        kept = {"trt_engine_cache_enable": "True", "trt_engine_cache_path": str(cache_folder("tensorrt"))}
        found.insert(0, (_PROVIDERS["tensorrt"], numbered | kept))
    return found


def start(path: str, network: Path | bytes, device: str = "cpu") -> onnxruntime.InferenceSession:
    """Open a network, a file or its bytes, on a device; ``path`` is what an error calls it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised; its warnings are about how the graph was exported
    options.intra_op_num_threads = threads_of_process() or 0  # zero: as many as it finds cores
    wanted = providers(device)
    missing = _preload() if device != "cpu" else ""
    source = network if isinstance(network, bytes) else str(network)
    try:
        # its fallback prints, and runs on the CPU what is called a GPU's
        session = onnxruntime.InferenceSession(source, options, providers=wanted, enable_fallback=0)
    except ERRORS as error:
        if "external data" in str(error).lower():
            raise ModelError(
                path, "keeps its weights in other files: export it as one (torch.onnx.export(external_data=False))"
            ) from error
        raise ModelError(path, f"onnxruntime cannot open the network: {one_line(error)}") from error
    except (RuntimeError, ValueError) as error:  # what a provider says of itself
        if device == "cpu":
            raise
        raise _not_started(path, device, one_line(error)) from error
    if session.get_providers()[0] != wanted[0][0]:  # it goes on without a provider that does not start
        raise _not_started(path, device, missing or _UNKNOWN)
    return session


def _not_started(path: str, device: str, cause: str) -> ModelError:
    return ModelError(path, f"onnxruntime cannot use device {device!r} ({cause}): use device 'cpu'")


def one_line(error: Exception) -> str:
    """Return an error's text as one line that fits a screen."""
    return textwrap.shorten(str(error), 400)


class OnnxSession:
    """An ONNX network behind the same face as torch's.

    Parameters
    ----------
    bundle
        One with ``model.onnx``.
    device
        ``cpu``, ``cuda``, ``cuda:1``, ``tensorrt`` or ``tensorrt:1``.
    precision
        ``float32``: an ONNX file carries its own precision.
    """

    def __init__(self, bundle: ModelBundle, device: str, precision: str) -> None:
        self.name = f"onnxruntime {device} {precision}"
        self.parallel = 1 if device == "cpu" else 2  # this machine's processors scale one batch while the GPU runs one
        self._path, self._activation = bundle.path, bundle.spec.activation
        self._session = start(bundle.path, bundle.weights_path, device)
        inputs = self._session.get_inputs()[0]
        self._input, self._output = inputs.name, self._session.get_outputs()[0].name
        self._batch = inputs.shape[0] if isinstance(inputs.shape[0], int) else None
        self._window = bundle.spec.window
        self._a, self._b = (values[:, None, None] for values in bundle.spec.affine())
        self._codes = bundle.spec.legend.channel_to_code()

    def batch(self, height: int, width: int) -> int:
        """See :class:`s2seg.models.runtimes.Session`; on a GPU as on a CPU, and not measured."""
        return self._batch or batch_for_caches(height, width)

    def classify(
        self, windows: npt.NDArray[np.uint16], crop: int, layers: Set[str]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """See :class:`s2seg.models.runtimes.Session`."""
        scores = trim(self._scores(windows), crop)
        if layers == {"class"}:
            channel, best = argmax(scores)  # the same with or without softmax
            self._refuse_nan(best)
            return {"class": self._codes[channel]}
        return summarize(self._normalize(scores), self._codes, layers)

    def probabilities(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """See :class:`s2seg.models.runtimes.Session`."""
        return self._normalize(self._scores(windows))

    def _normalize(self, scores: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        self._refuse_nan(scores)
        return softmax(scores) if self._activation == "logits" else scores

    def _scores(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """Run the network on stored numbers; return (n, class, y, x) float32."""
        if self._window is not None and windows.shape[-2:] != (self._window, self._window):
            height, width = windows.shape[-2:]
            raise ModelError(self._path, f"takes windows of {self._window} px only, not {height} x {width}")
        x = windows.astype(np.float32)
        x *= self._a
        x += self._b
        n = len(x)
        size = self._batch or n
        answers = [self._run(x[i : i + size], size)[: n - i] for i in range(0, n, size)]
        return answers[0] if len(answers) == 1 else np.concatenate(answers)

    def _run(self, x: npt.NDArray[np.float32], size: int) -> npt.NDArray[np.float32]:
        if len(x) < size:  # a network with a fixed batch takes no smaller one: the rest is thrown away
            x = np.concatenate([x, np.zeros((size - len(x), *x.shape[1:]), np.float32)])
        try:
            scores: npt.NDArray[np.float32] = self._session.run([self._output], {self._input: x})[0]
        except ERRORS as error:
            raise ModelError(self._path, f"onnxruntime failed on {x.shape}: {one_line(error)}") from error
        expected = (len(x), len(self._codes), *x.shape[-2:])
        if scores.shape != expected:
            raise ModelError(
                self._path, f"answers {scores.shape} to {x.shape}, not {expected}: another network's legend or window?"
            )
        return scores

    def _refuse_nan(self, scores: npt.NDArray[np.float32]) -> None:
        if np.isnan(scores.max()):
            raise ModelError(self._path, "the network answers with NaN: its weights or scaling are broken")
