"""Measurements for a report beyond the summary of a fusion: units, small pictures of the maps, and features."""

import base64
import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from clafusion.alignment.layer_costs import width_of
from clafusion.alignment.similarity import MIN_SAMPLES, cka_from_hsic, gram, hsic_sums
from clafusion.fusion.averaging import moved_average
from clafusion.fusion.fuse import Fusion
from clafusion.statistics.moments import NeuronSums
from clafusion.statistics.samples import chunks
from clafusion.tracing.execution import Ahead, GraphRunner, as_input
from clafusion.tracing.reading import on_network
from clafusion.tracing.structure import Structure
from clafusion.tracking import tracked
from clafusion.transport.balanced import Correspondence

#: Height and width of the picture of a map, at most.
PIXELS = 64
#: Samples that the features are compared on, at most: enough for two digits, and cheap beside the fusion.
SAMPLES = 512


@dataclass(frozen=True)
class FeatureComparison:
    """The features of a network against those of another, layer by layer.

    Attributes:
        layers: names of the layers with weights, in forward order, without projection shortcuts.
        variance_ratio: per layer the mean variance of the network's neurons over that of the other's; None where the
            other's do not vary.
        cka: per layer the linear CKA of the two, debiased (Nguyen, Raghu, Kornblith 2021); None for fewer than 4
            samples.
    """

    layers: tuple[str, ...]
    variance_ratio: tuple[float | None, ...]
    cka: tuple[float | None, ...]

    def without(self, layers: Collection[str]) -> dict[str, Any]:
        """The values as plain containers, None for some layers."""

        def kept(values: Sequence[float | None]) -> list[float | None]:
            return [None if name in layers else value for name, value in zip(self.layers, values, strict=True)]

        return {"variance_ratio": kept(self.variance_ratio), "cka": kept(self.cka)}


@dataclass(frozen=True)
class Observed:
    """A network whose features are compared.

    Attributes:
        runner: runs it.
        nodes: by layer the node of its features; a layer that it does not have is missing.
    """

    runner: GraphRunner
    nodes: Mapping[str, str]


