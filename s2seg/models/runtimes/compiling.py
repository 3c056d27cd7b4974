"""The torch runtime, compiled: scaling, network and the choice of class as one function for each shape of window.

torch's compiler (inductor) writes C++ for a CPU and Triton for a GPU. The weights become constants of what it writes,
so that the processor's library (oneDNN) gets them packed as it likes, and sums and activations go along with the
convolutions. Compiling a U-Net takes a quarter of a minute the first time, and five seconds where torch has kept code
of an earlier run.
"""

from __future__ import annotations

import textwrap
import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch._dynamo
import torch._inductor.config
from torch._dynamo.exc import TorchDynamoException
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.utils._triton import has_triton

from s2seg.errors import ModelError
from s2seg.models.bundle import ModelBundle
from s2seg.models.runtimes.pytorch import TorchSession, lacks_memory

_SHAPES = 64
"""Functions that are compiled in a process at most, for all sizes of windows, batches, margins and models: torch would
give up after eight, and go on uncompiled."""


class CompiledSession(TorchSession):
    """A network that is compiled when it first sees windows of a shape.

    Parameters
    ----------
    bundle, device, precision
        As in :class:`~s2seg.models.runtimes.pytorch.TorchSession`.

    Raises
    ------
    ModelError
        When there is no compiler for the device; and by each method, when torch cannot compile the network.
    """

    _runtime = "torch-compiled"

    def __init__(self, bundle: ModelBundle, device: str, precision: str) -> None:
        _check_compiler(bundle.path, device)
        super().__init__(bundle, device, precision)
        self._compiled = torch.compile(super()._answers, dynamic=False)
        self._compiling = threading.Lock()
        self._done: set[tuple[object, ...]] = set()

    def _through(
        self, windows: npt.NDArray[np.uint16], crop: int, outputs: frozenset[str]
    ) -> dict[str, npt.NDArray[Any]]:
        function = _next_power_of_two(len(windows)), windows.shape[1:], crop, outputs
        if function in self._done:
            return super()._through(windows, crop, outputs)
        # the constants are made in the lane that runs a function first: another may use them when that lane has waited
        with self._compiling:
            answers = super()._through(windows, crop, outputs)
            self._done.add(function)
        return answers

    def _answers(self, numbers: torch.Tensor, crop: int, outputs: frozenset[str]) -> dict[str, torch.Tensor]:
        count = len(numbers)
        # both settings are this thread's alone
        freezing: Any = torch._inductor.config.patch(freezing=True)
        shapes: Any = torch._dynamo.config.patch(recompile_limit=_SHAPES)
        try:
            with freezing, shapes:
                answers = self._compiled(_filled_up(numbers), crop, outputs)
        except TorchDynamoException as error:
            if lacks_memory(error):
                raise
            raise ModelError(self._path, f"torch cannot compile it: {_reason(error)}; use runtime 'torch'") from error
        return {name: values[:count] if values.ndim else values for name, values in answers.items()}


def _check_compiler(path: str, device: str) -> None:
    if device != "cpu":
        if not has_triton():
            raise ModelError(path, "runtime 'torch-compiled' needs Triton on a GPU: install it, or use runtime 'torch'")
        return
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ModelError(
            path,
            "runtime 'torch-compiled' needs a C++ compiler: install g++, name yours in CXX, or use runtime 'torch'",
        ) from error


def _filled_up(numbers: torch.Tensor) -> torch.Tensor:
    """Fill a batch up to a power of two with empty windows: a shape more takes longer to compile than they to run."""
    missing = _next_power_of_two(len(numbers)) - len(numbers)
    if not missing:
        return numbers
    # joined as signed numbers, of which torch knows more operations
    joined = torch.cat([numbers.view(torch.int16), numbers.new_zeros(missing, *numbers.shape[1:], dtype=torch.int16)])
    return joined.view(torch.uint16)


def _next_power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()


def _reason(error: TorchDynamoException) -> str:
    """Say in one line what torch's compiler met."""
    cause = getattr(error, "inner_exception", error)
    return textwrap.shorten(f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}", 400)
