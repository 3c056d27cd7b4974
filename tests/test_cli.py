from __future__ import annotations

import json
import os
import pickle
import re
import resource
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from s2seg import cli
from s2seg.client import current_client
from s2seg.models.bundle import ModelBundle
from s2seg.models.checking import RuntimeCheck
from s2seg.models.runtimes.threads import threads_of_process
from s2seg.testing import SyntheticRegion, position_scene
from tests.tiny import tiny_onnx

DATES = "2021-01-01/2021-12-31"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return tiny_onnx(tmp_path_factory.mktemp("tiny"))


def aoi(region: SyntheticRegion) -> str:
    return ",".join(f"{v:.5f}" for v in region.bbox)


def good(region: SyntheticRegion, model: ModelBundle, output: Path) -> dict[str, str]:
    return {
        "--catalog": str(region.catalog), "--aoi": aoi(region), "--datetime": DATES, "--model": model.path,
        "--output": str(output), "--core": "128",
    }  # fmt: skip


def run(arguments: dict[str, str], *flags: str, command: str = "map") -> int:
    return cli.main([command, *(part for pair in arguments.items() for part in pair), *flags])


def test_map_prints_what_it_made(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(good(synthetic, model, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    for name in ("land_cover.tif", "land_cover.zarr", "quicklook.png", "item.json", "run.json", "bright"):
        assert name in printed


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert re.fullmatch(r"s2seg \d+\.\d+\.\d+\n", capsys.readouterr().out)


def test_names_of_classes_are_printed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"code": 1, "name": "crops [irrigated] [red]x[/blue] :cow:", "km2": 1.0, "pixels": 1}
    cli.out.print(cli._class_table({"land_cover": "a.tif", "classes": [row]}))
    assert row["name"] in capsys.readouterr().out


def test_the_same_command_again_does_nothing(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = good(synthetic, model, tmp_path / "out")
    assert run(options) == 0
    first = capsys.readouterr().out
    assert run(options) == 0
    again = capsys.readouterr().out
    assert again.startswith("up to date") and again.endswith(first[-200:])


def test_who_interrupts_is_told_how_to_go_on(
    synthetic: SyntheticRegion,
    model: ModelBundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    options = good(synthetic, model, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr("s2seg.pipeline.run.write_products", interrupt)
        assert run(options) != 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"what is done is kept in {tmp_path}/out/.s2seg-partial: the same command goes on from there" in said
    assert run(options) == 0
    assert re.search(r"goes on from (\d+) of \1 blocks", capsys.readouterr().err)


def test_who_interrupts_a_training_is_told_of_resume(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("s2seg.training.config.load_config", lambda *_: None)
    monkeypatch.setattr("s2seg.training.run.train", interrupt)
    assert cli.main(["train", "train.yaml"]) != 0
    assert "the same command with --resume goes on" in " ".join(capsys.readouterr().err.split())


def test_a_dry_run_reads_and_writes_nothing(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(good(synthetic, model, tmp_path / "out"), "--dry-run") == 0
    printed = capsys.readouterr().out
    assert not (tmp_path / "out").exists()
    (tmp_path / "file.txt").touch()
    assert run(good(synthetic, model, tmp_path / "file.txt" / "out"), "--dry-run") == 2
    assert "file.txt is a file, not a folder" in " ".join(capsys.readouterr().err.split())
    for what in ("items", "grid", "blocks", "to read", "peak memory"):
        assert what in printed


def test_worker_processes_and_a_scheduler_make_the_same_map(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path
) -> None:
    from distributed import LocalCluster

    options = good(synthetic, model, tmp_path / "threads")
    assert run(options) == 0
    assert run(options | {"--output": str(tmp_path / "workers"), "--workers": "2"}) == 0
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster:
        address = cluster.scheduler_address
        assert run(options | {"--output": str(tmp_path / "scheduler"), "--scheduler": address}) == 0
    maps = [
        xr.open_zarr(tmp_path / name / "land_cover.zarr", mask_and_scale=False).land_cover.values
        for name in ("threads", "workers", "scheduler")
    ]
    np.testing.assert_array_equal(maps[0], maps[1])
    np.testing.assert_array_equal(maps[0], maps[2])


def test_worker_processes_share_the_cores_and_keep_the_environment_of_dask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dask.system.CPU_COUNT", 6)
    for name in ("OMP_NUM_THREADS", "MALLOC_ARENA_MAX"):  # what is set here would go before
        monkeypatch.delenv(name, raising=False)
    with cli._cluster(None, 2):
        client = current_client()
        assert client is not None
        assert set(client.nthreads().values()) == {3}
        assert client.submit(threads_of_process).result() == 3
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_ARENA_MAX"):
            assert set(client.run(os.environ.get, name).values()) == {"1"}


@pytest.mark.parametrize(("workers", "each"), [(1, (6, 6)), (4, (2, 1)), (12, (2, 1))])
def test_a_worker_reads_while_it_runs_the_network(
    monkeypatch: pytest.MonkeyPatch, workers: int, each: tuple[int, int]
) -> None:
    seen = []

    def start(*, threads_per_worker: int, **_: object) -> AbstractContextManager[None]:
        seen.append((threads_per_worker, threads_of_process()))
        return nullcontext()

    monkeypatch.setattr("dask.system.CPU_COUNT", 6)
    monkeypatch.setattr("distributed.LocalCluster", start)
    monkeypatch.setattr("distributed.Client", nullcontext)
    with cli._cluster(None, workers):
        assert seen == [each]


def test_search_prints_a_table_or_json(synthetic: SyntheticRegion, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"--catalog": str(synthetic.catalog), "--aoi": aoi(synthetic), "--datetime": DATES}
    assert run(options, command="search") == 0
    table = capsys.readouterr().out
    assert "6 items" in table and "33TWL" in table
    assert run(options, "--json", command="search") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["type"] == "FeatureCollection" and len(found["features"]) == 6


def test_models_show_and_import(model: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "show", model.path]) == 0
    printed = capsys.readouterr().out
    assert all(what in printed for what in ("tiny", "nir", "bright", "#c0b0a0", model.sha256[:12]))
    (tmp_path / "legend.yaml").write_text(
        "name: two\nclasses:\n- {code: 1, name: a, color: '#000000'}\n- {code: 2, name: b, color: '#ffffff'}\n"
        "- {code: 3, name: c, color: '#ff0000'}\n"
    )
    command = [
        "models",
        "import",
        str(Path(model.path) / "model.onnx"),
        "--output",
        str(tmp_path / "again"),
        "--bands",
        "blue,green,red,nir",
        "--mean",
        ".1,.1,.1,.1",
        "--std",
        "1,1,1,1",
        "--legend",
        str(tmp_path / "legend.yaml"),
    ]
    assert cli.main(command) == 0
    assert (tmp_path / "again" / "model.json").exists()
    assert cli.main(command) == 2, "the bundle is there already"
    assert cli.main([*command[:-2], "--overwrite"]) == 2, "no legend"
    assert "--legend" in capsys.readouterr().err


def test_a_check_says_on_what_and_marks_what_differs(
    model: ModelBundle, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        RuntimeCheck("openvino", "float32", "cpu", 0.9998, 2.0), RuntimeCheck("torch", "float32", reason="not there"),
        RuntimeCheck("openvino", "bfloat16", "cpu", 0.9951, 4.0),
    ]  # fmt: skip
    seen: list[object] = []

    def check_runtimes(bundle: ModelBundle, pixels: object, on_progress: object) -> list[RuntimeCheck]:
        seen.append(pixels)
        return rows

    monkeypatch.setattr("s2seg.models.checking.check_runtimes", check_runtimes)
    monkeypatch.setattr(cli, "_some_chips", lambda store, bands: [f"of {store.name}"] * 3)
    assert cli.main(["models", "show", model.path, "--check"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "99.9800 !" in printed and "99.5100 │" in printed
    assert "! below the goal of 99.99 % in float32, 99.5 % in bfloat16" in printed
    assert printed.endswith("compared on a synthetic landscape")
    own = Path(model.path) / "chips.zarr"
    own.mkdir()
    try:
        assert cli.main(["models", "show", model.path, "--check"]) == 0
    finally:
        own.rmdir()
    assert f"compared on 3 chips of {own}" in capsys.readouterr().out
    assert seen == [None, ["of chips.zarr"] * 3]


BAD = {
    "unknown catalog": ({"--catalog": "earth-serch"}, "did you mean|known are"),
    "no items then": ({"--datetime": "2019"}, "nearest 2021"),
    "no coverage": ({"--aoi": "2,2,3,3"}, "covers"),
    "too cloudy": ({"--max-cloud-cover": "0"}, "cloudier"),
    "empty aoi": ({"--aoi": "POLYGON EMPTY"}, "empty"),
    "crossing aoi": ({"--aoi": "POLYGON((0 0,1 1,1 0,0 1,0 0))"}, "Self-intersection"),
    "swapped aoi": ({"--aoi": "46.04,15.66,46.06,15.68"}, "swapped"),
    "reversed dates": ({"--datetime": "2021-12-31/2021-01-01"}, "backwards"),
    "unparsable dates": ({"--datetime": "last summer"}, "2023-08"),
    "unknown composite": ({"--composite": "best"}, "median"),
    "unknown SCL class": ({"--mask": "clouds"}, "cloud_high_probability"),
    "masks apart": ({"--composite": "per-date", "--dilate": "60"}, "per-date maps every pixel"),
    "empty mask": ({"--mask": ","}, "different names"),
    "layers twice": ({"--layers": "class,class"}, "different names"),
    "a URL to write to": ({"--output": "s3://bucket/map"}, "local path"),
    "too long a path": ({"--output": "x" * 300}, "too long"),
    "unknown layer": ({"--layers": "logits"}, "confidence"),
    "an area too large": ({"--aoi": "-180,-80,180,80"}, "too large for one"),
    "no resolution": ({"--resolution": "0"}, "resolution"),
    "no end of resolution": ({"--resolution": "inf"}, "resolution"),
    "feet": ({"--crs": "EPSG:2263"}, "US survey foot, not in metres"),
    "float16 on a processor": ({"--precision": "float16"}, "float16 needs torch"),
    "torch for ONNX": ({"--runtime": "torch"}, "does not run on torch"),
    "a mask without end": ({"--dilate": "nan"}, "0 to 10,000 metres"),
    "unknown crs": ({"--crs": "EPSG:1"}, "CRS"),
    "not a bundle": ({"--model": "."}, "model.json"),
    "no such model": ({"--model": "nowhere/at/all"}, "nowhere"),
    "unknown runtime": ({"--runtime": "tensorflow"}, "runtime"),
    "nothing clear": (
        {
            "--mask": ",".join(
                [
                    "no_data",
                    "dark_area",
                    "vegetation",
                    "not_vegetated",
                    "water",
                    "unclassified",
                    "snow",
                    "cloud_shadow",
                    "cloud_medium_probability",
                    "cloud_high_probability",
                    "thin_cirrus",
                    "saturated_or_defective",
                ]
            )
        },
        "no scene has a clear pixel",
    ),
    "no scheduler": ({"--scheduler": "tcp://127.0.0.1:1"}, "scheduler"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")  # distributed's client, when nothing answers
def test_a_mistake_is_one_line_and_leaves_nothing(
    case: str, synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = BAD[case]
    assert run(good(synthetic, model, tmp_path / "new" / "out") | change) == 2
    check_one_line(capsys.readouterr().err, says)
    assert not (tmp_path / "new").exists()


def check_one_line(printed: str, says: str) -> None:
    lines = [line for line in printed.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in printed
    assert re.search(says, lines[0]), lines[0]


def test_a_model_whose_bands_the_catalog_lacks(
    synthetic: SyntheticRegion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_onnx(tmp_path / "m", bands=("red", "cirrus"))
    assert run(good(synthetic, model, tmp_path / "out")) == 2
    check_one_line(capsys.readouterr().err, "no band 'cirrus'.*it has")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_damaged_weights(
    damage: str, synthetic: SyntheticRegion, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_onnx(tmp_path / "m")
    content = bytearray(model.weights_path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    if damage == "missing":
        model.weights_path.unlink()
    else:
        model.weights_path.write_bytes(bytes(content) if damage == "flipped" else bytes(content[:100]))
    assert run(good(synthetic, model, tmp_path / "out")) == 2
    check_one_line(capsys.readouterr().err, "model")


def test_a_pickle_is_refused(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"a": 1}))
    assert run(good(synthetic, model, tmp_path / "out") | {"--model": str(tmp_path / "weights.pt")}) == 2
    check_one_line(capsys.readouterr().err, "refused")


@pytest.mark.parametrize("damage", ["missing", "truncated", "text"])
def test_a_damaged_asset_names_item_band_and_href(
    damage: str, model: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    catalog = position_scene(tmp_path / "scene", shape=(256, 256))
    asset = next((tmp_path / "scene").rglob("*B08*.tif"), None) or next((tmp_path / "scene").rglob("nir.tif"))
    content = asset.read_bytes()
    asset.unlink()
    if damage != "missing":
        asset.write_bytes(content[: len(content) // 2] if damage == "truncated" else b"not a raster")
    arguments = {
        "--catalog": str(catalog), "--aoi": "15.001,46.03,15.03,46.05", "--datetime": "2023-07", "--model": model.path,
        "--output": str(tmp_path / "out"), "--mask": "",
    }  # fmt: skip
    assert run(arguments) == 2
    check_one_line(capsys.readouterr().err, rf"band nir of item S2\S+ \(.*{asset.name}\)")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_is_told_and_cleaned_up(synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path) -> None:
    arguments = good(synthetic, model, tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "s2seg", "map", *(part for pair in arguments.items() for part in pair)],
        capture_output=True, text=True, check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    check_one_line(done.stderr, "cannot write")
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output(
    synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run(good(synthetic, model, tmp_path / "file" / "out")) == 2
    check_one_line(capsys.readouterr().err, "cannot write")


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (
        "search", "map", "train", "tune", "evaluate", "export", "models show", "models import",
    ):  # fmt: skip
        assert cli.main([*command.split(), "--help"]) == 0
        assert f"s2seg {command} " in capsys.readouterr().out.partition("Example")[2], command


def test_an_interrupted_training_says_how_to_go_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("s2seg.training.config.load_config", lambda *_: None)
    monkeypatch.setattr("s2seg.training.run.train", stop)
    assert cli.main(["train", "any.yaml", "--output", str(tmp_path)]) != 0
    assert "--resume goes on" in capsys.readouterr().err
