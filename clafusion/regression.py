"""Regressions that have no closed form: ridge through a ReLU, and softmax regression on soft labels."""

import math

import torch
from torch import Tensor

from clafusion.ridge import RidgeSystem

#: Iterations of the regressions that have no closed form; each solves one factorised system.
RECTIFIED_STEPS = 3
SOFT_LABEL_STEPS = 100


def rectified_regression(system: RidgeSystem, target: Tensor, offset: Tensor, prior: Tensor) -> Tensor:
    r"""Ridge regression of what a ReLU lets through: a negative target asks for no more than a negative output.

    Minimises :math:`\sum r^2 + \lambda \lVert W - W_0 \rVert^2`, where with :math:`y = x W^\top + \text{offset}` the
    error r is :math:`t - y` where the target is positive and :math:`\max(y, 0)` elsewhere. The objective is convex and
    its curvature is at most that of plain regression, so that each step solves the same factorised system. It begins
    with the weights of plain regression; the steps are accelerated (Nesterov 1983, as in Beck and Teboulle 2009).

    Args:
        system: of the inputs.
        target: pre-activations to reach, [groups, observations, outputs].
        offset: what is added to the layer's output before the ReLU, broadcast to the target.
        prior: weights to be pulled towards, [groups, outputs, inputs].

    Returns:
        [groups, outputs, inputs], float64.
    """
    prior = prior.double()
    base = system.apply(prior) + offset
    found = system.step(target - base, system.nothing(prior))
    active, target, base = target > 0, target.to(system.x.dtype), base.to(system.x.dtype)
    previous, momentum = found, 1.0
    for _ in range(RECTIFIED_STEPS):
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = found + (momentum - 1) / following * (found - previous)
        output = base + system.outputs(ahead)
        residual = torch.where(active, target - output, -output.clamp_min(0))
        previous, found, momentum = found, ahead + system.step(residual, ahead), following
    return system.weights(prior, found)


def soft_label_regression(x: Tensor, probabilities: Tensor, prior: Tensor, ridge: float, intercept: bool) -> Tensor:
    r"""Softmax regression on soft labels, by majorisation with a fixed curvature (Boehning 1992).

    Minimises the cross entropy of `softmax(x W^T)` to the given probabilities plus the ridge. The Hessian is bounded by
    half the Gram matrix, so that each step solves the same factorised system, and none increases the objective.

    Args:
        x: inputs, [observations, inputs].
        probabilities: [observations, classes], rows sum to one.
        prior: weights to start from and to be pulled towards, [classes, inputs].
        ridge: as in `RidgeSystem.of`.
        intercept: whether the last input is the constant one.

    Returns:
        [classes, inputs], float64.
    """
    # Half the Gram matrix plus the penalty is half of this system.
    system = RidgeSystem.of(x.double()[:, None, :], 2 * ridge, intercept)
    prior = prior.double()[None]
    base, found = system.apply(prior), system.nothing(prior)
    for _ in range(SOFT_LABEL_STEPS):
        error = probabilities - (base + system.outputs(found)).softmax(-1)
        found = found + system.step(2 * error, found)
    return system.weights(prior, found)[0]
