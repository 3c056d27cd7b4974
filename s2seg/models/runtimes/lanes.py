"""The way of a batch to the device and back, and how many batches may be under way at once.

On a GPU two batches share it: while one computes, the other's numbers cross. Each has a stream of its own, and its
numbers and answers lie in pinned memory, which the GPU reads and writes by itself. On a CPU there is one way, and the
numbers are there already; all else is the same.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from queue import SimpleQueue
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch


class Lane(Protocol):
    """One way to the device and back, for one batch at a time."""

    def running(self) -> AbstractContextManager[object]:
        """Return a context in which what is asked of the device is done in order, independent of other lanes."""

    def upload(self, values: npt.NDArray[np.uint16]) -> torch.Tensor:
        """Return stored numbers on the device."""

    def download(self, values: torch.Tensor) -> torch.Tensor:
        """Return numbers of the device in this machine's memory; they are there after :meth:`wait`."""

    def wait(self) -> None:
        """Wait until all that was asked for in this lane is done."""


class HostLane:
    """The CPU's: nothing moves, and everything is done when it returns."""

    def running(self) -> AbstractContextManager[object]:
        """See :class:`Lane`."""
        return nullcontext()

    def upload(self, values: npt.NDArray[np.uint16]) -> torch.Tensor:
        """See :class:`Lane`."""
        # torch warns of arrays that it must not write to, which is what dask hands out; the copy is two bytes a pixel
        return torch.from_numpy(np.require(values, np.uint16, ("C", "W")))

    def download(self, values: torch.Tensor) -> torch.Tensor:
        """See :class:`Lane`."""
        return values

    def wait(self) -> None:
        """See :class:`Lane`."""


class CudaLane:
    """A GPU's: a stream, and copies through pinned memory, which torch keeps for the next batch.

    Parameters
    ----------
    device
        A CUDA device, on which the network already lies.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has not annotated it
        self._stream.wait_stream(torch.cuda.current_stream(device))  # the network may still be on its way

    def running(self) -> AbstractContextManager[object]:
        """See :class:`Lane`."""
        return torch.cuda.stream(self._stream)

    def upload(self, values: npt.NDArray[np.uint16]) -> torch.Tensor:
        """See :class:`Lane`."""
        pinned = torch.empty(values.shape, dtype=torch.uint16, pin_memory=True)
        np.copyto(pinned.numpy(), values)
        return pinned.to(self._device, non_blocking=True)

    def download(self, values: torch.Tensor) -> torch.Tensor:
        """See :class:`Lane`."""
        return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)

    def wait(self) -> None:
        """See :class:`Lane`."""
        self._stream.synchronize()


class Lanes:
    """A device's lanes, to be borrowed.

    Parameters
    ----------
    lanes
        At least one.
    """

    def __init__(self, lanes: Sequence[Lane]) -> None:
        self._free: SimpleQueue[Lane] = SimpleQueue()
        for lane in lanes:
            self._free.put(lane)
        self._count = len(lanes)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many there are."""
        return self._count

    @contextmanager
    def borrow(self) -> Iterator[Lane]:
        """Take a lane, as soon as one is free, and run in it."""
        lane = self._free.get()
        try:
            with lane.running():
                yield lane
        finally:
            self._free.put(lane)

    def narrow(self) -> None:
        """Give up a lane for good, once it is free, unless it is the last: batches then share less of the memory."""
        with self._lock:
            if self._count > 1:
                self._free.get()
                self._count -= 1


def lanes_for(device: torch.device) -> Lanes:
    """Return two lanes for a CUDA device, and one for a CPU; call it when the network lies on the device."""
    return Lanes([CudaLane(device), CudaLane(device)] if device.type == "cuda" else [HostLane()])
