import dask.array as da
import numpy as np
import pytest
import xarray as xr
from odc.geo.xr import xr_coords

from s2seg.legend import Legend
from s2seg.outputs.quicklook import thumbnail
from s2seg.outputs.zarr import open_stored, write_zarr
from s2seg.pipeline import products
from tests.outputs.conftest import codes, grid


@pytest.mark.parametrize("side", [1000, 130, 61])
def test_one_reading_counts_the_codes_and_makes_the_pictures_maps(tmp_path, monkeypatch, side):
    monkeypatch.setattr(products, "_PICTURE_PIXELS", side)
    legend = Legend.load("worldcover")
    first = codes(legend, (150, 220), nodata_border=9)
    dates = xr.Dataset(
        {"land_cover": (("time", "y", "x"), da.from_array(np.stack([first, first[::-1]]), chunks=(1, 64, 64)))},
        coords=xr_coords(grid(150, 220)) | {"time": np.array(["2023-08-01", "2023-08-06"], "datetime64[ns]")},
        attrs={"legend": legend.to_dict()},
    )
    stored = open_stored(write_zarr(dates, tmp_path / "map.zarr")).land_cover
    for maps, values in ((stored, [first, first[::-1]]), (stored[1], [first[::-1]])):
        counts, small = products._survey(maps)
        np.testing.assert_array_equal(counts, [np.bincount(v.ravel(), minlength=256) for v in values])
        xr.testing.assert_identical(small, thumbnail(maps, side).load())
