"""Regressions of a layer's weights on its input: ridge, rectified and softmax, all on one factorised system."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.statistics.samples import check_features

#: The least ridge: enough for dependent observations to be no obstacle in float64.
MIN_RIDGE = 1e-10
#: Numbers in a block of a design, the products of which are summed in the design's own precision.
BLOCK = 2**22
#: Columns of a Gram matrix that are computed at once, from the diagonal downwards.
STRIP = 256
#: Iterations of the regressions that have no closed form; each solves one factorised system.
RECTIFIED_STEPS = 3
SOFT_LABEL_STEPS = 100


@dataclass(frozen=True)
class RidgeSystem:
    r"""Ridge regressions on one design, of which the matrix is factorised once.

    Per group, with X the inputs centred by their mean if there is a constant one (which is not penalised and takes what
    is left), the weights :math:`W_0 + \Delta` leave the residual :math:`R = T - X W_0` to

    .. math:: \Delta = (X^\top X + \lambda I)^{-1} X^\top R = X^\top (X X^\top + \lambda I)^{-1} R

    The first is the primal form, a system as large as there are inputs. The second is the dual form, as large as there
    are observations; both are equal since :math:`X^\top (X X^\top + \lambda I) = (X^\top X + \lambda I) X^\top`. The
    *coefficients* are :math:`\Delta` itself, or with less than half as many observations as inputs A in the cheaper
    :math:`\Delta = X^\top A, (X X^\top + \lambda I) A = R`. Those of the constant input are the last row of either.

    Attributes:
        x: the design, [observations, groups, inputs].
        intercept: whether the last input is the constant one.
        penalty: :math:`\lambda` of each group, [groups, 1, 1].
        mean: of the inputs that are penalised, [groups, inputs, 1]; zero without an intercept.
        factor: Cholesky factor of the penalised Gram matrix of the inputs or of the observations, [groups, n, n].
        kernel: the Gram matrix of the observations, with less than half as many as inputs.
    """

    x: Tensor
    intercept: bool
    penalty: Tensor
    mean: Tensor
    factor: Tensor
    kernel: Tensor | None

    @classmethod
    def of(cls, x: Tensor, ridge: float | Tensor, intercept: bool) -> "RidgeSystem":
        """Factorise the system of a design.

        Args:
            x: [observations, groups, inputs].
            ridge: the penalty in units of the sum of squares of an average input; one for all groups or [groups].
            intercept: whether the last input is the constant one.

        Raises:
            FusionError: if an input is not finite.
        """
        count, inputs = x.shape[0], x.shape[2] - intercept
        total, squares = _sums(x[:, :, :inputs])
        check_features(total, squares)
        mean = total / count if intercept else torch.zeros_like(total)
        # A layer whose input is dead keeps its weights.
        least = torch.as_tensor(ridge, dtype=torch.float64, device=x.device).clamp_min(MIN_RIDGE)
        penalty = (least * squares.mean(1)).clamp_min(torch.finfo(torch.float64).eps * max(count, 1))
        kernel = None
        if 2 * count < inputs:
            kernel = _observation_gram(x[:, :, :inputs], intercept)
            factor = _cholesky(kernel.clone(), penalty)
        else:
            factor = _cholesky(_gram(x[:, :, :inputs], mean), penalty)
            if factor is None:  # in single precision it may still
                factor = _cholesky(_gram(x[:, :, :inputs].double(), mean), penalty)
        assert factor is not None
        return cls(x, intercept, penalty[:, None, None], mean[:, :, None], factor, kernel)

    def step(self, residual: Tensor, coefficients: Tensor) -> Tensor:
        r"""Newton's step: the coefficients to be added so as to minimise the ridge objective.

        With a residual in single precision the step is one in single precision: good enough to be taken repeatedly.

        Args:
            residual: what is missing in the outputs, [groups, observations, outputs].
            coefficients: those that left it missing, [groups, n (+ 1), outputs].
        """
        pull = self.penalty * coefficients[:, : self.factor.shape[1]]
        total = residual.sum(1, keepdim=True, dtype=torch.float64)
        constant = total / len(self.x)
        if self.kernel is not None:
            centred = residual.double() - constant if self.intercept else residual.double()
            step = torch.cholesky_solve(centred - pull, self.factor)
        else:
            right = self._correlate(residual)[:, : self.factor.shape[1]]
            right = (right - self.mean * total - pull).to(residual.dtype)
            step = torch.cholesky_solve(right, self.factor.to(residual.dtype)).double()
            constant = constant - (self.mean * step).sum(1, keepdim=True)
        return torch.cat([step, constant], 1) if self.intercept else step

    def outputs(self, coefficients: Tensor) -> Tensor:
        """The change of the outputs by coefficients, [groups, observations, outputs]."""
        if self.kernel is None:
            return self.x.transpose(0, 1) @ coefficients.to(self.x.dtype)
        size = len(self.x)
        return self.kernel @ coefficients[:, :size] + coefficients[:, size:].sum(1, keepdim=True)

    def apply(self, weight: Tensor, span: slice = slice(None)) -> Tensor:
        """The outputs of weights on some inputs: [groups, outputs, inputs] to [groups, observations, outputs]."""
        return torch.cat([x[:, :, span].double() @ weight.transpose(1, 2) for x in _blocks(self.x)], 1)

    def weights(self, prior: Tensor, coefficients: Tensor) -> Tensor:
        """The prior weights and what the coefficients add to them, [groups, outputs, inputs], float64."""
        added = coefficients
        if self.kernel is not None:
            added = self._correlate(coefficients[:, : len(self.x)])
            if self.intercept:
                shift = (self.mean * added[:, :-1]).sum(1, keepdim=True)
                added = torch.cat([added[:, :-1], coefficients[:, -1:] - shift], 1)
        return prior.double() + added.transpose(1, 2)

    def regress(self, residual: Tensor, prior: Tensor) -> Tensor:
        r"""The weights :math:`\arg\min_W \lVert X W^\top - T \rVert^2 + \lambda \lVert W - W_0 \rVert^2`.

        The ridge makes the system definite however few or dependent the observations are.

        Args:
            residual: the error of the prior weights :math:`T - X W_0^\top`, [groups, observations, outputs].
            prior: :math:`W_0`, [groups, outputs, inputs].

        Returns:
            [groups, outputs, inputs], float64.
        """
        prior = prior.double()
        return self.weights(prior, self.step(residual, self.nothing(prior)))

    def nothing(self, prior: Tensor) -> Tensor:
        """The coefficients that leave prior weights as they are."""
        return prior.new_zeros(len(prior), self.factor.shape[1] + self.intercept, prior.shape[1])

    def moments(self, weight: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        """Mean and variance of what weights on some of the inputs give, both [groups x outputs], float64."""
        outputs = self.apply(weight, span)
        return outputs.mean(1).flatten(), outputs.var(1, correction=0).flatten()

    def _correlate(self, values: Tensor) -> Tensor:
        """The design times [groups, observations, outputs], summed over the observations, float64."""
        blocks = zip(_blocks(self.x), values.split(_block_rows(self.x), dim=1), strict=True)
        parts = ((x.transpose(1, 2).to(value.dtype) @ value).double() for x, value in blocks)
        return sum(parts, torch.zeros((), dtype=torch.float64, device=values.device))


def rectified_regression(system: RidgeSystem, target: Tensor, base: Tensor, prior: Tensor) -> Tensor:
    r"""Ridge regression of what a ReLU lets through: a negative target asks for no more than a negative output.

    Minimises :math:`\sum r^2 + \lambda \lVert W - W_0 \rVert^2`, where with the output y the error r is
    :math:`t - y` where the target is positive and :math:`\max(y, 0)` elsewhere. The objective is convex and its
    curvature is at most that of plain regression, so that each step solves the same factorised system. It begins with
    the weights of plain regression; the steps are accelerated (Nesterov 1983, as in Beck and Teboulle 2009).

    Args:
        system: of the inputs.
        target: pre-activations to reach, [groups, observations, outputs].
        base: the output with the prior weights, and with all that is added to it before the ReLU.
        prior: weights to be pulled towards, [groups, outputs, inputs].

    Returns:
        [groups, outputs, inputs], float64.
    """
    prior = prior.double()
    coefficients = system.step(target - base, system.nothing(prior))
    active, target, base = target > 0, target.to(system.x.dtype), base.to(system.x.dtype)
    previous, momentum = coefficients, 1.0
    for _ in range(RECTIFIED_STEPS):
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = coefficients + (momentum - 1) / following * (coefficients - previous)
        output = base + system.outputs(ahead)
        residual = torch.where(active, target - output, -output.clamp_min(0))
        previous, coefficients, momentum = coefficients, ahead + system.step(residual, ahead), following
    return system.weights(prior, coefficients)


def soft_label_regression(
    x: Tensor,
    probabilities: Tensor,
    prior: Tensor,
    ridge: float | Tensor,
    intercept: bool,
    offset: Tensor | float = 0.0,
) -> Tensor:
    r"""Softmax regression on soft labels, by majorisation with a fixed curvature (Boehning 1992).

    Minimises the cross entropy of `softmax(x W^T)` to the given probabilities plus the ridge. The Hessian is bounded by
    half the Gram matrix, so that each step solves the same factorised system, and none increases the objective.

    Args:
        x: inputs, [observations, groups, inputs]; each group is a regression of its own.
        probabilities: [groups, observations, classes], rows sum to one.
        prior: weights to start from and to be pulled towards, [groups, classes, inputs].
        ridge: as in `RidgeSystem.of`.
        intercept: whether the last input is the constant one.
        offset: what else is added to the logits, [groups, observations, classes].

    Returns:
        [groups, classes, inputs], float64.
    """
    # Half the Gram matrix plus the penalty is half of this system.
    system = RidgeSystem.of(x.double(), 2 * ridge, intercept)
    prior = prior.double()
    base, coefficients = system.apply(prior) + offset, system.nothing(prior)
    for _ in range(SOFT_LABEL_STEPS):
        error = probabilities - (base + system.outputs(coefficients)).softmax(-1)
        coefficients = coefficients + system.step(2 * error, coefficients)
    return system.weights(prior, coefficients)


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Blocks of the rows of a design, [groups, rows, inputs]."""
    for block in x.split(_block_rows(x)):
        yield block.transpose(0, 1)


