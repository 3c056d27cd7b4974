"""Lazy scenes -> windows in memory, each source pixel computed once and little of the area held at a time.

Blocks are computed ahead in parallel and visited row by row. What later windows still need of them is carried along:
a strip above the current row of blocks, a tail left of the current block. Memory is therefore some blocks and one strip
as high as a window, whatever the area's height.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, product
from typing import Any, NamedTuple, Protocol

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.base import optimize
from dask.local import get_sync
from dask.optimization import cull
from dask.system import CPU_COUNT
from dask.typing import Key

Pixels = npt.NDArray[Any]


class Planes(NamedTuple):
    """What there is of a window.

    Parameters
    ----------
    image
        (band, y, x) uint16 DN; a pixel without data in any band is 0 in all of them.
    labels
        (y, x) uint8 legend codes, also where the image has no data.
    parts
        (y, x) uint8 codes of the parts of the split.
    """

    image: npt.NDArray[np.uint16]
    labels: npt.NDArray[np.uint8]
    parts: npt.NDArray[np.uint8]


class Place(Protocol):
    """One place at one time, as :class:`s2seg.training.regions.Region` is."""

    @property
    def name(self) -> str:
        """The area's name; several dates of one area share it."""

    @property
    def date(self) -> str:
        """When it was seen."""

    @property
    def scene(self) -> xr.DataArray:
        """(band, y, x) uint16, 0 is nodata."""

    @property
    def labels(self) -> xr.DataArray:
        """(y, x) uint8 legend codes."""

    @property
    def split(self) -> xr.DataArray:
        """(y, x) uint8: 0 no part, 1 train, 2 validation, 3 test."""

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of the source items."""


@dataclass(frozen=True)
class Window:
    """A square of an area, in pixels from the area's origin; it may reach beyond an area that is smaller."""

    row: int
    col: int
    size: int


