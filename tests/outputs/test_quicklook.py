import dask.array as da
import numpy as np
import pytest
import xarray as xr
from odc.geo.geobox import GeoBox
from odc.geo.xr import xr_coords

from s2seg.errors import OutputError
from s2seg.legend import LandClass, Legend
from s2seg.outputs import quicklook
from s2seg.outputs._page import colored, scene_image
from s2seg.outputs.quicklook import class_shares, thumbnail, write_quicklook, write_quicklook_series
from tests.outputs.conftest import codes, grid
from tests.pictures import pixels


def as_map(values, **coords):
    dims = ("time", "band", "y", "x")[4 - values.ndim :] if "band" in coords else ("time", "y", "x")[3 - values.ndim :]
    return xr.DataArray(values, dims=dims, coords=xr_coords(grid(*values.shape[-2:])) | coords)


def where(picture, color):
    """(n, 2) places (y, x) of exactly this colour."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return np.argwhere((picture == rgb).all(-1))


def vivid(colors):
    """Colours that cannot be the grey fringe of a letter."""
    return [c for c in colors if len({c[1:3], c[3:5], c[5:7]}) > 1]


def quadrants(legend, ny=120, nx=160):
    values = np.empty((ny, nx), "uint8")
    for (y, x), code in zip(np.ndindex(2, 2), legend.codes, strict=False):
        values[y * ny // 2 : (y + 1) * ny // 2, x * nx // 2 : (x + 1) * nx // 2] = code
    return values


def composite(ny=120, nx=160, bands=("blue", "green", "red", "nir")):
    values = np.random.default_rng(0).integers(200, 3000, (len(bands), ny, nx), dtype="uint16")
    return as_map(values, band=list(bands))


def test_the_map_lies_north_up_in_the_legends_colours(tmp_path, legend):
    path = write_quicklook(
        tmp_path / "q.png",
        composite=composite(),
        land_cover=as_map(quadrants(legend)),
        legend=legend,
        title="A place",
        subtitle="2023-08-06, unet",
    )
    picture = pixels(path)
    found = [where(picture, color) for color in legend.colors[:4]]
    (nw, ne, sw, se), sizes = [np.median(f, axis=0) for f in found], [len(f) for f in found]
    assert nw[0] == pytest.approx(ne[0], abs=3)
    assert sw[0] == pytest.approx(se[0], abs=3)
    assert nw[1] == pytest.approx(sw[1], abs=3)
    assert ne[1] == pytest.approx(se[1], abs=3)
    assert nw[0] < sw[0]
    assert nw[1] < ne[1]
    assert max(sizes) - min(sizes) < 0.03 * max(sizes), "equal quarters"
    assert (se[0] - nw[0]) / (se[1] - nw[1]) == pytest.approx(120 / 160, rel=0.02), "pixels are square"
    assert not any(len(where(picture, color)) for color in vivid(legend.colors[4:])), (
        "absent classes are not in the legend"
    )


def test_the_composite_is_red_where_the_ground_is(tmp_path, legend):
    image = np.full((3, 60, 90), 500, "uint16")  # blue, green, red
    image[2, :, :30] = image[1, :, 30:60] = image[0, :, 60:] = 3000
    image[:, :10] = 0
    shown = as_map(image, band=["blue", "green", "red"])
    land = as_map(np.full((60, 90), 60, "uint8"))
    picture = pixels(write_quicklook(tmp_path / "q.png", composite=shown, land_cover=land, legend=legend, title="RGB"))
    red, green, blue = (np.median(where(picture, c), axis=0) for c in ("#ff0000", "#00ff00", "#0000ff"))
    assert red[1] < green[1] < blue[1]
    assert red[0] == pytest.approx(green[0], abs=2)
    top = where(picture, "#ff0000")[:, 0].min()
    bottom = where(picture, "#ff0000")[:, 0].max()
    column = picture[: top - 1, int(red[1])]
    assert (column[-(bottom - top) // 8 :] == 255).all(), "no data is white"


def test_shares_sum_to_a_hundred_and_are_sorted(legend):
    rng = np.random.default_rng(3)
    values = np.array([*legend.codes, legend.nodata], "uint8")[(rng.random((333, 77)) ** 3 * 12).astype(int)]
    shares = class_shares(values, legend)
    assert round(sum(share for _, share in shares), 6) == 100
    assert [s for _, s in shares] == sorted((s for _, s in shares), reverse=True)
    mapped = (values != legend.nodata).sum()
    for c, share in shares:
        assert share == pytest.approx((values == c.code).sum() / mapped * 100, abs=0.1)
    thirds = class_shares(np.array([10, 20, 30], "uint8"), legend)
    assert [s for _, s in thirds] == [33.4, 33.3, 33.3]
    assert class_shares(np.zeros((4, 4), "uint8"), legend) == []


@pytest.mark.parametrize("shape", [(80, 400), (400, 80), (1, 1), (3, 900)])
def test_fifteen_classes_on_wide_and_tall_areas(tmp_path, shape):
    legend = Legend.load("corine-2")
    land = as_map(np.resize(codes(legend, (shape[0], max(shape[1], 15))), shape))
    path = write_quicklook(
        tmp_path / "q.png",
        composite=composite(*shape),
        land_cover=land,
        legend=legend,
        title="A title that is far longer than any page of this kind will be, and has to be wrapped somewhere",
        subtitle="2023-08-01 to 2023-08-31, " * 6,
    )
    picture = pixels(path)
    assert max(picture.shape) < 4000
    for c in legend.classes:
        assert len(where(picture, c.color)) >= 500 * (c.code in land), c.name  # each has at least its swatch
    frame = np.concatenate(
        [picture[:20].ravel(), picture[-10:].ravel(), picture[:, :20].ravel(), picture[:, -20:].ravel()]
    )
    assert (frame == 255).all(), "something runs off the page"


def test_an_area_one_pixel_wide_is_seen(tmp_path, legend):
    land = as_map(np.full((900, 1), 10, "uint8"))
    picture = pixels(write_quicklook(tmp_path / "q.png", composite=None, land_cover=land, legend=legend, title="Thin"))
    across = where(picture[picture.shape[0] // 2], legend[10].color)
    assert len(across) > 40


def test_one_class_and_no_class_at_all(tmp_path, legend):
    one = as_map(np.full((50, 60), 10, "uint8"))
    picture = pixels(write_quicklook(tmp_path / "1.png", composite=None, land_cover=one, legend=legend, title="One"))
    assert len(where(picture, legend[10].color)) > picture.shape[0] * picture.shape[1] / 4
    none = as_map(np.full((50, 60), legend.nodata, "uint8"))
    empty = as_map(np.zeros((3, 50, 60), "uint16"), band=["red", "green", "blue"])
    picture = pixels(write_quicklook(tmp_path / "0.png", composite=empty, land_cover=none, legend=legend, title="None"))
    assert not any(len(where(picture, color)) for color in vivid(legend.colors))


@pytest.mark.parametrize(
    "bands", [("nir", "red", "green"), ("swir16", "nir", "red"), ("nir08", "coastal", "scl"), ("nir",)]
)
def test_bands_without_true_colour_are_shown_all_the_same(tmp_path, legend, bands):
    land = as_map(quadrants(legend))
    path = write_quicklook(
        tmp_path / "q.png", composite=composite(bands=bands), land_cover=land, legend=legend, title="False colour"
    )
    left = pixels(path)[300:600, 200:600]
    assert left.std() > 20


def test_the_scale_bar_is_as_long_as_it_says(tmp_path, legend):
    """A map of 1600 m: the bar is a third of it at most, so 500 m, in black and white halves below the map."""
    land = as_map(np.full((120, 160), 10, "uint8"))
    picture = pixels(write_quicklook(tmp_path / "q.png", composite=None, land_cover=land, legend=legend, title=""))
    ground = where(picture, legend[10].color)
    row = ground[ground[:, 0] == ground[len(ground) // 2, 0], 1]
    left, width = row.min(), np.ptp(row) + 1
    below = (picture[ground[:, 0].max() + 10 :, left : left + width] < 60).all(-1)
    outline = below[below.sum(1).argmax()]  # the bar's edge, from the map's left edge on
    length = np.flatnonzero(~outline[5:])[0] + 5
    assert length / width == pytest.approx(500 / 1600, abs=0.01)


def test_degrees_are_turned_into_metres(tmp_path, legend):
    geobox = GeoBox.from_bbox((14, 59.5, 15, 60.5), "EPSG:4326", resolution=0.01)
    land = xr.DataArray(np.full(geobox.shape, 10, "uint8"), dims=("y", "x"), coords=xr_coords(geobox, always_yx=True))
    from s2seg.outputs.quicklook import _metres_across

    assert _metres_across(land) == pytest.approx(55_660, rel=0.01)
    write_quicklook(tmp_path / "q.png", composite=None, land_cover=land, legend=legend, title="Lon/lat")


@pytest.mark.parametrize("count", [1, 5, 8])
def test_a_series_has_a_map_for_each_date_in_order(tmp_path, legend, count):
    values = np.stack([np.full((40, 50), legend.codes[i], "uint8") for i in range(count)])
    times = np.datetime64("2023-08-01T10:07:49.024", "ns") + np.arange(count) * np.timedelta64(5, "D")
    images = np.random.default_rng(0).integers(200, 3000, (count, 3, 40, 50), dtype="uint16")
    path = write_quicklook_series(
        tmp_path / "q.png",
        composites=as_map(images, band=["red", "green", "blue"], time=times),
        land_cover=as_map(values, time=times),
        legend=legend,
        title="Five days apart",
    )
    picture = pixels(path)
    places = [np.median(where(picture, legend.colors[i]), axis=0) for i in range(count)]
    columns = 4 if count == 8 else count
    for i, (y, x) in enumerate(places):
        if i % columns:
            assert x > places[i - 1][1]
            assert y == pytest.approx(places[i - 1][0], abs=2)
        elif i:
            assert y > places[i - columns][0]
            assert x == pytest.approx(places[0][1], abs=2)


def test_a_thumbnail_strides_lazily():
    values = np.arange(3000 * 1700, dtype="uint32").reshape(3000, 1700)
    lazy = as_map(da.from_array(values, chunks=500))
    small = thumbnail(lazy, 1000)
    assert small.shape == (1000, 567)
    assert small.chunks is not None
    np.testing.assert_array_equal(small, values[1::3, 1::3])
    assert small.odc.geobox.resolution.x == 30
    assert thumbnail(lazy, 3000).shape == lazy.shape


def test_what_exists_is_replaced_only_on_request(tmp_path, legend):
    land = as_map(quadrants(legend))
    path = write_quicklook(tmp_path / "q.png", composite=None, land_cover=land, legend=legend, title="A")
    with pytest.raises(OutputError, match="pass --overwrite"):
        write_quicklook(path, composite=None, land_cover=land, legend=legend, title="B")
    before = path.read_bytes()
    write_quicklook(path, composite=None, land_cover=land, legend=legend, title="B", overwrite=True)
    assert path.read_bytes() != before
    assert [p.name for p in tmp_path.iterdir()] == ["q.png"]


def test_dates_share_the_stretch_of_the_clearest():
    rng = np.random.default_rng(0)
    land = rng.integers(200, 1500, (3, 60, 80), dtype="uint16")
    cloud = rng.integers(6000, 9000, (3, 60, 80), dtype="uint16")
    edge = np.where(np.arange(80) < 5, land // 2, 0).astype("uint16")  # a dark strip is no clear date
    image, _ = scene_image(as_map(np.stack([cloud, land, edge]), band=["red", "green", "blue"]))
    alone, _ = scene_image(as_map(land, band=["red", "green", "blue"]))
    np.testing.assert_array_equal(image[1], alone)
    assert image[0].min() == 255


@pytest.mark.parametrize(("color", "grey"), [("#f2f2f2", 178), ("#c0b0a0", 255)])
def test_no_data_differs_from_every_class(color, grey):
    legend = Legend("two", (LandClass(1, "a", "#102030"), LandClass(2, "b", color)))
    assert colored(np.array([[0, 2]], "uint8"), legend)[0, 0].tolist() == [grey] * 3


def test_what_lies_outside_is_neither_counted_nor_drawn(tmp_path, monkeypatch, legend):
    values = np.full((60, 80), legend.codes[0], "uint8")
    values[:, 40:] = legend.codes[1]
    values[:30, :40] = legend.nodata
    inside = np.zeros(values.shape, bool)
    inside[:, :40] = True
    told = []
    monkeypatch.setattr(quicklook, "_legend", lambda page, x, y, entries: told.extend(entries))
    path = write_quicklook(
        tmp_path / "q.png", composite=None, land_cover=as_map(values), legend=legend, title="t", inside=inside
    )
    assert [(e.lines[0], e.share) for e in told] == [(legend.names[0], "100.0 %"), ("no data (50.0 % of all)", "")]
    assert len(where(pixels(path), legend.colors[0])) and not len(where(pixels(path), legend.colors[1]))


@pytest.mark.parametrize("at_most", [0.1, 0.3, 1.0, 10 / 3, 999.9, 1000.0, 1e-5])
def test_a_scale_bar_has_a_round_length(at_most):
    length = quicklook._round_length(at_most)
    assert at_most / 2.51 <= length <= at_most * 1.000001
    assert f"{length:.0e}"[0] in "125"
