import itertools
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree as ET

import dask.array as da
import numpy as np
import pytest
import rasterio
import rasterio.shutil
import xarray as xr
from odc.geo.xr import xr_coords
from rio_cogeo import cog_validate

from s2seg.errors import InputError, OutputError, ReadError
from s2seg.legend import Legend
from s2seg.outputs.cog import write_cog
from s2seg.outputs.zarr import write_zarr
from tests.outputs.conftest import codes, grid


@pytest.fixture(autouse=True)
def with_sidecars():
    """The suite's environment hides side files from GDAL; here they are the subject."""
    with rasterio.Env(GDAL_DISABLE_READDIR_ON_OPEN="FALSE"):
        yield


def as_map(values, chunk=None, name="land_cover"):
    data = values if chunk is None else da.from_array(values, chunks=chunk)
    return xr.DataArray(data, dims=("y", "x"), coords=xr_coords(grid(*values.shape)), name=name)


def majority(values, nodata):
    """Mode of 2 x 2 valid pixels, made slowly: of tied codes the one that first reaches the count, row by row."""
    out = np.full([-(-size // 2) for size in values.shape], nodata, values.dtype)
    for y, x in np.ndindex(*out.shape):
        count, best = {}, 0
        for code in values[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel():
            if code != nodata:
                count[code] = count.get(code, 0) + 1
                if count[code] > best:
                    best, out[y, x] = count[code], code
    return out


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [((1100, 1300), 512), ((700, 1500), 300), ((40, 30), 512), ((1, 1), 512), ((513, 1025), None), ((30, 2000), 1024)],
)
def test_a_valid_cog_with_the_maps_own_pixels_grid_and_colours(tmp_path, legend, shape, chunk):
    values = codes(legend, shape, nodata_border=min(20, shape[0] - 1))
    path = write_cog(as_map(values, chunk), tmp_path / "land_cover.tif", legend=legend, tags={"model": "unet 1.0"})
    assert path == tmp_path / "land_cover.tif"
    assert cog_validate(path, strict=True, quiet=True) == (True, [], [])
    with rasterio.open(path) as src:
        np.testing.assert_array_equal(src.read(1), values)
        assert src.crs.to_epsg() == 32633
        assert src.transform == grid(*shape).transform
        assert src.dtypes == ("uint8",)
        assert src.nodata == legend.nodata
        assert src.descriptions == ("land_cover",)
        assert src.block_shapes == [(512, 512)]
        assert src.tags()["model"] == "unet 1.0"
        assert src.colorinterp == (rasterio.enums.ColorInterp.palette,)
        palette = src.colormap(1)
        assert {code: palette[code] for code in legend.codes} == {c.code: (*c.rgb, 255) for c in legend.classes}
        assert palette[legend.nodata] == (0, 0, 0, 0)
        assert bool(src.overviews(1)) == (max(shape) > 512)


def test_the_zarr_is_a_source(tmp_path, legend, make_prediction):
    prediction = make_prediction(legend)
    stored = write_zarr(prediction, tmp_path / "map.zarr")
    with rasterio.open(write_cog(stored, tmp_path / "land_cover.tif", legend=legend)) as src:
        np.testing.assert_array_equal(src.read(1), prediction["land_cover"])
        assert src.transform == grid(150, 220).transform
    with rasterio.open(write_cog(str(stored), tmp_path / "confidence.tif", legend=None)) as src:
        np.testing.assert_array_equal(src.read(1), prediction["confidence"])
        assert src.nodata == 255
        assert src.descriptions == ("confidence",)


def test_overviews_are_the_majority_of_valid_pixels(tmp_path):
    legend = Legend.load("corine-1")
    # every 2 x 2 pattern of nodata and four classes, ties and all, then a map
    patterns = np.array(list(itertools.product(range(5), repeat=4)), "uint8").reshape(25, 25, 2, 2)
    values = codes(legend, (1021, 2307), nodata_border=33)
    values[-1] = values[:, -1] = legend.codes[0]
    values[:50, :50] = patterns.transpose(0, 2, 1, 3).reshape(50, 50)
    values[600:900, 600:900] = np.random.default_rng(1).integers(0, 6, (300, 300))
    path = write_cog(as_map(values, 512), tmp_path / "land_cover.tif", legend=legend)
    level = majority(values, legend.nodata)
    with rasterio.open(path) as src:
        assert src.overviews(1) == [2, 4, 8]
    for i in range(3):
        with rasterio.open(path, overview_level=i) as src:
            np.testing.assert_array_equal(src.read(1), level)
        level = majority(level, legend.nodata)


def test_overviews_keep_a_nodata_code_that_is_not_zero(tmp_path):
    legend = Legend.load("dynamic-world")  # 0 is water, 255 nodata
    values = codes(legend, (600, 1200), nodata_border=101)
    path = write_cog(as_map(values, 512), tmp_path / "land_cover.tif", legend=legend)
    with rasterio.open(path, overview_level=0) as src:
        np.testing.assert_array_equal(src.read(1), majority(values, 255))
        assert src.nodata == 255


def test_overviews_of_confidence_are_averages(tmp_path):
    values = np.full((600, 600), 255, "uint8")
    values[100:400, 100:400] = np.arange(300) % 100
    path = write_cog(as_map(values, 512, "confidence"), tmp_path / "confidence.tif", legend=None)
    expected = np.full((300, 300), 255.0)
    expected[50:200, 50:200] = values[100:400, 100:400].reshape(150, 2, 150, 2).mean((1, 3))
    with rasterio.open(path, overview_level=0) as src:
        assert np.abs(src.read(1) - expected).max() <= 0.5
        assert src.colorinterp == (rasterio.enums.ColorInterp.gray,)
    assert [p.name for p in tmp_path.iterdir()] == ["confidence.tif"]


def test_a_map_without_an_answer_anywhere(tmp_path, legend):
    path = write_cog(as_map(np.zeros((700, 800), "uint8"), 512), tmp_path / "land_cover.tif", legend=legend)
    assert cog_validate(path, strict=True, quiet=True)[0]
    with rasterio.open(path) as src:
        assert not src.read(1).any()
        assert not src.read_masks(1).any()


@pytest.mark.parametrize("name", ["worldcover", "dynamic-world"])
def test_gdal_itself_reads_the_class_names_and_the_attribute_table(tmp_path, name):
    legend = Legend.load(name)
    path = write_cog(as_map(codes(legend, (60, 70))), tmp_path / "land_cover.tif", legend=legend)
    rasterio.shutil.copy(path, tmp_path / "seen.vrt", driver="VRT")  # what GDAL knows of a band, it writes here
    band = ET.parse(tmp_path / "seen.vrt").find("VRTRasterBand")
    categories = [c.text or "" for c in band.findall("CategoryNames/Category")]
    assert {code: categories[code] for code in legend.codes} == dict(zip(legend.codes, legend.names, strict=True))
    assert categories[legend.nodata] == "no data"
    assert {c for i, c in enumerate(categories) if i not in {legend.nodata, *legend.codes}} <= {""}

    rasterio.shutil.copy(path, tmp_path / "again.tif", driver="GTiff")  # GDAL takes the attribute table along
    sidecar = ET.parse(tmp_path / "again.tif.aux.xml")
    table = sidecar.find("PAMRasterBand/GDALRasterAttributeTable")
    assert table.get("tableType") == "thematic"
    assert [f.findtext("Usage") for f in table.findall("FieldDefn")] == ["5", "2", "6", "7", "8", "9"]
    rows = {int(r[0].text): [f.text for f in r][1:] for r in table.findall("Row")}
    for c in legend.classes:
        assert rows[c.code] == [c.name, *map(str, c.rgb), "255"]
    assert rows[legend.nodata][-1] == "0"


def test_qgis_finds_a_style_of_the_files_name(tmp_path, legend):
    write_cog(as_map(codes(legend, (60, 70))), tmp_path / "land_cover.tif", legend=legend)
    renderer = ET.parse(tmp_path / "land_cover.qml").find("pipe/rasterrenderer")
    assert (renderer.get("type"), renderer.get("band")) == ("paletted", "1")
    entries = {
        int(e.get("value")): (e.get("label"), e.get("color"), e.get("alpha")) for e in renderer.iter("paletteEntry")
    }
    assert {c.code: (c.name, c.color, "255") for c in legend.classes}.items() <= entries.items()
    assert entries[legend.nodata][2] == "0"


def test_names_that_xml_dislikes_survive(tmp_path):
    legend = Legend.from_dict(
        {"name": "odd", "classes": [{"code": 3, "name": 'crops < 1 m & "hay" ž', "color": "#aabbcc"}]}
    )
    path = write_cog(as_map(np.full((9, 9), 3, "uint8")), tmp_path / "land_cover.tif", legend=legend)
    rasterio.shutil.copy(path, tmp_path / "seen.vrt", driver="VRT")
    names = [c.text for c in ET.parse(tmp_path / "seen.vrt").findall("VRTRasterBand/CategoryNames/Category")]
    assert names[3] == legend.names[0]
    assert ET.parse(tmp_path / "land_cover.qml").find(".//paletteEntry").get("label") == legend.names[0]


def test_one_date_of_several(tmp_path, legend):
    values = np.stack([codes(legend, (50, 60)), codes(legend, (50, 60))[::-1]])
    times = np.array(["2023-08-01T10:07:49.024", "2023-08-06"], "datetime64[ns]")
    cube = xr.DataArray(
        values, dims=("time", "y", "x"), coords=xr_coords(grid(50, 60)) | {"time": times}, name="land_cover"
    )
    path = write_cog(cube, tmp_path / "b.tif", legend=legend, time=times[1])
    np.testing.assert_array_equal(rasterio.open(path).read(1), values[1])
    path = write_cog(cube, tmp_path / "a.tif", legend=legend, time="2023-08-01T10:07:49.024")
    np.testing.assert_array_equal(rasterio.open(path).read(1), values[0])
    np.testing.assert_array_equal(
        rasterio.open(write_cog(cube[1:], tmp_path / "c.tif", legend=legend)).read(1), values[1]
    )
    for wrong in (None, "2023-08-02"):
        with pytest.raises(InputError, match="pass one of them as time="):
            write_cog(cube, tmp_path / "d.tif", legend=legend, time=wrong)
    assert not (tmp_path / "d.tif").exists()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_exists_is_replaced_only_on_request(tmp_path, legend):
    path = write_cog(as_map(codes(legend, (60, 70))), tmp_path / "map.tif", legend=legend)
    before = path.read_bytes()
    with pytest.raises(OutputError, match=r"map\.tif: it exists already; pass --overwrite"):
        write_cog(as_map(np.zeros((9, 9), "uint8")), path, legend=legend)
    assert path.read_bytes() == before
    write_cog(as_map(np.zeros((9, 9), "uint8"), name="confidence"), path, legend=None, overwrite=True)
    assert rasterio.open(path).shape == (9, 9)
    assert [p.name for p in tmp_path.iterdir()] == ["map.tif"], "the names of the old map's classes are gone too"


def test_a_failed_read_leaves_the_old_map(tmp_path, legend):
    def fail(block):
        raise ReadError("S2A_X", "red", "red.tif", "tile gone")

    path = write_cog(as_map(codes(legend, (60, 70))), tmp_path / "map.tif", legend=legend)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    bad = as_map(codes(legend, (60, 70)), 64)
    with pytest.raises(ReadError):
        write_cog(bad.copy(data=bad.data.map_blocks(fail, meta=np.empty((0, 0)))), path, legend=legend, overwrite=True)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "kilobytes", [200, 1000, 1500]
)  # full while pixels are gathered, at their end, laying out the COG
def test_a_full_disk_is_named_and_left_clean(tmp_path, kilobytes):
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size={kilobytes}k tmpfs {tmp_path}"
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    body = """
        import sys
        import numpy as np
        from s2seg.errors import OutputError
        from s2seg.legend import Legend
        from s2seg.outputs.cog import write_cog
        from tests.outputs.test_cog import as_map

        noise = np.random.default_rng(0).integers(1, 250, (1024, 1024), dtype="uint8")
        try:
            write_cog(as_map(noise, 256), sys.argv[1] + "/map.tif", legend=Legend.load("esri"))
        except OutputError as error:
            print(error)
    """
    script = f'{mount} && "{sys.executable}" -c "$0" {tmp_path} && echo "left: $(ls -A {tmp_path})"'
    command = [unshare, "-rm", "sh", "-c", script, textwrap.dedent(body)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"cannot write {tmp_path}/map.tif: no space left on the disk"), (
        done.stdout + done.stderr
    )
    assert done.stdout.strip().endswith("left:"), done.stdout
