import json
import sys

import dask
import geopandas
import numpy as np
import pystac
import pytest
import rasterio
import shapely
from affine import Affine
from odc.geo.geobox import GeoBox
from pyproj import Transformer
from rasterio.enums import Resampling
from rasterio.warp import reproject
from shapely.geometry import Point, Polygon, box

from s2seg.errors import InputError, ReadError
from s2seg.legend import LandClass, Legend
from s2seg.sources.labels import RasterLabels, VectorLabels, footprint, read_labels

CODES = (0, 3, 7, 9, 200)  # 0 is a class: nodata is 255
LEGEND = Legend(
    "test", tuple(LandClass(c, f"class {c}", f"#0000{i:02x}") for i, c in enumerate(CODES)), nodata=255
)  # fmt: skip
X0, Y0 = 500_000.0, 5_000_000.0
GRID = GeoBox((150, 170), Affine(10, 0, X0, 0, -10, Y0), "EPSG:32633")


@pytest.fixture
def tif(tmp_path):
    """Write an array as a GeoTIFF whose upper left corner is (left, top)."""

    def write(array, left=X0, top=Y0, pixel=10.0, crs="EPSG:32633", nodata=255, name="labels.tif", **profile):
        array = np.asarray(array)
        bands = array if array.ndim == 3 else array[None]
        transform = Affine(pixel, 0, left, 0, -pixel, top)
        shape = dict(zip(("count", "height", "width"), bands.shape, strict=True))
        path = tmp_path / name
        with rasterio.open(
            path,
            "w",
            driver="GTiff",
            dtype=bands.dtype,
            crs=crs,
            transform=transform,
            nodata=nodata,
            **shape,
            **profile,
        ) as out:
            out.write(bands)
        return str(path)

    return write


@pytest.fixture
def vector(tmp_path):
    """Write (geometry, value) pairs in the grid's CRS."""

    def write(features, name="labels.gpkg", crs="EPSG:32633", to=None, column="kind", **options):
        shapes, values = zip(*features, strict=True)
        frame = geopandas.GeoDataFrame({column: list(values)}, geometry=list(shapes), crs=crs)
        frame = frame.to_crs(to) if to else frame
        path = tmp_path / name
        frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_file(path, **options)
        return str(path)

    return write


def random_codes(shape, codes=(*CODES, 255), seed=0, dtype=np.uint8):
    return np.random.default_rng(seed).choice(np.array(codes, dtype=dtype), shape)


def pixels(source, grid=GRID, chunks=64, legend=LEGEND, **options):
    return read_labels(source, grid, legend, chunks=chunks, **options).values


def square(left, top, right, bottom):
    """A rectangle given by columns and rows of GRID."""
    return box(X0 + 10 * left, Y0 - 10 * bottom, X0 + 10 * right, Y0 - 10 * top)


def test_the_result_is_lazy_on_the_grid_with_one_task_per_chunk(tif):
    path = tif(random_codes(GRID.shape))
    chunks = ((64, 64, 22), (100, 70))
    lazy = read_labels(RasterLabels(path), GRID, LEGEND, chunks=chunks)
    assert (lazy.dims, lazy.dtype, lazy.data.chunks) == (("y", "x"), np.uint8, chunks)
    assert lazy.odc.geobox == GRID
    (graph,) = dask.optimize(lazy.data)
    assert len(dict(graph.dask)) == 6
    again = read_labels(RasterLabels(path), GRID, LEGEND, chunks=chunks)
    assert again.data.name == lazy.data.name != read_labels(RasterLabels(path), GRID, LEGEND, chunks=50).data.name


@pytest.mark.parametrize("resampling", ["mode", "nearest"])
def test_the_same_grid_is_read_bit_for_bit(tif, resampling):
    codes = random_codes((90, 80))
    got = pixels(RasterLabels(tif(codes, left=X0 + 300, top=Y0 - 200), resampling))
    expected = np.full(GRID.shape, 255, dtype=np.uint8)
    expected[20:110, 30:110] = codes
    np.testing.assert_array_equal(got, expected)


