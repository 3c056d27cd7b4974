import pickle
import subprocess
import sys
import threading
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy
import torch
from dask.base import tokenize

from s2seg.errors import ModelError, S2SegWarning
from s2seg.legend import Legend
from s2seg.models import (
    SessionRef,
    available_runtimes,
    build_network,
    import_onnx,
    load_model,
    open_session,
    save_bundle,
    summarize,
)
from s2seg.models.runtimes import LAYERS, choosing, drivers, expected_session, onnxrt, opening
from s2seg.models.runtimes.onnxrt import OnnxSession
from s2seg.models.runtimes.openvino import OpenVinoSession
from tests.models.conftest import LEGEND, expected_probabilities, export, smooth_pixels

CODES = np.array(LEGEND.codes, np.uint8)
ALL = frozenset(LAYERS)


def expected_layers(probabilities: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "class": CODES[probabilities.argmax(axis=1)],
        "confidence": np.rint(probabilities.max(axis=1) * 100).astype(np.uint8),
        "probability": np.rint(probabilities * 250).astype(np.uint8),
    }


def assert_layers_agree(answer, expected, share=1e-4, steps=1):
    """Equal but for what rounding can do, of float32: one pixel in ten thousand, one step."""
    assert answer.keys() == expected.keys()
    for layer, values in answer.items():
        assert values.dtype == np.uint8
        assert values.shape == expected[layer].shape
    assert np.mean(answer["class"] != expected["class"]) <= share
    for layer in ("confidence", "probability"):
        assert np.abs(answer[layer].astype(int) - expected[layer]).max() <= steps


@pytest.fixture(scope="module")
def fixed(onnx_fixed, facts, tmp_path_factory):
    return import_onnx(onnx_fixed, tmp_path_factory.mktemp("fixed") / "m", **facts)


@pytest.fixture(params=["torch", "openvino", "onnxruntime", "openvino of onnx"])
def session(request, bundle, free):
    runtime = request.param.split()[0]
    return open_session(bundle if request.param in ("torch", "openvino") else free, runtime, precision="float32")


def test_layers_against_a_plain_computation(session, spec, network):
    dn = smooth_pixels(1, n=2)
    expected = expected_layers(expected_probabilities(spec, network, dn))
    assert {len(np.unique(expected[layer])) > 2 for layer in expected} == {True}  # a task with something to get wrong
    assert_layers_agree(session.classify(dn, 0, ALL), expected)


def test_probabilities_against_a_plain_computation(session, spec, network):
    dn = smooth_pixels(2, n=2)
    answer = session.probabilities(dn)
    assert answer.dtype == np.float32
    assert answer.flags.c_contiguous
    np.testing.assert_allclose(answer, expected_probabilities(spec, network, dn), atol=1e-4)


def test_numbers_above_int16_are_not_negative(session, spec, network):
    dn = np.full((1, 4, 64, 64), 2500, np.uint16)
    dn[:, :, 20:40, 20:40] = [[[[65535]], [[40000]], [[32768]], [[50000]]]]
    expected = expected_probabilities(spec, network, dn)
    np.testing.assert_allclose(session.probabilities(dn), expected, atol=1e-3)


@pytest.mark.parametrize("crop", [0, 16, 31, 96])  # 96, the model's depth: its decoder leaves most of that out
def test_crop_drops_borders(session, spec, crop):
    assert spec.depth == 96
    dn = smooth_pixels(3, side=256)
    whole, cropped = session.classify(dn, 0, ALL), session.classify(dn, crop, ALL)
    for layer in ALL:
        np.testing.assert_array_equal(cropped[layer], whole[layer][..., crop : 256 - crop, crop : 256 - crop])
        assert cropped[layer].flags.c_contiguous


def test_only_what_is_asked_for(session):
    dn = smooth_pixels(4)
    whole = session.classify(dn, 0, ALL)
    for layer in LAYERS:
        answer = session.classify(dn, 0, frozenset([layer]))
        assert answer.keys() == {layer}
        np.testing.assert_array_equal(answer[layer], whole[layer])


def test_input_is_left_alone(session):
    for dn in (smooth_pixels(5), smooth_pixels(5)[:, :, ::-1], smooth_pixels(5).astype(">u2")):
        dn.flags.writeable = False  # as dask hands arrays out
        before = dn.copy()
        answer = session.classify(dn, 0, frozenset(["class"]))["class"]
        np.testing.assert_array_equal(dn, before)
        dense = np.ascontiguousarray(dn).astype(np.uint16)
        np.testing.assert_array_equal(answer, session.classify(dense, 0, frozenset(["class"]))["class"])


