"""Neuron transport: how the neurons of one network are carried onto those of another.

Notation as in OTFusion (Singh & Jaggi 2020): `cost[i, j]` is the ground cost between neuron i of the other network and
neuron j of the anchor, a *plan* couples their masses, and a *map* is a plan divided by the anchor's marginal, so that
each of its columns (an anchor neuron as a mixture of the other's neurons) sums to one.
"""

import warnings
from collections.abc import Callable

import numpy as np
import ot
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.statistics.moments import Moments
from clafusion.statistics.samples import check_features

#: Entries of a cost matrix from which Sinkhorn's iterations are faster on an accelerator than on the CPU.
ACCELERATED = 2**16
#: Iterations of Sinkhorn's, at most.
MOST_ITERATIONS = 10_000

_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda cost: cost,
    "max": lambda cost: cost / cost.max().clamp_min(torch.finfo(cost.dtype).tiny),
    "mean": lambda cost: cost / cost.mean().clamp_min(torch.finfo(cost.dtype).tiny),
    "median": lambda cost: cost / cost.median().clamp_min(torch.finfo(cost.dtype).tiny),
    "log": torch.log1p,
}


def ground_cost(moments: Moments, kind: str = "correlation", squared: bool = False, normalize: str = "none") -> Tensor:
    """The cost between every neuron of x and every neuron of y, from their moments.

    Args:
        moments: joint sums of the features of n and m neurons.
        kind: `correlation` (1 minus Pearson's; 1 for a neuron that does not vary, less between two of them that are
            alike before their activation function), `euclidean` (distance of the feature
            vectors) or `cosine` (1 minus the cosine).
        squared: square the euclidean distance.
        normalize: divide by the `max`, `mean` or `median`, take `log` (of 1 + cost), or `none`.

    Returns:
        [n, m], float64, non-negative.

    Raises:
        FusionError: if the moments are not finite.
    """
    check_features(moments.xx, moments.yy, moments.xy)
    if kind == "euclidean":
        distance = (moments.xx[:, None] + moments.yy[None, :] - 2 * moments.xy).clamp_min(0)
        cost = distance if squared else distance.sqrt()
    elif kind == "correlation":
        mean_x, mean_y = moments.x / moments.count, moments.y / moments.count
        centred = (moments.xy / moments.count).addr_(mean_x, mean_y, alpha=-1)
        variance_x = _variance(moments.xx / moments.count, mean_x, moments.count)
        variance_y = _variance(moments.yy / moments.count, mean_y, moments.count)
        cost = 1 - _ratio(centred, variance_x, variance_y)
        if moments.before is not None:
            _tell_apart_silent(cost, moments, moments.before)
    else:
        cost = 1 - _ratio(moments.xy, moments.xx, moments.yy)
    return _NORMALIZERS[normalize](cost.clamp_min_(0))


def _tell_apart_silent(cost: Tensor, moments: Moments, before: Moments) -> None:
    """Lower, in place, the costs between neurons that do not vary, by how alike they are before their activation.

    Of neurons that do not vary there either, such as behind a dead input, the means are compared.
    """
    rows, columns = (side.nonzero().flatten() for side in moments.silent())
    means = (before.x[rows] / before.count)[:, None] - before.y[columns] / before.count
    apart = means.abs() / means.abs().max().clamp_min(torch.finfo(means.dtype).tiny)
    alike = ground_cost(before, "correlation")[rows][:, columns]
    cost[rows[:, None], columns] = 0.5 + 0.249 * alike + 0.001 * apart


def _variance(square: Tensor, mean: Tensor, count: int) -> Tensor:
    """The variance of every neuron, 0 where it is nothing but the rounding of its mean square."""
    variance = square - mean.square()
    return torch.where(variance > torch.finfo(torch.float64).eps * count * square, variance, 0.0)


def _ratio(product: Tensor, square_x: Tensor, square_y: Tensor) -> Tensor:
    """`product / sqrt(square_x square_y)`, 0 where a square is 0."""
    scale_x, scale_y = (torch.where(square > 0, square.rsqrt(), 0.0) for square in (square_x, square_y))
    return (product * scale_x[:, None]).mul_(scale_y)


