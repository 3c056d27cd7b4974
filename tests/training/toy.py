"""A training that takes a second: three classes that their colours tell apart, and a shallow network."""

import functools

import numpy as np

from s2seg.legend import LandClass, Legend
from s2seg.training.chips import ChipSpec, ChipStore, write_chips
from s2seg.training.config import TrainConfig
from tests.training.conftest import make_area

LEGEND = Legend(
    "toy", (LandClass(0, "dark", "#101010"), LandClass(40, "middle", "#808080"), LandClass(7, "bright", "#f0f0f0")), 255
)


def toy_config(**changes) -> TrainConfig:
    """A configuration whose sections are changed as in ``fit={"epochs": 5}``."""
    values = {
        "name": "toy",
        "legend": LEGEND,
        "bands": ["red", "nir"],
        "areas": [{"name": "here", "catalog": "earth-search", "datetime": "2020", "labels": {"raster": "labels.tif"}}],
        "chips": {"size": 32, "stride": 16},
        "network": {"arguments": {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}},
        "optimizer": {"learning_rate": 3e-3},
        "fit": {"epochs": 3, "steps_per_epoch": 4, "batch_size": 4, "accelerator": "cpu"},
        "logs": ["csv"],
    }
    for section, change in changes.items():
        values[section] = {**values.get(section, {}), **change} if isinstance(change, dict) else change
    return TrainConfig.model_validate(values, context={"folder": None})


@functools.cache
def _scene():
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 3, (12, 12)).repeat(8, 0).repeat(8, 1)
    image = (1000 + 1500 * patches + rng.normal(0, 200, (2, 96, 96))).clip(1).astype(np.uint16)
    image[:, :4, :8] = 0  # a corner without data
    labels = np.array(LEGEND.codes, np.uint8)[patches]
    labels[40:44] = LEGEND.nodata
    split = np.ones((96, 96), np.uint8)
    split[:, 64:] = 2
    return image, labels, split


def toy_chips(path, spec=ChipSpec(32, 16)) -> ChipStore:  # noqa: B008  frozen
    """The toy area's chips, with both parts."""
    image, labels, split = _scene()
    area = make_area(chunk=48, image=image, labels=labels, split=split)
    return write_chips([area], path, LEGEND, spec, fingerprint="toy", bands=("red", "nir"))
