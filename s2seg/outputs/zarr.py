"""A prediction as a Zarr v3 group: preallocated, sharded, CF, written block by block from the tasks that make it."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise, product
from math import prod
from pathlib import Path
from typing import Any, cast

import dask.array as da
import fsspec
import numpy as np
import numpy.typing as npt
import odc.geo.xr
import xarray as xr
import zarr
from odc.geo.geobox import GeoBox
from zarr.codecs import ZstdCodec

from s2seg.errors import InputError, OutputError
from s2seg.legend import Legend
from s2seg.outputs._blocks import Ledger, compute
from s2seg.outputs._files import (
    check_writable,
    existing_parent,
    identifiers,
    is_url,
    partial_of,
    replacing,
    writing,
)  # fmt: skip
from s2seg.progress import Steps

__all__ = ["check_writable", "open_stored", "pieces", "read_land_cover", "write_zarr"]

_INNER = 512  # a viewer's request; several make a shard
_ZSTD_LEVEL = 3  # class maps 8.6 : 1; level 6 reaches 10.5 : 1 for twice the time, which the network would miss
_TOGETHER = 2**24  # pixels of shards in a row that one request decodes in several threads
_BEST_RATIO = 16  # the disk must hold at least this share of the raw bytes
_LEDGER = "written.txt"  # in the store while it is incomplete: the blocks that are there
_EPOCH = np.datetime64("1970-01-01T00:00:00", "us")


@dataclass(frozen=True)
class _Axis:
    """One dimension of the stored arrays: its size, how dask cuts it, and how Zarr does."""

    size: int
    chunk: int
    shard: int
    inner: int


@dataclass(frozen=True)
class _Target:
    """Where a task writes: by URL, so that any process can open it."""

    url: str
    label: str
    dims: tuple[tuple[str, ...], ...]
    names: tuple[str, ...]


def write_zarr(
    prediction: xr.Dataset,
    path: str | Path,
    *,
    tile: tuple[int, int] = (16384, 4096),
    attrs: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    fingerprint: str | None = None,
    on_progress: Steps | None = None,
) -> Path | str:
    """Compute a lazy prediction and store it as it comes.

    Each dask block is written once, whole, by the task that makes it, so a block is one shard (or, with several dates
    in a block, one shard per date). All variables of a block are written together and share its inference. One graph
    per ``tile`` is submitted, so memory does not grow with the area. It runs wherever dask runs: threads, a
    LocalCluster's processes (which need to see ``path``) or the scheduler of the current client.

    Parameters
    ----------
    prediction
        Variables on (y, x), (time, y, x), (class, y, x) or (time, class, y, x), cut alike along y and x, with
        ``attrs["legend"]`` and a geobox.
    path
        A local folder, which appears under this name when it is complete; or an fsspec URL, which is complete once it
        has consolidated metadata.
    tile
        Pixels (down, across) of what is computed as one graph, rounded down to whole blocks (at least one).
    attrs
        More attributes for the group, JSON values.
    overwrite
        Replace the store that stands at ``path``: on a disk when the new one is complete, elsewhere before it is begun.
    fingerprint
        What the prediction is made of, in one word, for a local path. A write that was interrupted is then kept as
        ``.NAME.partial``, and the next one of the same fingerprint goes on from the blocks that are there; a finished
        one of the same fingerprint is left as it is.
    on_progress
        Called with (done, total) blocks, first with those that are there already.

    Returns
    -------
    Path or str
        The path, or the URL as it was given.

    Raises
    ------
    OutputError
        If the path exists, cannot be written, or its disk is full; nothing is then left behind on a local disk.
    InputError
        If the variables are cut differently, or irregularly.
    """
    legend = _legend(prediction)
    prediction = _with_blocks(prediction)
    axes = _axes(prediction)
    shape = tuple(len(prediction.chunks[dim]) for dim in _block_dims(prediction))
    if is_url(path):
        _check_url(str(path), overwrite=overwrite)
        _write(prediction, legend, axes, str(path), str(path), tile, Ledger(shape), attrs or {}, on_progress)
        return str(path)
    path = Path(path)
    if fingerprint and _fingerprint(path) == fingerprint:
        if on_progress is not None:
            on_progress(prod(shape), prod(shape))
        return path
    check_writable(path, overwrite=overwrite, store=True)
    ledger = Ledger(shape, partial_of(path) / _LEDGER, fingerprint) if fingerprint else Ledger(shape)
    _check_space(prediction, path)
    with replacing(path, begun=lambda: bool(fingerprint and ledger.done.any())) as partial:
        attrs = dict(attrs or {}) | ({"fingerprint": fingerprint} if fingerprint else {})
        _write(prediction, legend, axes, str(partial.absolute()), str(path), tile, ledger, attrs, on_progress)
    return path


def read_land_cover(path: str | Path) -> xr.Dataset:
    """Open a written prediction lazily: the stored integers, one dask chunk per shard, with geobox and legend.

    Parameters
    ----------
    path
        What :func:`write_zarr` wrote.

    Returns
    -------
    xr.Dataset
        As it was given to :func:`write_zarr`: ``attrs["legend"]`` is a mapping again.
    """
    stored = open_stored(path)
    shards = {
        dim: size
        for variable in stored.data_vars.values()
        for dim, size in zip(variable.dims, variable.encoding.get("shards") or (), strict=False)
    }
    return stored.chunk(shards)


def open_stored(path: str | Path) -> xr.Dataset:
    """Open a written prediction as :func:`read_land_cover` does, but without dask: for one look at each pixel.

    Whoever asks for pixels decodes them, in this process, even where a cluster computed them; :func:`pieces` says which
    to ask for together. That takes half the time of a graph of blocks.

    Parameters
    ----------
    path
        What :func:`write_zarr` wrote.

    Returns
    -------
    xr.Dataset
        Lazily indexed, with geobox; ``attrs["legend"]`` is a mapping again.
    """
    stored: xr.Dataset = xr.open_zarr(str(path), chunks=None, mask_and_scale=False)
    stored.attrs["legend"] = json.loads(stored.attrs["legend"])
    return stored


def pieces(data: xr.DataArray) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each part that is best taken at once: a dask chunk, else a few shards, else all there is.

    Parameters
    ----------
    data
        With y and x as its last two dimensions.

    Yields
    ------
    tuple of slice
        Left to right, then down.
    """
    down, across = (data.encoding.get("shards") or data.shape)[-2:]
    across *= max(1, _TOGETHER // (down * across))
    rows, columns = (
        data.chunksizes.get(dim) or [min(side, data.sizes[dim] - start) for start in range(0, data.sizes[dim], side)]
        for dim, side in (("y", down), ("x", across))
    )
    for y, x in product(pairwise(accumulate(rows, initial=0)), pairwise(accumulate(columns, initial=0))):
        yield slice(*y), slice(*x)


def _legend(prediction: xr.Dataset) -> Legend:
    if "legend" not in prediction.attrs:
        raise InputError('a prediction needs attrs["legend"] (legend.to_dict()) to be written')
    return Legend.from_dict(prediction.attrs["legend"])


def _with_blocks(prediction: xr.Dataset) -> xr.Dataset:
    """Give arrays that are in memory one block each, and order the dimensions as they are stored."""
    order = [d for d in ("time", "class", "y", "x") if d in prediction.dims]
    prediction = prediction.transpose(*order)
    in_memory = [name for name, v in prediction.data_vars.items() if v.chunks is None]
    if not in_memory:
        return prediction
    try:
        cut = {d: c for d, c in prediction.chunks.items() if d in ("y", "x")}
    except ValueError:
        return prediction  # cut differently: _axes says so
    return prediction.assign({name: prediction[name].chunk(cut) for name in in_memory})


def _axes(prediction: xr.Dataset) -> dict[Hashable, _Axis]:
    try:
        chunks = prediction.chunks
    except ValueError as error:
        cuts = ", ".join(f"{name} {v.chunks}" for name, v in prediction.data_vars.items())
        raise InputError(f"the variables are cut differently ({cuts}); rechunk them alike before writing") from error
    return {dim: _axis(str(dim), cut) for dim, cut in chunks.items()}


def _axis(dim: str, cut: tuple[int, ...]) -> _Axis:
    """Shard = dask block, for every block but a smaller last one; time is one date to a shard."""
    first = cut[0]
    if any(size != first for size in cut[:-1]) or cut[-1] > first:
        raise InputError(f"blocks along {dim} are irregular {cut}, so shards cannot match them; rechunk before writing")
    if dim == "time":
        return _Axis(sum(cut), first, 1, 1)
    if dim == "class":
        return _Axis(sum(cut), first, first, first)
    if len(cut) == 1:  # one block: the shard may reach beyond the array's end
        inner = min(first, _INNER)
        return _Axis(first, first, -(-first // inner) * inner, inner)
    # the largest divisor of the block that is not above _INNER; a block without a decent one is stored in one piece
    inner = next(size for size in range(min(first, _INNER), 0, -1) if first % size == 0)
    return _Axis(sum(cut), first, first, inner if inner * 4 >= min(first, _INNER) else first)


def _check_space(prediction: xr.Dataset, path: Path) -> None:
    free = shutil.disk_usage(existing_parent(path)).free
    least = prediction.nbytes // _BEST_RATIO
    if free < least:
        raise OutputError(
            str(path),
            f"it needs {least / 1e9:.1f} GB even if it compresses {_BEST_RATIO} : 1, and {free / 1e9:.1f} GB are free; "
            "free some space or choose another path",
        )


def _check_url(url: str, *, overwrite: bool) -> None:
    with writing(url):
        fs, where = fsspec.core.url_to_fs(url)
        if fs.exists(where):
            if not overwrite:
                raise OutputError(url, "it exists already; pass --overwrite (overwrite=True) or choose another path")
            if not fs.exists(f"{where.rstrip('/')}/zarr.json"):
                raise OutputError(url, "other things are there, which are never replaced; choose another path")
            fs.rm(where, recursive=True)


def _write(
    prediction: xr.Dataset,
    legend: Legend,
    axes: Mapping[Hashable, _Axis],
    url: str,
    label: str,
    tile: tuple[int, int],
    ledger: Ledger,
    attrs: Mapping[str, Any],
    on_progress: Steps | None,
) -> None:
    if not ledger.done.any():
        with writing(label):
            _preallocate(prediction, legend, axes, url)
    ledger.start()
    target = _Target(
        url,
        label,
        tuple(tuple(map(str, v.dims)) for v in prediction.data_vars.values()),
        tuple(map(str, prediction.data_vars)),
    )
    down, across = (max(1, pixels // axes[dim].chunk) for dim, pixels in zip(("y", "x"), tile, strict=True))
    compute(_write_tasks(prediction, target), (down, across), ledger, on_progress)
    with writing(label):
        ledger.close()
        _finish(url, legend, attrs)


def _fingerprint(path: Path) -> str | None:
    """What a finished map is made of."""
    about = path / "zarr.json"
    return json.loads(about.read_text())["attributes"].get("fingerprint") if about.exists() else None


# -- metadata ---------------------------------------------------------------------------------------------------------


def _preallocate(prediction: xr.Dataset, legend: Legend, axes: Mapping[Hashable, _Axis], url: str) -> None:
    group = zarr.open_group(url, mode="w", zarr_format=3)
    for name, variable in prediction.data_vars.items():
        nodata, attributes = _describe(str(name), variable, legend)
        group.create_array(
            str(name),
            shape=tuple(axes[d].size for d in variable.dims),
            dtype=variable.dtype,
            chunks=tuple(axes[d].inner for d in variable.dims),
            shards=tuple(axes[d].shard for d in variable.dims),
            compressors=ZstdCodec(level=_ZSTD_LEVEL),
            fill_value=0 if nodata is None else nodata,
            dimension_names=tuple(map(str, variable.dims)),
            attributes=attributes | {"grid_mapping": "spatial_ref", "coordinates": "spatial_ref"},
        )
    for name, (dims, values, attributes) in _coordinates(prediction, legend).items():
        stored = group.create_array(
            name,
            shape=values.shape,
            dtype=values.dtype,
            chunks=values.shape,
            fill_value=np.nan if values.dtype.kind == "f" else 0,
            dimension_names=dims,
            attributes=attributes,
        )
        stored[...] = values


def _describe(name: str, variable: xr.DataArray, legend: Legend) -> tuple[int | None, dict[str, Any]]:
    """Nodata and CF attributes of a variable; one that is not ours keeps the attributes that JSON can hold."""
    attributes: dict[str, Any]
    if name == "land_cover":
        attributes = {"long_name": f"land cover ({legend.name})"} | _flags(legend)
        attributes |= {"legend": json.dumps(legend.to_dict()), "_FillValue": legend.nodata}
    elif name == "confidence":
        attributes = {"long_name": "confidence of the land-cover class", "units": "%", "_FillValue": 255}
    elif name == "probability":
        attributes = {"long_name": "probability of each land-cover class", "units": "1", "_FillValue": 255}
        attributes |= {"scale_factor": 0.004}  # 250 is one
    elif name == "observations":
        attributes = {"long_name": "number of clear observations", "units": "1"}
    else:
        attributes = {k: v for k, v in variable.attrs.items() if isinstance(v, str | int | float)}
    return attributes.get("_FillValue"), attributes


def _flags(legend: Legend) -> dict[str, Any]:
    return {
        "flag_values": list(legend.codes),
        "flag_meanings": " ".join(identifiers(legend)),
        "flag_colors": " ".join(legend.colors),
    }


_Coordinate = tuple[tuple[str, ...], npt.NDArray[Any], dict[str, Any]]


def _coordinates(prediction: xr.Dataset, legend: Legend) -> dict[str, _Coordinate]:
    geobox: GeoBox = prediction.odc.geobox
    coords = odc.geo.xr.xr_coords(geobox, always_yx=True)
    geographic = geobox.crs is not None and geobox.crs.geographic
    standard_names = ("latitude", "longitude") if geographic else ("projection_y_coordinate", "projection_x_coordinate")
    out: dict[str, _Coordinate] = {
        dim: (
            (dim,),
            coords[dim].to_numpy().astype("float64"),
            {
                "standard_name": standard_name,
                "long_name": f"{dim} of the pixel's centre",
                "units": coords[dim].attrs["units"],
                "axis": dim.upper(),
            },
        )
        for dim, standard_name in zip(("y", "x"), standard_names, strict=True)
    }
    out["spatial_ref"] = ((), np.array(0, "int32"), dict(coords["spatial_ref"].attrs))
    if "time" in prediction.dims:
        microseconds = (prediction["time"].to_numpy().astype("datetime64[us]") - _EPOCH).astype("int64")
        units = {"units": "microseconds since 1970-01-01 00:00:00", "calendar": "proleptic_gregorian"}
        out["time"] = (("time",), microseconds, {"standard_name": "time", "axis": "T"} | units)
    if "class" in prediction.dims:
        out["class"] = (("class",), legend.channel_to_code(), {"long_name": "land-cover class"} | _flags(legend))
    return out


def _finish(url: str, legend: Legend, attrs: Mapping[str, Any]) -> None:
    """Write what marks the group as complete."""
    group = zarr.open_group(url, mode="r+", use_consolidated=False)
    group.attrs.update(
        {"Conventions": "CF-1.11", "title": "Land cover", "legend": json.dumps(legend.to_dict())} | dict(attrs)
    )
    with warnings.catch_warnings():
        # zarr warns that consolidated metadata is not yet in the v3 specification; xarray warns where it is missing
        warnings.filterwarnings("ignore", message="Consolidated metadata is currently not part")
        zarr.consolidate_metadata(group.store, zarr_format=3)


# -- pixels -----------------------------------------------------------------------------------------------------------


def _block_dims(prediction: xr.Dataset) -> tuple[str, ...]:
    """Dimensions along which a prediction is written block by block."""
    return tuple(dim for dim in ("time", "y", "x") if dim in prediction.dims)


def _write_tasks(prediction: xr.Dataset, target: _Target) -> da.Array:
    """Lazy array with one element per block, whose computation writes that block of all variables."""
    dims = _block_dims(prediction)
    chunks = prediction.chunks
    # a block learns where it lies from the indices that travel with it, whatever part of the graph is computed
    where = [da.from_array(np.arange(sum(chunks[d])), chunks=(chunks[d],), name=False) for d in dims]
    arguments: list[Any] = []
    for dim, index in zip(dims, where, strict=True):
        arguments += [index, (dim,)]
    for variable in prediction.data_vars.values():
        arguments += [variable.data, variable.dims]
    written: da.Array = da.blockwise(
        _write_block,
        dims,
        *arguments,
        target=target,
        index_dims=dims,
        concatenate=True,
        align_arrays=False,
        adjust_chunks=dict.fromkeys(dims, 1),
        dtype=np.uint8,
        meta=np.empty((0,) * len(dims), np.uint8),
        token="write-block",
    )
    return written


def _write_block(*arrays: npt.NDArray[Any], target: _Target, index_dims: tuple[str, ...]) -> npt.NDArray[np.uint8]:
    """Store one block of every variable; runs inside a task, in whatever process dask chose."""
    indices, blocks = arrays[: len(index_dims)], arrays[len(index_dims) :]
    spans = {dim: slice(int(i[0]), int(i[-1]) + 1) for dim, i in zip(index_dims, indices, strict=True)}
    with writing(target.label):
        group = zarr.open_group(target.url, mode="r+", use_consolidated=False)
        for name, dims, block in zip(target.names, target.dims, blocks, strict=True):
            if "time" in spans and "time" not in dims and spans["time"].start > 0:
                continue  # one map for all dates: the first date's task has written it
            cast(zarr.Array[Any], group[name])[tuple(spans.get(d, slice(None)) for d in dims)] = block
    return np.ones((1,) * len(index_dims), np.uint8)
