"""Networks with room for other numbers of neurons."""

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.tracing.exporting import bare, shell
from clafusion.tracing.parameters import state_of
from clafusion.tracing.reading import on_network, structure_of
from clafusion.tracing.spaces import Axis
from clafusion.tracing.structure import Structure


def room_for(
    model: nn.Module, structure: Structure, sizes: Mapping[str, int], samples: Tensor
) -> tuple[nn.Module, Structure]:
    """A copy of a network whose neuron spaces have given sizes, and its structure, with the same names.

    Args:
        model: the network to copy; left as it is.
        structure: its structure.
        sizes: of every space.
        samples: to trace the copy with, if it has other sizes.

    Raises:
        FusionError: if the class of the network cannot have other sizes.
    """
    if all(sizes[name] == size for name, size in structure.sizes.items()):
        network = bare(copy.deepcopy(model))
        return network, on_network(structure, network)
    network = resized(model, structure, sizes)
    name = type(model).__name__
    advice = "make the deepest parent the anchor, choose parents of equal widths, or keep width 1"
    try:
        result = structure_of(network, samples)
    except FusionError as error:
        raise FusionError(f"Expected {name} to run at other widths, got an error ({error}); {advice}") from error
    if [unit.signature for unit in result.units] != [unit.signature for unit in structure.units] or any(
        result.sizes.get(space) != size for space, size in sizes.items()
    ):
        raise FusionError(f"Expected {name} to be the same network at other widths, got another one; {advice}")
    return network, result


def resized(model: nn.Module, structure: Structure, sizes: Mapping[str, int]) -> nn.Module:
    """A copy of a network in eval mode whose neuron spaces have other sizes; its parameters are zero.

    Args:
        model: the network to copy; left as it is.
        structure: its structure.
        sizes: the new number of neurons of each space; a space that is not named keeps its size.
    """
    state = state_of(model)
    aliases = _aliases(model)
    network = shell(model)  # the tensors that it shares with the model are replaced below
    kept = set(state)
    for name, axes in structure.axes.items():
        old = state[name]
        shape = [
            length if axis is None else resized_length(length, axis, structure.sizes, sizes)
            for length, axis in zip(old.shape, axes, strict=True)
        ]
        _replace(network, aliases[name], torch.zeros(shape, dtype=old.dtype, device=old.device))
        kept -= set(aliases[name])
    for module in network.modules():
        _declare_sizes(module)
    for name in sorted(kept):  # what is not of neurons is copied
        if name == aliases[name][0]:
            _replace(network, aliases[name], state[name].clone())
    return network


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """All the names of every tensor of a network, by each of them: tied tensors have several."""
    names: dict[int, list[str]] = {}
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    return {name: group for group in names.values() for name in group}


def _replace(network: nn.Module, names: Sequence[str], tensor: Tensor) -> None:
    """Put one tensor in the place of a parameter or buffer, under all of its names."""
    parameter = nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
    for name in names:
        path, _, key = name.rpartition(".")
        module = network.get_submodule(path)
        if key in module._parameters:
            module._parameters[key] = parameter
        else:
            module._buffers[key] = tensor


def resized_length(length: int, axis: Axis, old: Mapping[str, int], new: Mapping[str, int]) -> int:
    """The length of an axis once its spaces have other sizes; of a grouped weight that of one group stays apart."""
    total = int((axis.of < 0).sum())
    for place, space in enumerate(axis.spaces):
        turns = int(axis.turn[axis.of == place].max()) + 1
        total += turns * new.get(space, old[space])
    return total * length // len(axis.of)


def _declare_sizes(module: nn.Module) -> None:
    """Bring the size attributes of a layer in line with its tensors."""
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        depthwise = module.groups > 1 and module.weight.shape[1] == 1
        module.out_channels = module.weight.shape[0]
        module.groups = module.out_channels if depthwise else module.groups
        module.in_channels = module.weight.shape[1] * module.groups
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.weight is not None:
        module.num_features = module.weight.shape[0]
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = module.weight.shape[0]
