"""Rescale and repair: every neuron gets back the spread, and with a shift the mean, that its parents have."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from clafusion.correction.affine import affine_layer
from clafusion.correction.targets import Parents
from clafusion.statistics.samples import check_features, rows
from clafusion.tracing.runs import Cursor
from clafusion.tracing.structure import Structure, Unit

#: A smaller standard deviation, relative to the root mean square, is taken for rounding.
SMALLEST_SPREAD = 2e-6


def match_moments(
    structure: Structure, unit: Unit, fused: Cursor, cursors: Sequence[Cursor], parents: Parents, shift: bool
) -> Iterator[None]:
    """Scale (and shift) the neurons of one unit, layer by layer, in place.

    Args:
        structure: the fused network's structure.
        unit: one of its units.
        fused: the fused network, halted before the unit.
        cursors: the balanced parents, halted there too.
        parents: how their moments make targets.
        shift: also match the means, in layers that can hold a bias.

    Yields:
        After every layer.
    """
    for layer in (layer for layer in unit.layers if layer.weighted):
        part = affine_layer(structure, layer)
        mean, deviation, rounding = _moments(fused, part.output)
        wanted_mean, wanted_deviation = torch.zeros_like(mean), torch.zeros_like(mean)
        for k, share in parents.shares(layer, unit).items():
            its_mean, its_deviation, _ = _moments(cursors[k], part.output)
            wanted_mean += share * parents.moved(k, layer, its_mean[None])[0]
            wanted_deviation += share * parents.moved(k, layer, its_deviation[None])[0]
        # A neuron that does not vary has no scale that could be given back.
        scale = torch.where(deviation > rounding, wanted_deviation / deviation, 1.0)
        weight, bias = part.read()
        centre = scale * (mean - bias)
        new_bias = wanted_mean - centre if shift and part.has_bias else scale * bias
        part.write(scale[:, None] * weight, new_bias, (centre, (scale * deviation).square()))
        yield


def _moments(cursor: Cursor, node: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of every neuron at a node the mean, the standard deviation, and how much of that may be rounding; float64."""
    count, total, squares, precision = 0, None, None, 0.0
    for outputs in cursor.look_ahead([node]):
        x = rows(outputs[node])
        precision = torch.finfo(x.dtype).eps
        x = x.double()
        count += len(x)
        total = x.sum(0) if total is None else total + x.sum(0)
        squares = x.square().sum(0) if squares is None else squares + x.square().sum(0)
    assert total is not None and squares is not None
    check_features(total, squares)
    mean, square = total / count, squares / count
    rounding = max(2 * precision, SMALLEST_SPREAD) * square.sqrt()
    return mean, (square - mean.square()).clamp_min(0).sqrt(), rounding


def add_missing_biases(model: nn.Module) -> nn.Module:
    """Give every Linear and Conv2d of a network that has neither biases nor norms a zero bias, in place."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    norms = any(isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) for module in model.modules())
    if norms or any(layer.bias is not None for layer in layers):
        return model
    for layer in layers:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
    return model
