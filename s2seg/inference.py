"""Apply a network to a lazy scene over overlapping blocks: lazy in, lazy out, no seams."""

from __future__ import annotations

import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import dask.array as da
import numpy as np
import numpy.typing as npt
import xarray as xr
from dask.base import annotate

from s2seg.client import current_client
from s2seg.errors import InputError, MissingBandError
from s2seg.legend import Legend
from s2seg.models.bundle import ModelBundle
from s2seg.models.runtimes import Choice, Session, SessionRef, expected_session, summarize
from s2seg.models.runtimes.batching import CACHED_PIXELS
from s2seg.windows import ChunkSpec, Margin, Shape, Span

Layer = Literal["class", "confidence", "probability"]
LAYERS: tuple[Layer, ...] = ("class", "confidence", "probability")

NO_SCORE = 255
"""Stored in ``confidence`` and ``probability`` where there is no answer."""

_VARIABLES = {"class": "land_cover", "confidence": "confidence", "probability": "probability"}

_NETWORK_BYTES, _NETWORK_BYTES_ON_GPU = 2**30, 2**32
"""What the network may take for a window."""

_LARGEST_CORE = 2048
"""Pixels on a side: larger ones were measured to be no faster, and take more memory."""

_BLENDED_CORE = 1024

_BYTES_PER_PIXEL = {
    "openvino cpu float32": 186, "openvino cpu bfloat16": 160, "torch cpu float32": 400, "torch cpu bfloat16": 250,
    "torch-compiled cpu float32": 400, "torch-compiled cpu bfloat16": 250,
}  # fmt: skip
_OTHER_BYTES_PER_PIXEL = 800
"""Of a window, by session; measured for a U-Net with mobilenet_v2."""

_turns = {parallel: threading.Semaphore(parallel) for parallel in (1, 2)}
"""What lets so many threads of this process run a network at a time, by the session's own wish."""


def predict(
    scene: xr.DataArray,
    model: ModelBundle,
    *,
    layers: Collection[str] = ("class",),
    chunks: ChunkSpec | None = None,
    margin: Margin = ((0, 0), (0, 0)),
    runtime: str = "auto",
    device: str = "auto",
    precision: str = "auto",
) -> xr.Dataset:
    """Classify every pixel of a scene, lazily.

    The scene is padded to whole windows (by reflection, or by real pixels where the scene brings a ``margin``) and cut
    into blocks that see ``chunks.before`` and ``chunks.after`` pixels of their neighbours; each block is classified
    window by window. Pixels in which any band is 0 are nodata in every output; a window without valid pixels never
    reaches the network.

    Parameters
    ----------
    scene
        (band, y, x) or (time, band, y, x) uint16 digital numbers, reflectance = DN / 10000, nodata 0. Needs the model's
        bands; others are ignored.
    model
        From :func:`s2seg.load_model`.
    layers
        ``class`` (legend codes), ``confidence`` (probability of the winning class, 0-100 %) and ``probability`` (of
        each class, 0-250 for 0-1).
    chunks
        Geometry of blocks and windows; :func:`chunks_for` chooses by default.
    margin
        Pixels of real context that the scene carries around the area, ((above, below), (left, right)); what
        ``chunks.padding`` asks for saves all reflection. They are not part of the result.
    runtime, device, precision
        Passed to :func:`s2seg.models.open_session`.

    Returns
    -------
    Dataset
        ``land_cover``, ``confidence`` (y, x) uint8, ``probability`` (class, y, x) uint8, ``observations`` if the scene
        has them; with a leading ``time`` if the scene has one. ``attrs["legend"]`` holds the model's legend.

    Raises
    ------
    MissingBandError
        If the scene lacks one of the model's bands.
    InputError
        For an unknown layer or an empty choice; for a scene without bands or georeference, or smaller than its margin.
    """
    unknown = set(layers) - set(LAYERS)
    if unknown or not layers:
        raise InputError(f"unknown layer {min(unknown, default='')!r}: choose among {', '.join(LAYERS)}")
    _check_scene(scene, margin)
    scene = _select_bands(scene, model)
    if "time" in scene.dims:
        dates = [
            predict(
                scene.isel(time=i), model, layers=layers, chunks=chunks, margin=margin, runtime=runtime, device=device,
                precision=precision,
            )
            for i in range(scene.sizes["time"])
        ]  # fmt: skip
        return xr.concat(
            dates,
            dim=xr.Variable("time", scene.time.values),
            combine_attrs="identical",
            join="exact",
            coords="minimal",
            compat="override",
        )

    if not isinstance(scene.data, da.Array):
        scene = scene.chunk()
    area = _without_margin(scene, margin)
    size = area.sizes["y"], area.sizes["x"]
    spec = chunks or chunks_for(model, core_for(model, runtime, device, precision), size)
    session = SessionRef(model.path, model.sha256, runtime, device, precision)
    ordered = tuple(layer for layer in LAYERS if layer in layers)
    blocks = _predicted(_pad(scene.data, size, spec, margin), size, session, spec, ordered, model.spec.legend)
    return _dataset(blocks, area, model, ordered)


