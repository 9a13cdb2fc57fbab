"""Rescale and repair: every neuron gets back the spread, and with a shift the mean, that its parents have."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clafusion.correction.affine import folded_layer
from clafusion.correction.steps import Step
from clafusion.correction.targets import Targets
from clafusion.statistics.moments import NeuronSums
from clafusion.statistics.samples import check_features
from clafusion.tracing.execution import Cursor
from clafusion.tracing.structure import Structure

#: A smaller standard deviation, relative to the root mean square, is taken for rounding.
SMALLEST_SPREAD = 2e-6


def match_moments(
    structure: Structure, step: Step, fused: Cursor, cursors: Sequence[Cursor], targets: Targets, shift: bool
) -> None:
    """Scale (and shift) the neurons of one layer, in place.

    Args:
        structure: of the fused network.
        step: the layer, by itself.
        fused: the fused network, halted before it.
        cursors: the parents, halted before what corresponds.
        targets: made of the parents' moments.
        shift: also match the means, in layers that can hold a bias.
    """
    part = folded_layer(structure, step.last)
    mean, deviation, size = _measured(fused, step.node, step.dim)
    wanted_mean, wanted_deviation = torch.zeros_like(mean), torch.zeros_like(mean)
    for k, share in targets.shares(step).items():
        # The branch of a parent that lacks the unit gives nothing.
        if step.unit.name in targets.balanced.parents[k].units or step.unit.kind != "residual":
            its_mean, its_deviation, _ = _measured(cursors[k], targets.balanced.parents[k].nodes[step.node], step.dim)
            wanted_mean += share * targets.moved(k, step, its_mean[None], structure)[0]
            wanted_deviation += share * targets.moved(k, step, its_deviation[None], structure)[0]
    weight, bias = part.read()
    # A neuron that does not vary has no scale that could be given back.
    rounding = max(2 * torch.finfo(part.weight.dtype).eps, SMALLEST_SPREAD) * size
    scale = torch.where(deviation > rounding, wanted_deviation / deviation, 1.0)
    centre = scale * (mean - bias)
    new_bias = wanted_mean - centre if shift and part.has_bias else scale * bias
    part.write(scale[:, None] * weight, new_bias, (centre, (scale * deviation).square()))


def _measured(cursor: Cursor, node: str, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """The mean, the standard deviation and the root mean square of every neuron at a node, over all samples."""
    sums: NeuronSums | None = None
    for outputs in cursor.look_ahead([node]):
        sums = NeuronSums.of(outputs[node].movedim(dim, 1), onto=sums)
    assert sums is not None
    check_features(sums.total, sums.squares)
    mean, variance = sums.mean_and_variance()
    return mean, variance.sqrt(), (sums.squares / sums.count).sqrt()


def add_missing_biases(model: nn.Module) -> nn.Module:
    """Give every Linear and convolution of a network that has neither biases nor norms a zero bias, in place."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    norms = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if norms or any(layer.bias is not None for layer in layers):
        return model
    for layer in layers:
        layer.bias = nn.Parameter(layer.weight.new_zeros(layer.weight.shape[0]))
    return model
