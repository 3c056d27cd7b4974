"""Chips without a store of their pixels: read from the scenes, block by block, whenever they are asked for."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from s2seg.errors import InputError
from s2seg.training.chips import ChipStore, Images, Labels, describe, one_chip
from s2seg.training.config import TrainConfig
from s2seg.training.cutting import Blocks, Pixels, Place, Planes, Window, dates_together, workers
from s2seg.training.regions import open_places

_CACHE_BYTES = 2**30
_LABELS, _SPLIT, _IMAGES = 0, 1, 2
"""Planes of an area's blocks; from 2 on, the image of each date."""


class StreamedChips(ChipStore):
    """The chips that :func:`~s2seg.training.chips.write_chips` chose, to the bit, with pixels read from the scenes.

    All blocks that a batch needs are computed side by side, each of them once, in as many threads as dask is told to
    use. The latest ones are kept: 1 GiB of them in a process, whatever the area. To this comes what is being computed,
    a block for each thread, as when chips are cut. An area that fits is computed once; since chips come in random
    order, most blocks of one that is much larger are computed again for every batch.

    Parameters
    ----------
    path
        The index: a chip store without pixels.
    config
        What it was made from.
    places
        Its regions or tiles. By default they are opened when the first chip is read, as in each of several processes
        that train together.

    Raises
    ------
    InputError
        If there is no chip store at ``path``; when a chip is read, if the scenes or labels are not those that it was
        chosen from.
    """

    def __init__(self, path: str | Path, config: TrainConfig, places: Sequence[Place] | None = None) -> None:
        super().__init__(path)
        self._config, self._places = config, places
        self._areas: dict[int, Blocks] = {}
        self._cache = _Cache(_CACHE_BYTES)

    def __reduce__(self) -> tuple[type[StreamedChips], tuple[Path, TrainConfig]]:  # type: ignore[override]
        return StreamedChips, (self.path, self._config)

    def images(self, indices: int | slice | npt.ArrayLike) -> Images:
        """(n, band, size, size) uint16 DN, 0 is nodata; a single index gives n = 1."""
        return self.read(indices)[0]

    def labels(self, indices: int | slice | npt.ArrayLike) -> Labels:
        """(n, size, size) uint8 legend codes."""
        return self.read(indices)[1]

    def read(self, indices: int | slice | npt.ArrayLike) -> tuple[Images, Labels]:
        """Both, from the same blocks."""
        chips = np.atleast_1d(np.arange(len(self))[cast(Any, indices)]).tolist()
        canvases = [self._canvas(chip) for chip in chips]
        wanted: dict[_Block, list[_Canvas]] = defaultdict(list)
        for canvas in canvases:
            for block in canvas.blocks(self._blocks(canvas.area)):
                wanted[block].append(canvas)
        with ThreadPoolExecutor(workers(), thread_name_prefix="blocks") as pool:
            for _ in pool.map(self._paint, wanted, wanted.values()):
                pass  # a failure is raised here
        size = self.spec.size
        images = np.empty((len(chips), len(self.bands), size, size), np.uint16)
        labels = np.empty((len(chips), size, size), np.uint8)
        for i, chip in enumerate(chips):
            images[i], labels[i] = self._chip(chip, canvases[i])
        return images, labels

    # -- areas ---------------------------------------------------------------------------------------------------------

    @cached_property
    def _dates(self) -> list[list[Place]]:
        """The regions, those that share labels and split together."""
        places = open_places(self._config) if self._places is None else self._places
        chosen: list[dict[str, Any]] = cast(Any, self._group.attrs["regions"])
        for then, now in zip_longest(chosen, map(describe, places)):
            if then != now:
                raise self._changed("{name} {date}".format(**(then or now)))
        return [[places[i] for i in group] for group in dates_together(places)]

    @cached_property
    def _at(self) -> list[tuple[int, int]]:
        """Area and date of each region."""
        return [(area, date) for area, dates in enumerate(self._dates) for date in range(len(dates))]

    def _blocks(self, area: int) -> Blocks:
        if area not in self._areas:
            self._areas[area] = Blocks(self._dates[area])
        return self._areas[area]

    def _changed(self, where: str) -> InputError:
        return InputError(
            f"the scenes or labels of {where.strip()} are not those from which the chips in {self.path} were chosen: "
            "train with --overwrite to choose them anew"
        )

    # -- chips ---------------------------------------------------------------------------------------------------------

    def _canvas(self, chip: int) -> _Canvas:
        region, row, col = self.origin[chip].tolist()
        area, date = self._at[region]
        size = int(self.size[chip])
        planes: dict[int, Pixels] = {
            _LABELS: np.full((size, size), self.legend.nodata, np.uint8),
            _SPLIT: np.zeros((size, size), np.uint8),
            _IMAGES + date: np.zeros((len(self.bands), size, size), np.uint16),
        }
        return _Canvas(area, Window(row, col, size), planes)

    def _paint(self, place: _Block, canvases: Sequence[_Canvas]) -> None:
        """Put a block on all canvases that show some of it."""
        blocks = self._areas[place.area]
        pixels = self._cache.get(place, lambda: blocks.compute(place.plane, place.row, place.col))
        for canvas in canvases:
            blocks.copy(pixels, place.row, place.col, canvas.window, canvas.planes[place.plane])

    def _chip(self, chip: int, canvas: _Canvas) -> tuple[Images, Labels]:
        labels, split, image = canvas.planes.values()
        found = one_chip(
            Planes(image, labels, split), canvas.window.size, int(self.part[chip]), self.spec, self.legend.nodata
        )
        counts = np.bincount(found[1].ravel(), minlength=256)[list(self.legend.codes)]
        if (counts != self.histogram[chip]).any():
            raise self._changed(f"{self.area[chip]} {self.date[chip]}")
        return found


class _Block(NamedTuple):
    """One block of one plane of an area."""

    area: int
    plane: int
    row: int
    col: int


@dataclass(frozen=True, eq=False)
class _Canvas:
    """A window of an area at one date, to be filled block by block: labels, split and image by their planes."""

    area: int
    window: Window
    planes: Mapping[int, Pixels]

    def blocks(self, of: Blocks) -> Iterator[_Block]:
        for row, col in of.under(self.window):
            for plane in self.planes:
                yield _Block(self.area, plane, row, col)


class _Cache:
    """Arrays that were made or asked for last, as many as a number of bytes holds."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._arrays: OrderedDict[_Block, Pixels] = OrderedDict()
        self._lock = Lock()

    def get(self, key: _Block, make: Callable[[], Pixels]) -> Pixels:
        """Return what is held, or make it; two threads that ask at once may both make it."""
        with self._lock:
            if key in self._arrays:
                self._arrays.move_to_end(key)
                return self._arrays[key]
        array = make()
        with self._lock:
            if key not in self._arrays:
                self._arrays[key] = array
                self._held += array.nbytes
            while self._held > self._most:
                _, oldest = self._arrays.popitem(last=False)
                self._held -= oldest.nbytes
        return array
