import csv
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from s2seg.assess.scores import Scores
from s2seg.errors import InputError, OutputError, S2SegWarning
from s2seg.training import checkpoints, logs
from s2seg.training import fit as fitting
from s2seg.training.checkpoints import load_checkpoint
from s2seg.training.fit import fit
from s2seg.training.spec import build_spec
from tests.training.toy import toy_chips, toy_config

# each with something that a restart could forget
HARD = {
    "one cycle, frozen, accumulated": {
        "optimizer": {"freeze_encoder": 1, "encoder_learning_rate": 1e-3},
        "fit": {"accumulate": 3},
        "network": {"arguments": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}},
    },
    "plateau, sgd, dropout": {
        "schedule": "plateau",
        "optimizer": {"name": "sgd", "learning_rate": 1e-2},
        "fit": {"sampling": "uniform", "precision": "bfloat16"},
        "network": {"architecture": "PSPNet", "arguments": {"encoder_depth": 3, "psp_dropout": 0.5}},
        "augment": {"noise": 0.01, "cutmix": 0.5},
    },
    "cosine, weighted, averaged, last kept": {
        "schedule": "cosine",
        "class_weights": "inverse_frequency",
        "loss": "dice + cross_entropy",
        "fit": {"keep": "last", "average": 0.9},
    },
}


class KilledError(Exception):
    pass


def kill_at(epoch, step):
    def on_progress(progress):
        if (progress.epoch, progress.step, progress.row) == (epoch, step, None):
            raise KilledError

    return on_progress


def state(folder):
    return load_checkpoint(folder / "checkpoints" / "last.ckpt")


def same(a, b) -> bool:
    """Whether two trees of tensors and plain values are equal to the bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@pytest.fixture(scope="module")
def chips(tmp_path_factory):
    return toy_chips(tmp_path_factory.mktemp("toy") / "chips.zarr")


@pytest.fixture(scope="module")
def whole(chips, tmp_path_factory):
    """A training without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, fit(toy_config(fit={"epochs": 3}), chips, folder)


def test_learns_and_tells(whole):
    folder, result = whole
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    assert [row["step"] for row in result.history] == [4, 8, 12]
    assert result.history[-1]["val_loss"] < result.history[0]["val_loss"]
    assert result.history[result.best_epoch - 1]["val_mean_iou"] == max(r["val_mean_iou"] for r in result.history)
    assert result.spec.metrics["val_mean_iou"] == result.history[result.best_epoch - 1]["val_mean_iou"]
    assert result.spec.provenance["items"] == ["item"]
    assert not result.network.training
    with (folder / "logs" / "history.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["val_loss"]) for row in rows] == [row["val_loss"] for row in result.history]


@pytest.mark.parametrize("name", HARD)
def test_a_resumed_training_is_the_same_to_the_bit(chips, tmp_path, name):
    config = toy_config(**HARD[name])
    expected = fit(config, chips, tmp_path / "whole")
    for epoch in (2, 3):
        with pytest.raises(KilledError):
            fit(config, chips, tmp_path / "cut", resume=epoch > 2, on_progress=kill_at(epoch, 3))
    result = fit(config, chips, tmp_path / "cut", resume=True)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "plateau", "global_step"):
        assert same(*(state(tmp_path / f).get(part) for f in ("whole", "cut"))), part
    assert same(expected.network.state_dict(), result.network.state_dict())
    for row, other in zip(expected.history, result.history, strict=True):
        assert {k: row[k] for k in list(row)[:7]} == {k: other[k] for k in list(row)[:7]}


