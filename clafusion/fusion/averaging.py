"""The fused parameters: every parent moved onto the anchor's neurons, then averaged."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from clafusion.alignment.parents import parents_of
from clafusion.errors import FusionError
from clafusion.options import FusionOptions, normalized
from clafusion.statistics.samples import check_finite
from clafusion.tracing.parameters import add_moved, independent_copy, load_state, state_of
from clafusion.tracing.structure import Structure, Unit
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.moving import moved_parameter, parameter_moves, parameter_of
from clafusion.transport.pooling import Pool


def moved_average(
    balanced: Balanced,
    room: Structure,
    maps: Sequence[Maps],
    weights: Sequence[float],
    options: FusionOptions,
    pool: Pool | None = None,
) -> None:
    """Average the moved parents into a network with the anchor's widths and the template's depth.

    Args:
        balanced: the parents; left as they are.
        room: the structure of the network, whose parameters are overwritten.
        maps: per parent the maps of its neurons.
        weights: per parent, summing to one.
        options: `streams` and `head` are read.
        pool: the neurons of the result, where they are chosen among those of all parents: then the parts of the
            parents are put together instead of averaged, but for the output layer.

    Raises:
        FusionError: if a parameter of the result is not finite.
    """
    for unit in balanced.structure.units:
        for name in unit.parameters:
            if pool is None:
                shares = _shares(balanced, unit, name, weights, options)
            else:
                shares = [1.0] * len(weights) if _is_pooled(balanced, name, pool) else list(weights)
            with torch.no_grad():
                _add_up(room.capture.tensors[name], balanced, name, maps, shares, weights, options, pool)
    named = {name: room.capture.tensors[name] for name in balanced.layout}
    check_finite(named, "the fused network", room.axes)


def _add_up(
    fused: Tensor,
    balanced: Balanced,
    name: str,
    maps: Sequence[Maps],
    shares: Sequence[float],
    weights: Sequence[float],
    options: FusionOptions,
    pool: Pool | None,
) -> None:
    """Fill in one parameter of the result; a counter of batches, and any other whole numbers, are the template's."""
    if not fused.is_floating_point():
        return
    total = torch.zeros_like(fused, dtype=torch.promote_types(fused.dtype, torch.float32))
    layer = balanced.layer_of.get(name)
    in_groups = layer is not None and layer.kind == "grouped" and name == layer.weight
    for k, share in enumerate(shares):
        tensor = parameter_of(balanced, k, name) if share else None
        if tensor is None:
            continue
        its_maps = maps[k] if pool is None else {**maps[k], **pool.places[k]}
        reading, fixed_share = (None, 1.0) if pool is None else (pool.reconstructions[k], weights[k] / share)
        moves = parameter_moves(balanced, k, name, its_maps, options, reading, fixed_share)
        if in_groups:
            total.add_(moved_parameter(balanced, k, name, tensor.to(total.dtype), moves), alpha=share)
        else:
            add_moved(total, share, tensor, moves)
    fused.copy_(total)


def _is_pooled(balanced: Balanced, name: str, pool: Pool) -> bool:
    """Whether the neurons that a parameter is of, not those that it reads, are chosen among those of all parents."""
    layer, axes = balanced.layer_of.get(name), balanced.layout[name]
    own = axes[:1] if layer is not None and name == layer.weight else axes
    return any(axis is not None and any(space in pool.sizes for space in axis.spaces) for axis in own)


def _shares(balanced: Balanced, unit: Unit, name: str, weights: Sequence[float], options: FusionOptions) -> list[float]:
    r"""The share of every parent in one parameter.

    Most parameters are plainly averaged: parent k has the share :math:`w_k`. But let the parents have the shares
    :math:`s_k` of a residual unit :math:`x + V \phi(U x)`: 1 or 0, where it is an identity with :math:`V = 0`,
    or something between in an average of networks of which some had it. Then

    .. math:: U = \sum_k \frac{w_k s_k}{\sum_j w_j s_j} U_k, \qquad V = \sum_k w_k V_k

    so that the branch gives about :math:`\sum_k w_k V_k \phi(U_k x)`, the mean of the parents' branches. Were the
    identities averaged into U as well, the branch would shrink by the square of its owners' weight.
    """
    everybody = range(len(balanced.parents))
    axes = balanced.layout[name]
    writes_logits = bool(axes) and axes[0] is not None and balanced.structure.output in axes[0].spaces
    if options.head == "anchor" and writes_logits:
        return [float(k == balanced.anchor) for k in everybody]
    if options.only_anchor and not writes_logits:
        weights = [float(k == balanced.anchor) for k in everybody]
    inside = balanced.inner_weights(unit, weights)
    whole = inside == dict(enumerate(weights))
    if unit.kind != "residual" or whole:
        return list(weights)
    if name in unit.closing or (options.streams == "per_layer" and name in balanced.layer_of):
        return [weights[k] if k in inside else 0.0 for k in everybody]
    total = sum(inside.values())
    if total == 0:
        return [float(k in inside) / len(inside) for k in everybody]
    return [inside.get(k, 0.0) / total for k in everybody]


def average(models: Iterable[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """The plain average of networks of one architecture, parameter by parameter: the naive baseline.

    Args:
        models: at least one network; left as they are.
        weights: per network, at least 0 with a positive sum; None: equal.

    Returns:
        A network of the class of the first, in eval mode.

    Raises:
        FusionError: if names or shapes of the parameters differ.
    """
    parents = parents_of(models, "average([a, b])")
    shares = normalized(weights, len(parents))
    states = [state_of(model) for model in parents]
    for state in states[1:]:
        for name in (*states[0], *state):
            shapes = [list(s[name].shape) if name in s else "none" for s in (states[0], state)]
            if shapes[0] != shapes[1]:
                raise FusionError(
                    f"Expected networks of one architecture, got {name!r} of shapes {shapes[0]}, {shapes[1]}"
                )
    averaged = {
        name: torch.stack([share * state[name].double() for share, state in zip(shares, states, strict=True)]).sum(0)
        if value.is_floating_point()
        else value
        for name, value in states[0].items()
    }
    return load_state(independent_copy(parents[0]), averaged)