def _predicted(
    padded: da.Array, size: Shape, session: SessionRef, spec: ChunkSpec, layers: tuple[Layer, ...], legend: Legend
) -> da.Array:
    """(band, y, x) with its padding -> (channel, y, x) of the grid's ``size``."""
    # map_overlap in its two steps, as slices of neighbours need no GPU
    around = {0: 0, 1: (spec.before, spec.after), 2: (spec.before, spec.after)}
    seen = da.overlap.overlap(padded, depth=around, boundary="none", allow_rechunk=False)
    channels = sum(_channels(layer, legend) for layer in layers)
    with gpu_annotations(session):
        blocks = seen.map_blocks(
            _predict_block,
            chunks=((channels,), *spec.whole_cores(size)),
            dtype=np.uint8,
            meta=np.empty((0, 0, 0), np.uint8),
            session=session,
            spec=spec,
            layers=layers,
            legend=legend,
        )
    return blocks[:, : size[0], : size[1]]


def gpu_annotations(session: SessionRef) -> AbstractContextManager[None]:
    """Bind the tasks that are made within to the workers that announce the resource ``GPU``, if the cluster has any.

    These alone then run the network, on as many blocks at a time as they announce, while all workers read and write.
    One process for each GPU (dask-cuda makes them), with more threads than blocks on the GPU, so that the others read
    ahead; and processes that only read::

        dask scheduler
        dask cuda worker SCHEDULER --nthreads 4 --resources GPU=2
        CUDA_VISIBLE_DEVICES= dask worker SCHEDULER --nthreads 8

    ``GPU=2`` lets the numbers of one block cross while another is computed: a trimmed block is one window, and these
    two are all that is on the GPU; windows of a blended block also go in batches. Their probabilities are averaged on
    the worker's CPU. Dask forgets such bindings when it fuses tasks: :func:`s2seg.outputs.zarr.write_zarr` keeps it
    from that; to compute a prediction otherwise, pass ``optimize_graph=False``.

    Parameters
    ----------
    session
        Where the network shall run: one that is asked for on the CPU binds nothing.
    """
    client = current_client()
    if session.device == "cpu" or session.runtime == "openvino" or client is None:
        return nullcontext()
    workers = client.scheduler_info(n_workers=-1)["workers"].values()  # some versions name five unless told otherwise
    bound: AbstractContextManager[None] = annotate(resources={"GPU": 1})
    return bound if any("GPU" in worker["resources"] for worker in workers) else nullcontext()


