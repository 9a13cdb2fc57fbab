"""Networks of torchvision, timm and Hugging Face, each fused with a copy of itself whose neurons are permuted."""

import warnings

import pytest
import torch
from torch import nn
from torchvision.models.swin_transformer import SwinTransformer

from clafusion import FusionOptions, fuse
from clafusion.tracing.outputs import logits_in
from clafusion.tracing.reading import structure_of
from tests.helpers import large
from tests.invariance import permuted_copy
from tests.zoo import ZOO

#: Tried always; the others with `make zoo`.
SMALL = ("torchvision/vit", "torchvision/swin", "timm/vit_qk_norm", "timm/eva02", "timm/cait", "timm/mixer")
#: ECA reads channels in their order. Linear attention divides by sums that are nearly zero with these weights, so that
#: the order of summation shows: the check of every fusion refuses it.
REFUSED = ("timm/ecaresnet26t", "timm/efficientvit_b0")
#: What runs of a network twice give in different order of summation.
TOLERANCE = 1e-6


def lively(model: nn.Module, samples: torch.Tensor) -> nn.Module:
    """The network in float64 with biases that are not zero, and norms that have the statistics of the samples."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or float(parameter.std()) < 1e-3:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                module.momentum = None
                module.reset_running_stats()
            elif "drop" in type(module).__name__.lower():
                module.eval()
        model(samples)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in SMALL else large) for name in ZOO if name not in REFUSED]
)
@torch.no_grad()
def test_a_permuted_copy_is_recovered(name):
    pytest.importorskip(name.partition("/")[0])
    sample = ZOO[name]
    torch.manual_seed(0)
    samples = torch.randn(32, *sample.shape).double()
    model = lively(sample.make(), samples)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        other = permuted_copy(model, structure_of(model, samples))
        fused = fuse([model, other], [samples], FusionOptions(correction="none", features="preactivations")).model
    expected, got = logits_in(model(samples)), logits_in(fused(samples))
    assert float((logits_in(other(samples)) - expected).abs().max() / expected.abs().max()) < TOLERANCE
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert float((got - expected).abs().max() / expected.abs().max()) < TOLERANCE


@pytest.mark.slow
@torch.no_grad()
def test_swins_of_unequal_depth_match_shifted_windows_with_shifted_ones():
    torch.manual_seed(0)
    settings = {"patch_size": [4, 4], "embed_dim": 16, "num_heads": [2, 4], "window_size": [4, 4], "num_classes": 5}
    deep, shallow = (SwinTransformer(depths=[blocks, 2], **settings).eval() for blocks in (4, 2))
    samples = torch.randn(40, 3, 32, 32)
    fusion = fuse([shallow, deep], [samples], FusionOptions(correction="none", weights=(1, 0)))
    # Attention and perceptron of every block by turns; the windows of every second block are shifted.
    plain, _, shifted, _ = fusion.alignments[0][2]
    assert plain in (0, 4) and shifted in (2, 6)
    assert torch.allclose(fusion.model(samples), shallow(samples), atol=1e-5)