def test_finer_labels_come_by_majority_without_a_vote_for_nodata(tif):
    fine = random_codes((4 * 150, 4 * 170), seed=1)
    got = pixels(RasterLabels(tif(fine, pixel=2.5)))
    blocks = fine.reshape(150, 4, 170, 4).swapaxes(1, 2).reshape(150, 170, 16)
    votes = np.stack([(blocks == code).sum(axis=2) for code in CODES])
    best = votes.max(axis=0)
    chosen = np.take_along_axis(votes, np.searchsorted(CODES, np.minimum(got, 200))[None], axis=0)[0]
    np.testing.assert_array_equal(chosen, best)  # a winner everywhere, also where nodata has more votes than any
    sure = (votes == best).sum(axis=0) == 1
    assert 0.5 < sure.mean() < 1
    np.testing.assert_array_equal(got[sure], np.array(CODES, dtype=np.uint8)[votes.argmax(axis=0)][sure])
    centre = blocks[..., 10]  # the pixel below and right of the middle
    tied = ~sure & (np.stack([centre == code for code in CODES]) & (votes == best)).any(axis=0)
    np.testing.assert_array_equal(got[tied], centre[tied])


def test_one_valid_pixel_outvotes_any_nodata_and_none_is_nodata(tif):
    fine = np.full((300, 340), 255, dtype=np.uint8)
    fine[21, 41] = 7
    got = pixels(RasterLabels(tif(fine, pixel=5)))
    assert (got[10, 20], (got != 255).sum()) == (7, 1)


def test_merged_classes_vote_together(tif):
    fine = np.tile(np.array([[1, 2, 5], [1, 2, 5], [5, 5, 2]], dtype=np.int16), (150, 170))
    path = tif(fine, pixel=10 / 3, nodata=-1)
    remap = {1: 3, 2: "class 3", 5: 9}
    assert np.unique(pixels(RasterLabels(path), remap=remap)) == [3]  # 5 alone is the most frequent code


@pytest.mark.parametrize(
    ("pixel", "crs", "left", "top"),
    [
        (3.0, "EPSG:32633", X0 - 101, Y0 + 57),  # finer, on no common edge
        (30.0, "EPSG:32633", X0 - 95, Y0 + 70),  # coarser
        (10.0, "EPSG:32633", X0 - 104, Y0 + 43),  # shifted
        (4.0, "EPSG:3035", 4_713_000.0, 2_463_500.0),  # finer, turned
        (2.5e-4, "EPSG:4326", 14.98, 45.17),  # coarser, in degrees
    ],
)
@pytest.mark.parametrize("resampling", ["mode", "nearest"])
def test_no_class_is_invented_and_chunks_do_not_matter(tif, pixel, crs, left, top, resampling):
    used = (0, 9, 200)
    path = tif(random_codes((1100, 1200), (*used, 255), seed=2), left, top, pixel, crs)
    source = RasterLabels(path, resampling)
    whole = pixels(source, chunks=-1)
    np.testing.assert_array_equal(pixels(source, chunks=64), whole)
    np.testing.assert_array_equal(pixels(source, chunks=((1, 149), (77, 93))), whole)
    assert set(used) <= set(np.unique(whole)) <= {*used, 255}
    assert (whole != 255).mean() > 0.7


@pytest.mark.parametrize(("crs", "resampling"), [("EPSG:3035", "nearest"), ("EPSG:3035", "mode")])
def test_another_crs_agrees_with_gdal(tif, crs, resampling):
    patches = np.kron(random_codes((60, 60), CODES, seed=3), np.ones((20, 20), dtype=np.uint8))
    path = tif(patches, 4_713_000.0, 2_463_500.0, 4.0, crs)
    expected = np.full(GRID.shape, 255, dtype=np.uint8)
    with rasterio.open(path) as dataset:
        reproject(
            rasterio.band(dataset, 1), expected, dst_transform=GRID.affine, dst_crs="EPSG:32633", dst_nodata=255,
            resampling=Resampling[resampling], tolerance=0.001,
        )  # fmt: skip
    got = pixels(RasterLabels(path, resampling))
    assert (got != 255).all()
    assert (got == expected).mean() > (0.995 if resampling == "nearest" else 0.95)  # mode: GDAL's weights at edges


def test_across_the_antimeridian(tif):
    lon = np.broadcast_to(np.where(np.arange(3600) < 1800, 3, 9), (40, 3600)).astype(np.uint8)
    path = tif(lon, left=-180, top=-16, pixel=0.1, crs="EPSG:4326")
    grid = GeoBox((60, 300), Affine(500, 0, 750_000, 0, -500, 8_080_000), "EPSG:32760")
    got = pixels(RasterLabels(path), grid)
    assert set(np.unique(got)) == {3, 9}
    assert (np.diff((got == 3).astype(int), axis=1) >= 0).all()  # east of 180 comes 180 west, in one step


