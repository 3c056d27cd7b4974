"""Weights & Biases and MLflow are not installed for tests: stand-ins behave as they do."""

import sys
from types import SimpleNamespace

import pytest
from pytorch_lightning.loggers import Logger

from s2seg.errors import InputError
from s2seg.training import logs
from s2seg.training.fit import fit
from tests.training.toy import toy_chips, toy_config


class Refused(Exception):  # noqa: N818  its name is the package's business
    pass


class OtherRefused(Exception):  # noqa: N818
    pass


class StandIn(Logger):
    """A log whose runs are numbered, from 1."""

    made: list["StandIn"]

    def __init__(self, **asked):
        super().__init__()
        self.asked, self.settings, self.rows = asked, [], []
        self.made.append(self)
        self.run = asked.get("id") or asked.get("run_id") or f"run {len(self.made)}"

    @property
    def name(self):
        return "stand-in"

    @property
    def version(self):
        return self.run

    @property
    def experiment(self):
        if "nowhere" in str(self.asked.get("tracking_uri")):
            raise OtherRefused("no server\nat nowhere")
        return None

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, params, *_, **__):
        self.settings.append(params)


@pytest.fixture
def made(monkeypatch):
    StandIn.made, finished = [], []
    package = SimpleNamespace(Error=Refused, finish=lambda exit_code: finished.append(exit_code))
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.setitem(sys.modules, "mlflow.exceptions", SimpleNamespace(MlflowException=OtherRefused))
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(logs, "WandbLogger", StandIn)
    monkeypatch.setattr(logs, "MLFlowLogger", StandIn)
    for name in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)
    return StandIn.made, finished


def test_a_resumed_training_goes_on_in_its_runs(made, tmp_path):
    loggers, finished = made
    chips = toy_chips(tmp_path / "chips.zarr")
    config = toy_config(fit={"epochs": 2, "steps_per_epoch": 2}, logs=["wandb", "mlflow"])

    def stop(progress):
        if progress.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(config, chips, tmp_path / "m", on_progress=stop)
    fit(config, chips, tmp_path / "m", resume=True)
    wandb, mlflow, *again = loggers
    assert (wandb.asked["project"], wandb.asked["name"], wandb.asked["id"]) == ("s2seg", "toy", None)
    assert mlflow.asked["tracking_uri"] == f"sqlite:///{tmp_path}/m/logs/mlflow.db"
    assert [again[0].asked["id"], again[1].asked["run_id"]] == ["run 1", "run 2"]
    assert mlflow.settings[0]["optimizer"]["learning_rate"] == config.optimizer.learning_rate
    assert not again[1].settings  # said once
    scores = [(step, row["val_mean_iou"]) for step, row in again[1].rows if "val_mean_iou" in row]
    assert [step for step, _ in scores] == [3]
    assert finished == [1, 0]  # a run that stays open would swallow the next training


def test_a_log_that_refuses_is_one_line(made, monkeypatch, tmp_path):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    with (
        pytest.raises(InputError, match=r"^logs: mlflow refuses \(no server at nowhere\)"),
        logs.open_logs(toy_config(logs=["wandb", "mlflow"]), tmp_path, {}),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"^logs: wandb refuses"),
        logs.open_logs(toy_config(logs=["wandb"]), tmp_path, {}),
    ):
        raise Refused("quota")  # in mid-training
    assert made[1] == [1, 1]
