import json
import shutil
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import dask
import dask.array as da
import fsspec
import numpy as np
import pytest
import rioxarray  # noqa: F401  registers .rio
import xarray as xr
import zarr
from odc.geo.xr import xr_coords

from s2seg.errors import InputError, OutputError, ReadError
from s2seg.legend import Legend
from s2seg.outputs._blocks import Ledger
from s2seg.outputs._files import replacing
from s2seg.outputs.cog import write_cog
from s2seg.outputs.zarr import open_stored, pieces, read_land_cover, write_zarr
from tests.outputs.conftest import grid


def stored_files(path):
    return {p.relative_to(path): p.read_bytes() for p in Path(path).rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("shape", "core", "tile"),
    [
        ((150, 220), 64, (8192, 8192)),  # one tile, ragged last blocks
        ((150, 220), 64, (64, 64)),  # one block to a tile
        ((150, 220), 64, (150, 150)),  # tiles of 2 x 2 blocks, the last ones smaller
        ((150, 220), 64, (10, 70)),  # a tile below a block still takes a whole one
        ((128, 128), 64, (128, 64)),
        ((40, 700), 64, (8192, 8192)),  # shorter than a block; longer than a stored chunk
        ((700, 90), 1024, (8192, 8192)),  # one block, no multiple of anything
        ((1, 1), 64, (8192, 8192)),
    ],
)
def test_every_pixel_lands_where_it_belongs(tmp_path, legend, make_prediction, shape, core, tile):
    prediction = make_prediction(legend, shape, core, nodata_border=min(9, min(shape) - 1))
    path = write_zarr(prediction, tmp_path / "map.zarr", tile=tile)
    assert path == tmp_path / "map.zarr"
    back = xr.open_zarr(path, mask_and_scale=False)
    for name in ("land_cover", "confidence"):
        assert back[name].dtype == np.uint8
        np.testing.assert_array_equal(back[name], prediction[name])
    assert back.odc.geobox == grid(*shape)