def chunks_for(model: ModelBundle, core: int = 1024, shape: Shape | None = None) -> ChunkSpec:
    """Choose the geometry for a model.

    Networks of a fixed input size, or whose answer depends on the window's size because they pool globally, get a
    tapered blend of their own windows. All others see a whole block at once and are trimmed: a core of 1024 keeps
    99.9 % agreement with a whole image, and larger ones more (``python -m tests.bench map``).

    Parameters
    ----------
    model
        Its ``stride``, ``depth`` and ``window`` count.
    core
        Output pixels on a side of a block, at most (:func:`core_for`); rounded down to the stride.
    shape
        Pixels (down, across) of the grid, to cut it into blocks that are all alike.
    """
    spec = model.spec
    if spec.blends:
        window = spec.window or 512
        overlap = _quarter(window, spec.stride)
        return ChunkSpec.blended(core, window, overlap=overlap, stride=spec.stride, shape=shape)
    least = max(spec.depth, spec.stride)
    return ChunkSpec.trimmed(max(core // spec.stride * spec.stride, least), spec.depth, spec.stride, shape)


def core_for(model: ModelBundle, runtime: str = "auto", device: str = "auto", precision: str = "auto") -> int:
    """Choose the output pixels on a side of a block, at most: 2048, or what the network has memory for.

    That is 1 GiB for a window, or 4 GiB on a GPU.

    Blended windows have their own size, and gain nothing from a larger block.

    Parameters
    ----------
    model
        Its context counts.
    runtime, device, precision
        As in :func:`s2seg.models.open_session`.
    """
    if model.spec.blends:
        return _BLENDED_CORE
    session = expected_session(model, runtime, device, precision)
    budget = _NETWORK_BYTES_ON_GPU if session.on_gpu else _NETWORK_BYTES
    return min(_LARGEST_CORE, math.isqrt(budget // _bytes_per_pixel(session)) - 2 * model.spec.depth)


def network_bytes(model: ModelBundle, chunks: ChunkSpec, runtime: str, device: str, precision: str) -> int:
    """Estimate what the network takes for its windows of the process's memory, in bytes: a GPU has its own.

    The choices are those of :func:`core_for`.
    """
    session = expected_session(model, runtime, device, precision)
    height, width = chunks.window
    return 0 if session.on_gpu else _bytes_per_pixel(session) * max(height * width, CACHED_PIXELS)


def _bytes_per_pixel(session: Choice) -> int:
    return _BYTES_PER_PIXEL.get(" ".join(session), _OTHER_BYTES_PER_PIXEL)


def _quarter(window: int, stride: int) -> int:
    return max(window // 4 // stride, 1) * stride


def _check_scene(scene: xr.DataArray, margin: Margin) -> None:
    missing = {"band", "y", "x"} - set(scene.dims) or {"band", "y", "x", "spatial_ref"} - set(scene.coords)
    if missing:
        raise InputError(
            f"the scene has no {', '.join(sorted(missing))}: s2seg.stack and s2seg.composite make scenes, and "
            "scene.rio.write_crs(...) puts the projection onto your own"
        )
    for dim, sides in zip(("y", "x"), margin, strict=True):
        if min(sides) < 0 or sum(sides) >= scene.sizes[dim]:
            raise InputError(f"the scene has {scene.sizes[dim]} pixels along {dim}: no room for a margin of {sides}")


def _select_bands(scene: xr.DataArray, model: ModelBundle) -> xr.DataArray:
    present = [str(b) for b in scene.band.values]
    for band in model.spec.bands:
        if band not in present:
            raise MissingBandError(band, "of the scene", present)
    if present == list(model.spec.bands):
        return scene
    return scene.isel(band=[present.index(b) for b in model.spec.bands])


def _without_margin(scene: xr.DataArray, margin: Margin) -> xr.DataArray:
    (above, below), (left, right) = margin
    return scene.isel(y=slice(above, scene.sizes["y"] - below), x=slice(left, scene.sizes["x"] - right))


def _pad(data: da.Array, size: tuple[int, int], spec: ChunkSpec, margin: Margin) -> da.Array:
    """Give (band, y, x) the context and the chunks that the blocks need."""
    wanted = spec.padding(size)
    for axis, have in enumerate(margin, start=1):
        before, after = wanted[axis - 1][0] - have[0], wanted[axis - 1][1] - have[1]
        if before < 0 or after < 0:
            keep = slice(max(-before, 0), data.shape[axis] + min(after, 0))
            data = data[(slice(None),) * axis + (keep,)]
            before, after = max(before, 0), max(after, 0)
        widths = [(before, after) if i == axis else (0, 0) for i in range(3)]
        if max(before, after) > data.shape[axis]:
            # an area smaller than its context is reflected again and again, which only NumPy does
            chunks = [*data.chunks]
            chunks[axis] = (before + data.shape[axis] + after,)
            data = data.rechunk({axis: -1}).map_blocks(np.pad, widths, mode="symmetric", chunks=chunks, meta=data._meta)
        elif before or after:
            data = da.pad(data, widths, mode="symmetric")
    down, across = spec.chunks(size)
    return data.rechunk({0: -1, 1: down, 2: across})


def _channels(layer: Layer, legend: Legend) -> int:
    return len(legend) if layer == "probability" else 1


def _predict_block(
    block: npt.NDArray[np.uint16], *, session: SessionRef, spec: ChunkSpec, layers: tuple[Layer, ...], legend: Legend
) -> npt.NDArray[np.uint8]:
    """Classify one block with its context: (band, y, x) uint16 -> (channel, y, x) uint8 of the core."""
    height, width = (n - spec.before - spec.after for n in block.shape[1:])
    core = slice(spec.before, spec.before + height), slice(spec.before, spec.before + width)
    valid = np.minimum.reduce(block) != 0
    out = np.empty((sum(_channels(layer, legend) for layer in layers), height, width), dtype=np.uint8)
    if valid[core].any():
        run = _blend if spec.blend else _trim
        network = session.open()
        # one inference at a time on a CPU: it uses every core by itself, while the other threads read ahead
        with _turns[network.parallel]:
            run(block, valid, network, spec, layers, legend, out)
    nothing = np.full((len(out), 1, 1), NO_SCORE, dtype=np.uint8)
    if "class" in layers:
        nothing[0] = legend.nodata
    np.copyto(out, nothing, where=~valid[core])
    return out


def _trim(
    block: npt.NDArray[np.uint16],
    valid: npt.NDArray[np.bool_],
    session: Session,
    spec: ChunkSpec,
    layers: tuple[Layer, ...],
    legend: Legend,
    out: npt.NDArray[np.uint8],
) -> None:
    """Keep the middle of each window."""
    kept = [
        (rows, cols)
        for rows, cols in spec.windows(_shape(out))
        if valid[
            rows.start + spec.before : rows.stop - spec.after, cols.start + spec.before : cols.stop - spec.after
        ].any()
    ]
    for batch in _batches(kept, session):
        result = session.classify(_gather(block, batch), spec.before, frozenset(layers))
        for i, (rows, cols) in enumerate(batch):
            height, width = (s.size - spec.before - spec.after for s in (rows, cols))
            target = out[:, rows.start : rows.start + height, cols.start : cols.start + width]
            _put(target, {layer: values[i] for layer, values in result.items()}, layers, legend)


def _blend(
    block: npt.NDArray[np.uint16],
    valid: npt.NDArray[np.bool_],
    session: Session,
    spec: ChunkSpec,
    layers: tuple[Layer, ...],
    legend: Legend,
    out: npt.NDArray[np.uint8],
) -> None:
    """Average the probabilities of overlapping windows, weighted by a taper, and divide by the summed weights.

    All of that is done by this process, whatever device the windows were answered on.
    """
    taper = spec.taper()
    total = np.zeros((len(legend), *block.shape[1:]), dtype=np.float32)
    weight = np.zeros(block.shape[1:], dtype=np.float32)
    seen = [w for w in spec.windows(_shape(out)) if valid[w[0].slice, w[1].slice].any()]
    for batch in _batches(seen, session):
        for (rows, cols), p in zip(batch, session.probabilities(_gather(block, batch)), strict=True):
            total[:, rows.slice, cols.slice] += p * taper
            weight[rows.slice, cols.slice] += taper
    core = slice(spec.before, spec.before + out.shape[1]), slice(spec.before, spec.before + out.shape[2])
    # where no window ran there is no valid pixel either; the result there is overwritten
    mean = total[:, *core] / np.maximum(weight[core], np.finfo(np.float32).tiny)
    result = summarize(mean[None], legend.channel_to_code(), frozenset(layers))
    _put(out, {layer: values[0] for layer, values in result.items()}, layers, legend)


def _batches(windows: Sequence[tuple[Span, Span]], session: Session) -> Iterator[list[tuple[Span, Span]]]:
    """Group windows of one shape, as many as the session takes well at once.

    There is something to group in a blended block, or one of several windows: a trimmed block is a single one.
    """
    by_shape: dict[tuple[int, int], list[tuple[Span, Span]]] = {}
    for window in windows:
        by_shape.setdefault((window[0].size, window[1].size), []).append(window)
    for (height, width), same in by_shape.items():
        count = session.batch(height, width) if len(same) > 1 else 1  # a GPU's session may measure to answer
        yield from (same[i : i + count] for i in range(0, len(same), count))


def _gather(block: npt.NDArray[np.uint16], windows: Sequence[tuple[Span, Span]]) -> npt.NDArray[np.uint16]:
    if len(windows) == 1:
        rows, cols = windows[0]
        return block[None, :, rows.slice, cols.slice]
    return np.stack([block[:, rows.slice, cols.slice] for rows, cols in windows])


def _shape(out: npt.NDArray[np.uint8]) -> Shape:
    return out.shape[1], out.shape[2]


def _put(
    target: npt.NDArray[np.uint8],
    result: Mapping[str, npt.NDArray[np.uint8]],
    layers: tuple[Layer, ...],
    legend: Legend,
) -> None:
    """Write the layers of one window into their channels."""
    channel = 0
    for layer in layers:
        count = _channels(layer, legend)
        target[channel : channel + count] = result[layer]
        channel += count


def _cut_like(blocks: da.Array) -> dict[str, tuple[int, ...]]:
    return dict(zip(("y", "x"), blocks.chunks[1:], strict=True))


def _dataset(blocks: da.Array, area: xr.DataArray, model: ModelBundle, layers: Sequence[Layer]) -> xr.Dataset:
    legend = model.spec.legend
    coords = {name: area.coords[name] for name in ("y", "x", "spatial_ref")}
    variables: dict[str, xr.DataArray] = {}
    channel = 0
    for layer in layers:
        count = _channels(layer, legend)
        data = blocks[channel : channel + count]
        channel += count
        if layer == "probability":
            variables[layer] = xr.DataArray(
                data, dims=("class", "y", "x"), coords=coords | {"class": list(legend.names)}
            )
        else:
            variables[_VARIABLES[layer]] = xr.DataArray(data[0], dims=("y", "x"), coords=coords)
    if "observations" in area.coords:
        seen = area.coords["observations"].drop_vars("observations", errors="ignore")
        variables["observations"] = seen.reset_coords(drop=True).assign_coords(coords).chunk(_cut_like(blocks))
    attrs = {"legend": legend.to_dict(), "model": model.spec.name, "model_sha256": model.sha256}
    return xr.Dataset(variables, attrs=attrs)
