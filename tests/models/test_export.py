"""Exports: what is written answers as torch does, at any size; what does not is refused and leaves nothing."""

import importlib.util
import json
import zipfile
from dataclasses import replace

import numpy as np
import pytest

from s2seg.errors import InputError, ModelError, OutputError
from s2seg.models import build_network, conversion, load_model, open_session, save_bundle
from s2seg.models.export import export_model
from tests.models.conftest import LEGEND, smooth_pixels

PATHS = {"onnx": "exported", "torchscript": "model.pt", "openvino": "model.xml"}


@pytest.fixture(scope="module")
def shallow(spec, tmp_path_factory):
    """A bundle of a shallow network with weights as they come: cheap to convert, and it fits every exporter."""
    import torch

    torch.manual_seed(0)
    architecture = {"name": "Unet", "encoder": "resnet18", "encoder_depth": 3, "decoder_channels": [32, 16, 16]}
    tiny = replace(spec, architecture=architecture, stride=8, depth=16)
    return save_bundle(tmp_path_factory.mktemp("shallow") / "m", tiny, build_network(tiny).state_dict())


@pytest.fixture(scope="module", params=PATHS)
def exported(request, shallow, tmp_path_factory):
    path = tmp_path_factory.mktemp("exports") / PATHS[request.param]
    return export_model(shallow, request.param, path, chips=smooth_pixels(1, n=3, side=64))


def run_without_s2seg(result, numbers):
    """Scores as a stranger gets them: from the file alone, fed with stored numbers."""
    x = numbers.astype(np.float32)
    if result.kind == "onnx":
        import onnxruntime

        return onnxruntime.InferenceSession(result.path / "model.onnx").run(None, {"numbers": x})[0]
    if result.kind == "openvino":
        import openvino

        return openvino.Core().compile_model(result.path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(x)[0]
    import torch

    with pytest.warns(FutureWarning, match="deprecated"):
        network = torch.jit.load(result.path)
    return network(torch.from_numpy(x)).detach().numpy()


def test_answers_as_torch_does_at_any_size(exported, shallow):
    assert exported.agreement >= 0.9999
    assert exported.max_difference < 1e-4
    assert exported.pixels == 3 * 64 * 64 + 72 * 80  # as given, and once at another size
    session = open_session(shallow, "torch", "cpu", "float32")
    for seed, (n, side) in enumerate([(1, 32), (5, 48), (2, 200)]):
        numbers = smooth_pixels(10 + seed, n=n, side=side)
        numbers[0, :, :7, :9] = 0
        expected = session.probabilities(numbers)
        scores = run_without_s2seg(exported, numbers)
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), expected, atol=1e-4)


def test_only_the_onnx_form_is_a_model_again(exported):
    if exported.kind == "onnx":
        assert load_model(exported.path).is_onnx
        return
    for path in (exported.path, exported.path.parent):
        with pytest.raises(ModelError, match=r"a file for other programs .* export that with --kind onnx$"):
            load_model(path)


def test_the_file_says_what_it_is(exported):
    if exported.kind == "onnx":
        import onnx

        model = onnx.load(exported.path / "model.onnx")
        facts = {prop.key: prop.value for prop in model.metadata_props}
        assert not any(node.metadata_props for node in model.graph.node)  # no paths of the machine that made it
    elif exported.kind == "openvino":
        import openvino

        model = openvino.Core().read_model(exported.path)
        facts = {key: str(model.get_rt_info(["s2seg", key]).value) for key in ("bands", "legend", "stride")}
    else:
        import torch

        extra = {"s2seg.json": ""}
        with pytest.warns(FutureWarning, match="deprecated"):
            torch.jit.load(exported.path, _extra_files=extra)
        facts = json.loads(extra["s2seg.json"])
        with zipfile.ZipFile(exported.path) as archive:  # as above
            assert not any(b"site-packages" in archive.read(name) for name in archive.namelist())
    assert facts["bands"] == "blue, green, red, nir"
    assert json.loads(facts["legend"]) == LEGEND.to_dict()
    assert facts["stride"] == "8"


