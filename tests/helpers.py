"""Shared builders of the core's tests: random networks with live neurons, permuted copies, comparisons."""

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

from clafusion import FusionOptions, Structure, networks, trace
from clafusion.report.pages import rasterised

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "tests" / "reference"


def _has_font() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return bool(rasterised({"nothing": '<svg xmlns="http://www.w3.org/2000/svg" width="1" height="1"/>'}))


HAS_FONT = _has_font()
#: What `fuse` is told of parents that nobody has trained.
UNTRAINED = ["--data", "DigitsDataModule", "--check_parents", "false"]
#: Networks that take seconds each: `make zoo` tries them.
large = pytest.mark.skipif("ZOO" not in os.environ, reason="set ZOO=1 for the large networks")
needs_font = pytest.mark.skipif(not HAS_FONT, reason="there is no font here to draw PNG files with")


def trained(network: nn.Module, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """A classifier trained on all samples at once, in eval mode."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimizer.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, x: Tensor, y: Tensor) -> float:
    """The share of samples that a network is right about."""
    return float((network(x).argmax(1) == y).double().mean())


def randomised(model: nn.Module, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model in eval mode with weights that keep activations alive, and norms with statistics of their own."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to_empty(device="cpu").to(dtype).eval()

    def normal(tensor: Tensor, std: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)

    def uniform(tensor: Tensor) -> None:
        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)

    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                normal(module.weight, (2 / module.weight[0].numel()) ** 0.5)
                if module.bias is not None:
                    normal(module.bias, 0.1)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                normal(module.running_mean, 0.1)
                normal(module.bias, 0.1)
                module.bias += 0.5  # no neuron should be silent
                uniform(module.running_var)
                uniform(module.weight)
                module.num_batches_tracked.fill_(7)
    return model


def build(architecture: Mapping[str, Any], seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One of our own networks, randomised."""
    return randomised(networks.build(architecture), seed, dtype)


def mlp(hidden: list[int], seed: int = 0, inputs: int = 12, classes: int = 4, **more: Any) -> nn.Module:
    return build({"name": "MLP", "in_features": inputs, "hidden": hidden, "num_classes": classes, **more}, seed)


def vgg(channels: list[list[int]], seed: int = 0, **more: Any) -> nn.Module:
    return build({"name": "VGG", "channels": channels, **more}, seed)


def resnet(blocks: list[int], seed: int = 0, width: int | list[int] = 4, **more: Any) -> nn.Module:
    return build({"name": "ResNet", "blocks": blocks, "width": width, **more}, seed)


def foreign(name: str, seed: int = 0) -> nn.Module:
    """A network of torchvision's, in float64; wide dense layers are narrowed, which changes no operation."""
    with torch.device("meta"):
        model = torchvision.models.get_model(name, num_classes=10)
        if name.startswith(("vgg", "alexnet")):
            _narrow(model.classifier, 24)
    return randomised(model, seed)


def _narrow(classifier: nn.Sequential, width: int) -> None:
    dense = [index for index, layer in enumerate(classifier) if isinstance(layer, nn.Linear)]
    inputs = classifier[dense[0]].in_features
    for index in dense:
        outputs = classifier[index].out_features if index == dense[-1] else width
        classifier[index] = nn.Linear(inputs, outputs)
        inputs = outputs


def images(count: int, size: int = 16, seed: int = 0, channels: int = 3) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed)).double()


def vectors(count: int, features: int = 12, seed: int = 0) -> Tensor:
    return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).double()


_NORMED = {"bias": True, "batch_norm": True}
#: By name how to make two networks of unequal depth, with norms, and samples for them.
NORMED_PAIRS = {
    "mlp": (lambda: [mlp([9, 8, 7], 0, **_NORMED), mlp([8, 7], 1, **_NORMED)], vectors(90)),
    "resnet": (lambda: [resnet([2, 1], 0, **_NORMED), resnet([1, 1], 1, width=5, **_NORMED)], images(40, 8)),
}
CORRECTIONS = ["none", "rescale", "repair", "refit"]


def permuted(
    model: nn.Module, example: Tensor, seed: int = 0, rebuild: Callable[[], nn.Module] | None = None
) -> tuple[nn.Module, dict[str, Tensor]]:
    """A copy of a network whose free spaces are permuted, and the order of the old neurons in each space.

    Works on the state dict alone, by indexing: it shares no code with the library's way of moving parameters.
    """
    import copy

    structure = trace(model, example)
    generator = torch.Generator().manual_seed(seed)
    orders = {space: torch.randperm(structure.sizes[space], generator=generator) for space in structure.free_spaces}
    other = copy.deepcopy(model) if rebuild is None else rebuild()
    other.load_state_dict({name: _permute(structure, name, t, orders) for name, t in model.state_dict().items()})
    return other, orders


def _permute(structure: Structure, name: str, tensor: Tensor, orders: Mapping[str, Tensor]) -> Tensor:
    for dim, axis in enumerate(structure.axes.get(name, ())):
        if axis is None:
            continue
        entries = list(zip(axis.of.tolist(), axis.at.tolist(), axis.turn.tolist(), strict=True))
        place = {entry: number for number, entry in enumerate(entries) if entry[0] >= 0}
        sources = []
        for number, (space, neuron, turn) in enumerate(entries):
            order = orders.get(axis.spaces[space]) if space >= 0 else None
            sources.append(number if order is None else place[space, int(order[neuron]), turn])
        tensor = tensor.index_select(dim, torch.tensor(sources))
    return tensor


def plain(**changes: Any) -> FusionOptions:
    """Options of a fusion that is transport and average alone, without a correction after them."""
    return FusionOptions(**{"correction": "none", **changes})


@torch.no_grad()
def relative_error(model: nn.Module, other: nn.Module, samples: Tensor) -> float:
    """The largest difference of the logits, relative to the largest logit."""
    expected, got = other(samples), model(samples)
    return float((got - expected).abs().max() / expected.abs().max())


def largest_difference(model: nn.Module, other: nn.Module) -> float:
    """The largest difference of any parameter or buffer."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert list(ours) == list(theirs)
    return max(float((ours[name].double() - theirs[name].double()).abs().max()) for name in ours)