@torch.no_grad()
def diagnose(
    layers: Sequence[str], networks: Sequence[Observed], parents: Sequence[Observed], samples: Tensor
) -> list[list[FeatureComparison]]:
    r"""Compare the features of networks with those of others, before every activation.

    .. math:: \text{ratio} = \frac{\mathrm{mean}_i \mathrm{Var}[x_i]}{\mathrm{mean}_j \mathrm{Var}[y_j]}, \quad
              \mathrm{CKA} = \frac{\sum_b \mathrm{HSIC}_1(K_b, L_b)}
              {\sqrt{\sum_b \mathrm{HSIC}_1(K_b, K_b) \sum_b \mathrm{HSIC}_1(L_b, L_b)}}

    Args:
        layers: what to compare, in forward order.
        networks: one or more that have all layers, such as a fused network before and after its correction.
        parents: networks to compare with; widths may differ.
        samples: inputs, [samples, ...]; run in chunks, whose features are dropped at once.

    Returns:
        For each network its comparison with each parent.

    Example:
        >>> from clafusion import trace
        >>> from clafusion.networks import MLP
        >>> samples = torch.randn(16, 8)
        >>> structure = trace(MLP(8, [6, 4], num_classes=3), samples)
        >>> observed = Observed(GraphRunner(structure.capture), {layer.name: layer.pre for layer in structure.layers})
        >>> [[comparison]] = diagnose(list(observed.nodes), [observed], [observed], samples)
        >>> [round(value, 6) for value in (*comparison.variance_ratio, *comparison.cka)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    count, parts = len(networks), chunks(samples)
    enough = all(len(chunk) >= MIN_SAMPLES for chunk in parts)
    neurons: dict[tuple[str, int], NeuronSums] = {}
    kernels: dict[tuple[str, int, int], list[Tensor]] = {}
    everyone = [*networks, *parents]
    for chunk in tracked(parts, "comparing features", len(parts)):
        ahead = [
            Ahead(one.runner, chunk, [one.nodes[name] for name in layers if name in one.nodes]) for one in everyone
        ]
        for name in layers:
            features = {k: ahead[k].take(one.nodes[name]) for k, one in enumerate(everyone) if name in one.nodes}
            for k, x in features.items():
                neurons[name, k] = NeuronSums.of(_channels_last(x), onto=neurons.get((name, k)))
            grams = {k: gram(x) for k, x in features.items()} if enough else {}
            for i in range(count):
                for k in (k for k in grams if k >= count):
                    key = name, i, k
                    kernels[key] = hsic_sums([grams[i]], [grams[k]], True, onto=kernels.get(key))
    spread = {key: float(sums.mean_and_variance()[1].mean()) for key, sums in neurons.items()}
    cka = {key: float(cka_from_hsic(*sums)) for key, sums in kernels.items()}
    return [
        [
            FeatureComparison(
                tuple(layers),
                tuple(_ratio(spread[name, i], spread.get((name, count + j), 0.0)) for name in layers),
                tuple(_finite(cka.get((name, i, count + j), math.nan)) for name in layers),
            )
            for j in range(len(parents))
        ]
        for i in range(count)
    ]


def _channels_last(x: Tensor) -> Tensor:
    """Features [samples, tokens, neurons] as [samples, neurons, tokens]; images have their channels there already."""
    return x.movedim(-1, 1) if x.ndim == 3 else x


def _ratio(value: float, other: float) -> float | None:
    return _finite(value / other) if other > 0 else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def report_data(fusion: Fusion, samples: Tensor) -> dict[str, Any]:
    """The content of a report beyond `Fusion.summary`, small enough to be kept with it.

    Args:
        fusion: what `fuse` returned.
        samples: inputs that it measured on; the first `SAMPLES` of them are used.

    Returns:
        Plain containers that `json.dumps` accepts: `units` (per parent and stage), `maps` (per parent, by space) and
        `diagnosis` (per parent, `before` the correction and `after` it; `before` is None where nothing was corrected
        or the networks were fused one after another).
    """
    samples = samples[:SAMPLES]
    corrected = fusion.options.correction != "none" and made_at_once(fusion)
    before = [next(averages(fusion, [fusion.weights]))] if corrected else []
    fused = on_network(fusion.structure, fusion.model)
    nodes = {layer.name: layer.pre for unit in fused.units for layer in unit.branch}
    networks = [Observed(GraphRunner(one.capture), nodes) for one in (fused, *before)]
    parents = {k: _parent(parent, nodes) for k, parent in enumerate(fusion.balancing.parents)}
    # Networks that are fused one after another are less deep before the template is added: nothing to compare with.
    whole = [k for k, parent in enumerate(fusion.balancing.parents) if made_at_once(fusion) or _has_all(fused, parent)]
    layers = list(nodes)
    comparisons = diagnose(layers, networks, [parents[k] for k in whole], samples)

    def compared(network: int, k: int) -> dict[str, Any]:
        comparison = comparisons[network][whole.index(k) if k in whole else 0]
        return comparison.without(() if k in whole else layers)

    return {
        "units": [_units(structure) for structure in fusion.structures],
        "maps": [{space: map_picture(one) for space, one in maps.items()} for maps in fusion.maps],
        "diagnosis": {
            "samples": len(samples),
            "layers": list(layers),
            "parents": [{"before": compared(1, k) if corrected else None, "after": compared(0, k)} for k in parents],
        },
    }


def _parent(parent: Correspondence, nodes: Mapping[str, str]) -> Observed:
    """A parent by the layers of the fused network; what is inside units that it lacks is missing."""
    own = {name: parent.nodes[node] for name, node in nodes.items() if node in parent.nodes}
    return Observed(parent.runner(), own)


def _has_all(fused: Structure, parent: Correspondence) -> bool:
    return all(unit.name in parent.units for unit in fused.units)


def map_picture(mapping: Tensor) -> dict[str, Any]:
    """A small picture of a map, with what it says in numbers.

    The rows are sorted by the neuron that most of each goes to: a map that only permutes shows a clean diagonal.

    Args:
        mapping: [neurons, the result's neurons], columns sum to one.

    Returns:
        `shape`; `mixes`: the exponential of the mean entropy of the columns, 1 for a permutation, the number of
        neurons for a uniform mixture; `pixels`: [rows, columns] of the picture; `image`: its bytes, row by row, 255 for
        the largest value, compressed by zlib, in base64.
    """
    shares = mapping.detach().double().cpu()
    entropy = torch.special.entr(shares.clamp_min(0)).sum(0).mean()
    ordered = shares[shares.argmax(1).argsort(stable=True)]
    size = min(PIXELS, shares.shape[0]), min(PIXELS, shares.shape[1])
    small = adaptive_avg_pool2d(ordered[None], size)[0].clamp_min(0)
    levels = (255 * small / small.max().clamp_min(torch.finfo(small.dtype).tiny)).round().to(torch.uint8)
    packed = zlib.compress(bytes(levels.flatten().tolist()), 9)
    return {
        "shape": list(shares.shape),
        "mixes": float(entropy.exp()),
        "pixels": list(size),
        "image": base64.b64encode(packed).decode("ascii"),
    }


def _units(structure: Structure) -> list[list[dict[str, Any]]]:
    return [
        [{"name": unit.name, "kind": unit.kind, "neurons": width_of(structure, unit)} for unit in stage]
        for stage in structure.stages
    ]


#: The shares of the other parent that are measured.
SHARES = tuple(step / 10 for step in range(11))


def made_at_once(fusion: Fusion) -> bool:
    """Whether all parents were averaged in one step, so that the average can be made again."""
    return not fusion.steps


def averages(fusion: Fusion, weights: Iterable[Sequence[float]]) -> Iterator[Structure]:
    """The averages of the moved parents, without their correction.

    Args:
        fusion: made in one step.
        weights: for each average its weight per parent, summing to one.
    """
    for shares in weights:
        tensors = {name: tensor.detach().clone() for name, tensor in fusion.structure.capture.tensors.items()}
        average = replace(fusion.structure, capture=replace(fusion.structure.capture, tensors=tensors))
        moved_average(fusion.balancing, average, fusion.maps, shares, fusion.options)
        yield average


@torch.no_grad()
def line_accuracies(fusion: Fusion, images: Tensor, labels: Tensor) -> dict[str, Any] | None:
    r"""The accuracy along the line between the anchor and every other parent, both on the anchor's neurons.

    .. math:: \theta(s) = (1 - s)\, \theta_\mathrm{anchor} + s\, T_k \theta_k, \quad s = 0, 0.1, \ldots, 1

    Args:
        fusion: what `fuse` returned.
        images: labelled inputs, [samples, ...], on the device of the fused network; two or more.
        labels: their classes, [samples].

    Returns:
        `samples`, how many there were; `shares`, all `s`; `fused`, the accuracy of the fused network; `accuracies`,
        by the number of the parent. None where the networks were fused one after another.
    """
    if not made_at_once(fusion):
        return None
    anchor, count = fusion.options.anchor_index, len(fusion.parents)
    accuracies = {}
    for k in range(count):
        if k != anchor:
            lines = [[(1 - s) * (i == anchor) + s * (i == k) for i in range(count)] for s in SHARES]
            accuracies[str(k)] = [_accuracy(one, images, labels) for one in averages(fusion, lines)]
    fused = _accuracy(on_network(fusion.structure, fusion.model), images, labels)
    return {"samples": len(labels), "shares": list(SHARES), "fused": fused, "accuracies": accuracies}


def _accuracy(network: Structure, images: Tensor, labels: Tensor) -> float:
    outputs = torch.cat([network.run(as_input(chunk, network.capture)).argmax(1) for chunk in chunks(images)])
    return float((outputs == labels).double().mean())
