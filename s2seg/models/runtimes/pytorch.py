"""The torch runtime: CPU and CUDA, float32 and bfloat16 (autocast)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Set
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file

from s2seg.allocator import keep_freed_memory
from s2seg.errors import ModelError
from s2seg.models.bundle import ModelBundle
from s2seg.models.runtimes.answers import CONFIDENCE_STEPS, PROBABILITY_STEPS
from s2seg.models.runtimes.seams import warn_of_seams
from s2seg.models.runtimes.tuning import fold_batch_norm
from s2seg.models.unet import build_network, pools_globally

T = TypeVar("T")
_ALL = sys.maxsize
_LISTED = 3  # names of layers in an error: enough to see the pattern


def choose_device(path: str, device: str) -> str:
    """Settle ``auto``, and refuse a device that torch does not see; ``path`` is what an error calls the model."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if count else "cpu"
    kind, _, number = device.partition(":")
    if kind == "cuda" and int(number or 0) >= count:
        raise ModelError(path, f"torch sees no device {device!r} here: use device 'cpu'")
    return device


def has_bfloat16() -> bool:
    """Whether the GPU calculates in bfloat16, and does not only imitate it."""
    return bool(torch.cuda.is_bf16_supported(False))


class TorchSession:
    """A network on a device: uint16 goes in, uint8 comes out, everything between happens there.

    Parameters
    ----------
    bundle
        One with safetensors weights.
    device
        ``cpu``, ``cuda`` or ``cuda:1``.
    precision
        ``float32`` or ``bfloat16``.
    """

    def __init__(self, bundle: ModelBundle, device: str, precision: str) -> None:
        self.name = f"torch {device} {precision}"
        self._path, self._activation, self._stride = bundle.path, bundle.spec.activation, bundle.spec.stride
        self._batch = _ALL
        self._device = torch.device(device)
        self._bfloat16 = precision == "bfloat16"
        if self._bfloat16 and self._device.type == "cuda" and not has_bfloat16():
            raise ModelError(bundle.path, f"device {device} has no bfloat16 arithmetic: use precision 'float32'")
        if self._device.type == "cpu":
            keep_freed_memory()
        network = _load_weights(build_network(bundle.spec), bundle).eval().to(self._device)
        if not bundle.spec.global_context and pools_globally(network, len(bundle.spec.bands)):
            warn_of_seams(bundle.path)
        # channels last: measured 1.2 times (float32) and 2.2 times (bfloat16) as fast on a CPU, and cuDNN's choice too
        network = fold_batch_norm(network, len(bundle.spec.bands))
        self._network = network.to(memory_format=torch.channels_last)
        a, b = bundle.spec.affine()
        self._a = torch.from_numpy(a[:, None, None]).to(self._device)
        self._b = torch.from_numpy(b[:, None, None]).to(self._device)
        self._codes = torch.from_numpy(bundle.spec.legend.channel_to_code()).to(self._device)

    def classify(
        self, windows: npt.NDArray[np.uint16], crop: int, layers: Set[str]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        """See :class:`s2seg.models.runtimes.Session`."""
        parts = self._in_batches(windows, lambda batch: self._classify(batch, crop, layers))
        return parts[0] if len(parts) == 1 else {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def probabilities(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        """See :class:`s2seg.models.runtimes.Session`."""
        return np.concatenate(self._in_batches(windows, self._probabilities))

    def _in_batches(self, windows: npt.NDArray[np.uint16], answer: Callable[[npt.NDArray[np.uint16]], T]) -> list[T]:
        """Answer as many windows at a time as the device has memory for; what it lacked once is not tried again."""
        parts: list[T] = []
        done = 0
        while done < len(windows):
            batch = windows[done : done + self._batch]
            try:
                parts.append(answer(batch))
            except torch.OutOfMemoryError as error:
                if len(batch) == 1:
                    raise self._too_large(batch) from error
                self._batch = len(batch) // 2
            else:
                done += len(batch)
        return parts

    def _too_large(self, window: npt.NDArray[np.uint16]) -> ModelError:
        """Find by trial what would fit, for an error that helps."""
        height, width = window.shape[-2:]
        side = max(height, width)
        while side > self._stride:
            side = max(side // 2 // self._stride, 1) * self._stride
            try:
                self._probabilities(window[:, :, :side, :side])
            except torch.OutOfMemoryError:
                continue
            advice = f"one of {side} x {side} px fits: set core to {side} less twice the model's depth, or smaller"
            break
        else:
            advice = "not even its smallest window fits: use device 'cpu'"
        return ModelError(self._path, f"{self._device} has no memory for a window of {height} x {width} px; {advice}")

    @torch.inference_mode()
    def _classify(
        self, windows: npt.NDArray[np.uint16], crop: int, layers: Set[str]
    ) -> dict[str, npt.NDArray[np.uint8]]:
        scores = self._scores(windows)
        height, width = scores.shape[-2:]
        scores = scores[..., crop : height - crop, crop : width - crop]
        if self._activation == "logits" and layers != {"class"}:
            scores = torch.softmax(scores, dim=1)  # the class alone is the same without it
        best, channel = scores.max(dim=1)
        self._refuse_nan(best)
        answer: dict[str, torch.Tensor] = {}
        if "class" in layers:
            answer["class"] = self._codes[channel]
        if "confidence" in layers:
            answer["confidence"] = _quantize(best, CONFIDENCE_STEPS)
        if "probability" in layers:
            answer["probability"] = _quantize(scores, PROBABILITY_STEPS)
        return {layer: np.ascontiguousarray(values.cpu().numpy()) for layer, values in answer.items()}

    @torch.inference_mode()
    def _probabilities(self, windows: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
        scores = self._scores(windows)
        self._refuse_nan(scores.amax(dim=1))
        if self._activation == "logits":
            scores = torch.softmax(scores, dim=1)
        return np.ascontiguousarray(scores.cpu().numpy())

    def _scores(self, windows: npt.NDArray[np.uint16]) -> torch.Tensor:
        """Run the network on stored numbers; return (n, class, y, x) float32 on the device."""
        # torch warns of arrays that it must not write to, which is what dask hands out; the copy is two bytes a pixel
        own = np.require(windows, np.uint16, ("C", "W"))
        x = torch.from_numpy(own).to(self._device).to(torch.float32, memory_format=torch.channels_last)
        x.mul_(self._a).add_(self._b)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._bfloat16):
            scores: torch.Tensor = self._network(x)
        return scores.float()

    def _refuse_nan(self, best: torch.Tensor) -> None:
        if bool(best.isnan().any()):
            raise ModelError(self._path, "the network answers with NaN: its weights or scaling are broken")


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
