import csv
import functools
import pickle
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from s2seg.errors import InputError, ModelError, S2SegWarning
from s2seg.training import search_space as spaces
from s2seg.training import tune as tuning
from s2seg.training.chips import ChipSpec
from s2seg.training.config import load_config
from s2seg.training.fit import fit
from s2seg.training.history import Standing
from s2seg.training.joined import JoinedChips
from s2seg.training.module import DivergedError
from s2seg.training.tune import tune
from tests.training.toy import toy_chips, toy_config

LOSS = "0.7*cross_entropy + 0.3*focal"
SPACE = {"losses": ["dice"], "encoders": ["resnet34"], "batch_sizes": [4, 8], "chip_sizes": [64]}
ALONE = {"losses": [], "encoders": [], "batch_sizes": [], "chip_sizes": []}


def config_of(tune=SPACE, **changes):
    changes = {"fit": {"epochs": 5}, "optimizer": {"learning_rate": 0.0031234}, "loss": LOSS} | changes
    return toy_config(tune=tune, **changes)


CONFIG = config_of()


@pytest.fixture
def trained(monkeypatch):
    """Trainings that take no time: the score rises with the learning rate. Returns what was trained."""
    configs = []

    def fit(config, chips, folder, *, on_progress):
        configs.append(config)
        assert chips == (config.chips.size if config.chips.size == 32 else (config.chips.size, 32))
        best = min(0.9, 50 * config.optimizer.learning_rate)
        for epoch in range(1, config.fit.epochs + 1):
            row = {"epoch": epoch, "val_mean_iou": best * epoch / config.fit.epochs}
            on_progress(Standing(epoch, config.fit.epochs, 1, 1, row))
        return SimpleNamespace(spec=SimpleNamespace(metrics={"val_mean_iou": best}))

    monkeypatch.setattr(tuning, "fit", fit)
    monkeypatch.setattr(tuning, "JoinedChips", lambda train, validation: (train, validation))
    monkeypatch.setattr(spaces, "check_fit", lambda config: None)
    return configs


def size_of(config):
    return config.chips.size


def test_finds_the_best_and_writes_it_down(trained, tmp_path):
    result = tune(CONFIG, size_of, tmp_path, trials=12)
    assert trained[0] == CONFIG  # word for word: the very training that `s2seg train` would run
    assert len(result.trials) == len(trained) == 12
    assert result.best.score == max(t.score for t in result.trials if t.state == "complete") >= result.trials[0].score
    assert {t.state for t in result.trials} == {"complete", "pruned"}
    assert {(c.loss, c.network.encoder, c.fit.batch_size, c.chips.size, c.chips.stride) for c in trained} > {
        (LOSS, "resnet18", 4, 32, 16)
    }
    for drawn in ({c.loss for c in trained}, {c.network.encoder for c in trained}, {c.chips.size for c in trained}):
        assert len(drawn) == 2
    assert all(c.chips.stride * 2 == c.chips.size for c in trained)
    written = load_config(tmp_path / "best.yaml")  # its relative paths count from there
    for section in ("optimizer", "network", "fit", "chips", "loss"):
        assert getattr(written, section) == getattr(result.config, section)
    assert result.config.optimizer.learning_rate == result.best.settings["learning_rate"]
    with (tmp_path / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [t.state for t in result.trials]
    assert [int(row["chip_size"]) for row in rows] == [c.chips.size for c in trained]


def test_a_trial_that_does_worse_than_those_before_is_ended_early(trained, tmp_path):
    epochs = []
    config = config_of(ALONE | {"learning_rate": (1e-9, 1e-8)})  # what is drawn is far below what is configured
    result = tune(config, size_of, tmp_path, trials=9, on_progress=lambda n, p: epochs.append((n, p.epoch)))
    assert result.best.number == 0 and result.config == config
    pruned = [t.number for t in result.trials if t.state == "pruned"]
    assert pruned and all(t.state == "complete" for t in result.trials[: tuning._STARTUP])
    assert {max(epoch for n, epoch in epochs if n == number) for number in pruned} == {tuning._WARMUP}


@pytest.mark.parametrize("at", [0, 2])
def test_an_interrupted_search_goes_on(trained, tmp_path, at):
    cut = []

    def interrupt(number, progress):
        if (number, progress.epoch) == (at, 2):
            raise KeyboardInterrupt

    def chips_for(config):
        cut.append(config.chips.size)
        return config.chips.size

    with pytest.raises(KeyboardInterrupt):
        tune(CONFIG, chips_for, tmp_path, trials=4, on_progress=interrupt)
    assert cut == [32, 64]  # all of them before the first trial
    result = tune(CONFIG, size_of, tmp_path, trials=4)
    assert sum(t.state != "fail" for t in result.trials) == 4
    assert next(c for t, c in zip(result.trials, trained, strict=True) if t.state != "fail") == CONFIG
    again = tune(CONFIG, size_of, tmp_path, trials=4)
    assert again == result


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (config_of(fit={"epochs": 9}), "another configuration"),
        (config_of(SPACE | {"chip_sizes": [16]}), "another section tune"),
    ],
)
def test_another_search_needs_another_folder(trained, tmp_path, other, says):
    tune(CONFIG, size_of, tmp_path, trials=1)
    with pytest.raises(InputError, match=f"{says}: choose another folder"):
        tune(other, size_of, tmp_path, trials=2)
    assert len(trained) == 1


