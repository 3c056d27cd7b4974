"""Mapping an area: ``plan`` decides, ``build`` makes lazy arrays, ``run`` computes, ``products`` describes."""

from s2seg.pipeline.build import build_prediction, build_scene
from s2seg.pipeline.plan import MapOptions, Plan, plan_area
from s2seg.pipeline.run import MapResult, NothingMappedError, map_area
from s2seg.progress import Progress

__all__ = [
    "MapOptions",
    "MapResult",
    "NothingMappedError",
    "Plan",
    "Progress",
    "build_prediction",
    "build_scene",
    "map_area",
    "plan_area",
]
