import numpy as np

from s2seg.models.checking import check_runtimes
from tests.models.conftest import smooth_pixels


def test_every_runtime_is_measured_or_says_why_not(bundle):
    rows = {(row.runtime, row.precision): row for row in check_runtimes(bundle, smooth_pixels(30, n=2))}
    assert len(rows) == 6
    assert rows["torch", "float32"].agreement == 1
    assert rows["openvino", "float32"].agreement >= 0.9999
    assert rows["torch", "bfloat16"].agreement >= 0.995
    assert all(row.speed > 0 for row in rows.values() if not row.reason)
    assert "do not run on onnxruntime" in rows["onnxruntime", "float32"].reason
    assert np.isnan(rows["onnxruntime", "float32"].agreement)
