"""Measurements for a report beyond the summary of a fusion: units, small pictures of the maps, and features."""

import base64
import math
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from clafusion.alignment.similarity import MIN_SAMPLES, cka_from_hsic, gram, hsic_sums
from clafusion.fusion.averaging import moved_average
from clafusion.fusion.fuse import Fusion
from clafusion.statistics.moments import NeuronSums
from clafusion.statistics.samples import chunks
from clafusion.tracing.capture import shell
from clafusion.tracing.execution import GraphRunner, as_input, in_step
from clafusion.tracing.structure import Structure, structure_of
from clafusion.tracking import tracked

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


@torch.no_grad()
def diagnose(
    structure: Structure, networks: Sequence[GraphRunner], parents: Sequence[GraphRunner], samples: Tensor
) -> list[list[FeatureComparison]]:
    r"""Compare the features of networks with those of others, before every activation.

    .. math:: \text{ratio} = \frac{\mathrm{mean}_i \mathrm{Var}[x_i]}{\mathrm{mean}_j \mathrm{Var}[y_j]}, \quad
              \mathrm{CKA} = \frac{\sum_b \mathrm{HSIC}_1(K_b, L_b)}
              {\sqrt{\sum_b \mathrm{HSIC}_1(K_b, K_b) \sum_b \mathrm{HSIC}_1(L_b, L_b)}}

    Args:
        structure: of any of the networks.
        networks: one or more, such as a fused network before and after its correction.
        parents: networks of the same graph, such as `Fusion.balanced`; widths may differ.
        samples: inputs, [samples, ...]; run in chunks, whose features are dropped at once.

    Returns:
        For each network its comparison with each parent.

    Example:
        >>> from clafusion import trace
        >>> from clafusion.networks import MLP
        >>> samples = torch.randn(16, 8)
        >>> structure = trace(MLP(8, [6, 4], num_classes=3), samples)
        >>> runner = GraphRunner(structure.module)
        >>> [[comparison]] = diagnose(structure, [runner], [runner], samples)
        >>> [round(value, 6) for value in (*comparison.variance_ratio, *comparison.cka)]
        [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    """
    # By the node of their features, in graph order.
    names = {layer.pre: layer.name for unit in structure.units for layer in unit.branch}
    names = {node: names[node] for node in networks[0].nodes if node in names}
    count, parts = len(networks), chunks(samples)
    enough = all(len(chunk) >= MIN_SAMPLES for chunk in parts)
    neurons: dict[tuple[str, int], NeuronSums] = {}
    kernels: dict[str, list[Tensor]] = {}
    for chunk in tracked(parts, "comparing features", len(parts)):
        for node, features in zip(names, in_step([*networks, *parents], names, chunk), strict=True):
            for k, x in enumerate(features):
                neurons[node, k] = NeuronSums.of(x, onto=neurons.get((node, k)))
            if enough:
                grams = [gram(x) for x in features]
                kernels[node] = hsic_sums(grams[:count], grams[count:], True, onto=kernels.get(node))
    spread = {key: float(sums.mean_and_variance()[1].mean()) for key, sums in neurons.items()}
    cka = {node: cka_from_hsic(*sums).tolist() for node, sums in kernels.items()}
    return [
        [
            FeatureComparison(
                tuple(names.values()),
                tuple(_ratio(spread[node, i], spread[node, count + j]) for node in names),
                tuple(_finite(cka[node][i][j]) if enough else None for node in names),
            )
            for j in range(len(parents))
        ]
        for i in range(count)
    ]


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
    # Networks that are fused one after another are less deep before the template is added: nothing to compare with.
    structure = fusion.balancing.structure if made_at_once(fusion) else structure_of(fusion.model, samples)
    networks = [_runner(network, structure) for network in (fusion.model, *before)]
    parents = {k: _runner(parent.network, parent.structure) for k, parent in enumerate(fusion.balancing.parents)}
    whole = [k for k, runner in parents.items() if runner.nodes.keys() == networks[0].nodes.keys()]
    comparisons = diagnose(structure, networks, [parents[k] for k in whole], samples)
    layers = comparisons[0][0].layers

    def compared(network: int, k: int) -> dict[str, Any]:
        comparison = comparisons[network][whole.index(k)] if k in whole else comparisons[network][0]
        return comparison.without(_inserted(fusion, k) if k in whole else layers)

    return {
        "units": [_units(structure) for structure in fusion.structures],
        "maps": [{space: map_picture(one) for space, one in maps.items()} for maps in fusion.maps],
        "diagnosis": {
            "samples": len(samples),
            "layers": list(layers),
            "parents": [{"before": compared(1, k) if corrected else None, "after": compared(0, k)} for k in parents],
        },
    }


def _runner(network: nn.Module, structure: Structure) -> GraphRunner:
    """The runner of a network that is built as the one whose structure is given."""
    return GraphRunner(shell(network), structure.module.graph)


def _inserted(fusion: Fusion, k: int) -> frozenset[str]:
    """The layers inside the residual units that a parent only has as inserted identities: nothing to compare with."""
    if fusion.options.balance == "merge":
        return frozenset()
    return frozenset(
        layer.name
        for stage, units in enumerate(fusion.structures[fusion.template].stages)
        for place, unit in enumerate(units)
        for layer in unit.branch
        if place not in fusion.alignments[k][stage] and layer != unit.output
    )


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
        [{"name": unit.name, "kind": unit.kind, "neurons": structure.sizes[unit.output.space]} for unit in stage]
        for stage in structure.stages
    ]


#: The shares of the other parent that are measured.
SHARES = tuple(step / 10 for step in range(11))


def made_at_once(fusion: Fusion) -> bool:
    """Whether all parents were averaged in one step, so that the average can be made again."""
    return fusion.options.many != "iterative" or len(fusion.balanced) == 2


def averages(fusion: Fusion, weights: Iterable[Sequence[float]]) -> Iterator[nn.Module]:
    """The averages of the moved parents, without their correction.

    Args:
        fusion: made in one step.
        weights: for each average its weight per parent, summing to one.
    """
    for shares in weights:
        yield moved_average(fusion.balancing, fusion.maps, shares, fusion.options)


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
    anchor, count = fusion.options.anchor_index, len(fusion.balanced)
    accuracies = {}
    for k in range(count):
        if k != anchor:
            lines = [[(1 - s) * (i == anchor) + s * (i == k) for i in range(count)] for s in SHARES]
            accuracies[str(k)] = [_accuracy(model, images, labels) for model in averages(fusion, lines)]
    fused = _accuracy(fusion.model, images, labels)
    return {"samples": len(labels), "shares": list(SHARES), "fused": fused, "accuracies": accuracies}


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    outputs = torch.cat([model(as_input(chunk, model)).argmax(1) for chunk in chunks(images)])
    return float((outputs == labels).double().mean())
