"""Read the assets of a chunk side by side where each read waits for a network.

stackstac reads the assets of a chunk one after the other, in one thread. From afar each of these reads waits for an
answer or two before there is anything to decode; so while one is asked for, the next ones are already under way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from rasterio.windows import Window, from_bounds, intersect

from s2seg.sources.reader import AssetRef, read_window

AHEAD = 8
"""Reads of one chunk that are under way at once, or done and not yet asked for."""

_THREADS = 32
"""Reads of all chunks that are under way at once."""

_pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="s2seg-read")


def _renew_pool() -> None:
    global _pool
    _pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="s2seg-read")


if hasattr(os, "register_at_fork"):  # a pool would wait for threads that stayed behind
    os.register_at_fork(after_in_child=_renew_pool)

Bounds = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class Batch:
    """What stackstac reads for one chunk, in its order.

    Parameters
    ----------
    refs
        The assets.
    bounds
        Where each lies (left, bottom, right, top) in the CRS of the target grid.
    """

    refs: tuple[AssetRef, ...]
    bounds: tuple[Bounds, ...]


@dataclass(frozen=True, eq=False)
class Place:
    """An asset, as its place in a batch: it knows what will be asked for next."""

    batch: Batch
    index: int

    @property
    def ref(self) -> AssetRef:
        """The asset itself."""
        return self.batch.refs[self.index]


class AssetReader:
    """stackstac's reader protocol over :func:`~s2seg.sources.reader.read_window`.

    Parameters
    ----------
    url
        The :class:`Place` of the asset (stackstac passes on what its table holds).
    spec
        stackstac's ``RasterSpec``: the target grid.
    """

    def __init__(self, *, url: Place, spec: Any, **_: Any) -> None:
        self.place, self.spec = url, spec

    def read(self, window: Window) -> npt.NDArray[np.uint16]:
        """Pixels (rows, columns) of ``window``, in pixels of the target grid."""
        if self.place.ref.remote:
            return _round_of(self, window).take(self.place.index)
        return read_window(self.place.ref, self.spec.epsg, self.spec.transform, window)

    def close(self) -> None:
        """Nothing to do: open files belong to the process, not to the reader."""

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _Round:
    """The reads of one chunk, from the first that stackstac asks for."""

    def __init__(self, reader: AssetReader, window: Window) -> None:
        self.batch, self.window, self._spec = reader.place.batch, window, reader.spec
        self._due = self._overlapping(reader.place.index)
        self._under_way: dict[int, Future[npt.NDArray[np.uint16]]] = {}
        self._go_on()

    def expects(self, index: int) -> bool:
        return index in self._under_way

    def take(self, index: int) -> npt.NDArray[np.uint16]:
        pixels = self._under_way.pop(index)
        try:
            self._go_on()
            return pixels.result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for read in self._under_way.values():
            read.cancel()
        self._under_way.clear()

    def _overlapping(self, first: int) -> Iterator[int]:
        """Places of the remote assets that stackstac will ask for."""
        for index in range(first, len(self.batch.refs)):
            area = from_bounds(*self.batch.bounds[index], self._spec.transform)
            if index == first or (self.batch.refs[index].remote and intersect(self.window, area)):
                yield index

    def _go_on(self) -> None:
        while len(self._under_way) < AHEAD and (index := next(self._due, None)) is not None:
            ref, spec = self.batch.refs[index], self._spec
            self._under_way[index] = _pool.submit(read_window, ref, spec.epsg, spec.transform, self.window)


class _Current(threading.local):
    """The round of this thread: a chunk is read in one thread from its first asset to its last."""

    round: _Round | None = None


_current = _Current()


def _round_of(reader: AssetReader, window: Window) -> _Round:
    """Go on with the round of this thread, or begin another."""
    now = _current.round
    if now and now.batch is reader.place.batch and now.window == window and now.expects(reader.place.index):
        return now
    if now:
        now.stop()
    _current.round = _Round(reader, window)
    return _current.round


def places(refs: Iterable[AssetRef], bounds: Iterable[Sequence[float]]) -> list[Place]:
    """Make a batch of assets, and return the place of each; see :class:`Batch`."""
    batch = Batch(tuple(refs), tuple((left, bottom, right, top) for left, bottom, right, top in bounds))
    return [Place(batch, index) for index in range(len(batch.refs))]