def _block_rows(x: Tensor) -> int:
    return max(1, BLOCK // max(1, x[0].numel()))


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of the inputs and of their squares over the observations, [groups, inputs], float64."""
    total = x.new_zeros(x.shape[1:], dtype=torch.float64)
    squares = total.clone()
    for block in _blocks(x):
        total += block.sum(1, dtype=torch.float64)
        squares += block.square().sum(1, dtype=torch.float64)
    return total, squares


def _gram(x: Tensor, mean: Tensor) -> Tensor:
    """The Gram matrix of the centred inputs, [groups, inputs, inputs], float64; of its upper half a part is missing."""
    gram = -len(x) * mean[:, :, None] * mean[:, None, :]
    for block in _blocks(x):
        for start in range(0, x.shape[2], STRIP):
            strip = slice(start, start + STRIP)
            gram[:, start:, strip] += block[:, :, start:].transpose(1, 2) @ block[:, :, strip]
    return gram


def _observation_gram(x: Tensor, centre: bool) -> Tensor:
    """The Gram matrix of the observations, of centred inputs if wanted, [groups, n, n], float64."""
    gram = x.new_zeros(x.shape[1], len(x), len(x), dtype=torch.float64)
    for block in x.split(max(1, BLOCK // max(1, x[:, :, 0].numel())), dim=2):
        inputs = block.transpose(0, 1).double()
        gram += inputs @ inputs.transpose(1, 2)
    if centre:
        gram -= gram.mean(1, keepdim=True)
        gram -= gram.mean(2, keepdim=True)
    return gram


def _cholesky(gram: Tensor, penalty: Tensor) -> Tensor | None:
    """The factor of the penalised matrix, of which the lower half is read; None where it is not positive definite.

    The matrix is overwritten.
    """
    gram.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    factor, failed = torch.linalg.cholesky_ex(gram)
    return None if failed.any() else factor
