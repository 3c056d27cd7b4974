import numpy as np
import pytest

from s2seg.assess.area import estimate_areas
from s2seg.assess.confusion import Confusion
from s2seg.errors import InputError
from s2seg.legend import LandClass, Legend

NAMES = ("deforestation", "forest gain", "stable forest", "stable non-forest")
LEGEND = Legend("change", tuple(LandClass(i, name, "#00ff00") for i, name in enumerate(NAMES, 1)))
# the worked example of Olofsson et al. 2014, section 5, Tables 8 and 9: rows are the map, columns the truth
SAMPLE = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
MAPPED = (200_000, 150_000, 3_200_000, 6_450_000)  # pixels of 30 m


def rounded(estimates, digits):
    return [(round(e.value, digits), round(e.margin, digits)) for e in estimates]


def test_the_worked_example_of_the_paper():
    found = estimate_areas(Confusion(LEGEND, SAMPLE.T), MAPPED, pixel_area=0.09)
    assert rounded([found.overall_accuracy], 2) == [(0.95, 0.02)]
    assert rounded(found.precision, 2) == [(0.88, 0.07), (0.73, 0.10), (0.93, 0.04), (0.96, 0.02)]
    # the paper prints 0.23 and 0.01 for the second and the last margin, which its own eq. 7 does not give
    assert rounded(found.recall, 2) == [(0.75, 0.21), (0.85, 0.25), (0.93, 0.03), (0.96, 0.02)]
    hectares = [(21_158, 6_158), (11_686, 3_756), (285_770, 15_510), (581_386, 16_282)]
    np.testing.assert_allclose(rounded(found.area, 0), hectares, atol=1)


def test_intervals_hold_what_they_promise():
    """Draw many samples from a known map: about 95 % of the intervals hold the true area."""
    rng = np.random.default_rng(5)
    truth_given_map, mapped = np.array([[0.8, 0.2], [0.1, 0.9]]), np.array([3_000, 7_000])
    legend = Legend("two", LEGEND.classes[:2])
    true = mapped @ truth_given_map
    hits = [
        abs(estimate.value - area) <= estimate.margin
        for _ in range(1000)
        for sample in [np.stack([rng.multinomial(200, p) for p in truth_given_map])]
        for estimate, area in zip(estimate_areas(Confusion(legend, sample.T), mapped).area, true, strict=True)
    ]
    assert 0.93 < np.mean(hits) < 0.97


def test_a_class_that_is_not_mapped_still_gets_its_area():
    sample, mapped = SAMPLE.copy(), list(MAPPED)
    sample[0], mapped[0] = 0, 0
    found = estimate_areas(Confusion(LEGEND, sample.T), mapped)
    assert np.isnan([found.precision[0].value, found.precision[0].margin]).all()
    assert found.recall[0].value == 0
    assert found.area[0].value > found.area[0].margin / 2 > 0
    assert sum(e.value for e in found.area) == pytest.approx(sum(mapped))


def test_what_makes_no_sense_is_refused():
    one, strange = SAMPLE.copy(), list(MAPPED)
    one[1] = 0, 1, 0, 0
    strange[2] = 0
    for sample, mapped, message in (
        (one, MAPPED, "'forest gain' has 1 sample units"),
        (SAMPLE, strange, "165 sample units are of class 'stable forest', which the map does not have"),
        (SAMPLE, MAPPED[:3], "needs 4 counts"),
        (SAMPLE, [0] * 4, "above 0"),
    ):
        with pytest.raises(InputError, match=message):
            estimate_areas(Confusion(LEGEND, sample.T), mapped)
