import hashlib
import http.server
import json
import pickle
import struct
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pytest
import safetensors.numpy
import torch

from s2seg.errors import InputError, ModelError, OutputError
from s2seg.models import describe, load_model, save_bundle
from s2seg.models.spec import ModelSpec


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {"a.weight": rng.standard_normal((3, 4), np.float32), "a.count": np.array(5)}


@pytest.fixture
def folder(tmp_path, spec, weights) -> Path:
    """A good bundle for tests to spoil."""
    save_bundle(tmp_path / "model", spec, weights)
    return tmp_path / "model"


def refusal(path) -> str:
    with pytest.raises(ModelError) as caught:
        load_model(path)
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text


def test_round_trip(folder, spec, weights):
    bundle = load_model(folder)
    assert bundle.spec == spec
    assert bundle.path == str(folder)
    assert bundle.weights_path == folder / "weights.safetensors"
    assert not bundle.is_onnx
    back = safetensors.numpy.load_file(bundle.weights_path)
    assert back.keys() == weights.keys()
    for name, values in weights.items():
        np.testing.assert_array_equal(back[name], values)
        assert (back[name].shape, back[name].dtype) == (values.shape, values.dtype)


def test_memory_order_does_not_change_weights(tmp_path, spec):
    dense = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).reshape(2, 3, 4, 4)
    given = {
        "channels_last": dense.to(memory_format=torch.channels_last),
        "view": dense[:, ::2],
        "half": dense.to(torch.bfloat16).requires_grad_(),
    }
    back = safetensors.numpy.load_file(save_bundle(tmp_path / "m", spec, given).weights_path)
    np.testing.assert_array_equal(back["channels_last"], dense.numpy())
    np.testing.assert_array_equal(back["view"], dense.numpy()[:, ::2])
    np.testing.assert_array_equal(back["half"], dense.numpy())  # these values are exact in bfloat16


def test_hash_names_spec_and_weights(tmp_path, spec, other_spec, weights):
    def sha(spec, weights, name):
        return save_bundle(tmp_path / name, spec, weights).sha256

    first = sha(spec, weights, "a")
    assert first == sha(spec, weights, "b")
    assert first != sha(other_spec(depth=32), weights, "c")
    assert first != sha(spec, weights | {"a.count": np.array(6)}, "d")


def test_relative_paths_survive_a_change_of_folder(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    bundle = load_model("model")
    monkeypatch.chdir("/")
    assert load_model(bundle.path).sha256 == bundle.sha256


def test_saving_again_needs_overwrite(folder, spec, other_spec, weights):
    with pytest.raises(OutputError, match=r"a model is there already.*--overwrite"):
        save_bundle(folder, spec, weights)
    assert save_bundle(folder, other_spec(depth=32), weights, overwrite=True).spec.depth == 32
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_overwriting_never_removes_anything_else(tmp_path, spec, weights):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(OutputError, match="holds other things"):
        save_bundle(tmp_path / "photos", spec, weights, overwrite=True)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="a file of this name exists"):
        save_bundle(tmp_path / "file", spec, weights, overwrite=True)
    with pytest.raises(OutputError, match="local folder"):
        save_bundle("s3://bucket/model", spec, weights)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "photos"]


def test_overwriting_never_removes_a_training_beside_the_model(folder, spec, weights):
    (folder / "checkpoints").mkdir()
    with pytest.raises(OutputError, match=r"holds more than a model, which is never removed \(checkpoints\)"):
        save_bundle(folder, spec, weights, overwrite=True)
    assert (folder / "checkpoints").exists()


def test_a_failed_save_leaves_nothing(tmp_path, spec, folder):
    before = load_model(folder).sha256
    unwritable = {"a": np.zeros(3, np.complex256)}
    for target in (tmp_path / "new", folder):
        with pytest.raises(OutputError):
            save_bundle(target, spec, unwritable, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert load_model(folder).sha256 == before


def test_a_folder_below_a_file_cannot_be_written(tmp_path, spec, weights):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"file.model: .*(File exists|Not a directory)"):
        save_bundle(tmp_path / "file" / "model", spec, weights)


def test_onnx_spec_has_no_state_dict(tmp_path, other_spec, weights):
    with pytest.raises(InputError, match="import_onnx"):
        save_bundle(tmp_path / "m", other_spec(architecture={"name": "onnx"}), weights)


