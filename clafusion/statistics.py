"""What is measured on unlabelled samples: sums over batches, so that memory does not grow with their number."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.graph import observe
from clafusion.structure import Structure

#: Samples that are run at once: activations of one such chunk are all that is ever held.
CHUNK = 32


@dataclass(frozen=True)
class Moments:
    """Sums over observations of two sets of neurons, in float64.

    Attributes:
        count: the number of observations (samples times positions).
        x, y: sums, [n] and [m].
        xx, yy: sums of squares, [n] and [m].
        xy: sums of products, [n, m].
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor) -> "Moments":
        """The sums of one batch of rows, x [observations, n] and y [observations, m]."""
        x, y = x.double(), y.double()
        return cls(x.shape[0], x.sum(0), y.sum(0), x.square().sum(0), y.square().sum(0), x.T @ y)

    def __add__(self, other: "Moments") -> "Moments":
        names = ("count", "x", "y", "xx", "yy", "xy")
        return replace(self, **{name: getattr(self, name) + getattr(other, name) for name in names})


def collect(batches: Iterable[Any], num_samples: int) -> Tensor:
    """The first `num_samples` inputs as one tensor.

    Args:
        batches: tensors [batch, ...] or tuples that begin with one (labels are ignored); read once, and no further
            than needed.
        num_samples: how many at most.

    Raises:
        FusionError: if there is not at least one batch, or a batch is no tensor, or a value is not finite.
    """
    parts: list[Tensor] = []
    missing = num_samples
    for batch in batches:
        inputs = batch[0] if isinstance(batch, tuple | list) and batch else batch
        if not isinstance(inputs, Tensor) or inputs.ndim < 2:
            raise FusionError(f"Expected batches of samples [batch, ...], got {type(inputs).__name__}; pass tensors")
        if parts and inputs.shape[1:] != parts[0].shape[1:]:
            raise FusionError(
                f"Expected samples of one shape, got {list(parts[0].shape[1:])} and {list(inputs.shape[1:])}"
            )
        parts.append(inputs[:missing].detach())
        missing -= len(parts[-1])
        if missing <= 0:
            break
    if not parts:
        raise FusionError("Expected at least one batch of samples, got none; pass unlabelled inputs")
    samples = torch.cat(parts)
    if not samples.isfinite().all():
        raise FusionError("Expected finite samples, got NaN or infinity; check the data")
    return samples


def chunks(samples: Tensor, size: int = CHUNK) -> tuple[Tensor, ...]:
    """Near-equal parts of at most `size` samples, so that no part is too small for an unbiased estimate."""
    return samples.tensor_split(max(1, -(-len(samples) // size)))


def in_step(
    structures: Sequence[Structure], nodes: Sequence[Sequence[str]], batch: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Run networks side by side on one batch and yield what they give at matching nodes, node by node.

    Args:
        structures: the networks.
        nodes: for each network the nodes to observe, in graph order; equally many for all.
        batch: the inputs.
    """
    runs = [
        observe(structure.module, as_input(batch, structure.module), frozenset(names))
        for structure, names in zip(structures, nodes, strict=True)
    ]
    for outputs in zip(*runs, strict=True):
        yield tuple(value for _, value in outputs)


def as_input(batch: Tensor, module: nn.Module) -> Tensor:
    """The batch on the device and in the floating dtype of a network."""
    return batch.to(next(module.parameters()))


def rows(features: Tensor) -> Tensor:
    """One row per sample and position: [samples, channels, ...] becomes [observations, channels]."""
    return features if features.ndim == 2 else features.movedim(1, -1).reshape(-1, features.shape[1])


@torch.no_grad()
def paired_moments(
    structures: Sequence[Structure], pairs: Mapping[str, Sequence[tuple[int, int]]], samples: Tensor
) -> dict[tuple[str, int, int], Moments]:
    """The joint moments of the features of pairs of networks that share one graph.

    Args:
        structures: networks with equal node names.
        pairs: for every node to observe, the pairs of networks to relate there.
        samples: inputs.

    Returns:
        For every (node, network, other network) the moments of the features of the two.
    """
    order = [node.name for node in structures[0].module.graph.nodes if pairs.get(node.name)]
    sums: dict[tuple[str, int, int], Moments] = {}
    for chunk in chunks(samples):
        for name, outputs in zip(order, in_step(structures, [order] * len(structures), chunk), strict=True):
            for one, other in pairs[name]:
                moments = Moments.of(rows(outputs[one]), rows(outputs[other]))
                key = name, one, other
                sums[key] = sums[key] + moments if key in sums else moments
    return sums
