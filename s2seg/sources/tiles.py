"""Read pixels of remote TIFFs without GDAL, where they are laid out as published scenes are.

GDAL reads a header from memory and says where each tile lies. The tiles are fetched (:mod:`s2seg.sources.ranges`) and
decoded here: all that a window needs at once, each one for every window that needs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import rasterio
from affine import Affine
from rasterio.errors import RasterioError
from rasterio.io import MemoryFile
from rasterio.windows import Window

from s2seg.sources.ranges import RangeError, RemoteFile, forget_servers, usable
from s2seg.sources.shelf import Shelf

_HEADER = 32_768
"""Bytes that are fetched first: in blocks of 256 px a full tile's header is 20 KB."""

_LONGEST = 2**20
"""Bytes of the longest header that is fetched."""

_ROOM = 64 * 2**20
"""Bytes of decoded tiles that are kept for the windows beside."""

_LAYOUTS = 32 * 2**20
"""Bytes of layouts that are kept: of 5000 full tiles in blocks of 1024 px, or 900 in blocks of 256 px."""

Cell = tuple[int, int]
"""Row and column of a tile among those of its file."""


_SIZES = np.array([0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8, 0])
"""Bytes of a value, by the number of its type in a TIFF."""


@dataclass(frozen=True, eq=False)
class Layout:
    """How a TIFF of one band lays out its pixels, and where they lie on the map.

    Parameters
    ----------
    height, width, transform, crs
        As rasterio has them.
    dtype
        Of a pixel, in the file's byte order.
    block
        Rows and columns of a tile; a strip is one as wide as the image.
    deflated, differences
        Whether tiles are compressed, and whether they hold what each pixel adds to the one before in its row.
    starts, ends
        (tiles down, tiles across) int64: where the bytes of each tile lie.
    """

    height: int
    width: int
    transform: Affine
    crs: Any
    dtype: np.dtype[Any]
    block: tuple[int, int]
    deflated: bool
    differences: bool
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """About what it takes of memory."""
        return 4096 + self.starts.nbytes + self.ends.nbytes


def header_length(start: bytes) -> int:
    """Tell where the first directory of a TIFF ends, and all that it refers to (TIFF 6.0, section 2; BigTIFF).

    Raises
    ------
    ValueError
        If it does not stand in these first bytes of the file.
    """
    order, version = {b"II": "<", b"MM": ">"}.get(start[:2]), start[2:4].strip(b"\0")
    if order is None or version not in (b"*", b"+"):
        raise ValueError("not a TIFF")
    wide = "u8" if version == b"+" else "u4"
    at = int(np.frombuffer(start, order + wide, 1, 8 if wide == "u8" else 4)[0])
    counter = np.dtype(order + ("u8" if wide == "u8" else "u2"))
    entry = np.dtype([("tag", order + "u2"), ("type", order + "u2"), ("count", order + wide), ("value", order + wide)])
    count = int(np.frombuffer(start, counter, 1, at)[0])
    entries = np.frombuffer(start, entry, count, at + counter.itemsize)
    sizes = _SIZES[np.minimum(entries["type"], len(_SIZES) - 1)] * entries["count"].astype(np.int64)
    ends = entries["value"].astype(np.int64) + sizes
    return max([at + counter.itemsize + entries.nbytes, *ends[sizes > entry["value"].itemsize].tolist()])


def layout_of(header: bytes) -> Layout | None:
    """Tell the layout by the header of a file; None where GDAL must decode it.

    Raises
    ------
    RasterioError
        If it is not the header of a TIFF.
    """
    with (
        rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"),
        MemoryFile(header) as memory,
        memory.open(driver="GTiff") as dataset,
    ):
        structure = dataset.tags(ns="IMAGE_STRUCTURE")
        compression, predictor = structure.get("COMPRESSION"), structure.get("PREDICTOR", "1")
        packed = "NBITS" in dataset.tags(1, ns="IMAGE_STRUCTURE")
        if dataset.count != 1 or dataset.dtypes[0] not in ("uint8", "uint16") or packed:
            return None
        if compression not in (None, "DEFLATE") or predictor not in ("1", "2"):
            return None
        starts, sizes = (_of_each_tile(dataset, what) for what in ("BLOCK_OFFSET", "BLOCK_SIZE"))
        if not (starts.all() and sizes.all()):  # a tile that is not stored
            return None
        dtype = np.dtype(dataset.dtypes[0]).newbyteorder(">" if header[:2] == b"MM" else "<")
        return Layout(
            dataset.height, dataset.width, dataset.transform, dataset.crs, dtype, dataset.block_shapes[0],
            compression is not None, predictor == "2", starts, starts + sizes,
        )  # fmt: skip


