"""Every runtime in every precision, on real pixels, with a network that was fitted to real labels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from s2seg.errors import ModelError
from s2seg.models import available_runtimes, load_model, open_session
from s2seg.models.bundle import ModelBundle
from s2seg.models.checking import GOALS
from s2seg.models.export import export_model
from tests.bench.fixtures import fit, piece

STEPS, CHIPS, SIDE = 40, 4, 256
CLASS = frozenset({"class"})


@pytest.fixture(scope="session")
def fitted(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A U-Net with mobilenet_v2, fitted to the land cover of the Mekong area."""
    path = tmp_path_factory.mktemp("fitted") / "m"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads would mostly wait for each other
    fit(path.parent, path, STEPS, side=96)
    torch.set_num_threads(threads)
    return load_model(path)


@pytest.fixture(scope="session")
def chips(real_data: Path) -> np.ndarray:
    """(n, band, y, x) stored numbers of the Mekong area."""
    pixels = piece(real_data / "mekong" / "catalog.json", CHIPS * SIDE).values
    corners = range(0, CHIPS * SIDE, SIDE)
    return np.stack([pixels[:, at : at + SIDE, at : at + SIDE] for at in corners])


@pytest.fixture(scope="session")
def expected(fitted: ModelBundle, chips: np.ndarray) -> np.ndarray:
    """(n, y, x) codes by torch in float32."""
    return open_session(fitted, "torch", "cpu", "float32").classify(chips, 0, CLASS)["class"]


@pytest.mark.real_data
def test_the_fitted_network_tells_several_classes_apart(expected: np.ndarray) -> None:
    shares = np.unique(expected, return_counts=True)[1] / expected.size
    assert (shares > 0.02).sum() >= 3


@pytest.mark.real_data
@pytest.mark.parametrize(
    ("runtime", "precision"),
    [("torch", "bfloat16"), ("openvino", "float32"), ("openvino", "bfloat16"), ("onnxruntime", "float32")],
)
def test_a_runtime_answers_as_torch_in_float32(
    runtime: str, precision: str, fitted: ModelBundle, chips: np.ndarray, expected: np.ndarray, tmp_path: Path
) -> None:
    if runtime not in available_runtimes():
        pytest.skip(f"{runtime} is not installed")
    model = fitted
    if runtime == "onnxruntime":  # it reads a bundle of its own kind
        model = load_model(export_model(fitted, "onnx", tmp_path / "m").path)
    try:
        session = open_session(model, runtime, "cpu", precision)
    except ModelError as error:
        if "bfloat16" not in error.reason:
            raise
        pytest.skip(error.reason)
    found = session.classify(chips, 0, CLASS)["class"]
    assert np.mean(found == expected) >= GOALS[precision], f"{np.mean(found == expected):.5f}"
