"""Rescale and repair: every neuron gets back the spread, and with a shift the mean, that its parents have."""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from clafusion.correction.affine import folded_layer
from clafusion.correction.targets import Targets
from clafusion.statistics.moments import NeuronSums
from clafusion.statistics.samples import check_features
from clafusion.tracing.execution import Cursor
from clafusion.tracing.structure import Structure, Unit


def match_moments(
    structure: Structure, unit: Unit, fused: Cursor, cursors: Sequence[Cursor], targets: Targets, shift: bool
) -> Iterator[None]:
    """Scale (and shift) the neurons of one unit, layer by layer, in place.

    Args:
        structure: the fused network's structure.
        unit: one of its units.
        fused: the fused network, halted before the unit.
        cursors: the balanced parents, halted there too.
        targets: made of the parents' moments.
        shift: also match the means, in layers that can hold a bias.

    Yields:
        After every layer.
    """
    for layer in (layer for layer in unit.layers if layer.weighted):
        part = folded_layer(structure, layer)
        sums = _measured(fused, part.output)
        mean, deviation = sums.mean, sums.variance.sqrt()
        wanted_mean, wanted_deviation = torch.zeros_like(mean), torch.zeros_like(mean)
        for k, share in targets.shares(layer, unit).items():
            theirs = _measured(cursors[k], part.output)
            wanted_mean += share * targets.moved(k, layer, theirs.mean[None])[0]
            wanted_deviation += share * targets.moved(k, layer, theirs.variance.sqrt()[None])[0]
        # A neuron that does not vary has no scale that could be given back.
        scale = torch.where(deviation > sums.rounding, wanted_deviation / deviation, 1.0)
        weight, bias = part.read()
        centre = scale * (mean - bias)
        new_bias = wanted_mean - centre if shift and part.has_bias else scale * bias
        part.write(scale[:, None] * weight, new_bias, (centre, (scale * deviation).square()))
        yield


def _measured(cursor: Cursor, node: str) -> NeuronSums:
    """The sums over all samples of the neurons at a node."""
    sums: NeuronSums | None = None
    for outputs in cursor.look_ahead([node]):
        sums = NeuronSums.of(outputs[node], onto=sums)
    assert sums is not None
    check_features(sums.total, sums.squares)
    return sums


def add_missing_biases(model: nn.Module) -> nn.Module:
    """Give every Linear and Conv2d of a network that has neither biases nor norms a zero bias, in place."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    norms = any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
    if norms or any(layer.bias is not None for layer in layers):
        return model
    for layer in layers:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
    return model
