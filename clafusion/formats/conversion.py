"""Conversion between the state dicts of the published code or of torchvision and ours.

`clafusion.lightning_modules.commands.convert` reads and writes the files. Nothing is computed: every tensor comes out
as it went in, under its name in the network of the inferred architecture.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clafusion import networks
from clafusion.errors import FusionError
from clafusion.formats.files import FLOATS, describe, restore
from clafusion.formats.recognition import DENSE_VGG, Recognised, recognise
from clafusion.networks.families import FAMILIES
from clafusion.networks.layers import check_sizes, check_stages

_PARALLEL = "module."  # DataParallel puts it before every name.
_CELLS = 7  # The side of the image that torchvision's VGGs flatten.


@dataclass(frozen=True)
class Conversion:
    """A converted network.

    Attributes:
        convention: The convention of its names before, `"published"` or `"torchvision"`.
        architecture: For `clafusion.restore`.
        state: The state dict of that network, which shares its memory with the state dict that was converted.
        added: Names in `state` that were missing before: biases of zero, because a network of ours has a bias in all
            layers or in none, and the counters of norms from versions of PyTorch without them.
    """

    convention: str
    architecture: dict[str, Any]
    state: dict[str, Tensor]
    added: tuple[str, ...]


def convert(state: Mapping[str, Tensor]) -> Conversion:
    """Convert the state dict of a network of the published code or of torchvision.

    The function is preserved: in eval mode the network of `restore(architecture)`, with the state loaded, has the same
    outputs. (An MLP's dropout is not in a state dict and becomes 0. A VGG of ours averages its last image, a published
    one flattens it, which is the same if that image is 1x1.)

    Args:
        state: An MLP, VGG or ResNet by the published names, a ResNet or VGG by torchvision's; not changed. The VGGs
            of torchvision, which have three dense layers, become networks with an architecture of operations, as
            `describe` returns for foreign ones; the others become networks of `clafusion.networks`.

    Raises:
        FusionError: A name is unknown, or a tensor is missing, not finite, or of another shape or type than the other
            tensors require; the message names the first.

    Example:
        >>> convert(networks.MLP(4, [3], 2).state_dict()).architecture["hidden"]
        [3]
    """
    _check_tensors(state)
    if state and all(name.startswith(_PARALLEL) for name in state):
        state = {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    recognised = recognise({name: tuple(tensor.shape) for name, tensor in state.items()})
    network = _blank(recognised.architecture)
    given = {recognised.renamed[name]: (name, tensor.detach()) for name, tensor in state.items()}
    _check_shapes(network, given)
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    expected = network.state_dict()
    complete = {
        name: given[name][1] if name in given else _neutral(network, name, blank, dtype, recognised)
        for name, blank in expected.items()
    }
    added = tuple(name for name in expected if name not in given)
    return Conversion(recognised.convention, describe(network), complete, added)


def published_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of one of our networks by the names of the published code; `convert` takes it back.

    Args:
        network: An `MLP`, `VGG` or `ResNet`; not changed. (The published code builds only the widths in its lists, its
            ResNets with the CIFAR stem. Its VGGs flatten their last image, which has to be 1x1, as ours average it.)

    Returns:
        The tensors of the network, which share its memory.

    Raises:
        FusionError: The published code has no names for the layers of such a network.

    Example:
        >>> list(published_state(networks.MLP(4, [3], 2)))
        ['fc1.weight', 'fc2.weight']
    """
    if type(network) not in FAMILIES or describe(network)["name"] == "aten":
        raise FusionError(
            f"Expected an MLP, VGG or ResNet, got {type(network).__name__} of other layers, for which the published "
            "code has no names; keep it as it is, or save network.state_dict()"
        )
    # Our layers have the names of the published ones.
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def torchvision_state(network: nn.Module) -> dict[str, Tensor]:
    """Return the state dict of a ResNet or VGG by the names of torchvision; `convert` takes it back.

    A convolution of torchvision's ResNets has no bias; that of one of ours is taken off the running mean of the norm
    behind it, so that the outputs stay what they are.

    Args:
        network: A `ResNet` with norms and the stem of ImageNet, or a VGG that came from torchvision; not changed.
            torchvision builds only some widths and depths: `load_state_dict` of the model with the same ones takes it.

    Returns:
        The tensors of the network, most of which share its memory.

    Raises:
        FusionError: torchvision has no such network.
    """
    state = {name: tensor.detach() for name, tensor in network.state_dict().items()}
    described = describe(network)
    if described["name"] == "ResNet":
        state = _without_biases(state) if described["batch_norm"] else state
        names = {name: re.sub(r"^linear\.", "fc.", name.replace(".shortcut.", ".downsample.")) for name in state}
        state = {names[name]: tensor for name, tensor in state.items()}
    try:
        theirs = recognise({name: tuple(tensor.shape) for name, tensor in state.items()}).convention == "torchvision"
        known = theirs and (described["name"] != "ResNet" or described["batch_norm"])
    except FusionError:
        known = False
    if not known:
        raise FusionError(
            "Expected a ResNet with norms and a 7x7 stem or a VGG with three dense layers, as torchvision has them, "
            f"got {described['name']} of other layers; keep it as it is, or save network.state_dict()"
        )
    return state


