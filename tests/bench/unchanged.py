"""The network as its library makes it, without what s2seg does to its layers: what one would run by hand."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import openvino
import torch

from s2seg.models import ModelBundle, build_network
from s2seg.models.conversion import scaled_network
from s2seg.models.runtimes import Session
from s2seg.models.runtimes.openvino import OpenVinoSession
from s2seg.models.runtimes.pytorch import TorchSession, _load_weights
from s2seg.models.runtimes.trimming import middle


def unchanged_session(bundle: ModelBundle, name: str) -> Session:
    """Open the runtime, device and precision that ``name`` lists, with unchanged layers."""
    runtime, device, precision = name.split()
    session = {"torch": _Eager, "openvino": _Converted}[runtime]
    return session(bundle, device, precision)


class _Eager(TorchSession):
    def __init__(self, bundle: ModelBundle, device: str, precision: str) -> None:
        super().__init__(bundle, device, precision)
        self._network = _load_weights(build_network(bundle.spec), bundle).eval().to(device)

    def _scores(self, numbers: torch.Tensor, crop: int) -> torch.Tensor:
        x = numbers.to(torch.float32).mul_(self._a).add_(self._b)
        with torch.autocast(self._device.type, self._autocast, enabled=self._autocast is not None):
            height, width = (n - 2 * crop for n in numbers.shape[-2:])
            return middle(self._network(x).float(), (height, width))


class _Converted(OpenVinoSession):
    def __init__(self, bundle: ModelBundle, device: str, precision: str) -> None:
        super().__init__(bundle, device, precision)
        self._scratch = tempfile.TemporaryDirectory()
        file = Path(self._scratch.name, "network.xml")
        self._files = {0: file, bundle.spec.depth: file}
        network, example = scaled_network(bundle, tuned=False, margin=0), torch.ones(1, len(bundle.spec.bands), 64, 96)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # OpenVINO traces, which torch advises against
            openvino.save_model(openvino.convert_model(network, example_input=example), file, False)
