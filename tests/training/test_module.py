from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from s2seg.assess.confusion import confusion
from s2seg.assess.scores import Scores
from s2seg.models import ModelSpec, build_network
from s2seg.training.augment import Augment, AugmentSpec
from s2seg.training.data import Feed
from s2seg.training.losses import build_loss
from s2seg.training.module import Descent, SegmentationModule
from tests.models.conftest import network_input
from tests.training.toy import LEGEND

SPEC = ModelSpec(
    name="toy",
    bands=("red", "nir"),
    legend=LEGEND,
    mean=(0.2, 0.3),
    std=(0.1, 0.05),
    architecture={"name": "Unet", "encoder": "resnet18", "encoder_depth": 3, "decoder_channels": [16, 8, 8]},
    stride=8,
    depth=16,
)


def make(descent=None, **options) -> SegmentationModule:
    torch.manual_seed(0)
    loss = build_loss("cross_entropy", len(LEGEND), None, 255)
    return SegmentationModule(build_network(SPEC), SPEC, loss, descent or Descent(steps=4), **options)


def chips(n=5, side=32):
    rng = np.random.default_rng(1)
    images = rng.integers(1, 6000, (n, 2, side, side)).astype(np.uint16)
    labels = rng.choice(np.array([*LEGEND.codes, LEGEND.nodata], np.uint8), (n, side, side))
    images[0, :, :5] = 0
    return images, labels


def batch_of(images, labels):
    return torch.from_numpy(images), torch.from_numpy(labels)


def test_the_input_is_that_of_mapping():
    module = make().eval()
    images, _ = chips()
    with torch.no_grad():
        expected = module.network(network_input(SPEC, images))
        torch.testing.assert_close(module(torch.from_numpy(images)), expected, atol=1e-4, rtol=1e-4)


def test_validation_is_one_matrix_over_all_pixels():
    module = make().eval()
    images, labels = chips()
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    store = SimpleNamespace(read=lambda indices: (images[indices], labels[indices]))
    feed = Feed(store, lambda _: [np.array([0, 1]), np.array([2]), np.array([3, 4])], lambda: 0)
    with pytest.warns(FutureWarning, match="LeafSpec"):  # fit() silences it
        (logged,) = trainer.validate(module, feed, verbose=False)
    with torch.no_grad():
        predicted = np.array(LEGEND.codes, np.uint8)[module(torch.from_numpy(images)).argmax(1).numpy()]
    truth = np.where((images == 0).any(1), LEGEND.nodata, labels)
    expected = Scores(confusion(truth, predicted, LEGEND))
    assert (module.scores.confusion.matrix == expected.confusion.matrix).all()
    assert logged["val_mean_iou"] == pytest.approx(expected.mean_iou)
    assert logged["val_accuracy"] == pytest.approx(expected.overall_accuracy)
    known = batch_of(images, truth)
    target = module._channels[known[1].long()]
    with torch.no_grad():
        assert logged["val_loss"] == pytest.approx(float(module.loss(module(known[0]), target)), rel=1e-5)


def test_augmentation_depends_on_seed_and_batch_only():
    augment = Augment(AugmentSpec(noise=0.02), SPEC.bands)
    batch = batch_of(*chips())

    def varied(seed, index):
        return make(augment=augment, seed=seed)._varied(augment, batch, index)[0]

    first = varied(1, 0)
    torch.rand(7)
    assert torch.equal(first, varied(1, 0))
    assert not torch.equal(first, varied(1, 1))
    assert not torch.equal(first, varied(2, 0))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("none", [1e-2] * 4),
        ("cosine", [1e-2 * (1 + np.cos(np.pi * k / 4)) / 2 for k in range(4)]),
        ("one_cycle", None),
    ],
)
def test_rates(schedule, rates):
    module = make(Descent(steps=4, learning_rate=1e-2, encoder_learning_rate=1e-3, schedule=schedule))
    made = module.configure_optimizers()
    optimizer = made if schedule == "none" else made["optimizer"]
    seen = []
    for _ in range(4):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        if schedule != "none":
            made["lr_scheduler"]["scheduler"].step()
    encoder, rest = np.array(seen).T
    np.testing.assert_allclose(encoder, rest / 10)
    if rates is None:
        assert rest.argmax() in (1, 2)
        assert rest[-1] < 1e-5 < rest[0] < 1e-2
    else:
        np.testing.assert_allclose(rest, rates)


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_every_weight_has_one_optimizer_group(name):
    module = make(replace(Descent(steps=4, schedule="none"), optimizer=name))
    groups = module.configure_optimizers().param_groups
    ours = [id(p) for group in groups for p in group["params"]]
    assert sorted(ours) == sorted(id(p) for p in module.network.parameters())
    assert len(groups[0]["params"]) == len(list(module.network.encoder.parameters()))