def test_a_trial_that_a_kill_left_behind_is_tried_again(trained, tmp_path):
    tune(CONFIG, size_of, tmp_path, trials=1)
    study, space = tuning._study(CONFIG, tmp_path, size_of)
    left = tuning._suggest(study.ask(), space, CONFIG)
    weights = tmp_path / "trials" / "0001" / "checkpoints" / "last.ckpt"
    weights.parent.mkdir(parents=True)
    weights.touch()
    result = tune(CONFIG, size_of, tmp_path, trials=2)
    assert [t.state for t in result.trials] == ["complete", "fail", "complete"]
    assert result.trials[2].settings == left
    assert not weights.exists()


@pytest.mark.parametrize("error", [DivergedError("train_loss is not a number"), torch.OutOfMemoryError("on the GPU")])
def test_settings_that_cannot_work_are_pruned_and_the_search_goes_on(trained, tmp_path, monkeypatch, error):
    works = tuning.fit

    def fit(config, chips, folder, *, on_progress):
        if not trained:
            trained.append(config)
            raise error
        return works(config, chips, folder, on_progress=on_progress)

    monkeypatch.setattr(tuning, "fit", fit)
    result = tune(CONFIG, size_of, tmp_path, trials=3)
    assert [t.state for t in result.trials] == ["pruned", "complete", "complete"]
    assert result.trials[0].score is None


def test_the_usual_space_is_round_what_is_configured(monkeypatch, tmp_path):
    config = config_of({}, network={"encoder": "vgg11"}, chips={"size": 96, "stride": 24, "sizes": [192]})

    def cut(size):
        if size == 192:
            raise InputError("no chip for training")

    def check_fit(config):
        if config.network.encoder == "mobilenet_v2":
            raise ModelError("toy", "does not go with this architecture")

    monkeypatch.setattr(spaces, "check_fit", check_fit)
    with pytest.warns(S2SegWarning, match=r"without encoder mobilenet_v2 \(.*architecture\); chip_size 192 \(no chip"):
        space = spaces.search_space(config, cut)
    assert space.learning_rate == (1e-4, 1e-2)
    assert space.loss == (LOSS, *spaces.LOSSES)
    assert space.encoder == ("vgg11", "resnet18", "resnet34", "efficientnet-b0")
    assert space.batch_size == (4, 8, 16, 32)
    assert space.chip_size == (96, 48)
    assert spaces.SearchSpace.from_dict(space.to_dict()) == space
    half = spaces.changed(config, {"chip_size": 48}).chips
    assert (half.stride, half.sizes) == (12, (96,))  # the same overlap, the same scales
    pretrained = config_of({}, network={"weights": str(tmp_path)}, loss="0.3*dice + 0.7*cross_entropy")
    space = spaces.search_space(pretrained, lambda size: None)
    assert space.encoder == ("resnet18",)
    assert space.loss == (pretrained.loss, *(loss for loss in spaces.LOSSES if "0.3*dice" not in loss))


