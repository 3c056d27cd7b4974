import numpy as np
import pytest
import torch

from s2seg.errors import InputError
from s2seg.training.augment import IGNORE_INDEX, Augment, AugmentSpec

BANDS = ("blue", "green", "red", "nir", "swir16", "swir22")
STRONG = {
    **{"flips": True, "scale": (0.7, 1.4), "gain": 0.1, "offset": 0.01, "noise": 0.01},
    **dict.fromkeys(("blur", "band_dropout", "haze", "clouds", "cutmix", "copy_paste"), 1.0),
}
GEOMETRIC = ("flips", "scale", "cutmix", "copy_paste")
OFF = AugmentSpec(flips=False)
FREQUENCIES = (0.5, 0.42, 0.05, 0.03)


def only(name):
    return AugmentSpec(**{"flips": False} | {name: STRONG[name]})


def chips(n=6, size=32, bands=6, dtype=torch.uint16):
    """Smooth reflectance, four classes, a hole in all bands and a hole in one."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    images = 800 + 400 * np.arange(1, bands + 1)[:, None, None] * (1 + np.sin(5 * x + 3 * y))
    images = np.stack([images * g for g in rng.uniform(0.8, 1.2, n)]).astype("uint16")
    images[:, :, 3:9, 4:12] = 0
    images[:, 2, 20:24, 20:22] = 0
    labels = rng.choice(4, (n, size // 4, size // 4), p=FREQUENCIES).repeat(4, 1).repeat(4, 2)
    return torch.from_numpy(images).to(dtype), torch.from_numpy(labels)


def run(spec, images, labels, seed=1, bands=BANDS):
    generator = torch.Generator().manual_seed(seed)
    return Augment(spec, bands[: images.shape[1]], FREQUENCIES)(images, labels, generator)


def positions(n=6, size=32):
    """Each value names its chip and place, and so does a label that is computed from it."""
    place = 1 + torch.arange(n * size * size).reshape(n, 1, size, size)
    images = torch.cat([place, 7 * place], 1).to(torch.float32)
    return images, label_at(place[:, 0])


def label_at(place):
    """Differs from chip to chip at the same place: 7 divides no chip."""
    return place.long() // 7 % 4


@pytest.mark.parametrize("dtype", [torch.uint16, torch.float32])
def test_off_means_untouched_but_for_labels_of_nodata(dtype):
    images, labels = chips(dtype=dtype)
    kept = images.clone(), labels.clone()
    out, classes = run(OFF, images, labels)
    nodata = (images.float() == 0).any(1)
    assert out.dtype == torch.float32 and torch.equal(out, images.float())
    assert torch.equal(classes[~nodata], labels[~nodata]) and (classes[nodata] == IGNORE_INDEX).all() and nodata.any()
    out += 1
    everything = run(AugmentSpec(**STRONG), images, labels)
    assert not torch.equal(everything[0], images.float())
    assert torch.equal(images, kept[0]) and torch.equal(labels, kept[1])


@pytest.mark.parametrize("name", [*STRONG])
def test_each_switch_works_alone_repeats_and_keeps_nodata(name):
    images, labels = chips()
    out, classes = run(only(name), images, labels)
    again, classes_again = run(only(name), images, labels)
    assert torch.equal(out, again) and torch.equal(classes, classes_again)
    assert not torch.equal(run(only(name), images, labels, seed=2)[0], out)
    valid = (out != 0).all(1)
    assert (classes[~valid] == IGNORE_INDEX).all() and (classes[valid] != IGNORE_INDEX).any()
    assert out.isfinite().all() and out.min() == 0 and out[out != 0].min() >= 1 and out.max() <= 65535
    assert not torch.equal(out, images.float())
    if name not in GEOMETRIC:
        assert torch.equal(out == 0, images.float() == 0)
    if name not in (*GEOMETRIC, "clouds"):
        assert torch.equal(classes, run(OFF, images, labels)[1])


def test_everything_at_once_repeats_whatever_the_global_seed():
    images, labels = chips()
    first = run(AugmentSpec(**STRONG), images, labels)
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    second = run(AugmentSpec(**STRONG), images, labels)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("name", ["flips", "cutmix", "copy_paste"])
def test_labels_follow_their_pixels(name):
    images, labels = positions()
    out, classes = run(only(name), images, labels)
    assert torch.equal(out[:, 1], 7 * out[:, 0])
    assert torch.equal(classes, label_at(out[:, 0]))
    if name == "flips":
        # every chip is one of its own eight views, and not all are the same one
        views = [torch.rot90(images, k, (2, 3)) for k in range(4)]
        views += [v.flip(3) for v in views]
        way = [[torch.equal(v[i], out[i]) for v in views].index(True) for i in range(len(out))]
        assert len(set(way)) > 1
    elif name == "copy_paste":
        moved = out[:, 0] != images[:, 0]
        assert set(classes[moved].tolist()) == {2, 3}  # together less than a tenth


def test_chips_that_are_not_square_keep_their_shape():
    images, labels = positions()
    out, classes = run(AugmentSpec(), images[..., :20], labels[..., :20])
    assert out.shape[-2:] == (32, 20)
    assert torch.equal(classes, label_at(out[:, 0]))


@pytest.mark.parametrize(("scale", "factor"), [((2.0, 2.0), 0.5), ((0.5, 0.5), 2.0), ((1.0, 1.0), 1.0)])
def test_zoom_changes_the_size_and_labels_stay_in_place(scale, factor):
    # the image is its own x coordinate, and the label is the column's number
    column = torch.arange(64.0).expand(3, 1, 64, 64)
    images = torch.cat([column, column.transpose(2, 3)], 1) * 10 + 100
    labels = torch.arange(64).expand(3, 64, 64)
    spec = AugmentSpec(flips=False, scale=scale)
    out, classes = run(spec, images, labels)
    x = (out[:, 0] - 100) / 10
    assert (x - classes).abs().max() <= 0.5 + 1e-3
    steps = x.diff(dim=2).abs()
    assert steps.median() == pytest.approx(factor, abs=1e-3)
    mirrored = (x.diff(dim=2) < 0).any()
    assert bool(mirrored) == (factor > 1)


def test_zoom_mixes_nothing_into_the_edge_of_nodata():
    images = torch.full((4, 2, 32, 32), 1000.0)
    images[:, :, :, 16:] = 0
    images[:, 1, 8:12, :8] = 0
    out, classes = run(AugmentSpec(flips=False, scale=(0.6, 1.7)), images, torch.ones(4, 32, 32, dtype=torch.long))
    assert ((out == 0) | ((out - 1000).abs() < 0.1)).all()
    assert torch.equal(classes == IGNORE_INDEX, (out == 0).any(1))
    assert 0.2 < (out == 0).float().mean() < 0.8


def test_haze_is_bluest_and_clouds_hide_their_labels():
    images, labels = chips(size=64)
    images = torch.where(images == 0, torch.tensor(500, dtype=torch.uint16), images)
    dark = torch.full_like(images, 300)
    added = (run(only("haze"), dark, labels)[0] - 300).mean((0, 2, 3))
    assert (added[:-1] > added[1:]).all() and added[-1] > 0 and 100 < added[0] < 1500
    out, classes = run(only("clouds"), dark, labels)
    hidden = classes == IGNORE_INDEX
    assert 0.02 < hidden.float().mean() < 0.5
    assert out[:, 0][hidden].min() > 1500 and (out[:, 0] < 250).any()  # bright clouds, and shadows
    assert torch.equal(classes[~hidden], labels[~hidden])


def test_a_cloud_in_one_of_several_dates_hides_no_label():
    bands = ("red@spring", "nir@spring", "red@summer", "nir@summer")
    images, labels = chips(n=16, bands=4)
    images = torch.where(images == 0, torch.tensor(500, dtype=torch.uint16), images)
    spec = AugmentSpec(flips=False, clouds=1.0)
    out, classes = Augment(spec, bands)(images, labels, torch.Generator().manual_seed(0))
    changed = (out != images).flatten(2).any(2)
    assert torch.equal(changed[:, 0], changed[:, 1]) and torch.equal(changed[:, 2], changed[:, 3])
    assert (changed[:, 0] != changed[:, 2]).all() and changed[:, 0].any() and changed[:, 2].any()
    assert torch.equal(classes, labels)


def test_the_strength_of_calibration_and_the_dropped_band():
    flat, labels = torch.full((256, 3, 4, 4), 2000.0), torch.zeros(256, 4, 4, dtype=torch.long)
    gain = (run(AugmentSpec(flips=False, gain=0.1), flat, labels)[0] / 2000).log()[:, :, 0, 0]
    assert gain.std().item() == pytest.approx(0.1 * 1.25**0.5, rel=0.15)
    assert torch.corrcoef(gain.T)[0, 1].item() == pytest.approx(0.8, abs=0.1)
    for name in ("offset", "noise"):
        shift = run(AugmentSpec(**{"flips": False, name: 0.01}), flat, labels)[0] - 2000
        assert shift.std().item() == pytest.approx(100, rel=0.15)
        assert (shift[0, 0].std() > 1) == (name == "noise")
    images, labels = chips()
    out, _ = run(only("band_dropout"), images, labels)
    touched = (out != images.float()).flatten(2).any(2)
    assert (touched.sum(1) == 1).all()
    band = touched[0].nonzero()[0, 0]
    values = images[:, band].float()
    assert out[0, band].max().item() == pytest.approx(values[values > 0].mean().item(), rel=1e-4)


def test_blur_flattens_and_does_not_darken_beside_nodata():
    images, labels = torch.full((2, 1, 16, 16), 1000.0), torch.zeros(2, 16, 16, dtype=torch.long)
    images[:, :, :, 8:] = 0
    images[1, :, 4, 4] = 9000
    out, _ = run(AugmentSpec(flips=False, blur=1.0), images, labels)
    assert torch.allclose(out[0], images[0]) and out[1, 0, 4, 4] < 6000 and out[1, 0, 4, 5] > 1100


def test_a_single_chip_has_no_other_to_borrow_from():
    images, labels = positions(n=1)
    out, classes = run(AugmentSpec(flips=False, cutmix=1.0, copy_paste=1.0), images, labels)
    assert torch.equal(out, images) and torch.equal(classes, labels)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"scale": (1.2, 0.8)}, "augment.scale"),
        ({"scale": (0.0, 1.0)}, "augment.scale"),
        ({"gain": -0.1}, "augment.gain"),
        ({"noise": float("nan")}, "augment.noise"),
        ({"haze": 1.5}, "augment.haze"),
    ],
)
def test_a_spec_that_makes_no_sense(values, message):
    with pytest.raises(InputError, match=message):
        AugmentSpec(**values)


def test_copy_paste_needs_frequencies_and_a_spec_reads_well():
    with pytest.raises(InputError, match="frequencies"):
        Augment(AugmentSpec(copy_paste=0.5), BANDS)
    assert str(AugmentSpec(scale=(0.8, 1.25), gain=0.1)) == "flips, scale 0.8-1.25, gain 0.1"
    assert str(OFF) == "none"
