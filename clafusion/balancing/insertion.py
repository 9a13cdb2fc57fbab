"""Insertion: the shallow network grows to the deep one's depth, by units that are identities."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from clafusion.alignment.stages import Alignment
from clafusion.balancing.correspondence import correspond
from clafusion.errors import FusionError
from clafusion.tracing.comparison import TOLERANCE, difference, few_of
from clafusion.tracing.example import example_for
from clafusion.tracing.execution import as_input
from clafusion.tracing.outputs import logits_in
from clafusion.tracing.parameters import load_state, state_of
from clafusion.tracing.reading import structure_of
from clafusion.tracing.resizing import room_for
from clafusion.tracing.structure import Structure, Unit
from clafusion.transport.balanced import Correspondence
from clafusion.transport.identities import neutral_value


@torch.no_grad()
def insert_identities(
    shallow: nn.Module,
    deep: nn.Module,
    alignment: Alignment,
    example: Tensor | None = None,
    zero_branches: bool = False,
) -> nn.Module:
    """Grow a network to the depth of another one without changing its function.

    A unit without a partner becomes an identity: a plain one an identity matrix or kernel, a residual one a branch
    whose last layer is zero; norms become neutral.

    Args:
        shallow: the network whose function the result has; left as it is.
        deep: the network whose depth (and layer names) it has; left as it is.
        alignment: per stage, the unit of `deep` that each unit of `shallow` becomes.
        example: samples [batch, ...]; None: of the shape that `shallow` declares, or of a common one.
        zero_branches: make the inner layers of an inserted residual unit zero as well, as published.

    Returns:
        A network of the class of `deep`, with the widths of `shallow`, in eval mode.

    Raises:
        FusionError: if the networks do not fit, if an unmatched unit cannot be an identity, if the class of `deep`
            cannot have the widths of `shallow`, or if the result differs from `shallow` as a function (its activations
            are not ReLU-like).
    """
    example = example_for(shallow)[0] if example is None else example
    a, b = structure_of(deep, example), structure_of(shallow, example)
    return inserted(deep, a, b, alignment, example, zero_branches)


@torch.no_grad()
def inserted(
    deep: nn.Module, a: Structure, b: Structure, alignment: Alignment, samples: Tensor, zero_branches: bool = False
) -> nn.Module:
    """`insert_identities` from structures."""
    parent = correspond(a, b, alignment, "the shallow network")
    network, room = room_for(deep, a, sizes_once_inserted(a, parent), samples)
    state = dict(room.capture.tensors)
    for unit in a.units:
        if unit.name in parent.units:
            state.update({name: b.capture.tensors[parent.parameters[name]] for name in unit.parameters})
        else:
            state.update(_identity(unit, a, room.capture.tensors, zero_branches))
    load_state(network, {**state_of(network), **state})
    few = as_input(few_of(samples), b.capture)
    error = difference(b.run(few), logits_in(network(few)))
    if not error <= TOLERANCE.get(few.dtype, 1e-3):
        raise FusionError(
            f"Expected inserted layers to leave the network's function as it is, got logits that differ by {error:.1e} "
            "(relative); only ReLU-like activations pass an identity"
        )
    return network.requires_grad_(True)


@torch.no_grad()
def check_insertable(deep: nn.Module, a: Structure, b: Structure, alignment: Alignment, samples: Tensor) -> None:
    """Refuse, as `inserted` does, a deep network whose class cannot have the other's widths, whatever its weights."""
    room_for(deep, a, sizes_once_inserted(a, correspond(a, b, alignment, "the shallow network")), samples)


def sizes_once_inserted(a: Structure, parent: Correspondence) -> dict[str, int]:
    """The width of every space of the deep network once the shallow one's units are in it.

    An inserted unit is as wide inside as the shallow network's unit before it in its stage, or else after it.
    """
    sizes = {name: parent.structure.sizes[other] for name, other in parent.spaces.items()}
    for stage in a.stages:
        known = [unit for unit in stage if unit.name in parent.units]
        for unit in stage:
            if unit.name in parent.units:
                known = [unit, *known]
            else:
                alike = [one for one in a.units if one.name in parent.units and one.signature == unit.signature]
                for ours, theirs in _alike_spaces(a, unit, [*known[:1], *alike]):
                    sizes.setdefault(ours, sizes[theirs])
    return {name: sizes.get(name, size) for name, size in a.sizes.items()}


def _alike_spaces(a: Structure, unit: Unit, models: Sequence[Unit]) -> Iterator[tuple[str, str]]:
    """The spaces that the layers of a unit write, with those of the first unit that has the same layers."""
    kinds = [layer.kind for layer in unit.branch]
    model = next((one for one in models if [layer.kind for layer in one.branch] == kinds), None)
    for layer, other in zip(unit.branch, model.branch, strict=True) if model is not None else ():
        ours, theirs = a.written(layer), a.written(other)
        if ours is not None and theirs is not None:
            yield from zip(ours.spaces, theirs.spaces, strict=False)


def _identity(unit: Unit, a: Structure, room: Mapping[str, Tensor], zero_branches: bool) -> dict[str, Tensor]:
    """The parameters of an inserted unit."""
    layers = {name: layer for layer in unit.layers for name in (layer.weight, layer.bias)}
    state: dict[str, Tensor] = {}
    for name in unit.parameters:
        like, layer = room[name], layers.get(name)
        if name in unit.closing or (zero_branches and unit.kind == "residual" and layer is not None):
            state[name] = torch.zeros_like(like)
        elif layer is not None and name == layer.weight:
            state[name] = _eye(like)
        else:
            state[name] = neutral_value(name, a, like)
    return state


def _eye(like: Tensor) -> Tensor:
    """An identity matrix or kernel of the shape of a weight, which need not be square."""
    weight = torch.zeros_like(like)
    middle = weight.movedim((0, 1), (-2, -1))[tuple((length - 1) // 2 for length in like.shape[2:])]
    middle.fill_(1) if like.shape[1] == 1 < len(like) else middle.fill_diagonal_(1)
    return weight
