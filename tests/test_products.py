import dask.array as da
import numpy as np
import pytest
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords
from pyproj import Geod, Transformer

from s2seg.errors import S2SegWarning
from s2seg.legend import Legend
from s2seg.outputs.quicklook import thumbnail
from s2seg.outputs.zarr import open_stored, write_zarr
from s2seg.pipeline import products
from tests.outputs.conftest import codes, grid


@pytest.mark.parametrize("side", [1000, 130, 61])
def test_one_reading_counts_the_codes_and_makes_the_pictures_maps(tmp_path, side):
    legend = Legend.load("worldcover")
    first = codes(legend, (150, 220), nodata_border=9)
    dates = xr.Dataset(
        {"land_cover": (("time", "y", "x"), da.from_array(np.stack([first, first[::-1]]), chunks=(1, 64, 64)))},
        coords=xr_coords(grid(150, 220)) | {"time": np.array(["2023-08-01", "2023-08-06"], "datetime64[ns]")},
        attrs={"legend": legend.to_dict()},
    )
    stored = open_stored(write_zarr(dates, tmp_path / "map.zarr")).land_cover
    for maps, values in ((stored, [first, first[::-1]]), (stored[1], [first[::-1]])):
        counts, small = products._survey(maps, side)
        np.testing.assert_array_equal(counts, [np.bincount(v.ravel(), minlength=256) for v in values])
        xr.testing.assert_identical(small, thumbnail(maps, side).load())


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:32631", "EPSG:3857", "EPSG:3035"])
def test_areas_are_those_on_the_ellipsoid(crs):
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(15.0, 46.0)
    grid = GeoBox.from_bbox((x, y, x + 8000, y + 5000), crs, resolution=100)
    west, south, east, north = grid.boundingbox.bbox
    degrees = Transformer.from_crs(crs, "EPSG:4326", always_xy=True)
    corners = degrees.transform([west, east, east, west], [south, south, north, north])
    true = abs(Geod(ellps="WGS84").polygon_area_perimeter(*corners)[0]) / 1e6
    assert products._square_kilometres(grid) * np.prod(grid.shape) == pytest.approx(true, rel=1e-3)


def test_unequal_areas_are_told():
    grid = GeoBox.from_bbox((1e6, 5e6, 3e6, 7e6), "EPSG:3857", resolution=10_000)
    with pytest.warns(S2SegWarning, match=r"EPSG:3857 stretches areas 1\.\d\d to \d\.\d\d times"):
        products._square_kilometres(grid)
