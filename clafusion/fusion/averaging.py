"""The fused parameters: every parent moved onto the anchor's neurons, then averaged."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.options import FusionOptions, normalized
from clafusion.statistics.samples import check_finite
from clafusion.tracing.capture import independent_copy
from clafusion.tracing.parameters import add_moved, load_state, resized, state_of
from clafusion.tracing.structure import Layer, Unit
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.neuron_maps import axis_maps


def moved_average(
    balanced: Balanced, maps: Sequence[Maps], weights: Sequence[float], options: FusionOptions
) -> nn.Module:
    """Average the moved parents into a network with the anchor's widths and the balanced depth.

    Args:
        balanced: the parents; left as they are.
        maps: per parent the maps of its neurons.
        weights: per parent, summing to one.
        options: `streams` and `head` are read.

    Raises:
        FusionError: if a parameter of the result is not finite.
    """
    structure = balanced.structure
    network = resized(balanced.parents[balanced.anchor].network, structure, _sizes(balanced, options))
    fused = state_of(network)
    states = [state_of(parent.network) for parent in balanced.parents]
    for unit in structure.units:
        for layer in unit.layers:
            for name in (key for key in structure.axes if key.rpartition(".")[0] == layer.name):
                shares = _shares(balanced, unit, layer, name, weights, options)
                tensors = [state[name] for state in states]
                _add_up(fused[name], balanced, name, tensors, maps, shares, options)
    check_finite(network, "the fused network", structure)
    return network


def _add_up(
    fused: Tensor,
    balanced: Balanced,
    name: str,
    tensors: Sequence[Tensor],
    maps: Sequence[Maps],
    shares: Sequence[float],
    options: FusionOptions,
) -> None:
    """Fill in one parameter of the result, which is zero so far; a counter of batches is the anchor's."""
    if not fused.is_floating_point():
        fused.copy_(tensors[balanced.anchor])
        return
    total = fused.to(torch.promote_types(fused.dtype, torch.float32))
    for k, share in enumerate(shares):
        if share:
            axes = balanced.structures[k].axes[name]
            add_moved(total, share, tensors[k], axes, axis_maps(axes, maps[k], options))
    if total is not fused:
        fused.copy_(total)


def _sizes(balanced: Balanced, options: FusionOptions) -> dict[str, int]:
    """The widths of the result: the anchor's, and the template's inside units that the anchor lacks."""
    sizes = dict(balanced.structure.sizes)
    shared = options.streams == "shared"
    for unit in balanced.structure.units:
        for layer in unit.layers:
            owner = balanced.reference(balanced.owners_of(layer, unit, shared))
            sizes[layer.space] = balanced.structures[owner].sizes[layer.space]
    return sizes


def _shares(
    balanced: Balanced, unit: Unit, layer: Layer, name: str, weights: Sequence[float], options: FusionOptions
) -> list[float]:
    r"""The share of every parent in one parameter.

    Most parameters are plainly averaged: parent k has the share :math:`w_k`. But let the parents have the shares
    :math:`s_k` of a residual unit :math:`x + V \phi(U x)`: 1 or 0, where it is an inserted identity with :math:`V = 0`,
    or something between in an average of networks of which some had it. Then

    .. math:: U = \sum_k \frac{w_k s_k}{\sum_j w_j s_j} U_k, \qquad V = \sum_k w_k V_k

    so that the branch gives about :math:`\sum_k w_k V_k \phi(U_k x)`, the mean of the parents' branches. Were the
    identities averaged into U as well, the branch would shrink by the square of its owners' weight.
    """
    everybody = range(len(balanced.parents))
    inside = balanced.inner_weights(unit, weights)
    if options.head == "anchor" and layer.space == balanced.structure.output:
        return [float(k == balanced.anchor) for k in everybody]
    whole = inside == dict(enumerate(weights))
    if options.streams == "per_layer" or unit.kind == "plain" or whole:
        return list(weights)
    if layer.name == unit.closing and name.endswith((".weight", ".bias")):
        return [weights[k] if k in inside else 0.0 for k in everybody]
    total = sum(inside.values())
    if total == 0:
        return [float(k == min(inside)) for k in everybody]
    return [inside.get(k, 0.0) / total for k in everybody]


def average(models: Sequence[nn.Module], weights: Sequence[float] | None = None) -> nn.Module:
    """The plain average of networks of one architecture, parameter by parameter: the naive baseline.

    Args:
        models: at least one network; left as they are.
        weights: per network, at least 0 with a positive sum; None: equal.

    Returns:
        A network of the class of the first, in eval mode.

    Raises:
        FusionError: if names or shapes of the parameters differ.
    """
    shares = normalized(weights, len(models))
    states = [state_of(model) for model in models]
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
    return load_state(independent_copy(models[0]), averaged)
