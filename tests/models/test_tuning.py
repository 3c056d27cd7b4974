from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch

from s2seg.models.runtimes.tuning import MergedBlock, fold_batch_norm, merge_upsampling


def norms(network: torch.nn.Module) -> int:
    return sum(isinstance(m, torch.nn.BatchNorm2d) for m in network.modules())


def shaken(network: torch.nn.Module) -> torch.nn.Module:
    """Give the normalisations statistics that matter, as fitting would."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.5, 2)
    return network.eval()


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "resnet18"])
def test_folding_keeps_the_answers(encoder: str) -> None:
    network = shaken(smp.Unet(encoder, encoder_weights=None, in_channels=4, classes=5))
    before = norms(network)
    folded = fold_batch_norm(network, 4)
    assert norms(folded) == 0 and norms(network) == before > 10
    x = torch.randn(2, 4, 128, 96)
    with torch.inference_mode():
        a, b = network(x), folded(x)
    assert (a.argmax(1) == b.argmax(1)).float().mean() > 0.9999
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max()))


def test_a_network_whose_order_misleads_is_left_alone() -> None:
    class Backwards(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = torch.nn.Conv2d(3, 3, 1), torch.nn.BatchNorm2d(3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(torch.relu(self.norm(x)))

    network = shaken(Backwards())
    assert fold_batch_norm(network, 3) is network


@pytest.mark.parametrize(
    ("name", "arguments", "merged"),
    [
        ("Unet", {}, 5),
        ("Unet", {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}, 3),
        ("UnetPlusPlus", {}, 11),
        ("Unet", {"decoder_attention_type": "scse"}, 0),  # attends to both images together
        ("Unet", {"decoder_interpolation": "bilinear"}, 0),
        ("FPN", {}, 0),
    ],
)
def test_merging_keeps_the_answers(name: str, arguments: dict, merged: int) -> None:
    network = shaken(smp.create_model(name, "resnet18", None, in_channels=4, classes=5, **arguments))
    faster = merge_upsampling(fold_batch_norm(network, 4), 4)
    assert sum(isinstance(m, MergedBlock) for m in faster.modules()) == merged
    x = torch.randn(2, 4, 128, 96)
    with torch.inference_mode():
        a, b = network(x), faster(x)
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(a.abs().max()))


def test_one_block_is_the_same_to_its_last_row() -> None:
    torch.manual_seed(0)
    block = smp.decoders.unet.decoder.UnetDecoderBlock(3, 2, 4, use_norm=False).double()
    merged = MergedBlock(block, 3).double()
    coarse, beside = torch.randn(1, 3, 4, 6).double(), torch.randn(1, 2, 8, 12).double()
    torch.testing.assert_close(merged(coarse, 8, 12, beside), block(coarse, 8, 12, beside))
    torch.testing.assert_close(merged(coarse, 8, 12, skip_connection=beside), merged(coarse, beside))
