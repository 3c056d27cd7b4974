"""The torch runtime: CPU and CUDA, float32, and bfloat16 or float16 by autocast."""

from __future__ import annotations

import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Set
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from s2seg.allocator import keep_freed_memory
from s2seg.errors import ModelError
from s2seg.models.bundle import ModelBundle
from s2seg.models.runtimes.answers import CONFIDENCE_STEPS, PROBABILITY_STEPS
from s2seg.models.runtimes.batching import MeasuredBatches, batch_for_caches
from s2seg.models.runtimes.lanes import lanes_for
from s2seg.models.runtimes.seams import warn_of_seams
from s2seg.models.runtimes.trimming import middle, trim_decoder
from s2seg.models.runtimes.tuning import fold_batch_norm, merge_upsampling, trial_side
from s2seg.models.unet import build_network, pools_globally

T = TypeVar("T")
_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT, _CHECK = "float", "check"
_BROKEN = "the network answers with NaN or infinity: its weights or scaling are broken"
_NARROW = ", or its numbers are too large for float16: use precision 'bfloat16'"
_NO_MEMORY = re.compile(r"out of memory|_ALLOC_FAILED|can't allocate memory", re.IGNORECASE)
"""How CUDA, its libraries and a processor's allocator say what torch's own allocator for GPUs says by its type."""

_REPEATS = 3
_LISTED = 3  # names of layers in an error: enough to see the pattern


def choose_device(path: str, device: str) -> str:
    """Settle ``auto``, and refuse a device that torch does not see; ``path`` is what an error calls the model."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    kind, _, number = device.partition(":")
    if kind == "cuda" and int(number or 0) >= count:
        raise ModelError(path, f"torch sees no device {device!r} here: use device 'cpu'")
    if kind not in ("cpu", "cuda"):
        raise ModelError(path, f"torch runs on 'cpu' and 'cuda', not on {device!r}")
    return device


def has_bfloat16(device: str) -> bool:
    """Whether this GPU calculates in bfloat16, and does not only imitate it."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(False))


def load_network(bundle: ModelBundle) -> torch.nn.Module:
    """Build a bundle's network with its weights, on the CPU, in evaluation mode.

    Raises
    ------
    ModelError
        When the weights do not fit, the stride is another, or the network does not take the windows it is tried on.
    """
    network, side = _load_weights(build_network(bundle.spec), bundle).eval(), trial_side(bundle.spec)
    stride = getattr(getattr(network, "encoder", None), "output_stride", 1)
    if bundle.spec.stride % stride:
        raise ModelError(bundle.path, f"the network's stride is {stride}, not {bundle.spec.stride}: save the bundle so")
    try:
        with torch.no_grad():
            network(torch.zeros(1, len(bundle.spec.bands), side, side))
    except (RuntimeError, ValueError, AssertionError) as error:  # how libraries put that a size does not suit them
        reason = " ".join(str(error).split())
        raise ModelError(
            bundle.path,
            f"the network takes no windows of {side} px ({reason}): save the bundle with the window that it takes",
        ) from error
    return network


