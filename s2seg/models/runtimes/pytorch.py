"""The torch runtime: CPU and CUDA, float32, and bfloat16 or float16 by autocast."""

from __future__ import annotations

import bisect
import math
import re
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Set
from concurrent.futures import ThreadPoolExecutor
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
from s2seg.models.runtimes.tuning import fold_batch_norm, largest_image, merge_upsampling, trial_side
from s2seg.models.unet import build_network, pools_globally

T = TypeVar("T")
_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_FLOAT, _CHECK = "float", "check"
_BROKEN = "the network answers with NaN or infinity: its weights or scaling are broken"
_NARROW = ", or its numbers are too large for float16: use precision 'bfloat16'"
_NO_MEMORY = re.compile(r"out of memory|_ALLOC(ATION)?_FAILED|can't allocate memory", re.IGNORECASE)
"""How CUDA, its libraries and a processor's allocator say what torch's own allocator for GPUs says by its type."""

_PERHAPS_NO_MEMORY = re.compile(r"unable to find an engine|CUDNN_STATUS_INTERNAL_ERROR", re.IGNORECASE)
"""What cuDNN says where it lacks memory for its work or its kernels, but also where it does not run at all."""

_MOST_NUMBERS = 2**31 - 1
"""In any image on a GPU: beyond, torch's kernels for channels-last images fail, and in some versions the one for
nearest upsampling leaves zeros without a word."""

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
        self._batches: Callable[[int, int], int] = batch_for_caches
        self._limit = self._most_pixels = sys.maxsize
        if self._device.type == "cuda":
            self._suit_a_gpu(bundle, precision)

    def _suit_a_gpu(self, bundle: ModelBundle, precision: str) -> None:
        """Take as many windows at once as make it faster, and as torch's kernels can count."""
        card = torch.cuda.get_device_name(self._device)
        conditions = f"{card}, {self._runtime} {torch.__version__}, {precision}, {self._lanes.count} at once"
        self._batches = MeasuredBatches(bundle.sha256, conditions, self._seconds)
        numbers = largest_image(self._network, self._bands, trial_side(bundle.spec))
        self._limit = self._most_pixels = math.floor(_MOST_NUMBERS / numbers)

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
        """Answer as many windows at a time as the device has memory for; what it lacked once is not tried again.

        Batches are halved first: two small ones at once are faster than a large one alone.
        """
        height, width = windows.shape[-2:]
        if height * width > self._limit:
            core = (math.isqrt(self._limit) - 2 * self._depth) // self._stride * self._stride
            raise ModelError(
                self._path,
                f"torch's kernels for GPUs cannot count the numbers of a window of {height} x {width} px; "
                + self._advice(core),
            )
        parts: list[T] = []
        done = 0
        while done < len(windows):
            batch = windows[done : done + self._room(height, width)]
            shared = self._lanes.count > 1
            lacking = None
            try:
                parts.append(answer(batch))
            except RuntimeError as error:
                if not lacks_memory(error, perhaps=shared or len(batch) > 1):
                    raise
                lacking = error
            if lacking is None:
                done += len(batch)
                continue
            _release(lacking)
            if len(batch) > 1:
                self._most_pixels = min(self._most_pixels, len(batch) // 2 * height * width)
            elif shared:
                self._lanes.narrow()
            else:
                raise self._too_large(batch, answer) from lacking
        return parts

    def _room(self, height: int, width: int) -> int:
        """Windows of this size that fit into the memory, as far as is known, and that torch's kernels can count."""
        return max(1, self._most_pixels // (height * width))

    def _seconds(self, count: int, height: int, width: int) -> float | None:
        """Median time of so many windows in each lane at once, as a map runs them: numbers in, classes out.

        None where the device has no memory for them.
        """
        if count * height * width > self._limit:
            return None
        # not zeros: a GPU that multiplies nothing but zeros stays cool, and clocks higher
        noise = np.random.default_rng(0).integers(1, 5000, (count, self._bands, height, width), np.uint16)
        lanes, seconds = self._lanes.count, []
        try:
            with ThreadPoolExecutor(lanes) as threads:
                for _ in range(1 + _REPEATS):
                    start = time.perf_counter()
                    for run in [threads.submit(self._run_as_a_map_does, noise) for _ in range(lanes)]:
                        run.result()
                    seconds.append(time.perf_counter() - start)
        except RuntimeError as error:
            if not lacks_memory(error, perhaps=lanes > 1 or count > 1):
                raise
            _release(error)
            return None
        return statistics.median(seconds[1:])  # the first prepares what the others use

    def _run_as_a_map_does(self, windows: npt.NDArray[np.uint16]) -> None:
        if self._blends:
            self._probabilities(windows)
        else:
            self._classify(windows, self._depth if min(windows.shape[-2:]) > 2 * self._depth else 0, {"class"})

    def _too_large(
        self, window: npt.NDArray[np.uint16], answer: Callable[[npt.NDArray[np.uint16]], object]
    ) -> ModelError:
        """Find by trial what would fit, for an error that helps."""
        height, width = window.shape[-2:]

        def lacks_memory_for(core: int) -> bool:
            side = core + 2 * self._depth
            try:
                answer(window[:, :, :side, :side])
            except RuntimeError as error:
                if not lacks_memory(error, perhaps=True):
                    raise
                _release(error)
                return True
            return False

        advice = self._advice(0)
        if not self._blends:
            cores = range(self._least_core, max(height, width) - 2 * self._depth, self._stride)
            fitting = bisect.bisect_left(cores, True, key=lacks_memory_for)
            if fitting:
                advice = self._advice(cores[fitting - 1])
        return ModelError(self._path, f"{self._device} has no memory for a window of {height} x {width} px; {advice}")

    @property
    def _least_core(self) -> int:
        """Of a trimmed block: what :func:`s2seg.inference.chunks_for` rounds smaller ones up to."""
        return max(self._depth, self._stride)

    def _advice(self, core: int) -> str:
        """Say how to go on where a window is too large; the largest ``core`` that would do counts if there is one."""
        elsewhere = "use a machine with more memory" if self._device.type == "cpu" else "use device 'cpu'"
        if self._blends:
            return f"its windows have one size, whatever the core: {elsewhere}, or a model with smaller windows"
        if core < self._least_core:
            return f"not even that of the smallest core, {self._least_core}, fits: {elsewhere}"
        side = core + 2 * self._depth
        return f"one of {side} x {side} px fits: use --core {core}"

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


def lacks_memory(error: BaseException, *, perhaps: bool = False) -> bool:
    """Whether an error, or what led to it, says that memory is short.

    Parameters
    ----------
    error
        What a network raised.
    perhaps
        Whether to count what can also mean that cuDNN is broken: where less can be tried, that shows which it was.
    """
    return any(
        isinstance(cause, torch.OutOfMemoryError)
        or _NO_MEMORY.search(str(cause))
        or (perhaps and _PERHAPS_NO_MEMORY.search(str(cause)))
        for cause in _causes(error)
    )


def _release(error: BaseException) -> None:
    """Let go of what was computed until an error, and of what torch keeps of it on a GPU: CUDA's libraries need it."""
    for cause in _causes(error):
        traceback.clear_frames(cause.__traceback__)
    torch.cuda.empty_cache()  # nothing happens where no GPU is in use


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error, and those that led to it."""
    cause: BaseException | None = error
    seen: list[BaseException] = []
    while cause is not None and cause not in seen:
        yield cause
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__


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
