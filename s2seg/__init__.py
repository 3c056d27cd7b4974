"""Land-cover maps from Sentinel-2: search, stack, composite, predict, write; on a laptop or a Dask cluster."""

from __future__ import annotations

import importlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from s2seg.errors import S2SegError
    from s2seg.inference import predict
    from s2seg.legend import Legend
    from s2seg.models.bundle import ModelBundle, load_model
    from s2seg.outputs.cog import write_cog
    from s2seg.outputs.quicklook import write_quicklook
    from s2seg.outputs.zarr import write_zarr
    from s2seg.pipeline import MapOptions, map_area, plan_area
    from s2seg.sources.aoi import parse_aoi
    from s2seg.sources.composite import CompositeSpec, composite, per_date
    from s2seg.sources.search import search
    from s2seg.sources.stack import geobox_for, stack
    from s2seg.windows import ChunkSpec

__version__ = version("s2seg")

_HOME = {
    "ChunkSpec": "s2seg.windows",
    "CompositeSpec": "s2seg.sources.composite",
    "Legend": "s2seg.legend",
    "MapOptions": "s2seg.pipeline",
    "ModelBundle": "s2seg.models.bundle",
    "S2SegError": "s2seg.errors",
    "composite": "s2seg.sources.composite",
    "geobox_for": "s2seg.sources.stack",
    "load_model": "s2seg.models.bundle",
    "map_area": "s2seg.pipeline",
    "parse_aoi": "s2seg.sources.aoi",
    "per_date": "s2seg.sources.composite",
    "plan_area": "s2seg.pipeline",
    "predict": "s2seg.inference",
    "search": "s2seg.sources.search",
    "stack": "s2seg.sources.stack",
    "write_cog": "s2seg.outputs.cog",
    "write_quicklook": "s2seg.outputs.quicklook",
    "write_zarr": "s2seg.outputs.zarr",
}

__all__ = [
    "ChunkSpec",
    "CompositeSpec",
    "Legend",
    "MapOptions",
    "ModelBundle",
    "S2SegError",
    "composite",
    "geobox_for",
    "load_model",
    "map_area",
    "parse_aoi",
    "per_date",
    "plan_area",
    "predict",
    "search",
    "stack",
    "write_cog",
    "write_quicklook",
    "write_zarr",
]


def __getattr__(name: str) -> Any:
    """Import a public name on first use: ``import s2seg`` itself stays instant and loads neither torch nor GDAL."""
    if name not in _HOME:
        raise AttributeError(f"module 's2seg' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