@pytest.mark.parametrize("dtype", ["int8", "int16", "uint16", "int32", "uint32"])
def test_codes_of_any_width_can_be_remapped(tif, dtype):
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    codes = random_codes(GRID.shape, (low, 1, high), dtype=dtype)
    path = tif(codes, nodata=1)
    got = pixels(RasterLabels(path), remap={low: "class 0", str(high): 200})  # keys from JSON are text
    np.testing.assert_array_equal(got, np.select([codes == low, codes == high], [0, 200], 255))


def test_remap_drops_and_keeps_the_rest(tif):
    codes = random_codes(GRID.shape, (3, 7, 9))
    got = pixels(RasterLabels(tif(codes)), remap={7: None})
    np.testing.assert_array_equal(got, np.where(codes == 7, 255, codes))


@pytest.mark.parametrize("alpha", [False, True])
def test_colours_become_codes(tif, alpha):
    codes = random_codes(GRID.shape, (0, 1, 2))
    palette = np.array([[0, 0, 0], [0, 255, 255], [255, 0, 16]], dtype=np.uint8)
    bands = np.moveaxis(palette[codes], -1, 0)
    hidden = np.zeros(GRID.shape, dtype=bool)
    if alpha:
        hidden[5:9] = True
        bands = np.concatenate([bands, np.where(hidden, 0, 255)[None].astype(np.uint8)])
    path = tif(bands, nodata=None, photometric="RGB", **({"alpha": "YES"} if alpha else {}))
    got = pixels(RasterLabels(path, colors={"#000000": None, "#00FFFF": "class 7", "#ff0010": 0}))
    np.testing.assert_array_equal(got, np.where(hidden, 255, np.array([255, 7, 0])[codes]))
    np.testing.assert_array_equal(pixels(RasterLabels(path, band=2), remap={255: 3}) == 3, (codes == 1) & ~hidden)


def test_a_stac_item_names_its_raster(tif, tmp_path):
    path = tif(random_codes(GRID.shape))
    item = pystac.Item("labels", None, None, pystac.utils.str_to_datetime("2021-01-01T00:00:00Z"), {})
    item.add_asset("map", pystac.Asset("./labels.tif"))
    item.add_asset("quality", pystac.Asset("./quality.tif"))
    href = tmp_path / "item.json"
    href.write_text(json.dumps(item.to_dict(include_self_link=False)))
    got = pixels(RasterLabels(str(href), asset="map"))
    np.testing.assert_array_equal(got, pixels(RasterLabels(path)))
    with pytest.raises(InputError, match=r"name one asset of map, quality with `asset`"):
        pixels(RasterLabels(str(href)))


def labels_in_a_far_corner(value):
    codes = np.full((1500, 1500), 255, dtype=np.uint8)
    codes[1100, 700] = value
    return codes


@pytest.mark.parametrize(
    ("array", "profile", "options", "message"),
    [
        (np.full((150, 170), 4, np.uint8), {}, {}, r"values 4 are not in legend 'test' .*add each to `remap`"),
        (random_codes((150, 170), (300, 301), dtype=np.int16), {"nodata": -1}, {}, "values 300, 301 are not in"),
        (np.arange(150 * 170, dtype=np.int32).reshape(150, 170), {"nodata": -1}, {}, r"and \d+ more are not in"),
        (np.ones((150, 170), np.float32), {}, {}, "hold float32, .* gdal_translate -ot Byte"),
        (np.ones((3, 150, 170), np.uint8), {"photometric": "RGB"}, {}, r"colors: \{'#010101': CODE\}"),
        (np.ones((3, 150, 170), np.uint8), {"photometric": "RGB"}, {"colors": {"#000000": 3}}, "colors #010101 are"),
        (np.ones((3, 150, 170), np.uint16), {}, {"colors": {"#000000": 3}}, "needs 8-bit bands, not uint16"),
        (
            np.full((150, 170), 3, np.uint8),
            {},
            {"colors": {"#000000": 3}},
            "`colors` needs three bands, and there is 1",
        ),
        (np.full((150, 170), 3, np.uint8), {}, {"band": 2}, "there is no band 2; choose 1 to 1"),
        (np.full((150, 170), 3, np.uint8), {}, {"colors": {"red": 3}}, "color 'red' is not of the form"),
        (np.full((150, 170), 3, np.uint8), {}, {"resampling": "cubic"}, "choose mode or nearest"),
        (np.full((150, 170), 3, np.uint8), {"crs": None}, {}, "have no CRS; .*gdal_edit.py -a_srs"),
        (np.full((150, 170), 3, np.uint8), {"left": X0 + 1e5}, {}, r"do not overlap the grid: they cover 16\.2"),
        (np.full((150, 170), 255, np.uint8), {}, {}, "have no label on the grid: all 25500 pixels"),
    ],
)
def test_unusable_rasters_are_refused_before_computing(tif, array, profile, options, message):
    path = tif(array, **profile)
    with pytest.raises(InputError, match=message) as caught:
        read_labels(RasterLabels(path, **options), GRID, LEGEND, chunks=64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("remap", "message"),
    [
        ({3: 4}, "remap 3: 4 is no code or name of legend 'test'"),
        ({3: "class 4"}, "remap 3: 'class 4' is no code or name"),
        ({3: True}, "remap 3: True is no code or name"),
    ],
)
def test_remap_must_lead_into_the_legend(tif, remap, message):
    with pytest.raises(InputError, match=message):
        pixels(RasterLabels(tif(random_codes(GRID.shape))), remap=remap)