def test_onnxruntime_agrees_with_torch(bundle, free):
    dn = smooth_pixels(6, n=4)
    assert_layers_agree(
        open_session(free, "onnxruntime").classify(dn, 0, ALL), open_session(bundle, "torch").classify(dn, 0, ALL)
    )


def test_bfloat16_agrees_with_float32(bundle):
    dn = smooth_pixels(7, n=8)
    full = open_session(bundle, "torch").classify(dn, 32, ALL)
    half = open_session(bundle, "torch", precision="bfloat16").classify(dn, 32, ALL)
    assert np.mean(half["class"] == full["class"]) >= 0.995
    difference = np.abs(half["confidence"].astype(int) - full["confidence"])
    assert difference.mean() < 0.5
    assert difference.max() > 0  # it is another arithmetic


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_fixed_window_and_batch_of_one(fixed, spec, network, runtime):
    session = open_session(fixed, runtime, precision="float32")
    assert (fixed.spec.window, fixed.spec.depth, fixed.spec.stride) == (64, 0, 32)
    dn = smooth_pixels(8, n=3, side=64)
    assert_layers_agree(session.classify(dn, 0, ALL), expected_layers(expected_probabilities(spec, network, dn)))
    with pytest.raises(ModelError, match="takes windows of 64 px only, not 128 x 128"):
        session.classify(smooth_pixels(8), 0, ALL)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_fixed_batch_of_two(network, spec, facts, tmp_path, runtime):
    session = open_session(
        import_onnx(export(network, tmp_path / "n.onnx", batch=2), tmp_path / "m", **facts),
        runtime,
        precision="float32",
    )
    for n in (1, 2, 3):
        dn = smooth_pixels(9, n=n, side=64)
        np.testing.assert_allclose(session.probabilities(dn), expected_probabilities(spec, network, dn), atol=1e-4)


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_network_that_answers_probabilities(network, spec, facts, tmp_path, runtime):
    file = export(torch.nn.Sequential(network, torch.nn.Softmax(dim=1)).eval(), tmp_path / "n.onnx", dynamic=True)
    session = open_session(
        import_onnx(file, tmp_path / "m", **facts, activation="probabilities"), runtime, precision="float32"
    )
    dn = smooth_pixels(10)
    assert_layers_agree(session.classify(dn, 0, ALL), expected_layers(expected_probabilities(spec, network, dn)))


def test_broken_weights_do_not_make_a_map(spec, network, tmp_path, free):
    weights = {name: values.clone() for name, values in network.state_dict().items()}
    weights["segmentation_head.0.bias"][1] = torch.nan
    broken = build_network(spec)
    broken.load_state_dict(weights)
    foreign = export(broken.eval(), tmp_path / "n.onnx", dynamic=True)
    for session in (
        open_session(save_bundle(tmp_path / "m", spec, weights), "torch"),
        # import_onnx would see it: the weights broke later
        OpenVinoSession(replace(free, folder=foreign.rename(tmp_path / "model.onnx").parent), "cpu", "float32"),
    ):
        for layers in (frozenset(["class"]), ALL):
            with pytest.raises(ModelError, match="answers with NaN"):
                session.classify(smooth_pixels(11, side=64), 0, layers)
        with pytest.raises(ModelError, match="answers with NaN"):
            session.probabilities(smooth_pixels(11, side=64))


def test_summarize_by_hand():
    probabilities = np.array([[0.2, 0.5, 0.004], [0.3, 0.5, 0.992], [0.5, 0.0, 1.0000001]], np.float32)
    answer = summarize(probabilities.reshape(1, 3, 1, 3), CODES, ALL)
    assert answer["class"].tolist() == [[[200, 7, 200]]]  # the first of equals
    assert answer["confidence"].tolist() == [[[50, 50, 100]]]
    assert answer["probability"].reshape(3, 3).tolist() == [[50, 125, 1], [75, 125, 248], [125, 0, 250]]


def test_weights_that_do_not_fit(spec, network, tmp_path):
    weights = dict(network.state_dict())
    weights["segmentation_head.0.weight"] = torch.zeros(5, 16, 3, 3)
    weights["extra.weight"] = weights.pop("segmentation_head.0.bias")
    with pytest.raises(ModelError) as caught:
        open_session(save_bundle(tmp_path / "m", spec, weights))
    for part in (
        "1 layers are missing (segmentation_head.0.bias)",
        "1 layers are unknown (extra.weight)",
        "1 layers have another shape (segmentation_head.0.weight [5, 16, 3, 3] instead of [3, 16, 3, 3])",
    ):
        assert part in str(caught.value)