def starts(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin along an axis: on multiples of the stride, the last one moved back to end at the edge."""
    if length <= size:
        return [0]
    last = length - size
    return [*range(0, last, stride), last]


def dates_together(places: Sequence[Place]) -> list[list[int]]:
    """Group the indices of neighbours that share one array of labels and of the split, as the dates of an area do."""
    shared = groupby(range(len(places)), key=lambda i: (id(places[i].labels), id(places[i].split)))
    return [list(group) for _, group in shared]


def cut(
    dates: Sequence[Place], sizes: Sequence[tuple[int, int]]
) -> Generator[tuple[int, list[tuple[Window, Planes]]], None, None]:
    """Visit the blocks of an area, each at all of its dates, and hand out the windows that they complete.

    Parameters
    ----------
    dates
        Scenes on one grid, lazy or not; all have the labels and the split of the first.
    sizes
        (window, stride) in pixels.

    Yields
    ------
    int
        Index of the date. Blocks come in row-major order, and the dates of a block one after the other.
    list of (Window, Planes)
        What this block completes at this date, if anything: the same windows at all dates. Planes are views, which keep
        their block in memory, cropped where the window reaches beyond the area.
    """
    labels, split, *images = _lazy_planes(dates)
    rows, cols = (_Axis(chunks, sizes) for chunks in labels.chunks)
    shared, scenes = ([_Carried(rows, cols, array) for array in arrays] for arrays in ((labels, split), images))
    with closing(_computed_ahead([(labels, split, images[0]), *((image,) for image in images[1:])])) as blocks:
        for r, c in np.ndindex(labels.numblocks):
            codes, parts = (plane.joined(r, c, next(blocks)) for plane in shared)
            windows = [
                Window(row, col, size)
                for size, _ in sizes
                for row, col in product(rows.completed(r, size), cols.completed(c, size))
            ]
            origin = rows.base(r), cols.base(c)
            for date, plane in enumerate(scenes):
                planes = plane.joined(r, c, next(blocks)), codes, parts
                yield date, [(window, Planes(*(_view(p, window, origin) for p in planes))) for window in windows]


def blocks_of(place: Place) -> int:
    """How many blocks :func:`cut` visits."""
    scene = place.scene.transpose("band", "y", "x")
    return 1 if scene.chunks is None else len(scene.chunks[1]) * len(scene.chunks[2])


class _Axis:
    """Which windows each block along one axis completes, and from where on its pixels are still needed."""

    def __init__(self, chunks: tuple[int, ...], sizes: Sequence[tuple[int, int]]) -> None:
        self._edges = np.cumsum([0, *chunks]).tolist()
        length = self._edges[-1]
        self._completed: list[dict[int, list[int]]] = [{size: [] for size, _ in sizes} for _ in chunks]
        self._kept = self._edges[1:]
        for size, stride in sizes:
            for start in starts(length, size, stride):
                last = bisect_left(self._edges, min(start + size, length)) - 1
                self._completed[last][size].append(start)
                for block in range(bisect_right(self._edges, start) - 1, last):
                    self._kept[block] = min(self._kept[block], start)

    def __len__(self) -> int:
        return len(self._completed)

    def start(self, block: int) -> int:
        return self._edges[block]

    def stop(self, block: int) -> int:
        return self._edges[block + 1]

    def completed(self, block: int, size: int) -> list[int]:
        """Starts of the windows whose last pixel lies in this block."""
        return self._completed[block][size]

    def kept(self, block: int) -> int:
        """First pixel of the windows that begin by the end of this block and end after it."""
        return self._kept[block]

    def base(self, block: int) -> int:
        """First pixel at hand when this block comes: what was kept of the blocks before it."""
        return self._kept[block - 1] if block else 0


class _Carried:
    """One array on its way past: joins each block with what windows to come still need of the blocks before it."""

    def __init__(self, rows: _Axis, cols: _Axis, array: da.Array) -> None:
        self._rows, self._cols = rows, cols
        self._empty = partial(np.empty, dtype=array.dtype)
        self._lead, self._width = array.shape[:-2], array.shape[-1]
        self._above = self._empty((*self._lead, 0, self._width))

    def joined(self, r: int, c: int, block: Pixels) -> Pixels:
        """(..., y, x) pixels from the bases of row ``r`` and column ``c`` on; blocks come in row-major order."""
        rows, cols = self._rows, self._cols
        if c == 0:
            self._left = self._empty((*self._lead, rows.stop(r) - rows.base(r), 0))
            self._below = self._empty((*self._lead, rows.stop(r) - rows.kept(r), self._width))
        across = slice(cols.start(c), cols.stop(c))
        column = _joined(self._above[..., across], block, axis=-2)
        self._below[..., across] = column[..., rows.kept(r) - rows.base(r) :, :]
        canvas = _joined(self._left, column, axis=-1)
        self._left = canvas[..., cols.kept(c) - cols.base(c) :]
        if c == len(cols) - 1:
            self._above = self._below
        return canvas


def _joined(kept: Pixels, new: Pixels, axis: int) -> Pixels:
    """Put what was kept before what is new; where windows do not overlap nothing is kept, and nothing is copied."""
    return np.concatenate([kept, new], axis=axis) if kept.shape[axis] else new


def _view(array: Pixels, window: Window, origin: tuple[int, int]) -> Pixels:
    row, col = window.row - origin[0], window.col - origin[1]
    return array[..., row : row + window.size, col : col + window.size]


def _lazy_planes(dates: Sequence[Place]) -> list[da.Array]:
    """Labels, split (y, x), and the images (band, y, x), lazy and cut alike."""
    images = [da.asarray(place.scene.transpose("band", "y", "x").data) for place in dates]
    chunks = images[0].chunks[1:]
    planes = [da.asarray(plane.transpose("y", "x").data).rechunk(chunks) for plane in (dates[0].labels, dates[0].split)]
    return planes + [
        da.map_blocks(_with_whole_pixels, image.rechunk((-1, *chunks)), meta=np.empty((0, 0, 0), np.uint16))
        for image in images
    ]


def _with_whole_pixels(image: npt.NDArray[np.uint16]) -> npt.NDArray[np.uint16]:
    """Take all bands away where one has no data."""
    if np.count_nonzero(image) == image.size:
        return image
    return np.where(image.min(axis=0) > 0, image, np.uint16(0))


def _computed_ahead(jobs: Sequence[Sequence[da.Array]]) -> Generator[Pixels, None, None]:
    """Compute the arrays of every job at every place, in row-major order, as many jobs at a time as there are workers.

    A block is computed by one thread, since several are computed at once. What is to be done is settled once for all
    blocks, and they come without the copy that dask makes of what it computes.
    """
    count = workers()
    # once optimized, every array carries the tasks of all
    first, *_ = optimize(*(array for job in jobs for array in job))
    graph = dict(first.__dask_graph__())
    pending: deque[Future[tuple[Pixels, ...]]] = deque()
    with ThreadPoolExecutor(count, thread_name_prefix="blocks") as pool:
        try:
            for keys in _at_every_place(jobs):
                pending.append(pool.submit(_computed, graph, keys))
                if len(pending) > count:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _computed(graph: dict[Key, Any], keys: list[Key]) -> tuple[Pixels, ...]:
    needed, _ = cull(graph, keys)
    blocks: tuple[Pixels, ...] = get_sync(needed, keys)
    return blocks


def _at_every_place(jobs: Sequence[Sequence[da.Array]]) -> Iterator[list[Key]]:
    """Keys of the blocks of each job's arrays, of which only y and x are cut."""
    for r, c in np.ndindex(jobs[0][0].numblocks):
        for job in jobs:
            yield [(array.name, *(0 for _ in array.shape[:-2]), r, c) for array in job]


def workers() -> int:
    """How many blocks are computed at a time: what dask is told, or a thread for each processor."""
    return int(dask.config.get("num_workers", None) or CPU_COUNT)


class Blocks:
    """The blocks of an area, computed one at a time and in any order.

    Parameters
    ----------
    dates
        As for :func:`cut`. Plane 0 is their labels, plane 1 their split, and plane 2 + i the image of date i.
    """

    def __init__(self, dates: Sequence[Place]) -> None:
        planes = _lazy_planes(dates)
        self.bands = planes[2].shape[0]
        """Of the images."""
        self._keys = [(array.name, *(0 for _ in array.shape[:-2])) for array in planes]
        self._edges = [np.cumsum([0, *chunks]).tolist() for chunks in planes[0].chunks]
        first, *_ = optimize(*planes)  # it carries the tasks of all
        self._graph = dict(first.__dask_graph__())

    def compute(self, plane: int, row: int, col: int) -> Pixels:
        """Return one block of a plane, (..., y, x), by its place among the blocks."""
        (block,) = _computed(self._graph, [(*self._keys[plane], row, col)])
        return block

    def under(self, window: Window) -> Iterator[tuple[int, int]]:
        """Places of the blocks that hold a window's pixels."""
        rows, cols = (
            range(bisect_right(edges, start) - 1, bisect_left(edges, min(start + window.size, edges[-1])))
            for edges, start in zip(self._edges, (window.row, window.col), strict=True)
        )
        return product(rows, cols)

    def copy(self, block: Pixels, row: int, col: int, window: Window, pixels: Pixels) -> None:
        """Copy what a block (..., y, x) holds of a window to where it belongs in the window's own (..., size, size)."""
        (y, to_y), (x, to_x) = (
            _overlap(edges[i], edges[i + 1], start, start + window.size)
            for edges, i, start in zip(self._edges, (row, col), (window.row, window.col), strict=True)
        )
        pixels[..., to_y, to_x] = block[..., y, x]


def _overlap(start: int, stop: int, other_start: int, other_stop: int) -> tuple[slice, slice]:
    """What two ranges share, counted from the start of each."""
    first, last = max(start, other_start), min(stop, other_stop)
    return slice(first - start, last - start), slice(first - other_start, last - other_start)
