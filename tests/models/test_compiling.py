"""The compiled torch runtime: a shape of windows compiled for real, and what happens where it cannot be."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from s2seg.errors import ModelError
from s2seg.models import ModelBundle, ModelSpec, build_network, open_session, save_bundle
from s2seg.models.runtimes import LAYERS, expected_session
from s2seg.models.runtimes.compiling import CompiledSession
from s2seg.models.runtimes.lanes import HostLane, Lanes
from s2seg.models.runtimes.pytorch import TorchSession
from tests.models.conftest import smooth_pixels
from tests.models.test_runtimes import assert_layers_agree
from tests.models.test_tuning import shaken

ALL = frozenset(LAYERS)
CLASS = frozenset({"class"})


@pytest.fixture(scope="module")
def small(spec: ModelSpec, tmp_path_factory: pytest.TempPathFactory) -> ModelBundle:
    """A network that compiles in seconds; its margin is deep enough for its decoder to be trimmed."""
    architecture = {"name": "Unet", "encoder": "resnet18", "encoder_depth": 2, "decoder_channels": (8, 8)}
    spec = replace(spec, architecture=architecture, stride=4, depth=32)
    torch.manual_seed(1)
    network = shaken(build_network(spec))
    network.segmentation_head[0].weight.data.mul_(30)  # answers that rounding does not turn
    return save_bundle(tmp_path_factory.mktemp("small") / "m", spec, network.state_dict())


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Let torch trace, but run what it traced as it is; gives the shapes of batches that were traced."""
    shapes: list[tuple[int, ...]] = []
    real = torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        shapes.append(next(tuple(x.shape) for x in inputs if x.dtype == torch.uint16))
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda run, **options: real(run, backend=backend, **options))
    monkeypatch.setattr("s2seg.models.runtimes.compiling._check_compiler", lambda *_: None)
    torch.compiler.reset()
    yield shapes
    torch.compiler.reset()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_answers_are_torchs(small: ModelBundle) -> None:
    session = open_session(small, "torch-compiled", "cpu", "float32")
    assert session.name == " ".join(expected_session(small, "torch-compiled", "cpu", "float32"))
    dn = smooth_pixels(1, n=2, side=128)
    expected = open_session(small, "torch", "cpu", "float32").classify(dn, 32, CLASS)["class"]
    assert len(np.unique(expected)) > 1
    assert np.mean(session.classify(dn, 32, CLASS)["class"] != expected) <= 1e-4


def test_one_shape_is_traced_once_and_batches_are_filled_up(
    small: ModelBundle, uncompiled: list[tuple[int, ...]]
) -> None:
    session, plain = CompiledSession(small, "cpu", "float32"), TorchSession(small, "cpu", "float32")
    dn = smooth_pixels(2, n=7, side=96)
    for count in (1, 1, 3, 4, 7):
        answer = session.classify(dn[:count], 32, ALL)
        assert_layers_agree(answer, plain.classify(dn[:count], 32, ALL))
    np.testing.assert_allclose(session.probabilities(dn[:3]), plain.probabilities(dn[:3]), atol=1e-5)
    assert uncompiled == [(n, 4, 96, 96) for n in (1, 4, 8, 4)]


def test_more_shapes_than_torch_would_compile(small: ModelBundle, uncompiled: list[tuple[int, ...]]) -> None:
    session = CompiledSession(small, "cpu", "float32")
    for side in range(16, 16 + 4 * 9, 4):
        session.classify(smooth_pixels(3, side=side), 0, CLASS)
    assert len(uncompiled) == 9


def test_broken_numbers_are_noticed(small: ModelBundle, uncompiled: list[tuple[int, ...]]) -> None:
    session = CompiledSession(small, "cpu", "float32")
    session._a.fill_(torch.nan)
    with pytest.raises(ModelError, match="answers with NaN"):
        session.classify(smooth_pixels(4, n=3, side=64), 0, ALL)


def test_without_a_compiler(small: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = torch._inductor.config.patch({"cpp.cxx": (None, "there-is-no-compiler")})
    with nowhere, pytest.raises(ModelError, match=r"needs a C\+\+ compiler: install g\+\+, .* or use runtime 'torch'$"):
        CompiledSession(small, "cpu", "float32")
    monkeypatch.setattr("s2seg.models.runtimes.compiling.has_triton", lambda: False)
    with pytest.raises(ModelError, match="needs Triton on a GPU"):
        CompiledSession(small, "cuda", "float32")


def test_a_network_that_cannot_be_compiled(small: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise NotImplementedError("an operator that nobody knows\nand how it came to that")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda run, **options: real(run, backend=fail, **options))
    monkeypatch.setattr("s2seg.models.runtimes.compiling._check_compiler", lambda *_: None)
    session = CompiledSession(small, "cpu", "float32")
    with pytest.raises(
        ModelError, match=r"torch cannot compile it: NotImplementedError: an operator that nobody knows; use run"
    ):
        session.classify(smooth_pixels(5, side=64), 0, ALL)


def test_the_first_run_of_a_shape_is_over_before_another_thread_uses_its_constants(
    small: ModelBundle, uncompiled: list[tuple[int, ...]]
) -> None:
    waiting, running, log = threading.Event(), threading.Event(), []

    class Lane(HostLane):
        def __init__(self, name: str) -> None:
            self.name = name

        def upload(self, values: np.ndarray) -> torch.Tensor:
            log.append((self.name, "starts", len(values)))
            return super().upload(values)

        def wait(self) -> None:
            running.set()
            waiting.wait(timeout=20)
            log.append((self.name, "ends"))

    session, dn = CompiledSession(small, "cpu", "float32"), smooth_pixels(6, n=4, side=64)
    session._lanes = Lanes([Lane("first"), Lane("second")])
    first, second = (threading.Thread(target=session.classify, args=(dn[:n], 0, CLASS)) for n in (4, 3))
    first.start()
    assert running.wait(timeout=60)
    second.start()
    second.join(timeout=0.5)
    assert log == [("first", "starts", 4)], "the second has the same function, and waits"
    waiting.set()
    for thread in (first, second):
        thread.join(timeout=60)
    assert log == [("first", "starts", 4), ("first", "ends"), ("second", "starts", 3), ("second", "ends")]


def test_memory_that_the_compiler_lacks_halves_the_batch(small: ModelBundle, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, real = [], torch.compile

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        shapes.append(next(len(x) for x in inputs if x.dtype == torch.uint16))
        if shapes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda run, **options: real(run, backend=backend, **options))
    monkeypatch.setattr("s2seg.models.runtimes.compiling._check_compiler", lambda *_: None)
    torch.compiler.reset()
    session = CompiledSession(small, "cpu", "float32")
    assert session.classify(smooth_pixels(7, n=4, side=64), 0, CLASS)["class"].shape == (4, 64, 64)
    assert shapes == [4, 2, 1]
    torch.compiler.reset()