def test_weights_for_another_encoder(other_spec, network, tmp_path):
    changed = other_spec(architecture={"name": "Unet", "encoder": "resnet18"})
    with pytest.raises(ModelError, match=r"layers are missing .*, ...*layers are unknown"):
        open_session(save_bundle(tmp_path / "m", changed, network.state_dict()))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"runtime": "tensorflow"}, "unknown runtime 'tensorflow': auto, torch, openvino, onnxruntime"),
        ({"runtime": "onnxruntime"}, "do not run on onnxruntime: use runtime 'torch' or"),
        ({"precision": "int8"}, "unknown precision 'int8'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"device": "tensorrt"}, "device 'tensorrt' needs an ONNX network: `s2seg export` it, or use 'cuda'"),
        ({"precision": "float16"}, "float16 needs torch on a CUDA device, not openvino on cpu: use precision 'bf"),
        ({"runtime": "torch", "device": "cpu", "precision": "float16"}, "not torch on cpu"),
        ({"runtime": "openvino", "device": "cuda"}, "OpenVINO runs on 'cpu' here, not on 'cuda': use runtime 'torch'"),
        ({"device": "cuda:99"}, "torch sees no device 'cuda:99' here: use device 'cpu'"),
    ],
)
def test_choices_that_cannot_be_had(bundle, choice, message):
    for choose in (open_session, expected_session):  # a dry run says so too
        with pytest.raises(ModelError, match=message):
            choose(bundle, **choice)


def test_onnx_choices_that_cannot_be_had(free):
    with pytest.raises(ModelError, match=r"model\.onnx does not run on torch: use runtime 'onnxruntime'"):
        open_session(free, "torch")
    for precision in ("bfloat16", "float16"):
        with pytest.raises(ModelError, match=f"use 'float32', not '{precision}'"):
            expected_session(free, "onnxruntime", precision=precision)
    for device, has in (("cuda", "CUDA"), ("tensorrt:1", "TensorRT")):
        with pytest.raises(ModelError, match=f"this onnxruntime has no {has}: pip install onnxruntime-gpu"):
            open_session(free, "onnxruntime", device)


ORT = {name: f"{name}ExecutionProvider" for name in ("Tensorrt", "CUDA", "CPU")}


@pytest.fixture
def forgetful():
    """What was found out about CUDA is this test's alone."""
    for found in (onnxrt._cuda_starts, onnxrt._preload):
        found.cache_clear()
    yield
    for found in (onnxrt._cuda_starts, onnxrt._preload):
        found.cache_clear()


@pytest.mark.parametrize(
    ("installed", "device", "asked", "settled"),
    [
        (["CPU"], "auto", ["CPU"], "cpu"),
        (["Tensorrt", "CUDA", "CPU"], "auto", ["CUDA", "CPU"], "cuda"),  # TensorRT only where it is asked for
        (["Tensorrt", "CUDA", "CPU"], "cpu", ["CPU"], "cpu"),
        (["CUDA", "CPU"], "cuda:1", ["CUDA", "CPU"], "cuda:1"),
        (["Tensorrt", "CUDA", "CPU"], "tensorrt:1", ["Tensorrt", "CUDA", "CPU"], "tensorrt:1"),
    ],
)
def test_execution_providers_in_order_of_preference(free, monkeypatch, forgetful, installed, device, asked, settled):
    seen = {}

    class Recording(onnxruntime.InferenceSession):
        def __init__(self, path, options, providers, **more):
            super().__init__(path, options, providers=["CPUExecutionProvider"], **more)
            seen.clear()
            seen.update(providers)

        def get_providers(self):
            return list(seen)

    monkeypatch.setattr(onnxrt, "may_have_gpu", lambda: True)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ORT[name] for name in installed])
    monkeypatch.setattr(onnxruntime, "InferenceSession", Recording)
    session = onnxrt.OnnxSession(free, onnxrt.choose_device(free.path, device), "float32")
    assert session.name == f"onnxruntime {settled} float32"
    assert session.parallel == (1 if settled == "cpu" else 2)
    assert list(seen) == [ORT[name] for name in asked]
    number = settled.partition(":")[2] or "0"
    assert all(options["device_id"] == number for name, options in seen.items() if name != ORT["CPU"])


def lacking(library: str):
    """What onnxruntime does to load its libraries where one is missing."""
    said = f"Failed to load {library}: no such file\nPlease follow https://onnxruntime.ai to install CUDA.\n"
    return lambda: sys.stdout.write(said)


def no_cuda(*arguments, providers, **more):
    """Open a session as onnxruntime does where its providers for GPUs do not start."""
    return onnxruntime_session(*arguments, providers=[ORT["CPU"]], **more)


