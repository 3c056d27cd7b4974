from __future__ import annotations

from dataclasses import replace

import pytest
import segmentation_models_pytorch as smp
import torch

from s2seg.models import ModelSpec, build_network
from s2seg.models.runtimes.trimming import TrimmedBlock, middle, trim_decoder
from s2seg.models.runtimes.tuning import fold_batch_norm, merge_upsampling
from tests.models.test_tuning import shaken


def trimmed_blocks(network: torch.nn.Module) -> int:
    return sum(isinstance(module, TrimmedBlock) for module in network.modules())


@pytest.mark.parametrize(
    ("name", "arguments", "margin", "cut"),
    [
        ("Unet", {}, 64, 56),
        ("Unet", {}, 96, 88),
        ("Unet", {"encoder_depth": 3, "decoder_channels": (64, 32, 16)}, 24, 16),
        ("Unet", {"decoder_interpolation": "bilinear"}, 64, 56),
        ("Unet", {}, 8, 0),  # nothing to leave out
        ("Unet", {"decoder_attention_type": "scse"}, 64, 0),  # what is left out would count
        ("FPN", {}, 64, 0),
    ],
)
def test_what_is_kept_stays_the_same(name: str, arguments: dict, margin: int, cut: int) -> None:
    network = shaken(smp.create_model(name, "resnet18", None, in_channels=4, classes=5, **arguments))
    trimmed = trim_decoder(network, 4, margin)
    assert (trimmed is network) == (cut == 0) and not trimmed_blocks(network)
    x = torch.randn(2, 4, 64 + 2 * margin, 96 + 2 * margin)
    with torch.inference_mode():
        whole, part = network(x), trimmed(x)
    assert whole.shape[-1] - part.shape[-1] == 2 * cut
    expected = middle(whole, (64, 96))
    torch.testing.assert_close(middle(part, (64, 96)), expected, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))


def test_with_less_context_answers_differ_and_nothing_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    network = shaken(smp.Unet("resnet18", encoder_weights=None, in_channels=4, classes=5))
    monkeypatch.setattr("s2seg.models.runtimes.trimming._CONTEXT", 0)
    assert trim_decoder(network, 4, 64) is network


def test_the_branch_for_single_pixels_follows(spec: ModelSpec) -> None:
    network = shaken(build_network(replace(spec, architecture={**spec.architecture, "full_resolution": 8})))
    trimmed = trim_decoder(merge_upsampling(fold_batch_norm(network, 4), 4), 4, 64)
    x = torch.randn(1, 4, 192, 160)
    with torch.inference_mode():
        whole, part = network(x), trimmed(x)
    assert part.shape[-2:] == (192 - 2 * 56, 160 - 2 * 56)
    torch.testing.assert_close(part[..., 8:-8, 8:-8], whole[..., 64:-64, 64:-64], rtol=1e-4, atol=1e-4)


def test_weights_are_there_once(network: torch.nn.Module) -> None:
    own = {p.data_ptr() for p in network.parameters()}
    assert {p.data_ptr() for p in trim_decoder(network, 4, 64).parameters()} == own
