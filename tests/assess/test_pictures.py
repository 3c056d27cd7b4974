import math

import numpy as np
import pytest
import xarray as xr

from s2seg.assess.confusion import Confusion
from s2seg.assess.pictures import Comparison, write_comparison, write_confusion, write_curves
from s2seg.errors import InputError, OutputError
from s2seg.legend import LandClass, Legend
from s2seg.outputs._page import Page
from tests.pictures import pixels

LEGEND = Legend(
    "four",
    (
        LandClass(0, "water", "#1040f0"),
        LandClass(1, "trees", "#20a030"),
        LandClass(2, "built", "#e01020"),
        LandClass(3, "a class with quite a long name, over two lines", "#f0d020"),
    ),
    nodata=255,
)
BANDS = ("blue", "green", "red", "nir")


def share(picture, color):
    """Part of a picture that has exactly this colour."""
    return (picture == [int(color[i : i + 2], 16) for i in (1, 3, 5)]).all(-1).mean()


def image(bands=BANDS, side=40):
    values = np.random.default_rng(0).integers(200, 3000, (len(bands), side, side), dtype="uint16")
    return xr.DataArray(values, dims=("band", "y", "x"), coords={"band": list(bands)})


def row(truth=0, predicted=1, side=40, **options):
    """A place that is all of one class but for the upper left quarter, which has no label."""
    truths = np.full((side, side), truth, "uint8")
    truths[: side // 2, : side // 2] = 255
    return Comparison(options.get("image", image()), truths, {"U-Net": np.full((side, side), predicted, "uint8")})


def test_errors_have_the_claimed_colour_and_what_is_right_is_grey(tmp_path):
    wrong = pixels(write_comparison(tmp_path / "wrong.png", [row(0, 1)], LEGEND, "t"))
    right = pixels(write_comparison(tmp_path / "right.png", [row(0, 0)], LEGEND, "t"))
    panel = share(right, "#1040f0") / 1.75  # three quarters in the truth, all of the map
    assert share(wrong, "#1040f0") == pytest.approx(0.75 * panel, rel=0.05)
    assert share(wrong, "#20a030") == pytest.approx(1.75 * panel, rel=0.05)
    assert share(right, "#d4d4d4") == pytest.approx(0.75 * panel, rel=0.05)
    assert share(wrong, "#d4d4d4") < 0.05 * panel  # but for its entry in the legend
    assert share(wrong, "#e01020") == 0  # a class that does not occur is not explained


def test_models_and_places_make_columns_and_rows(tmp_path):
    one = row()
    two = Comparison(one.image, one.truth, one.predictions | {"forest": one.truth}, "a place in June")
    small, wide, tall = (
        pixels(write_comparison(tmp_path / f"{i}.png", rows, LEGEND, "t")).shape
        for i, rows in enumerate(([one], [two], [one, one, one]))
    )
    assert (wide[0], tall[1]) == (small[0], small[1])
    assert wide[1] - small[1] == pytest.approx(800, abs=5)  # two panels of 1.9 in and their gaps, at 200 dpi
    assert tall[0] - small[0] == pytest.approx(896, abs=5)


def test_images_are_shown_as_given_or_in_one_season(tmp_path):
    rgb = np.full((40, 40, 3), (12, 34, 56), "uint8")
    assert share(pixels(write_comparison(tmp_path / "rgb.png", [row(image=rgb)], LEGEND, "t")), "#0c2238") > 0.05
    seasonal = xr.concat([image() * 0 + 5, image(), image() * 0 + 9], "band")
    seasonal["band"] = [f"{b}@{s}" for s in ("spring", "summer", "autumn") for b in BANDS]
    pictures = [
        pixels(write_comparison(tmp_path / f"{i}.png", [row(image=im)], LEGEND, "t"))
        for i, im in enumerate((seasonal, image()))
    ]
    np.testing.assert_array_equal(*pictures)


def test_the_matrix_is_drawn_for_the_classes_that_occur(tmp_path):
    matrix = np.zeros((4, 4), int)
    matrix[:2, :2] = [[900, 100], [0, 1_234_567]]
    two = pixels(write_confusion(tmp_path / "two.png", Confusion(LEGEND, matrix), "Test blocks"))
    matrix[0, 3] = 5  # claimed, but not there: a row without percentages
    three = pixels(write_confusion(tmp_path / "three.png", Confusion(LEGEND, matrix), "Test blocks"))
    assert three.shape[0] > two.shape[0] + 120
    assert share(two, "#125c9e") > 0.02  # the diagonal's full blue: a class that is found entirely
    assert share(two, "#f0d020") == 0 < share(three, "#f0d020")


def test_units_and_colours_are_told(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(Page, "text", lambda self, x, y, text, **_: told.append(text))
    matrix = np.zeros((4, 4), int)
    matrix[:2, :2] = [[75, 25], [0, 100]]
    write_confusion(tmp_path / "c.png", Confusion(LEGEND, matrix), "Test blocks")
    assert {"IoU, %", "precision, %", "75.0", "80.0"} <= set(told)  # precision of trees 100 of 125, as its IoU
    assert "Overall accuracy 87.5%, mean IoU 77.5%, kappa 0.750." in " ".join(told)
    one = row()
    two = Comparison(one.image, one.truth, one.predictions | {"forest": one.truth})
    for place, says in ((one, "Errors, in the map's colour"), (two, "Errors of forest, in its colour")):
        write_comparison(tmp_path / "m.png", [place], LEGEND, "t", overwrite=True)
        assert says in [text.replace("\n", " ") for text in told]


def test_curves_have_gaps_and_mark_the_best_epoch(tmp_path, monkeypatch):
    history = [
        {"epoch": 1, "train_loss": 1.0, "val_loss": 1.1, "val_mean_iou": 0.2, "lr": 1e-3},
        {"epoch": 2, "train_loss": 0.8, "val_loss": None, "val_mean_iou": 0.5},
        {"epoch": 3, "train_loss": math.nan, "val_loss": 0.9, "val_mean_iou": 0.4},
    ]
    blank = [{"epoch": e, "train_loss": None} for e in (1, 2, 3)]
    drawn, empty = (
        pixels(write_curves(tmp_path / f"{i}.png", rows, "Curves")) for i, rows in enumerate((history, blank))
    )
    assert drawn.shape[1] == 2000
    assert share(drawn, "#1f77b4") > share(empty, "#1f77b4")
    marked = (drawn == 0x99).all(-1).sum(axis=0)  # the dashed line, in either half
    assert (marked[:1000].max() > 200, marked[1000:].max() > 200) == (True, True)
    monkeypatch.setattr(Page, "save", lambda self, path: [(a.get_xlim(), a.get_xticks()) for a in self._figure.axes])
    for limits, ticks in write_curves(tmp_path / "one.png", history[:1], "One epoch"):
        assert limits == (0.5, 1.5) and all(tick == round(tick) for tick in ticks)


def test_what_makes_no_sense_is_refused(tmp_path):
    other = Comparison(image(), row().truth, {"forest": row().truth})
    for call, error, message in (
        (lambda p: write_confusion(p, Confusion(LEGEND, np.zeros((4, 4))), "t"), InputError, "is empty"),
        (lambda p: write_curves(p, [], "t"), InputError, "history is empty"),
        (lambda p: write_comparison(p, [], LEGEND, "t"), InputError, "no rows"),
        (lambda p: write_comparison(p, [row(), other], LEGEND, "t"), InputError, "row 2 compares other models"),
        (lambda p: write_comparison(p, [row(side=30)], LEGEND, "t"), InputError, r"image \(40, 40\), truth \(30, 30\)"),
        (lambda p: write_curves(tmp_path, [{"epoch": 1}], "t"), OutputError, "exists already"),
    ):
        with pytest.raises(error, match=message):
            call(tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