def _without_biases(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take the biases of convolutions off the running means of the norms behind them."""
    found = dict(state)
    for name in state:
        layer = name.removesuffix(".bias")
        norm = re.sub(r"conv([0-9])$", r"bn\1", layer).replace("shortcut.0", "shortcut.1")
        if layer != name and norm != layer:
            mean = f"{norm}.running_mean"
            found[mean] = found[mean] - found.pop(name)
    return found


class _DenseVGG(nn.Module):
    """A VGG of torchvision: adaptive pooling to 7x7, flatten, and three dense layers with dropout."""

    def __init__(self, channels: list[list[int]], batch_norm: bool, in_channels: int, dense: list[int]) -> None:
        super().__init__()
        check_sizes("dense", dense)
        width = check_stages("channels", channels)[-1][-1]
        self.features = networks.VGG(channels, 1, True, batch_norm, in_channels).features
        self.avgpool = nn.AdaptiveAvgPool2d((_CELLS, _CELLS))
        self.classifier = nn.Sequential(
            *[nn.Linear(width * _CELLS**2, dense[0]), nn.ReLU(), nn.Dropout()],
            *[nn.Linear(dense[0], dense[1]), nn.ReLU(), nn.Dropout()],
            nn.Linear(dense[1], dense[2]),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map images `[N, C, H, W]` to logits `[N, num_classes]`."""
        logits: Tensor = self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))
        return logits


def _blank(architecture: Mapping[str, Any]) -> nn.Module:
    """Build the network of a recognised architecture, without memory for its tensors."""
    with torch.device("meta"):
        if architecture["name"] == DENSE_VGG:
            return _DenseVGG(**{name: value for name, value in architecture.items() if name != "name"})
        return restore(architecture)


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    """Refuse anything but dense tensors of finite numbers, all of the same type."""
    dtype: torch.dtype | None = None
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise FusionError(
                f"Expected tensors by their names, got {type(tensor).__name__} at {name!r}; save only the state dict"
            )
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise FusionError(f"Expected a dense tensor {name!r}, got {tensor.layout}; convert it with to_dense()")
        if name.endswith("num_batches_tracked"):
            _check_dtype(name, tensor, (torch.int64,))
            continue
        _check_dtype(name, tensor, FLOATS if dtype is None else (dtype,))
        dtype = tensor.dtype
        # A forged tensor can claim to repeat one number a billion times.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise FusionError(f"Expected every number of {name!r} in the file, got fewer; save the network again")
        if not torch.isfinite(tensor).all():
            raise FusionError(f"Expected finite numbers in {name!r}, got NaN or infinity; train the network again")


def _check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        expected = " or ".join(map(str, dtypes))
        raise FusionError(f"Expected {name!r} of type {expected}, got {tensor.dtype}; convert it before saving")


def _check_shapes(network: nn.Module, given: Mapping[str, tuple[str, Tensor]]) -> None:
    """Refuse tensors that are not in the network or have another shape there; name them as in the file."""
    expected = network.state_dict()
    for name, (original, tensor) in given.items():
        if name not in expected:
            raise FusionError(f"Expected no {original!r} in such a network, got one; leave it out, or add the others")
        if tensor.shape != expected[name].shape:
            raise FusionError(
                f"Expected {original!r} of shape {list(expected[name].shape)}, which the other layers ask for, got "
                f"{list(tensor.shape)}; save the network again (grouped convolutions are none that it can have)"
            )


def _neutral(network: nn.Module, name: str, blank: Tensor, dtype: torch.dtype, recognised: Recognised) -> Tensor:
    """Return a tensor without effect for one that is missing; refuse if only the missing one would do."""
    owner, _, kind = name.rpartition(".")
    if kind == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    own = recognised.architecture["name"] != DENSE_VGG
    if own and kind == "bias" and isinstance(network.get_submodule(owner), nn.Linear | nn.Conv2d):
        return torch.zeros(blank.shape, dtype=dtype)
    raise FusionError(f"Expected {recognised.original(name)!r}, got none; save the whole network again")
