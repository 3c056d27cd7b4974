"""Predictions whose pixels encode where they lie."""

import dask.array as da
import numpy as np
import pytest
import xarray as xr
from affine import Affine
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from s2seg.legend import Legend


def grid(ny, nx, resolution=10.0):
    return GeoBox((ny, nx), Affine(resolution, 0, 500_000, 0, -resolution, 5_100_000), "EPSG:32633")


def codes(legend, shape, nodata_border=0):
    """(y, x) codes in patches of unequal sides, so that a shifted, flipped or transposed copy differs."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    table = np.array(legend.codes, "uint8")
    out = table[(y // 7 * 3 + x // 11 + y * x // 977) % len(table)]
    if nodata_border:
        out[:nodata_border] = out[:, :nodata_border] = legend.nodata
    return out


@pytest.fixture(scope="session")
def legend():
    return Legend.load("worldcover")


@pytest.fixture(scope="session")
def make_prediction():
    """Build a lazy prediction: land cover and confidence, cut into blocks of `core` pixels."""

    def make(legend, shape=(150, 220), core=64, nodata_border=9):
        values = codes(legend, shape, nodata_border)
        y, x = np.mgrid[: shape[0], : shape[1]]
        confidence = np.where(values == legend.nodata, 255, (y + 3 * x) % 101).astype("uint8")
        return xr.Dataset(
            {
                "land_cover": (("y", "x"), da.from_array(values, chunks=core)),
                "confidence": (("y", "x"), da.from_array(confidence, chunks=core)),
            },
            coords=xr_coords(grid(*shape)),
            attrs={"legend": legend.to_dict()},
        )

    return make
