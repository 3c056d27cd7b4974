import doctest
import json
import math

import numpy as np
import pytest

from s2seg.assess import scores as module
from s2seg.assess.confusion import Confusion, confusion
from s2seg.assess.scores import Scores, compare_table, mean_over_seeds, read_scores, write_scores
from s2seg.errors import InputError, OutputError
from s2seg.legend import LandClass, Legend

LEGEND = Legend("abc", tuple(LandClass(c, n, "#00ff00") for c, n in ((4, "a"), (0, "b"), (9, "c"))), nodata=255)
OTHER = Legend("abd", LEGEND.classes, nodata=254)


def of(matrix, unmapped=None, legend=LEGEND):
    return Scores(Confusion(legend, np.array(matrix), unmapped))


def test_the_scores_of_a_matrix_made_by_hand():
    s = of([[6, 2, 0], [1, 1, 0], [0, 0, 0]], [0, 2, 0])
    assert s.overall_accuracy == 0.7
    np.testing.assert_allclose(s.iou, [6 / 9, 1 / 4, np.nan])
    np.testing.assert_allclose(s.f1, [12 / 15, 2 / 5, np.nan])
    np.testing.assert_allclose(s.precision, [6 / 7, 1 / 3, np.nan])
    np.testing.assert_allclose(s.recall, [6 / 8, 1 / 2, np.nan])
    assert s.mean_iou == pytest.approx((6 / 9 + 1 / 4) / 2)  # the absent class is in no mean
    assert s.coverage == pytest.approx(10 / 12)
    assert s.support.tolist() == [8, 2, 0]


def test_a_class_that_is_claimed_but_not_there_is_nan_and_costs_the_others():
    clean, claimed = of([[8, 0, 0], [0, 2, 0], [0, 0, 0]]), of([[6, 0, 2], [0, 2, 0], [0, 0, 0]])
    assert np.isnan([claimed.iou[2], claimed.f1[2], claimed.recall[2]]).all()
    assert claimed.precision[2] == 0
    assert (clean.mean_iou, claimed.mean_iou) == (1, (6 / 8 + 1) / 2)


def test_a_class_that_is_never_claimed_scores_zero():
    s = of([[3, 0, 0], [1, 0, 0], [0, 0, 1]])
    assert (s.iou[1], s.f1[1], s.recall[1]) == (0, 0, 0)
    assert math.isnan(s.precision[1])


def test_scikit_learn_agrees():
    metrics = pytest.importorskip("sklearn.metrics")
    truth, predicted = np.random.default_rng(3).choice(np.uint8([4, 0, 9]), (2, 5000), p=[0.7, 0.2, 0.1])
    predicted = np.where(np.arange(5000) % 3, truth, predicted)
    s = Scores(confusion(truth, predicted, LEGEND))
    codes = list(LEGEND.codes)
    precision, recall, f1, support = metrics.precision_recall_fscore_support(truth, predicted, labels=codes)
    for ours, theirs in ((s.precision, precision), (s.recall, recall), (s.f1, f1), (s.support, support)):
        np.testing.assert_allclose(ours, theirs)
    np.testing.assert_allclose(s.iou, metrics.jaccard_score(truth, predicted, labels=codes, average=None))
    assert s.overall_accuracy == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert s.kappa == pytest.approx(metrics.cohen_kappa_score(truth, predicted))
    assert s.mean_f1 == pytest.approx(metrics.f1_score(truth, predicted, average="macro"))


def test_nothing_counted_and_one_class_give_nan_not_an_error():
    empty, one = of(np.zeros((3, 3))), of(np.diag([5, 0, 0]))
    assert np.isnan([empty.overall_accuracy, empty.kappa, empty.mean_iou, empty.coverage, one.kappa]).all()
    assert (one.overall_accuracy, one.mean_iou) == (1, 1)


def test_the_table_shows_a_dash_for_what_is_absent():
    header, a, *_, c = of([[600, 200, 0], [100, 100, 0], [0, 0, 0]]).table()
    assert header == ("class", "IoU", "F1", "precision", "recall", "support")
    assert a == ("a", "0.667", "0.800", "0.857", "0.750", "800")
    assert c == ("c", "–", "–", "–", "–", "0")
    assert ("kappa", "0.211") in of([[6, 2, 0], [1, 1, 0], [0, 0, 0]]).summary()


def test_scores_survive_their_file(tmp_path):
    s = of([[6, 2, 0], [1, 1, 0], [0, 0, 0]], [0, 0, 3])
    path = write_scores(tmp_path / "deep" / "scores.json", {"U-Net": s, "forest": s})
    stored = json.loads(path.read_text())["forest"]
    assert stored["classes"][2]["iou"] is None
    assert stored["classes"][0] | {"name": "a", "code": 4, "support": 8} == stored["classes"][0]
    again = read_scores(path)["U-Net"]
    assert again.to_dict() == s.to_dict()
    assert again.legend == LEGEND
    with pytest.raises(OutputError, match="exists already"):
        write_scores(path, {"U-Net": s})
    for text, message in (("{}", "not scores"), ("{", "not JSON"), ("[1]", "not scores"), ('{"a": {}}', "not scores")):
        path.write_text(text)
        with pytest.raises(InputError, match=message):
            read_scores(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_scores(tmp_path / "none.json")


def test_models_and_seeds_side_by_side():
    runs = [of([[n, 10 - n, 0], [0, 10, 0], [0, 0, 0]]) for n in (6, 8, 10)]
    spread = mean_over_seeds(runs)
    assert spread.overall_accuracy.mean == pytest.approx(0.9)
    assert spread.overall_accuracy.sd == pytest.approx(0.1)
    assert math.isnan(spread.iou[2].mean)
    rows = compare_table({"U-Net": runs, "forest": runs[0]})
    assert [row[0] for row in rows] == ["class", "a", "b", "overall accuracy", "kappa", "mean IoU", "mean F1"]
    assert rows[0] == ("class", "U-Net", "forest")
    assert rows[1] == ("a", "0.800 ± 0.200", "0.600")
    assert compare_table({"forest": runs[0]}, "f1")[1] == ("a", "0.750")
    for call, message in (
        (lambda: mean_over_seeds([]), "no runs"),
        (lambda: compare_table({}), "no models"),
        (lambda: compare_table({"x": runs[0], "y": of(np.eye(3), legend=OTHER)}), "'abd' and of legend 'abc'"),
    ):
        with pytest.raises(InputError, match=message):
            call()


def test_the_example_runs():
    assert doctest.testmod(module).attempted > 0
    assert doctest.testmod(module).failed == 0