def test_colors_and_remap_exclude_each_other(tif):
    with pytest.raises(InputError, match="not both"):
        pixels(RasterLabels(tif(random_codes(GRID.shape)), colors={"#000000": 3}), remap={1: 3})


def test_missing_and_broken_files_are_one_line(tif, tmp_path):
    (tmp_path / "broken.tif").write_bytes(b"no raster")
    for name in ("broken.tif", "missing.tif"):
        with pytest.raises(InputError, match=f"{name} cannot be opened") as caught:
            pixels(RasterLabels(str(tmp_path / name)))
        assert "\n" not in str(caught.value)
    path = tif(random_codes(GRID.shape), compress="deflate")
    whole = (tmp_path / "labels.tif").read_bytes()
    (tmp_path / "labels.tif").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((InputError, ReadError), match=path):
        pixels(RasterLabels(path))


def test_a_lone_label_is_found_and_a_lone_unknown_code_is_an_error_when_computed(tif):
    grid = GeoBox((1500, 1500), GRID.affine, GRID.crs)
    got = pixels(RasterLabels(tif(labels_in_a_far_corner(7))), grid, chunks=512)
    assert (got[1100, 700], (got != 255).sum()) == (7, 1)
    codes = labels_in_a_far_corner(8)
    codes[0, 0] = 3
    lazy = read_labels(RasterLabels(tif(codes)), grid, LEGEND, chunks=512)
    with pytest.raises(InputError, match="values 8 are not in"):
        lazy.compute()


