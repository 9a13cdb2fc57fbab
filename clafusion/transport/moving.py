"""The parameters of a parent carried onto the neurons of the result."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.options import FusionOptions
from clafusion.tracing.parameters import AxisMove, axis_move, move, places
from clafusion.tracing.spaces import Axis
from clafusion.tracing.structure import Layer, Structure, Unit
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.identities import identity_value


def parameter_of(balanced: Balanced, k: int, name: str) -> Tensor | None:
    """A parameter of a parent by its name in the template, in the parent's own neurons; None if it has none.

    For a layer of a chain that the parent lacks it is that of the identity.
    """
    parent = balanced.parents[k]
    if name in parent.parameters:
        return parent.structure.capture.tensors[parent.parameters[name]].detach()
    unit = _unit_of(balanced.structure, name)
    if unit is None or unit.name not in parent.identities:
        return None
    size = parent.structure.sizes[parent.identities[unit.name]]
    like = balanced.structure.capture.tensors[name]
    return identity_value(name, unit.layers[0], balanced.structure, size, like.detach())


def _unit_of(structure: Structure, parameter: str) -> Unit | None:
    return next((unit for unit in structure.units if parameter in unit.parameters), None)


def parameter_moves(
    balanced: Balanced,
    k: int,
    name: str,
    maps: Maps,
    options: FusionOptions,
    reading: Maps | None = None,
    fixed_share: float = 1.0,
) -> tuple[AxisMove | None, ...]:
    """The moves of the axes of a parent's parameter onto the neurons of the result.

    Args:
        balanced: the parents.
        k: which of them.
        name: of the parameter in the template.
        maps: of the parent's neurons.
        options: `streams` is read.
        reading: the maps of the neurons that a layer reads; None: `maps`, with rows that sum to one.
        fixed_share: the factor of entries that are of no neurons, along an axis with neurons.
    """
    parent, layer = balanced.parents[k], balanced.layer_of.get(name)
    new = balanced.layout[name]
    old = parent.structure.axes[parent.parameters[name]] if name in parent.parameters else _own_axes(balanced, k, new)
    shared = options.streams == "shared"
    moves = []
    for dim, (one, other) in enumerate(zip(old, new, strict=True)):
        its_maps = maps if shared else _averaged(balanced, name, dim, other, maps)
        if dim == 0 and shared:
            its_maps = _with_head_sizes(balanced, k, other, its_maps)
        summed = shared and dim == 1 and layer is not None and name == layer.weight
        if summed and reading is not None:
            moves.append(axis_move(one, other, reading, parent.spaces))
        else:
            moves.append(axis_move(one, other, its_maps, parent.spaces, summed, fixed_share))
    return tuple(moves)


def _own_axes(balanced: Balanced, k: int, axes: Sequence[Axis | None]) -> tuple[Axis | None, ...]:
    """The axes of a parameter of an identity, in the parent's own neurons."""
    parent = balanced.parents[k]

    def own(axis: Axis) -> Axis:
        space = parent.spaces[axis.spaces[0]]
        zeros = torch.zeros(parent.structure.sizes[space], dtype=torch.int64)
        return Axis((space,), zeros, torch.arange(len(zeros)), zeros)

    return tuple(None if axis is None else own(axis) for axis in axes)


def _averaged(balanced: Balanced, name: str, dim: int, axis: Axis | None, maps: Maps) -> Maps:
    """With a map per layer: the mean of the maps of the layers that write the neurons along an axis."""
    if axis is None:
        return {}
    found = [maps[writer] for writer in balanced.writers(name, dim) if writer in maps]
    return {axis.spaces[0]: torch.stack(found).mean(0)} if found else {}


def _with_head_sizes(balanced: Balanced, k: int, axis: Axis | None, maps: Maps) -> Maps:
    """The maps for queries and keys that keep the size of attention scores, divided by the root of the head size.

    Of each of the two the fourth root of the ratio of the head sizes is missing.
    """
    scaled: dict[str, Tensor] = {}
    for space in () if axis is None else axis.spaces:
        if space in maps and space in balanced.contracted:
            parent = balanced.structure.spaces.spaces[space].parent
            assert parent is not None
            heads = maps[parent].shape if parent in maps else (1, 1)
            ratio = (maps[space].shape[1] / heads[1]) / (maps[space].shape[0] / heads[0])
            scaled[space] = maps[space] * ratio**0.25
    return {**maps, **scaled}


def moved_parameter(
    balanced: Balanced, k: int, name: str, tensor: Tensor, moves: tuple[AxisMove | None, ...]
) -> Tensor:
    """A parameter of a parent with all its axes carried onto the result's neurons, by its `parameter_moves`."""
    layer = balanced.layer_of.get(name)
    if layer is None or layer.kind != "grouped" or name != layer.weight:
        return move(tensor, moves)
    parent, template = balanced.parents[k], balanced.structure
    own = parent.structure.axes[parent.parameters[name]][1] if name in parent.parameters else None
    before = 1 if own is None else _groups(own, tensor)
    after = _groups(balanced.layout[name][1], template.capture.tensors[name])
    return grouped(move(dense(tensor, before), moves), after)


def _groups(axis: Axis | None, weight: Tensor) -> int:
    """The number of groups of a convolution, from the neurons that it reads."""
    assert axis is not None
    return len(axis.of) // weight.shape[1]


def dense(weight: Tensor, groups: int) -> Tensor:
    """The weight of a convolution in groups as that of one in a single group: zero between groups."""
    outputs, inputs = weight.shape[:2]
    result = weight.new_zeros(outputs, groups, inputs, *weight.shape[2:])
    group = torch.arange(outputs, device=weight.device) // (outputs // groups)
    result[torch.arange(outputs, device=weight.device), group] = weight
    return result.flatten(1, 2)


def grouped(weight: Tensor, groups: int) -> Tensor:
    """The inverse of `dense`."""
    outputs = len(weight)
    group = torch.arange(outputs, device=weight.device) // (outputs // groups)
    parts = torch.unflatten(weight, 1, (groups, -1))
    return parts[torch.arange(outputs, device=weight.device), group]


def incoming_weights(
    balanced: Balanced,
    k: int,
    layer: Layer,
    space: str,
    maps: Maps | None = None,
    options: FusionOptions | None = None,
) -> Tensor:
    """The incoming weights of a space's neurons, [neurons, weights], float64; with maps of aligned inputs, and bias.

    Args:
        balanced: the parents.
        k: which of them.
        layer: of the template; it writes the neurons.
        space: of the template.
        maps: of the parent, as far as they are known; None: the weights as they are.
        options: `streams` is read.
    """
    weight = parameter_of(balanced, k, layer.weight) if layer.weight is not None else None
    if weight is None or layer.weight is None:
        raise FusionError(
            f"Expected {layer.name!r} to have a weight to compare neurons by, got none; compare activations"
        )
    parent = balanced.parents[k]
    rows = weight.double()
    if maps is not None and options is not None and layer.kind != "grouped":
        rows = move(rows, (None, *parameter_moves(balanced, k, layer.weight, maps, options)[1:]))
    rows = rows.flatten(1)
    bias = parameter_of(balanced, k, layer.bias) if layer.bias is not None and maps is not None else None
    if bias is not None:
        rows = torch.cat([rows, bias[:, None].to(rows)], 1)
    if layer.weight not in parent.parameters:
        return rows
    axis = parent.structure.axes[parent.parameters[layer.weight]][0]
    assert axis is not None
    return rows[places(axis, axis.spaces.index(parent.spaces[space]))[0].to(rows.device)]
