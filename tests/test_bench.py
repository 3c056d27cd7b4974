"""The bench: what it keeps and compares, and that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import rasterio
import torch
from rich.console import Console

from s2seg.models.bundle import ModelBundle
from s2seg.pipeline import MapOptions, map_area, plan_area
from s2seg.sources.composite import CompositeSpec
from s2seg.testing import SyntheticRegion, position_scene
from tests.bench import fixtures, gpu, mapping, scale
from tests.bench.__main__ import SUITES, main
from tests.bench.measuring import clock, compare, fresh, keep, machine, samples, spread
from tests.tiny import tiny_onnx

DATES = "2021"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return tiny_onnx(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def six_bands(tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    return tiny_onnx(tmp_path_factory.mktemp("six"), bands=fixtures.BANDS)


@pytest.fixture(scope="module")
def one_item(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog of one item, as the bench's scenes are."""
    return position_scene(tmp_path_factory.mktemp("one"), bands={**dict.fromkeys(fixtures.BANDS, 10.0), "scl": 20.0})


# figures

FIGURES = {
    "end_to_end": [
        {"name": "openvino, 4096 px", "size": 4096, "window": [2208, 2208], "seconds": [3.0, 2.0, 9.0], "mpx": 16.0},
        {"name": "torch, 4096 px", "size": 4096, "window": [1536, 1536], "seconds": [8.0], "overlap_cost": 1.25},
    ],
    "rows": {"plain loop": {"version": "1", "seam_error": 0.0, "peak_bytes": 2**30, "requests": 78}},
}


def printed(*arguments: Any) -> str:
    console = Console(width=200)
    with console.capture() as said:
        compare(*arguments, console)
    return said.get()


def test_samples_are_what_was_measured_under_the_name_of_its_row() -> None:
    assert dict(samples(FIGURES)) == {
        "end_to_end/openvino, 4096 px/seconds": 3.0, "end_to_end/torch, 4096 px/seconds": 8.0,
        "end_to_end/torch, 4096 px/overlap_cost": 1.25, "rows/plain loop/seam_error": 0.0,
        "rows/plain loop/peak_bytes": 2**30, "rows/plain loop/requests": 78,
    }  # fmt: skip


def test_a_kept_run_is_compared_number_by_number(tmp_path: Path) -> None:
    file = tmp_path / "new" / "kept.json"
    keep(file, "map", FIGURES, took=61.04)
    keep(file, "scale", {"graph_seconds": [1.0]}, took=2.0)
    kept = json.loads(file.read_text())
    assert {name: suite["took_seconds"] for name, suite in kept.items()} == {"map": 61.0, "scale": 2.0}
    now = json.loads(json.dumps(FIGURES))
    now["end_to_end"][0]["seconds"] = [6.0]
    now["rows"]["plain loop"]["seam_error"] = 0.25
    rows = [line.split("│")[1:-1] for line in printed("map", now, kept).splitlines() if line.startswith("│")]
    told = {name.strip(): [cell.strip() for cell in cells] for name, *cells in rows}
    assert told.keys() == dict(samples(FIGURES)).keys()
    assert told["end_to_end/openvino, 4096 px/seconds"] == ["3", "6", "2.00"]
    assert told["rows/plain loop/seam_error"] == ["0", "0.25", ""]


def test_what_cannot_be_compared_is_told() -> None:
    assert "map: not in the kept run" in printed("map", FIGURES, {})
    elsewhere = {"map": {"when": "then", "machine": "a laptop", "figures": FIGURES}}
    assert "another machine then: a laptop" in printed("map", FIGURES, elsewhere)


def test_cells_of_the_tables() -> None:
    assert spread([3.0, 1.0, 2.0]) == ("2.00", "1.00-3.00")
    assert spread([0.26], 1) == ("0.3", "0.3-0.3")
    assert [clock(seconds) for seconds in (0.4, 59.6, 185, 3600)] == ["0:00", "1:00", "3:05", "60:00"]


def test_the_gpu_is_named_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "a card" not in machine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    assert "a card" in machine()


# the command


@pytest.mark.parametrize("name", SUITES)
def test_every_suite_can_be_loaded(name: str) -> None:
    assert callable(import_module(f"tests.bench.{SUITES[name]}").measure)


