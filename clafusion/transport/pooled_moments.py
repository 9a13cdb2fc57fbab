"""What the neurons of all parents do together: their covariance, and how much the parents' answer depends on them."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from clafusion.options import FusionOptions
from clafusion.statistics.memory import samples_at_once
from clafusion.statistics.moments import Observation, paired_moments
from clafusion.statistics.samples import CPU_CHUNK, batch_size, chunks, rows
from clafusion.teachers.teacher import Teacher
from clafusion.tracing.execution import GraphRunner, as_input, is_tensor
from clafusion.tracing.structure import Layer, Unit
from clafusion.transport.balanced import Balanced
from clafusion.transport.neuron_maps import is_observable, observation

#: By space, for every place at which its neurons are observed, where they are in each parent that has them.
Seen = Mapping[str, Sequence[Mapping[int, Observation]]]
#: Samples that neurons are judged by, where each is one observation, and where each gives many (positions or tokens).
SAMPLES, SAMPLES_WITH_POSITIONS = 1000, 300


def seen_at(balanced: Balanced, spaces: Sequence[str]) -> Seen:
    """The places where neurons are observed: behind the layers that write them in all parents that have them."""
    layers: dict[str, list[tuple[Layer, Unit]]] = {}
    for unit in balanced.structure.units:
        for layer in (*unit.layers, *unit.beside):
            axis = balanced.structure.written(layer)
            for space in () if axis is None else axis.spaces:
                layers.setdefault(space, []).append((layer, unit))
    result = {}
    for space in spaces:
        owners = balanced.holders(space)
        nodes = _nodes(balanced, space, owners, layers.get(space, []))
        result[space] = [{k: observation(balanced, k, node, space) for k in owners} for node in nodes]
    return result


def _nodes(balanced: Balanced, space: str, owners: Sequence[int], layers: Sequence[tuple[Layer, Unit]]) -> list[str]:
    # A shortcut is seen in the sum with its branch; alone where the branch has an activation of its own before the sum.
    totals = {layer.total for layer, _ in layers if not layer.shortcut}
    main = [pair for pair in layers if not pair[0].shortcut or pair[0].total not in totals]
    common = [layer for layer, unit in main if set(owners) <= balanced.owners[unit.name].keys()]
    result: dict[str, None] = {}
    for layer in common or [layer for layer, _ in main]:
        for name in (layer.post, layer.norm or layer.node, layer.node):
            if is_observable(balanced, name, space, owners):
                result[name] = None
                break
    return list(result)


def judged_by(balanced: Balanced, seen: Seen, samples: Tensor) -> Tensor:
    """The samples that neurons are judged by, as many as it takes."""
    found = [one for places in seen.values() for place in places for one in place.items()]
    shapes = [balanced.parents[k].structure.nodes[one.node].meta["shape"] for k, one in found]
    return samples[: SAMPLES if all(len(shape) <= 2 for shape in shapes) else SAMPLES_WITH_POSITIONS]


def covariances(balanced: Balanced, seen: Seen, samples: Tensor, options: FusionOptions) -> dict[str, Tensor]:
    """The covariances of the neurons of all parents.

    Args:
        balanced: the parents.
        seen: where their neurons are; a space that is seen nowhere is left out.
        samples: unlabelled inputs; every position in one is an observation of its own.
        options: `memory_budget` is read.

    Returns:
        By space the mean over the places where they are seen, [neurons of all parents, the same], float64.
    """
    wanted: dict[tuple[str, int, int, int], tuple[Observation, Observation]] = {}
    for space, places in seen.items():
        for number, place in enumerate(places):
            for i, j in combinations_with_replacement(sorted(place), 2):
                wanted[space, number, i, j] = (place[i], place[j])
    runners = balanced.runners
    moments = paired_moments(runners, wanted, samples, batch_size(runners, options.memory_budget))
    found: dict[str, Tensor] = {}
    for space, places in seen.items():
        for number, place in enumerate(places):
            whole = []
            for i in place:
                row = []
                for j in place:
                    one = moments[space, number, min(i, j), max(i, j)]
                    covariance = one.xy / one.count - torch.outer(one.x, one.y) / one.count**2
                    row.append(covariance if i <= j else covariance.T)
                whole.append(torch.cat(row, 1))
            share = torch.cat(whole) / len(places)
            found[space] = found[space] + share if space in found else share
    return found


def sensitivities(
    balanced: Balanced, seen: Seen, samples: Tensor, teacher: Teacher, options: FusionOptions
) -> dict[str, Tensor]:
    r"""The Fisher information of the parents' neurons: how much what they say together depends on them.

    With y drawn from the teacher's p(y | x) and d the gradient of log p(y | x) with respect to the activations of all
    parents, :math:`G = E[\sum d d^\top]`, summed over positions and over the places where the neurons are seen. A small
    error e of the activations then changes log p by :math:`e^\top G e` in the mean square, whichever space they are of.

    Args:
        balanced: the parents.
        seen: where their neurons are.
        samples: unlabelled inputs.
        teacher: what the parents say together.
        options: `seed` of the draws, and `memory_budget`, are read.

    Returns:
        By space G, [neurons of all parents, the same], float64.
    """
    runners = [_constant(runner) for runner in balanced.runners]
    draws = torch.rand(len(samples), generator=torch.Generator().manual_seed(options.seed), dtype=torch.float64)
    size = _samples_with_gradients(runners, options.memory_budget)
    total: dict[str, Tensor] = {}
    for chunk, drawn in zip(chunks(samples, size), chunks(draws, size), strict=True):
        gradients = _gradients(runners, seen, chunk, drawn, teacher)
        for space, places in seen.items():
            for place in places:
                parts = [rows(one.of(gradients[k, one.node])) for k, one in place.items()]
                d = torch.cat(parts, 1).double()
                product = d.T @ d / len(samples)
                total[space] = total[space] + product if space in total else product
    return total


def _constant(runner: GraphRunner) -> GraphRunner:
    """The runner of a network whose parameters have no gradient."""
    fetch = runner.fetch
    return GraphRunner(runner.capture, lambda name: fetch(name).detach())


def _samples_with_gradients(runners: Sequence[GraphRunner], memory_budget: int) -> int:
    """The number of samples to run at once where all activations are held, twice with their gradients."""
    total = 0
    for runner in runners:
        names = runner.capture.names
        sizes = [math.prod(n.meta["shape"]) for n in runner.nodes.values() if is_tensor(n) and n.name not in names]
        total += 2 * sum(sizes) * runner.capture.reference.element_size()
    return samples_at_once(max(1, min(CPU_CHUNK, memory_budget * 2**20 // max(1, total))))


@torch.enable_grad()
def _gradients(
    runners: Sequence[GraphRunner], seen: Seen, chunk: Tensor, drawn: Tensor, teacher: Teacher
) -> dict[tuple[int, str], Tensor]:
    """The gradients of the sum of log p over a chunk, by parent and node; `drawn` from 0 to 1 decides which class."""
    wanted = {(k, one.node) for places in seen.values() for place in places for k, one in place.items()}
    outputs: dict[tuple[int, str], Tensor] = {}
    logits = []
    for k, runner in enumerate(runners):
        batch, end = as_input(chunk, runner.capture).clone().requires_grad_(), runner.capture.logits
        names = [node for owner, node in wanted if owner == k]
        for name, value in runner.observe(batch, {*names, end}):
            outputs[k, name] = value
        logits.append(outputs[k, end])
    answers = teacher.log_probabilities(logits)
    ends = answers.detach().double().exp().cumsum(1)
    classes = torch.searchsorted(ends, drawn.to(ends.device)[:, None] * ends[:, -1:], right=True)
    said = answers.gather(1, classes.clamp_max(answers.shape[1] - 1)).sum()
    keys = [key for key in sorted(wanted) if outputs[key].requires_grad]
    found = torch.autograd.grad(said, [outputs[key] for key in keys], allow_unused=True)
    known = {key: one for key, one in zip(keys, found, strict=True) if one is not None}
    return {key: known.get(key, torch.zeros_like(outputs[key])) for key in wanted}