def test_the_onnx_form_is_a_bundle_that_maps_alike(shallow, tmp_path):
    result = export_model(shallow, "onnx", tmp_path / "m")
    again = load_model(result.path)
    assert again.is_onnx
    assert (again.spec.legend, again.spec.stride, again.spec.depth) == (LEGEND, 8, 16)
    assert again.spec.provenance["exported_from"]["mean"] == list(shallow.spec.mean)
    numbers = smooth_pixels(3, n=2, side=96)
    layers = {"class"}
    expected = open_session(shallow, "torch", "cpu", "float32").classify(numbers, 8, layers)["class"]
    found = open_session(again, precision="float32").classify(numbers, 8, layers)["class"]
    assert (found == expected).mean() > 0.9999
    with pytest.raises(OutputError, match="model is there already"):
        export_model(shallow, "onnx", tmp_path / "m")


def test_a_fixed_window_stays_fixed(shallow, tmp_path):
    fixed = replace(shallow, spec=replace(shallow.spec, window=64))
    result = export_model(fixed, "openvino", tmp_path / "m.xml")
    assert result.pixels == 4 * 64 * 64
    assert run_without_s2seg(result, smooth_pixels(0, n=3, side=64)).shape == (3, 3, 64, 64)


@pytest.mark.parametrize("shift", [0.5, np.nan])
def test_disagreement_is_refused_and_leaves_nothing(shallow, tmp_path, monkeypatch, shift):
    monkeypatch.setitem(conversion._CONVERTERS, "torchscript", lambda network, bundle, file, example: None)
    wrong = np.array([0, shift, 0], np.float32).reshape(1, 3, 1, 1) * 100
    monkeypatch.setitem(conversion._OPENERS, "torchscript", lambda file: lambda x: wrong + 0 * x[:, :3])
    with pytest.raises(ModelError, match=r"torchscript form names the same class as torch on .* not written"):
        export_model(shallow, "torchscript", tmp_path / "new" / "m.pt")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_converted_names_the_operator(shallow, tmp_path, monkeypatch):
    def fail(network, bundle, file, example):
        raise RuntimeError("No conversion\nfor the node\n  aten::col2im: at line 3")

    monkeypatch.setitem(conversion._CONVERTERS, "openvino", fail)
    with pytest.raises(ModelError, match=r"cannot be converted to openvino: the operator aten::col2im \(No conversion"):
        export_model(shallow, "openvino", tmp_path / "m.xml")


def test_missing_packages_are_named_by_extra(shallow, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    for kind, module in (("onnx", "onnxscript"), ("openvino", "openvino"), ("torchscript", "torch")):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.util, "find_spec", lambda name, hidden=module: None if name == hidden else find(name)
            )
            with pytest.raises(ModelError, match=rf"s2seg\[{kind if kind != 'torchscript' else 'torch'}\]"):
                export_model(shallow, kind, tmp_path / PATHS[kind])


@pytest.mark.parametrize(
    ("kind", "path", "chips", "says"),
    [
        ("tflite", "m.tflite", None, "choose onnx, torchscript, openvino"),
        ("onnx", "m.onnx", None, "without .onnx"),
        ("openvino", "m.bin", None, "with --kind openvino a file is written, whose name must end in .xml"),
        ("torchscript", "m.pt", np.zeros((1, 3, 64, 64), np.uint16), r"\(n, 4, y, x\) is needed"),
        ("torchscript", "m.pt", np.zeros((1, 4, 64, 64), np.float32), "uint16"),
        ("torchscript", "m.pt", np.zeros((1, 4, 64, 60), np.uint16), "multiples of the stride 8"),
    ],
)
def test_bad_input(shallow, tmp_path, kind, path, chips, says):
    with pytest.raises(InputError, match=says):
        export_model(shallow, kind, tmp_path / path, chips=chips)


def test_a_file_in_the_way_stays(shallow, tmp_path):
    (tmp_path / "m.pt").write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        export_model(shallow, "torchscript", tmp_path / "m.pt")
    assert (tmp_path / "m.pt").read_text() == "mine"
    export_model(shallow, "torchscript", tmp_path / "m.pt", overwrite=True)
    assert (tmp_path / "m.pt").stat().st_size > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["m.pt"]
