"""Neuron spaces: which axis of which parameter indexes which neurons of a network, whatever its architecture.

A *neuron* is a set of entries that move together. A *space* is a set of neurons that may be permuted among each other
without changing the function, as long as neurons stay together with those of their block (an attention head, a group).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from clafusion.tracing.elements import Ints, turns
from clafusion.tracing.exporting import Capture, operation_of
from clafusion.tracing.labelling import Labelling, label, parameters_of
from clafusion.tracing.labels import Value
from clafusion.tracing.partition import Partition, by_appearance, partition
from clafusion.tracing.rules import register_operation


@dataclass(frozen=True)
class Space:
    """Neurons that may be permuted among each other.

    Attributes:
        name: unique; the path of the first module that writes them.
        size: the number of neurons.
        parent: the space of the blocks (attention heads, groups) that its neurons are in, or None.
        block: [size] int64: for every neuron the index of its block in the parent space, or None.
    """

    name: str
    size: int
    parent: str | None = None
    block: Tensor | None = field(default=None, compare=False)


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of a tensor: the neuron that every entry belongs to.

    Attributes:
        spaces: the spaces of its entries, by first appearance along the axis.
        of: [length] int64: the index into `spaces` of every entry; -1: it is fixed.
        at: [length] int64: the neuron of that space; 0 where fixed.
        turn: [length] int64: which occurrence of that neuron along this axis it is, from 0; 0 where fixed.
    """

    spaces: tuple[str, ...]
    of: Tensor
    at: Tensor
    turn: Tensor


@dataclass(frozen=True, eq=False)
class Spaces:
    """The neurons of a network.

    Attributes:
        spaces: the free spaces by name, in order of first appearance in the graph; a space of blocks comes before the
            first space that is in it.
        axes: per parameter and running statistic by name one entry per dimension; None: no free neurons along it. The
            input axis of a convolution with several groups and several channels in each is that of all channels of all
            groups, in order.
        pinned: the weights that a linear map or a convolution writes neurons with and that have no free one, with the
            operation and the module path that fixed them.
    """

    spaces: Mapping[str, Space]
    axes: Mapping[str, tuple[Axis | None, ...]]
    pinned: Mapping[str, str]
    _reader: "_Reader" = field(repr=False)

    def of_node(self, name: str) -> tuple[Axis | None, ...] | None:
        """The axes of the tensor of a node of the graph.

        Returns:
            One entry per dimension (None: no free neurons along it). None altogether if some neurons are spread over
            several dimensions (heads and features of heads), or if the node gives no tensor.
        """
        return self._reader.node(name)

    def without(self, names: Collection[str]) -> "Spaces":
        """The same with the neurons of some spaces fixed."""
        numbers = [number for number, name in enumerate(self._reader.found.names) if name in names]
        space = np.where(np.isin(self._reader.found.space, numbers), -1, self._reader.found.space)
        reader = _Reader(replace(self._reader.found, space=space), self._reader.values)
        kept = {name: one for name, one in self.spaces.items() if name not in names}
        axes = {
            name: tuple(None if one is None else reader.without(one, names) for one in one_axes)
            for name, one_axes in self.axes.items()
        }
        return Spaces(kept, axes, self.pinned, reader)


def find_spaces(capture: Capture) -> Spaces:
    """Find the neuron spaces of a network in its graph.

    Raises:
        FusionError: for an operation without a rule (see `register_operation`), or if blocks of neurons cross.

    Example:
        >>> import torch
        >>> from clafusion.networks import MLP
        >>> from clafusion.tracing.exporting import export_graph
        >>> found = find_spaces(export_graph(MLP(4, [3, 2], num_classes=2).eval(), torch.zeros(1, 4)))
        >>> {name: space.size for name, space in found.spaces.items()}
        {'fc1': 3, 'fc2': 2, 'fc3': 2}
        >>> found.axes["fc2.weight"][1].spaces
        ('fc1',)
    """
    labelling = label(capture)
    found = partition(labelling, capture)
    spaces = {}
    for number, name in enumerate(found.names):
        parent, block = found.parents.get(number, (None, None))
        spaces[name] = Space(
            name,
            int(found.sizes[number]),
            None if parent is None else found.names[parent],
            None if block is None else torch.from_numpy(block),
        )
    values = {node.name: value for node, value in labelling.values.items() if isinstance(value, Value)}
    reader = _Reader(found, {name: (len(value.shape), value.arrays) for name, value in values.items()})
    axes = {name: tuple(reader.axis(one) for one in arrays) for name, arrays in labelling.axes.items()}
    return Spaces(spaces, axes, _pinned(capture, labelling, axes), reader)