@pytest.mark.parametrize(
    ("arguments", "says"), [(["maps"], "invalid choice: 'maps'"), (["map", "--against", "no.json"], "no.json does not")]
)
def test_a_mistake_ends_in_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


def test_a_quick_run_prints_keeps_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tmp_path / "before.json"
    keep(before, "composite", {"rows": [{"name": "median, s2seg", "s_per_mpx": [1.0]}]}, took=1.0)
    main(["composite", "--quick", "--folder", str(tmp_path / "bench"), "--against", str(before)])
    said = capsys.readouterr().out
    for what in ("percentile", "composite, against", "composite took 0:", "all of it took 0:"):
        assert what in said
    kept = json.loads((tmp_path / "bench" / "figures.json").read_text())["composite"]
    assert kept["took_seconds"] > 0
    rows = {row["name"]: row for row in kept["figures"]["rows"]}
    assert rows["median, s2seg"]["s_per_mpx"][0] > 0
    assert [name for name, row in rows.items() if row.get("same", 1) < 1] == []


# scenes


def test_a_scene_without_real_data_is_one_item(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("S2SEG_REAL_DATA", str(tmp_path / "nothing" / "data"))
    catalog = fixtures.scene(tmp_path, 256)
    assert fixtures.grid_of(catalog).shape == (256, 256)
    pixels = fixtures.piece(catalog, 192)
    assert pixels.shape == (6, 192, 192)
    assert (pixels > 0).all() and len(np.unique(pixels)) > 1000
    with rasterio.open(next(catalog.parent.rglob("B02.tif"))) as blue:
        assert blue.overviews(1)


# what is measured


def test_memory_is_about_what_the_plan_says(synthetic: SyntheticRegion, model: ModelBundle, tmp_path: Path) -> None:
    planned = plan_area(synthetic.catalog, synthetic.bbox, DATES, model).peak_memory
    _, peak = fresh(_map, str(synthetic.catalog), synthetic.bbox, model.path, str(tmp_path / "out"))
    assert 0.4 < peak / planned < 1.5, f"{peak / 2**20:.0f} of {planned / 2**20:.0f} MiB"


def _map(catalog: str, box: tuple[float, float, float, float], model: str, output: str) -> None:
    map_area(catalog, box, DATES, model, output)


def test_the_graph_of_many_items_is_built_without_reading(
    one_item: Path, six_bands: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = scale._many_items(tmp_path, one_item)
    assert len(json.loads(many.read_text())["features"]) == scale.ITEMS == 500

    def refuse(*arguments: Any, **settings: Any) -> None:
        raise AssertionError(f"opened {arguments[0]}")

    monkeypatch.setattr(rasterio, "open", refuse)
    assert len(scale._graph(many, fixtures.inner_box(many), six_bands.path)) == 3


def here(function: Callable[..., Any], *arguments: Any) -> tuple[Any, int]:
    """What ``fresh`` does, in this process."""
    return function(*arguments), 2**30


def test_the_overlap_is_measured_in_time_too(one_item: Path, six_bands: ModelBundle) -> None:
    chunks = plan_area(one_item, fixtures.inner_box(one_item), fixtures.DATES, six_bands, OPTIONS).chunks
    session, paces, overlap = mapping._network_alone(one_item, six_bands.path, ("openvino", "float32"), chunks)
    assert session == "openvino cpu float32"
    assert len(paces) == mapping.PACES and min(paces) > 0
    assert overlap > 0


OPTIONS = MapOptions(composite=CompositeSpec(mask=()), core=128)


def test_the_gpu_suite_runs_whatever_the_size_of_the_scene(
    one_item: Path, six_bands: ModelBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0"))
    monkeypatch.setattr(gpu, "WAY", {"runtime": "openvino", "device": "cpu", "precision": "float32"})
    monkeypatch.setattr(gpu, "CALLS", 2)
    monkeypatch.setattr(gpu, "fresh", here)
    monkeypatch.setattr(gpu, "scene", lambda *_: one_item)
    monkeypatch.setattr(gpu, "fitted_network", lambda *_: six_bands)
    monkeypatch.setattr(gpu, "_window", lambda *_: (320, 288))  # larger than the scene
    figures = gpu.measure(tmp_path, Console(quiet=True), quick=True)
    assert figures["card"] == "a card" and figures["windows"].endswith("320 x 288 px")
    assert min(figures["network_mpx_s"] + figures["map_mpx_s"]) > 0
