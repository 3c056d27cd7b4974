from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import torch

from s2seg.models.runtimes.tuning import fold_batch_norm


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
