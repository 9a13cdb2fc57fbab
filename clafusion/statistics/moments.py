"""Sums over the features of samples, batch by batch, so that memory does not grow with their number."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from clafusion.statistics.samples import CPU_CHUNK, chunks, quick_size, rows
from clafusion.tracing.execution import Ahead, GraphRunner, working_precision
from clafusion.tracking import tracked

K = TypeVar("K")
#: A smaller share of the sum of squares than this, left around the mean, is rounding.
SMALLEST_VARIANCE = 1e-12
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
        before: the moments of the same neurons before their activation function, where some do not vary behind it.
    """

    count: int
    x: Tensor
    y: Tensor
    xx: Tensor
    yy: Tensor
    xy: Tensor
    before: "Moments | None" = None

    def silent(self) -> tuple[Tensor, Tensor]:
        """The neurons of both sets that do not vary, [n] and [m]."""
        sides = ((self.x, self.xx), (self.y, self.yy))
        found = []
        for total, squares in sides:
            variance = squares - total.square() / self.count
            found.append(variance <= SMALLEST_VARIANCE * squares)
        return found[0], found[1]

    @classmethod
    def of(cls, x: Tensor, y: Tensor, onto: "Moments | None" = None) -> "Moments":
        """The sums of one batch, x [samples, n, ...] and y [samples, m, ...], every position an observation.

        Single-precision inputs are multiplied in single precision, in centred blocks of a few thousand observations,
        and accumulated in float64: the rounding is relative to what varies, not to the mean, and does not add up.

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
        buffers = [one.new_empty(one.shape[1], min(step, len(one)) * positions, dtype=dtype) for one in (x, y)]
        blocks: list[tuple[Tensor, ...]] = []
        for parts in zip(x.split(step), y.split(step), strict=True):
            a, b = (_centred(*one) for one in zip(parts, centres, buffers, strict=True))
            norms = [torch.linalg.vector_norm(one, dim=1) for one in (a, b)]
            blocks.append((a.sum(1), b.sum(1), *norms))
            # An inserted block often gives zeros; to ask an accelerator would cost more than the product.
            if x.device.type != "cpu" or all(norm.any() for norm in norms):
                products += a @ b.T
        sums = [torch.stack(parts).double() for parts in zip(*blocks, strict=True)]
        x_sum, y_sum, xx, yy = sums[0].sum(0), sums[1].sum(0), sums[2].square().sum(0), sums[3].square().sum(0)
        around = cls(len(x) * positions, x_sum, y_sum, xx, yy, products)
        batch = around._shifted(*(centre.double() for centre in centres))
        if onto is None:
            return batch
        count, x_sum, y_sum = onto.count + batch.count, onto.x + batch.x, onto.y + batch.y
        return cls(count, x_sum, y_sum, onto.xx + batch.xx, onto.yy + batch.yy, products)

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


def _centred(part: Tensor, centre: Tensor, buffer: Tensor) -> Tensor:
    """[samples, neurons, positions] minus a constant for each neuron, as [neurons, observations] in the buffer."""
    result = buffer[:, : len(part) * part.shape[2]]
    torch.sub(part.movedim(1, 0), centre[:, None, None], out=result.unflatten(1, (len(part), part.shape[2])))
    return result


@dataclass(frozen=True)
class NeuronSums:
    """Sums over observations of one set of neurons, in float64: their number, sums and sums of squares, [neurons]."""

    count: int
    total: Tensor
    squares: Tensor

    @classmethod
    def of(cls, features: Tensor, onto: "NeuronSums | None" = None) -> "NeuronSums":
        """The sums of one batch of features, [samples, neurons, ...], added to those of earlier ones."""
        x = rows(features).double()
        total, squares = x.sum(0), x.square().sum(0)
        if onto is None:
            return cls(len(x), total, squares)
        return cls(onto.count + len(x), onto.total + total, onto.squares + squares)

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """The mean and the variance of every neuron."""
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean.square()).clamp_min(0)


@dataclass(frozen=True, eq=False)
class Observation:
    """Where the neurons of one set are in what a network computes.

    Attributes:
        network: index of the network.
        node: whose output they are in.
        dim: the dimension of the output along which they lie.
        entries: their places along it, [turns, neurons], every turn an observation of its own; None: all, in order.
        others: dimensions along which other neurons lie, whose order in two networks need not be the same; of these the
            mean and the root mean square are compared.
    """

    network: int
    node: str
    dim: int
    entries: Tensor | None
    others: tuple[int, ...] = ()

    def of(self, output: Tensor) -> Tensor:
        """The features, [observations, neurons, positions]."""
        if self.others:
            mean, square = output.mean(self.others, keepdim=True), output.square().mean(self.others, keepdim=True)
            output = torch.cat([mean, square.sqrt()], self.others[0])
        if self.dim == 1 and self.entries is None:
            return output
        last = output.movedim(self.dim, -1)
        if self.entries is None:
            return last.flatten(0, -2)
        turns, neurons = self.entries.shape
        picked = last.flatten(0, -2)[:, self.entries.flatten().to(output.device)]
        return torch.unflatten(picked, 1, (turns, neurons)).movedim(1, 2)


@torch.no_grad()
def paired_moments(
    runners: Sequence[GraphRunner],
    wanted: Mapping[K, tuple[Observation, Observation]],
    samples: Tensor,
    size: int = CPU_CHUNK,
) -> dict[K, Moments]:
    """The joint moments of the features of pairs of networks.

    Args:
        runners: of the networks.
        wanted: what to relate, by any key.
        samples: inputs.
        size: how many of them to run at once, at most.

    Returns:
        By key the moments of the two.
    """
    # In the order of the first network's graph, so that little has to be kept until the others have caught up.
    keys = sorted(wanted, key=lambda key: [runners[one.network].order[one.node] for one in wanted[key]])
    involved = sorted({one.network for pair in wanted.values() for one in pair})
    names: dict[int, list[str]] = {k: [] for k in involved}
    for key in keys:
        for one in wanted[key]:
            names[one.network].append(one.node)
    sums: dict[K, Moments] = {}
    parts = chunks(samples, quick_size(runners, size))
    for chunk in tracked(parts, "measuring neurons", len(parts)):
        ahead = {k: Ahead(runners[k], chunk, names[k]) for k in involved}
        for key in keys:
            x, y = (one.of(ahead[one.network].take(one.node)) for one in wanted[key])
            sums[key] = Moments.of(x, y, onto=sums.get(key))
    return sums
