"""Measure every installed runtime on one model: whether it answers as torch does in float32, and how fast."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from s2seg.errors import ModelError
from s2seg.models.bundle import ModelBundle
from s2seg.models.export import check_chips, synthetic_pixels
from s2seg.models.runtimes import COMPILED, Session, available_runtimes, open_session
from s2seg.progress import Steps

GOALS = {"float32": 0.9999, "bfloat16": 0.995}
"""Least share of pixels, by precision, on which a runtime shall name the class that the reference names."""

_SIDE, _REPEATS = 512, 3
_CLASS = frozenset({"class"})


@dataclass(frozen=True)
class RuntimeCheck:
    """One runtime in one precision.

    Parameters
    ----------
    runtime, precision
        What was asked for.
    device
        Where it ran; empty where it did not.
    agreement
        Share of pixels with the class that the reference gives; NaN where it did not run.
    speed
        Megapixels of input per second, median of three; NaN where it did not run.
    reason
        Why it did not run; empty where it did.
    """

    runtime: str
    precision: str
    device: str = ""
    agreement: float = float("nan")
    speed: float = float("nan")
    reason: str = ""

    @property
    def agrees(self) -> bool:
        """Whether it ran and reached the goal of its precision."""
        return self.agreement >= GOALS[self.precision]


def reference(bundle: ModelBundle) -> str:
    """Name the runtime whose answers in float32 on the CPU the others are compared with."""
    return "onnxruntime" if bundle.is_onnx else "torch"


def check_runtimes(
    bundle: ModelBundle,
    chips: npt.NDArray[np.uint16] | None = None,
    on_progress: Steps | None = None,
) -> list[RuntimeCheck]:
    """Run a model on the same pixels with every installed runtime that reads it, in float32 and bfloat16.

    Parameters
    ----------
    bundle
        What :func:`reference` names is what the others are compared with.
    chips
        (n, band, y, x) uint16 stored numbers, bands in the model's order; without them a synthetic landscape of four
        windows of 512 px.
    on_progress
        Called with (done, total) runtimes and precisions: ``torch-compiled`` takes a quarter of a minute for each.

    Raises
    ------
    InputError
        For chips that do not fit the model.
    """
    spec = bundle.spec
    pixels = synthetic_pixels(spec, _SIDE // spec.stride * spec.stride) if chips is None else check_chips(spec, chips)
    expected = _classes(open_session(bundle, reference(bundle), "cpu", "float32"), pixels)
    other = "torch" if bundle.is_onnx else "onnxruntime"
    runtimes = [runtime for runtime in available_runtimes() if runtime != other]  # it cannot read this kind of bundle
    if "torch" in runtimes:
        runtimes.insert(runtimes.index("torch") + 1, COMPILED)
    choices = [(runtime, precision) for runtime in runtimes for precision in ("float32", "bfloat16")]
    rows: list[RuntimeCheck] = []
    for runtime, precision in choices:
        if on_progress is not None:
            on_progress(len(rows), len(choices))
        rows.append(_check(bundle, runtime, precision, pixels, expected))
    if on_progress is not None:
        on_progress(len(rows), len(choices))
    return rows


def _check(
    bundle: ModelBundle,
    runtime: str,
    precision: str,
    pixels: npt.NDArray[np.uint16],
    expected: npt.NDArray[np.uint8],
) -> RuntimeCheck:
    try:
        session = open_session(bundle, runtime, "auto", precision)
        found = _classes(session, pixels)
    except ModelError as error:
        return RuntimeCheck(runtime, precision, reason=error.reason)
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        _classes(session, pixels)
        seconds.append(time.perf_counter() - start)
    speed = pixels[:, 0].size / 1e6 / statistics.median(seconds)
    return RuntimeCheck(runtime, precision, session.name.split()[1], float(np.mean(found == expected)), speed)


def _classes(session: Session, pixels: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint8]:
    return np.concatenate([session.classify(window[None], 0, _CLASS)["class"] for window in pixels])