def test_the_configured_settings_are_always_in_the_space(monkeypatch):
    monkeypatch.setattr(spaces, "check_fit", lambda config: None)
    space = spaces.search_space(config_of(ALONE | {"learning_rate": (1e-5, 1e-4)}), lambda size: None)
    assert space == spaces.SearchSpace((1e-5, 0.0031234), (LOSS,), ("resnet18",), (4,), (32,))


def test_real_trainings_of_several_sizes_are_scored_alike(tmp_path, monkeypatch):
    """Also that the second one, with a learning rate of nothing, is seen to do worse and is ended."""
    monkeypatch.setattr(tuning, "_STARTUP", 1)
    monkeypatch.setattr(tuning, "_WARMUP", 0)
    seen = []

    def watched(config, chips, folder, **options):
        seen.append((config.chips.size, chips.labels(chips.indices("validation"))))
        return fit(config, chips, folder, **options)

    monkeypatch.setattr(tuning, "fit", watched)

    @functools.cache
    def chips_of(size, stride):
        return toy_chips(tmp_path / f"{size}.zarr", ChipSpec(size, stride))

    def chips_for(config):
        return chips_of(config.chips.size, config.chips.stride)

    space = {"learning_rate": (1e-12, 1e-11), "losses": [], "encoders": [], "batch_sizes": [], "chip_sizes": [64]}
    config = toy_config(fit={"epochs": 2}, tune=space)
    result = tune(config, chips_for, tmp_path / "study", trials=4)
    assert {size for size, _ in seen} == {32, 64}
    assert all(np.array_equal(labels, seen[0][1]) for _, labels in seen)
    assert result.trials[0].state == "complete" and "pruned" in {t.state for t in result.trials}
    assert result.best.number == 0 and result.config == config
    alone = fit(config, chips_for(config), tmp_path / "alone")
    assert result.trials[0].score == alone.spec.metrics["val_mean_iou"]  # the configured training, to the bit
    assert not list((tmp_path / "study").rglob("*.ckpt"))


def test_joined_chips(tmp_path):
    small, large = (toy_chips(tmp_path / f"{n}.zarr", ChipSpec(n, n)) for n in (16, 32))
    chips = JoinedChips(large, small)
    for part, store in (("train", large), ("validation", small)):
        own, theirs = chips.indices(part), store.indices(part)
        np.testing.assert_array_equal(chips.images(own), store.images(theirs))
        np.testing.assert_array_equal(chips.labels(own[-1]), store.labels(theirs[-1]))
        np.testing.assert_array_equal(chips.histogram[own], store.histogram[theirs])
    assert len(chips) == len(large.indices("train")) + len(small.indices("validation"))
    assert (chips.spec, chips.fingerprint, chips.mean[0]) == (large.spec, large.fingerprint, large.mean[0])
    copy = pickle.loads(pickle.dumps(chips))  # as for a process of its own
    np.testing.assert_array_equal(copy.images(-1), chips.images(-1))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"encoders": ["resnet99"]}, "unknown encoder 'resnet99'"),
        ({"batch_sizes": [3000000]}, "batch_size 3000000 cannot be trained: .* chips alone take"),
        ({"chip_sizes": [64]}, "no chip for training"),
    ],
)
def test_a_choice_that_cannot_be_trained_is_told_before_the_first_trial(tmp_path, monkeypatch, space, message):
    def chips_for(config):
        if config.chips.size == 64:
            raise InputError("no chip for training")

    monkeypatch.setattr(tuning, "fit", lambda *_, **__: pytest.fail("a trial began"))
    with pytest.raises((InputError, ModelError), match=message):
        tune(config_of(ALONE | space), chips_for, tmp_path, trials=1)


def test_names_the_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 's2seg\[tune\]'"):
        tune(CONFIG, size_of, tmp_path, trials=1)
