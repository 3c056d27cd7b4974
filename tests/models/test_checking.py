import numpy as np
import pytest

from s2seg.errors import InputError, ModelError
from s2seg.models import checking
from s2seg.models.checking import RuntimeCheck, check_runtimes
from tests.models.conftest import smooth_pixels


def test_every_runtime_that_reads_the_bundle_is_measured_or_says_why_not(bundle, monkeypatch):
    opened = checking.open_session

    def open_session(model, runtime, device, precision):
        if (runtime, precision) == ("openvino", "bfloat16"):
            raise ModelError(model.path, "this processor has no bfloat16 arithmetic")
        if runtime == "torch-compiled":
            raise ModelError(model.path, "needs a C++ compiler")
        return opened(model, runtime, device, precision)

    monkeypatch.setattr(checking, "open_session", open_session)
    told = []
    checked = check_runtimes(bundle, smooth_pixels(30, n=2), lambda *step: told.append(step))
    rows = {(row.runtime, row.precision): row for row in checked}
    assert {runtime for runtime, _ in rows} == {"torch", "torch-compiled", "openvino"}
    assert told == [(done, 6) for done in range(7)]
    assert "C++ compiler" in rows["torch-compiled", "float32"].reason
    assert rows["torch", "float32"].agreement == 1
    assert rows["openvino", "float32"].agreement >= 0.9999
    assert rows["torch", "bfloat16"].agreement >= 0.995
    assert {key for key, row in rows.items() if not row.agrees} == {key for key, row in rows.items() if row.reason}
    assert all(row.speed > 0 for row in rows.values() if not row.reason)
    assert "no bfloat16" in rows["openvino", "bfloat16"].reason
    assert np.isnan(rows["openvino", "bfloat16"].agreement)


def test_more_may_differ_in_bfloat16():
    agreement = {("float32", 0.9999), ("bfloat16", 0.995), ("float32", 0.9998), ("bfloat16", 0.994)}
    agrees = {(p, share) for p, share in agreement if RuntimeCheck("openvino", p, "cpu", share).agrees}
    assert agrees == {("float32", 0.9999), ("bfloat16", 0.995)}


def test_chips_that_do_not_fit_the_model_are_told(bundle):
    for chips, says in (
        (np.zeros((1, 5, 64, 64), np.uint16), "4, y, x"),
        (np.zeros((1, 4, 60, 60), np.uint16), "stride"),
    ):
        with pytest.raises(InputError, match=says):
            check_runtimes(bundle, chips)