def test_survives_kill_9(chips, whole, tmp_path):
    code = (
        "import sys, time; from s2seg.training.fit import fit; from s2seg.training.chips import open_chips;"
        "from tests.training.toy import toy_config\n"
        "def stop(p):\n    if (p.epoch, p.step) == (2, 2): print('now', flush=True); time.sleep(60)\n"
        "fit(toy_config(fit={'epochs': 3}), open_chips(sys.argv[1]), sys.argv[2], on_progress=stop)"
    )
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", code, str(chips.path), str(tmp_path)]
    # a cluster in an earlier test leaves OMP_NUM_THREADS=1 behind, and then sums would round differently
    environ = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(torch.get_num_threads()))
    with subprocess.Popen(command, cwd=root, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "now\n"
        os.kill(process.pid, signal.SIGKILL)
    result = fit(toy_config(fit={"epochs": 3}), chips, tmp_path, resume=True)
    assert same(result.network.state_dict(), whole[1].network.state_dict())
    assert same(state(tmp_path)["optimizer_states"], state(whole[0])["optimizer_states"])


def test_resume_when_all_is_done_trains_no_more(chips, whole):
    folder, expected = whole
    before = (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns
    result = fit(toy_config(fit={"epochs": 3}), chips, folder, resume=True)
    assert (folder / "checkpoints" / "last.ckpt").stat().st_mtime_ns == before
    assert (result.best_epoch, result.history) == (expected.best_epoch, expected.history)


def test_resume_refuses_another_configuration(chips, whole):
    with pytest.raises(InputError, match="another configuration"):
        fit(toy_config(fit={"epochs": 4}), chips, whole[0], resume=True)


@pytest.mark.parametrize("content", [b"", b"junk", b"PK\x03\x04", b"\x80\x02}q\x00."])
def test_a_damaged_checkpoint_is_one_line(chips, tmp_path, content):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(content)
    with pytest.raises(InputError, match=r"last.ckpt is damaged, or no checkpoint.* --overwrite"):
        fit(toy_config(), chips, tmp_path, resume=True)


def test_resume_without_a_checkpoint_says_so(chips, tmp_path):
    config = toy_config(fit={"epochs": 1, "steps_per_epoch": 1})
    chance = torch.get_rng_state()
    with pytest.warns(S2SegWarning, match="starts anew"):
        assert len(fit(config, chips, tmp_path, resume=True).history) == 1
    assert torch.equal(torch.get_rng_state(), chance)
    assert not torch.are_deterministic_algorithms_enabled()


def test_gives_up_when_nothing_gets_better(chips, tmp_path, monkeypatch):
    monkeypatch.setattr(Scores, "mean_iou", 0.5)
    config = toy_config(fit={"epochs": 9, "steps_per_epoch": 1, "patience": 2})
    first = fit(config, chips, tmp_path)
    assert (first.best_epoch, len(first.history)) == (1, 3)
    assert len(fit(config, chips, tmp_path, resume=True).history) == 3


@pytest.mark.parametrize(("keep", "epoch", "name"), [("best", 1, "best.ckpt"), ("last", 2, "last.ckpt")])
def test_the_epoch_that_is_asked_for_is_kept(chips, tmp_path, monkeypatch, keep, epoch, name):
    scores = iter((0.7, 0.5))
    monkeypatch.setattr(Scores, "mean_iou", property(lambda _: next(scores)))
    result = fit(toy_config(fit={"epochs": 2, "keep": keep}), chips, tmp_path)
    assert (result.best_epoch, result.kept_epoch) == (1, epoch)
    assert (result.spec.provenance["best_epoch"], result.spec.provenance["kept_epoch"]) == (1, epoch)
    assert result.spec.metrics["val_loss"] == result.history[epoch - 1]["val_loss"]
    weights = load_checkpoint(tmp_path / "checkpoints" / name)["state_dict"]
    assert same({f"network.{k}": v for k, v in result.network.state_dict().items()}, weights)


def test_a_full_disk_leaves_the_last_good_checkpoint(chips, tmp_path, monkeypatch):
    config = toy_config()
    save = torch.save
    written = []

    def full(content, file):
        written.append(file)
        if len(written) > 2:  # best and last of the first epoch are through
            with Path("/dev/full").open("wb") as nowhere:
                save(content, nowhere)
        save(content, file)

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(OutputError, match=r"\.ckpt: No space left on device; free some space .*--resume"):
        fit(config, chips, tmp_path)
    monkeypatch.undo()
    assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    assert len(state(tmp_path)["callbacks"]["s2seg_history"]["history"]) == 1
    assert len(fit(config, chips, tmp_path, resume=True).history) == 3


def test_the_optimizer_steps_once_for_several_batches(chips, tmp_path):
    config = toy_config(fit={"accumulate": 3, "epochs": 2})
    result = fit(config, chips, tmp_path)
    assert [row["step"] for row in result.history] == [2, 4]  # four batches: three and a rest
    assert state(tmp_path)["lr_schedulers"][0]["total_steps"] == 4
    assert result.history[-1]["learning_rate"] < 1e-6  # the cycle has come to its end


def test_the_average_of_the_weights_is_what_is_validated_and_kept(chips, tmp_path):
    slow = {"epochs": 2, "steps_per_epoch": 2, "accumulate": 2}  # one step in each epoch
    plain = toy_config(schedule="none", fit={**slow, "epochs": 1})
    fit(plain, chips, tmp_path / "plain")
    first = state(tmp_path / "plain")["state_dict"]
    result = fit(toy_config(schedule="none", fit={**slow, "average": 0.75}), chips, tmp_path)
    last, best = (load_checkpoint(tmp_path / "checkpoints" / name)["state_dict"] for name in ("last.ckpt", "best.ckpt"))
    for name, kept in result.network.state_dict().items():
        assert torch.equal(kept, best[f"_average.module.{name}"])
        if kept.is_floating_point():
            expected = 0.75 * first[f"network.{name}"] + 0.25 * last[f"network.{name}"]
            torch.testing.assert_close(last[f"_average.module.{name}"], expected)
    held = fit(toy_config(schedule="none", fit={**slow, "average": 1 - 1e-9}), chips, tmp_path / "held").history
    assert held[1]["val_loss"] == pytest.approx(held[0]["val_loss"], rel=1e-6)


def test_a_frozen_encoder_stays_as_it_is(chips, tmp_path):
    config = toy_config(optimizer={"freeze_encoder": 2}, fit={"epochs": 2})
    result = fit(config, chips, tmp_path)
    torch.manual_seed(config.fit.seed)
    fresh = fitting.build_network(build_spec(config, chips)).state_dict()
    moved = {name for name, tensor in result.network.state_dict().items() if not torch.equal(tensor, fresh[name])}
    assert moved
    assert not [name for name in moved if name.startswith("encoder.")]


def test_a_network_that_pools_globally_is_bound_to_the_chips_size(chips):
    local = build_spec(toy_config(), chips)
    assert (local.stride, local.depth, local.window, local.global_context) == (8, 24, None, False)
    squeezed = {"encoder": "se_resnet50", "arguments": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}}
    bound = build_spec(toy_config(network=squeezed), chips)
    assert (bound.window, bound.depth, bound.global_context) == (32, 8, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fit": {"accelerator": "gpu", "devices": 64}}, "64 GPUs are asked for"),
        ({"fit": {"accelerator": "cpu", "precision": "float16"}}, "float16 needs a GPU"),
        ({"fit": {"devices": 3}}, "cannot be shared evenly by 3"),
        ({"logs": ["csv", "wandb"]}, r"wandb is not installed: pip install 's2seg\[wandb\]'"),
        ({"bands": ["nir", "red"]}, "other bands or another legend"),
        ({"optimizer": {"name": "sgd", "learning_rate": 1e30}, "schedule": "none"}, "lower optimizer.learning_rate"),
    ],
)
def test_mistakes(chips, tmp_path, monkeypatch, changes, message):
    real = logs.importlib.util.find_spec
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    with pytest.raises(InputError, match=message):
        fit(toy_config(**changes), chips, tmp_path)
    assert not list(tmp_path.rglob("*.ckpt"))
