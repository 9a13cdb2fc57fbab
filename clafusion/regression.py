"""Regression of a layer's weights on its input: ridge from sums of products, and softmax regression on soft labels."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
RECTIFIED_STEPS = 10
SOFT_LABEL_STEPS = 100


@dataclass(frozen=True)
class NormalEquations:
    """Sums over observations of a regression of t on x, per group, in float64.

    Attributes:
        count: observations.
        xx: [groups, inputs, inputs].
        xt: [groups, inputs, outputs per group].
    """

    count: int
    xx: Tensor
    xt: Tensor

    @classmethod
    def of(cls, x: Tensor, t: Tensor) -> "NormalEquations":
        """The sums of one batch: x [observations, groups, inputs], t [observations, groups x outputs per group]."""
        x = x.double().transpose(0, 1)
        t = t.double().reshape(t.shape[0], x.shape[0], -1).transpose(0, 1)
        return cls(x.shape[1], x.transpose(1, 2) @ x, x.transpose(1, 2) @ t)

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return replace(self, count=self.count + other.count, xx=self.xx + other.xx, xt=self.xt + other.xt)

    def penalty(self, ridge: float, intercept: bool) -> Tensor:
        """The diagonal of the ridge, [groups, inputs]: `ridge` times an average input's sum of squares."""
        squares = self.xx.diagonal(dim1=1, dim2=2)
        inputs = squares[:, :-1] if intercept else squares
        scale = (ridge * inputs.mean(1, keepdim=True)).expand_as(squares).clone()
        if intercept:
            scale[:, -1] = 0.0
        # A layer whose input is dead keeps its weights.
        return scale.clamp_min(torch.finfo(torch.float64).eps * max(self.count, 1))

    def solve(self, prior: Tensor, ridge: float, intercept: bool) -> Tensor:
        r"""The weights :math:`\arg\min_W \lVert X W^\top - T \rVert^2 + \lambda \lVert W - W_0 \rVert^2`.

        The ridge makes the system definite however few or dependent the observations are.

        Args:
            prior: :math:`W_0`, [groups, outputs per group, inputs].
            ridge: :math:`\lambda` in units of the sum of squares of an average input.
            intercept: whether the last input is the constant one, which is not penalised.

        Returns:
            [groups, outputs per group, inputs], float64.
        """
        matrix = self.xx + torch.diag_embed(self.penalty(ridge, intercept))
        residual = self.xt - self.xx @ prior.transpose(1, 2)
        step = torch.cholesky_solve(residual, torch.linalg.cholesky(matrix))
        return prior + step.transpose(1, 2)


def rectified_regression(
    x: Tensor, target: Tensor, offset: Tensor, sums: NormalEquations, prior: Tensor, ridge: float, intercept: bool
) -> Tensor:
    r"""Ridge regression of what a ReLU lets through: a negative target asks for no more than a negative output.

    Minimises :math:`\sum r^2 + \lambda \lVert W - W_0 \rVert^2`, where with :math:`y = x W^\top + \text{offset}` the
    error r is :math:`t - y` where the target is positive and :math:`\max(y, 0)` elsewhere. The objective is convex and
    its curvature is at most that of plain regression, so that each step solves the same factorised system and none
    increases the objective.

    Args:
        x: inputs, [observations, inputs].
        target: pre-activations to reach, [observations, outputs].
        offset: what is added to the layer's output before the ReLU, [observations or 1, outputs or 1].
        sums: normal equations of the same observations, of `target - offset` on x.
        prior: weights to be pulled towards, [outputs, inputs].
        ridge: as in `NormalEquations.solve`.
        intercept: whether the last input is the constant one.

    Returns:
        [outputs, inputs], float64.
    """
    penalty = sums.penalty(ridge, intercept)[0]
    factor = torch.linalg.cholesky(sums.xx[0] + penalty.diag())
    active = target > 0
    weight = sums.solve(prior[None], ridge, intercept)[0].T
    for _ in range(RECTIFIED_STEPS):
        output = x @ weight.to(x.dtype) + offset
        residual = torch.where(active, target - output, -output.clamp_min(0))
        step = (x.T @ residual).double() - penalty[:, None] * (weight - prior.double().T)
        weight = weight + torch.cholesky_solve(step, factor)
    return weight.T


def soft_label_regression(x: Tensor, probabilities: Tensor, prior: Tensor, ridge: float, intercept: bool) -> Tensor:
    r"""Softmax regression on soft labels, by majorisation with a fixed curvature (Boehning 1992).

    Minimises the cross entropy of `softmax(x W^T)` to the given probabilities plus the ridge. The Hessian is bounded by
    half the Gram matrix, so that each step solves the same factorised system, and none increases the objective.

    Args:
        x: inputs, [observations, inputs].
        probabilities: [observations, classes], rows sum to one.
        prior: weights to start from and to be pulled towards, [classes, inputs].
        ridge: as in `NormalEquations.solve`.
        intercept: whether the last input is the constant one.

    Returns:
        [classes, inputs], float64.
    """
    x, probabilities = x.double(), probabilities.double()
    sums = NormalEquations.of(x[:, None, :], probabilities)
    penalty = sums.penalty(ridge, intercept)[0]
    factor = torch.linalg.cholesky(sums.xx[0] / 2 + penalty.diag())
    start = prior.double().T
    weight = start
    for _ in range(SOFT_LABEL_STEPS):
        error = probabilities - (x @ weight).softmax(-1)
        weight = weight + torch.cholesky_solve(x.T @ error - penalty[:, None] * (weight - start), factor)
    return weight.T
