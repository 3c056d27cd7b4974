"""Ready-cut pairs of image and mask as places to train on: GeoTIFF, PNG or JPEG, integer or coloured masks."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import numpy.typing as npt
import rasterio
import xarray as xr
from dask.base import tokenize
from rasterio.errors import NotGeoreferencedWarning, RasterioError

from s2seg.errors import InputError, S2SegWarning
from s2seg.legend import Legend
from s2seg.sources.label_codes import code_table, resolve, unknown
from s2seg.training.splits import PARTS

_SUFFIXES = (".tif", ".tiff", ".png", ".jpg", ".jpeg")
_FOLDERS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_LISTED = 3


@dataclass(frozen=True)
class TileSpec:
    """Where the pairs lie, and what their pixels mean.

    Parameters
    ----------
    images, labels
        Two folders; a mask has its image's name, whatever the suffix. If the images lie in sub-folders ``train``,
        ``validation`` (or ``val``) and ``test``, those are the split, and the masks lie in sub-folders alike.
    colors
        For coloured masks: ``#rrggbb`` -> legend code or class name, None for nodata. Without it, the legend's own
        colours stand for their classes, and black for nodata.
    remap
        For integer masks: value -> legend code or class name, None for nodata.
    """

    images: Path
    labels: Path
    colors: Mapping[str, int | str | None] | None = None
    remap: Mapping[Any, Any] | None = None


@dataclass(frozen=True)
class Tile:
    """A pair as a region of its own: see :class:`s2seg.training.regions.Region`."""

    name: str
    scene: xr.DataArray
    labels: xr.DataArray
    split: xr.DataArray
    items: tuple[str, ...]
    date: str = field(default="")


def read_tiles(
    spec: TileSpec,
    legend: Legend,
    bands: Sequence[str],
    *,
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15),
    seed: int = 0,
) -> list[Tile]:
    """Find the pairs and make each a region; pixels are read when chips are cut.

    Images of 8 bits become DN so that white is a reflectance of 1, and their black is 1, not 0: it is dark, not
    missing, unless the file declares its nodata value. Images of 16 bits are DN already, with 0 for nodata.

    Parameters
    ----------
    spec
        Folders and colours.
    legend
        What the masks mean.
    bands
        Names of the images' bands, in the files' order (an alpha band after them is a mask).
    fractions, seed
        The split over whole tiles, drawn at random, where no sub-folders give one.

    Returns
    -------
    list of Tile
        Sorted by name; for :func:`~s2seg.training.chips.write_chips` and
        :func:`~s2seg.training.splits.check_split`.

    Raises
    ------
    InputError
        If there are no pairs; if a pair's sizes differ; if an image has other bands, or floats; if a mask holds
        values or colours that mean nothing (when it is read).

    Warns
    -----
    S2SegWarning
        For images without a mask, and masks without an image: they are left out.
    """
    pairs = _pairs(spec)
    parts = _split([part for _, part, _, _ in pairs], fractions, seed)
    return [
        _tile(name, image, mask, part, _Codes.of(spec, legend), bands)
        for (name, _, image, mask), part in zip(pairs, parts, strict=True)
    ]


# -- files ------------------------------------------------------------------------------------------------------------


def _pairs(spec: TileSpec) -> list[tuple[str, str | None, Path, Path]]:
    """Names, parts (None if the folders give none), images and masks."""
    images, masks = _files(Path(spec.images)), _files(Path(spec.labels))
    names = sorted(images.keys() & masks.keys())
    if not names:
        raise InputError(
            f"no pairs: none of the {len(images)} images in {spec.images} has the name of one of the {len(masks)} "
            f"masks in {spec.labels} (looking for {', '.join(_SUFFIXES)})"
        )
    for what, lonely in (("images without a mask", images.keys() - masks), ("masks without an image", masks - images.keys())):
        if lonely:
            more = ", ..." if len(lonely) > _LISTED else ""
            text = f"{len(lonely)} {what} are left out: {', '.join(sorted(lonely)[:_LISTED])}{more}"
            warnings.warn(text, S2SegWarning, stacklevel=4)
    return [(name, *_part_of(name), images[name], masks[name]) for name in names]


def _files(folder: Path) -> dict[str, Path]:
    """Path without suffix, relative to the folder -> file."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}")
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
            found[_name(path.relative_to(folder))].append(path)
    for name, paths in found.items():
        if len(paths) > 1:
            raise InputError(f"{folder}: {name} is there twice ({', '.join(p.name for p in paths)}); remove one")
    return {name: paths[0] for name, paths in found.items()}
