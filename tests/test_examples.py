"""The examples run as they are printed, in processes of their own."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import rasterio
import xarray as xr

import s2seg
from s2seg.assess import read_scores
from s2seg.models import import_csmask
from s2seg.pipeline import MapOptions, map_area
from s2seg.testing import SyntheticRegion
from tests.tiny import tiny_onnx

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def script(name: str, *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, arguments)],
        capture_output=True, text=True, check=False, env=os.environ | {"COLUMNS": "150"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def test_the_stages_one_by_one(synthetic: SyntheticRegion, tmp_path: Path) -> None:
    model = tiny_onnx(tmp_path / "m")
    box = ",".join(map(str, synthetic.bbox))
    printed = script("map_area.py", synthetic.catalog, box, "2021", model.path, tmp_path / "out")
    assert "land_cover.tif" in printed
    with rasterio.open(tmp_path / "out" / "land_cover.tif") as dataset:
        stored = xr.open_zarr(tmp_path / "out" / "land_cover.zarr", mask_and_scale=False)
        np.testing.assert_array_equal(dataset.read(1), stored.land_cover.values)
        assert set(np.unique(dataset.read(1))) <= {0, 10, 20, 30} and "confidence" in stored


def test_the_readmes_python_tour_is_made_of_public_names() -> None:
    readme = (EXAMPLES.parent / "README.md").read_text()
    tour = readme.split("```python")[1].split("```")[0]
    compile(tour, "README.md", "exec")
    names = {word.split("(")[0].split(".")[1] for word in tour.split() for _ in [0] if word.startswith("s2seg.")}
    assert names and all(hasattr(s2seg, name) for name in names)


def test_the_demo_in_small(tmp_path: Path) -> None:
    printed = script("demo.py", tmp_path / "demo", "--size", 384, "--epochs", 1)
    assert "overall accuracy" in printed
    assert (tmp_path / "demo" / "map" / "quicklook.png").stat().st_size > 10_000


def test_a_mistake_with_tiles_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = load("train_from_tiles")
    monkeypatch.setattr(example.console, "width", 400)
    for option, value, says in (
        ("--bands", "red,green,blu", "bands: unknown 'blu': did you mean blue?"),
        ("--legend", "nope", "legend: "),
        ("--bands", "red,green,blue", "there is no folder"),
    ):
        monkeypatch.setattr(sys, "argv", ["train", str(tmp_path / "in"), "--output", str(tmp_path), option, value])
        assert example.main() == 2
        (line,) = [line for line in capsys.readouterr().out.splitlines() if "error" in line]
        assert says in line and "pydantic" not in line


def test_ready_cut_tiles_of_both_kinds(tmp_path: Path) -> None:
    """Every labelled pixel of every test tile counts once, though chips overlap."""
    printed = script("train_from_tiles.py", "--output", tmp_path, "--size", 384, "--epochs", 1)
    assert printed.count("overall accuracy") == 2
    for kind, classes in (("pictures", 6), ("geotiffs", 7)):
        model = tmp_path / kind / "model"
        assert (model / "split.png").stat().st_size > 5_000
        (scores,) = read_scores(model / "scores_test.json").values()
        assert (len(scores.legend), scores.support.sum() % 128**2, scores.coverage) == (classes, 0, 1)


@pytest.mark.real_data
def test_a_real_network_agrees_with_scl_on_real_clouds(real_data: Path, tmp_path: Path) -> None:
    model = import_csmask(tmp_path / "csmask")
    box = (15.5, 45.4, 15.8, 45.7)
    options = MapOptions(resolution=120, composite="per-date")
    map_area(real_data / "slovenia" / "catalog.json", box, "2023-08", model, tmp_path / "out", options)
    rows = {row["date"]: row for row in load("compare_with_scl").compare(tmp_path / "out")}
    assert list(rows) == ["2023-08-10", "2023-08-13", "2023-08-15", "2023-08-18", "2023-08-20"]
    for date in ("2023-08-10", "2023-08-18"):
        assert rows[date]["scl"] > 0.3 and rows[date]["agreement"] > 0.8 and rows[date]["precision"] > 0.8
    for date in ("2023-08-13", "2023-08-15", "2023-08-20"):
        assert rows[date]["agreement"] > 0.93
