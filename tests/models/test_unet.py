from dataclasses import replace

import pytest
import torch

from s2seg.errors import ModelError
from s2seg.legend import BUILTIN
from s2seg.models import build_network, pools_globally, save_bundle
from s2seg.models.runtimes.pytorch import TorchSession
from s2seg.models.runtimes.tuning import fold_batch_norm
from tests.models.conftest import smooth_pixels


def test_bands_and_classes_shape_the_network(other_spec):
    net = build_network(other_spec(legend=BUILTIN["worldcover"])).eval()
    with torch.inference_mode():
        assert net(torch.zeros(2, 4, 64, 96)).shape == (2, 11, 64, 96)


@pytest.mark.parametrize(
    "architecture",
    [
        {"name": "unet", "encoder": "resnet18", "encoder_depth": 3, "decoder_channels": [32, 16, 8]},
        {"name": "FPN", "encoder": "mobilenet_v2"},
        {"name": "Unet", "encoder": "tu-mobilenetv3_small_050"},
        {"name": "FPN", "encoder": "resnet18", "full_resolution": 8},
    ],
)
def test_other_architectures(other_spec, architecture):
    net = build_network(other_spec(architecture=architecture)).eval()
    with torch.inference_mode():
        assert net(torch.zeros(1, 4, 64, 64)).shape == (1, 3, 64, 64)


@pytest.mark.parametrize("encoder", ["resnet18", "mit_b0", "xception"])
def test_shallow_encoders_keep_only_what_they_use(other_spec, encoder):
    import segmentation_models_pytorch as smp

    shape = {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}
    spec = other_spec(architecture={"name": "Unet", "encoder": encoder, **shape})
    whole = smp.Unet(encoder, encoder_weights=None, in_channels=4, classes=3, **shape).eval()
    net = build_network(spec)
    assert net.training
    kept = whole.state_dict().keys() & net.state_dict().keys()
    assert len(kept) == len(net.state_dict()) < len(whole.state_dict())
    net.load_state_dict({name: whole.state_dict()[name] for name in kept})
    image = torch.rand(2, 4, 32, 64)
    answer = net.eval()(image)
    torch.testing.assert_close(answer, whole(image))
    answer.sum().backward()
    assert not [name for name, weight in net.named_parameters() if weight.grad is None]


def test_full_resolution_lets_a_single_pixel_count(other_spec):
    net = build_network(other_spec(architecture={"name": "Unet", "encoder": "resnet18", "full_resolution": 8})).eval()
    torch.nn.init.zeros_(net.segmentation_head[0].weight)  # what the network itself says
    image = torch.rand(1, 4, 64, 64)
    other = image.clone()
    other[:, :, 20, 31] += 1
    with torch.inference_mode():
        changed = (net(image) != net(other)).any(dim=1)[0].nonzero()
        folded = fold_batch_norm(net, 4)
        torch.testing.assert_close(folded(image), net(image))
    assert folded is not net
    assert changed.amin(0).tolist() == [19, 30]
    assert changed.amax(0).tolist() == [21, 32]


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"name": "Unett", "encoder": "resnet18"}, "unknown architecture 'Unett': did you mean Unet"),
        ({"name": "Unet", "encoder": "mobilnet_v2"}, "unknown encoder 'mobilnet_v2': did you mean mobilenet_v2"),
        ({"name": "Unet", "encoder": "tu-resnet18x"}, "unknown encoder 'tu-resnet18x': did you mean tu-resnet18"),
        ({"name": "Unet", "encoder": "qqqqq"}, "unknown encoder 'qqqqq': one of resnet18"),
        ({"name": "Unet", "encoder": "resnet18", "decoder_chanels": [1]}, "unknown architecture argument"),
        ({"name": "Unet", "encoder": "resnet18", "decoder_channels": [8, 8]}, "Unet with resnet18: "),
        ({"name": "Unet", "encoder": "resnet18", "full_resolution": "yes"}, "full_resolution is a number of channels"),
        ({"name": "onnx"}, "an ONNX network is a file"),
        # roads by which a bundle could fetch or open files
        ({"name": "Unet", "encoder": "resnet18", "encoder_weights": "imagenet"}, "unknown architecture argument"),
        ({"name": "Unet", "encoder": "tu-hf-hub:someone/net"}, "unknown encoder"),
        ({"name": "Unet", "encoder": "tu-resnet18", "checkpoint_path": "x.pth"}, "unknown architecture argument"),
    ],
)
def test_what_cannot_be_built_is_named(other_spec, architecture, message):
    with pytest.raises(ModelError, match=message):
        build_network(other_spec(architecture=architecture))


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [
        ({"name": "Unet", "encoder": "mobilenet_v2"}, False),
        ({"name": "Unet", "encoder": "resnet18"}, False),
        ({"name": "FPN", "encoder": "resnet18", "encoder_depth": 5}, True),  # group norm
        ({"name": "Unet", "encoder": "resnet18", "decoder_attention_type": "scse"}, True),
        ({"name": "Unet", "encoder": "efficientnet-b0"}, True),
        ({"name": "Unet", "encoder": "tu-mobilenetv3_small_050"}, True),
        ({"name": "DeepLabV3Plus", "encoder": "resnet18"}, True),  # pools the whole image in its pyramid
        ({"name": "Segformer", "encoder": "mit_b0"}, True),  # attention
    ],
)
def test_networks_that_see_the_whole_window(other_spec, architecture, expected):
    net = build_network(other_spec(architecture=architecture)).eval()
    assert pools_globally(net, 4) is expected


WINDOWED = {
    "name": "DPT", "encoder": "tu-vit_tiny_patch16_224", "decoder_fusion_channels": 16,
    "decoder_intermediate_channels": [16, 16, 16, 16],
}  # fmt: skip
"""Takes windows of 224 px only."""


def test_a_network_that_takes_one_size_only_runs_in_windows_of_that_size(other_spec, tmp_path):
    spec = other_spec(architecture=WINDOWED, window=224, global_context=True, depth=96)
    session = TorchSession(save_bundle(tmp_path, spec, build_network(spec).state_dict()), "cpu", "float32")
    assert session.probabilities(smooth_pixels(1, side=224)).shape == (1, 3, 224, 224)


def test_a_window_that_a_network_does_not_take_is_told_when_it_opens(other_spec, tmp_path):
    spec = other_spec(architecture=WINDOWED)
    bundle = save_bundle(tmp_path, spec, build_network(spec).state_dict())
    with pytest.raises(ModelError, match=r"no windows of 64 px \(.*224.*\): save the bundle with the window that it"):
        TorchSession(bundle, "cpu", "float32")


def test_a_stride_that_is_not_the_networks_is_told_when_it_opens(other_spec, tmp_path):
    spec = other_spec()
    bundle = save_bundle(tmp_path, replace(spec, stride=1), build_network(spec).state_dict())
    with pytest.raises(ModelError, match="the network's stride is 32, not 1"):
        TorchSession(bundle, "cpu", "float32")


def test_an_encoder_that_takes_no_small_image_keeps_its_layers(other_spec):
    swin = "tu-swin_tiny_patch4_window7_224"
    spec = other_spec(architecture={"name": "Unet", "encoder": swin, "encoder_depth": 2, "decoder_channels": [16, 8]})
    names = {tuple(build_network(replace(spec, window=window)).state_dict()) for window in (None, 224)}
    assert len(names) == 1
