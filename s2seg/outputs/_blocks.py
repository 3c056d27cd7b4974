"""Compute the blocks of an array tile after tile, and know after an interruption which of them are done."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import dask
import dask.array as da
import numpy as np
import numpy.typing as npt
from dask.callbacks import Callback
from dask.core import flatten

from s2seg.client import current_client
from s2seg.outputs._files import writing
from s2seg.progress import Steps

Index = tuple[int, ...]


class Ledger:
    """Which blocks are done: in memory, and, if it has a file, there as well.

    Whoever submits the blocks keeps it, and nobody else: a block is entered when its task has ended, in one line. A
    line that was cut off, as by a kill, counts for nothing.

    Parameters
    ----------
    shape
        Blocks along each dimension.
    file, fingerprint
        Where the lines go, and what the blocks are made of. A file that is there already counts if it was kept of the
        same blocks.
    """

    def __init__(self, shape: Index, file: Path | None = None, fingerprint: str = "") -> None:
        self.done: npt.NDArray[np.bool_] = np.zeros(shape, np.bool_)
        self._file = file
        self._title = f"{fingerprint} {'x'.join(map(str, shape))}\n"
        if file is not None and file.exists():
            title, *lines = file.read_text().splitlines(keepends=True) or [""]
            if title == self._title:
                for line in lines:
                    if line.endswith("\n"):
                        self.done[tuple(map(int, line.split()))] = True

    def start(self) -> None:
        """Write the file, with what is done already."""
        if self._file is not None:
            with writing(self._file):
                self._file.write_text(self._title + "".join(map(_line, np.argwhere(self.done))))

    def enter(self, index: Index) -> None:
        """Note that a block is done."""
        self.done[index] = True
        if self._file is not None:
            with writing(self._file), self._file.open("a") as file:
                file.write(_line(index))

    def close(self) -> None:
        """Delete the file: all is done."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def _line(index: Iterable[int]) -> str:
    return " ".join(map(str, index)) + "\n"


def compute(blocks: da.Array, tile: tuple[int, int], ledger: Ledger, on_progress: Steps | None = None) -> None:
    """Compute every block that the ledger lacks, for what its task does, and enter it.

    Parameters
    ----------
    blocks
        Of one element each, along y and x at the end. It is computed wherever dask computes: threads, or the workers of
        the current client.
    tile
        Blocks (down, across) of what is submitted as one graph.
    ledger
        Of ``blocks.numblocks``.
    on_progress
        Called with (done, total) blocks, once at the start, and with each block that is done.
    """

    def step(index: Index) -> None:
        ledger.enter(index)
        tell()

    def tell() -> None:
        if on_progress is not None:
            on_progress(int(ledger.done.sum()), ledger.done.size)

    tell()
    tiles = _tiles(blocks, tile, ledger)
    client = current_client()
    if client is None:
        for part, indices in tiles:
            with _counting(indices, step):
                part.persist()  # compute would rename the key of a single block
    else:
        _compute_on_cluster(client, tiles, step)


_Tile = tuple[da.Array, Mapping[Any, Index]]
"""Blocks that are computed together, and where each task's block lies."""


def _tiles(blocks: da.Array, tile: tuple[int, int], ledger: Ledger) -> Iterator[_Tile]:
    """Cut the blocks into tiles, and each tile down to the box around what is to be done."""
    ny, nx = blocks.numblocks[-2:]
    for y in range(0, ny, tile[0]):
        for x in range(0, nx, tile[1]):
            window = ledger.done[..., y : y + tile[0], x : x + tile[1]]
            if window.all():
                continue
            box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(~window))
            first = [span.start for span in box]
            first[-2:] = y + first[-2], x + first[-1]
            part = blocks.blocks[
                tuple(slice(start, start + s.stop - s.start) for start, s in zip(first, box, strict=True))
            ]
            keys = flatten(part.__dask_keys__())
            yield part, {key: tuple(np.add(first, key[1:]).tolist()) for key in keys}


def _counting(indices: Mapping[Any, Index], step: Callable[[Index], None]) -> Callback:
    """Call ``step`` for each finished block of an array under one of dask's local schedulers."""
    return Callback(posttask=lambda key, *_: step(indices[key]) if key in indices else None)


def _compute_on_cluster(client: Any, tiles: Iterator[_Tile], step: Callable[[Index], None]) -> None:
    from distributed import as_completed, futures_of

    running = as_completed()
    held: dict[Any, Index] = {}

    def settle(limit: int) -> None:
        while len(held) > limit:
            future = next(running)
            index = held.pop(future)
            future.result()
            step(index)

    try:
        for part, indices in tiles:
            futures = futures_of(_persist(client, part))
            held.update({future: indices[future.key] for future in futures})
            running.update(futures)
            settle(len(futures) // 2)  # the next tile goes in when half of this one is done: no worker idles at its end
        settle(0)
    finally:
        client.cancel(list(held))


def _persist(client: Any, part: da.Array) -> da.Array:
    """Start one tile; its tasks are not fused where some are bound to workers, which dask would forget."""
    if any(layer.annotations for layer in part.dask.layers.values()):
        # here and not on the scheduler, which does not see this configuration
        with dask.config.set({"optimization.fuse.active": False, "optimization.annotations.fuse": False}):
            graph = part.__dask_optimize__(part.dask, part.__dask_keys__())
        unfused = da.Array(graph, part.name, part.chunks, meta=part._meta)
        return cast(da.Array, client.persist(unfused, optimize_graph=False))
    return cast(da.Array, client.persist(part))