class _Reader:
    """Axes from label arrays; equal arrays give the same axis."""

    def __init__(self, found: Partition, values: Mapping[str, tuple[int, Sequence[Tensor]]]) -> None:
        self.found, self.values = found, values
        self._known: dict[bytes, Axis | None] = {}

    def axis(self, array: Tensor | None) -> Axis | None:
        """The axis of a label array that varies along one dimension; None: nothing is free."""
        if array is None:
            return None
        roots = self.found.root[array.reshape(-1).numpy()]
        key = roots.tobytes()
        if key not in self._known:
            self._known[key] = self._axis(roots)
        return self._known[key]

    def without(self, axis: Axis, names: Collection[str]) -> Axis | None:
        """An axis with the neurons of some spaces fixed."""
        kept = [place for place, name in enumerate(axis.spaces) if name not in names]
        if len(kept) == len(axis.spaces):
            return axis
        if not kept:
            return None
        of = torch.full_like(axis.of, -1)
        for number, place in enumerate(kept):
            of[axis.of == place] = number
        free = of >= 0
        return Axis(tuple(axis.spaces[place] for place in kept), of, axis.at * free, axis.turn * free)

    def _axis(self, roots: Ints) -> Axis | None:
        spaces = self.found.space[roots]
        free = spaces >= 0
        if not free.any():
            return None
        order = by_appearance(spaces[free])
        place = np.full(int(order.max()) + 2, -1)
        place[order] = np.arange(len(order))
        at = np.where(free, self.found.neuron[roots], 0)
        turn = np.where(free, turns(roots), 0)
        names = tuple(self.found.names[number] for number in order)
        return Axis(names, *map(torch.from_numpy, (place[spaces], at, turn)))

    def node(self, name: str) -> tuple[Axis | None, ...] | None:
        """The axes of the value of a node."""
        if name not in self.values:
            return None
        rank, arrays = self.values[name]
        axes: list[Axis | None] = [None] * rank
        for array in arrays:
            roots = self.found.root[array.numpy()]
            if (self.found.space[roots] < 0).all():
                continue
            dims = [dim for dim in range(rank) if (roots.take([0], dim) != roots).any()]
            if len(dims) != 1 or axes[dims[0]] is not None:
                return None
            axes[dims[0]] = self.axis(array.movedim(dims[0], 0).reshape(array.shape[dims[0]], -1)[:, 0])
        return tuple(axes)


def _pinned(capture: Capture, labelling: Labelling, axes: Mapping[str, tuple[Axis | None, ...]]) -> dict[str, str]:
    """The weights that write neurons none of which is free, and why."""
    found = {}
    for node in capture.graph.nodes:
        name = operation_of(node)
        if name != "linear" and not name.startswith("conv"):
            continue
        weight, dim = node.args[1], int("transpose" in name)
        for parameter in parameters_of(node, capture.names):
            if capture.names.get(getattr(weight, "name", "")) != parameter or parameter not in axes:
                continue
            array = labelling.axes[parameter][dim]
            if array is not None and axes[parameter][dim] is None:
                found[parameter] = _reason(labelling, array)
    return found


def _reason(labelling: Labelling, array: Tensor) -> str:
    reasons = labelling.labels.elements.reason(array.reshape(-1).numpy())
    known = reasons[reasons >= 0]
    return labelling.labels.reasons[known[0]] if len(known) else "no two of its neurons are used alike"


__all__ = ["Axis", "Space", "Spaces", "find_spaces", "register_operation"]
