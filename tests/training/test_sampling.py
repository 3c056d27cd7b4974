"""Weights of classes and chips against hand-made numbers; epochs that repeat exactly."""

import numpy as np
import pytest

from s2seg.errors import InputError
from s2seg.training.sampling import CLASS_WEIGHTS, DatePlan, EpochPlan, chip_weights, class_weights

# three classes and one that is absent: 600, 300 and 100 pixels, in 3, 1 and 2 chips
HISTOGRAM = np.array([[300, 0, 50, 0], [200, 300, 50, 0], [100, 0, 0, 0]])


@pytest.mark.parametrize(
    ("kind", "ratios"),
    [
        ("none", [1, 1, 1]),
        ("inverse_frequency", [1 / 600, 1 / 300, 1 / 100]),
        ("inverse_samples", [1 / 3, 1, 1 / 2]),
        ("effective_number", [1 / (1 - 0.999**n) for n in (600, 300, 100)]),  # beta = 999 / 1000
    ],
)
def test_class_weights(kind, ratios):
    weights = class_weights(kind, HISTOGRAM)
    assert weights.dtype == np.float32
    np.testing.assert_allclose(weights[:3], np.array(ratios) / np.mean(ratios), rtol=1e-5)
    assert weights[3] == 1


def test_class_weights_without_labels_or_beta():
    for kind in CLASS_WEIGHTS:
        assert (class_weights(kind, np.zeros((2, 3), int)) == 1).all()
    np.testing.assert_allclose(class_weights("effective_number", HISTOGRAM, beta=0.0), 1)
    # a small beta forgets the frequencies, one near 1 restores them
    steep, flat = (class_weights("effective_number", HISTOGRAM, beta=b) for b in (0.999999, 0.9))
    np.testing.assert_allclose(steep[:3], class_weights("inverse_frequency", HISTOGRAM)[:3], rtol=1e-3)
    np.testing.assert_allclose(flat, 1, rtol=1e-4)


@pytest.mark.parametrize(("kind", "beta", "says"), [("inverse", None, "effective_number"), ("none", 1.0, "below 1")])
def test_class_weights_refuse(kind, beta, says):
    with pytest.raises(InputError, match=says):
        class_weights(kind, HISTOGRAM, beta)


def test_chip_weights_balance_classes():
    weights = chip_weights(HISTOGRAM)
    np.testing.assert_allclose(weights, [1 / 3, 11 / 18, 1 / 18])  # (1/2 + 0 + 1/2) / 3, ...
    assert (chip_weights(np.zeros((4, 2), int)) == 0.25).all()


def test_one_chip_cannot_fill_the_epoch():
    histogram = np.full((1000, 2), [100, 0])
    histogram[7] = [97, 3]
    weights = chip_weights(histogram)
    assert weights.sum() == pytest.approx(1)
    assert weights[7] / weights[0] == pytest.approx(20 * 2, rel=0.05)  # others share half of all draws


def test_uniform_epochs_show_every_chip_once_before_any_again():
    plan = EpochPlan(10, 4, seed=3)
    first = plan.batches(0)
    assert len(plan) == len(first) == 2
    assert len(set(np.concatenate(first))) == 8
    longer = np.concatenate(EpochPlan(10, 4, steps=5, seed=3).batches(0))
    assert (np.bincount(longer, minlength=10) == 2).all()
    assert EpochPlan(3, 4).batches(0)[0].shape == (4,)  # fewer chips than a batch: it is full anyway


@pytest.mark.parametrize("weights", [None, np.array([0.7, 0.1, 0.1, 0.1, 0.0])])
def test_epochs_are_a_function_of_seed_and_epoch(weights):
    def drawn(seed, epoch):
        return np.concatenate(EpochPlan(5, 2, steps=40, seed=seed, weights=weights).batches(epoch)).tolist()

    assert drawn(1, 4) == drawn(1, 4)
    assert len({tuple(drawn(s, e)) for s, e in ((1, 4), (1, 5), (2, 4), (4, 1))}) == 4
    if weights is not None:
        counts = np.bincount(drawn(1, 4), minlength=5)
        assert counts[4] == 0
        assert counts[0] > 40


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"n": 0, "batch_size": 2}, "chips is 0"),
        ({"n": 3, "batch_size": 0}, "batch_size is 0"),
        ({"n": 3, "batch_size": 2, "weights": np.ones(2)}, "3 chips but 2"),
    ],
)
def test_plans_refuse(arguments, says):
    with pytest.raises(InputError, match=says):
        EpochPlan(**arguments)


def test_rectangles_come_from_other_dates_of_the_same_place():
    places = np.array([[0, 32, 5, 5], [1, 32, 5, 5], [0, 32, 5, 5], [0, 32, 5, 9], [0, 64, 5, 5], [0, 32, 5, 5]])
    same = {0: {2, 5}, 2: {0, 5}, 5: {0, 2}}
    plan = DatePlan(places, 0.5, seed=3)
    batches = [np.tile(np.arange(6), 50)] * 2
    first, second = plan.draw(4, batches)
    assert plan.mixes and not DatePlan(places[1:4], 1.0).mixes
    np.testing.assert_array_equal(first.chips, batches[0])
    found = {chip: set(first.others[(first.chips == chip) & (first.others != chip)].tolist()) for chip in range(6)}
    assert found == {chip: same.get(chip, set()) for chip in range(6)}
    mixed = (first.others != first.chips)[np.isin(first.chips, list(same))].mean()
    assert 0.35 < mixed < 0.65
    assert first.squares.min() >= 0 and first.squares.max() < 1
    assert abs((first.squares[:, 2] ** 2).mean() - 0.5) < 0.06, "areas are uniform"

    def values(mixes):
        return [array.tolist() for mix in mixes for array in (mix.chips, mix.others, mix.squares)]

    assert values([first, second]) == values(DatePlan(places, 0.5, seed=3).draw(4, batches))
    assert values([first]) != values([second]) != values(plan.draw(5, batches)[:1])
    shares = [first.among(np.arange(10, 16)).share(rank, 2) for rank in (0, 1)]
    np.testing.assert_array_equal(np.stack([s.others for s in shares], 1).ravel(), first.others + 10)
