import json
import sys

import numpy as np
import onnx
import pytest
import rasterio
from onnx import TensorProto, helper, numpy_helper

from s2seg.errors import InputError, ModelError, OutputError
from s2seg.legend import BUILTIN
from s2seg.models import import_csmask, import_onnx, load_model, open_session
from tests.models.conftest import export


def graph(
    nodes, *, given=("n", 4, "h", "w"), answer=("n", 3, "h", "w"), tensors=None, kind=TensorProto.FLOAT, inputs=1
):
    """A network of a few operations from ``input`` to ``output``."""
    made = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info(("input", "second")[i], kind, given) for i in range(inputs)],
        [helper.make_tensor_value_info("output", kind, answer)],
        [numpy_helper.from_array(values, name) for name, values in (tensors or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def conv(source="input", target="output", classes=3, bands=4):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((classes, bands, 1, 1)).astype(np.float32)
    return helper.make_node("Conv", [source, f"w_{target}"], [target]), {f"w_{target}": weights}


@pytest.fixture
def offered(tmp_path, facts):
    """Import a graph that is written to a file first."""

    def offer(model, **changes):
        onnx.save_model(model, tmp_path / "net.onnx")
        return import_onnx(tmp_path / "net.onnx", tmp_path / "model", **(facts | changes))

    yield offer
    assert {p.name for p in tmp_path.iterdir()} <= {"net.onnx", "model"}


def test_free_and_fixed_windows(onnx_free, onnx_fixed, facts, tmp_path):
    free = import_onnx(onnx_free, tmp_path / "free", **facts)
    assert (free.spec.window, free.spec.depth, free.spec.global_context) == (None, 96, False)
    assert free.is_onnx
    assert free == load_model(tmp_path / "free")
    assert free.weights_path.read_bytes() == onnx_free.read_bytes()
    fixed = import_onnx(onnx_fixed, tmp_path / "fixed", **facts)
    assert (fixed.spec.window, fixed.spec.depth, fixed.spec.global_context) == (64, 0, False)
    assert import_onnx(onnx_free, tmp_path / "deep", **facts, depth=128).spec.depth == 128


def test_existing_model_needs_overwrite(onnx_fixed, facts, tmp_path):
    import_onnx(onnx_fixed, tmp_path / "m", **facts)
    with pytest.raises(OutputError, match="overwrite"):
        import_onnx(onnx_fixed, tmp_path / "m", **facts)
    assert import_onnx(onnx_fixed, tmp_path / "m", **(facts | {"name": "two"}), overwrite=True).spec.name == "two"


def test_squeeze_and_excite_is_global(other_spec, facts, tmp_path):
    from s2seg.models import build_network

    se = build_network(other_spec(architecture={"name": "Unet", "encoder": "tu-mobilenetv3_small_050"})).eval()
    pooled = export(se, tmp_path / "se.onnx")
    assert import_onnx(pooled, tmp_path / "se", **facts).spec.global_context


def scaled_by(nodes, tensors=None):
    """Multiply the network's answer by something that ``nodes`` make of its input, called ``factor``."""
    node, weights = conv(target="scores")
    return graph(
        [node, *nodes, helper.make_node("Mul", ["scores", "factor"], ["output"])], tensors=weights | (tensors or {})
    )


def one_channel(node):
    """Reduce four bands to one, so that the factor fits three classes."""
    return [helper.make_node("ReduceMean", ["input"], ["grey"], axes=[1]), node]


@pytest.mark.parametrize(
    ("nodes", "tensors", "expected"),
    [
        (one_channel(helper.make_node("Sigmoid", ["grey"], ["factor"])), {}, False),
        (one_channel(helper.make_node("GlobalAveragePool", ["grey"], ["factor"])), {}, True),
        (one_channel(helper.make_node("ReduceMean", ["grey"], ["factor"], axes=[2, 3])), {}, True),
        (one_channel(helper.make_node("ReduceMax", ["grey"], ["factor"], axes=[-1])), {}, True),
        (one_channel(helper.make_node("ReduceMax", ["grey"], ["factor"])), {}, True),
        (one_channel(helper.make_node("ReduceSum", ["grey", "axes"], ["factor"])), {"axes": np.array([2, 3])}, True),
        (one_channel(helper.make_node("ReduceSum", ["grey", "axes"], ["factor"])), {"axes": np.array([1])}, False),
        (one_channel(helper.make_node("Softmax", ["grey"], ["factor"], axis=-1)), {}, True),
    ],
)
def test_global_context_by_operation(offered, nodes, tensors, expected):
    assert offered(scaled_by(nodes, tensors)).spec.global_context is expected


def test_without_the_onnx_package_a_fixed_window_counts_as_global(onnx_free, onnx_fixed, facts, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert import_onnx(onnx_fixed, tmp_path / "fixed", **facts).spec.global_context
    assert not import_onnx(onnx_free, tmp_path / "free", **facts).spec.global_context


def refused(offered, message, nodes=None, tensors=None, changes=None, **form):
    node, weights = conv()
    model = graph(nodes or [node], tensors=weights if tensors is None else tensors, **form)
    with pytest.raises(ModelError, match=message) as caught:
        offered(model, **(changes or {}))
    assert "\n" not in str(caught.value)


def test_channels_last(offered):
    to_nchw = helper.make_node("Transpose", ["input"], ["t"], perm=[0, 3, 1, 2])
    node, weights = conv("t")
    given = ("n", 64, 64, 4)
    refused(offered, "channels last: export it as", [to_nchw, node], weights, given=given, answer=("n", 3, 64, 64))


def test_wrong_number_of_bands(offered, facts):
    changes = {"bands": facts["bands"][:3], "mean": (0, 0, 0), "std": (1, 1, 1)}
    refused(offered, r"input \(\?, 4, \?, \?\) takes 4 bands, but 3 were named", changes=changes)
    refused(offered, "fails on an input of", changes=changes, given=("n", "c", "h", "w"))


def test_wrong_number_of_classes(offered):
    legend = BUILTIN["corine-1"]
    refused(offered, "answers 3 classes, but legend 'corine-1' has 5", changes={"legend": legend})


def test_wrong_input_forms(offered):
    cast = helper.make_node("Cast", ["input"], ["f"], to=TensorProto.FLOAT)
    node, weights = conv("f", "o")
    back = helper.make_node("Cast", ["o"], ["output"], to=TensorProto.FLOAT16)
    refused(offered, r"float16.*float32 inputs", [cast, node, back], weights, kind=TensorProto.FLOAT16)
    refused(offered, "is not square", given=(1, 4, 64, 96), answer=(1, 3, 64, 96))
    same = [helper.make_node("Identity", ["input"], ["output"])]
    refused(offered, "has 3 dimensions", same, {}, given=(4, 64, 64), answer=(4, 64, 64))
    both = [helper.make_node("Add", ["input", "second"], ["s"]), conv("s")[0]]
    refused(offered, r"has 2 inputs \(input, second\)", both, conv("s")[1], inputs=2)


def test_wrong_answers(offered):
    node, weights = conv(target="s")
    best = helper.make_node("ArgMax", ["s"], ["a"], axis=1, keepdims=0)
    cast = helper.make_node("Cast", ["a"], ["output"], to=TensorProto.FLOAT)
    refused(offered, "scores per class are needed", [node, best, cast], weights, answer=("n", "h", "w"))
    pool = helper.make_node("MaxPool", ["s"], ["output"], kernel_shape=[2, 2], strides=[2, 2])
    refused(
        offered, r"answers \(64, 64\) for a window of \(128, 128\)", [node, pool], weights, answer=("n", 3, "a", "b")
    )


def test_activation_is_checked(offered):
    node, weights = conv(target="s")
    soft = helper.make_node("Softmax", ["s"], ["output"], axis=1)
    refused(offered, "use activation 'probabilities'", [node, soft], weights)
    refused(offered, "use activation 'logits'", changes={"activation": "probabilities"})
    assert offered(graph([node, soft], tensors=weights), activation="probabilities").spec.global_context is False


def test_weights_in_other_files(tmp_path, facts, monkeypatch):
    node, weights = conv()
    weights = {"w_output": np.tile(weights["w_output"], (1, 1, 9, 9))}
    made = graph([node], tensors=weights, answer=("n", 3, "a", "b"))
    onnx.save_model(made, tmp_path / "net.onnx", save_as_external_data=True, location="data", size_threshold=0)
    assert (tmp_path / "data").stat().st_size > 3000
    monkeypatch.chdir(tmp_path)  # where the data would be found
    with pytest.raises(ModelError, match="keeps its weights in other files"):
        import_onnx("net.onnx", "out", **facts)


def test_files_that_are_no_networks(tmp_path, facts):
    def refuse(name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=message):
            import_onnx(tmp_path / name, tmp_path / "m", **facts)

    refuse("empty.onnx", b"", "onnxruntime cannot open the network")
    refuse("text.onnx", b"no network", "onnxruntime cannot open the network")
    refuse("net.pt", b"PK\x03\x04", "refused: pickled weights")
    with pytest.raises(ModelError, match="there is no such file"):
        import_onnx(tmp_path / "none.onnx", tmp_path / "m", **facts)
    assert not (tmp_path / "m").exists()


def test_bad_arguments_write_nothing(offered, tmp_path):
    node, weights = conv()
    with pytest.raises(InputError, match=r"std\[3\]: 0 is not positive"):
        offered(graph([node], tensors=weights), std=(1, 1, 1, 0))
    with pytest.raises(InputError, match="depth: 10 is not a multiple"):
        offered(graph([node], tensors=weights), depth=10)
    assert not (tmp_path / "model").exists()


@pytest.fixture(scope="module")
def csmask(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    already = "ukis_csmask" in sys.modules
    bundle = import_csmask(tmp_path_factory.mktemp("csmask") / "m")
    assert already or "ukis_csmask" not in sys.modules
    return bundle


def test_csmask_is_wrapped_with_its_own_facts(csmask):
    spec = csmask.spec
    assert spec.bands == ("blue", "green", "red", "nir")
    assert spec.legend.names == ("clear", "cloud", "shadow")
    assert (spec.legend.codes, spec.legend.nodata) == ((1, 2, 3), 0)
    assert (spec.window, spec.depth, spec.stride, spec.global_context) == (256, 32, 32, True)
    assert spec.mean[0] == pytest.approx(0.2668, abs=1e-4)
    assert spec.std[3] == pytest.approx(0.2726, abs=1e-4)
    assert spec.provenance["license"] == "Apache-2.0"
    assert "10.1016/j.rse.2019.05.022" in spec.provenance["citation"]
    json.dumps(dict(spec.provenance))


@pytest.mark.parametrize("variant", ["4-band", "6-band"])
@pytest.mark.parametrize("level", ["l2a", "l1c"])
def test_every_csmask_network(variant, level, tmp_path):
    spec = import_csmask(tmp_path / "m", variant=variant, level=level).spec
    assert len(spec.bands) == int(variant[0])
    assert spec.provenance["version"] == f"1.0.0-{variant[0]}B{level.upper()}"


def test_csmask_that_cannot_be_had(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="unknown csmask network '5-band'"):
        import_csmask(tmp_path / "m", variant="5-band")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 's2seg\[csmask\]'"):
        import_csmask(tmp_path / "m")


@pytest.mark.real_data
def test_csmask_finds_the_clouds_of_a_real_scene(csmask, real_data):
    """A window at 120 m, four times coarser than the network was trained for, against the scene's own cloud classes."""
    item = real_data / "slovenia" / "sentinel-2-l2a" / "S2A_33TWL_20230818_0_L2A"
    dn, scl = read_window(item, csmask.spec.bands), read_window(item, ["scl"])[0]
    answer = open_session(csmask).classify(dn[None], 0, frozenset(["class", "confidence"]))
    seen = answer["class"][0]
    cloud, valid = np.isin(scl, (8, 9, 10)), (scl != 0) & (dn > 0).all(axis=0)
    assert 0.05 < cloud[valid].mean() < 0.95
    assert np.mean((seen == 2)[valid] == cloud[valid]) > 0.8
    assert set(np.unique(seen)) <= {1, 2, 3}
    assert answer["confidence"].min() >= 33


def read_window(item, bands) -> np.ndarray:
    links = json.loads(next(item.glob("*.json")).read_text())["assets"]
    layers = []
    for band in bands:
        with rasterio.open(item / links[band]["href"]) as source:
            layers.append(source.read(1, window=((300, 556), (300, 556))))
    return np.stack(layers).astype(np.uint16)
