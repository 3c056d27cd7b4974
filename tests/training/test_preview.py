import numpy as np
import pytest

from s2seg.errors import OutputError
from s2seg.legend import Legend
from s2seg.outputs._page import Page
from s2seg.training.augment import Augment, AugmentSpec
from s2seg.training.preview import write_preview
from tests.pictures import pixels

LEGEND = Legend.load("dynamic-world")  # its nodata is 255, and 0 is a class
WATER, BUILT = 0, 6


def chips(n=3, size=64, bands=4):
    rng = np.random.default_rng(0)
    images = rng.integers(500, 3000, (n, bands, size, size)).astype("uint16")
    labels = np.full((n, size, size), WATER, "uint8")
    labels[:, 16:48, 16:48] = BUILT
    labels[:, :8] = LEGEND.nodata
    images[:, :, :, :8] = 0
    return images, labels


def count(picture, code):
    return (picture == LEGEND[code].rgb).all(-1).sum()


@pytest.mark.parametrize("bands", [("blue", "green", "red", "nir"), ("nir", "swir16"), ("red@spring", "red@summer")])
def test_a_page_shows_chips_labels_and_versions(tmp_path, bands):
    images, labels = chips(bands=len(bands))
    augment = Augment(AugmentSpec(flips=False), bands)
    path = write_preview(tmp_path / "new" / "p.png", images, labels, augment, LEGEND, rows=2, columns=3)
    picture = pixels(path)
    # two rows of a 300 pixel wide cell: a quarter of the labels is built, and only its rim is drawn beside it
    one_cell = 300**2
    assert 2 * one_cell * 0.25 < count(picture, BUILT) < 2 * one_cell * 0.35
    assert count(picture, WATER) > 2 * one_cell * 0.5
    four = write_preview(tmp_path / "p4.png", images, labels, augment, LEGEND, rows=2, columns=4)
    assert pixels(four).shape[1] > picture.shape[1]


def test_no_version_is_shown_twice(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Page, "image", lambda self, x, y, width, height, image: drawn.append(image))
    images, labels = np.random.default_rng(0).integers(500, 3000, (2, 4, 8, 8)).astype("uint16"), chips(2, 8)[1]
    augment = Augment(AugmentSpec(), ("blue", "green", "red", "nir"))  # eight ways to flip and turn
    write_preview(tmp_path / "p.png", images, labels % LEGEND.nodata, augment, LEGEND, columns=7)
    for chip in range(2):
        versions = [image.tobytes() for image in (drawn[chip], *drawn[4 + chip :: 2])]
        assert len(set(versions)) == len(versions) == 6


def test_the_seed_decides_and_nothing_is_overwritten_unasked(tmp_path):
    images, labels = chips()
    augment = Augment(AugmentSpec(gain=0.3, clouds=0.5), ("blue", "green", "red", "nir"))

    def draw(name, seed, **options):
        return write_preview(tmp_path / name, images, labels, augment, LEGEND, seed=seed, columns=3, **options)

    first, second = pixels(draw("a.png", 1)), pixels(draw("b.png", 1))
    assert np.array_equal(first, second) and not np.array_equal(first, pixels(draw("c.png", 2)))
    with pytest.raises(OutputError, match="overwrite"):
        draw("a.png", 2)
    assert not np.array_equal(pixels(draw("a.png", 2, overwrite=True)), first)


def test_mixed_dates_are_what_is_augmented(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(Page, "image", lambda self, x, y, width, height, image: drawn.append(image))
    images, labels = chips(1)
    later = [(images + np.uint16(shift), labels) for shift in (100, 200)]
    augment = Augment(AugmentSpec(flips=False, mixed_dates=0.5), ("blue", "green", "red", "nir"))
    assert "mixed_dates 0.5" in str(augment.spec)
    write_preview(tmp_path / "p.png", images, labels, augment, LEGEND, columns=5, mixed=later)
    means = [image.mean() for image in (drawn[0], *drawn[2:])]
    assert means[0] != means[1] != means[2] and means[3] == means[1]
