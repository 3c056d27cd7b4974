from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from s2seg.errors import ModelError
from s2seg.legend import LandClass, Legend
from s2seg.models import ModelSpec, build_network, save_bundle
from s2seg.training import weights
from s2seg.training.weights import adapt_bands, start_from

LEGEND = Legend("two", (LandClass(1, "a", "#ff0000"), LandClass(2, "b", "#00ff00")))
OTHER = Legend("three", (*LEGEND.classes, LandClass(9, "c", "#0000ff")))
RENAMED = Legend("renamed", tuple(replace(c, name=c.name * 2) for c in LEGEND))
RECOLOURED = Legend("recoloured", tuple(replace(c, color="#000000") for c in LEGEND))
FIRST, HEAD = "encoder.conv1.weight", "segmentation_head.0.weight"


def make(bands, legend=LEGEND, **architecture):
    spec = ModelSpec(
        name="net",
        bands=bands,
        legend=legend,
        mean=(0.2,) * len(bands),
        std=(0.1,) * len(bands),
        architecture={"name": "Unet", "encoder": "resnet18", "encoder_depth": 3, "decoder_channels": [16, 8, 8]}
        | architecture,
    )
    torch.manual_seed(len(bands))
    return spec, build_network(spec)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A model of ours with three bands, and its files in other forms."""
    folder = tmp_path_factory.mktemp("source")
    spec, network = make(("red", "green", "nir"))
    state = {
        name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()
    }
    save_bundle(folder / "bundle", spec, state)
    save_file(state, folder / "whole.safetensors")
    encoder = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    save_file(encoder | {"fc.weight": torch.zeros(3, 5)}, folder / "encoder.safetensors")
    return folder, state


@pytest.mark.parametrize(
    ("file", "bands", "legend", "fresh"),
    [
        ("bundle", ("red", "green", "nir"), LEGEND, ()),
        ("bundle", ("red", "green", "nir"), RECOLOURED, ()),
        ("bundle", ("red", "green", "nir"), OTHER, (HEAD, "segmentation_head.0.bias")),
        ("bundle", ("red", "green", "nir"), RENAMED, (HEAD, "segmentation_head.0.bias")),
        ("whole.safetensors", ("blue", "red", "nir"), LEGEND, ()),  # as many bands: nobody knows that they are others
    ],
)
def test_whole_networks(source, file, bands, legend, fresh):
    folder, state = source
    spec, network = make(bands, legend)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    start_from(network, spec, str(folder / file))
    after = network.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in fresh)
    assert all(torch.equal(after[name], state[name]) for name in after if name not in fresh)


def test_the_branch_at_full_resolution_comes_along(tmp_path):
    spec, network = make(("red", "green"), full_resolution=4)
    save_bundle(tmp_path / "bundle", spec, network.state_dict())
    first = "full_resolution.pixels.0.weight"
    other, swapped = make(("green", "red"), full_resolution=4)
    start_from(swapped, other, tmp_path / "bundle")
    assert torch.equal(swapped.state_dict()[first], network.state_dict()[first].flip(1))
    other, fresh = make(("red", "green"), OTHER, full_resolution=4)
    before = fresh.state_dict()[first].clone()
    start_from(fresh, other, tmp_path / "bundle")
    assert torch.equal(fresh.state_dict()[first], before)
    assert torch.equal(fresh.state_dict()[FIRST], network.state_dict()[FIRST])


def test_an_encoder_alone(source):
    folder, state = source
    spec, network = make(("red", "green", "nir"), OTHER)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    start_from(network, spec, f"file://{folder / 'encoder.safetensors'}")
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, (state if name.startswith("encoder.") else before)[name])


def test_bands_of_a_name_keep_their_filters(source):
    folder, state = source
    spec, network = make(("nir", "swir16", "red", "green"))
    start_from(network, spec, folder / "bundle")
    red, green, nir = state[FIRST].unbind(1)
    expected = torch.stack([nir, state[FIRST].mean(1), red, green], 1) * 3 / 4
    assert torch.equal(network.state_dict()[FIRST], expected)


@pytest.mark.parametrize(
    ("known", "bands", "sources"),
    [
        (("red", "green", "nir"), ("red@spring", "nir@summer", "swir16@spring"), ([0], [2], [0, 1, 2])),
        (("red@spring", "red@summer", "nir@spring"), ("red", "red@summer", "nir@autumn"), ([0, 1], [1], [2])),
    ],
)
def test_bands_of_a_season_take_over_the_filters_of_their_band(known, bands, sources):
    weight = torch.rand(4, 3, 7, 7)
    expected = [weight[:, indices].mean(1) for indices in sources]
    torch.testing.assert_close(adapt_bands(weight, known, bands), torch.stack(expected, 1))


@pytest.mark.parametrize("bands", [1, 2, 6])
def test_a_flat_image_keeps_its_activations(bands):
    weight = torch.rand(4, 3, 7, 7)
    adapted = adapt_bands(weight, (), [f"band{i}" for i in range(bands)])
    torch.testing.assert_close(adapted.sum(1), weight.sum(1))


def test_imagenet_is_fetched_only_when_asked_for(monkeypatch):
    from segmentation_models_pytorch import encoders

    asked, real = [], encoders.get_encoder

    def fake(name, in_channels, depth, weights):
        asked.append((name, in_channels, depth, weights))
        torch.manual_seed(0)
        return real(name, in_channels=in_channels, depth=depth)

    monkeypatch.setattr(encoders, "get_encoder", fake)
    spec, network = make(("blue", "green", "red", "nir"))
    start_from(network, spec, None)
    assert not asked
    start_from(network, spec, "imagenet")
    assert asked == [("resnet18", 3, 3, "imagenet")]
    torch.manual_seed(0)
    published = real("resnet18", in_channels=3, depth=3).state_dict()["conv1.weight"]
    assert torch.equal(
        network.state_dict()[FIRST][:, 0], published[:, 2] * 3 / 4
    )  # blue is the third of red, green, blue


def test_no_network_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    spec, network = make(("red",))

    def unreachable(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr("segmentation_models_pytorch.encoders.get_encoder", unreachable)
    with pytest.raises(ModelError, match=r"resnet18 cannot be downloaded \(no route to host\): use weights null"):
        start_from(network, spec, "imagenet")


@pytest.mark.parametrize(
    ("make_source", "message"),
    [
        (lambda p: save_file({FIRST: torch.zeros(64, 3, 7, 7)}, p / "w.safetensors"), "layer encoder.* is missing"),
        (lambda p: (p / "w.safetensors").write_bytes(b"nonsense"), "not safetensors, or damaged"),
        (lambda p: None, "cannot be read: .*No such file"),
    ],
)
def test_files_that_do_not_do(tmp_path, make_source, message):
    make_source(tmp_path)
    spec, network = make(("red", "green", "nir"))
    with pytest.raises(ModelError, match=message):
        start_from(network, spec, tmp_path / "w.safetensors")


def test_a_misfit_names_the_layer_and_both_shapes(source):
    folder, _ = source
    spec, network = make(("red", "green", "nir"), decoder_channels=[32, 8, 8])
    with pytest.raises(
        ModelError, match=r"does not fit: layer decoder\.\S+ is 16 x 192 x 3 x 3 there and 32 x 192 x 3"
    ):
        start_from(network, spec, folder / "bundle")
    spec, network = make(("red", "green", "nir"), encoder="resnet34")
    with pytest.raises(ModelError, match=r"layer encoder\.layer\d\.\S+ .*is missing"):
        start_from(network, spec, folder / "whole.safetensors")
    spec, network = make(("red", "green", "nir"), OTHER)
    with pytest.raises(ModelError, match=r"layer segmentation_head.0.\w+ is 2.* there and 3.* here"):
        start_from(network, spec, folder / "whole.safetensors")


@pytest.mark.parametrize("name", ["w.pt", "w.ckpt", "w.safetensors.bin"])
def test_pickles_are_refused(tmp_path, name):
    torch.save({"a": torch.zeros(1)}, tmp_path / name)
    spec, network = make(("red",))
    for path in (tmp_path / name, f"https://example.com/{name}"):
        with pytest.raises(ModelError, match="refused: pickled weights"):
            start_from(network, spec, path)


def test_every_architecture_takes_any_number_of_bands(source):
    # the first convolution is found by what it takes: 3 channels also occur inside of some encoders
    for encoder in ("mobilenet_v2", "mit_b0"):
        _, network = make(("red", "nir"), encoder=encoder, encoder_depth=5, decoder_channels=[8] * 5)
        name = weights._first_convolution(network, "encoder.", 2)
        assert network.state_dict()[name].shape[1] == 2
