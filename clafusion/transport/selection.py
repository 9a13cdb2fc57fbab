"""Choosing neurons, or groups of them, that explain what all neurons do."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

#: Ridge of the reconstruction of the other neurons from the chosen ones, relative to their mean variance.
RIDGE = 1e-4
#: The share of a neuron's variance that must be left for it to tell more than the chosen ones do; rounding leaves less.
LEAST = 1e-6


def selection(
    covariance: Tensor, importance: Tensor, count: int, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Neurons, or groups of them, that explain most of what all neurons do; the first ones explain most.

    With A what is left of the covariance once the chosen neurons have explained what they can, and G the metric, the
    next neuron is the one that lessens tr(G A) most (column subset selection by pivoted elimination):

    .. math:: \arg\max_i (A G A)_{ii} / A_{ii}, \qquad A \leftarrow A - a_i a_i^\top / A_{ii}

    Of A only the diagonal is kept, and of the product its own: with :math:`p = A_{ii}` and :math:`c = A G a_i`,

    .. math:: (A G A)_{jj} \leftarrow (A G A)_{jj} - 2 a_{ij} c_j / p + a_{ij}^2 \, a_i^\top G a_i / p^2

    Where the chosen neurons explain all others, those follow that are least like any of them: a linear combination of
    others is none any more behind an activation, but a copy stays one.

    Args:
        covariance: of all neurons, [n, n].
        importance: of each, at least 0, [n], the diagonal of G; or G itself, positive semidefinite, [n, n].
        count: how many groups to choose, at most.
        groups: of each neuron, [n]; those of a group are chosen together. None: each is a group of its own.

    Returns:
        The chosen groups, and by how much each of them lessens tr(G A), at least 0, both [count].
    """
    groups = torch.arange(len(covariance), device=covariance.device) if groups is None else groups
    weighted = covariance * importance if importance.ndim == 1 else covariance @ importance
    reach = (weighted * covariance).sum(1)
    before = covariance.diagonal().clone()
    left = before.clone()
    least = LEAST * before + 1e-30
    number = int(groups.max()) + 1
    open_groups = torch.ones(number, dtype=torch.bool, device=left.device)
    # A = covariance - explained @ explained.T, of which the first columns are filled in.
    explained, filled = covariance.new_zeros(len(covariance), len(covariance)), 0
    chosen: list[int] = []
    gained: list[float] = []
    for _ in range(min(count, number)):
        gains = torch.where(left > least, reach.clamp_min(0) / left, 0.0)
        score = gains.new_zeros(number).index_add_(0, groups, gains)
        score[~open_groups] = -math.inf
        best = int(score.argmax())
        gained.append(float(score[best]))
        if gained[-1] <= 0:
            taken = ~open_groups[groups]
            score = before.new_zeros(number).index_add_(0, groups, before * _unlike(covariance, taken))
            score[~open_groups] = -math.inf
            best = int(score.argmax())
        chosen.append(best)
        open_groups[best] = False
        for i in (groups == best).nonzero().flatten().tolist():
            if left[i] > least[i]:
                known, pivot = explained[:, :filled], left[i].clone()
                column = covariance[:, i] - known @ known[i]
                metric = importance * column if importance.ndim == 1 else importance @ column
                product = covariance @ metric - known @ (known.T @ metric)
                reach += column * (column * (column @ metric) / pivot - 2 * product) / pivot
                left -= column.square() / pivot
                explained[:, filled] = column / pivot.sqrt()
                filled += 1
    return torch.tensor(chosen, device=covariance.device), covariance.new_tensor(gained)


def _unlike(covariance: Tensor, taken: Tensor) -> Tensor:
    """One less the highest squared correlation of each neuron with one of those that are taken, [n]."""
    scale = covariance.diagonal().clamp_min(1e-30)
    likeness = covariance[:, taken].square() / torch.outer(scale, scale[taken])
    return 1 - likeness.amax(1) if taken.any() else torch.ones_like(scale)


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
