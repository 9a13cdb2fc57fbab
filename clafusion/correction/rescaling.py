"""Rescale and repair: every neuron gets back the spread, and with a shift the mean, that its parents have."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from clafusion.correction.affine import folded_layer
from clafusion.correction.targets import Targets
from clafusion.statistics.moments import NeuronSums
from clafusion.statistics.samples import check_features
from clafusion.tracing.execution import Cursor
from clafusion.tracing.structure import Structure, Unit

#: A smaller standard deviation, relative to the root mean square, is taken for rounding.
SMALLEST_SPREAD = 2e-6


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
        mean, deviation, size = _measured(fused, part.output)
        wanted_mean, wanted_deviation = torch.zeros_like(mean), torch.zeros_like(mean)
        for k, share in targets.shares(layer, unit).items():
            its_mean, its_deviation, _ = _measured(cursors[k], part.output)
            wanted_mean += share * targets.moved(k, layer, its_mean[None])[0]
            wanted_deviation += share * targets.moved(k, layer, its_deviation[None])[0]
        weight, bias = part.read()
        # A neuron that does not vary has no scale that could be given back.
        rounding = max(2 * torch.finfo(part.module.weight.dtype).eps, SMALLEST_SPREAD) * size
        scale = torch.where(deviation > rounding, wanted_deviation / deviation, 1.0)
        centre = scale * (mean - bias)
        new_bias = wanted_mean - centre if shift and part.has_bias else scale * bias
        part.write(scale[:, None] * weight, new_bias, (centre, (scale * deviation).square()))
        yield


def _measured(cursor: Cursor, node: str) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the standard deviation and the root mean square of every neuron at a node, over all samples."""
    sums: NeuronSums | None = None
    for outputs in cursor.look_ahead([node]):
        sums = NeuronSums.of(outputs[node], onto=sums)
    assert sums is not None
    check_features(sums.total, sums.squares)
    mean, variance = sums.mean_and_variance()
    return mean, variance.sqrt(), (sums.squares / sums.count).sqrt()


def add_missing_biases(model: nn.Module) -> nn.Module:
    """Give every Linear and Conv2d of a network that has neither biases nor norms a zero bias, in place."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    norms = any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
    if norms or any(layer.bias is not None for layer in layers):
        return model
    for layer in layers:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
    return model
