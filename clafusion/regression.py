"""Regression of a layer's weights on its input: ridge, ridge through a ReLU, and softmax regression on soft labels."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clafusion.statistics import check_features


def design_rows(module: nn.Linear | nn.Conv2d, inputs: Tensor, chosen: Tensor) -> Tensor:
    """The inputs of the neurons of a layer at chosen observations: what each output is a linear function of.

    Args:
        module: a Linear, or a Conv2d of any kernel, stride, padding, dilation and grouping.
        inputs: a batch of its inputs.
        chosen: indices of observations; they are counted sample by sample, then by output row and column.

    Returns:
        [chosen, groups, fan-in].
    """
    if isinstance(module, nn.Linear):
        return inputs[chosen, None, :]
    left, right, top, bottom = _padding(module)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, (left, right, top, bottom), mode=mode)
    height, width = (
        (extent - dilation * (kernel - 1) - 1) // stride + 1
        for extent, kernel, stride, dilation in zip(
            padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
        )
    )
    sample, y, x = chosen // (height * width), chosen // width % height, chosen % width
    offsets = [
        torch.arange(kernel, device=inputs.device) * dilation
        for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)
    ]
    rows = (y * module.stride[0])[:, None, None] + offsets[0][None, :, None]
    columns = (x * module.stride[1])[:, None, None] + offsets[1][None, None, :]
    patches = padded.movedim(1, -1)[sample[:, None, None], rows, columns]  # [chosen, kernel, kernel, channels]
    return patches.movedim(-1, 1).reshape(len(chosen), module.groups, -1)


def _padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Left, right, top, bottom."""
    if isinstance(module.padding, str):
        return tuple(module._reversed_padding_repeated_twice)  # type: ignore[return-value]
    vertical, horizontal = module.padding
    return horizontal, horizontal, vertical, vertical


#: Iterations of the regressions that have no closed form; each solves one factorised system.
RECTIFIED_STEPS = 6
SOFT_LABEL_STEPS = 100
#: Numbers in a block of a design, the products of which are summed in the design's own precision.
BLOCK = 2**22
#: Columns of a Gram matrix that are computed at once, from the diagonal downwards.
STRIP = 256


@dataclass(frozen=True)
class RidgeSystem:
    r"""The normal equations :math:`(X^\top X + \lambda I) W = R` of ridge regressions on one design, factorised.

    Per group. With many observations the Gram matrix of the inputs is factorised: its blocks are multiplied in the
    precision of the design and summed in float64. With less than half as many observations as inputs it is that of the
    observations, in float64: :math:`(X^\top X + \lambda I)^{-1} = (I - X^\top (X X^\top + \lambda I)^{-1} X) /
    \lambda`. The constant input, if there is one, is eliminated by centring the others; it is not penalised.

    Attributes:
        x: the design, [observations, groups, inputs].
        intercept: whether the last input is the constant one.
        penalty: :math:`\lambda` of each group, [groups].
        mean: of the inputs that are penalised, [groups, inputs]; zero without an intercept.
        factor: Cholesky factor of the smaller Gram matrix, [groups, n, n].
        centred: the centred design, [groups, observations, inputs], where there are fewer observations than inputs.
    """

    x: Tensor
    intercept: bool
    penalty: Tensor
    mean: Tensor
    factor: Tensor
    centred: Tensor | None

    @classmethod
    def of(cls, x: Tensor, ridge: float, intercept: bool) -> "RidgeSystem":
        """Factorises the system of a design.

        Args:
            x: [observations, groups, inputs].
            ridge: the penalty in units of the sum of squares of an average input.
            intercept: whether the last input is the constant one.

        Raises:
            FusionError: if an input is not finite.
        """
        count, inputs = x.shape[0], x.shape[2] - intercept
        total, squares = _sums(x[:, :, :inputs])
        check_features(total, squares)
        mean = total / count if intercept else torch.zeros_like(total)
        # A layer whose input is dead keeps its weights.
        penalty = (ridge * squares.mean(1)).clamp_min(torch.finfo(torch.float64).eps * max(count, 1))
        centred = None
        if 2 * count < inputs:
            centred = x[:, :, :inputs].transpose(0, 1).double() - mean[:, None, :]
            factor = _cholesky(centred @ centred.transpose(1, 2), penalty)
        else:
            factor = _cholesky(_gram(x[:, :, :inputs], mean), penalty)
            if factor is None:  # rounding has made the matrix indefinite
                factor = _cholesky(_gram(x[:, :, :inputs].double(), mean), penalty)
        assert factor is not None
        return cls(x, intercept, penalty, mean, factor, centred)

    def solve(self, right: Tensor) -> Tensor:
        """The W of a right-hand side R, both [groups, inputs, outputs]."""
        if not self.intercept:
            return self._solve_centred(right)
        mean, total = self.mean[:, :, None], right[:, -1:]
        weight = self._solve_centred(right[:, :-1] - mean * total)
        constant = total / len(self.x) - (mean * weight).sum(1, keepdim=True)
        return torch.cat([weight, constant], 1)

    def _solve_centred(self, right: Tensor) -> Tensor:
        if self.centred is None:
            return torch.cholesky_solve(right, self.factor)
        inner = torch.cholesky_solve(self.centred @ right, self.factor)
        return (right - self.centred.transpose(1, 2) @ inner) / self.penalty[:, None, None]

    def regress(self, target: Tensor, prior: Tensor) -> Tensor:
        r"""The weights :math:`\arg\min_W \lVert X W^\top - T \rVert^2 + \lambda \lVert W - W_0 \rVert^2`.

        The ridge makes the system definite however few or dependent the observations are.

        Args:
            target: T, [observations, groups x outputs per group].
            prior: :math:`W_0`, [groups, outputs per group, inputs].

        Returns:
            [groups, outputs per group, inputs], float64.
        """
        prior = prior.double()
        wanted = target.unflatten(1, (prior.shape[0], -1))
        right = torch.zeros_like(prior.transpose(1, 2))
        for x, t in zip(_blocks(self.x), wanted.split(_block_rows(self.x)), strict=True):
            residual = t.transpose(0, 1) - x.double() @ prior.transpose(1, 2)
            right += x.transpose(1, 2).double() @ residual
        return prior + self.solve(right).transpose(1, 2)

    def moments(self, weight: Tensor, span: slice) -> tuple[Tensor, Tensor]:
        """Mean and variance of what weights on some of the inputs give.

        Args:
            weight: [groups, outputs per group, inputs of the span].
            span: the inputs.

        Returns:
            Both [groups x outputs per group], float64.
        """
        outputs = torch.cat([x[:, :, span].double() @ weight.transpose(1, 2) for x in _blocks(self.x)], 1)
        return outputs.mean(1).flatten(), outputs.var(1, correction=0).flatten()


