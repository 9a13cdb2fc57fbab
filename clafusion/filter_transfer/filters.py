"""The filters of one layer in the shape of another: repeated, truncated, interpolated."""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.tracing.parameters import places
from clafusion.tracing.spaces import Axis
from clafusion.tracing.structure import Structure


def cyclic(tensor: Tensor, dim: int, old: Axis, new: Axis) -> Tensor:
    r"""Give an axis another length: neuron :math:`j` is the old neuron :math:`j \bmod n`.

    Args:
        tensor: of any shape.
        dim: the axis.
        old: its neurons.
        new: those of the result; the occurrences of a neuron (more than one after a flatten) stay together.

    Returns:
        A tensor with the neurons of `new` along `dim`: repeated if these are more, truncated if they are less.
    """
    source = torch.zeros(len(new.of), dtype=torch.int64)
    for place in range(len(new.spaces)):
        ours, theirs = places(new, place), places(old, place)
        source[ours] = theirs[:, torch.arange(ours.shape[1]) % theirs.shape[1]]
    fixed = [(axis.of < 0).nonzero().flatten() for axis in (new, old)]
    source[fixed[0]] = fixed[1]
    return tensor.index_select(dim, source.to(tensor.device))


def resampled(kernels: Tensor, size: Sequence[int]) -> Tensor:
    """Convolution kernels of another size by bilinear interpolation, without change of scale.

    Args:
        kernels: [outputs, inputs, height, width].
        size: the new height and width.

    Returns:
        [outputs, inputs, *size]; the very same where the size is the same.
    """
    if tuple(kernels.shape[2:]) == tuple(size):
        return kernels
    return F.interpolate(kernels.double(), size=tuple(size), mode="bilinear").to(kernels.dtype)


def fitted_state(
    target: Structure,
    source: Structure,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    ours: str,
    theirs: str,
) -> dict[str, Tensor]:
    """All parameters and buffers of a module of the source in the shapes of a module of the target.

    Args:
        target: the structure of the network to write into.
        source: that of the network to take from.
        states: the parameters and buffers of both by name.
        ours: the path of a layer or norm of the target.
        theirs: of one of the source, of the same kind.

    Returns:
        The state under the target's names.

    Raises:
        FusionError: if one of the layers has a tensor that the other lacks, or reads more positions per channel.
    """
    wanted, given = (
        {name.rpartition(".")[2]: tensor for name, tensor in state.items() if name.rpartition(".")[0] == path}
        for state, path in zip(states, (ours, theirs), strict=True)
    )
    for key in sorted(wanted.keys() ^ given.keys()):
        side = "target" if key in wanted else "source"
        raise FusionError(
            f"Expected both of {ours!r} in the target and {theirs!r} in the source to have {key!r}, got it "
            f"in the {side} only; choose networks with the same biases and norms"
        )
    state = {}
    for key, tensor in wanted.items():
        names = f"{ours}.{key}", f"{theirs}.{key}"
        axes = target.axes.get(names[0], ()), source.axes.get(names[1], ())
        state[names[0]] = _fitted(given[key], tensor.shape, *axes, names)
    return state


def _fitted(
    tensor: Tensor,
    shape: Sequence[int],
    ours: Sequence[Axis | None],
    theirs: Sequence[Axis | None],
    names: tuple[str, str],
) -> Tensor:
    """One tensor in another shape; an axis that is no axis of neurons is one of the kernel."""
    result = resampled(tensor, shape[2:]) if tensor.ndim == 4 else tensor
    for dim, (axis, other) in enumerate(zip(ours, theirs, strict=True)):
        turns = [1 if one is None else int(one.turn.max()) + 1 for one in (axis, other)]
        if turns[0] != turns[1] or (axis and other and len(axis.spaces) != len(other.spaces)):
            raise FusionError(
                f"Expected {names[0]!r} of the target and {names[1]!r} of the source to read as many positions per "
                f"channel, got {turns[0]} and {turns[1]}; choose networks of the same resolution"
            )
        if axis is not None and other is not None:
            result = cyclic(result, dim, other, axis)
        elif result.shape[dim] != shape[dim]:  # one of the two reads the input of its network
            source = torch.arange(shape[dim], device=result.device) % result.shape[dim]
            result = result.index_select(dim, source)
    return result
