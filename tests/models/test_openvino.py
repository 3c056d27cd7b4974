"""OpenVINO answers as torch does, is what `auto` takes on a CPU, and says why where it is not."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from s2seg.errors import ModelError, S2SegWarning
from s2seg.models import conversion, open_session, save_bundle
from s2seg.models.runtimes import choose_session, choosing, drivers, expected_session, opening
from s2seg.models.runtimes import openvino as module
from tests.models.conftest import smooth_pixels

CLASS = frozenset({"class"})


AUTO = f"openvino cpu {'bfloat16' if module.has_bfloat16() else 'float32'}"


@pytest.fixture
def renamed(spec, network, tmp_path):
    """The fitted network as a bundle of another name: nothing is known of it yet."""
    return save_bundle(tmp_path / "renamed", replace(spec, name=tmp_path.name), network.state_dict())


@pytest.mark.parametrize(("precision", "least"), [("float32", 0.9999), ("bfloat16", 0.995)])
def test_agrees_with_torch(bundle, precision, least):
    if precision == "bfloat16" and not module.has_bfloat16():
        pytest.skip("this processor has no bfloat16 arithmetic")
    dn = smooth_pixels(20, n=4, side=192)
    expected = open_session(bundle, "torch", "cpu", "float32").classify(dn, 32, CLASS)["class"]
    found = open_session(bundle, "openvino", precision=precision).classify(dn, 32, CLASS)["class"]
    assert len(np.unique(expected)) == 3
    assert np.mean(found == expected) >= least


def test_windows_of_many_shapes_in_turn(bundle):
    session, torch_says = open_session(bundle, "openvino", precision="float32"), open_session(bundle, "torch")
    for round_ in range(2):
        for height, width in ((64, 64), (64, 96), (96, 64), (32, 32), (128, 32), (96, 96)):
            dn = smooth_pixels(21 + round_)[:, :, :height, :width]
            np.testing.assert_allclose(session.probabilities(dn), torch_says.probabilities(dn), atol=1e-4)
    assert len(session._compiled) == module._SHAPES


def test_a_processor_without_bfloat16(bundle, monkeypatch):
    class Plain:
        def get_property(self, device: str, name: str) -> list[str]:
            return ["FP32"]

    monkeypatch.setattr(module, "_core", Plain)
    monkeypatch.setattr(opening, "_by_request", {})
    for choose in (open_session, expected_session):
        for runtime in ("auto", "openvino"):  # nor does auto take torch then
            with pytest.raises(ModelError, match="processor has no bfloat16 arithmetic: use precision 'float32'"):
                choose(bundle, runtime, "cpu", "bfloat16")
            with pytest.raises(ModelError, match="not openvino on cpu: use precision 'float32'"):
                choose(bundle, runtime, "cpu", "float16")
    assert expected_session(bundle, "openvino") == ("openvino", "cpu", "float32")


def test_what_auto_takes_and_why(bundle, monkeypatch):
    chosen = lambda *request: (lambda session, why: (session.name, why))(*choose_session(*request))  # noqa: E731
    assert chosen(bundle) == (AUTO, "the fastest on a CPU of those installed")
    assert chosen(bundle, "torch") == ("torch cpu float32", "asked for")
    monkeypatch.setattr(opening, "_by_request", {})
    monkeypatch.setitem(choosing._MODULES, "openvino", ("no_such_module",))
    assert chosen(bundle) == ("torch cpu float32", "OpenVINO is not installed: pip install 's2seg[openvino]'")


def test_auto_takes_the_same_for_onnx_files(free, monkeypatch):
    session, why = choose_session(free)
    assert (session.name, why) == (AUTO, "the fastest on a CPU of those installed")
    assert choose_session(free, device="cpu")[0] is session
    dn = smooth_pixels(24, n=4, side=192)
    expected = open_session(free, "onnxruntime").classify(dn, 32, CLASS)["class"]
    assert np.mean(session.classify(dn, 32, CLASS)["class"] == expected) >= 0.995
    monkeypatch.setattr(opening, "_by_request", {})
    monkeypatch.setitem(choosing._MODULES, "openvino", ("no_such_module",))
    session, why = choose_session(free)
    assert session.name == "onnxruntime cpu float32"
    assert why == "OpenVINO is not installed: pip install 's2seg[openvino]'"


def test_a_gpu_goes_before_openvino(bundle, free, monkeypatch, tmp_path):
    driver = tmp_path / "driver"
    driver.touch()
    monkeypatch.setattr(drivers, "_GPU_DRIVERS", (str(driver),))
    for kind, own in ((bundle, "torch"), (free, "onnxruntime")):
        monkeypatch.setattr(choosing, "_choose_device", lambda *_: "cpu")
        assert choosing._first_runtime(kind, "auto")[0] == "openvino"
        monkeypatch.setattr(choosing, "_choose_device", lambda *_: "cuda")
        assert choosing._first_runtime(kind, "auto") == (own, "a GPU is there")
        assert choosing._first_runtime(kind, "cuda:1") == (own, "a GPU is asked for")
        assert choosing._first_runtime(kind, "cpu")[0] == "openvino"
        driver.unlink()
        assert choosing._first_runtime(kind, "auto")[0] == "openvino"  # without a driver nobody is asked
        driver.touch()


def test_an_onnx_network_that_openvino_cannot_shape(free, monkeypatch):
    def fail(self, *key):
        raise RuntimeError("Check 'shapes' failed\nwhile validating node 'opset1::Reshape'")

    monkeypatch.setattr(module.OpenVinoSession, "_graph", fail)
    monkeypatch.setattr(opening, "_by_request", {})
    monkeypatch.setattr(opening, "_sessions", {})
    with pytest.raises(ModelError, match=r"OpenVINO cannot shape the network: .*Reshape'; use runtime 'onnxruntime'"):
        open_session(free, "openvino")
    with pytest.warns(S2SegWarning, match="runs on onnxruntime, as OpenVINO does not run it: .*Reshape"):
        assert choose_session(free)[0].name == "onnxruntime cpu float32"


def test_an_operator_that_openvino_lacks(renamed, monkeypatch):
    def fail(network, bundle, file, example):
        raise RuntimeError("No conversion rule found for operations: aten::col2im")

    monkeypatch.setitem(conversion._CONVERTERS, "openvino", fail)
    with pytest.raises(ModelError, match=r"cannot be converted to openvino: the operator aten::col2im"):
        open_session(renamed, "openvino")
    with pytest.warns(S2SegWarning, match=r"runs on torch, as OpenVINO does not run it: .* aten::col2im"):
        session, why = choose_session(renamed)
    assert session.name == "torch cpu float32"
    assert "aten::col2im" in why
    monkeypatch.setattr(module, "has_bfloat16", lambda: True)
    monkeypatch.setattr("s2seg.models.runtimes.processor.has_bfloat16", lambda: False)
    with pytest.raises(ModelError, match="processor has no bfloat16 arithmetic: use precision 'float32'"):
        choose_session(renamed, precision="bfloat16")


def test_openvinos_own_error_names_the_operator(tmp_path, spec):
    import torch

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)[:, :3]

    with pytest.raises(conversion.REFUSALS) as caught, conversion._quiet():
        conversion._to_openvino(
            Odd(),
            replace(save_bundle(tmp_path / "m", spec, {}), spec=spec),
            tmp_path / "n.xml",
            conversion._example(spec, 0),
        )
    assert "aten::special_bessel_j0" in conversion.reason(caught.value)


def test_a_network_is_converted_once_and_torch_is_not_needed_again(renamed):
    code = (
        "import sys, numpy as np; from s2seg.models import *; s = open_session(load_model(sys.argv[1]));"
        "s.classify(np.ones((1, 4, 64, 64), np.uint16), 0, {'class', 'confidence'});"
        "print(s.name, 'torch' in sys.modules)"
    )
    for _ in ("converts in a process of its own", "finds the converted network"):
        done = subprocess.run([sys.executable, "-c", code, renamed.path], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == f"{AUTO} False"
        assert done.stderr == ""


def test_a_run_without_torch_says_what_it_needs_it_for(renamed, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else find(name))
    says = r"runs on OpenVINO once torch has converted it, which is missing: pip install 's2seg\[torch\]'"
    for runtime in ("auto", "openvino"):
        with pytest.raises(ModelError, match=says):
            open_session(renamed, runtime)


def test_a_conversion_that_fails_apart_says_why(renamed, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k != "torch"})
    weights = Path(renamed.weights_path)
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"renamed: weights\.safetensors is truncated"):
        module._convert(renamed, tmp_path / "network.xml", 0)


def test_seams_are_announced_again_by_the_kept_form(renamed, monkeypatch):
    class Pooling:
        def get_rt_info(self, path):
            return self

        def astype(self, kind):
            return "True"

    open_session(renamed, "openvino")
    core = type("Core", (), {"read_model": lambda self, file: Pooling()})
    monkeypatch.setattr(module, "_core", core)
    with pytest.warns(S2SegWarning, match="save the bundle with global_context=True"):
        module._converted(renamed, renamed.spec.depth)


def test_a_cache_that_cannot_be_written(renamed, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("S2SEG_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot be kept in .*set S2SEG_CACHE"):
        module._converted(renamed, renamed.spec.depth)
