"""The OpenVINO runtime: the fastest on a CPU, for torch's networks (converted once, then kept) and for ONNX files.

Everything between the stored numbers and the bytes of a map happens inside the compiled network: scaling, the choice
of the class, softmax and rounding where a probability is asked for, and the cut of the border.

A network is compiled for one shape at a time, which needs about half the memory of one that takes any. Windows of a
batch run one after the other: a window of 512 px and more is work enough for every core.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
import threading
from collections.abc import Set
from functools import cache, reduce
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino
from openvino import opset13 as ops

from s2seg.allocator import keep_freed_memory
from s2seg.errors import ModelError
from s2seg.models.bundle import ModelBundle, cache_folder
from s2seg.models.conversion import ConversionError, missing_extra
from s2seg.models.export import write_openvino
from s2seg.models.runtimes.answers import CONFIDENCE_STEPS, PROBABILITY_STEPS
from s2seg.models.runtimes.batching import batch_for_caches
from s2seg.models.runtimes.seams import warn_of_seams
from s2seg.models.runtimes.threads import threads_of_process

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}
_SHAPES = 2
"""Compiled networks that a session keeps: all windows of a map have one shape; another map may be made beside it."""


def has_bfloat16() -> bool:
    """Whether this processor calculates in bfloat16 (AMX, or AVX-512's BF16)."""
    return "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


class OpenVinoSession:
    """A network compiled for this CPU: uint16 goes in, uint8 comes out.

    Parameters
    ----------
    bundle
        With safetensors weights or ``model.onnx``.
    device
        ``cpu``.
    precision
        ``float32``, or ``bfloat16`` where the processor has it.

    Raises
    ------
    ConversionError
        When OpenVINO cannot convert the network; torch can still run it.
    """

    def __init__(self, bundle: ModelBundle, device: str, precision: str) -> None:
        keep_freed_memory()
        self.name = f"openvino {device} {precision}"
        self._path, self._activation = bundle.path, bundle.spec.activation
        self._codes = bundle.spec.legend.channel_to_code()
        self._window = bundle.spec.window
        self._bundle = bundle
        self._files: dict[int, Path] = {}
        self._scaling = bundle.spec.affine() if bundle.is_onnx else None  # what was converted scales by itself
        self._options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[precision],
            "ENABLE_CPU_PINNING": False,  # two processes would pin their threads to the same cores
        }
        if threads := threads_of_process():
            self._options["INFERENCE_NUM_THREADS"] = threads
        # what cannot be converted shall be told now
        self._batch = self._fixed_batch(self._file(0 if bundle.spec.blends else bundle.spec.depth))
        if bundle.is_onnx:
            self._check_foreign()
        self._compiled: dict[_Key, Any] = {}
        self._lock = threading.Lock()

    @property
    def parallel(self) -> int:
        """See :class:`s2seg.models.runtimes.Session`."""
        return 1

    def batch(self, height: int, width: int) -> int:
        """See :class:`s2seg.models.runtimes.Session`."""
        return max(self._batch, batch_for_caches(height, width))

    def classify(
        self, windows: npt.NDArray[np.uint16], crop: int, layers: Set[str]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """See :class:`s2seg.models.runtimes.Session`."""
        return self._run(windows, crop, frozenset(layers))

    def probabilities(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """See :class:`s2seg.models.runtimes.Session`."""
        probabilities: npt.NDArray[np.float32] = self._run(windows, 0, frozenset({_FLOAT}))[_FLOAT]
        return probabilities

    def _run(self, windows: npt.NDArray[np.uint16], crop: int, outputs: frozenset[str]) -> dict[str, npt.NDArray[Any]]:
        height, width = windows.shape[-2:]
        if self._window is not None and (height, width) != (self._window, self._window):
            raise ModelError(self._path, f"takes windows of {self._window} px only, not {height} x {width}")
        parts = [self._infer(windows[i : i + self._batch], crop, outputs) for i in range(0, len(windows), self._batch)]
        return {
            name: parts[0][name] if len(parts) == 1 else np.concatenate([part[name] for part in parts])
            for name in outputs
        }

    def _infer(self, windows: npt.NDArray[np.uint16], crop: int, outputs: frozenset[str]) -> dict[str, Any]:
        n = len(windows)
        x = np.require(windows, np.uint16, "C")
        if n < self._batch:  # a network with a fixed batch takes no smaller one: the rest is thrown away
            x = np.concatenate([x, np.zeros((self._batch - n, *x.shape[1:]), np.uint16)])
        try:
            with self._lock:  # a request holds one answer at a time, and uses every core by itself
                request = self._request((x.shape, crop, outputs))
                results = request.infer([x], share_inputs=True)
        except RuntimeError as error:
            raise ModelError(self._path, f"OpenVINO failed on {x.shape}: {one_line(error)}") from error
        answer = {name: results[name] for name in (*outputs, _CHECK)}
        if np.isnan(answer.pop(_CHECK)):
            raise ModelError(self._path, "the network answers with NaN: its weights or scaling are broken")
        return {name: values[:n] for name, values in answer.items()}

    def _file(self, crop: int) -> Path:
        """The network for answers without this border, which it need not compute."""
        margin = crop if crop % self._bundle.spec.stride == 0 else 0
        if margin not in self._files:
            bundle = self._bundle
            self._files[margin] = bundle.weights_path if bundle.is_onnx else _converted(bundle, margin)
        return self._files[margin]

    def _request(self, key: _Key) -> Any:
        """Return the compiled network's request, the most recently used ones being kept."""
        request = self._compiled.pop(key, None)
        if request is None:
            while len(self._compiled) >= _SHAPES:
                del self._compiled[next(iter(self._compiled))]
            request = _core().compile_model(self._graph(*key), "CPU", self._options).create_infer_request()
        self._compiled[key] = request
        return request

    def _graph(self, shape: tuple[int, ...], crop: int, outputs: frozenset[str]) -> openvino.Model:
        """Wrap the network: uint16 of one shape goes in, what is asked for comes out, by name."""
        network = _core().read_model(str(self._file(crop)))
        network.reshape(list(shape))
        numbers = ops.parameter(list(shape), np.uint16)
        x = ops.convert(numbers, "f32")
        if self._scaling is not None:
            a, b = (values[:, None, None] for values in self._scaling)
            x = ops.add(ops.multiply(x, ops.constant(a)), ops.constant(b))
        network.get_parameters()[0].output(0).replace(x.output(0))
        scores = network.get_results()[0].input(0).get_source_output()
        made = _answers(scores, self._activation, outputs, self._codes)
        # the border is cut from bytes: from scores it would be a copy of four times as many, for every class
        kept = shape[-2] - 2 * crop, shape[-1] - 2 * crop
        trimmed = {name: _middle(values, kept) if name != _CHECK else values for name, values in made.items()}
        results = [_named(ops.result(trimmed[name]), name) for name in (*sorted(outputs), _CHECK)]
        return openvino.Model(results, [numbers], "s2seg")

    def _fixed_batch(self, file: Path) -> int:
        """Windows in one run: the network's own number, or one."""
        try:
            batch = _core().read_model(str(file)).input(0).partial_shape[0]
        except RuntimeError as error:
            raise ConversionError(
                self._path, f"OpenVINO cannot open the network: {one_line(error)}; use another runtime"
            ) from error
        return 1 if batch.is_dynamic else int(batch.get_length())

    def _check_foreign(self) -> None:
        """Refuse a network that lets itself be opened, but not be given a shape."""
        spec = self._bundle.spec
        side = spec.window or 2 * spec.stride
        try:
            self._graph((self._batch, len(spec.bands), side, side), 0, frozenset({"class"}))
        except RuntimeError as error:
            raise ConversionError(
                self._path, f"OpenVINO cannot shape the network: {one_line(error)}; use runtime 'onnxruntime'"
            ) from error


_Key = tuple[tuple[int, ...], int, frozenset[str]]
_FLOAT, _CHECK = "float", "check"


def one_line(error: Exception | str) -> str:
    """Return the last line of an OpenVINO error, which says what happened; those before say where in its source."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip()[:400] if lines else type(error).__name__


@cache
def _core() -> Any:
    return openvino.Core()


def _middle(values: Any, shape: tuple[int, int]) -> Any:
    """Cut (..., y, x) to a height and a width, evenly on all sides."""
    have = [values.get_output_partial_shape(0)[axis].get_length() for axis in (-2, -1)]
    cut = [(size - wanted) // 2 for size, wanted in zip(have, shape, strict=True)]
    if not any(cut):
        return values
    stop = _whole(*(size - pixels for size, pixels in zip(have, cut, strict=True)))
    return ops.slice(values, _whole(*cut), stop, _whole(1, 1), _whole(-2, -1))


def _answers(scores: Any, activation: str, outputs: frozenset[str], codes: npt.NDArray[np.uint8]) -> dict[str, Any]:
    """Graph outputs by name, only those asked for, and one number that is NaN if any score is."""
    channels = _channels(scores)
    made = {_CHECK: ops.reduce_sum(reduce(ops.add, channels), _whole(0, 1, 2, 3))}
    if "class" in outputs:
        made["class"] = ops.squeeze(ops.convert(_code_of_highest(channels, codes), "u8"), _whole(1))
    if outputs == {"class"}:
        return made
    probabilities = ops.softmax(scores, 1) if activation == "logits" else scores
    if "confidence" in outputs:
        made["confidence"] = _quantize(ops.reduce_max(probabilities, _whole(1)), CONFIDENCE_STEPS)
    if "probability" in outputs:
        made["probability"] = _quantize(probabilities, PROBABILITY_STEPS)
    if _FLOAT in outputs:
        made[_FLOAT] = probabilities
    return made


def _channels(scores: Any) -> list[Any]:
    """Cut (n, class, y, x) into classes, (n, 1, y, x) each.

    Reshaped first: OpenVINO puts one class after the other then, where it would pick each from among the others
    (in float32 that took a sixteenth of all its time).
    """
    n, count, height, width = (size.get_length() for size in scores.get_partial_shape())
    planes = ops.split(ops.reshape(scores, _whole(n, count, height * width), False), ops.constant(np.int64(1)), count)
    return [ops.reshape(plane, _whole(n, 1, height, width), False) for plane in planes.outputs()]


def _code_of_highest(channels: list[Any], codes: npt.NDArray[np.uint8]) -> Any:
    """Code of the first channel that none exceeds: OpenVINO's TopK, which sorts, takes four times as long."""
    values = [ops.constant(np.float32(code)) for code in codes]
    best, chosen = channels[0], values[0]
    for channel, value in zip(channels[1:], values[1:], strict=True):
        chosen = ops.select(ops.greater(channel, best), value, chosen)
        best = ops.maximum(channel, best)
    return chosen


def _quantize(values: Any, steps: int) -> Any:
    scaled = ops.round(ops.multiply(values, ops.constant(np.float32(steps))), "half_to_even")
    return ops.convert(ops.clamp(scaled, 0.0, float(steps)), "u8")


def _whole(*values: int) -> Any:
    return ops.constant(np.array(values, np.int64))


def _named(result: Any, name: str) -> Any:
    result.output(0).get_tensor().set_names({name})
    return result


def _converted(bundle: ModelBundle, margin: int) -> Path:
    """Return the network as OpenVINO reads it, converted on first use: then torch need not be loaded again.

    It lies under ``S2SEG_CACHE`` (default: the user's cache folder), named by digest, OpenVINO's version, ours and the
    margin that it may leave out.
    """
    name = f"{bundle.sha256[:32]}-{importlib.metadata.version('openvino')}-{_FORM}-{margin}"
    folder = cache_folder("openvino") / name
    if (folder / _FILE).is_file():
        _warn_of_seams(bundle, folder / _FILE)
        return folder / _FILE
    if extra := missing_extra("openvino"):
        raise ModelError(
            bundle.path, f"runs on OpenVINO once torch has converted it, which is missing: pip install 's2seg[{extra}]'"
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            _convert(bundle, new / _FILE, margin)
            _move(new, folder)
    except OSError as error:
        raise ConversionError(
            bundle.path, f"the converted network cannot be kept in {folder.parent} ({error.strerror}): set S2SEG_CACHE"
        ) from error
    return folder / _FILE


_FILE = "network.xml"
_FORM = 4  # of what lies there: the next number makes all of it anew

_CONVERT = """
import sys
from pathlib import Path
from s2seg.errors import ModelError
from s2seg.models.bundle import load_model
from s2seg.models.export import write_openvino
try:
    write_openvino(load_model(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
except ModelError as error:
    sys.exit(error.reason)
"""


def _convert(bundle: ModelBundle, file: Path, margin: int) -> None:
    """Write the converted network; where torch is not loaded yet, in a process that takes its memory away with it."""
    if "torch" in sys.modules:
        write_openvino(bundle, file, margin)
        return
    command = [sys.executable, "-W", "ignore", "-c", _CONVERT, bundle.path, str(file), str(margin)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConversionError(bundle.path, one_line(done.stderr or "its conversion died without a word"))
    _warn_of_seams(bundle, file)


def _move(new: Path, folder: Path) -> None:
    try:
        new.rename(folder)
    except OSError:
        if not (folder / _FILE).is_file():  # else another process was faster with the same model
            raise


def _warn_of_seams(bundle: ModelBundle, file: Path) -> None:
    """Repeat what torch said of the network when it was converted."""
    facts = _core().read_model(str(file))
    if not bundle.spec.global_context and facts.get_rt_info(["s2seg", "pools_globally"]).astype(str) == "True":
        warn_of_seams(bundle.path)