def test_a_block_is_computed_once_for_all_variables_and_tile_after_tile(tmp_path, legend):
    calls = []

    def network(block, block_info=None):
        calls.append(tuple(start for start, _ in block_info[0]["array-location"]))
        return np.stack([block, 200 - block])

    source = da.from_array(np.arange(16, dtype="uint8").reshape(4, 4).repeat(32, 0).repeat(32, 1), chunks=32)
    both = da.map_blocks(
        network, source, dtype="uint8", new_axis=0, chunks=((2,), *source.chunks), meta=np.empty((0,) * 3)
    )
    prediction = xr.Dataset(
        {"land_cover": (("y", "x"), both[0]), "confidence": (("y", "x"), both[1])},
        coords=xr_coords(grid(128, 128)),
        attrs={"legend": legend.to_dict()},
    )
    write_zarr(prediction, tmp_path / "map.zarr", tile=(64, 64))
    assert len(calls) == 16
    tiles = [(y // 64, x // 64) for y, x in calls]
    assert [tiles[i] for i in (0, 4, 8, 12)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(len(set(tiles[i : i + 4])) == 1 for i in (0, 4, 8, 12)), "tiles were mixed: the graph is not bounded"


def test_a_dask_block_is_a_shard_of_smaller_chunks(tmp_path, legend, make_prediction):
    write_zarr(make_prediction(legend, (1500, 2100), 1024), tmp_path / "map.zarr")
    array = zarr.open_array(tmp_path / "map.zarr/land_cover", mode="r")
    assert array.shards == (1024, 1024)
    assert array.chunks == (512, 512)
    assert array.metadata.zarr_format == 3


@pytest.mark.parametrize(
    ("core", "inner"), [(512, 512), (2048, 512), (1088, 272), (960, 480), (509 * 2, 509), (1031, 1031)]
)
def test_the_stored_chunk_divides_the_block(tmp_path, legend, make_prediction, core, inner):
    write_zarr(make_prediction(legend, (core + 5, 3), core, nodata_border=0), tmp_path / "map.zarr")
    array = zarr.open_array(tmp_path / "map.zarr/land_cover", mode="r")
    assert (array.shards[0], array.chunks[0]) == (core, inner)


def test_metadata_follow_cf(tmp_path, legend, make_prediction):
    write_zarr(make_prediction(legend), tmp_path / "map.zarr", attrs={"source": "a model"})
    back = xr.open_zarr(tmp_path / "map.zarr", mask_and_scale=False)  # warnings are errors: none for this
    cover = back["land_cover"]
    assert cover.attrs["flag_values"] == list(legend.codes)
    meanings = cover.attrs["flag_meanings"].split(" ")
    assert meanings[0] == "tree_cover"
    assert len(meanings) == len(legend)
    assert cover.attrs["flag_colors"].split() == list(legend.colors)
    assert cover.attrs["_FillValue"] == legend.nodata
    assert cover.attrs["grid_mapping"] == "spatial_ref"
    assert cover.attrs["long_name"]
    assert Legend.from_dict(json.loads(cover.attrs["legend"])) == legend
    assert back.attrs["Conventions"] == "CF-1.11"
    assert back.attrs["source"] == "a model"
    for axis in "xy":
        assert back[axis].dtype == np.float64
        assert back[axis].attrs["standard_name"] == f"projection_{axis}_coordinate"
        assert back[axis].attrs["units"] == "metre"
    np.testing.assert_array_equal(back["x"], 500_005 + 10 * np.arange(220))
    np.testing.assert_array_equal(back["y"], 5_099_995 - 10 * np.arange(150))
    assert "PROJCRS" in back["spatial_ref"].attrs["crs_wkt"]
    assert back["spatial_ref"].attrs["grid_mapping_name"] == "transverse_mercator"
    assert back["spatial_ref"].attrs["GeoTransform"].split() == ["500000", "10", "0", "5100000", "0", "-10"]


def test_opens_georeferenced_and_decoded_elsewhere(tmp_path, legend, make_prediction):
    write_zarr(make_prediction(legend), tmp_path / "map.zarr")
    decoded = xr.open_zarr(tmp_path / "map.zarr", decode_coords="all")
    assert decoded["land_cover"].rio.crs.to_epsg() == 32633
    assert decoded["land_cover"].rio.transform() == grid(150, 220).transform
    assert np.isnan(decoded["land_cover"][0, 0])
    assert decoded["land_cover"][20, 20] in legend.codes
    assert np.isnan(decoded["confidence"][0, 0])


def test_a_geographic_grid_has_degrees(tmp_path, legend):
    from odc.geo.geobox import GeoBox

    geobox = GeoBox.from_bbox((14, 45, 15, 46), "EPSG:4326", resolution=0.01)
    cover = xr.DataArray(np.full(geobox.shape, 10, "uint8"), dims=("y", "x"), coords=xr_coords(geobox, always_yx=True))
    path = write_zarr(cover.to_dataset(name="land_cover").assign_attrs(legend=legend.to_dict()), tmp_path / "map.zarr")
    back = xr.open_zarr(path, mask_and_scale=False)
    assert (back["x"].attrs["units"], back["y"].attrs["units"]) == ("degrees_east", "degrees_north")
    assert back["y"].attrs["standard_name"] == "latitude"
    assert back.rio.crs.to_epsg() == 4326


@pytest.mark.parametrize("dates_per_block", [1, 3])
def test_dates_and_probabilities(tmp_path, legend, dates_per_block):
    shape = (3, 100, 130)
    t, y, x = np.indices(shape)
    cover = np.array(legend.codes, "uint8")[(t * 5 + y // 3 + x // 7) % len(legend)]
    chances = ((np.arange(len(legend))[None, :, None, None] * 20 + (t + y + x)[:, None]) % 251).astype("uint8")
    looks = (y[0] + 300 * x[0]).astype("uint16")
    times = np.array(["2023-08-01T10:07:49.024", "2023-08-03T09:57:51.024", "2023-08-06"], "datetime64[ns]")
    prediction = xr.Dataset(
        {
            "land_cover": (("time", "y", "x"), da.from_array(cover, chunks=(dates_per_block, 64, 64))),
            "probability": (("time", "class", "y", "x"), da.from_array(chances, chunks=(dates_per_block, -1, 64, 64))),
            "observations": (("y", "x"), da.from_array(looks, chunks=64)),
        },
        coords=xr_coords(grid(*shape[1:])) | {"time": times},
        attrs={"legend": legend.to_dict()},
    )
    path = write_zarr(prediction, tmp_path / "map.zarr", tile=(64, 64))
    back = xr.open_zarr(path, mask_and_scale=False)
    np.testing.assert_array_equal(back["land_cover"], cover)
    np.testing.assert_array_equal(back["probability"], chances)
    np.testing.assert_array_equal(back["observations"], looks)
    np.testing.assert_array_equal(back["time"].to_numpy().astype("datetime64[ns]"), times)
    np.testing.assert_array_equal(back["class"], legend.codes)
    assert zarr.open_array(path / "land_cover", mode="r").shards == (1, 64, 64), "a date can be read, or added, alone"
    decoded = xr.open_zarr(path)["probability"]
    np.testing.assert_allclose(decoded.isel(time=1, y=5, x=6), chances[1, :, 5, 6] / 250, rtol=1e-6)


def test_arrays_in_memory_are_written_too(tmp_path, legend, make_prediction):
    loaded = make_prediction(legend).compute()
    path = write_zarr(loaded, tmp_path / "map.zarr")
    np.testing.assert_array_equal(xr.open_zarr(path, mask_and_scale=False)["land_cover"], loaded["land_cover"])


def test_blocks_of_nodata_take_no_space(tmp_path, legend):
    values = np.full((256, 256), legend.nodata, "uint8")
    values[128:, 128:] = 40
    prediction = xr.Dataset(
        {"land_cover": (("y", "x"), da.from_array(values, chunks=128))},
        coords=xr_coords(grid(256, 256)),
        attrs={"legend": legend.to_dict()},
    )
    path = write_zarr(prediction, tmp_path / "map.zarr")
    assert [str(p.relative_to(path)) for p in path.glob("land_cover/c/*/*")] == ["land_cover/c/1/1"]
    np.testing.assert_array_equal(xr.open_zarr(path, mask_and_scale=False)["land_cover"], values)


def test_reading_back_gives_blocks_geobox_and_legend(tmp_path, legend, make_prediction):
    prediction = make_prediction(legend, (150, 220), 64)
    back = read_land_cover(write_zarr(prediction, tmp_path / "map.zarr"))
    assert back.chunks["y"] == (64, 64, 22)
    assert back.chunks["x"] == (64, 64, 64, 28)
    assert back.odc.geobox == grid(150, 220)
    assert Legend.from_dict(back.attrs["legend"]) == legend
    again = write_zarr(back, tmp_path / "again.zarr")  # what was read can be written
    assert stored_files(again) == stored_files(tmp_path / "map.zarr")


@pytest.mark.parametrize(("together", "count"), [(1, 12), (2 * 64 * 64, 6), (2**24, 3)])
def test_pieces_of_a_stored_map_are_whole_shards_that_cover_it_once(
    tmp_path, legend, make_prediction, monkeypatch, together, count
):
    monkeypatch.setattr("s2seg.outputs.zarr._TOGETHER", together)
    prediction = make_prediction(legend, shape=(150, 220), core=64)
    stored = open_stored(write_zarr(prediction, tmp_path / "map.zarr"))
    assert Legend.from_dict(stored.attrs["legend"]) == legend
    assert stored.land_cover.chunks is None
    seen = np.zeros((150, 220), int)
    taken = list(pieces(stored.land_cover))
    for rows, columns in taken:
        seen[rows, columns] += 1
        assert rows.start % 64 == columns.start % 64 == 0
        np.testing.assert_array_equal(stored.land_cover[rows, columns], prediction.land_cover[rows, columns])
    assert len(taken) == count
    assert (seen == 1).all()
    assert len(list(pieces(prediction.land_cover))) == 12, "dask's chunks, one by one"
    assert list(pieces(prediction.land_cover.load())) == [(slice(0, 150), slice(0, 220))]


def test_progress_counts_blocks(tmp_path, legend, make_prediction):
    seen = []
    write_zarr(
        make_prediction(legend), tmp_path / "m.zarr", tile=(128, 128), on_progress=lambda *step: seen.append(step)
    )
    assert seen == [(i, 12) for i in range(13)]


def test_blocks_are_counted_while_another_thread_computes(tmp_path, legend, make_prediction, monkeypatch):
    begun, over, seen = threading.Event(), threading.Event(), []
    other = threading.Thread(target=dask.delayed(lambda: (begun.set(), over.wait(60)))().compute)
    persist = da.Array.persist

    def persist_later(blocks, **options):
        other.start()
        assert begun.wait(60)
        return persist(blocks, **options)

    monkeypatch.setattr(da.Array, "persist", persist_later)
    write_zarr(make_prediction(legend), tmp_path / "m.zarr", on_progress=lambda *step: seen.append(step))
    over.set()
    other.join()
    assert seen == [(i, 12) for i in range(13)]


def test_worker_processes_write_the_same_bytes_as_threads(tmp_path, legend, make_prediction):
    from distributed import Client, LocalCluster

    prediction = make_prediction(legend)
    write_zarr(prediction, tmp_path / "threads.zarr", tile=(128, 128))
    seen = []
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster),
    ):
        write_zarr(prediction, tmp_path / "c.zarr", tile=(128, 128), on_progress=lambda *step: seen.append(step))
        failing = prediction.map(lambda v: v.copy(data=v.data.map_blocks(fail, dtype="uint8", meta=np.empty((0, 0)))))
        with pytest.raises(ReadError, match="tile gone"):
            write_zarr(failing, tmp_path / "failing.zarr")
    assert stored_files(tmp_path / "c.zarr") == stored_files(tmp_path / "threads.zarr")
    assert seen == [(i, 12) for i in range(13)]
    assert not (tmp_path / "failing.zarr").exists()


def test_a_url_is_written_in_place_and_marked_last(legend, make_prediction):
    prediction = make_prediction(legend)
    url = "memory://s2seg-test/map.zarr"
    assert write_zarr(prediction, url) == url
    np.testing.assert_array_equal(read_land_cover(url)["land_cover"], prediction["land_cover"])
    with pytest.raises(OutputError, match="overwrite"):
        write_zarr(prediction, url)
    write_zarr(prediction, url, overwrite=True)
    np.testing.assert_array_equal(read_land_cover(url)["confidence"], prediction["confidence"])


# -- interruptions ----------------------------------------------------------------------------------------------------


def counted(prediction):
    """The same prediction, and a list that gets the value of each of its blocks' first pixel when it is computed."""
    calls = []

    def look(block, block_info=None):
        calls.append(block_info[0]["chunk-location"])
        return block

    data = prediction["land_cover"].data.map_blocks(look, dtype="uint8", meta=np.empty((0, 0), "uint8"))
    return prediction.assign(land_cover=prediction["land_cover"].copy(data=data)), calls


def interrupt_after(blocks, error=KeyboardInterrupt):
    def step(done, total):
        if done == blocks:
            raise error

    return step


REMOTE = ReadError("S2A_X", "red", "https://afar/red.tif", "timed out")
HERE = ReadError("S2A_X", "red", "red.tif", "truncated")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("a worker died"), REMOTE], ids=repr)
def test_an_interrupted_write_goes_on_where_it_stopped(tmp_path, legend, make_prediction, error):
    whole = write_zarr(make_prediction(legend), tmp_path / "whole.zarr", fingerprint="a")
    prediction, calls = counted(make_prediction(legend))
    path = tmp_path / "map.zarr"
    with dask.config.set(num_workers=1), pytest.raises(BaseException) as caught:
        write_zarr(prediction, path, fingerprint="a", tile=(128, 128), on_progress=interrupt_after(5, error))
    assert caught.value is error or caught.type is error
    assert not path.exists()
    first, seen = set(calls), []
    calls.clear()
    write_zarr(prediction, path, fingerprint="a", tile=(128, 128), on_progress=lambda *step: seen.append(step))
    assert seen[0] == (5, 12) and seen[-1] == (12, 12)
    assert len(first) >= 5 and len(calls) < 12, "what was written is computed again"
    assert len(first | set(calls)) == 12
    assert stored_files(path) == stored_files(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["map.zarr", "whole.zarr"]


def test_dates_that_are_written_are_not_computed_again(tmp_path, legend):
    values = np.arange(3 * 64 * 64, dtype="uint8").reshape(3, 64, 64) % 5
    data = da.from_array(values, chunks=(1, 32, 32))
    coords = xr_coords(grid(64, 64)) | {"time": np.arange(3).astype("datetime64[D]").astype("datetime64[ns]")}
    prediction, calls = counted(
        xr.Dataset({"land_cover": (("time", "y", "x"), data)}, coords=coords, attrs={"legend": legend.to_dict()})
    )
    with dask.config.set(num_workers=1), pytest.raises(KeyboardInterrupt):
        write_zarr(prediction, tmp_path / "m.zarr", fingerprint="a", on_progress=interrupt_after(7))
    calls.clear()
    write_zarr(prediction, tmp_path / "m.zarr", fingerprint="a")
    assert 5 <= len(calls) < 12
    np.testing.assert_array_equal(read_land_cover(tmp_path / "m.zarr").land_cover, values)


@pytest.mark.parametrize(
    ("fingerprint", "error"), [(None, KeyboardInterrupt), ("a", HERE), ("a", OutputError("x", "disk full"))], ids=repr
)
def test_what_cannot_go_on_is_cleared_away(tmp_path, legend, make_prediction, fingerprint, error):
    with pytest.raises(BaseException):  # noqa: B017 - whichever of them
        write_zarr(
            make_prediction(legend), tmp_path / "m.zarr", fingerprint=fingerprint, on_progress=interrupt_after(5, error)
        )
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_something_else_are_not_gone_on_with(tmp_path, legend, make_prediction):
    path = tmp_path / "m.zarr"
    with pytest.raises(KeyboardInterrupt):
        write_zarr(make_prediction(legend), path, fingerprint="a", on_progress=interrupt_after(5))
    prediction, calls = counted(make_prediction(legend))
    write_zarr(prediction, path, fingerprint="b")
    assert len(calls) == 12
    calls.clear()
    seen = []
    write_zarr(prediction, path, fingerprint="b", on_progress=lambda *step: seen.append(step))
    assert calls == [] and seen == [(12, 12)], "what is up to date is left as it is"
    with pytest.raises(OutputError, match="exists already"):
        write_zarr(prediction, path, fingerprint="c")


def test_a_line_that_was_cut_off_counts_for_nothing(tmp_path):
    file = tmp_path / "written.txt"
    ledger = Ledger((2, 20), file, "a")
    ledger.start()
    for index in ((0, 3), (1, 1), (1, 17)):
        ledger.enter(index)
    file.write_text(file.read_text()[:-2])
    again = Ledger((2, 20), file, "a")
    again.start()
    again.enter((1, 19))
    assert np.argwhere(Ledger((2, 20), file, "a").done).tolist() == [[0, 3], [1, 1], [1, 19]]
    assert not Ledger((2, 21), file, "a").done.any()
    assert not Ledger((2, 20), file, "b").done.any()


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_exists_is_replaced_only_on_request(tmp_path, legend, make_prediction):
    path = write_zarr(make_prediction(legend, (100, 200)), tmp_path / "map.zarr")
    before = stored_files(path)
    with pytest.raises(OutputError, match=r"map\.zarr: it exists already; pass --overwrite"):
        write_zarr(make_prediction(legend, (64, 64)), path)
    assert stored_files(path) == before
    write_zarr(make_prediction(legend, (64, 64)), path, overwrite=True)
    assert xr.open_zarr(path).sizes["y"] == 64
    assert [p.name for p in tmp_path.iterdir()] == ["map.zarr"]


def fail(block):
    raise ReadError("S2A_X", "red", "red.tif", "tile gone")


def test_a_failed_block_fails_the_write_and_leaves_the_old_map(tmp_path, legend, make_prediction):
    good = make_prediction(legend)
    path = write_zarr(good, tmp_path / "map.zarr")
    before = stored_files(path)
    bad = good.assign(
        confidence=good["confidence"].copy(data=good["confidence"].data.map_blocks(fail, meta=np.empty((0, 0))))
    )
    with pytest.raises(ReadError, match="tile gone"):
        write_zarr(bad, path, overwrite=True)
    assert stored_files(path) == before
    assert [p.name for p in tmp_path.iterdir()] == ["map.zarr"]


def test_a_file_in_the_way_is_named(tmp_path, legend, make_prediction):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(OutputError, match="out is a file, not a folder"):
        write_zarr(make_prediction(legend), tmp_path / "out" / "map.zarr")


def test_a_folder_that_may_not_be_made_is_named(legend, make_prediction):
    if not Path("/proc/self").exists():
        pytest.skip("needs Linux's /proc, where not even root can make a folder")
    with pytest.raises(OutputError, match=r"cannot write /proc/s2seg/map\.zarr"):
        write_zarr(make_prediction(legend), "/proc/s2seg/map.zarr")


def test_other_folders_are_never_replaced(tmp_path, legend, make_prediction):
    photos = tmp_path / "home" / "photos"
    photos.mkdir(parents=True)
    with pytest.raises(OutputError, match="home: a folder of other things is there, which is never replaced"):
        write_zarr(make_prediction(legend), tmp_path / "home", overwrite=True)
    store = write_zarr(make_prediction(legend), tmp_path / "map.zarr")
    with pytest.raises(OutputError, match=r"map\.zarr: a folder of other things"):
        write_cog(store, store, legend=legend, overwrite=True)
    assert photos.exists() and (store / "zarr.json").exists()
    with pytest.raises(OutputError, match="never replaced"), replacing(tmp_path / "home") as partial:
        partial.write_text("late")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["home", "map.zarr"]
    fs = fsspec.filesystem("memory")
    fs.pipe("/s2seg-others/a/photo.png", b"")
    with pytest.raises(OutputError, match="other things are there"):
        write_zarr(make_prediction(legend), "memory://s2seg-others/a", overwrite=True)
    assert fs.exists("/s2seg-others/a/photo.png")


def test_irregular_blocks_are_refused(tmp_path, legend, make_prediction):
    prediction = make_prediction(legend)
    with pytest.raises(InputError, match="blocks along y are irregular"):
        write_zarr(prediction.chunk(y=(50, 40, 60)), tmp_path / "map.zarr")
    with pytest.raises(InputError, match="cut differently"):
        write_zarr(prediction.assign(confidence=prediction["confidence"].chunk(32)), tmp_path / "map.zarr")
    assert list(tmp_path.iterdir()) == []


_BIG = """
    import resource, sys, warnings
    import dask, dask.array as da, numpy as np, xarray as xr
    from odc.geo.xr import xr_coords
    from s2seg.errors import OutputError
    from s2seg.legend import Legend
    from s2seg.outputs.zarr import write_zarr
    from tests.outputs.conftest import grid

    legend = Legend.load("worldcover")
    noise = da.random.default_rng(0).integers(1, 250, (1024, 1024), dtype="uint8", chunks=256)
    prediction = xr.Dataset(
        {"land_cover": (("y", "x"), noise)}, coords=xr_coords(grid(1024, 1024)), attrs={"legend": legend.to_dict()}
    )
    with dask.config.set(scheduler="threads", num_workers=2):
        if len(sys.argv) > 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
        try:
            write_zarr(prediction, sys.argv[1] + "/map.zarr")
        except OutputError as error:
            print(error)
"""


def run_big(folder, *limit):
    command = [sys.executable, "-c", textwrap.dedent(_BIG), str(folder), *map(str, limit)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_write_that_the_system_refuses_leaves_nothing(tmp_path):
    said = run_big(tmp_path, 20_000)  # no file above 20 kB: every shard is refused by the kernel
    assert said.startswith(f"cannot write {tmp_path}/map.zarr: File too large")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_left_clean(tmp_path):
    """A real file system of 400 kB, for 1 MB of noise."""
    unshare = shutil.which("unshare")
    mount = f"mount -t tmpfs -o size=400k tmpfs {tmp_path}"
    if unshare is None or subprocess.run([unshare, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("needs the right to mount a small file system")
    script = f'{mount} && "{sys.executable}" -c "$0" {tmp_path} && echo "left: $(ls -A {tmp_path})"'
    command = [unshare, "-rm", "sh", "-c", script, textwrap.dedent(_BIG)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    first, last = done.stdout.strip().splitlines()
    assert first.startswith(f"cannot write {tmp_path}/map.zarr: No space left on device")
    assert last == "left:"


def test_a_disk_that_is_certainly_too_small_is_refused_before_any_work(tmp_path, legend):
    huge = da.zeros((2**24, 2**24), dtype="uint8", chunks=2**22)
    prediction = xr.Dataset({"land_cover": (("y", "x"), huge)}, attrs={"legend": legend.to_dict()})
    with pytest.raises(OutputError, match=r"it needs 17592\.2 GB even if it compresses 16 : 1"):
        write_zarr(prediction, tmp_path / "map.zarr")