def transport_plan(
    cost: Tensor,
    solver: str = "exact",
    mass: tuple[Tensor, Tensor] | None = None,
    regularization: float = 0.05,
    marginal_regularization: float = 1.0,
) -> Tensor:
    """The coupling of two sets of neurons of least cost.

    `exact` solves the assignment problem where the widths are equal and the masses uniform (a vertex of the transport
    polytope is then a permutation), and the linear programme otherwise; `sinkhorn` adds `regularization` times the
    entropy (Cuturi 2013); `unbalanced` also relaxes both marginals (Chizat et al. 2018).

    Args:
        cost: [n, m].
        solver: `exact`, `sinkhorn` or `unbalanced`.
        mass: the two marginals, [n] and [m], each summing to one; None: uniform.
        regularization: entropic regularisation, in the units of the cost.
        marginal_regularization: weight of the divergence from the marginals.

    Returns:
        The plan [n, m], float64, on the device of the cost.

    Raises:
        FusionError: if the cost is not finite, or the solver is unknown.

    Warns:
        UserWarning: if the iterations of `sinkhorn` or `unbalanced` have not converged.
    """
    _check(cost)
    if solver == "exact":
        return _exact(cost, mass)
    if solver == "sinkhorn":
        power = 1.0
    elif solver == "unbalanced":
        power = marginal_regularization / (marginal_regularization + regularization)
    else:
        raise FusionError(f"Expected solver exact, sinkhorn or unbalanced, got {solver!r}")
    device = cost.device if cost.numel() >= ACCELERATED else torch.device("cpu")
    p, q = (side.to(device) for side in _marginals(cost, mass))
    return _scaled(cost.to(device, torch.float64), p, q, regularization, power).to(cost.device)


def _check(cost: Tensor) -> None:
    if cost.ndim != 2 or not cost.isfinite().all():
        raise FusionError(f"Expected a finite cost matrix [n, m], got shape {list(cost.shape)} or non-finite values")


def _scaled(cost: Tensor, p: Tensor, q: Tensor, regularization: float, power: float) -> Tensor:
    """Sinkhorn's iterations; with a power below one generalised to relaxed marginals (Chizat et al. 2018).

    They run on logarithms: POT's overflow where costs are large. POT also asks every array library that is installed,
    of which some take most of a GPU's memory for it.
    """
    log_kernel = -cost / regularization
    log_p, log_q = p.log(), q.log()
    log_u, log_v = torch.zeros_like(p), torch.zeros_like(q)
    for _ in range(MOST_ITERATIONS):
        before = log_v
        log_u = -power * (log_kernel + (log_q + log_v)).logsumexp(1)
        log_v = -power * (log_kernel + (log_p + log_u)[:, None]).logsumexp(0)
        change = float((log_v - before).abs().max())
        if change <= 1e-9:
            break
    else:
        warnings.warn(
            f"Expected Sinkhorn's iterations to converge, got masses that still change by a share of {change:.1e} in "
            f"the last of {MOST_ITERATIONS:,}; raise regularization above {regularization}",
            UserWarning,
            stacklevel=2,
        )
    return (log_kernel + (log_p + log_u)[:, None] + (log_q + log_v)).exp()


def _exact(cost: Tensor, mass: tuple[Tensor, Tensor] | None) -> Tensor:
    ground = cost.double().cpu().numpy()
    n, m = ground.shape
    if n == m and mass is None:
        plan = np.zeros((n, m))
        # The same optimum, found in half the time; in a hundredth where rows are equal, as those of an inserted block.
        plan[linear_sum_assignment(ground - ground.min(0))] = 1 / n
    else:
        p, q = (side.numpy() for side in _marginals(cost, mass))
        plan = ot.emd(p, q, ground, numItermax=10_000_000)
    return torch.from_numpy(plan).to(cost.device)


def gromov_plan(x: Tensor, y: Tensor, mass: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """The Gromov-Wasserstein coupling: neurons with alike distances to their own network's neurons are coupled.

    Args:
        x: distances within the other network, [n, n].
        y: distances within the anchor, [m, m].
        mass: the two marginals; None: uniform.

    Returns:
        A (locally optimal) plan [n, m], float64.

    Raises:
        FusionError: if a distance is not finite.
    """
    _check(x)
    _check(y)
    p, q = (side.numpy() for side in _marginals(x.new_empty(x.shape[0], y.shape[0]), mass))
    plan = ot.gromov.gromov_wasserstein(x.double().cpu().numpy(), y.double().cpu().numpy(), p, q, symmetric=True)
    return torch.from_numpy(np.asarray(plan)).to(x.device)


def as_map(plan: Tensor) -> Tensor:
    """A plan divided by the anchor's marginal: columns sum to one.

    Raises:
        FusionError: if a neuron of the anchor received no mass (an unbalanced plan may do that).
    """
    marginal = plan.sum(0)
    if not (marginal > torch.finfo(plan.dtype).tiny).all():
        raise FusionError(
            "Expected every neuron of the anchor to receive mass, got none for some; raise marginal_regularization"
        )
    return plan / marginal


def transport_map(
    cost: Tensor,
    solver: str = "exact",
    mass: tuple[Tensor, Tensor] | None = None,
    regularization: float = 0.05,
    marginal_regularization: float = 1.0,
) -> Tensor:
    """The map [n_other, n_anchor] of the plan of least cost; its columns sum to one. Arguments as `transport_plan`.

    Example:
        >>> transport_map(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    return as_map(transport_plan(cost, solver, mass, regularization, marginal_regularization))


def _marginals(cost: Tensor, mass: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """The masses of both sides, each summing to one, float64, on the CPU."""
    if mass is None:
        p, q = (torch.ones(size, dtype=torch.float64) for size in cost.shape)
    else:
        p, q = (side.double().cpu() for side in mass)
    return p / p.sum(), q / q.sum()
