"""The confusion matrix: the one count of pixels that every score is computed from."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import odc.geo.xr  # noqa: F401  registers .odc
import xarray as xr
from dask.callbacks import Callback
from dask.core import flatten

from s2seg.errors import InputError
from s2seg.legend import Legend
from s2seg.progress import Steps

Codes = npt.NDArray[np.uint8]
Counts = npt.NDArray[np.int64]

_SAME_PLACE = 0.01  # pixels by which the coordinates of two grids may differ through rounding


@dataclass(frozen=True, eq=False)
class Confusion:
    """Pixels by what they are and what a map says they are; counts of several areas add up with ``+``.

    Averaging scores that were computed per chip or per block gives another, wrong number: add their counts instead.

    Parameters
    ----------
    legend
        The classes, in the order of rows and columns.
    matrix
        (truth, predicted) int64, pixels.
    unmapped
        (truth,) int64: labelled pixels for which the map has no answer (its nodata). They are in no row and in no
        score; without it there are none.

    Raises
    ------
    InputError
        If the shapes do not match the legend, or two matrices of different legends are added.
    """

    legend: Legend
    matrix: Counts
    unmapped: Counts = field(default=None)  # type: ignore[arg-type]  # __post_init__ makes it zeros

    def __post_init__(self) -> None:
        n = len(self.legend)
        matrix = np.array(self.matrix, np.int64)
        unmapped = np.zeros(n, np.int64) if self.unmapped is None else np.array(self.unmapped, np.int64)
        if matrix.shape != (n, n) or unmapped.shape != (n,):
            raise InputError(
                f"legend {self.legend.name!r} has {n} classes, so its confusion matrix is {n} x {n} "
                f"with {n} unmapped counts, not {matrix.shape} with {unmapped.shape}"
            )
        for name, counts in (("matrix", matrix), ("unmapped", unmapped)):
            counts.flags.writeable = False
            object.__setattr__(self, name, counts)

    def __add__(self, other: Confusion) -> Confusion:
        if not isinstance(other, Confusion):
            return NotImplemented
        if other.legend != self.legend:
            raise InputError(f"cannot add counts of legend {other.legend.name!r} to those of {self.legend.name!r}")
        return Confusion(self.legend, self.matrix + other.matrix, self.unmapped + other.unmapped)

    def __radd__(self, start: int) -> Confusion:
        """Let ``sum(confusions)`` start from its 0."""
        return self if start == 0 else NotImplemented

    @property
    def pixels(self) -> int:
        """Pixels that have both a label and an answer."""
        return int(self.matrix.sum())


def confusion(truth: Codes, predicted: Codes, legend: Legend) -> Confusion:
    """Count the pixels of two arrays of codes.

    Parameters
    ----------
    truth, predicted
        uint8 legend codes of one shape. Where the truth is nodata a pixel is ignored, whatever the prediction; where
        only the prediction is, it counts as unmapped.
    legend
        What the codes mean.

    Returns
    -------
    Confusion

    Raises
    ------
    InputError
        For arrays that are not uint8 or differ in shape, and for codes that the legend does not have; it lists them.

    Examples
    --------
    >>> import numpy as np
    >>> from s2seg.legend import Legend
    >>> legend = Legend.load("corine-1")
    >>> truth = np.array([[1, 1, 5], [5, 5, 0]], "uint8")
    >>> predicted = np.array([[1, 5, 5], [5, 0, 1]], "uint8")
    >>> counts = confusion(truth, predicted, legend)
    >>> counts.matrix[[0, 4]][:, [0, 4]].tolist(), int(counts.unmapped[4]), counts.pixels
    ([[1, 1], [0, 2]], 1, 4)
    """
    truth, predicted = np.asarray(truth), np.asarray(predicted)
    for what, codes in (("the truth", truth), ("the prediction", predicted)):
        if codes.dtype != np.uint8:
            raise InputError(f"{what} holds {codes.dtype}, not uint8 legend codes; convert it to codes first")
    if truth.shape != predicted.shape:
        raise InputError(f"the truth has {truth.shape} pixels and the prediction {predicted.shape}; cut them alike")
    return _from_counts(_joint(truth, predicted), legend)


def confusion_of(
    truth: xr.DataArray,
    predicted: xr.DataArray,
    legend: Legend,
    *,
    where: xr.DataArray | None = None,
    on_progress: Steps | None = None,
) -> Confusion:
    """Count the pixels of two lazy maps block by block; memory does not grow with the area.

    Parameters
    ----------
    truth, predicted
        (y, x) uint8 legend codes on one grid. Each block of the prediction is computed once; the truth is cut like it.
    legend
        What the codes mean.
    where
        (y, x) bool on the same grid: the pixels that count, such as those of the test split. All by default.
    on_progress
        Called with (done, total) blocks; on a dask cluster only once, at the end.

    Returns
    -------
    Confusion
        As :func:`confusion` of the whole arrays.

    Raises
    ------
    InputError
        For maps on different grids, and whatever :func:`confusion` refuses.
    """
    predicted = _lazy(predicted)
    check_same_grid(truth, predicted, "the truth", "the prediction")
    layers = [truth.transpose("y", "x"), predicted]
    if where is not None:
        check_same_grid(where, predicted, "the mask", "the prediction")
        layers.append(where.transpose("y", "x").astype(bool))
    arguments: list[Any] = []
    for layer in layers:
        arguments += [da.asarray(layer.data).rechunk(predicted.chunks), "yx"]
    n = len(legend)
    blocks = da.blockwise(
        _count_block,
        "yxtp",
        *arguments,
        legend=legend,
        new_axes={"t": n, "p": n + 1},
        adjust_chunks={"y": 1, "x": 1},
        dtype=np.int64,
        meta=np.empty((0,) * 4, np.int64),
    )
    counts = _compute(blocks, on_progress).sum(axis=(0, 1))
    return Confusion(legend, counts[:, :n], counts[:, n])


def check_same_grid(a: xr.DataArray, b: xr.DataArray, name_a: str, name_b: str) -> None:
    """Refuse arrays that do not lie pixel on pixel.

    Parameters
    ----------
    a, b
        With dimensions y and x; coordinates and CRS are compared where both have them.
    name_a, name_b
        What to call them in an error.

    Raises
    ------
    InputError
        If sizes, coordinates (by more than 1 % of a pixel) or CRS differ.
    """
    sizes = [(x.sizes["y"], x.sizes["x"]) for x in (a, b)]
    if sizes[0] != sizes[1]:
        raise InputError(f"{name_a} has {sizes[0]} pixels and {name_b} {sizes[1]}; bring both onto one grid")
    for dim in ("y", "x"):
        if dim not in a.coords or dim not in b.coords:
            continue
        here, there = a[dim].to_numpy(), b[dim].to_numpy()
        pixel = abs(there[1] - there[0]) if there.size > 1 else 1.0
        if not np.allclose(here, there, rtol=0, atol=_SAME_PLACE * pixel):
            raise InputError(
                f"{name_a} and {name_b} lie apart: {dim} starts at {here[0]:.10g} and at {there[0]:.10g}; "
                "bring both onto one grid"
            )
    systems = a.odc.crs, b.odc.crs
    if None not in systems and systems[0] != systems[1]:
        names = [f"EPSG:{crs.epsg}" if crs.epsg else crs.proj.name for crs in systems]
        raise InputError(f"{name_a} is in {names[0]} and {name_b} in {names[1]}; bring both onto one grid")


# -- counting ---------------------------------------------------------------------------------------------------------


def _joint(truth: Codes, predicted: Codes) -> Counts:
    """(256, 256) pixels per pair of codes: no code needs a look-up before it is counted."""
    pairs = (truth.astype(np.uint16) << 8) | predicted
    return np.bincount(pairs.ravel(), minlength=2**16).astype(np.int64).reshape(256, 256)


def _from_counts(joint: Counts, legend: Legend) -> Confusion:
    joint = joint.copy()
    known = np.array([*legend.codes, legend.nodata])
    _refuse_unknown(joint.sum(axis=1), known, "the truth", legend)
    joint[legend.nodata] = 0
    _refuse_unknown(joint.sum(axis=0), known, "the prediction", legend)
    rows = joint[np.array(legend.codes)]
    return Confusion(legend, rows[:, legend.codes], rows[:, legend.nodata])


def _refuse_unknown(pixels: Counts, known: npt.NDArray[np.int64], what: str, legend: Legend) -> None:
    unknown = np.setdiff1d(np.flatnonzero(pixels), known)
    if unknown.size:
        raise InputError(
            f"{what} has codes that legend {legend.name!r} does not: {', '.join(map(str, unknown))}; "
            "remap them or choose the legend that they belong to"
        )


def _count_block(*layers: npt.NDArray[Any], legend: Legend) -> Counts:
    """One block of truth, prediction and perhaps mask -> (1, 1, truth, predicted + unmapped)."""
    truth, predicted, *mask = layers
    if mask:
        truth = np.where(mask[0], truth, truth.dtype.type(legend.nodata))
    counts = confusion(truth, predicted, legend)
    return np.column_stack([counts.matrix, counts.unmapped])[None, None]


def _lazy(data: xr.DataArray) -> xr.DataArray:
    data = data.transpose("y", "x")
    return data if data.chunks is not None else data.chunk()


def _compute(blocks: da.Array, on_progress: Steps | None) -> Counts:
    total, done = blocks.npartitions, 0
    keys = set(flatten(blocks.__dask_keys__()))

    def step(key: Any, *_: Any) -> None:
        nonlocal done
        if key in keys:
            done += 1
            if on_progress is not None:
                on_progress(done, total)

    with Callback(posttask=step):
        counts: Counts = blocks.persist().compute()  # compute alone would rename the key of a single block
    if on_progress is not None and done < total:
        on_progress(total, total)
    return counts
