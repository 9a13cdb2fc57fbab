"""The filters of one layer in the shape of another: repeated, truncated, interpolated."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.tracing.parameters import state_of
from clafusion.tracing.structure import Axis, Layer, Structure


def cyclic(tensor: Tensor, dim: int, size: int, repeat: int = 1) -> Tensor:
    r"""Give an axis another length: entry :math:`j` is the old entry :math:`j \bmod n`.

    Args:
        tensor: of any shape, with `n * repeat` entries along `dim`.
        dim: the axis.
        size: its new number of neurons, each with `repeat` consecutive entries.
        repeat: entries per neuron (more than one after a flatten), which stay together.

    Returns:
        A tensor with `size * repeat` entries along `dim`: repeated if that is more, truncated if it is less.

    Example:
        >>> cyclic(torch.tensor([1, 2, 3]), 0, 5)
        tensor([1, 2, 3, 1, 2])
    """
    neurons = torch.arange(size, device=tensor.device) % (tensor.shape[dim] // repeat)
    entries = neurons[:, None] * repeat + torch.arange(repeat, device=tensor.device)
    return tensor.index_select(dim, entries.flatten())


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


def fitted_state(target: Structure, source: Structure, ours: Layer, theirs: Layer) -> dict[str, Tensor]:
    """All parameters and buffers of a layer of the source in the shapes of a layer of the target.

    Args:
        target: the structure of the network to write into.
        source: that of the network to take from.
        ours: a layer of the target.
        theirs: a layer of the source, of the same kind.

    Returns:
        The state under the target's names.

    Raises:
        FusionError: if one of the layers has a tensor that the other lacks, or reads more positions per channel.
    """
    wanted = state_of(target.module.get_submodule(ours.name))
    given = state_of(source.module.get_submodule(theirs.name))
    for key in sorted(wanted.keys() ^ given.keys()):
        side = "target" if key in wanted else "source"
        raise FusionError(
            f"Expected both of {ours.name!r} in the target and {theirs.name!r} in the source to have {key!r}, got it "
            f"in the {side} only; choose networks with the same biases and norms"
        )
    state = {}
    for key, tensor in wanted.items():
        names = f"{ours.name}.{key}", f"{theirs.name}.{key}"
        state[names[0]] = _fitted(given[key], tensor.shape, target.axes[names[0]], source.axes[names[1]], names)
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
        if axis is None or other is None:
            continue
        if axis.repeat != other.repeat:
            raise FusionError(
                f"Expected {names[0]!r} of the target and {names[1]!r} of the source to read as many positions per "
                f"channel, got {axis.repeat} and {other.repeat}; choose networks of the same resolution"
            )
        result = cyclic(result, dim, shape[dim] // axis.repeat, axis.repeat)
    return result
