"""Parameters as data: move them along maps of their neurons."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clafusion.tracing.exporting import bare
from clafusion.tracing.spaces import Axis

State = Mapping[str, Tensor]
#: Numbers that are gathered at once: 1 MiB in single precision, which fits into a cache.
BLOCK = 2**18


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, detached; they still share the model's memory. Of tied ones each name."""
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: tensor.detach() for name, tensor in tensors}


def independent_copy(model: nn.Module) -> nn.Module:
    """A deep copy in eval mode, without hooks, with gradients switched on."""
    copied = bare(copy.deepcopy(model))
    for parameter in copied.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return copied


def load_state(network: nn.Module, state: State) -> nn.Module:
    """Copy tensors into a network, in its own dtype; returns the network."""
    with torch.no_grad():
        for name, tensor in state_of(network).items():
            tensor.copy_(state[name])
    return network


@dataclass(frozen=True, eq=False)
class AxisMove:
    """How the entries along one axis of a parameter become those of another network.

    Attributes:
        length: of the new axis.
        copied: where every new entry is a copy of an old one, its place; None if some are mixtures.
        parts: old places [turns, old neurons], new places [turns, new neurons] and map [old neurons, new neurons] of
            each set of neurons; of fixed entries and of neurons that stay the map is None.
    """

    length: int
    copied: Tensor | None
    parts: tuple[tuple[Tensor, Tensor, Tensor | None], ...]

    def apply(self, tensor: Tensor, dim: int) -> Tensor:
        """Move a parameter along one of its axes: new[j] = sum_i map[i, j] old[i]."""
        if self.copied is not None:
            return tensor.index_select(dim, self.copied.to(tensor.device))
        rows = tensor.movedim(dim, 0)
        moved = rows.new_zeros(self.length, *rows.shape[1:])
        for old, new, mapping in self.parts:
            entries = rows[old.to(rows.device)]
            if mapping is not None:
                entries = torch.einsum("tn...,nm->tm...", entries, mapping.to(rows))
            moved[new.to(rows.device)] = entries
        return moved.movedim(0, dim)


def axis_move(
    old: Axis | None,
    new: Axis | None,
    maps: Mapping[str, Tensor],
    spaces: Mapping[str, str],
    inputs: bool = False,
    fixed_share: float = 1.0,
) -> AxisMove | None:
    """The move of one axis; None: it stays as it is.

    Args:
        old: the neurons along the axis, of the network that the parameter is of.
        new: those along it in the network that it is moved into.
        maps: by space of the new network a map [old neurons, new neurons]; a space without one stays as it is.
        spaces: by space of the new network the corresponding one of the old network.
        inputs: whether a layer sums over the axis. Then the rows of the maps are made to sum to one: a neuron that is
            spread over several new ones counts once.
        fixed_share: the factor of the entries that are of no neurons.
    """
    if old is None or new is None or not any(name in maps for name in new.spaces):
        return None
    parts: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for place, name in enumerate(new.spaces):
        mapping = maps.get(name)
        if inputs and mapping is not None:
            mapping = mapping / mapping.sum(1, keepdim=True).clamp_min(torch.finfo(mapping.dtype).tiny)
        parts.append((places(old, old.spaces.index(spaces[name])), places(new, place), mapping))
    fixed = [(axis.of < 0).nonzero().T for axis in (old, new)]
    if fixed[0].numel():
        share = None if fixed_share == 1 else fixed_share * torch.eye(fixed[0].shape[1], dtype=torch.float64)
        parts.append((fixed[0], fixed[1], share))
    return AxisMove(len(new.of), _copied(parts, len(new.of)), tuple(parts))


def places(axis: Axis, space: int) -> Tensor:
    """The places along an axis of the neurons of one of its spaces, [turns, neurons]."""
    here = (axis.of == space).nonzero().flatten()
    turns, neurons = int(axis.turn[here].max()) + 1, int(axis.at[here].max()) + 1
    found = here.new_empty(turns, neurons)
    found[axis.turn[here], axis.at[here]] = here
    return found


def _copied(parts: list[tuple[Tensor, Tensor, Tensor | None]], length: int) -> Tensor | None:
    """The place of the old entry that each new one is a copy of; None where some are mixtures."""
    result = torch.empty(length, dtype=torch.int64)
    for old, new, mapping in parts:
        sources = None if mapping is None else copied_rows(mapping)
        if mapping is not None and sources is None:
            return None
        result[new] = old if sources is None else old[:, sources.cpu()]
    return result


def copied_rows(mapping: Tensor) -> Tensor | None:
    """The neuron that each new one is a copy of; None where some are mixtures."""
    largest, sources = mapping.max(0)
    return sources if (largest == 1).all() and mapping.count_nonzero() == len(sources) else None


def move(tensor: Tensor, moves: "tuple[AxisMove | None, ...]") -> Tensor:
    """Move a parameter along all of its axes, in its own precision."""
    for dim, one in enumerate(moves):
        if one is not None:
            tensor = one.apply(tensor, dim)
    return tensor


def add_moved(total: Tensor, share: float, tensor: Tensor, moves: "tuple[AxisMove | None, ...]") -> None:
    """Add a share of the moved parameter to a tensor that is floating and in at least single precision.

    If the rows of the result are copies of others, they are gathered few at a time: all at once would take new memory
    of the size of the parameter, and longer.
    """
    first = moves[0] if moves else None
    tensor = move(tensor.to(total.dtype), (None, *moves[1:]) if moves else ())
    if first is None or first.copied is None:
        total.add_(tensor if first is None else first.apply(tensor, 0), alpha=share)
        return
    size = max(1, BLOCK // max(1, total[0].numel()))
    for part, sources in zip(total.split(size), first.copied.to(total.device).split(size), strict=True):
        part.add_(tensor.index_select(0, sources), alpha=share)
