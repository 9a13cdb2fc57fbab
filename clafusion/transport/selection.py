"""Choosing neurons, or groups of them, that explain what all neurons do."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

#: Ridge of the reconstruction of the other neurons from the chosen ones, and the least rest that can be chosen, both
#: relative to the variance.
RIDGE, LEAST = 1e-4, 1e-7
#: Directions of a metric with less than this share of the largest eigenvalue do not count.
SMALLEST_EIGENVALUE = 1e-8


def selection(
    covariance: Tensor, importance: Tensor, count: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Neurons, or groups of them, that explain most of what all neurons do; the first ones explain most.

    With A the covariance, G the metric and B = A root(G), the next neuron is

    .. math:: \arg\max_i \lVert B_i \rVert^2 / A_{ii}, \qquad
        A \leftarrow A - a_i a_i^\top / A_{ii}, \qquad B \leftarrow B - a_i b_i^\top / A_{ii}

    which minimises tr(G A) of what is left of the covariance A (column subset selection by pivoted elimination).

    Args:
        covariance: of all neurons, [n, n].
        importance: of each, at least 0, [n], the diagonal of G; or G itself, positive semidefinite, [n, n].
        count: how many groups to choose, at most.
        groups: of each neuron, [n]; those of a group are chosen together. None: each is a group of its own.

    Returns:
        The chosen groups, and by how much each of them lessens tr(G A), at least 0, both [count].
    """
    groups = torch.arange(len(covariance), device=covariance.device) if groups is None else groups
    rest = covariance.clone()
    reach = covariance * importance.sqrt() if importance.ndim == 1 else covariance @ _root(importance)
    before = rest.diagonal().clone()
    floor = RIDGE * 1e-2 * float(before.mean()) + 1e-30
    number = int(groups.max()) + 1
    open_groups = torch.ones(number, dtype=torch.bool, device=rest.device)
    chosen: list[int] = []
    gained: list[float] = []
    for _ in range(min(count, number)):
        left = rest.diagonal()
        gains = torch.where(left > LEAST * before + 1e-30, reach.square().sum(1) / (left + floor), 0.0)
        score = gains.new_zeros(number).index_add_(0, groups, gains)
        score[~open_groups] = -math.inf
        best = int(score.argmax())
        gained.append(float(score[best]))
        if gained[-1] <= 0:  # nothing is left to explain: the liveliest of the others
            score = before.new_zeros(number).index_add_(0, groups, before)
            score[~open_groups] = -math.inf
            best = int(score.argmax())
        chosen.append(best)
        open_groups[best] = False
        for i in (groups == best).nonzero().flatten().tolist():
            column, row, pivot = rest[:, i].clone(), reach[i].clone(), float(rest[i, i])
            if pivot > LEAST * float(before[i]) + 1e-30:
                rest.addr_(column, column, alpha=-1 / (pivot + floor))
                reach.addr_(column, row, alpha=-1 / (pivot + floor))
    return torch.tensor(chosen, device=covariance.device), covariance.new_tensor(gained)


def _root(metric: Tensor) -> Tensor:
    """A factor F of a positive semidefinite matrix, [n, rank], with F times its transpose the matrix."""
    values, vectors = torch.linalg.eigh(metric)
    kept = values > SMALLEST_EIGENVALUE * values[-1]
    root: Tensor = vectors[:, kept] * values[kept].sqrt()
    return root


def select_blocks(covariances: Mapping[str, Tensor], inside: Mapping[str, Tensor], count: int) -> Tensor:
    """Blocks that explain most of what the neurons in all of them do.

    Args:
        covariances: of the neurons of each space that is in the blocks, [n, n], as far as they are known.
        inside: by space the block of every neuron, [n].
        count: how many blocks to choose.

    Returns:
        [count], int64, on the CPU.
    """
    if not covariances:
        return torch.arange(count)
    parts, blocks = [], []
    for name, covariance in covariances.items():
        parts.append(covariance / covariance.diagonal().mean().clamp_min(1e-30))
        blocks.append(inside[name].to(covariance.device))
    whole = torch.block_diag(*parts)
    return selection(whole, whole.new_ones(len(whole)), count, torch.cat(blocks))[0].cpu()


def as_maps(kept: Tensor, covariance: Tensor | None, total: int) -> tuple[Tensor, Tensor]:
    """The maps of chosen neurons.

    Args:
        kept: the chosen neurons, [chosen].
        covariance: of all neurons, [total, total]; None: not known.
        total: how many neurons there are.

    Returns:
        Ones at the places of the chosen neurons, and for every neuron the weights of the chosen ones in what stands for
        it once only they are there, both [total, chosen] on the device of the covariance.
    """
    device = kept.device if covariance is None else covariance.device
    kept = kept.to(device)
    placed = torch.zeros(total, len(kept), dtype=torch.float64, device=device)
    placed[kept, torch.arange(len(kept), device=device)] = 1
    if covariance is None:
        return placed, placed
    of_chosen = covariance[kept][:, kept]
    penalty = RIDGE * of_chosen.diagonal().mean().clamp_min(1e-30)
    identity = torch.eye(len(kept), dtype=of_chosen.dtype, device=device)
    back = torch.linalg.solve(of_chosen + penalty * identity, covariance[kept]).T
    back[kept] = identity
    return placed, back
