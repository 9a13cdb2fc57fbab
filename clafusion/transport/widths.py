"""How many neurons of each space the result has: as the anchor, or where they tell most for what they cost."""

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from clafusion.errors import FusionError
from clafusion.tracing.resizing import resized_length
from clafusion.tracing.spaces import Axis
from clafusion.tracing.structure import Structure
from clafusion.transport.balanced import Balanced
from clafusion.transport.neuron_maps import outermost

#: A total over a network whose spaces have given sizes, which grows with each of them.
Total = Callable[[Mapping[str, int]], int]
#: Neurons that a space keeps at least.
LEAST = 2


def uniform_sizes(balanced: Balanced, width: float) -> dict[str, int]:
    """The neurons of every space that can be chosen, as a multiple of the anchor's, of blocks whole ones.

    Args:
        balanced: the parents.
        width: the multiple.

    Returns:
        By space their number, which may be larger than what the parents have together; blocks before what is in them.

    Raises:
        FusionError: if fewer than two neurons would be left, or blocks of a space differ in size.
    """
    structure = balanced.structure
    sizes: dict[str, int] = {}
    for name in structure.free_spaces:
        own, top = balanced.width(balanced.reference(name), name), outermost(structure, name)
        if top is not None:
            sizes[name] = sizes[top] * block_size(balanced, top, name)
        elif any(space.parent == name for space in structure.spaces.spaces.values()):
            sizes[name] = max(1, round(width * own))
        else:
            sizes[name] = round(width * own)
            if sizes[name] < min(LEAST, own):
                raise FusionError(
                    f"Expected a width that leaves {name!r} at least {LEAST} neurons, got {width}, which leaves "
                    f"{sizes[name]} of {own}; choose a larger width"
                )
    return sizes


def block_size(balanced: Balanced, top: str, name: str) -> int:
    """The neurons of a space in each of the blocks that it is in.

    Raises:
        FusionError: if parents differ in it, or there are blocks in the blocks.
    """
    if balanced.structure.spaces.spaces[name].parent != top:
        raise FusionError("Expected blocks of neurons without further blocks inside for targets=union, got them")
    within = {balanced.width(k, name) // balanced.width(k, top) for k in balanced.holders(top)}
    if len(within) > 1:
        raise FusionError(
            f"Expected blocks (heads or groups) of one size in all parents for targets=union, got {sorted(within)} "
            f"neurons in those of {name!r}; use targets=matched"
        )
    return within.pop()


def parameters_of(structure: Structure, sizes: Mapping[str, int]) -> int:
    """The number of parameters of a network whose spaces have other sizes."""
    tensors = structure.capture.tensors
    shapes = ((tensors[name].shape, structure.axes.get(name, ())) for name in structure.capture.parameters)
    return sum(_entries(structure, shape, axes, sizes) for shape, axes in shapes)


def multiply_adds_of(structure: Structure, sizes: Mapping[str, int]) -> int:
    """The multiply-adds of the layers of such a network for one sample; attention scores are not counted."""
    total = 0
    for layer in structure.layers:
        shape = structure.nodes[layer.node].meta["shape"]
        weight = structure.nodes[str(structure.nodes[layer.node].args[1])].meta["shape"]
        axes = (structure.written(layer), structure.read(layer))
        total += math.prod(shape) // shape[layer.dim] * _entries(structure, weight, axes, sizes)
    return total


def _entries(structure: Structure, shape: Sequence[int], axes: Sequence[Axis | None], sizes: Mapping[str, int]) -> int:
    """The number of entries of a tensor whose first axes have neurons of other sizes."""
    lengths = list(shape)
    for dim, axis in enumerate(axes):
        if axis is not None:
            lengths[dim] = resized_length(lengths[dim], axis, structure.sizes, sizes)
    return math.prod(lengths)


def sizes_within(budget: int, total_of: Total, base: Mapping[str, int], gains: Mapping[str, Tensor]) -> dict[str, int]:
    """The sizes by which most is gained within a budget: neurons are taken by what each gains for what it costs.

    Args:
        budget: the most that `total_of` may be.
        total_of: what a network of given sizes costs.
        base: the sizes of all spaces, at which the cost of one more neuron of each is taken.
        gains: by space that is to be sized what its first, second, ... neuron gains, for as many as there are.

    Returns:
        All sizes; those that were to be sized are at least two.
    """
    costs = {name: total_of({**base, name: base[name] + 1}) - total_of(base) for name in gains}
    least = {name: min(LEAST, len(one)) for name, one in gains.items()}
    offers = [
        (-gain / costs[name], place, name)
        for name, one in gains.items()
        # A later neuron is not taken before an earlier one.
        for place, gain in enumerate(one.cummin(0).values.tolist())
        if place >= least[name]
    ]
    names = [name for _, _, name in sorted(offers)]

    def taken(count: int) -> dict[str, int]:
        return {**base, **{name: size + names[:count].count(name) for name, size in least.items()}}

    found = bisect_right(range(len(names) + 1), budget, key=lambda count: total_of(taken(count)))
    return taken(max(0, found - 1))
