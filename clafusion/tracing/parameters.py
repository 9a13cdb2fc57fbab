"""Parameters as data: move them along maps of their neurons, and build the network that has room for them."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clafusion.tracing.capture import strip_hooks
from clafusion.tracing.structure import Axis, Structure

State = Mapping[str, Tensor]
#: Numbers that are gathered at once: 1 MiB in single precision, which fits into a cache.
BLOCK = 2**18


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached; they still share the model's memory."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach() for name, tensor in tensors}


def move(tensor: Tensor, axes: Sequence[Axis | None], maps: Sequence[Tensor | None]) -> Tensor:
    """Apply to every axis of a parameter the map of the neurons that it indexes.

    Along an axis, `new[j] = sum_i map[i, j] old[i]`; a repeated axis is moved in blocks of `repeat`.

    Args:
        tensor: the parameter.
        axes: what its axes index.
        maps: for every axis a map [old neurons, new neurons], or None to leave the axis as it is.

    Returns:
        The moved parameter, in its own precision.
    """
    for dim, (axis, mapping) in enumerate(zip(axes, maps, strict=True)):
        if axis is None or mapping is None:
            continue
        if (copied := copied_rows(mapping)) is not None:
            tensor = tensor.index_select(dim, _expanded(copied, axis))
            continue
        blocks = tensor.movedim(dim, 0)
        rest = blocks.shape[1:]
        blocks = blocks.reshape(mapping.shape[0], -1)
        moved = mapping.T.to(tensor.dtype) @ blocks
        tensor = moved.reshape(mapping.shape[1] * axis.repeat, *rest).movedim(0, dim)
    return tensor


def add_moved(
    total: Tensor, share: float, tensor: Tensor, axes: Sequence[Axis | None], maps: Sequence[Tensor | None]
) -> None:
    """Add a share of the moved parameter, see `move`, to a tensor that is floating and in at least single precision.

    If the rows of the result are copies of others, they are gathered few at a time: all at once would take new memory
    of the size of the parameter, and longer.
    """
    tensor = move(tensor.to(total.dtype), axes, [None, *maps[1:]])
    axis, mapping = axes[0], maps[0]
    copied = None if axis is None or mapping is None else copied_rows(mapping)
    if axis is None or copied is None:
        total.add_(move(tensor, axes, [mapping, *(None for _ in maps[1:])]), alpha=share)
        return
    size = max(1, BLOCK // max(1, total[0].numel()))
    for part, places in zip(total.split(size), _expanded(copied, axis).split(size), strict=True):
        part.add_(tensor.index_select(0, places), alpha=share)


def _expanded(places: Tensor, axis: Axis) -> Tensor:
    """Places of neurons as places along an axis that repeats each of them."""
    return (places[:, None] * axis.repeat + torch.arange(axis.repeat, device=places.device)).flatten()


def copied_rows(mapping: Tensor) -> Tensor | None:
    """The neuron that each new one is a copy of; None where some are mixtures."""
    largest, places = mapping.max(0)
    return places if (largest == 1).all() and mapping.count_nonzero() == len(places) else None


def resized(model: nn.Module, structure: Structure, sizes: Mapping[str, int]) -> nn.Module:
    """A copy of a network in eval mode whose neuron spaces have other sizes; its parameters are zero.

    Args:
        model: the network to copy; left as it is.
        structure: its structure.
        sizes: the new number of neurons of each space; a space that is not named keeps its size.
    """
    state = state_of(model)
    memo = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    network = strip_hooks(copy.deepcopy(model, memo)).eval()  # the shared tensors are replaced below
    for name, axes in structure.axes.items():
        path, _, key = name.rpartition(".")
        module = network.get_submodule(path)
        old = state[name]
        shape = [
            length if axis is None else sizes.get(axis.space, structure.sizes[axis.space]) * axis.repeat
            for length, axis in zip(old.shape, axes, strict=True)
        ]
        fresh = torch.zeros(shape, dtype=old.dtype, device=old.device)
        if key in module._parameters:
            module._parameters[key] = nn.Parameter(fresh)
        else:
            module._buffers[key] = fresh
    for layer in structure.layers:
        _declare_sizes(network.get_submodule(layer.name))
    return network


def load_state(network: nn.Module, state: State) -> nn.Module:
    """Copy tensors into a network, in its own dtype; returns the network."""
    with torch.no_grad():
        for name, tensor in state_of(network).items():
            tensor.copy_(state[name])
    return network


def _declare_sizes(module: nn.Module) -> None:
    """Bring the size attributes of a layer in line with its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv2d):
        module.out_channels = module.weight.shape[0]
        depthwise = module.groups > 1
        module.groups = module.out_channels if depthwise else 1
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
        module.num_features = module.weight.shape[0]