class TorchSession:
    """A network on a device: uint16 goes in, uint8 comes out, everything between happens there.

    Parameters
    ----------
    bundle
        One with safetensors weights.
    device
        ``cpu``, ``cuda`` or ``cuda:1``.
    precision
        ``float32``, ``bfloat16``, or on CUDA ``float16``. With ``float32`` on CUDA, cuDNN's TF32, which keeps ten bits,
        is turned off for the whole process.
    """

    _runtime = "torch"

    def __init__(self, bundle: ModelBundle, device: str, precision: str) -> None:
        self.name = f"{self._runtime} {device} {precision}"
        self._path, self._activation, self._stride = bundle.path, bundle.spec.activation, bundle.spec.stride
        self._bands = len(bundle.spec.bands)
        self._device = torch.device(device)
        self._autocast = _AUTOCAST[precision]
        self._prepare(precision)
        network, side = load_network(bundle), trial_side(bundle.spec)
        if not bundle.spec.global_context and pools_globally(network, self._bands, side):
            warn_of_seams(bundle.path)
        # folded on the CPU: what TF32 drops on a GPU would look like a difference
        network = fold_batch_norm(network, self._bands, side)
        if self._device.type == "cpu":  # nobody has measured yet what it does for a GPU
            network = merge_upsampling(network, self._bands, side)
        self._blends = bundle.spec.blends
        self._depth = 0 if self._blends else bundle.spec.depth  # what is cut from an answer
        # channels last: measured 1.2 times (float32) and 2.2 times (bfloat16) as fast on a CPU, and cuDNN's choice too
        self._network, self._trimmed = (
            network.to(self._device).to(memory_format=torch.channels_last)
            for network in (network, trim_decoder(network, self._bands, self._depth))
        )
        a, b = bundle.spec.affine()
        self._a = torch.from_numpy(a[:, None, None]).to(self._device)
        self._b = torch.from_numpy(b[:, None, None]).to(self._device)
        self._codes = torch.from_numpy(bundle.spec.legend.channel_to_code()).to(self._device)
        self._lanes = lanes_for(self._device)
        self._most_pixels = sys.maxsize
        self._batches: Callable[[int, int], int] = batch_for_caches
        if self._device.type == "cuda":
            card = torch.cuda.get_device_name(self._device)
            conditions = f"{card}, {self._runtime} {torch.__version__}, {precision}"
            self._batches = MeasuredBatches(bundle.sha256, conditions, self._seconds)

    def _prepare(self, precision: str) -> None:
        """Set up what is the process's or the device's, and refuse a precision that the device lacks."""
        if self._device.type == "cpu":
            keep_freed_memory()
        elif precision == "bfloat16" and not has_bfloat16(str(self._device)):
            raise ModelError(self._path, f"device {self._device} has no bfloat16 arithmetic: use precision 'float16'")
        elif precision == "float32":
            # not around each call: other threads would see it change under them
            torch.backends.cudnn.allow_tf32 = False

    @property
    def parallel(self) -> int:
        """See :class:`s2seg.models.runtimes.Session`."""
        return self._lanes.count

    def batch(self, height: int, width: int) -> int:
        """See :class:`s2seg.models.runtimes.Session`."""
        return min(self._batches(height, width), self._room(height, width))

    def classify(
        self, windows: npt.NDArray[np.uint16], crop: int, layers: Set[str]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """See :class:`s2seg.models.runtimes.Session`."""
        parts = self._in_batches(windows, lambda batch: self._classify(batch, crop, layers))
        return parts[0] if len(parts) == 1 else {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def probabilities(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """See :class:`s2seg.models.runtimes.Session`."""
        parts = self._in_batches(windows, self._probabilities)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _in_batches(self, windows: npt.NDArray[np.uint16], answer: Callable[[npt.NDArray[np.uint16]], T]) -> list[T]:
        """Answer as many windows at a time as the device has memory for; what it lacked once is not tried again."""
        height, width = windows.shape[-2:]
        parts: list[T] = []
        done = 0
        while done < len(windows):
            batch = windows[done : done + self._room(height, width)]
            alone = self._lanes.count == 1
            try:
                parts.append(answer(batch))
            except RuntimeError as error:
                if not _lacks_memory(error):
                    raise
                traceback.clear_frames(error.__traceback__)  # they hold what was computed until then
                if not alone:
                    self._lanes.narrow()
                elif len(batch) == 1:
                    raise self._too_large(batch) from error
                else:
                    self._most_pixels = min(self._most_pixels, len(batch) // 2 * height * width)
            else:
                done += len(batch)
        return parts

    def _room(self, height: int, width: int) -> int:
        """Windows of this size that fit, as far as is known."""
        return max(1, self._most_pixels // (height * width))

    def _seconds(self, count: int, height: int, width: int) -> float | None:
        """Median time of so many windows, numbers in, classes out; None where the device has no memory for them."""
        # not zeros: a GPU that multiplies nothing but zeros stays cool, and clocks higher
        noise = np.random.default_rng(0).integers(1, 5000, (count, self._bands, height, width), np.uint16)
        seconds = []
        try:
            for _ in range(1 + _REPEATS):
                start = time.perf_counter()
                self._run_as_a_map_does(noise)
                seconds.append(time.perf_counter() - start)
        except RuntimeError as error:
            if not _lacks_memory(error):
                raise
            return None
        return statistics.median(seconds[1:])  # the first prepares what the others use

    def _run_as_a_map_does(self, windows: npt.NDArray[np.uint16]) -> None:
        if self._blends:
            self._probabilities(windows)
        else:
            self._classify(windows, self._depth if min(windows.shape[-2:]) > 2 * self._depth else 0, {"class"})

    def _too_large(self, window: npt.NDArray[np.uint16]) -> ModelError:
        """Find by trial what would fit, for an error that helps."""
        height, width = window.shape[-2:]
        side = max(height, width)
        while side > self._stride:
            side = max(side // 2 // self._stride, 1) * self._stride
            try:
                self._probabilities(window[:, :, :side, :side])
            except RuntimeError as error:
                if not _lacks_memory(error):
                    raise
                continue
            advice = f"one of {side} x {side} px fits: set core to {side} less twice the model's depth, or smaller"
            break
        else:
            advice = "not even its smallest window fits: use device 'cpu'"
        return ModelError(self._path, f"{self._device} has no memory for a window of {height} x {width} px; {advice}")

    def _classify(
        self, windows: npt.NDArray[np.uint16], crop: int, layers: Set[str]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        return self._through(windows, crop, frozenset(layers))

    def _probabilities(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        probabilities: npt.NDArray[np.float32] = self._through(windows, 0, frozenset({_FLOAT}))[_FLOAT]
        return probabilities

    @torch.inference_mode()
    def _through(
        self, windows: npt.NDArray[np.uint16], crop: int, outputs: frozenset[str]
    ) -> dict[str, npt.NDArray[Any]]:
        """Take one batch to the device, compute there, and bring the answers back, with one wait for all of it."""
        with self._lanes.borrow() as lane:
            answers = self._answers(lane.upload(windows), crop, outputs)
            arrived = {name: lane.download(values.contiguous()) for name, values in answers.items()}
            lane.wait()
        if not arrived.pop(_CHECK):
            raise ModelError(self._path, _BROKEN + (_NARROW if self._autocast == torch.float16 else ""))
        return {name: values.numpy() for name, values in arrived.items()}

    def _answers(self, numbers: torch.Tensor, crop: int, outputs: frozenset[str]) -> dict[str, torch.Tensor]:
        """Map stored numbers on the device to what is asked for, and to whether all scores are sound."""
        scores = self._scores(numbers, crop)
        if self._activation == "logits" and outputs != {"class"}:
            scores = torch.softmax(scores, dim=1)  # the class alone is the same without it
        best, channel = scores.max(dim=1)
        answers = {_CHECK: best.isfinite().all()}
        if "class" in outputs:
            answers["class"] = self._codes[channel]
        if "confidence" in outputs:
            answers["confidence"] = _quantize(best, CONFIDENCE_STEPS)
        if "probability" in outputs:
            answers["probability"] = _quantize(scores, PROBABILITY_STEPS)
        if _FLOAT in outputs:
            answers[_FLOAT] = scores
        return answers

    def _scores(self, numbers: torch.Tensor, crop: int) -> torch.Tensor:
        """Run the network on stored numbers; return (n, class, y, x) float32 on the device, less the border."""
        x = numbers.to(torch.float32, memory_format=torch.channels_last)
        x.mul_(self._a).add_(self._b)
        # without the cache of rounded weights: threads share it, and know nothing of each other's streams
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None, cache_enabled=False):
            scores: torch.Tensor = (self._trimmed if crop == self._depth else self._network)(x)
        height, width = numbers.shape[-2:]
        return middle(scores, (height - 2 * crop, width - 2 * crop)).float()


def _lacks_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or bool(_NO_MEMORY.search(str(error)))


def _quantize(values: torch.Tensor, steps: int) -> torch.Tensor:
    return (values * steps).round_().clamp_(0, steps).to(torch.uint8)


def _load_weights(network: torch.nn.Module, bundle: ModelBundle) -> torch.nn.Module:
    weights, own = load_file(bundle.weights_path), network.state_dict()
    problems = [
        *_listed("layers are missing", own.keys() - weights.keys()),
        *_listed("layers are unknown", weights.keys() - own.keys()),
        *_listed(
            "layers have another shape",
            {
                f"{name} {list(weights[name].shape)} instead of {list(own[name].shape)}"
                for name in own.keys() & weights.keys()
                if weights[name].shape != own[name].shape
            },
        ),
    ]
    if problems:
        raise ModelError(bundle.path, f"the weights do not fit {bundle.spec.architecture}: {'; '.join(problems)}")
    network.load_state_dict(weights)
    return network


def _listed(what: str, names: Set[str]) -> list[str]:
    if not names:
        return []
    shown = ", ".join(sorted(names)[:_LISTED]) + (", ..." if len(names) > _LISTED else "")
    return [f"{len(names)} {what} ({shown})"]
