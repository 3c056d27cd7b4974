"""Two processes train one network: as one process does with the same batches."""

import os
from collections import Counter

import numpy as np
import pytest
import torch

from s2seg.errors import InputError
from s2seg.training.checkpoints import load_checkpoint
from s2seg.training.chips import ChipSpec, ChipStore, write_chips
from s2seg.training.fit import fit
from s2seg.training.sampling import EpochPlan
from tests.training.conftest import make_area
from tests.training.toy import LEGEND, toy_config

BATCH, STEPS, EPOCHS = 4, 3, 3
CONFIG = {
    # without batch norm, whose statistics are those of a process's own share
    "network": {
        "encoder": "vgg11",
        "arguments": {"encoder_depth": 2, "decoder_channels": [8, 8], "decoder_use_norm": False},
    },
    "optimizer": {"name": "sgd", "learning_rate": 1e-2, "freeze_encoder": 2},
    "fit": {
        "epochs": EPOCHS,
        "steps_per_epoch": STEPS,
        "batch_size": BATCH,
        "sampling": "uniform",
        "accumulate": 2,
        "precision": "float32",
        "average": 0.9,
    },
    "augment": {"flips": False, "scale": None, "gain": 0, "offset": 0},
    "logs": ["csv", "tensorboard"],
}


class Watched(ChipStore):
    """Notes in a file of each process which chips it reads."""

    def __reduce__(self):
        return Watched, (self.path,)

    def images(self, indices):
        with (self.path.parent / f"rank{os.environ.get('LOCAL_RANK')}").open("a") as file:
            print(*indices, file=file)
        return super().images(indices)


@pytest.fixture(scope="module")
def chips(tmp_path_factory):
    """Chips whose every pixel has a label: then a mean over shares is the mean over the whole."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 3, (24, 12)).repeat(8, 0).repeat(8, 1)
    image = (1000 + 1500 * patches + rng.normal(0, 200, (2, *patches.shape))).clip(1).astype(np.uint16)
    split = np.where(np.arange(192)[:, None] < 128, 1, 2) * np.ones((1, 96), int)
    labels = np.array(LEGEND.codes, np.uint8)[patches]
    area = make_area(chunk=96, image=image, labels=labels, split=split.astype(np.uint8))
    path = tmp_path_factory.mktemp("watched") / "chips.zarr"
    write_chips([area], path, LEGEND, ChipSpec(32, 32), fingerprint="toy", bands=("red", "nir"))
    return Watched(path)


def test_two_processes_go_on_as_one(chips, tmp_path):
    config = toy_config(**CONFIG)
    expected = fit(config, chips, tmp_path / "one")
    with pytest.raises(KeyboardInterrupt):
        fit(config, chips, tmp_path / "two", on_progress=_stop_in_the_second_epoch)
    told = []
    two = toy_config(**CONFIG | {"fit": CONFIG["fit"] | {"devices": 2}})
    result = fit(two, chips, tmp_path / "two", resume=True, on_progress=told.append)

    assert [(p.epoch, p.step, p.row is None) for p in told] == [
        (epoch, min(step, STEPS), step <= STEPS) for epoch in (2, 3) for step in range(1, STEPS + 2)
    ]
    for rank in (0, 1):
        assert _read_by(chips, rank) == _share(chips, rank)
    weights, others = (load_checkpoint(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("one", "two"))
    assert weights["global_step"] == others["global_step"] == EPOCHS * 2  # of three batches: two and a rest
    torch.testing.assert_close(others["state_dict"], weights["state_dict"], atol=1e-6, rtol=1e-5)
    for row, other in zip(expected.history, result.history, strict=True):
        scores = ("epoch", "step", "train_loss", "val_loss", "val_mean_iou", "val_accuracy", "learning_rate")
        np.testing.assert_allclose([other[k] for k in scores], [row[k] for k in scores], rtol=1e-5)
    logs = Counter(path.name.split(".")[0] for path in (tmp_path / "two" / "logs").rglob("*") if path.is_file())
    assert (logs["history"], logs["events"]) == (1, 2)  # two runs, each of which wrote once


def _stop_in_the_second_epoch(progress):
    if progress.epoch == 2:
        raise KeyboardInterrupt


def _share(chips, rank):
    """Half of every batch of the last two epochs, and of the validation after them."""
    train, validation = chips.indices("train"), chips.indices("validation")
    plan = EpochPlan(len(train), BATCH, STEPS)
    mine = validation[rank::2].tolist()
    halves = [mine[i : i + BATCH // 2] for i in range(0, len(mine), BATCH // 2)]
    return [chips for e in (1, 2) for chips in (*(train[b][rank::2].tolist() for b in plan.batches(e)), *halves)]


def _read_by(chips, rank):
    lines = (chips.path.parent / f"rank{rank}").read_text().splitlines()
    return [[int(chip) for chip in line.split()] for line in lines]


def test_every_process_needs_a_validation_chip(chips, tmp_path):
    few = toy_config(**CONFIG | {"fit": {"devices": 16, "batch_size": 16}})
    with pytest.raises(InputError, match="validation chips are too few for 16 devices"):
        fit(few, chips, tmp_path)