def test_not_a_bundle(tmp_path):
    assert "there is no such folder" in refusal(tmp_path / "nowhere")
    assert "not a model bundle: no model.json" in refusal(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    assert "a folder with model.json and weights is needed" in refusal(tmp_path / "notes.txt")
    (tmp_path / "net.onnx").write_bytes(b"\x08\x07")
    assert "s2seg models import" in refusal(tmp_path / "net.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "model.json is not JSON"),
        ("[" * 100_000, "model.json is not JSON"),
        ("9" * 5000, "model.json is not JSON"),
        ("[]", "model.json: not a STAC item"),
        (b"\xff\xfe\x00", "model.json is not JSON"),
        ('{"type": "Feature", "properties": {}}', "properties.s2seg:version is missing"),
    ],
)
def test_spoiled_model_json(folder, content, message):
    (folder / "model.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in refusal(folder)


def test_path_to_the_wrong_key(folder):
    item = json.loads((folder / "model.json").read_text())
    item["properties"]["s2seg:legend"]["classes"][1]["color"] = "red"
    (folder / "model.json").write_text(json.dumps(item))
    assert "model.json: properties.s2seg:class 'middle': color 'red'" in refusal(folder)


def test_missing_weights(folder):
    (folder / "weights.safetensors").unlink()
    assert "weights.safetensors is missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 60, -1])
def test_truncated_weights(folder, keep):
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "truncated or damaged" in refusal(folder)


def test_one_flipped_bit(folder):
    file = folder / "weights.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    assert "its SHA-256 is not the recorded one" in refusal(folder)


def test_weights_of_another_model(folder, tmp_path, spec, weights):
    save_bundle(tmp_path / "other", spec, weights | {"a.count": np.array(6)})
    (tmp_path / "other" / "weights.safetensors").replace(folder / "weights.safetensors")
    assert "another model's" in refusal(folder)


class Bomb:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("protocol", [2, 5, "zip"])
@pytest.mark.parametrize("name", ["best.pt", "best.pth", "last.ckpt", "m.pkl", "pytorch_model.bin", "innocent"])
def test_pickles_are_refused_unopened(tmp_path, name, protocol):
    mark = tmp_path / "mark"
    file = tmp_path / name
    if protocol == "zip":
        torch.save({"a": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps(Bomb(mark), protocol=protocol))
    assert "refused: pickled weights can run code" in refusal(file)
    if name != "innocent":
        assert "refused: pickled weights can run code" in refusal(tmp_path)
    assert not mark.exists()


def test_a_pickle_under_another_name_is_refused(folder, tmp_path):
    torch.save({"a": Bomb(tmp_path / "mark")}, folder / "weights.safetensors")
    assert "refused: pickled weights" in refusal(folder)
    assert not (tmp_path / "mark").exists()


def test_a_header_as_long_as_a_pickle_is_old_is_no_pickle(tmp_path, spec):
    # 0x0280 = 640 bytes of header: the file opens with the bytes 0x80 0x02, as a pickle of protocol 2 does
    save_bundle(tmp_path / "m", spec, {"a": np.zeros(2, np.float32)})
    file = tmp_path / "m" / "weights.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).ljust(640).encode()
    file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    item = json.loads((tmp_path / "m" / "model.json").read_text())
    item["properties"]["s2seg:weights_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (tmp_path / "m" / "model.json").write_text(json.dumps(item))
    assert file.read_bytes()[:2] == b"\x80\x02"
    assert load_model(tmp_path / "m").spec == spec


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("S2SEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def remote(folder):
    """The bundle in fsspec's memory, where its file listing can be changed."""
    fs = fsspec.filesystem("memory")
    upload(fs, folder)
    yield fs
    fs.store.clear()


def upload(fs, folder):
    for file in folder.iterdir():
        fs.pipe_file(f"/models/net/{file.name}", file.read_bytes())


def test_url_is_downloaded_once(remote, cache, folder):
    first = load_model("memory://models/net/")
    assert (first.path, first.sha256) == ("memory://models/net/", load_model(folder).sha256)
    assert first.folder.parent == cache
    remote.rm("/models/net/weights.safetensors")  # no longer needed
    assert load_model("memory://models/net").folder == first.folder
    assert [p.name for p in cache.iterdir()] == [first.folder.name]


def test_a_damaged_cache_is_fetched_again(remote, cache):
    first = load_model("memory://models/net")
    first.weights_path.write_bytes(b"short")
    assert load_model("memory://models/net") == first


def test_a_changed_remote_model_is_another_model(remote, cache, tmp_path, spec, weights):
    first = load_model("memory://models/net")
    save_bundle(tmp_path / "new", spec, weights | {"a.count": np.array(6)})
    upload(remote, tmp_path / "new")
    assert load_model("memory://models/net").sha256 == load_model(tmp_path / "new").sha256 != first.sha256


def test_bad_urls(remote, cache):
    assert "model.json or the weights are not there" in refusal("memory://models/nothing")
    assert "refused: pickled" in refusal("memory://models/net.pt")
    assert "cannot be read" in refusal("nosuchprotocol://models/net")
    remote.pipe_file("/models/net/weights.safetensors", b"short")
    assert "truncated or damaged" in refusal("memory://models/net")
    remote.rm("/models/net/weights.safetensors")
    assert "weights are not there" in refusal("memory://models/net")
    assert list(cache.iterdir()) == []


def test_http_and_file_urls(folder, cache):
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert load_model(f"{url}/model").sha256 == load_model(folder).sha256
        assert "not there" in refusal(f"{url}/other")
        server.shutdown()
    assert "cannot be read" in refusal(f"{url}/model")
    assert load_model(folder.as_uri()).folder == folder


def test_describe_says_what_a_person_asks(bundle):
    rows = dict(describe(bundle))
    assert rows["name"] == "test net"
    assert rows["sha256"] == bundle.sha256
    assert rows["architecture"] == "name=Unet, encoder=mobilenet_v2"
    assert rows["runtimes"] == "openvino, torch"
    assert rows["band nir"] == "(DN x 0.0001 - 0.25) / 0.12"
    assert rows["class 200"] == "bright #f0f0f0"
    assert rows["stride, depth"] == "32, 96 px"
    assert rows["metric miou"] == "0.5"


def test_models_and_bundles_load_no_runtime(folder):
    code = (
        "import sys, s2seg.models as m; b = m.load_model(sys.argv[1]); m.describe(b); m.available_runtimes();"
        "print(sorted({'torch', 'onnxruntime', 'onnx', 'timm'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_spec_is_what_loading_gives(bundle, spec):
    assert isinstance(bundle.spec, ModelSpec)
    assert bundle.spec == spec