onnxruntime_session = onnxruntime.InferenceSession


def test_a_provider_that_does_not_start_is_no_cpu_run(free, monkeypatch, forgetful, capsys):
    monkeypatch.setattr(onnxruntime, "InferenceSession", no_cuda)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    with pytest.raises(ModelError, match=r"cannot use device 'cuda:3' \(its driver or .*\): use device 'cpu'"):
        onnxrt.start(free.path, free.weights_path, "cuda:3")
    onnxrt._preload.cache_clear()
    monkeypatch.setattr(onnxruntime, "preload_dlls", lacking("libcudnn.so.9"))
    with pytest.raises(ModelError, match=r"'cuda:3' \(Failed to load libcudnn\.so\.9: no such file\): use"):
        onnxrt.start(free.path, free.weights_path, "cuda:3")
    assert capsys.readouterr().out == ""


def test_a_provider_that_fails_is_no_cpu_run(free, monkeypatch, forgetful, capsys):
    def fail(self, *_):
        raise RuntimeError("CUDA failure 101: invalid device ordinal")

    monkeypatch.setattr(onnxruntime.InferenceSession, "_create_inference_session", fail)
    with pytest.raises(ModelError, match=r"cannot use device 'cuda:3' \(CUDA failure 101: .*\): use device 'cpu'"):
        onnxrt.start(free.path, free.weights_path, "cuda:3")
    assert capsys.readouterr().out == ""


def test_auto_goes_on_where_cuda_does_not_start(free, monkeypatch, forgetful):
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [ORT["CUDA"], ORT["CPU"]])
    monkeypatch.setattr(onnxruntime, "InferenceSession", no_cuda)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lacking("libcudnn.so.9"))
    monkeypatch.setattr(onnxrt, "may_have_gpu", lambda: False)
    assert onnxrt.choose_device(free.path, "auto") == "cpu"  # without a driver nothing is tried
    monkeypatch.setattr(onnxrt, "may_have_gpu", lambda: True)
    monkeypatch.setattr(choosing, "may_have_gpu", lambda: True)
    with pytest.warns(S2SegWarning, match=r"the GPU is left out: .*libcudnn\.so\.9") as told:
        assert expected_session(free, "onnxruntime") == ("onnxruntime", "cpu", "float32")
        assert choosing.first_choice(free, "auto", "auto", "float32")[0].device == "cpu"
    assert len(told) == 1
    with pytest.raises(ModelError, match="cannot use device 'cuda'"):  # who asks for it shall have it
        onnxrt.start(free.path, free.weights_path, onnxrt.choose_device(free.path, "cuda"))


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_is_not_looked_for(monkeypatch, hidden):
    monkeypatch.setattr(drivers, "_GPU_DRIVERS", ("/",))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert drivers.may_have_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert not drivers.may_have_gpu()


