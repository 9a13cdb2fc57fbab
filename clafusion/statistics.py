"""What is measured on unlabelled samples: sums over batches, so that memory does not grow with their number."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.graph import live_numbers, observe
from clafusion.memory import samples_at_once
from clafusion.structure import Structure, trace
from clafusion.tracking import tracked

#: Samples run at once, at most: more gain nothing.
CPU_CHUNK, ACCELERATOR_CHUNK = 64, 1024
#: Observations whose products are summed in single precision before they are added to sums in float64.
BLOCK = 4096


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
    def of(cls, x: Tensor, y: Tensor, onto: "Moments | None" = None) -> "Moments":
        """The sums of one batch, x [samples, n, ...] and y [samples, m, ...], every position an observation.

        What is in single precision is multiplied in it, in blocks of a few thousand observations around a mean, and
        summed in float64: the rounding is relative to what varies, not to the mean, and does not pile up.

        Args:
            x: features of one network.
            y: features of the other.
            onto: sums of earlier batches to add these to; they are used up.
        """
        dtype = working_precision(x, y)
        x, y = (one.detach().flatten(2) if one.ndim > 2 else one.detach()[:, :, None] for one in (x, y))
        # Any constant near the mean will do; the sums are shifted back below.
        centres = [one[: max(1, len(one) // 32)].to(dtype).mean((0, 2)) for one in (x, y)]
        products = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64) if onto is None else onto.xy
        positions = x.shape[2]
        step = len(x) if dtype == torch.float64 else max(1, BLOCK // positions)
        # The same memory for all blocks: a new one would take longer than what is computed in it.
        rooms = [one.new_empty(one.shape[1], min(step, len(one)) * positions, dtype=dtype) for one in (x, y)]
        blocks: list[tuple[Tensor, ...]] = []
        for parts in zip(x.split(step), y.split(step), strict=True):
            a, b = (_centred(part, centre, room) for part, centre, room in zip(parts, centres, rooms, strict=True))
            norms = [torch.linalg.vector_norm(one, dim=1) for one in (a, b)]
            blocks.append((a.sum(1), b.sum(1), *norms))
            # What an inserted block computes is often nothing; asking an accelerator would cost more than the product.
            if x.device.type != "cpu" or all(norm.any() for norm in norms):
                products += a @ b.T
        sums = [torch.stack(parts).double() for parts in zip(*blocks, strict=True)]
        x_sum, y_sum, xx, yy = sums[0].sum(0), sums[1].sum(0), sums[2].square().sum(0), sums[3].square().sum(0)
        around = cls(len(x) * positions, x_sum, y_sum, xx, yy, products)
        found = around._shifted(*(centre.double() for centre in centres))
        if onto is None:
            return found
        count, x_sum, y_sum = onto.count + found.count, onto.x + found.x, onto.y + found.y
        return cls(count, x_sum, y_sum, onto.xx + found.xx, onto.yy + found.yy, products)

    def _shifted(self, x: Tensor, y: Tensor) -> "Moments":
        """The moments of the neurons plus constants, [n] and [m]; the products are changed in place."""
        total_y = self.y + self.count * y
        return Moments(
            self.count,
            self.x + self.count * x,
            total_y,
            self.xx + 2 * x * self.x + self.count * x.square(),
            self.yy + 2 * y * self.y + self.count * y.square(),
            self.xy.addr_(x, total_y).addr_(self.x, y),
        )


def working_precision(*tensors: Tensor) -> torch.dtype:
    """The precision to compute in: at least single; on an accelerator double, where single may mean much less."""
    wider = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return wider if tensors[0].device.type == "cpu" else torch.float64


def _centred(part: Tensor, centre: Tensor, room: Tensor) -> Tensor:
    """[samples, neurons, positions] minus a constant for each neuron, as [neurons, observations] in the given room."""
    result = room[:, : len(part) * part.shape[2]]
    torch.sub(part.movedim(1, 0), centre[:, None, None], out=result.unflatten(1, (len(part), part.shape[2])))
    return result


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
    samples = torch.cat(parts) if len(parts) > 1 else parts[0]
    if not all_finite(samples):
        raise FusionError("Expected finite samples, got NaN or infinity; check the data")
    return samples


def all_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity; a finite sum says so at once, but a sum may also overflow."""
    return bool(tensor.sum().isfinite() or tensor.isfinite().all())


def check_features(*sums: Tensor) -> None:
    """Refuse what was summed over features that are not finite, or too large for their dtype."""
    if not all(all_finite(one) for one in sums):
        raise FusionError(
            "Expected finite activations, got NaN or infinity for some of the samples; check the samples, or use a "
            "wider dtype"
        )


def batch_size(structures: Sequence[Structure], memory_budget: int) -> int:
    """How many samples to run through networks side by side.

    Args:
        structures: the networks.
        memory_budget: MiB for the activations that are alive at once, as `live_numbers` counts them.
    """
    tensors = [next(structure.module.parameters()) for structure in structures]
    each = [live_numbers(structure.module) * t.element_size() for structure, t in zip(structures, tensors, strict=True)]
    most = CPU_CHUNK if tensors[0].device.type == "cpu" else ACCELERATOR_CHUNK
    return samples_at_once(min(most, memory_budget * 2**20 // max(1, sum(each))))


def chunks(samples: Tensor, size: int | None = None) -> tuple[Tensor, ...]:
    """Near-equal parts of at most `size` samples; without a size none is too small for an unbiased estimate."""
    size = samples_at_once() if size is None else size
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


def structure_of(model: nn.Module, samples: Tensor) -> Structure:
    """`trace`, on as few of the samples as it takes: one.

    Args:
        model: what `trace` accepts.
        samples: of any device and floating dtype.
    """
    return trace(model, as_input(samples[:1], model))


def rows(features: Tensor) -> Tensor:
    """One row per sample and position: [samples, channels, ...] becomes [observations, channels]."""
    return features if features.ndim == 2 else features.movedim(1, -1).reshape(-1, features.shape[1])


@torch.no_grad()
def paired_moments(
    structures: Sequence[Structure],
    pairs: Mapping[str, Sequence[tuple[int, int]]],
    samples: Tensor,
    size: int = CPU_CHUNK,
) -> dict[tuple[str, int, int], Moments]:
    """The joint moments of the features of pairs of networks that share one graph.

    Args:
        structures: networks with equal node names.
        pairs: for every node to observe, the pairs of networks to relate there.
        samples: inputs.
        size: how many of them to run at once.

    Returns:
        For every (node, network, other network) the moments of the features of the two.
    """
    order = [node.name for node in structures[0].module.graph.nodes if pairs.get(node.name)]
    sums: dict[tuple[str, int, int], Moments] = {}
    parts = chunks(samples, size)
    for chunk in tracked(parts, "measuring neurons", len(parts)):
        for name, outputs in zip(order, in_step(structures, [order] * len(structures), chunk), strict=True):
            for one, other in pairs[name]:
                key = name, one, other
                sums[key] = Moments.of(outputs[one], outputs[other], onto=sums.get(key))
    return sums
