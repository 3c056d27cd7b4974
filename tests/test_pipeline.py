from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dask
import numpy as np
import pystac
import pytest
import rasterio
import rioxarray
import shapely
import xarray as xr
from dask.system import CPU_COUNT
from rasterio.features import geometry_mask
from rio_cogeo import cog_validate

import s2seg
from s2seg.errors import S2SegWarning
from s2seg.models.bundle import ModelBundle
from s2seg.pipeline import MapOptions, build_prediction, build_scene, map_area, plan_area
from s2seg.sources.composite import CompositeSpec
from s2seg.testing import SyntheticRegion
from tests.tiny import LEGEND, tiny_onnx

DATES = "2021-01-01/2021-12-31"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return tiny_onnx(tmp_path_factory.mktemp("tiny"))


def test_an_area_becomes_a_map_with_everything_about_it(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path
) -> None:
    stages: list[str] = []
    options = MapOptions(layers=("class", "confidence", "probability"), core=128)
    result = map_area(
        synthetic.catalog, synthetic.bbox, DATES, model, tmp_path / "out", options,
        on_progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    folder = tmp_path / "out"
    expected = {"land_cover.zarr", "land_cover.tif", "item.json", "quicklook.png", "run.json"}
    assert expected <= {p.name for p in folder.iterdir()} and not list(folder.glob(".*"))
    assert list(dict.fromkeys(stages)) == ["search", "map", "outputs"]

    lazy = build_prediction(
        plan_area(synthetic.catalog, synthetic.bbox, DATES, model, options), _scene(synthetic, model, options)
    )
    stored = xr.open_zarr(result.zarr, mask_and_scale=False)
    for name in ("land_cover", "confidence", "probability", "observations"):
        np.testing.assert_array_equal(stored[name].values, lazy[name].values)
    assert stored.rio.crs.to_epsg() == 32633

    cog = result.land_cover[0]
    assert cog_validate(cog, strict=True, quiet=True)[0]
    with rasterio.open(cog) as dataset:
        np.testing.assert_array_equal(dataset.read(1), stored.land_cover.values)
        assert dataset.colormap(1)[20][:3] == (0xC0, 0xB0, 0xA0) and dataset.nodata == 0

    item = pystac.Item.from_file(result.items[0])
    assert all((folder / Path(a.href).name).exists() for a in item.assets.values())
    assert len(item.get_links("derived_from")) == len(result.record["items"]) == 6

    record = json.loads(result.run.read_text())
    assert record["model"]["sha256"] == model.sha256
    counts = {c["code"]: c["pixels"] for c in record["maps"][0]["classes"]}
    codes, pixels = np.unique(stored.land_cover.values, return_counts=True)
    assert {c: n for c, n in counts.items() if n} == {int(c): int(n) for c, n in zip(codes, pixels, strict=True) if c}
    offsets = {i["id"]: i["offset"]["subtract"] for i in record["items"]}
    assert set(offsets.values()) == {0, 1000}, "the region mixes processing baselines"


def _scene(region: SyntheticRegion, model: ModelBundle, options: MapOptions) -> xr.DataArray:
    return build_scene(plan_area(region.catalog, region.bbox, DATES, model, options))


def test_neighbouring_runs_agree_to_the_pixel(synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path) -> None:
    west, south, east, north = synthetic.bbox
    whole = map_area(synthetic.catalog, synthetic.bbox, DATES, model, tmp_path / "whole")
    part_box = (
        west + 0.4 * (east - west),
        south + 0.3 * (north - south),
        east - 0.2 * (east - west),
        north - 0.3 * (north - south),
    )
    part = map_area(synthetic.catalog, part_box, DATES, model, tmp_path / "part", MapOptions(core=64))
    a, b = (xr.open_zarr(r.zarr, mask_and_scale=False).land_cover for r in (whole, part))
    np.testing.assert_array_equal(b.values, a.sel(y=b.y, x=b.x).values)


def test_dates_apart_give_a_map_each(synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path) -> None:
    result = map_area(
        synthetic.catalog, synthetic.bbox, DATES, model, tmp_path / "out", MapOptions(composite="per-date", core=128)
    )
    assert [p.name for p in result.land_cover] == [f"land_cover_{d.replace('-', '')}.tif" for d in synthetic.dates]
    stored = xr.open_zarr(result.zarr, mask_and_scale=False)
    assert stored.land_cover.dims == ("time", "y", "x") and stored.sizes["time"] == 3
    for i, (cog, item) in enumerate(zip(result.land_cover, result.items, strict=True)):
        with rasterio.open(cog) as dataset:
            np.testing.assert_array_equal(dataset.read(1), stored.land_cover[i].values)
        dated = pystac.Item.from_file(item)
        assert dated.datetime is not None and f"{dated.datetime:%Y-%m-%d}" == synthetic.dates[i]
        assert len(dated.get_links("derived_from")) == 2
        single = map_area(
            synthetic.catalog, synthetic.bbox, synthetic.dates[i], model, tmp_path / str(i),
            MapOptions(composite=CompositeSpec(mask=())),
        )  # fmt: skip
        np.testing.assert_array_equal(
            xr.open_zarr(single.zarr, mask_and_scale=False).land_cover.values, stored.land_cover[i].values
        )


def test_a_polygon_is_cut_out_and_its_inside_is_untouched(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path
) -> None:
    west, south, east, north = synthetic.bbox
    triangle = shapely.Polygon([(west, south), (east, south), (west, north)])
    cut = xr.open_zarr(map_area(synthetic.catalog, triangle, DATES, model, tmp_path / "cut").zarr, mask_and_scale=False)
    box = xr.open_zarr(
        map_area(synthetic.catalog, synthetic.bbox, DATES, model, tmp_path / "box").zarr, mask_and_scale=False
    ).sel(y=cut.y, x=cut.x)
    from s2seg.sources.stack import project

    with rasterio.open(tmp_path / "cut" / "land_cover.tif") as dataset:
        inside = geometry_mask(
            [project(triangle, 32633)], dataset.shape, dataset.transform, all_touched=True, invert=True
        )
    np.testing.assert_array_equal(cut.land_cover.values, np.where(inside, box.land_cover.values, LEGEND.nodata))


def test_a_second_run_is_up_to_date_or_refused_or_replaces(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    first = map_area(synthetic.catalog, synthetic.bbox, DATES, model, out)
    before = (out / "run.json").read_bytes()
    stages: list[str] = []
    again = map_area(
        synthetic.catalog, synthetic.bbox, DATES, model, out, on_progress=lambda stage, *_: stages.append(stage)
    )
    assert not first.up_to_date and again == replace(first, record=json.loads(before), up_to_date=True)
    assert set(stages) == {"search"}
    other = tiny_onnx(tmp_path / "other", kernel=3)
    for changed in (
        lambda: map_area(synthetic.catalog, synthetic.bbox, "2021-01/2021-07", model, out),
        lambda: map_area(synthetic.catalog, synthetic.bbox, DATES, other, out),
        lambda: map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, MapOptions(resolution=20)),
        lambda: map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, MapOptions(composite="per-date")),
    ):
        with pytest.raises(s2seg.S2SegError, match="exists already, of other scenes, another model or other settings"):
            changed()
    assert (out / "run.json").read_bytes() == before
    map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, MapOptions(overwrite=True))
    assert (out / "run.json").read_bytes() != before
    map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, MapOptions(overwrite=True, composite="per-date"))
    assert not (out / "land_cover.tif").exists() and not (out / "item.json").exists(), "of the earlier run"
    assert len(list(out.glob("land_cover_*.tif"))) == 3
    next(out.glob("land_cover_*.tif")).unlink()
    with pytest.raises(s2seg.S2SegError, match="exists already; pass --overwrite"):
        map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, MapOptions(composite="per-date"))