def test_a_gpu_that_fails_is_told_and_not_replaced(free, monkeypatch, capsys):
    class Failing:
        def run(self, *_):
            raise onnxrt.state.EPFail("CUDA failure 700: an illegal memory access")

        def __getattr__(self, name):  # whatever else onnxruntime asks first
            return lambda *_: None

    session = OnnxSession(free, "cpu", "float32")
    monkeypatch.setattr(session._session, "_sess", Failing())
    with pytest.raises(ModelError, match=r"onnxruntime failed on .* CUDA failure 700"):
        session.probabilities(smooth_pixels(12, side=64))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("found", "has"),
    [
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),  # torch would imitate it
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"bf16": True}, True),
        ({"neon": True, "bf16": False}, False),
        ({"architecture": "ppc64le"}, True),  # cannot be known
    ],
)
def test_torch_on_a_processor_without_bfloat16(bundle, monkeypatch, found, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    for runtime in ("torch", "torch-compiled"):
        if has:
            assert expected_session(bundle, runtime, "cpu", "bfloat16") == (runtime, "cpu", "bfloat16")
            continue
        with pytest.raises(ModelError, match="processor has no bfloat16 arithmetic: use precision 'float32'"):
            expected_session(bundle, runtime, "cpu", "bfloat16")


def test_a_gpu_without_bfloat16(bundle, monkeypatch):
    monkeypatch.setattr("s2seg.models.runtimes.pytorch.choose_device", lambda *_: "cuda")
    monkeypatch.setattr("s2seg.models.runtimes.pytorch.has_bfloat16", lambda _: False)
    with pytest.raises(ModelError, match="'cuda' has no bfloat16 arithmetic: use precision 'float16' or 'float32'"):
        expected_session(bundle, "torch", "cuda", "bfloat16")
    assert expected_session(bundle, "torch", "cuda", "float16") == ("torch", "cuda", "float16")
    assert expected_session(bundle, "torch") == ("torch", "cuda", "float32")
    assert expected_session(bundle, "torch").on_gpu


def test_a_runtime_that_is_not_installed(bundle, monkeypatch):
    monkeypatch.setattr(opening, "_by_request", {})
    monkeypatch.setitem(choosing._MODULES, "torch", ("no_such_module",))
    monkeypatch.setitem(choosing._MODULES, "openvino", ("no_such_module",))
    assert available_runtimes() == ("onnxruntime",)
    for runtime in ("torch", "openvino"):
        says = rf"needs {runtime}, which is not installed: pip install 's2seg\[{runtime}\]'"
        with pytest.raises(ModelError, match=says):
            open_session(bundle, runtime)


def test_a_network_that_would_leave_seams_is_noticed(other_spec, tmp_path):
    pooling = other_spec(architecture={"name": "Unet", "encoder": "tu-mobilenetv3_small_050"})
    weights = build_network(pooling).state_dict()
    with pytest.warns(S2SegWarning, match="save the bundle with global_context=True"):
        open_session(save_bundle(tmp_path / "m", pooling, weights), "torch")
    open_session(save_bundle(tmp_path / "n", replace(pooling, global_context=True), weights), "torch")


def test_one_session_per_process(bundle, tmp_path, spec, network):
    first = open_session(bundle)
    assert first.name == " ".join(expected_session(bundle))
    assert open_session(bundle, *first.name.split()) is first
    assert open_session(load_model(bundle.path)) is first
    assert open_session(bundle, "torch") is not first
    assert open_session(bundle, "torch") is not open_session(bundle, "torch", precision="bfloat16")
    elsewhere = save_bundle(tmp_path / "copy", spec, network.state_dict())
    assert open_session(elsewhere) is first  # the same content under another path


def test_threads_open_one_session(spec, network, tmp_path):
    changed = replace(spec, name="another one")
    ref = SessionRef(*(lambda b: (b.path, b.sha256))(save_bundle(tmp_path / "m", changed, network.state_dict())))
    opened, start = [], threading.Barrier(4)

    def task():
        start.wait()
        opened.append(ref.open())

    threads = [threading.Thread(target=task) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 4
    assert len({id(session) for session in opened}) == 1


def test_ref_travels_and_opens_the_same_session(bundle):
    ref = SessionRef(bundle.path, bundle.sha256)
    travelled = pickle.loads(pickle.dumps(ref))
    assert len(pickle.dumps(ref)) < 1000
    assert tokenize(travelled) == tokenize(ref) != tokenize(replace(ref, sha256="0" * 64))
    assert travelled.open() is ref.open() is open_session(bundle)


def test_ref_notices_another_model_in_the_same_place(tmp_path, other_spec, network):
    first = save_bundle(tmp_path / "m", other_spec(name="first"), network.state_dict())
    ref = SessionRef(first.path, first.sha256)
    save_bundle(tmp_path / "m", other_spec(name="second"), network.state_dict(), overwrite=True)
    with pytest.raises(ModelError, match="has changed since this run began"):
        ref.open()


def test_an_onnx_model_never_loads_torch(free):
    code = (
        "import sys, numpy as np; from s2seg.models import *; s = open_session(load_model(sys.argv[1]));"
        "s.classify(np.ones((1, 4, 64, 64), np.uint16), 0, {'class', 'confidence'});"
        "print(s.name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, free.path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{' '.join(expected_session(free))} False"
    assert done.stderr == ""


def test_a_damaged_onnx_file_is_noticed_before_it_runs(free, tmp_path):
    target = tmp_path / "m"
    target.mkdir()
    for file in free.folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    content = bytearray((target / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (target / "model.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="SHA-256"):
        load_model(target)


def test_an_onnx_file_with_other_classes_than_the_legend_is_named(free):
    fewer = Legend("fewer", free.spec.legend.classes[:-1])
    session = OnnxSession(replace(free, spec=replace(free.spec, legend=fewer)), "cpu", "float32")
    bands = len(free.spec.bands)
    with pytest.raises(ModelError, match=rf"answers \(1, {len(fewer) + 1}, 64, 64\) to .* another network's legend"):
        session.classify(np.ones((1, bands, 64, 64), np.uint16), 0, {"class"})


def test_saved_weights_are_the_networks_own(bundle, network):
    stored = safetensors.numpy.load_file(bundle.weights_path)
    for name, values in network.state_dict().items():
        np.testing.assert_array_equal(stored[name], values.numpy())
