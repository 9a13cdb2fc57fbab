"""Recognition of the network that a state dict belongs to, by the names and the shapes in it.

Names follow one of two conventions: that of the published code of CLAFusion, which is that of `clafusion.networks`, or
torchvision's. The convention decides what shapes cannot tell: a ResNet's stages have strides 1, 2, 2, ..., a VGG ends
in a max-pool and an index without weights is one, an MLP drops no neurons, norms have torch's default eps.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from clafusion.errors import FusionError
from clafusion.networks.layers import EXPANSION

Shapes = Mapping[str, tuple[int, ...]]

#: The name of the architecture of torchvision's VGGs, which have three dense layers; `networks.VGG` has one.
DENSE_VGG = "dense VGG"

_COUNT = r"[1-9][0-9]{0,3}"  # More layers than any network has, but no more, whatever a forged name says.
_INDEX = rf"(?:0|{_COUNT})"
_LAYER = r"(?:weight|bias)"
_NORM = r"(?:weight|bias|running_mean|running_var|num_batches_tracked)"
_CONVENTIONS: Mapping[str, Mapping[str, str]] = {
    "published": {"shortcut": "shortcut", "head": "linear"},
    "torchvision": {"shortcut": "downsample", "head": "fc"},
}


@dataclass(frozen=True)
class Recognised:
    """The network that a state dict belongs to.

    Attributes:
        convention: The convention of the names; an MLP, and a VGG with one dense layer, count as published.
        architecture: For `clafusion.networks.build`. A VGG with three dense layers is not one of ours: its name is
            `DENSE_VGG`, and it has `"channels"`, `"batch_norm"`, `"in_channels"` and the widths `"dense"`.
        renamed: The name in that network of every name in the state dict.
    """

    convention: Literal["published", "torchvision"]
    architecture: dict[str, Any]
    renamed: dict[str, str]

    def original(self, name: str) -> str:
        """Return the convention's name for a parameter of the network, which the state dict may lack."""
        names = _CONVENTIONS[self.convention]
        return re.sub(r"^linear\.", f"{names['head']}.", name).replace(".shortcut.", f".{names['shortcut']}.")


def recognise(shapes: Shapes) -> Recognised:
    """Recognise the network that a state dict belongs to.

    It reads only the shapes that it needs; building the network shows whether the others agree.

    Args:
        shapes: Every name in the state dict with the shape of its tensor.

    Raises:
        FusionError: A name is unknown, a layer is missing, or neither our networks nor torchvision's ResNets and VGGs
            have such layers; the message names the first.

    Example:
        >>> recognise({"fc1.weight": (16, 64), "fc2.weight": (10, 16)}).architecture["hidden"]
        [16]
    """
    families: Mapping[str, Callable[[Shapes], Recognised]] = {
        r"conv1\.|layer[0-9]+\.": _resnet,
        r"features\.|classifier\.": _vgg,
        r"fc[0-9]+\.": _mlp,
    }
    for pattern, family in families.items():
        if any(re.match(pattern, name) for name in shapes):
            return family(shapes)
    first = next((f"{name!r} of shape {list(shape)}" for name, shape in shapes.items()), "none")
    raise FusionError(
        "Expected the parameters of an MLP, VGG or ResNet by the names of the published code or of torchvision, "
        f"got {first}; rename them, or give class_path in --model.architecture and train there"
    )


def _mlp(shapes: Shapes) -> Recognised:
    _check_names(shapes, rf"fc{_COUNT}\.{_LAYER}|bn{_COUNT}\.{_NORM}", "MLP")
    depth = _count(shapes, r"fc([0-9]+)\.", 1, "fc{}.weight")
    weights = [_shape(shapes, f"fc{index}.weight", 2) for index in range(1, depth + 1)]
    architecture = {
        "name": "MLP",
        "in_features": weights[0][1],
        "hidden": [weight[0] for weight in weights[:-1]],
        "num_classes": weights[-1][0],
        **_flags(shapes),
    }
    return Recognised("published", architecture, {name: name for name in shapes})


