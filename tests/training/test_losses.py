import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from s2seg.errors import InputError
from s2seg.training.loss_names import LOSSES, parse_loss
from s2seg.training.losses import build_loss

CLASSES, IGNORE = 4, 255
WEIGHTS = np.array([1.0, 0.5, 3.0, 2.0])


def example(seed=0, n=2, size=8):
    """Logits and a target with holes, in which class 3 does not occur."""
    rng = np.random.default_rng(seed)
    target = rng.integers(0, CLASSES - 1, (n, size, size))
    target[rng.random(target.shape) < 0.2] = IGNORE
    return rng.normal(0, 2, (n, CLASSES, size, size)), target


def oracle(name, logits, target, weights):
    """The published formulas, pixel by pixel or class by class, in float64."""
    labelled = target != IGNORE
    logp = log_softmax(logits, axis=1).transpose(0, 2, 3, 1)[labelled]
    p, t = np.exp(logp), target[labelled]
    if name in ("cross_entropy", "focal"):
        true = logp[np.arange(len(t)), t]
        values = -true * ((1 - np.exp(true)) ** 2 if name == "focal" else 1)
        return np.average(values, weights=weights[t])
    present = np.unique(t)
    by_class = {
        "dice": lambda c: 1 - tversky(p[:, c], t == c, 0.5, 0.5),
        "tversky": lambda c: 1 - tversky(p[:, c], t == c, 0.3, 0.7),
        "focal_tversky": lambda c: (1 - tversky(p[:, c], t == c, 0.3, 0.7)) ** 0.75,
        "lovasz": lambda c: lovasz(np.abs((t == c) - p[:, c]), t == c),
    }[name]
    return np.average([by_class(c) for c in present], weights=weights[present])


def tversky(p, true, alpha, beta):
    hits = p[true].sum()
    return hits / (hits + alpha * p[~true].sum() + beta * (1 - p[true]).sum())


def lovasz(errors, true):
    """Errors, worst first, times what the Jaccard loss rises by when one more pixel is wrong."""
    total, last, wrong = 0.0, 0.0, np.zeros(len(true), bool)
    for i in np.argsort(-errors, kind="stable"):
        wrong[i] = True
        jaccard = 1 - (true & ~wrong).sum() / (true | wrong).sum()
        total, last = total + errors[i] * (jaccard - last), jaccard
    return total


def call(text, logits, target, weights=None):
    x = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    w = None if weights is None else torch.tensor(weights)
    loss = build_loss(text, logits.shape[1], w, IGNORE)(x, torch.tensor(target))
    loss.backward()
    return loss.item(), x.grad.numpy()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_its_formula_and_blind_to_pixels_without_a_label(name):
    logits, target = example()
    for weights in (None, WEIGHTS):
        value, slope = call(name, logits, target, weights)
        assert value == pytest.approx(oracle(name, logits, target, np.ones(CLASSES) if weights is None else weights))
        assert np.isfinite(slope).all() and slope.any()
    hole = np.broadcast_to((target == IGNORE)[:, None], logits.shape)
    assert (slope[hole] == 0).all()
    again, slope_again = call(name, np.where(hole, 50 - logits, logits), target, WEIGHTS)
    assert again == value
    np.testing.assert_array_equal(slope_again, slope)


@pytest.mark.parametrize("name", LOSSES)
def test_the_ends_of_a_loss(name):
    logits, target = example()
    right = np.where(np.arange(CLASSES)[:, None, None] == target[:, None], 30.0, -30.0)
    perfect, slope = call(name, right, target)
    assert perfect == pytest.approx(0, abs=1e-5) and np.isfinite(slope).all()
    wrong, slope = call(name, np.roll(right, 1, axis=1), target)
    assert wrong > 0.9 and np.isfinite(slope).all()
    nothing, slope = call(name, logits, np.full_like(target, IGNORE))
    assert nothing == 0 and (slope == 0).all()
    # the labelled classes have no weight: nothing to learn, and no division by zero
    nothing, slope = call(name, logits, target, np.array([0.0, 0, 0, 1]))
    assert nothing == 0 and (slope == 0).all()


def test_a_sum_adds_up_and_half_precision_goes_in():
    logits, target = example()
    parts = {name: call(name, logits, target, WEIGHTS)[0] for name in ("focal_tversky", "cross_entropy")}
    mixed, _ = call("0.6*focal_tversky + 0.4*cross_entropy", logits, target, WEIGHTS)
    assert mixed == pytest.approx(0.6 * parts["focal_tversky"] + 0.4 * parts["cross_entropy"])
    loss = build_loss("dice + lovasz", CLASSES, None, IGNORE)
    value = loss(torch.tensor(logits).bfloat16(), torch.tensor(target))
    assert value.dtype == torch.float32 and not loss.state_dict()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dice", ((1.0, "dice"),)),
        ("0.6*focal_tversky + 0.4 * cross_entropy", ((0.6, "focal_tversky"), (0.4, "cross_entropy"))),
        ("1e+1*dice+lovasz", ((10.0, "dice"), (1.0, "lovasz"))),
        ("focal_tverski", "did you mean focal_tversky or tversky"),
        ("quux", "There are cross_entropy, dice"),
        ("", "such as 0.6"),
        ("dice +", "'' is not understood"),
        ("dice * 2", "'dice \\* 2' is not understood"),
        ("1.2.3*dice", "'1.2.3' is not a number"),
        ("0*dice", "factor 0 is not a positive"),
        ("dice + 2*dice", "dice is given twice"),
    ],
)
def test_the_text_of_a_loss(text, expected):
    if isinstance(expected, tuple):
        assert parse_loss(text) == expected
        return
    with pytest.raises(InputError, match=expected):
        parse_loss(text)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [1.0, -1, 1, 1], [0.0, 0, 0, 0], [1.0, float("nan"), 1, 1]])
def test_class_weights_that_make_no_sense(weights):
    with pytest.raises(InputError, match="class weights"):
        build_loss("dice", CLASSES, torch.tensor(weights), IGNORE)