@pytest.mark.parametrize("finer", [1, 40])
def test_all_unknown_codes_are_listed_wherever_they_lie(tif, finer):
    codes = np.repeat(np.arange(150) // 25 * 100 + 110, 170).reshape(150, 170).astype(np.uint16)
    codes = codes.repeat(finer, axis=0).repeat(finer, axis=1)
    path = tif(codes, nodata=110, pixel=10 / finer)
    with pytest.raises(InputError, match="values 210, 310, 410, 510, 610 are not in"):
        pixels(RasterLabels(path))
    with pytest.raises(InputError, match="values 310, 510 are not in"):
        pixels(RasterLabels(path), remap={210: 3, 410: 7, 610: None})


def test_all_unknown_features_are_listed_wherever_they_lie(vector):
    far = GeoBox((1500, 1500), GRID.affine, GRID.crs)
    shapes = [(square(x, y, x + 10, y + 10), f"at {y}") for y, x in ((0, 0), (700, 1400), (1490, 10))]
    with pytest.raises(InputError, match="values at 0, at 1490, at 700 are not in"):
        pixels(VectorLabels(vector(shapes), "kind"), far, chunks=512)


def test_codes_outside_the_grid_do_not_matter(tif):
    codes = np.full((200, 200), 77, dtype=np.uint8)
    codes[:150, :170] = 3
    assert np.unique(pixels(RasterLabels(tif(codes)))) == [3]


def test_footprints_are_lon_lat(tif, vector):
    area = footprint(RasterLabels(tif(random_codes(GRID.shape))))
    edge = shapely.segmentize(square(0, 0, 170, 150), 100)
    lon_lat = Transformer.from_crs("EPSG:32633", "EPSG:4326", always_xy=True)
    expected = shapely.transform(edge, lambda xy: np.column_stack(lon_lat.transform(*xy.T)))
    assert area.symmetric_difference(expected).area < 1e-4 * expected.area
    drawn = footprint(
        VectorLabels(vector([(square(0, 0, 80, 10), "class 3"), (square(90, 20, 170, 150), None)]), "kind")
    )
    assert drawn.symmetric_difference(expected).area < 1e-4 * expected.area


OVERLAPPING = [(square(10, 10, 60, 60), "class 3"), (square(40, 40, 90, 90), "class 9"), (square(0, 0, 2, 2), None)]


@pytest.mark.parametrize("name", ["labels.gpkg", "labels.geojson", "labels.parquet", "labels.shp"])
def test_later_features_win(vector, name):
    to = "EPSG:4326" if name.endswith("json") else None
    expected = np.full(GRID.shape, 255, dtype=np.uint8)
    expected[10:60, 10:60] = 3
    expected[40:90, 40:90] = 9
    np.testing.assert_array_equal(pixels(VectorLabels(vector(OVERLAPPING, name, to=to), "kind"), chunks=37), expected)


@pytest.mark.parametrize(
    ("priority", "winner"), [(("class 9", "class 3"), 3), (("class 3", "class 9"), 9), (("class 3",), 3)]
)
def test_priority_says_which_value_wins(vector, priority, winner):
    got = pixels(VectorLabels(vector(OVERLAPPING), "kind", priority=priority))
    assert (got[50, 50], got[20, 20], got[80, 80]) == (winner, 3, 9)


@pytest.mark.parametrize("all_touched", [False, True])
def test_features_look_the_same_from_every_chunk(vector, all_touched):
    rng = np.random.default_rng(5)
    features = []
    for code in rng.choice(CODES, 60):
        at = rng.uniform((X0, Y0 - 1500), (X0 + 1700, Y0))
        around = np.sort(rng.uniform(0, 2 * np.pi, 9))
        radius = rng.uniform(20, 300, 9)
        ring = at + np.column_stack([np.cos(around) * radius, np.sin(around) * radius])
        # half of the corners on pixel centres and edges, where rounding would show
        features.append((Polygon(np.where(rng.random((9, 1)) < 0.5, np.round(ring / 5) * 5, ring)), int(code)))
    source = VectorLabels(vector(features), "kind", all_touched=all_touched)
    grid = GeoBox((600, 620), Affine(2.5, 0, X0, 0, -2.5, Y0), GRID.crs)
    whole = pixels(source, grid, chunks=-1)
    assert len(np.unique(whole)) == 6
    for chunks in (256, 77):
        np.testing.assert_array_equal(pixels(source, grid, chunks=chunks), whole)


def test_all_touched_points_invalid_shapes_and_another_crs(vector):
    bow_tie = Polygon([(X0, Y0), (X0 + 400, Y0 - 400), (X0 + 400, Y0), (X0, Y0 - 400)])
    point = Point(X0 + 1005, Y0 - 1005)
    source = vector([(bow_tie, 3.0), (point, 9.0), (square(120.2, 20.2, 120.4, 20.4), 7.0), (point, None)])
    centres, touched = (pixels(VectorLabels(source, "kind", all_touched=t)) for t in (False, True))
    assert (centres[20, 5], centres[20, 35], centres[2, 20], centres[100, 100], centres[20, 120]) == (3, 3, 255, 9, 255)
    assert touched[20, 120] == 7
    turned = vector([(square(20, 30, 90, 70), 3)], "turned.gpkg", to="EPSG:3035")
    expected = np.full(GRID.shape, 255, dtype=np.uint8)
    expected[30:70, 20:90] = 3
    np.testing.assert_array_equal(pixels(VectorLabels(turned, "kind")), expected)


def test_features_larger_than_the_world_of_a_projection(vector):
    world = vector([(box(-180, -90, 180, 90), 3)], crs="EPSG:4326")
    assert np.unique(pixels(VectorLabels(world, "kind"))) == [3]


def test_values_of_features_are_remapped(vector):
    features = [(square(0, 0, 50, 50), "oak"), (square(50, 0, 90, 50), "12"), (square(90, 0, 99, 50), "?")]
    got = pixels(VectorLabels(vector(features), "kind"), remap={"oak": "class 7", 12: 0, "?": None})
    assert (got[0, 0], got[0, 60], got[0, 95]) == (7, 0, 255)


@pytest.mark.parametrize(
    ("options", "remap", "message"),
    [
        ({"column": "klass"}, None, "have no column 'klass'; choose kind"),
        ({"layer": "trees"}, None, "have no layer 'trees'; choose labels"),
        ({}, {"class 3": None, "class 9": None}, "have no label on the grid"),
        ({"priority": ("class 33",)}, None, "priority names 'class 33'"),
    ],
)
def test_unusable_vectors_are_refused(vector, options, remap, message):
    source = VectorLabels(vector(OVERLAPPING), **{"column": "kind", **options})
    with pytest.raises(InputError, match=message):
        pixels(source, remap=remap)


def test_vector_files_that_cannot_be_labels(vector, tmp_path, monkeypatch):
    (tmp_path / "broken.gpkg").write_bytes(b"nothing")
    (tmp_path / "broken.parquet").write_bytes(b"nothing")
    two = vector(OVERLAPPING, "two.gpkg", layer="a")
    vector(OVERLAPPING, "two.gpkg", layer="b")
    cases = [
        (
            vector([(square(0, 0, 50, 50), "oak"), (square(50, 0, 90, 50), "ash")], "a.gpkg"),
            "values ash, oak are not in",
        ),
        (vector([(square(900, 900, 999, 999), "class 3")], "b.gpkg"), "do not overlap the grid"),
        (vector(OVERLAPPING, "c.parquet", crs=None), "have no CRS; .*ogr2ogr -a_srs"),
        (two, "several layers; name one with `layer`: a, b"),
        (str(tmp_path / "missing.gpkg"), "do not exist"),
        (str(tmp_path / "broken.gpkg"), "cannot be read"),
        (str(tmp_path / "broken.parquet"), "cannot be read"),
    ]
    for href, message in cases:
        with pytest.raises(InputError, match=message) as caught:
            pixels(VectorLabels(href, "kind"))
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "geopandas", None)
    with pytest.raises(InputError, match=r"pip install 's2seg\[train\]'"):
        pixels(VectorLabels(two, "kind", layer="a"))


