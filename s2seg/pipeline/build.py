"""From a plan to lazy arrays: the scene, and its classes."""

from __future__ import annotations

from collections.abc import Mapping

import dask.array as da
import numpy as np
import xarray as xr

from s2seg.inference import predict
from s2seg.pipeline.plan import Plan, scene_spec
from s2seg.sources.clip import inside, needs_clip
from s2seg.sources.radiometry import Offset, decide_offsets
from s2seg.sources.scene import compose
from s2seg.sources.stack import aligned_chunks


def build_scene(plan: Plan, offsets: Mapping[str, Offset] | None = None) -> xr.DataArray:
    """Stack and composite the planned items, lazily, on the padded grid.

    Parameters
    ----------
    plan
        From :func:`plan_area`.
    offsets
        Radiometric offsets by item id; decided here if not given.

    Returns
    -------
    DataArray
        (band, y, x) uint16, or (time, band, y, x) in ``per-date`` mode, of ``plan.padded``.
    """
    chunks = _reads(plan)
    if offsets is None:
        offsets = decide_offsets(plan.items, check=plan.options.check_offsets)
    scene = compose(plan.items, plan.padded, scene_spec(plan.model, plan.options), chunks, offsets)
    if needs_clip(plan.aoi):
        # far outside the area nothing is computed; near it the network sees what is really there
        near = inside(
            plan.aoi, plan.padded, chunks, grow=max(plan.chunks.before, plan.chunks.after) * plan.options.resolution
        )
        scene = scene.copy(data=da.where(near, scene.data, np.uint16(0)))
    return scene


def build_prediction(plan: Plan, scene: xr.DataArray) -> xr.Dataset:
    """Classify the planned scene, lazily, and cut it to the area.

    Parameters
    ----------
    plan
        From :func:`plan_area`.
    scene
        From :func:`build_scene`.

    Returns
    -------
    Dataset
        See :func:`s2seg.predict`; on ``plan.geobox``.
    """
    height, width = plan.geobox.shape
    rows = [
        [_predict_tile(plan, scene, y, x) for x in _tiles(width, plan.tile[1])] for y in _tiles(height, plan.tile[0])
    ]
    prediction = _join([_join(row, "x") for row in rows], "y")
    if not needs_clip(plan.aoi):
        return prediction
    mask = inside(plan.aoi, plan.geobox, prediction.land_cover.data.chunks[-2:])
    empty = {"land_cover": plan.model.spec.legend.nodata, "confidence": 255, "probability": 255, "observations": 0}
    return prediction.assign(
        {
            name: variable.copy(data=da.where(mask, variable.data, variable.dtype.type(empty[str(name)])))
            for name, variable in prediction.items()
        }
    )


def _tiles(size: int, tile: int) -> list[slice]:
    """Cut an axis of the map into tiles."""
    return [slice(start, min(start + tile, size)) for start in range(0, size, tile)]


def _reads(plan: Plan) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Chunks of the padded grid: those of the files, cut once more where the context of a tile begins or ends.

    No block of a file is then fetched for two chunks of a tile, and a tile reads no more of its neighbour than the
    context that it needs.
    """
    shape, chunks = plan.geobox.shape.yx, []
    for axis, aligned in enumerate(aligned_chunks(plan.items, plan.padded, plan.read_side)):
        edges = set(np.cumsum([0, *aligned]).tolist())
        for part in _tiles(shape[axis], plan.tile[axis]):
            length = part.stop - part.start
            edges |= {part.start, part.stop + sum(plan.chunks.padding((length, length))[axis])}
        chunks.append(tuple(np.diff(sorted(edges)).tolist()))
    down, across = chunks
    return down, across


def _predict_tile(plan: Plan, scene: xr.DataArray, rows: slice, cols: slice) -> xr.Dataset:
    """Classify one tile, lazily, with its context from the padded scene."""
    margin = plan.chunks.padding((rows.stop - rows.start, cols.stop - cols.start))
    y, x = slice(rows.start, rows.stop + sum(margin[0])), slice(cols.start, cols.stop + sum(margin[1]))
    return predict(
        scene.isel(y=y, x=x), plan.model, layers=plan.options.layers, chunks=plan.chunks, margin=margin,
        runtime=plan.options.runtime, device=plan.options.device, precision=plan.options.precision,
    )  # fmt: skip


def _join(parts: list[xr.Dataset], dim: str) -> xr.Dataset:
    if len(parts) == 1:
        return parts[0]
    return xr.concat(
        parts, dim, data_vars="minimal", coords="minimal", compat="override", join="exact", combine_attrs="override"
    )
