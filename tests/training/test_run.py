from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import xarray as xr
import yaml

from s2seg import load_model, predict
from s2seg.assess import read_scores
from s2seg.assess.confusion import confusion
from s2seg.assess.forest import fit_forest
from s2seg.cli import main
from s2seg.errors import InputError, OutputError
from s2seg.testing import LEGEND, SyntheticRegion
from s2seg.training.chips import open_chips
from s2seg.training.config import TrainConfig, load_config
from s2seg.training.regions import open_regions
from s2seg.training.run import evaluate_model, preview, train
from tests.tiny import tiny_onnx

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def write_config(region: SyntheticRegion, folder: Path, **changes: object) -> Path:
    values = {
        "legend": LEGEND.to_dict(),
        "bands": ["blue", "green", "red", "nir"],
        "areas": [
            {
                "name": "toy",
                "catalog": str(region.catalog),
                "datetime": "2021",
                "labels": {"raster": str(region.truth)},
            }
        ],
        "split": {"block": 64, "seed": 1},
        "chips": {"size": 32, "stride": 32},
        "network": {"arguments": {"encoder_depth": 2, "decoder_channels": [16, 8]}},
        "fit": {"epochs": 2, "steps_per_epoch": 4, "batch_size": 4, "precision": "float32"},
        "logs": ["csv"],
    } | changes
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def trained(synthetic: SyntheticRegion, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, Path]:
    folder = tmp_path_factory.mktemp("train")
    config = load_config(write_config(synthetic, folder))
    train(config, folder / "m")
    return config, folder / "m"


def test_training_ends_in_a_model_that_maps(
    trained: tuple[TrainConfig, Path], synthetic: SyntheticRegion, tmp_path: Path
) -> None:
    config, folder = trained
    names = {p.name for p in folder.iterdir()}
    assert names >= {"model.json", "weights.safetensors", "config.yaml", "split.png", "curves.png", "maps_test.png"}
    assert not any(name.startswith(".") for name in names)
    model = load_model(folder)
    assert model.spec.bands == config.channels and model.spec.legend == LEGEND
    assert set(model.spec.metrics) >= {"val_mean_iou", "test"} and model.spec.provenance["items"]
    box = ",".join(map(str, synthetic.bbox))
    where = ["--catalog", str(synthetic.catalog), "--aoi", box, "--datetime", "2021"]
    assert main(["map", *where, "--model", str(folder), "--output", str(tmp_path / "out")]) == 0