REAL = {
    "alberta/labels/landcover_30m.tif": (1, 2, 3, 4),
    "mekong/labels/dynamicworld_10m.tif": tuple(range(9)),
    "flanders/labels/landcover_10m.tif": (11, 13, 60, 99),
    "labelled/labels/637U_59R_1_3.tif": (1, 2, 3, 4, 5, 6, 7, 9),
}


@pytest.mark.real_data
@pytest.mark.parametrize(("name", "codes"), REAL.items())
def test_real_labels_on_their_own_grid(real_data, name, codes):
    with rasterio.open(real_data / name) as dataset:
        grid, expected, nodata = (
            GeoBox(dataset.shape, dataset.transform, str(dataset.crs)),
            dataset.read(1),
            dataset.nodata,
        )
    legend = Legend("real", tuple(LandClass(c, str(c), "#000000") for c in codes), nodata=int(nodata))
    source = RasterLabels(str(real_data / name))
    np.testing.assert_array_equal(pixels(source, grid, 500, legend), expected)


@pytest.mark.real_data
def test_alberta_on_its_scene(real_data):
    scene = next((real_data / "alberta").rglob("B04.tif"))
    path = real_data / "alberta/labels/landcover_30m.tif"
    with rasterio.open(scene) as dataset, rasterio.open(path) as labels:
        grid = GeoBox(dataset.shape, dataset.transform, str(dataset.crs))
        fine, red = labels.read(1), dataset.read(1)
        col, row = (int(at) for at in ~grid.affine @ (labels.transform.c, labels.transform.f))
    legend = Legend("alberta", tuple(LandClass(c, str(c), "#000000") for c in (1, 2, 3, 4)))
    got = pixels(RasterLabels(str(path)), grid, 512, legend)
    np.testing.assert_allclose(np.bincount(got.ravel())[1:], np.bincount(fine.ravel())[1:] / 4, rtol=0.1)
    assert (got[:row] == 0).all()
    assert (got[:, :col] == 0).all()
    # bare ground is bright in red and vegetation is dark: so it is only where the two are aligned
    assert np.median(red[got == 3]) > 1.3 * np.median(red[got == 2])


def test_a_geoparquet_that_changes_is_read_anew(vector):
    for code in (3, 7):
        source = VectorLabels(vector([(square(0, 0, 20, 20), code)], "labels.parquet"), "kind")
        assert pixels(source)[5, 5] == code
