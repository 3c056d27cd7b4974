"""Arrays of a chip store as the files that they are: written whole, mapped into memory to be read."""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Iterable
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
import zarr

from s2seg.errors import InputError

_MAPPED = 256  # files of an array that a process keeps open
_NO_CHIP = 2**64 - 1  # what Zarr's index of a shard says of a chunk that is not there
_RANDOM, _SOON = (getattr(mmap, f"MADV_{name}", None) for name in ("RANDOM", "WILLNEED"))  # where systems know them


class ShardedPixels:
    """An array of a store without the ways of Zarr, which copies what it writes and opens a file for every chip.

    A shard is a file: its chips one after the other, then where each begins and how long it is (Zarr v3,
    ``sharding_indexed``), and a checksum of that.

    Parameters
    ----------
    store
        Folder of the Zarr group.
    array
        (n, ...) of it, one chip to a chunk, without compression.
    """

    def __init__(self, store: Path, array: zarr.Array[Any]) -> None:
        self.array = array
        self._folder, self._dtype = store / array.path, array.dtype.newbyteorder("<")
        self._nbytes = self._dtype.itemsize * math.prod(array.shape[1:])
        self._per_shard: int = (array.shards or array.chunks)[0]
        self._mapped = functools.lru_cache(_MAPPED)(self._map)

    def read(self, slots: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
        """Copy chips, (n, ...), into memory of their own.

        Raises
        ------
        InputError
            If their file is missing or too short.
        """
        chips = np.empty((len(slots), *self.array.shape[1:]), self.array.dtype)
        places = [divmod(slot, self._per_shard) for slot in slots.tolist()]
        for number, at in places:  # from a disk, all of them come at once
            self._mapped(number).expect(at)
        for chip, (number, at) in zip(chips, places, strict=True):
            chip[...] = self._mapped(number).chips[at]
        return chips

    def write(self, first: int, chips: Iterable[npt.NDArray[Any]]) -> None:
        """Store chips, as they come, in slots that follow one another; each is copied once, into its file."""
        for number, places in groupby(enumerate(chips, first), lambda place: place[0] // self._per_shard):
            with self._opened(number) as file:
                for slot, chip in places:
                    pixels = np.ascontiguousarray(chip, self._dtype)
                    _write_at(file, slot % self._per_shard * self._nbytes, pixels.reshape(-1).view(np.uint8).data)

    def finish(self, count: int) -> None:
        """Complete the files and the array, of which ``count`` slots are filled."""
        for number, first in enumerate(range(0, count, self._per_shard)):
            held = min(self._per_shard, count - first)
            with self._opened(number) as file:
                _write_at(file, held * self._nbytes, memoryview(self._index(held)))
        self.array.resize((count, *self.array.shape[1:]))

    def _opened(self, number: int) -> FileIO:
        """Open the file of a shard to write to it; the chips that it holds stay."""
        path = self._file(number)
        try:
            return path.open("r+b", buffering=0)
        except FileNotFoundError:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("wb", buffering=0)

    def _index(self, count: int) -> bytes:
        index = np.full((self._per_shard, 2), _NO_CHIP, "<u8")
        index[:count, 0] = np.arange(count) * self._nbytes
        index[:count, 1] = self._nbytes
        return index.tobytes() + google_crc32c.value(index.tobytes()).to_bytes(4, "little")

    def _file(self, number: int) -> Path:
        return self._folder / self.array.metadata.encode_chunk_key((number, *(0 for _ in self.array.shape[1:])))

    def _map(self, number: int) -> _Shard:
        file = self._file(number)
        count = min(self._per_shard, self.array.shape[0] - number * self._per_shard)
        try:
            return _Shard(file, (count, *self.array.shape[1:]), self._dtype)
        except (OSError, ValueError) as error:  # it is not there, or too short
            raise InputError(f"chips are missing from {file}; make the store anew with --overwrite") from error


def _write_at(file: FileIO, offset: int, data: memoryview) -> None:
    file.seek(offset)
    while data:  # a system call writes as much as it likes
        data = data[file.write(data) :]


class _Shard:
    """The chips of a file, mapped into memory; the system reads the chips that are asked for, and no others.

    Left alone it reads megabytes around each, which chips in random order seldom meet: 7 times as long from a disk.
    """

    def __init__(self, file: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        with file.open("rb") as source:
            self._map = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        self.chips = np.frombuffer(self._map, dtype, math.prod(shape)).reshape(shape)
        self._advise(_RANDOM)

    def expect(self, index: int) -> None:
        """Tell the system that a chip is about to be read; it begins at once, and nobody waits."""
        size = self.chips[0].nbytes
        start = index * size // mmap.PAGESIZE * mmap.PAGESIZE
        self._advise(_SOON, start, (index + 1) * size - start)

    def _advise(self, what: int | None, *where: int) -> None:
        if what is not None:
            self._map.madvise(what, *where)
