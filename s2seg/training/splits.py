"""Which pixels train, which validate, which test: by place, never by random chips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import dask.array as da
import numpy as np
import numpy.typing as npt
import odc.geo.xr  # noqa: F401  registers .odc
import xarray as xr
from dask.base import compute
from dask.delayed import delayed
from scipy import ndimage

from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.training.cutting import Place

if TYPE_CHECKING:
    from affine import Affine
    from shapely.geometry.base import BaseGeometry

PARTS = ("train", "validation", "test")
"""Parts of a split, in the order of their codes: the first is 1; 0 is no part."""

_DRAWS = 200
_COMMON = 0.01  # a class of this share of the labels should be in every part
_TOLERANCE = 0.05  # how far the parts' shares may be from those asked

Parts = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]
"""(part + 1, 256) int64: pixels by the code of their part, 0 for none, and of their label."""


@runtime_checkable
class Counted(Place, Protocol):
    """A place that may know how many labels each part has: who drew its split has counted them."""

    @property
    def counted(self) -> Counts | None:
        """None where they must be counted."""


@dataclass(frozen=True)
class SplitSpec:
    """How places are divided.

    Parameters
    ----------
    by
        ``blocks`` of pixels, whole ``area`` s, or given ``geometries``.
    block
        Pixels on a side of a block.
    fractions
        Of the labelled pixels, for train, validation and test; they sum to 1. For blocks.
    buffer
        Pixels on each side of a border between parts that belong to no part.
    seed
        Of the draw of blocks.
    geometries
        Part -> vector file. What lies in none of them trains, unless a file says what does. Where they overlap, test
        wins over validation, and validation over train.

    Raises
    ------
    InputError
        For numbers out of range, or names that are no part.
    """

    by: Literal["blocks", "area", "geometries"] = "blocks"
    block: int = 256
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    buffer: int = 0
    seed: int = 0
    geometries: Mapping[str, str | Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.block < 1 or self.buffer < 0:
            raise InputError(f"blocks of {self.block} pixels with a buffer of {self.buffer} make no sense")
        if min(self.fractions) < 0 or abs(sum(self.fractions) - 1) > 1e-6 or not self.fractions[0]:
            raise InputError(f"the fractions of a split must sum to 1, with some for training, not {self.fractions}")
        if unknown := set(self.geometries) - set(PARTS):
            raise InputError(f"{min(unknown)!r} is no part of a split: choose {', '.join(PARTS)}")
        if self.by == "geometries" and not self.geometries:
            raise InputError("a split by geometries needs a vector file for validation, such as {validation: v.gpkg}")

    @property
    def required(self) -> tuple[str, ...]:
        """Parts that must not be empty: validation always, test where it was asked for."""
        asked = {"blocks": self.fractions[2] > 0, "area": False, "geometries": "test" in self.geometries}[self.by]
        return PARTS if asked else PARTS[:2]


# -- by blocks --------------------------------------------------------------------------------------------------------


def split_by_blocks(
    labels: xr.DataArray, spec: SplitSpec, classes: Sequence[int]
) -> tuple[xr.DataArray, Counts | None]:
    """Divide an area into square blocks and give each to one part.

    The labels are counted once, chunk by chunk. Of up to 200 random orders the first is taken in which the parts'
    shares of the labelled pixels are within 5 points of those asked, every class of at least 1 % of the labels is in
    each part, and every class at all is in train; otherwise the one that comes closest. It depends on the seed and on
    the labels, not on how they are chunked.

    Parameters
    ----------
    labels
        (y, x) uint8 legend codes.
    spec
        Block, fractions, buffer and seed.
    classes
        The legend's codes; other values are not labels.

    Returns
    -------
    DataArray
        (y, x) uint8, lazy, with the chunks and coordinates of the labels: 0 for the buffer and for blocks without
        labels, else the part's code.
    ndarray or None
        How many labels of each class that gives each part; None if there is a buffer, which takes some away.
    """
    counts = count_blocks(labels, spec.block, classes)
    table = assign(counts, spec)
    split = _lazy_parts(labels, partial(_block_parts, table=table, block=spec.block), spec.buffer)
    if spec.buffer:
        return split, None
    counted = np.zeros((len(PARTS) + 1, 256), np.int64)
    for part, of_part in enumerate(counted):
        of_part[list(classes)] = counts[table == part].sum(axis=0)
    return split, counted


def count_blocks(labels: xr.DataArray, block: int, classes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Count labelled pixels: (block row, block column, class) int64, blocks counted from the array's origin."""
    data = da.asarray(labels.transpose("y", "x").data)
    counts = np.zeros((*(-(-n // block) for n in data.shape), len(classes)), np.int64)
    chunks = data.to_delayed()
    starts = [np.cumsum([0, *c[:-1]]) for c in data.chunks]
    tasks = [
        delayed(_count_chunk)(chunks[i], int(starts[0][i[0]]), int(starts[1][i[1]]), block, tuple(classes))
        for i in np.ndindex(chunks.shape)
    ]
    for row, col, part in compute(*tasks):
        counts[row : row + part.shape[0], col : col + part.shape[1]] += part
    return counts


def _count_chunk(
    labels: npt.NDArray[np.uint8], row: int, col: int, block: int, classes: tuple[int, ...]
) -> tuple[int, int, npt.NDArray[np.int64]]:
    """Blocks that a chunk at (row, col) touches: the first one's place, and (row, column, class) counts."""
    by, bx = (_pieces(start, n, block) for n, start in zip(labels.shape, (row, col), strict=True))
    counts = [[_histogram(labels[y, x])[list(classes)] for x in bx] for y in by]
    return row // block, col // block, np.array(counts)


def _pieces(start: int, length: int, block: int) -> list[slice]:
    """Parts of [start, start + length) that lie in one block each, as slices from the start on."""
    edges = [start, *range((start // block + 1) * block, start + length, block), start + length]
    return [slice(a - start, b - start) for a, b in pairwise(edges)]


def _histogram(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    return np.bincount(values.ravel(), minlength=256)


def assign(counts: npt.NDArray[np.int64], spec: SplitSpec) -> Parts:
    """Give each block with labels to a part: (block row, block column, class) counts -> (row, column) uint8."""
    labelled = np.flatnonzero(counts.sum(axis=2))
    blocks = counts.reshape(-1, counts.shape[2])[labelled]
    table = np.zeros(counts.shape[:2], np.uint8)
    if len(labelled):
        table.flat[labelled] = _draw(blocks, np.array(spec.fractions), np.random.default_rng(spec.seed))
    return table


def _draw(blocks: npt.NDArray[np.int64], fractions: npt.NDArray[np.float64], rng: np.random.Generator) -> Parts:
    best, least = np.zeros(len(blocks), np.uint8), None
    for _ in range(_DRAWS):
        parts = deal(blocks.sum(axis=1), fractions, rng.permutation(len(blocks)))
        faults = _faults(blocks, parts, fractions)
        if least is None or faults < least:
            best, least = parts, faults
        if not any(faults[:-1]):
            break
    return best


def deal(pixels: npt.NDArray[np.int64], fractions: npt.NDArray[np.float64], order: npt.NDArray[np.int64]) -> Parts:
    """Give each block in turn to the part that lacks most; every part that is asked for gets one first.

    Parameters
    ----------
    pixels
        (block,) int64: how much each block weighs.
    fractions
        (3,) float64: what train, validation and test ask for.
    order
        (block,) int64: a permutation.

    Returns
    -------
    ndarray
        (block,) uint8: codes of the parts.
    """
    missing = fractions * pixels.sum()
    parts = np.zeros(len(pixels), np.uint8)
    first = [i for i in range(len(PARTS)) if fractions[i]]
    for turn, block in enumerate(order):
        part = first[turn] if turn < len(first) else int(missing.argmax())
        parts[block] = part + 1
        missing[part] -= pixels[block]
    return parts


class _Faults(NamedTuple):
    """What is wrong with a draw, worst first; compared in this order."""

    lost: int  # classes that train lacks
    absent: int  # common classes that a part lacks, counted over the parts
    off: bool  # shares are not what was asked
    error: float  # by how much at most


def _faults(blocks: npt.NDArray[np.int64], parts: Parts, fractions: npt.NDArray[np.float64]) -> _Faults:
    counts = np.stack([blocks[parts == i + 1].sum(axis=0) for i in range(len(PARTS))])
    classes = counts.sum(axis=0)
    common = classes >= max(1, _COMMON * classes.sum())
    error = float(np.abs(counts.sum(axis=1) / classes.sum() - fractions).max())
    return _Faults(
        lost=int(((counts[0] == 0) & (classes > 0)).sum()),
        absent=int((counts[fractions > 0][:, common] == 0).sum()),
        off=error > _TOLERANCE,
        error=error,
    )


def _block_parts(rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64], table: Parts, block: int) -> Parts:
    """Parts of the pixels in these rows and columns; outside the area there is none."""
    framed = np.pad(table, 1)
    down, across = (np.clip(i // block, -1, n) + 1 for i, n in zip((rows, cols), table.shape, strict=True))
    return framed.take(down, axis=0).take(across, axis=1)


# -- by area and by geometries ----------------------------------------------------------------------------------------


def split_by_area(labels: xr.DataArray, part: str) -> xr.DataArray:
    """Give a whole area to one part: (y, x) uint8, lazy, like the labels.

    Raises
    ------
    InputError
        For a name that is no part.
    """
    if part not in PARTS:
        raise InputError(f"{part!r} is no part of a split: choose {', '.join(PARTS)}")
    data = da.asarray(labels.transpose("y", "x").data)
    whole = da.full(data.shape, PARTS.index(part) + 1, dtype=np.uint8, chunks=data.chunks)
    return _like(labels, whole)


def split_by_geometries(labels: xr.DataArray, spec: SplitSpec) -> xr.DataArray:
    """Divide an area by vector files: a pixel belongs to the part that its centre lies in.

    Parameters
    ----------
    labels
        (y, x) uint8 legend codes with a geobox.
    spec
        Geometries and buffer.

    Returns
    -------
    DataArray
        (y, x) uint8, lazy, with the chunks and coordinates of the labels: 0 for the buffer, else the part's code.

    Raises
    ------
    InputError
        If a file cannot be read, is empty, or has no CRS.
    """
    geobox = labels.odc.geobox
    shapes = {
        code: _geometry(Path(spec.geometries[part]), geobox.crs)
        for code, part in enumerate(PARTS, 1)
        if part in spec.geometries
    }
    rest = 0 if "train" in spec.geometries else 1
    parts = partial(_drawn_parts, shapes=shapes, rest=rest, transform=geobox.affine)
    return _lazy_parts(labels, parts, spec.buffer)


def _geometry(path: Path, crs: Any) -> BaseGeometry:
    """All features of a file as one geometry in the given CRS."""
    try:
        import geopandas
        from pyogrio.errors import DataSourceError
    except ImportError as error:
        raise InputError("a split by geometries needs geopandas: pip install 's2seg[train]'") from error
    try:
        frame = geopandas.read_file(path)
    except (DataSourceError, OSError) as error:
        raise InputError(f"split.geometries: {path} cannot be read: {' '.join(str(error).split())}") from error
    if frame.crs is None:
        raise InputError(f"split.geometries: {path} has no CRS; save it with one")
    shapes = frame.geometry.dropna()
    if shapes.is_empty.all():
        raise InputError(f"split.geometries: {path} holds no geometry")
    return shapes.make_valid().to_crs(str(crs)).union_all()


def _drawn_parts(
    rows: npt.NDArray[np.int64],
    cols: npt.NDArray[np.int64],
    shapes: Mapping[int, BaseGeometry],
    rest: int,
    transform: Affine,
) -> Parts:
    from affine import Affine
    from rasterio.features import rasterize

    shape = (len(rows), len(cols))
    here = transform @ Affine.translation(float(cols[0]), float(rows[0]))
    parts: Parts = rasterize(
        [(geometry, code) for code, geometry in shapes.items()],
        out_shape=shape,
        transform=here,
        fill=rest,
        dtype="uint8",
    )
    return parts


# -- lazy -------------------------------------------------------------------------------------------------------------


def _lazy_parts(labels: xr.DataArray, parts: Any, buffer: int) -> xr.DataArray:
    """Compute the parts chunk by chunk from the pixels' positions, with what the buffer sees around each chunk."""
    chunks = da.asarray(labels.transpose("y", "x").data).chunks
    rows, cols = (da.arange(sum(c), chunks=(c,), dtype=np.int64) for c in chunks)
    data = da.map_blocks(
        _parts_block,
        rows[:, None],
        cols[None, :],
        parts=parts,
        buffer=buffer,
        chunks=chunks,
        dtype=np.uint8,
        meta=np.empty((0, 0), np.uint8),
    )
    return _like(labels, data)


def _parts_block(rows: npt.NDArray[np.int64], cols: npt.NDArray[np.int64], parts: Any, buffer: int) -> Parts:
    around = [np.arange(i[0] - buffer, i[-1] + buffer + 1) for i in (rows.ravel(), cols.ravel())]
    found: Parts = parts(*around)
    if not buffer:
        return found
    kept = _without_borders(found, buffer)
    return kept[buffer:-buffer, buffer:-buffer]


def _without_borders(parts: Parts, buffer: int) -> Parts:
    """Set to 0 what lies within ``buffer`` pixels (in rows or columns) of another part."""
    width = 2 * buffer + 1
    highest = ndimage.maximum_filter(parts, width, mode="constant", cval=0)
    lowest = ndimage.minimum_filter(np.where(parts, parts, np.uint8(255)), width, mode="constant", cval=255)
    return np.where((highest == parts) & (lowest == parts), parts, np.uint8(0))


def _like(labels: xr.DataArray, data: da.Array) -> xr.DataArray:
    return xr.DataArray(data, dims=("y", "x"), coords=labels.transpose("y", "x").coords, name="split")


# -- check ------------------------------------------------------------------------------------------------------------


def check_split(
    regions: Sequence[Place], legend: Legend, required: Sequence[str] = PARTS[:2]
) -> dict[str, dict[int, int]]:
    """Count the labels in each part, and refuse a split that cannot teach or cannot tell.

    Parameters
    ----------
    regions
        Dates of one area share labels and split, and count once. Those that are :class:`Counted` may be spared it.
    legend
        Of the labels.
    required
        Parts that must have labels; :attr:`SplitSpec.required` says which.

    Returns
    -------
    dict
        Part -> class code -> pixels, for all parts and all classes of the legend.

    Raises
    ------
    InputError
        If nothing is labelled, all labels are of one class, a required part has none, or train lacks a class.
    """
    counts = np.zeros((len(PARTS) + 1, 256), np.int64)
    for region in {r.name: r for r in regions}.values():
        known = region.counted if isinstance(region, Counted) else None
        counts += _count_parts(region) if known is None else known
    counts = counts[:, list(legend.codes)]
    totals = counts.sum(axis=0)
    present = [c for c, n in zip(legend.classes, totals, strict=True) if n]
    if not present:
        raise InputError("no pixel is labelled: check that the labels overlap the scene and match the legend")
    if len(present) == 1:
        raise InputError(f"all labels are {present[0].name!r}: a model needs at least two classes to tell apart")
    for part in required:
        if not counts[PARTS.index(part) + 1].any():
            raise InputError(
                f"the {part} part of the split has no labels; try another split.seed, a smaller split.block or "
                "split.buffer, or more areas or tiles; a test part is left out with a share of 0 in split.fractions"
            )
    lost = [c.name for c in present if not counts[1, legend.codes.index(c.code)]]
    if lost:
        raise InputError(
            f"no label of {', '.join(map(repr, lost))} is in train; try another split.seed or a smaller split.block, "
            "or drop the class with remap"
        )
    return {p: dict(zip(legend.codes, counts[i].tolist(), strict=True)) for i, p in enumerate(PARTS, 1)}


def _count_parts(region: Place) -> Counts:
    labels = da.asarray(region.labels.transpose("y", "x").data)
    split = da.asarray(region.split.transpose("y", "x").data).rechunk(labels.chunks)
    tasks = [
        delayed(_count_parts_chunk)(a, b)
        for a, b in zip(split.to_delayed().ravel(), labels.to_delayed().ravel(), strict=True)
    ]
    return np.sum(compute(*tasks), axis=0)


def _count_parts_chunk(split: Parts, labels: npt.NDArray[np.uint8]) -> Counts:
    lowest, highest = int(split.min()), int(split.max())
    counts = np.zeros((len(PARTS) + 1, 256), np.int64)
    for part in range(lowest, highest + 1):
        counts[part] = _histogram(labels if lowest == highest else labels[split == part])
    return counts