def test_scores_are_those_of_the_map_on_the_unseen_pixels(
    trained: tuple[TrainConfig, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, folder = trained
    # ten trees score what a hundred would, in a tenth of their time
    monkeypatch.setattr("s2seg.training.evaluate.fit_forest", partial(fit_forest, trees=10))
    (region,) = open_regions(config)
    mapped = predict(region.scene, load_model(folder)).land_cover.values
    truth = np.where(region.split.values == 3, region.labels.values, LEGEND.nodata)
    expected = confusion(truth.astype(np.uint8), mapped, LEGEND)
    result, written = evaluate_model(folder, tmp_path, with_baseline=True)
    np.testing.assert_array_equal(result.confusions["U-Net"].matrix, expected.matrix)
    assert result.scores["forest"].overall_accuracy > 0.5
    stored = read_scores(tmp_path / "scores_test.json")
    assert set(stored) == {"U-Net", "forest"} and all(path.exists() for path in written)
    np.testing.assert_array_equal(stored["U-Net"].confusion.matrix, expected.matrix)
    for picture in result.pictures:  # what was trained on shows no label there
        row, col = (int(text.split()[1]) for text in picture.caption.split(", ")[-2:])
        at = np.s_[row : row + picture.truth.shape[0], col : col + picture.truth.shape[1]]
        np.testing.assert_array_equal(picture.truth, truth[at])


def test_training_sees_what_mapping_sees(trained: tuple[TrainConfig, Path], synthetic: SyntheticRegion) -> None:
    config, folder = trained
    (region,) = open_regions(config)
    chips = open_chips(folder / "chips.zarr", config.fingerprint("data"))
    with rasterio.open(synthetic.truth) as raster:
        truth = xr.DataArray(raster.read(1))
    assert set(np.unique(region.labels.values)) <= set(np.unique(truth))
    for i in chips.indices("train")[:5]:
        _, row, col = chips.origin[i]
        here = {"y": slice(row, row + 32), "x": slice(col, col + 32)}
        np.testing.assert_array_equal(chips.images(int(i))[0], region.scene.isel(here).values)


def test_a_folder_holds_one_training(
    trained: tuple[TrainConfig, Path], synthetic: SyntheticRegion, tmp_path: Path
) -> None:
    config, folder = trained
    before = (folder / "model.json").read_bytes()
    with pytest.raises(OutputError, match="--resume to go on, or --overwrite"):
        train(config, folder)
    other = load_config(write_config(synthetic, tmp_path, bands=["red", "nir"]))
    with pytest.raises(InputError, match="another configuration: leave out --chips"):
        train(other, tmp_path / "m", chips=folder / "chips.zarr", overwrite=True)
    assert (folder / "model.json").read_bytes() == before
    settings = (folder / "config.yaml").read_bytes()
    with pytest.raises(InputError, match=r"another configuration's training: go on with .*config.yaml"):
        train(other, folder, resume=True)
    assert (folder / "config.yaml").read_bytes() == settings
    assert train(config, folder, resume=True).model.sha256 == load_model(folder).sha256


def test_chips_of_other_settings_are_no_dead_end(
    trained: tuple[TrainConfig, Path], synthetic: SyntheticRegion, tmp_path: Path
) -> None:
    _, folder = trained
    of_model = open_chips(folder / "chips.zarr").fingerprint
    evaluate_model(folder, tmp_path / "e", overrides=["fit.seed=3"])  # other weights, but the same chips
    assert not list((tmp_path / "e").glob("*.zarr"))
    other = ["split.seed=3", f"areas.0.labels.raster={synthetic.truth}"]
    for _ in range(2):
        evaluate_model(folder, tmp_path / "e", overrides=other)
    (cut,) = (tmp_path / "e").glob("chips-*.zarr")
    wanted = load_config(folder / "config.yaml", other).fingerprint("data")
    assert (open_chips(cut).fingerprint, open_chips(folder / "chips.zarr").fingerprint) == (wanted, of_model)
    with pytest.raises(InputError, match="whose scores are its own: pass --output"):
        evaluate_model(folder, overrides=other)
    for chips, says in ((cut, "another configuration: leave out --chips"), (tmp_path / "nope.zarr", "no chips in")):
        with pytest.raises(InputError, match=says):
            evaluate_model(folder, tmp_path / "f", chips=chips)
    assert not (tmp_path / "f").exists() and not (tmp_path / "nope.zarr").exists()


def test_a_preview_keeps_its_own_chips_and_makes_others_anew(
    trained: tuple[TrainConfig, Path], synthetic: SyntheticRegion, tmp_path: Path
) -> None:
    config, folder = trained
    page, chips = tmp_path / "p" / "preview.png", tmp_path / "p" / "chips.zarr"
    preview(config, page)
    made = chips.stat().st_mtime_ns
    preview(config, page, overwrite=True)
    assert chips.stat().st_mtime_ns == made
    other = load_config(write_config(synthetic, tmp_path, chips={"size": 16, "stride": 16}))
    with pytest.raises(InputError, match="pass --overwrite to make them anew"):
        preview(other, tmp_path / "p" / "again.png")
    preview(other, page, overwrite=True)
    assert open_chips(chips).spec.size == 16
    with pytest.raises(InputError, match="another configuration: leave out --chips"):
        preview(other, page, chips=folder / "chips.zarr", overwrite=True)


def test_an_exported_model_knows_its_test_part(
    trained: tuple[TrainConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, folder = trained
    export = ["export", "--model", str(folder), "--kind", "onnx", "--output", str(tmp_path / "m")]
    assert main(export) == 0
    assert main([*export, "--overwrite"]) == 0
    assert main(["evaluate", "--model", str(tmp_path / "m"), "--chips", str(folder / "chips.zarr")]) == 0
    (again,) = read_scores(tmp_path / "m" / "scores_test.json").values()
    (scores,) = read_scores(folder / "scores_test.json").values()
    assert again.support.tolist() == scores.support.tolist()
    assert again.mean_iou == pytest.approx(scores.mean_iou, abs=1e-2)
    capsys.readouterr()
    assert main(["models", "show", str(tmp_path / "m"), "--check", "--chips", str(folder / "chips.zarr")]) == 0
    printed = capsys.readouterr().out
    assert "agreement with onnxruntime" in printed and "why not" in printed
    assert f"chips of {folder / 'chips.zarr'}" in printed
    other = tiny_onnx(tmp_path / "other", bands=("red", "swir16"))
    assert main(["models", "show", other.path, "--check", "--chips", str(folder / "chips.zarr")]) == 2
    assert "the model needs swir16, and the chips in" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_told_before_chips_are_cut(
    trained: tuple[TrainConfig, Path], synthetic: SyntheticRegion, tmp_path: Path
) -> None:
    for changes, says in (
        ({"legend": "esri"}, "'synthetic' is not that of the labels, 'esri': give"),
        ({"bands": ["red", "nir"]}, "needs blue, green, and the configuration has red, nir: .* its own configuration"),
    ):
        with pytest.raises(InputError, match=says):
            evaluate_model(trained[1], tmp_path / "e", config=write_config(synthetic, tmp_path, **changes))
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "name a configuration"),
        (["train", "none.yaml"], "none.yaml"),
        (["evaluate", "--model", "none"], "none"),
        (["evaluate", "--model", "{model}", "--part", "east"], "no part 'east'"),
        (["evaluate", "--model", "{model}", "--output", "{model}/model.json"], "is a file, not a folder"),
        (["export", "--model", "{model}", "--kind", "coreml", "--output", "x"], "coreml"),
        (["export", "--model", "{model}", "--kind", "onnx", "--output", "x", "--chips", "nope"], "no chips in nope"),
    ],
)
def test_mistakes_are_one_line(
    trained: tuple[TrainConfig, Path], capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main([a.replace("{model}", str(trained[1])) for a in arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1 and "Traceback" not in said


def test_the_template_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--template"]) == 0
    assert "bands:" in capsys.readouterr().out


@pytest.mark.real_data
@pytest.mark.parametrize("name", ["alberta", "mekong", "labelled", "flanders"])
def test_the_examples_have_what_they_name(real_data: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("S2SEG_REAL_DATA", str(real_data))
    config = load_config(EXAMPLES / f"{name}.yaml")
    for region in open_regions(config):
        assert region.scene.sizes["band"] == len(config.channels)
        assert region.scene.shape[1:] == region.labels.shape == region.split.shape


def test_a_preview_shows_mixed_dates(
    synthetic: SyntheticRegion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    area = {"name": "toy", "catalog": str(synthetic.catalog), "datetime": list(synthetic.dates[:2])}
    areas = [area | {"labels": {"raster": str(synthetic.truth)}}]
    config = load_config(write_config(synthetic, tmp_path, areas=areas, augment={"mixed_dates": 1.0}))
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("s2seg.training.preview.write_preview", lambda path, images, *_, **o: drawn.update(o, i=images))
    preview(config, tmp_path / "preview.png")
    chips = open_chips(tmp_path / "chips.zarr")
    assert len(drawn["mixed"]) == drawn["columns"] - 2 == 4
    for images, _ in drawn["mixed"]:
        assert (images != drawn["i"]).any(axis=(1, 2, 3)).mean() > 0.5
        for mixed, chip in zip(images, drawn["i"], strict=True):
            (here,) = np.flatnonzero([np.array_equal(image, chip) for image in chips.images(slice(None))])[:1]
            place = (chips.origin[:, 1:] == chips.origin[here, 1:]).all(1)
            # every pixel is of one of the dates
            assert (mixed == chips.images(np.flatnonzero(place))).all(1).any(0).all()
