"""From a network's numbers to the bytes that are stored: the same rounding for every runtime and for blending."""

from __future__ import annotations

from collections.abc import Set
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

_Float = TypeVar("_Float", bound=np.floating[Any])

LAYERS = ("class", "confidence", "probability")
"""What a session can be asked for."""

CONFIDENCE_STEPS = 100
PROBABILITY_STEPS = 250


def summarize(
    probabilities: npt.NDArray[np.floating[Any]], codes: npt.NDArray[np.uint8], layers: Set[str]
) -> dict[str, npt.NDArray[np.uint8]]:
    """Turn probabilities into the layers that are stored.

    Parameters
    ----------
    probabilities
        (n, class, y, x), 0 to 1.
    codes
        (class,) the stored code of each channel.
    layers
        Which of ``class`` (n, y, x), ``confidence`` (n, y, x; 0 to 100) and ``probability``
        (n, class, y, x; 0 to 250) to make.
    """
    answer: dict[str, npt.NDArray[np.uint8]] = {}
    if "class" in layers or "confidence" in layers:
        channel, best = argmax(probabilities)
        if "class" in layers:
            answer["class"] = codes[channel]
        if "confidence" in layers:
            answer["confidence"] = quantize(best, CONFIDENCE_STEPS)
    if "probability" in layers:
        answer["probability"] = quantize(probabilities, PROBABILITY_STEPS)
    return answer


def quantize(values: npt.NDArray[np.floating[Any]], steps: int) -> npt.NDArray[np.uint8]:
    """Round probabilities to ``steps`` equal steps of uint8; what strays outside 0 to 1 by rounding is clipped."""
    scaled = values * np.float32(steps)
    return np.clip(np.rint(scaled, out=scaled), 0, steps, out=scaled).astype(np.uint8)


def argmax(values: npt.NDArray[_Float]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[_Float]]:
    """Return the first highest channel of (n, class, y, x) and its value, both (n, y, x); NaN stays NaN.

    Channel by channel: several times as fast as ``np.argmax`` over an axis that is not the last.
    """
    best = values[:, 0].copy()
    channel = np.zeros(best.shape, np.uint8)
    for i in range(1, values.shape[1]):
        np.copyto(channel, np.uint8(i), where=values[:, i] > best)
        np.maximum(best, values[:, i], out=best)
    return channel, best


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return probabilities over axis 1 of (n, class, y, x) as a new array."""
    result: npt.NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    np.exp(result, out=result)
    result /= result.sum(axis=1, keepdims=True)
    return result


def trim(values: npt.NDArray[np.float32], crop: int) -> npt.NDArray[np.float32]:
    """Return a view without ``crop`` pixels on each side of the last two axes."""
    return values[..., crop : values.shape[-2] - crop, crop : values.shape[-1] - crop]
