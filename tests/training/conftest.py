"""Small areas whose pixels say where they lie."""

from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from s2seg.legend import LandClass, Legend

BANDS = ("red", "nir")


@dataclass(frozen=True)
class Area:
    """A region without a grid, for tests of what does not look at coordinates."""

    scene: xr.DataArray
    labels: xr.DataArray
    split: xr.DataArray
    name: str = "here"
    date: str = "2020-08"
    items: tuple[str, ...] = ("item",)


def make_area(shape=(100, 90), chunk=40, *, labels=None, split=None, image=None, **about: Any) -> Area:
    """Band 0 holds 1 + the row, band 1 holds 1 + the column; classes 1 to 3 in stripes; all of it for training."""
    rows, cols = np.indices(shape)
    image = np.stack([rows + 1, cols + 1]).astype(np.uint16) if image is None else image
    labels = (cols // 10 % 3 + 1).astype(np.uint8) if labels is None else labels
    split = np.ones(shape, np.uint8) if split is None else split
    return Area(
        xr.DataArray(da.from_array(image, chunks=(-1, chunk, chunk)), dims=("band", "y", "x")),
        xr.DataArray(da.from_array(labels, chunks=chunk), dims=("y", "x")),
        xr.DataArray(da.from_array(split, chunks=chunk), dims=("y", "x")),
        **about,
    )


@pytest.fixture
def legend() -> Legend:
    """Three classes, and 0 for nodata."""
    colors = ("#ff0000", "#00ff00", "#0000ff")
    return Legend("three", tuple(LandClass(i + 1, n, c) for i, (n, c) in enumerate(zip("abc", colors, strict=True))))
