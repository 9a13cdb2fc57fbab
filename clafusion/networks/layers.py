"""What the network families share: checks of constructor arguments, numbered layers, and reading layers back.

Everything here is internal to `clafusion.networks.families`.
"""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clafusion.errors import FusionError

# No layer of a real classifier comes near these; a forged or mistyped architecture may, and would exhaust the memory.
_LARGEST_SIZE = 2**24
_MOST_LAYERS = 2_000

EXPANSION = {"basic": 1, "bottleneck": 4}
"""Residual block kind to the ratio of its output width to the stage's width."""


def check_size(name: str, value: Any) -> int:
    """Return `value` if it is a whole number of neurons, else raise `FusionError` naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST_SIZE:
        raise FusionError(f"Expected {name} to be a whole number from 1 to {_LARGEST_SIZE}, got {value!r}; correct it")
    return value


def check_list(name: str, values: Any, example: str, empty: bool = False) -> Sequence[Any]:
    """Return `values` if it is a list of a sensible length; an empty one is refused unless `empty`."""
    if isinstance(values, str) or not isinstance(values, Sequence) or not (values or empty):
        raise FusionError(f"Expected {name} to be a list, got {values!r}; write it like {example}")
    if len(values) > _MOST_LAYERS:
        raise FusionError(f"Expected {name} to have at most {_MOST_LAYERS} entries, got {len(values)}; shorten it")
    return values


def check_sizes(name: str, values: Any, empty: bool = False) -> list[int]:
    """Return `values` as a list of sizes; an empty one is refused unless `empty`."""
    listed = check_list(name, values, "[64, 128]", empty)
    return [check_size(f"{name}[{index}]", value) for index, value in enumerate(listed)]


def check_stages(name: str, values: Any) -> list[list[int]]:
    """Return `values` as one list of sizes per stage."""
    listed = check_list(name, values, "[[64], [128]], one list per stage")
    return [check_sizes(f"{name}[{index}]", stage) for index, stage in enumerate(listed)]


def check_flags(**flags: Any) -> None:
    """Refuse anything but True and False: a string like "no" would silently count as yes."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise FusionError(f"Expected {name} to be True or False, got {value!r}; correct it")


def check_choice(name: str, value: Any, choices: Collection[str]) -> None:
    """Refuse a value that is not among `choices`."""
    if value not in list(choices):
        raise FusionError(f"Expected {name} to be one of {', '.join(choices)}, got {value!r}; choose one of them")


def resnet_sizes(blocks: Any, width: Any, inner: Any) -> tuple[list[int], list[list[int]]]:
    """Return the width of every stage and the inner width of every block, one list per stage."""
    depths = check_sizes("blocks", blocks)
    if sum(depths) > _MOST_LAYERS:
        raise FusionError(f"Expected at most {_MOST_LAYERS} residual blocks, got {sum(depths)}; correct blocks")
    if isinstance(width, int):
        width = [check_size("width", width) * 2**stage for stage in range(len(depths))]
    widths = check_sizes("width", width)
    if len(widths) != len(depths):
        raise FusionError(f"Expected {len(depths)} widths, one per stage, got {len(widths)}; match width to blocks")
    if inner is None:
        return widths, [[width] * depth for width, depth in zip(widths, depths, strict=True)]
    inners = check_stages("inner", inner)
    if [len(stage) for stage in inners] != depths:
        counts = [len(stage) for stage in inners]
        raise FusionError(f"Expected one inner width per block, {depths} of them, got {counts}; match inner to blocks")
    return widths, inners


def add_conv(
    parent: nn.Module, index: int, inputs: int, outputs: int, kernel: int, stride: int, bias: bool, batch_norm: bool
) -> None:
    """Add `conv{index}`, padded to keep the resolution, and `bn{index}` where asked for."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
    parent.add_module(f"conv{index}", conv)
    if batch_norm:
        parent.add_module(f"bn{index}", nn.BatchNorm2d(outputs))


def apply_layer(parent: nn.Module, kind: str, index: int, x: Tensor) -> Tensor:
    """Apply the numbered layer `kind{index}` and the `bn{index}` after it, where there is one."""
    out: Tensor = getattr(parent, f"{kind}{index}")(x)
    norm = getattr(parent, f"bn{index}", None)
    return out if norm is None else norm(out)


def global_average(x: Tensor) -> Tensor:
    """Average every channel over its positions: `[N, C, H, W]` to `[N, C]`."""
    return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)


def weight_shape(parent: nn.Module, name: str) -> torch.Size:
    """Shape of the weight of the layer called `name`: what its sizes are now, whatever its attributes say."""
    weight = parent.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight.shape


class Residual(nn.Module):
    """`relu(branch(x) + shortcut(x))`; the branch is conv1, conv2(, conv3) with ReLU between, `sizes` wide."""

    def __init__(self, sizes: list[int], stride: int, project: bool, bias: bool, batch_norm: bool) -> None:
        super().__init__()
        self.depth = len(sizes) - 1
        kernels = [3, 3] if self.depth == 2 else [1, 3, 1]
        for index, kernel in enumerate(kernels, start=1):
            step = stride if index == self.depth - 1 else 1  # the first 3x3 convolution, as published
            add_conv(self, index, sizes[index - 1], sizes[index], kernel, step, bias, batch_norm)
        self.shortcut = nn.Sequential()
        if project:
            self.shortcut.append(nn.Conv2d(sizes[0], sizes[-1], 1, stride, bias=bias))
        if project and batch_norm:
            self.shortcut.append(nn.BatchNorm2d(sizes[-1]))
        initialise(self.shortcut)

    def forward(self, x: Tensor) -> Tensor:
        """Map the stream `[N, C, H, W]` to the next."""
        out = x
        for index in range(1, self.depth):
            out = F.relu(apply_layer(self, "conv", index, out))
        return F.relu(apply_layer(self, "conv", self.depth, out) + self.shortcut(x))

    @property
    def sizes(self) -> list[int]:
        """Widths after conv1, conv2(, conv3), preceded by the input's."""
        shapes = [weight_shape(self, f"conv{index}") for index in range(1, self.depth + 1)]
        return [shapes[0][1], *[shape[0] for shape in shapes]]


def initialise(module: nn.Module) -> None:
    """Draw the weights of all convolutions in `module` from He et al.'s normal distribution (fan out), in place.

    Residual branches are left at torch's smaller default: without normalisation every He-initialised branch doubles
    the variance of the stream, and the logits of a fresh ResNet34 have a standard deviation above 10 instead of 0.1.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def has_bias(network: nn.Module) -> bool:
    """Whether the convolutions and linear layers have a bias.

    Raises:
        FusionError: Some have one and some do not, which no constructor argument can say.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    biased = sum(layer.bias is not None for layer in layers)
    if 0 < biased < len(layers):
        raise FusionError(f"Expected a bias in all layers or in none, got {biased} of {len(layers)}; add zero biases")
    return biased > 0


def has_norm(network: nn.Module) -> bool:
    """Whether the network normalises batches."""
    return any(isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) for layer in network.modules())
