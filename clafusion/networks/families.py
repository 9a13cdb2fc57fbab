"""The networks of the paper, from plain numbers: `MLP`, `VGG`, `ResNet`, and `build` for all of them by name.

Each knows its own `architecture`, a plain JSON-able dict, read off the layers it has *now*: a network whose layers
were resized in place describes its new shapes, and `build(network.architecture)` has exactly those shapes.

    >>> build({"name": "resnet34_half", "num_classes": 100}).architecture["width"]
    [32, 64, 128, 256]
"""

import inspect
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.networks.layers import (
    EXPANSION,
    Residual,
    add_conv,
    apply_layer,
    check_choice,
    check_flags,
    check_size,
    check_sizes,
    check_stages,
    global_average,
    has_bias,
    has_norm,
    initialise,
    resnet_sizes,
    weight_shape,
)
from clafusion.networks.published import PUBLISHED


class MLP(nn.Module):
    """Multilayer perceptron: flatten, then `fc1`, `fc2`, ... with ReLU between; the last one is the head.

    Args:
        in_features: Numbers per sample once flattened, C * H * W.
        hidden: Width of every hidden layer; may be empty.
        num_classes: Number of logits.
        bias: Whether the linear layers have a bias.
        batch_norm: Whether a BatchNorm (`bn1`, ...) follows every hidden linear layer.
        dropout: Probability of dropping a hidden neuron, after its ReLU.

    Shapes: `[N, ...]` with `in_features` numbers per sample to `[N, num_classes]`.

    Raises:
        FusionError: An argument is not of the type or in the range given here.

    Example:
        >>> MLP(784, [400, 200, 100], 10)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int],
        num_classes: int,
        bias: bool = False,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = [check_size("in_features", in_features), *check_sizes("hidden", hidden, empty=True)]
        sizes.append(check_size("num_classes", num_classes))
        check_flags(bias=bias, batch_norm=batch_norm)
        if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
            raise FusionError(f"Expected dropout in [0, 1), got {dropout!r}; 0 turns it off")
        self._depth = len(sizes) - 1
        for index in range(1, self._depth + 1):
            self.add_module(f"fc{index}", nn.Linear(sizes[index - 1], sizes[index], bias=bias))
            if batch_norm and index < self._depth:
                self.add_module(f"bn{index}", nn.BatchNorm1d(sizes[index]))
        self.dropout = nn.Dropout(float(dropout))

    def forward(self, x: Tensor) -> Tensor:
        """Map samples `[N, ...]` to logits `[N, num_classes]`."""
        x = torch.flatten(x, 1)
        for index in range(1, self._depth):
            x = self.dropout(F.relu(apply_layer(self, "fc", index, x)))
        return apply_layer(self, "fc", self._depth, x)

    @property
    def architecture(self) -> dict[str, Any]:
        """Name and constructor arguments of the network as it is now."""
        shapes = [weight_shape(self, f"fc{index}") for index in range(1, self._depth + 1)]
        return {
            "name": "MLP",
            "in_features": shapes[0][1],
            "hidden": [shape[0] for shape in shapes[:-1]],
            "num_classes": shapes[-1][0],
            "bias": has_bias(self),
            "batch_norm": has_norm(self),
            "dropout": self.dropout.p,
        }


class VGG(nn.Module):
    """VGG for small images: 3x3 convolutions with ReLU, a 2x2 max-pool after each stage, one linear layer.

    Source: Simonyan and Zisserman, 2015, arXiv 1409.1556, with its three dense layers replaced by one.

    Args:
        channels: Output channels of every convolution, one list per stage.
        num_classes: Number of logits.
        bias: Whether convolutions and classifier have a bias.
        batch_norm: Whether a BatchNorm follows every convolution.
        in_channels: Channels of the images.

    Shapes: `[N, in_channels, H, W]` to `[N, num_classes]`; H and W at least `2 ** len(channels)`.

    Raises:
        FusionError: An argument is not of the type or in the range given here.

    Example:
        >>> VGG([[8], [16, 16]])(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        channels: Sequence[Sequence[int]],
        num_classes: int = 10,
        bias: bool = False,
        batch_norm: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        check_flags(bias=bias, batch_norm=batch_norm)
        width = check_size("in_channels", in_channels)
        layers: list[nn.Module] = []
        for stage in check_stages("channels", channels):
            for wider in stage:
                norm = [nn.BatchNorm2d(wider)] if batch_norm else []
                layers += [nn.Conv2d(width, wider, 3, padding=1, bias=bias), *norm, nn.ReLU()]
                width = wider
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        initialise(self.features)
        self.classifier = nn.Linear(width, check_size("num_classes", num_classes), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, in_channels, H, W]` to logits `[N, num_classes]`."""
        logits: Tensor = self.classifier(global_average(self.features(x)))
        return logits

    @property
    def architecture(self) -> dict[str, Any]:
        """Name and constructor arguments of the network as it is now."""
        channels: list[list[int]] = [[]]
        for layer in self.features:
            if isinstance(layer, nn.Conv2d):
                channels[-1].append(layer.weight.shape[0])
            elif isinstance(layer, nn.MaxPool2d):
                channels.append([])
        return {
            "name": "VGG",
            "channels": channels[:-1],
            "num_classes": self.classifier.weight.shape[0],
            "bias": has_bias(self),
            "batch_norm": has_norm(self),
            "in_channels": weight_shape(self, "features.0")[1],
        }


class ResNet(nn.Module):
    """Residual network: a stem, stages of residual blocks with strides 1, 2, 2, ..., average pooling, `linear`.

    Source: He et al., 2016, arXiv 1512.03385. Each block adds its branch to its input, which passes a 1x1 projection
    where the stride or the width changes; the ReLU comes after the addition.

    Args:
        blocks: Number of blocks, one number per stage.
        width: Width of every stage; one number is the first stage's and doubles from stage to stage.
        num_classes: Number of logits.
        bias: Whether convolutions and `linear` have a bias.
        batch_norm: Whether a BatchNorm follows every convolution.
        block: `"basic"`, two 3x3 convolutions, or `"bottleneck"`, 1x1, 3x3, 1x1 with a stream 4 times the width.
        stem: `"cifar"`, one 3x3 convolution, or `"imagenet"`, 7x7 with stride 2 and a 3x3 max-pool with stride 2.
        in_channels: Channels of the images.
        inner: Width inside every block, one list per stage; `None`: the stage's width.
        stem_width: Width of a stem with a stream of its own, which the first block then projects; `None`: the first
            stage's width, and basic blocks share the stem's stream.

    Shapes: `[N, in_channels, H, W]` to `[N, num_classes]`.

    Raises:
        FusionError: An argument is not of the type or in the range given here.

    Example:
        >>> ResNet([1, 1], width=8)(torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        blocks: Sequence[int],
        width: int | Sequence[int] = 64,
        num_classes: int = 10,
        bias: bool = False,
        batch_norm: bool = False,
        block: str = "basic",
        stem: str = "cifar",
        in_channels: int = 3,
        inner: Sequence[Sequence[int]] | None = None,
        stem_width: int | None = None,
    ) -> None:
        super().__init__()
        check_flags(bias=bias, batch_norm=batch_norm)
        check_choice("block", block, EXPANSION)
        check_choice("stem", stem, ("cifar", "imagenet"))
        widths, inners = resnet_sizes(blocks, width, inner)
        stream = widths[0] if stem_width is None else check_size("stem_width", stem_width)
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        add_conv(self, 1, check_size("in_channels", in_channels), stream, kernel, stride, bias, batch_norm)
        initialise(self.get_submodule("conv1"))
        self.maxpool = nn.Sequential(*[nn.MaxPool2d(3, 2, padding=1)] * (stem == "imagenet"))
        project = stem_width is not None or block == "bottleneck"
        for index, (outputs, middles) in enumerate(zip(widths, inners, strict=True), start=1):
            stage = nn.Sequential()
            for middle in middles:
                sizes = [stream, middle, *[middle] * (block == "bottleneck"), outputs * EXPANSION[block]]
                stage.append(Residual(sizes, 2 if project and index > 1 else 1, project, bias, batch_norm))
                stream, project = sizes[-1], False
            self.add_module(f"layer{index}", stage)
            project = True  # every later stage begins with stride 2
        self.linear = nn.Linear(stream, check_size("num_classes", num_classes), bias=bias)

    @property
    def _stages(self) -> list[nn.Sequential]:
        names = (f"layer{index}" for index in range(1, len(self._modules)))
        return [cast(nn.Sequential, self._modules[name]) for name in names if name in self._modules]

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, in_channels, H, W]` to logits `[N, num_classes]`."""
        x = self.maxpool(F.relu(apply_layer(self, "conv", 1, x)))
        for stage in self._stages:
            x = stage(x)
        logits: Tensor = self.linear(global_average(x))
        return logits

    @property
    def architecture(self) -> dict[str, Any]:
        """Name and constructor arguments of the network as it is now."""
        stages = self._stages
        first = cast(Residual, stages[0][0])
        block = "bottleneck" if first.depth == 3 else "basic"
        streams = [cast(Residual, stage[-1]).sizes[-1] for stage in stages]
        if any(stream % EXPANSION[block] for stream in streams):
            raise FusionError(f"Expected bottleneck streams in multiples of 4, got {streams}; resize them to multiples")
        widths = [stream // EXPANSION[block] for stream in streams]
        inner = [[cast(Residual, unit).sizes[1] for unit in stage] for stage in stages]
        stem = weight_shape(self, "conv1")
        shared = not len(first.shortcut) or (block == "bottleneck" and stem[0] == widths[0])
        return {
            "name": "ResNet",
            "blocks": [len(stage) for stage in stages],
            "width": widths,
            "num_classes": self.linear.weight.shape[0],
            "bias": has_bias(self),
            "batch_norm": has_norm(self),
            "block": block,
            "stem": "imagenet" if len(self.maxpool) else "cifar",
            "in_channels": stem[1],
            "inner": None if inner == [[w] * len(s) for w, s in zip(widths, stages, strict=True)] else inner,
            "stem_width": None if shared else stem[0],
        }


_FAMILIES: Mapping[str, type[MLP] | type[VGG] | type[ResNet]] = {"MLP": MLP, "VGG": VGG, "ResNet": ResNet}


def published() -> tuple[str, ...]:
    """The published names that `build` knows, `vgg8` to `resnet152_doub`."""
    return tuple(PUBLISHED)


#: The classes that know their own `architecture`.
FAMILIES = (MLP, VGG, ResNet)


def build(architecture: Mapping[str, Any]) -> MLP | VGG | ResNet:
    """Build the network that a plain dict describes, with fresh random weights.

    Args:
        architecture: `"name"`, a family (`MLP`, `VGG`, `ResNet`) or one of `published()`, and that family's
            constructor arguments. A published name brings its own; those given here replace them.

    Returns:
        The network, in training mode. Equal architectures have equal state-dict names and shapes.

    Raises:
        FusionError: The name, or an argument, is unknown, missing or out of range; the message lists what is known.

    Example:
        >>> build({"name": "vgg11_half", "batch_norm": True}).architecture["channels"]
        [[64], [64], [128, 128], [256, 256], [256, 512]]
    """
    if not isinstance(architecture, Mapping) or "name" not in architecture:
        raise FusionError(f'Expected an architecture with a "name", got {architecture!r}; give it one like "resnet18"')
    name = architecture["name"]
    if name not in (*_FAMILIES, *PUBLISHED):
        raise FusionError(_unknown("a network name", name, (*_FAMILIES, *PUBLISHED)))
    arguments = {**PUBLISHED.get(name, {"name": name}), **{k: v for k, v in architecture.items() if k != "name"}}
    family = _FAMILIES[arguments.pop("name")]
    parameters = inspect.signature(family).parameters
    for argument in arguments:
        if argument not in parameters:
            raise FusionError(_unknown(f"an argument of {name}", argument, tuple(parameters)))
    missing = [key for key, p in parameters.items() if p.default is inspect.Parameter.empty and key not in arguments]
    if missing:
        raise FusionError(f"Expected {name} to be given {', '.join(missing)}, got {sorted(arguments)}; add the rest")
    return family(**arguments)


def _unknown(what: str, name: Any, known: tuple[str, ...]) -> str:
    folded = {candidate.lower(): candidate for candidate in known}
    close = [folded[match] for match in get_close_matches(str(name).lower(), folded, n=3)]
    advice = f"did you mean {' or '.join(close)}? " if close else ""
    return f"Expected {what}, got {name!r}; {advice}known are {', '.join(known)}"