def _resnet(shapes: Shapes) -> Recognised:
    of_torchvision = any(name.startswith("fc.") or ".downsample." in name for name in shapes)
    convention: Literal["published", "torchvision"] = "torchvision" if of_torchvision else "published"
    shortcut, head = _CONVENTIONS[convention].values()
    unit = rf"conv[123]\.{_LAYER}|bn[123]\.{_NORM}|{shortcut}\.0\.{_LAYER}|{shortcut}\.1\.{_NORM}"
    pattern = rf"(?:conv1|{head})\.{_LAYER}|bn1\.{_NORM}|layer{_COUNT}\.{_INDEX}\.(?:{unit})"
    _check_names(shapes, pattern, f"{convention} ResNet")
    renamed = {name: name.replace(f".{shortcut}.", ".shortcut.") for name in shapes}
    renamed = {name: re.sub(rf"^{head}\.", "linear.", new) for name, new in renamed.items()}
    architecture = _resnet_architecture({new: shapes[name] for name, new in renamed.items()})
    if of_torchvision and architecture["stem"] != "imagenet":
        raise FusionError(
            f"Expected a 7x7 stem, as torchvision's ResNets have, got conv1.weight of shape "
            f"{list(shapes['conv1.weight'])}; its stride and the pooling after it are not in the file: rename "
            "downsample to shortcut and fc to linear if they are 1 and none"
        )
    return Recognised(convention, architecture, renamed)