def _blocks(x: Tensor) -> Iterator[Tensor]:
    """Blocks of the rows of a design, [groups, rows, inputs]."""
    for block in x.split(_block_rows(x)):
        yield block.transpose(0, 1)


def _block_rows(x: Tensor) -> int:
    return max(1, BLOCK // max(1, x[0].numel()))


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and sums of squares of the inputs over the observations, [groups, inputs], float64."""
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


def _cholesky(gram: Tensor, penalty: Tensor) -> Tensor | None:
    """The factor of the penalised matrix, of which the lower half is read; None where it is not positive definite.

    The matrix is overwritten.
    """
    gram.diagonal(dim1=1, dim2=2).add_(penalty[:, None])
    factor, failed = torch.linalg.cholesky_ex(gram)
    return None if failed.any() else factor


def rectified_regression(system: RidgeSystem, target: Tensor, offset: Tensor, prior: Tensor) -> Tensor:
    r"""Ridge regression of what a ReLU lets through: a negative target asks for no more than a negative output.

    Minimises :math:`\sum r^2 + \lambda \lVert W - W_0 \rVert^2`, where with :math:`y = x W^\top + \text{offset}` the
    error r is :math:`t - y` where the target is positive and :math:`\max(y, 0)` elsewhere. The objective is convex and
    its curvature is at most that of plain regression, so that each step solves the same factorised system. It begins
    with the weights of plain regression; the steps are accelerated (Nesterov 1983, as in Beck and Teboulle 2009).

    Args:
        system: of the inputs, in one group.
        target: pre-activations to reach, [observations, outputs].
        offset: what is added to the layer's output before the ReLU, [observations or 1, outputs or 1].
        prior: weights to be pulled towards, [outputs, inputs].

    Returns:
        [outputs, inputs], float64.
    """
    x, active, penalty = system.x[:, 0], target > 0, _penalties(system)
    weight = system.regress(target - offset, prior[None])[0].T
    target, pull = target.to(x.dtype), prior.double().T
    previous, momentum = weight, 1.0
    for _ in range(RECTIFIED_STEPS):
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        ahead = weight + (momentum - 1) / following * (weight - previous)
        output = x @ ahead.to(x.dtype) + offset
        residual = torch.where(active, target - output, -output.clamp_min(0))
        step = (x.T @ residual).double() - penalty * (ahead - pull)
        previous, weight, momentum = weight, ahead + system.solve(step[None])[0], following
    return weight.T


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
    x, probabilities = x.double(), probabilities.double()
    # Half the Gram matrix plus the penalty is half of this system.
    system = RidgeSystem.of(x[:, None, :], 2 * ridge, intercept)
    penalty = _penalties(system) / 2
    start = prior.double().T
    weight = start
    for _ in range(SOFT_LABEL_STEPS):
        error = probabilities - (x @ weight).softmax(-1)
        weight = weight + 2 * system.solve((x.T @ error - penalty * (weight - start))[None])[0]
    return weight.T


def _penalties(system: RidgeSystem) -> Tensor:
    """The penalty of each input of the only group, [inputs, 1]."""
    free = torch.ones(system.x.shape[2], 1, dtype=torch.float64, device=system.x.device)
    if system.intercept:
        free[-1] = 0.0
    return system.penalty[0] * free
