"""Networks with outputs for the classes of all parents."""

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.tracing.parameters import axis_move, move
from clafusion.tracing.resizing import room_for
from clafusion.tracing.structure import Structure


@torch.no_grad()
def with_outputs(model: nn.Module, structure: Structure, columns: Tensor, count: int, samples: Tensor) -> nn.Module:
    """A copy of a network with more outputs; those that it had are at given places, the others are zero.

    Args:
        model: left as it is.
        structure: of it.
        columns: the new place of each of its outputs.
        count: how many outputs the copy has.
        samples: to trace the copy with.

    Raises:
        FusionError: if its outputs are no layer's that can have more.
    """
    output = structure.output
    if output is None:
        raise FusionError(f"Expected {type(model).__name__} to end in a layer that gives one logit per class")
    network, room = room_for(model, structure, {**structure.sizes, output: count}, samples)
    placed = torch.zeros(len(columns), count, dtype=torch.float64)
    placed[torch.arange(len(columns)), columns] = 1
    itself = {name: name for name in structure.sizes}
    for name, axes in structure.axes.items():
        moves = tuple(
            axis_move(old, new, {output: placed} if old is not None and old.spaces == (output,) else {}, itself)
            for old, new in zip(axes, room.axes[name], strict=True)
        )
        room.capture.tensors[name].copy_(move(structure.capture.tensors[name].detach(), moves))
    return network
