"""Lazy scenes -> windows in memory, each source pixel computed once and little of the area held at a time.

Blocks are computed ahead in parallel and visited row by row. What later windows still need of them is carried along:
a strip above the current row of blocks, a tail left of the current block. Memory is therefore some blocks and one strip
as high as a window, whatever the area's height.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.system import CPU_COUNT

Planes = npt.NDArray[np.uint16]
"""(band + 2, y, x): the image, then the labels, then the parts of the split."""


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


def cut(
    place: Place, sizes: Sequence[tuple[int, int]], nodata: int
) -> Generator[list[tuple[Window, Planes]], None, None]:
    """Visit the blocks of an area and hand out the windows that each completes.

    Parameters
    ----------
    place
        Scene, labels and split on one grid, lazy or not.
    sizes
        (window, stride) in pixels.
    nodata
        The labels' code for "no data".

    Yields
    ------
    list of (Window, ndarray)
        One list per block, in row-major order, maybe empty. The planes are a view, good until the next block: (band +
        2, y, x) uint16, cropped where the window reaches beyond the area. A pixel without data in any band is 0 in
        all of them, and unlabelled.
    """
    planes = _planes(place, nodata)
    depth, _, width = planes.shape
    rows, cols = (_Axis(chunks, sizes) for chunks in planes.chunks[1:])
    strip = np.empty((depth, 0, width), np.uint16)
    with closing(_computed_ahead(planes)) as blocks:
        for r in range(len(rows)):
            below = np.empty((depth, rows.stop(r) - rows.kept(r), width), np.uint16)
            tail = np.empty((depth, rows.stop(r) - rows.base(r), 0), np.uint16)
            for c in range(len(cols)):
                across = slice(cols.start(c), cols.stop(c))
                column = _joined(strip[..., across], next(blocks), axis=1)
                below[..., across] = column[:, rows.kept(r) - rows.base(r) :]
                canvas = _joined(tail, column, axis=2)
                yield [
                    (Window(row, col, size), _view(canvas, row - rows.base(r), col - cols.base(c), size))
                    for size, _ in sizes
                    for row, col in product(rows.completed(r, size), cols.completed(c, size))
                ]
                tail = canvas[..., cols.kept(c) - cols.base(c) :]
            strip = below


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


def _joined(kept: Planes, new: Planes, axis: int) -> Planes:
    """Put what was kept before what is new; where windows do not overlap nothing is kept, and nothing is copied."""
    return np.concatenate([kept, new], axis=axis) if kept.shape[axis] else new


def _view(canvas: Planes, row: int, col: int, size: int) -> Planes:
    return canvas[:, row : row + size, col : col + size]


def _planes(place: Place, nodata: int) -> da.Array:
    """(band + 2, y, x) uint16, lazy, cut like the scene."""
    scene = place.scene.transpose("band", "y", "x")
    image = da.asarray(scene.data).rechunk({0: -1})
    labels, split = (
        da.asarray(plane.transpose("y", "x").data).rechunk(image.chunks[1:])[None]
        for plane in (place.labels, place.split)
    )
    return da.map_blocks(
        _planes_block,
        image,
        labels,
        split,
        nodata=nodata,
        dtype=np.uint16,
        chunks=((image.shape[0] + 2,), *image.chunks[1:]),
        meta=np.empty((0, 0, 0), np.uint16),
    )


def _planes_block(
    image: npt.NDArray[np.uint16], labels: npt.NDArray[np.uint8], split: npt.NDArray[np.uint8], nodata: int
) -> Planes:
    planes = np.empty((len(image) + 2, *image.shape[1:]), np.uint16)
    planes[:-2], planes[-2], planes[-1] = image, labels[0], split[0]
    missing = (image == 0).any(axis=0)
    if missing.any():
        planes[:-2, missing] = 0
        planes[-2, missing] = nodata
    return planes


def _computed_ahead(planes: da.Array) -> Generator[Planes, None, None]:
    """Compute the blocks in row-major order, as many at a time as there are workers."""
    workers = dask.config.get("num_workers", None) or CPU_COUNT
    pending: deque[Future[Planes]] = deque()
    with ThreadPoolExecutor(workers, thread_name_prefix="blocks") as pool:
        try:
            for place in np.ndindex(planes.numblocks):
                pending.append(pool.submit(planes.blocks[place].compute))
                if len(pending) > workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
