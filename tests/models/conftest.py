"""A small network that was fitted for a few seconds, as a bundle and as ONNX files; smooth pixels to feed it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from s2seg.legend import LandClass, Legend
from s2seg.models import ModelSpec, build_network, import_onnx, save_bundle

LEGEND = Legend(
    "test",
    (LandClass(7, "dark", "#101010"), LandClass(3, "middle", "#808080"), LandClass(200, "bright", "#f0f0f0")),
    nodata=255,
)


def smooth_pixels(seed: int, n: int = 1, bands: int = 4, side: int = 128) -> np.ndarray:
    """Stored numbers (n, band, y, x) with the slow variation of a landscape, 1 to 9000."""
    noise = np.random.default_rng(seed).standard_normal((n, bands, side, side))
    field = gaussian_filter(noise, (0, 0, 4, 4), mode="wrap") * 14
    field[:, 1:] = 0.7 * field[:, :1] + 0.3 * field[:, 1:]  # bands of one landscape go together
    return np.clip(2500 + 1200 * field, 1, 9000).astype(np.uint16)


@pytest.fixture(scope="session")
def spec() -> ModelSpec:
    return ModelSpec(
        name="test net",
        bands=("blue", "green", "red", "nir"),
        legend=LEGEND,
        mean=(0.25, 0.24, 0.26, 0.25),
        std=(0.1, 0.11, 0.09, 0.12),
        architecture={"name": "Unet", "encoder": "mobilenet_v2"},
        provenance={"data": "noise"},
        metrics={"miou": 0.5},
    )


@pytest.fixture(scope="session")
def network(spec):
    """The network in evaluation mode, fitted to tell dark, middle and bright landscape apart."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small tensors: threads would mostly wait for each other
    torch.manual_seed(0)
    net = build_network(spec).train()
    optimizer = torch.optim.AdamW(net.parameters(), 3e-3)
    for step in range(25):
        dn = smooth_pixels(1000 + step, n=4, side=64)
        target = torch.from_numpy(np.digitize(dn[:, 0], [2000, 3000]).astype(np.int64))
        loss = torch.nn.functional.cross_entropy(net(network_input(spec, dn)), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.set_num_threads(threads)
    return net.eval()


def network_input(spec, dn: np.ndarray) -> torch.Tensor:
    """Scaling as the contract words it, in float64: the oracle for every runtime."""
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in (spec.mean, spec.std))
    return torch.from_numpy(((dn * spec.scale - mean) / std).astype(np.float32))


def expected_probabilities(spec, network, dn: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        logits = network(network_input(spec, dn)).double()
    return torch.softmax(logits, dim=1).numpy()


@pytest.fixture(scope="session")
def bundle(spec, network, tmp_path_factory):
    return save_bundle(tmp_path_factory.mktemp("bundle") / "model", spec, network.state_dict())


def export(network, path, *, bands=4, side=64, batch=1, dynamic=False):
    free = {"input": {0: "n", 2: "h", 3: "w"}, "output": {0: "n", 2: "h", 3: "w"}} if dynamic else None
    with pytest.deprecated_call():  # the exporter that needs no further package says that it is the old one
        torch.onnx.export(
            network,
            (torch.zeros(batch, bands, side, side),),
            str(path),
            dynamo=False,
            input_names=["input"],
            output_names=["output"],
            dynamic_axes=free,
        )
    return path


@pytest.fixture(scope="session")
def onnx_free(network, tmp_path_factory):
    """The network as ONNX with any batch and any window."""
    return export(network, tmp_path_factory.mktemp("onnx") / "free.onnx", dynamic=True)


@pytest.fixture(scope="session")
def onnx_fixed(network, tmp_path_factory):
    """The network as ONNX for a batch of one and windows of 64 px."""
    return export(network, tmp_path_factory.mktemp("onnx") / "fixed.onnx")


@pytest.fixture(scope="session")
def facts(spec) -> dict:
    """What import_onnx must be told about the network."""
    return {"name": "foreign", "bands": spec.bands, "mean": spec.mean, "std": spec.std, "legend": spec.legend}


@pytest.fixture(scope="session")
def free(onnx_free, facts, tmp_path_factory):
    """``onnx_free`` as a bundle."""
    return import_onnx(onnx_free, tmp_path_factory.mktemp("free") / "m", **facts)


@pytest.fixture
def other_spec(spec):
    """The spec with some fields replaced."""
    return lambda **changes: replace(spec, **changes)