def _resnet_architecture(shapes: Shapes) -> dict[str, Any]:
    """Return the arguments of `networks.ResNet`, from shapes by our names."""
    stem = _shape(shapes, "conv1.weight", 4)
    stages = _count(shapes, r"layer([0-9]+)\.", 1, "layer{}.0.conv1.weight")
    blocks = [_count(shapes, rf"layer{k}\.([0-9]+)\.", 0, f"layer{k}.{{}}.conv1.weight") for k in range(1, stages + 1)]
    block = "bottleneck" if "layer1.0.conv3.weight" in shapes else "basic"
    last = "conv3" if block == "bottleneck" else "conv2"
    inner = [
        [_shape(shapes, f"layer{k}.{j}.conv1.weight", 4)[0] for j in range(blocks[k - 1])] for k in range(1, stages + 1)
    ]
    streams = [_shape(shapes, f"layer{k}.0.{last}.weight", 4)[0] for k in range(1, stages + 1)]
    if any(stream % EXPANSION[block] for stream in streams):
        raise FusionError(f"Expected bottleneck blocks with outputs in multiples of 4, got {streams}; pad them")
    widths = [stream // EXPANSION[block] for stream in streams]
    # A projection in the first block means a stem with a stream of its own, unless a bottleneck widens the stream.
    projected = "layer1.0.shortcut.0.weight" in shapes
    shared = not projected or (block == "bottleneck" and stem[0] == widths[0])
    return {
        "name": "ResNet",
        "blocks": blocks,
        "width": widths,
        "num_classes": _shape(shapes, "linear.weight", 2)[0],
        **_flags(shapes),
        "block": block,
        "stem": "imagenet" if stem[2:] == (7, 7) else "cifar",
        "in_channels": stem[1],
        "inner": None if all(set(row) == {width} for row, width in zip(inner, widths, strict=True)) else inner,
        "stem_width": None if shared else stem[0],
    }


def _vgg(shapes: Shapes) -> Recognised:
    _check_names(shapes, rf"features\.{_INDEX}\.{_NORM}|classifier\.(?:[036]\.)?{_LAYER}", "VGG")
    channels = _vgg_channels(shapes)
    arguments = {
        "channels": channels,
        "batch_norm": _flags(shapes)["batch_norm"],
        "in_channels": shapes["features.0.weight"][1],
    }
    renamed = {name: name for name in shapes}
    if "classifier.weight" not in shapes:
        dense = [_shape(shapes, f"classifier.{index}.weight", 2)[0] for index in (0, 3, 6)]
        return Recognised("torchvision", {"name": DENSE_VGG, **arguments, "dense": dense}, renamed)
    outputs, inputs = _shape(shapes, "classifier.weight", 2)
    width = channels[-1][-1]
    if inputs != width and inputs % width == 0:
        raise FusionError(
            f"Expected classifier.weight with {width} inputs, one per channel of the last convolution, got {inputs}: "
            "our VGG averages the last image, which this one flattens; train it on images that end up 1x1"
        )
    own = {"name": "VGG", **arguments, "num_classes": outputs, "bias": _flags(shapes)["bias"]}
    return Recognised("published", own, renamed)


def _vgg_channels(shapes: Shapes) -> list[list[int]]:
    """Return the widths of the convolutions, one list per stage.

    A convolution, the norm right after it, its ReLU and a max-pool take one index each, so the gaps between the indices
    of convolutions tell where the max-pools are.
    """
    indices = sorted({int(name.split(".")[1]) for name in shapes if name.startswith("features.")})
    convs = [index for index in indices if len(shapes.get(f"features.{index}.weight", ())) == 4]
    if convs[:1] != [0]:
        raise FusionError("Expected the convolution features.0.weight, got none; save the whole network again")
    norms = sorted(set(indices) - set(convs))
    if norms[:1] not in ([], [1]):
        raise FusionError(
            f"Expected no norms or one right after each convolution, got features.{norms[0]} after features.0; "
            "a norm elsewhere, such as after the ReLU, is none that our VGG can express"
        )
    step = 3 if norms else 2
    channels = [[shapes["features.0.weight"][0]]]
    for before, index in pairwise(convs):
        if index - before not in (step, step + 1):
            raise FusionError(
                f"Expected a convolution at features.{before + step}, or at {before + step + 1} after a max-pool, "
                f"got the next at features.{index}; a layer is missing, or there is one that our VGG does not have"
            )
        channels += [[]] * (index - before == step + 1)
        channels[-1] = [*channels[-1], shapes[f"features.{index}.weight"][0]]
    return channels


def _check_names(shapes: Shapes, pattern: str, family: str) -> None:
    """Refuse names that do not match, naming the first."""
    for name in shapes:
        if not re.fullmatch(pattern, name):
            raise FusionError(
                f"Expected only parameters of a {family}, got {name!r}; leave it out, or give the network's class "
                "with class_path in --model.architecture"
            )


def _count(shapes: Shapes, pattern: str, first: int, missing: str) -> int:
    """Return the number of layers that match, which are numbered from `first` on; refuse a gap as `missing`."""
    numbers = {int(match[1]) for name in shapes if (match := re.match(pattern, name))}
    for number in range(first, max(numbers, default=first) + 1):
        if number not in numbers:
            raise FusionError(f"Expected {missing.format(number)!r}, got none; save the whole network again")
    return len(numbers)


def _shape(shapes: Shapes, name: str, dims: int) -> tuple[int, ...]:
    """Return the shape of a tensor that must be there, with that many dimensions."""
    if name not in shapes:
        raise FusionError(f"Expected {name!r}, got none; save the whole network again")
    if len(shapes[name]) != dims:
        raise FusionError(f"Expected {name!r} with {dims} dimensions, got shape {list(shapes[name])}; save it again")
    return shapes[name]


def _flags(shapes: Shapes) -> dict[str, bool]:
    """Return whether layers have a bias, and whether there are norms, whose weights have one dimension."""
    layers = [name for name, shape in shapes.items() if name.endswith(".weight") and len(shape) > 1]
    return {
        "bias": any(f"{name.removesuffix('weight')}bias" in shapes for name in layers),
        "batch_norm": any(
            name.endswith((".running_mean", ".running_var")) or (name.endswith(".weight") and len(shapes[name]) == 1)
            for name in shapes
        ),
    }
