"""Networks as their users write them: fused with a permuted copy, with another depth where they have one, and saved."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clafusion import FusionError, FusionOptions, fuse, load_network, save_network
from clafusion.tracing.reading import structure_of
from tests.invariance import permuted_copy

pytestmark = [
    # Norms that follow no layer, and a layer of more inputs than there are samples.
    pytest.mark.filterwarnings("ignore:Expected layers and norms that can be corrected:UserWarning"),
    pytest.mark.filterwarnings("ignore:Expected at least as many observations:UserWarning"),
]


def conv(inputs: int, outputs: int, kernel: int = 3, **more: int) -> nn.Sequential:
    """A convolution with BatchNorm and ReLU."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **more)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Residual(nn.Module):
    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x)


def resnet9(blocks: int = 1) -> nn.Module:
    """The network of fast CIFAR training: convolutions, pooling, and residual blocks of two convolutions."""

    def residual(width: int) -> list[nn.Module]:
        return [Residual(nn.Sequential(conv(width, width), conv(width, width))) for _ in range(blocks)]

    first = [conv(3, 8), conv(8, 12), nn.MaxPool2d(2), *residual(12)]
    return nn.Sequential(
        *first, conv(12, 16), nn.MaxPool2d(2), conv(16, 20), nn.MaxPool2d(2), *residual(20),
        nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(20, 5, bias=False),
    )  # fmt: skip


def nin(blocks: int = 1) -> nn.Module:
    """Network in network: convolutions of 1 x 1 after each, and classes that are channels."""

    def block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        ones = [layer for _ in range(1 + blocks) for layer in (nn.Conv2d(outputs, outputs, 1), nn.ReLU())]
        return [nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(), *ones]

    return nn.Sequential(
        *block(3, 10, 5), nn.MaxPool2d(3, 2, ceil_mode=True), nn.Dropout(), *block(10, 12, 3),
        nn.Conv2d(12, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def all_cnn(blocks: int = 1) -> nn.Module:
    """Strided convolutions instead of pooling."""
    layers: list[nn.Module] = [nn.Conv2d(3, 10, 3, padding=1), nn.ReLU()]
    for _ in range(blocks):
        layers += [nn.Conv2d(10, 10, 3, padding=1), nn.ReLU()]
    layers += [nn.Conv2d(10, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 5, 1)]
    return nn.Sequential(*layers, nn.AvgPool2d(8), nn.Flatten(1))


class RepVGGBlock(nn.Module):
    """Branches of 3 x 3, of 1 x 1 and none, before they are merged."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.narrow = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
        self.identity = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.wide(x) + self.narrow(x) + self.identity(x))


def repvgg(blocks: int = 1) -> nn.Module:
    body = [RepVGGBlock(10) for _ in range(1 + blocks)]
    return nn.Sequential(conv(3, 10), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5))


def convmixer(blocks: int = 1) -> nn.Module:
    """Patches, depth-wise convolutions with a shortcut, GELU and BatchNorm."""

    def block(width: int) -> list[nn.Module]:
        deep = nn.Sequential(nn.Conv2d(width, width, 5, groups=width, padding=2), nn.GELU(), nn.BatchNorm2d(width))
        return [Residual(deep), nn.Conv2d(width, width, 1), nn.GELU(), nn.BatchNorm2d(width)]

    body = [layer for _ in range(1 + blocks) for layer in block(10)]
    stem = [nn.Conv2d(3, 10, 4, stride=4), nn.GELU(), nn.BatchNorm2d(10)]
    return nn.Sequential(*stem, *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5))


class WideAndDeep(nn.Module):
    """A linear model and a deep one whose logits are added."""

    def __init__(self, blocks: int = 1) -> None:
        super().__init__()
        hidden = [layer for _ in range(blocks) for layer in (nn.Linear(12, 12), nn.ReLU())]
        self.wide = nn.Linear(3 * 16 * 16, 5)
        self.deep = nn.Sequential(nn.Linear(3 * 16 * 16, 12), nn.ReLU(), *hidden, nn.Linear(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.wide(x) + self.deep(x)


class DenseBlock(nn.Module):
    """All features so far beside each other."""

    def __init__(self, inputs: int, growth: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(inputs + k * growth), nn.ReLU(), nn.Conv2d(inputs + k * growth, growth, 3, padding=1)
            )
            for k in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


def densenet(blocks: int = 1) -> nn.Module:
    body = [DenseBlock(8, 4, 2 + blocks), nn.BatchNorm2d(8 + 4 * (2 + blocks)), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 + 4 * (2 + blocks), 5)]
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), *body, *head)


class ResNeXtBlock(nn.Module):
    """A bottleneck with a convolution in groups."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.grouped = conv(width, 12, 1), conv(12, 12, 3, groups=4)
        self.expand = nn.Sequential(nn.Conv2d(12, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.expand(self.grouped(self.reduce(x))))


def resnext(blocks: int = 1) -> nn.Module:
    body = [ResNeXtBlock(10) for _ in range(1 + blocks)]
    return nn.Sequential(conv(3, 10), *body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, 5))


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "ResNet9": resnet9,
    "NiN": nin,
    "All-CNN": all_cnn,
    "RepVGG": repvgg,
    "ConvMixer": convmixer,
    "wide and deep": WideAndDeep,
    "DenseNet": densenet,
    "ResNeXt": resnext,
}
#: In these a parent may lack a block: an identity can stand in its place.
DEPTHS = ("ResNet9", "NiN", "All-CNN", "ResNeXt")
SAMPLES = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double()


def made(name: str, seed: int, *blocks: int) -> nn.Module:
    """A network in eval mode with live neurons, whose norms have the statistics of the samples."""
    torch.manual_seed(seed)
    network = NETWORKS[name](*blocks).double().train()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
            elif isinstance(module, nn.Dropout):
                module.p = 0.0
        network(SAMPLES)
    return network.eval()


@pytest.mark.parametrize("correction", ["none", "refit"])
@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_with_a_permuted_copy_it_is_itself(name, correction):
    network = made(name, 0)
    other = permuted_copy(network, structure_of(network, SAMPLES))
    options = FusionOptions(correction=correction, targets="matched", features="preactivations")
    fused = fuse([network, other], [SAMPLES], options).model
    expected = network(SAMPLES)
    assert float((fused(SAMPLES) - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_with_other_weights_it_is_fused_and_saved(name, tmp_path):
    fused = fuse([made(name, 0), made(name, 1)], [SAMPLES], FusionOptions()).model
    save_network(fused, tmp_path / "fused.safetensors")
    assert fused(SAMPLES).isfinite().all()
    torch.testing.assert_close(load_network(tmp_path / "fused.safetensors")(SAMPLES), fused(SAMPLES))


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_two_depths_are_fused_or_refused_by_name(name):
    parents = [made(name, 0, 2), made(name, 1, 1)]
    if name in DEPTHS:
        assert fuse(parents, [SAMPLES], FusionOptions()).model(SAMPLES).isfinite().all()
    else:
        with pytest.raises(FusionError, match="^Expected (parent 1 to|networks with the same stages)"):
            fuse(parents, [SAMPLES], FusionOptions())
