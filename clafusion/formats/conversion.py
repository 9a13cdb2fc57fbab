"""Networks of the published code and of torchvision as ours, and ours by the names of the published code.

State dicts in, state dicts out; `clafusion.lightning_modules.commands.convert` reads and writes the files. Nothing is
computed: every tensor comes out as it went in, under its name in the network of the inferred architecture.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clafusion import networks
from clafusion.errors import FusionError
from clafusion.formats.files import describe, restore
from clafusion.formats.recognition import DENSE_VGG, Recognised, recognise
from clafusion.networks.layers import check_sizes, check_stages

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PARALLEL = "module."  # what DataParallel puts before every name
_CELLS = 7  # a side of the image that torchvision's VGGs flatten


@dataclass(frozen=True)
class Conversion:
    """A network of somebody else's as one of ours.

    Attributes:
        convention: `"published"` or `"torchvision"`: whose names it had.
        architecture: For `clafusion.restore`.
        state: The state dict of that network, which shares its memory with the state dict that was converted.
        added: Names in `state` that were not there: biases of zero, because a network of ours has a bias in all
            layers or in none, and the counters of norms that were saved before there were any.
    """

    convention: str
    architecture: dict[str, Any]
    state: dict[str, Tensor]
    added: tuple[str, ...]


def convert(state: Mapping[str, Tensor]) -> Conversion:
    """Convert the state dict of a network of the published code or of torchvision.

    The function is preserved: in eval mode the network that `restore(architecture)` gives, with the state loaded, has
    the outputs of the other one. (An MLP's dropout is not in a state dict and becomes 0; a VGG of ours averages its
    last image, a published one flattens it: those are the same where that image is 1x1.)

    Args:
        state: An MLP, VGG or ResNet by the published names, a ResNet or VGG by torchvision's; not changed. The VGGs
            of torchvision, which have three dense layers, become networks with an architecture of operations, as
            `describe` gives for foreign ones; everything else becomes one of `clafusion.networks`.

    Raises:
        FusionError: A name is unknown, a tensor is missing, of another shape or type than the others ask for, or not
            finite; the first is named.

    Example:
        >>> convert(networks.MLP(4, [3], 2).state_dict()).architecture["hidden"]
        [3]
    """
    _check_tensors(state)
    if state and all(name.startswith(_PARALLEL) for name in state):
        state = {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    found = recognise({name: tuple(tensor.shape) for name, tensor in state.items()})
    network = _blank(found.architecture)
    given = {found.renamed[name]: (name, tensor.detach()) for name, tensor in state.items()}
    _check_shapes(network, given)
    dtype = next(tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    expected = network.state_dict()
    complete = {
        name: given[name][1] if name in given else _neutral(network, name, blank, dtype, found)
        for name, blank in expected.items()
    }
    added = tuple(name for name in expected if name not in given)
    return Conversion(found.convention, describe(network), complete, added)


def published_state(network: nn.Module) -> dict[str, Tensor]:
    """The state dict of one of our networks by the names of the published code; `convert` takes it back.

    Args:
        network: An `MLP`, `VGG` or `ResNet`; not changed. (The published code builds only the widths in its lists, its
            ResNets with the CIFAR stem; a VGG of it flattens its last image, which has to be 1x1, as ours averages it.)

    Returns:
        The tensors of the network, which share its memory.

    Raises:
        FusionError: The published code has no names for the layers of such a network.

    Example:
        >>> list(published_state(networks.MLP(4, [3], 2)))
        ['fc1.weight', 'fc2.weight']
    """
    name = describe(network)["name"]
    if name not in ("MLP", "VGG", "ResNet"):
        raise FusionError(
            f"Expected an MLP, VGG or ResNet, got {type(network).__name__} of other layers, for which the published "
            "code has no names; keep it as it is, or save network.state_dict()"
        )
    # Our layers have the names of the published ones.
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


class _DenseVGG(nn.Module):
    """VGG as torchvision has it: adaptive pooling to 7x7, flatten, and three dense layers with dropout."""

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
    """The network of an architecture that was recognised, without memory for its tensors."""
    with torch.device("meta"):
        if architecture["name"] == DENSE_VGG:
            return _DenseVGG(**{name: value for name, value in architecture.items() if name != "name"})
        return restore(architecture)


def _check_tensors(state: Mapping[str, Tensor]) -> None:
    """Refuse whatever is no dense tensor of finite numbers, or of another type than the first."""
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
        _check_dtype(name, tensor, _DTYPES if dtype is None else (dtype,))
        dtype = tensor.dtype
        # A forged tensor can claim to repeat one number a billion times; only what is in the file is looked at.
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise FusionError(f"Expected every number of {name!r} in the file, got fewer; save the network again")
        if not torch.isfinite(tensor).all():
            raise FusionError(f"Expected finite numbers in {name!r}, got NaN or infinity; train the network again")


def _check_dtype(name: str, tensor: Tensor, known: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in known:
        expected = " or ".join(map(str, known))
        raise FusionError(f"Expected {name!r} of type {expected}, got {tensor.dtype}; convert it before saving")


def _check_shapes(network: nn.Module, given: Mapping[str, tuple[str, Tensor]]) -> None:
    """Refuse tensors that have no place in the network or another shape, by the names that they came with."""
    expected = network.state_dict()
    for name, (original, tensor) in given.items():
        if name not in expected:
            raise FusionError(f"Expected no {original!r} in such a network, got one; leave it out, or add the others")
        if tensor.shape != expected[name].shape:
            raise FusionError(
                f"Expected {original!r} of shape {list(expected[name].shape)}, which the other layers ask for, got "
                f"{list(tensor.shape)}; save the network again (grouped convolutions are none that it can have)"
            )


def _neutral(network: nn.Module, name: str, blank: Tensor, dtype: torch.dtype, found: Recognised) -> Tensor:
    """The tensor that changes nothing where the other network has none; refused where there is none such."""
    owner, _, kind = name.rpartition(".")
    if kind == "num_batches_tracked":
        return torch.zeros((), dtype=torch.int64)
    own = found.architecture["name"] != DENSE_VGG
    if own and kind == "bias" and isinstance(network.get_submodule(owner), nn.Linear | nn.Conv2d):
        return torch.zeros(blank.shape, dtype=dtype)
    raise FusionError(f"Expected {found.original(name)!r}, got none; save the whole network again")