KILLED = """
import os, signal, sys
from s2seg.pipeline import MapOptions, map_area

def step(stage, done, total):
    if stage == "map" and done == 3:
        os.kill(os.getpid(), signal.SIGKILL)

catalog, west, south, east, north, dates, model, out = sys.argv[1:]
bbox = tuple(map(float, (west, south, east, north)))
map_area(catalog, bbox, dates, model, out, MapOptions(core=64), step)
"""


@pytest.mark.parametrize("kill", [True, False], ids=["kill -9", "Ctrl-C"])
def test_an_interrupted_run_goes_on(synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path, kill: bool) -> None:
    out, options = tmp_path / "out", MapOptions(core=64)
    whole = map_area(synthetic.catalog, synthetic.bbox, DATES, model, tmp_path / "whole", options)
    if kill:
        arguments = map(str, (synthetic.catalog, *synthetic.bbox, DATES, model.path, out))
        done = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[1])
        assert done.returncode == -signal.SIGKILL
    else:

        def stop(stage: str, done: int, total: int) -> None:
            if stage == "map" and done == 3:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as interrupt:
            map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, options, stop)
        assert "the same command goes on" in interrupt.value.__notes__[0]
    assert [p.name for p in out.iterdir()] == [".s2seg-partial"]
    with pytest.warns(S2SegWarning, match=r"goes on from 3 of \d+ blocks"):
        result = map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, options)
    maps = [rioxarray.open_rasterio(r.land_cover[0]).values for r in (whole, result)]
    np.testing.assert_array_equal(*maps)
    assert not list(out.glob(".*"))


