"""Networks of timm: which are understood, which are refused and by what name; skipped where timm is not installed."""

import re

import pytest
import torch
from torch import nn

from clafusion import FusionError, fuse, load_network, save_network
from clafusion.formats.files import check_saved
from clafusion.fusion.verification import check_free
from clafusion.tracing.reading import trace
from tests.helpers import ROOT, large, plain

timm = pytest.importorskip("timm")
PAGE = (ROOT / "docs/tutorials/timm.md").read_text()


def made(name: str, seed: int = 0, **more: int) -> nn.Module:
    """A network of timm with weights of its own, and norms that are not neutral."""
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=10, **more).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return network


def images(network: nn.Module, count: int = 2) -> torch.Tensor:
    """Images of the size of a network, small ones where it takes any."""
    settings = network.default_cfg
    size = settings["input_size"][1] if settings.get("fixed_input_size") else 64
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def listed(heading: str) -> dict[str, str]:
    """The names in the rows of one of the page's tables, and the last cell of their row."""
    part = PAGE.partition(f"### {heading}\n")[2].partition("\n#")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| `")]
    return {name: row[-1] for row in rows for name in re.findall(r"`([\w.]+)`", row[0])}


#: Of each kind one that is small.
SMALL = ("resnet14t", "regnetx_002", "mobilenetv2_050", "convnext_atto", "vit_tiny_patch16_224", "mixer_s32_224")


@pytest.mark.slow
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in SMALL else large) for name in listed("Taken")])
def test_these_are_understood_and_could_be_saved(name):
    network = made(name)
    samples = images(network)
    check_free(trace(network, samples), name)
    check_saved(network, samples, name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason"), listed("Refused").items())
def test_these_are_refused_by_name(name, reason):
    network = made(name)
    with pytest.raises(FusionError, match=re.escape(reason.strip("`"))):
        check_free(trace(network, images(network)), name)


def fused_and_loaded(parents: list[nn.Module], path: str) -> None:
    samples = images(parents[0], 4)
    fused = fuse(parents, [samples], plain(num_samples=4)).model
    save_network(fused, path)
    with torch.no_grad():
        assert fused(samples).shape == (4, 10)
        assert torch.equal(load_network(path)(samples), fused(samples))


def test_transformers_of_two_depths_are_fused_and_saved(tmp_path):
    fused_and_loaded([made("test_vit", 0), made("test_vit", 1, depth=3)], tmp_path / "fused.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("deep", "shallow"),
    [
        pytest.param("seresnet34", "seresnet18", marks=large),
        ("mobilenetv2_100", "mobilenetv2_050"),
        pytest.param("regnetx_004", "regnetx_002", marks=large),
    ],
)
def test_pairs_are_fused_and_saved(deep, shallow, tmp_path):
    fused_and_loaded([made(deep, 0), made(shallow, 1)], tmp_path / "fused.safetensors")


@pytest.mark.slow
def test_a_network_fused_with_itself_stays_itself():
    samples = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = made("mnasnet_050")
    # So few samples tell neurons apart by distance only: many a ReLU lets just one of them through.
    options = plain(num_samples=4, cost="euclidean", features="preactivations")
    fused = fuse([network, network], [samples], options).model
    with torch.no_grad():
        assert torch.allclose(fused(samples), network(samples), rtol=1e-3, atol=1e-3)
