import csv
import sys

import pytest

from s2seg.errors import InputError
from s2seg.training import tune as tuning
from s2seg.training.config import load_config
from s2seg.training.fit import FitResult, Progress
from s2seg.training.module import DivergedError
from s2seg.training.tune import SearchSpace, tune
from tests.training.toy import toy_chips, toy_config

SPACE = SearchSpace(encoders=("resnet18", "resnet34"), batch_sizes=(4, 8), chip_sizes=(32, 64))
CONFIG = toy_config(fit={"epochs": 5})


@pytest.fixture
def trained(monkeypatch):
    """Trainings that take no time: the score rises with the learning rate. Returns what was trained."""
    configs = []

    def fit(config, chips, folder, *, on_progress):
        configs.append(config)
        assert chips == config.chips.size
        rows = []
        for epoch in range(1, config.fit.epochs + 1):
            score = min(0.9, 50 * config.optimizer.learning_rate) * epoch / config.fit.epochs
            rows.append({"epoch": epoch, "val_mean_iou": score})
            on_progress(Progress(epoch, config.fit.epochs, 1, 1, rows[-1]))
        return FitResult(None, None, tuple(rows), len(rows))

    monkeypatch.setattr(tuning, "fit", fit)
    return configs


def size_of(config):
    return config.chips.size


def test_finds_the_best_and_writes_it_down(trained, tmp_path):
    result = tune(CONFIG, size_of, tmp_path, trials=12, space=SPACE)
    first = trained[0]
    assert (first.optimizer.learning_rate, first.loss, first.fit.batch_size) == (3e-3, "cross_entropy", 4)
    assert len(result.trials) == len(trained) == 12
    assert result.best.score == max(t.score for t in result.trials if t.state == "complete")
    assert {t.state for t in result.trials} == {"complete", "pruned"}
    assert all(c.chips.stride * 2 == c.chips.size for c in trained)
    written = load_config(tmp_path / "best.yaml")  # its relative paths count from there
    for section in ("optimizer", "network", "fit", "chips", "loss"):
        assert getattr(written, section) == getattr(result.config, section)
    assert result.config.optimizer.learning_rate == result.best.settings["learning_rate"]
    with (tmp_path / "study.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["state"] for row in rows] == [t.state for t in result.trials]


def test_an_interrupted_search_goes_on(trained, tmp_path, monkeypatch):
    def interrupt(number, progress):
        if (number, progress.epoch) == (2, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(CONFIG, size_of, tmp_path, trials=4, space=SPACE, on_progress=interrupt)
    result = tune(CONFIG, size_of, tmp_path, trials=4, space=SPACE)
    assert sum(t.state != "fail" for t in result.trials) == 4
    again = tune(CONFIG, size_of, tmp_path, trials=4, space=SPACE)
    assert again == result
    with pytest.raises(InputError, match="another configuration or space"):
        tune(toy_config(fit={"epochs": 9}), size_of, tmp_path, trials=4, space=SPACE)


def test_a_trial_that_a_kill_left_behind_is_tried_again(trained, tmp_path):
    tune(CONFIG, size_of, tmp_path, trials=1, space=SPACE)
    trial = tuning._study(CONFIG, tmp_path, SPACE).ask()
    left = tuning._suggest(trial, SPACE)
    weights = tmp_path / "trials" / "0001" / "checkpoints" / "last.ckpt"
    weights.parent.mkdir(parents=True)
    weights.touch()
    result = tune(CONFIG, size_of, tmp_path, trials=2, space=SPACE)
    assert [t.state for t in result.trials] == ["complete", "fail", "complete"]
    assert result.trials[2].settings == left
    assert not weights.exists()


def test_settings_that_diverge_are_pruned_and_the_search_goes_on(trained, tmp_path, monkeypatch):
    works = tuning.fit

    def fit(config, chips, folder, *, on_progress):
        if not trained:
            trained.append(config)
            raise DivergedError("train_loss is not a number in epoch 1")
        return works(config, chips, folder, on_progress=on_progress)

    monkeypatch.setattr(tuning, "fit", fit)
    result = tune(CONFIG, size_of, tmp_path, trials=3, space=SPACE)
    assert [t.state for t in result.trials] == ["pruned", "complete", "complete"]
    assert result.trials[0].score is None


def test_the_usual_choices_hold_the_configured_ones(tmp_path):
    own = tuning._usual_space(toy_config(network={"encoder": "vgg11"}))
    assert own.encoders == ("vgg11", *SearchSpace().encoders)
    assert own.batch_sizes == (4, 8, 16, 32)
    fixed = tuning._usual_space(toy_config(network={"encoder": "resnet18", "weights": str(tmp_path)}))
    assert fixed.encoders == ("resnet18",)


def test_real_trainings(tmp_path):
    chips = toy_chips(tmp_path / "chips.zarr")
    config = toy_config(fit={"epochs": 1, "steps_per_epoch": 1})
    result = tune(
        config,
        lambda _: chips,
        tmp_path / "study",
        trials=2,
        space=SearchSpace(encoders=("resnet18",), batch_sizes=(4,)),
    )
    assert [t.state for t in result.trials] == ["complete", "complete"]
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rate": (1e-2, 1e-3)}, "not a range"),
        ({"encoders": ()}, "encoders: give at least one"),
        ({"chip_sizes": (20,)}, "not a multiple of the network's stride 8"),
    ],
)
def test_mistakes(trained, tmp_path, space, message):
    with pytest.raises(InputError, match=message):
        tune(CONFIG, size_of, tmp_path, trials=1, space=SearchSpace(**space))
    assert not trained


def test_names_the_missing_package(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r"pip install 's2seg\[tune\]'"):
        tune(CONFIG, size_of, tmp_path, trials=1)