def _of_each_tile(dataset: rasterio.DatasetReader, what: str) -> npt.NDArray[np.int64]:
    """Return what GDAL says of each tile of the first band; 0 where it says nothing."""
    height, width = dataset.block_shapes[0]
    down, across = -(-dataset.height // height), -(-dataset.width // width)
    said = [dataset.get_tag_item(f"{what}_{x}_{y}", "TIFF", bidx=1) for y, x in product(range(down), range(across))]
    return np.array([int(number or 0) for number in said], np.int64).reshape(down, across)


class Tiles:
    """The pixels of one remote file; what rasterio's datasets have as well is named alike.

    Parameters
    ----------
    file
        Where the bytes come from.
    layout
        What they mean.
    """

    def __init__(self, file: RemoteFile, layout: Layout) -> None:
        self.file, self.layout = file, layout
        self.height, self.width, self.transform, self.crs = layout.height, layout.width, layout.transform, layout.crs

    def read(self, _band: int, window: Window, out: npt.NDArray[Any] | None = None) -> npt.NDArray[Any]:
        """Read a window that lies within the image.

        Raises
        ------
        RangeError
            If a tile cannot be fetched, or does not hold what it should.
        """
        rows, columns = window.toslices()
        if out is None:
            out = np.empty((rows.stop - rows.start, columns.stop - columns.start), self.layout.dtype.newbyteorder("="))
        height, width = self.layout.block
        cells = list(product(_touched(rows, height), _touched(columns, width)))
        tiles = _decoded.get([(self, cell) for cell in cells], self._fetch)
        whole = []
        for (row, column), tile in zip(cells, tiles, strict=True):
            to_rows, from_rows = _shared(rows, row * height, height)
            to_columns, from_columns = _shared(columns, column * width, width)
            part = out[to_rows, to_columns]
            part[:] = tile[from_rows, from_columns]
            if part.size == height * width:
                whole.append((self, (row, column)))
        _decoded.put_last(whole)  # no window beside this one needs them
        return out

    def _fetch(self, keys: list[tuple[Tiles, Cell]]) -> Iterator[npt.NDArray[Any]]:
        layout = self.layout
        ranges = [(int(layout.starts[cell]), int(layout.ends[cell])) for _, cell in keys]
        for (_, cell), (start, end), data in zip(keys, ranges, self.file.read(ranges), strict=True):
            if len(data) != end - start:
                raise RangeError(f"got {len(data)} bytes, expected {end - start}")
            yield self._decode(cell, data)

    def _decode(self, cell: Cell, data: memoryview) -> npt.NDArray[Any]:
        """Decode a tile, (rows, columns); the last strip of a file has fewer rows than others."""
        from deflate import DeflateError, zlib_decompress

        layout = self.layout
        rows, columns = layout.block
        try:
            raw = zlib_decompress(data, rows * columns * layout.dtype.itemsize) if layout.deflated else bytes(data)
        except DeflateError as error:
            raise RangeError(f"tile {cell} cannot be decompressed: {error}") from error
        needed = min(rows, layout.height - cell[0] * rows)
        if len(raw) < needed * columns * layout.dtype.itemsize:
            raise RangeError(f"tile {cell} holds {len(raw)} bytes")
        pixels = np.frombuffer(raw, layout.dtype).reshape(-1, columns)
        return np.add.accumulate(pixels, axis=1, dtype=layout.dtype.newbyteorder("=")) if layout.differences else pixels


def _touched(along: slice, size: int) -> range:
    """Tiles along one axis of which a window shows something."""
    return range(along.start // size, -(-along.stop // size))


def _shared(along: slice, start: int, size: int) -> tuple[slice, slice]:
    """What a window and a tile share along one axis: counted in the window, and in the tile."""
    first, last = max(along.start, start), min(along.stop, start + size)
    return slice(first - along.start, last - along.start), slice(first - start, last - start)


_decoded: Shelf[tuple[Tiles, Cell], npt.NDArray[Any]] = Shelf(_ROOM, lambda tile: tile.nbytes)
_files: Shelf[tuple[str, str | None], Tiles | None] = Shelf(_LAYOUTS, lambda made: made.layout.nbytes if made else 512)


def tiles_of(href: str, sign: str | None = None) -> Tiles | None:
    """Open a remote file; None where GDAL must read it, which is found out once.

    Parameters
    ----------
    href
        Its address, unsigned.
    sign
        Dotted path of the function that signs it, or None.
    """
    return _files.get([(href, sign)], _open)[0] if usable() else None


def forget_tiles() -> None:
    """Connect, open files and decode their tiles anew when they are read next."""
    forget_servers()
    _files.clear()
    _decoded.clear()


def _open(names: list[tuple[str, str | None]]) -> Iterator[Tiles | None]:
    for name in names:
        file = RemoteFile(*name)
        try:
            layout = layout_of(_header(file))
        except (RangeError, RasterioError, ValueError):  # if it is not to be read at all, GDAL says why
            layout = None
        yield Tiles(file, layout) if layout else None


def _header(file: RemoteFile) -> bytes:
    (start,) = file.read([(0, _HEADER)])
    length = header_length(bytes(start))
    if length > _LONGEST:
        raise RangeError(f"its header takes {length} bytes")
    if length > len(start):
        (start,) = file.read([(0, length)])
    return bytes(start)
