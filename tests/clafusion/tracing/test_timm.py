"""Networks of timm: which are understood, which are refused and by what name; skipped where timm is not installed."""

import re

import pytest
import torch
from torch import nn

from clafusion import FusionError, fuse, load_network, save_network, trace
from tests.helpers import ROOT, plain

timm = pytest.importorskip("timm")
PAGE = (ROOT / "docs/tutorials/timm.md").read_text()


@pytest.fixture(scope="module")
def split_norms():
    """The function that the page shows."""
    scope: dict = {}
    [code] = re.findall(r"(from timm\.layers import .*?return network\n)", PAGE, re.DOTALL)
    exec(compile(code, "timm.md", "exec"), scope)
    return scope["split_norms"]


def made(name: str, seed: int = 0) -> nn.Module:
    """A network of timm with weights of its own, and norms that are not neutral."""
    torch.manual_seed(seed)
    network = timm.create_model(name, num_classes=10).eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.1)
    return network


def listed(heading: str) -> dict[str, str]:
    """The names in the rows of one of the page's tables, and the last cell of their row."""
    part = PAGE.partition(f"### {heading}\n")[2].partition("\n#")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in part.splitlines() if line.startswith("| `")]
    return {name: row[-1] for row in rows for name in re.findall(r"`([\w.]+)`", row[0])}


@pytest.mark.slow
@pytest.mark.parametrize("name", listed("Taken as they are"))
def test_these_are_understood_as_they_are(name):
    assert trace(made(name), torch.randn(2, 3, 32, 32)).stages


@pytest.mark.slow
@pytest.mark.parametrize("name", listed("Taken after `split_norms`"))
def test_these_are_understood_with_their_norms_apart(name, split_norms):
    with pytest.raises(FusionError, match="num_batches_tracked"):
        trace(made(name), torch.randn(2, 3, 32, 32))
    assert trace(split_norms(made(name)), torch.randn(2, 3, 32, 32)).stages


@pytest.mark.slow
@pytest.mark.parametrize(("name", "reason"), listed("Refused").items())
def test_these_are_refused_by_name(name, reason, split_norms):
    network = split_norms(made(name))
    size = network.default_cfg["input_size"][1] if network.default_cfg.get("fixed_input_size") else 64
    expected = reason.strip("`")
    if name.startswith("vit") and torch.__version__.startswith("2.6."):
        expected = "Expected a network that torch.fx can trace"  # it cannot trace attention yet
    with pytest.raises(FusionError, match=re.escape(expected)):
        trace(network, torch.randn(2, 3, size, size))


def test_two_are_fused_and_saved(tmp_path):
    samples = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    parents = [made("test_resnet", seed) for seed in (0, 1)]
    fused = fuse(parents, [samples], plain(num_samples=4)).model
    save_network(fused, tmp_path / "fused.safetensors")
    again = load_network(tmp_path / "fused.safetensors")
    with torch.no_grad():
        assert fused(samples).shape == (4, 10)
        assert torch.equal(again(samples), fused(samples))


@pytest.mark.slow
def test_a_network_fused_with_itself_stays_itself(split_norms):
    samples = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    network = split_norms(made("mnasnet_050"))
    # So few samples tell neurons apart by distance only: many a ReLU lets just one of them through.
    options = plain(num_samples=4, cost="euclidean", features="preactivations")
    fused = fuse([network, network], [samples], options).model
    with torch.no_grad():
        assert torch.allclose(fused(samples), network(samples), rtol=1e-3, atol=1e-3)