def test_outputs_that_were_interrupted_need_no_second_map(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage == "outputs":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        map_area(synthetic.catalog, synthetic.bbox, DATES, model, tmp_path / "out", on_progress=stop)
    monkeypatch.setattr("s2seg.inference._predict_block", lambda *_, **__: pytest.fail("mapped again"))
    with pytest.warns(S2SegWarning, match=r"goes on from (\d+) of \1 blocks"):
        map_area(synthetic.catalog, synthetic.bbox, DATES, model, tmp_path / "out")


def test_the_plan_is_the_run(synthetic: SyntheticRegion, model: ModelBundle) -> None:
    plan = plan_area(synthetic.catalog, synthetic.bbox, DATES, model, MapOptions(core=128))
    assert len(plan.items) == 6 and plan.passes == (2, 2, 2)
    assert plan.bands == ("blue", "green", "red", "nir", "scl")
    rows = dict(plan.describe())
    assert f"{plan.geobox.shape.x} x {plan.geobox.shape.y}" in rows["grid"]
    # three dates of four 2-byte bands at 10 m and one 1-byte band at 20 m; tiles overlap a little
    exact = plan.geobox.shape.x * plan.geobox.shape.y * 3 * (4 * 2 + 1 / 4)
    assert exact * 0.9 < plan.bytes_to_read < exact * 1.6


@pytest.mark.parametrize("wrong", [{"runtime": "tensorflow"}, {"device": "gpu"}, {"precision": "int8"}], ids=repr)
def test_a_plan_names_unknown_choices(synthetic: SyntheticRegion, model: ModelBundle, wrong: dict[str, str]) -> None:
    with pytest.raises(s2seg.S2SegError, match=f"unknown {next(iter(wrong))}"):
        plan_area(synthetic.catalog, synthetic.bbox, DATES, model, MapOptions(**wrong))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", ["box", "triangle"])
def test_tiles_leave_no_trace(
    synthetic: SyntheticRegion, model: ModelBundle, monkeypatch: pytest.MonkeyPatch, shape: str
) -> None:
    west, south, east, north = synthetic.bbox
    triangle = shapely.Polygon([(west, south), (east, south), (west, north)])
    options = MapOptions(layers=("class", "confidence", "probability"), core=64)
    plan = plan_area(synthetic.catalog, synthetic.bbox if shape == "box" else triangle, DATES, model, options)
    whole = build_prediction(plan, build_scene(plan)).compute()
    monkeypatch.setattr("s2seg.pipeline.plan._TILE", (200, 130))
    assert plan.tile == (192, 128)
    scene = build_scene(plan)
    tiled = build_prediction(plan, scene)
    xr.testing.assert_identical(tiled.compute(), whole)
    # beside a tile's edge only the context is cut off and read twice, not a whole block
    edge, context = plan.tile[1], plan.chunks.before
    assert {edge, edge + 2 * context} <= set(np.cumsum(scene.chunks[-1]).tolist())


def test_seasons_become_bands(synthetic: SyntheticRegion, tmp_path: Path) -> None:
    seasons = {"spring": "03-01/05-31", "summer": "06-01/08-31"}
    bands = tuple(f"{band}@{season}" for season in seasons for band in ("red", "nir"))
    plain = tiny_onnx(tmp_path)
    seasonal = replace(plain, spec=replace(plain.spec, bands=bands, seasons=seasons))
    plan = plan_area(synthetic.catalog, synthetic.bbox, DATES, seasonal)
    assert plan.bands == ("red", "nir", "scl")
    scene = build_scene(plan).compute()
    assert tuple(scene.band.values) == bands
    for season, dates in {"spring": synthetic.dates[0], "summer": f"{synthetic.dates[1]}/{synthetic.dates[2]}"}.items():
        pixels = s2seg.stack(s2seg.search(synthetic.catalog, synthetic.bbox, dates), plan.padded, ["red", "nir", "scl"])
        own = s2seg.composite(pixels)
        np.testing.assert_array_equal(scene.sel(band=[f"red@{season}", f"nir@{season}"]).values, own.values)
    assert map_area(synthetic.catalog, synthetic.bbox, DATES, seasonal, tmp_path / "out").zarr.exists()
    with pytest.raises(s2seg.S2SegError, match="no scene in season spring"):
        build_scene(plan_area(synthetic.catalog, synthetic.bbox, synthetic.dates[1], seasonal))


def test_reads_follow_the_blocks_of_the_files_and_shrink_with_many_dates(
    synthetic: SyntheticRegion, model: ModelBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s2seg.pipeline.plan._READ_SIDE", 128)
    plan = plan_area(synthetic.catalog, synthetic.bbox, DATES, model)
    corners = {tuple(item.assets["red"].extra_fields["proj:transform"][2::3]) for item in plan.items}
    for axis, chunks in enumerate(build_scene(plan).chunks[-2:]):
        assert chunks[1:-1] == (128,) * (len(chunks) - 2)
        at = (plan.padded.affine @ (chunks[0], chunks[0]))[1 - axis]
        assert any((at - corner[1 - axis]) % 1280 == 0 for corner in corners)
    assert plan.read_side == 128
    monkeypatch.setattr("s2seg.pipeline.plan._READ_SIDE", 1024)
    monkeypatch.setattr("s2seg.pipeline.plan._CHUNK_BYTES", len(plan.items) * 5 * 2 * 512 * 512)
    assert plan.read_side == 512


def test_more_threads_read_from_afar(synthetic: SyntheticRegion, model: ModelBundle) -> None:
    plan = plan_area(synthetic.catalog, synthetic.bbox, DATES, model)
    item = plan.items[0].full_copy()
    item.assets["red"].href = "https://example.com/red.tif"
    far = replace(plan, items=(item,))
    with dask.config.set(num_workers=None):
        assert plan.threads == CPU_COUNT
        assert far.threads == max(CPU_COUNT, 4)
    with dask.config.set(num_workers=3):
        assert far.threads == 3


def test_the_plan_knows_what_a_runtime_takes(synthetic: SyntheticRegion, model: ModelBundle) -> None:
    peaks = {
        runtime: plan_area(synthetic.catalog, synthetic.bbox, DATES, model, MapOptions(runtime=runtime)).peak_memory
        for runtime in ("auto", "openvino", "onnxruntime")
    }
    assert peaks["auto"] == peaks["openvino"]  # what an ONNX bundle runs on, too
    assert peaks["openvino"] < peaks["onnxruntime"]


def test_overwriting_spares_what_others_have_put_there(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    mine = ("items.json", "item_notes.json", "land_cover_reference.tif", "land_cover_old.qml", ".partial", "notes")
    out.mkdir()
    for name in mine:
        (out / name).write_text("mine")
    map_area(synthetic.catalog, synthetic.bbox, DATES, model, out)
    map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, MapOptions(overwrite=True))
    assert [name for name in mine if (out / name).read_text() != "mine"] == []


def test_one_run_at_a_time_writes_to_a_folder(synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path) -> None:
    out, options = tmp_path / "out", MapOptions(core=64)
    refused: list[str] = []

    def run_another(stage: str, done: int, total: int) -> None:
        if stage == "map" and done == 2:
            with pytest.raises(s2seg.S2SegError) as caught:
                map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, options)
            refused.append(str(caught.value))

    map_area(synthetic.catalog, synthetic.bbox, DATES, model, out, options, run_another)
    assert len(refused) == 1 and "another run is writing there" in refused[0]
    assert (out / "land_cover.tif").exists()
