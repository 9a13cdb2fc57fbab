"""Means of similar neurons, which vary less with the samples than single neurons do."""

import torch
from torch import Tensor

#: Passes over the neurons, at most.
PASSES = 30
#: The least variance of a neuron, relative to the mean over all, that it is divided by.
SMALLEST_VARIANCE = 1e-12


def centroids(covariance: Tensor, importance: Tensor, count: int, seed: int) -> tuple[Tensor, Tensor]:
    r"""Clusters of similar neurons: k-means of their standardised activations, of which only the correlation is needed.

    With :math:`\sigma_i` the deviation of neuron i, :math:`w_i` its share of the weight of its cluster, and the mean
    deviation there :math:`s = \sum_i w_i \sigma_i`, the centroid is :math:`\sum_i w_i s / \sigma_i \, x_i`.
    For neuron i, :math:`\sigma_i / s` times the centroid stands. The first centres are drawn as k-means++ does.

    Args:
        covariance: of all neurons, [n, n].
        importance: of each, at least 0, [n]; its variance times that is its weight.
        count: of clusters, at most n.
        seed: of the first centres.

    Returns:
        The weights of the neurons in the centroids, and those of the centroids in what stands for every neuron, both
        [n, count].
    """
    variances = covariance.diagonal()
    deviations = variances.clamp_min(SMALLEST_VARIANCE * float(variances.mean()) + 1e-30).sqrt()
    correlation = covariance / deviations[:, None] / deviations
    weights = (importance * variances).clamp_min(SMALLEST_VARIANCE * float((importance * variances).mean()) + 1e-30)
    labels = _labels(correlation, weights, count, seed)
    members = torch.zeros_like(covariance[:, :count])
    members[torch.arange(len(labels), device=labels.device), labels] = 1
    shares = members * weights[:, None] / (weights @ members)
    scale = deviations @ shares
    return shares * scale / deviations[:, None], members * deviations[:, None] / scale


def _labels(correlation: Tensor, weights: Tensor, count: int, seed: int) -> Tensor:
    """The cluster of every neuron, [n]; no cluster is empty."""
    centres = _first_centres(correlation, weights, count, seed)
    labels = correlation[:, centres].argmax(1)
    labels[centres] = torch.arange(count, device=labels.device)
    neurons = torch.arange(len(labels), device=labels.device)
    for _ in range(PASSES):
        members = torch.zeros_like(correlation[:, :count])
        members[neurons, labels] = weights
        members /= members.sum(0)
        cross = correlation @ members
        distances = (members * cross).sum(0) - 2 * cross
        moved = distances.argmin(1)
        # A cluster that would be empty keeps the nearest of its neurons.
        while len(empty := (torch.bincount(moved, minlength=count) == 0).nonzero()):
            own = (labels == empty[0]).nonzero().flatten()
            moved[own[distances[own, empty[0]].argmin()]] = empty[0]
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels


def _first_centres(correlation: Tensor, weights: Tensor, count: int, seed: int) -> Tensor:
    """Neurons that are far from each other, each drawn by its weight times its squared distance to the others."""
    generator = torch.Generator().manual_seed(seed)
    distances = torch.full_like(weights, 2.0)
    chosen: list[int] = []
    for _ in range(count):
        chances = weights * distances
        chances[chosen] = 0
        if float(chances.sum()) <= 0:  # the others are copies of the chosen ones
            chances = weights.clone()
            chances[chosen] = 0
        chosen.append(int(torch.multinomial(chances.cpu(), 1, generator=generator)))
        distances = torch.minimum(distances, (2 - 2 * correlation[:, chosen[-1]]).clamp_min(0))
    return torch.tensor(chosen, device=correlation.device)
