"""The dissimilarity of each layer of one network to each layer of another, stage by stage."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from clafusion.alignment.similarity import MIN_SAMPLES, cca, cka_from_hsic, gram, hsic_sums
from clafusion.alignment.stages import StagePair, check_same_stages
from clafusion.errors import FusionError
from clafusion.statistics.batches import Batches, Inputs
from clafusion.statistics.moments import Moments
from clafusion.statistics.samples import chunks, collect, quick_size
from clafusion.tracing.execution import GraphRunner, as_input
from clafusion.tracing.reading import structure_of
from clafusion.tracing.structure import Structure, Unit
from clafusion.tracking import bar, tracked
from clafusion.transport.solvers import ground_cost, transport_plan

#: Stages by number.
StagePairs = Mapping[int, StagePair]
MEASURES = ("cka", "cca", "wasserstein", "neurons", "index")


@torch.no_grad()
def layer_costs(
    deep: nn.Module,
    shallow: nn.Module,
    batches: Batches,
    measure: str = "cka",
    debiased: bool = True,
    num_samples: int = 500,
    *,
    inputs: Inputs = None,
    progress: bool | None = None,
) -> list[Tensor]:
    """The dissimilarity of every unit of one network to every unit of another, per stage.

    Args:
        deep: a network; left as it is.
        shallow: another with the same stages; left as it is.
        batches: unlabelled samples, as for `fuse`.
        measure: `cka`, `cca`, `wasserstein`, `neurons` or `index`, as in `FusionOptions.layer_measure`.
        debiased: use the debiased estimator of CKA, streamed; the biased one and CCA see all samples at once.
        num_samples: samples to use, at most.
        inputs: the part of a batch that the networks take, as for `fuse`.
        progress: whether to show a bar, as for `fuse`.

    Returns:
        For every stage, the head included, a matrix [units of deep, units of shallow], float64.

    Raises:
        FusionError: if the networks have other stages, or there are too few samples.
    """
    with bar(progress):
        samples = collect(batches, num_samples, inputs)
        a, b = structure_of(deep, samples), structure_of(shallow, samples)
        check_same_stages(a, b)
        pairs = dict(enumerate(zip(a.stages, b.stages, strict=True)))
        return list(stage_costs(a, b, samples, pairs, measure, debiased).values())


def stage_costs(
    deep: Structure, shallow: Structure, samples: Tensor, pairs: StagePairs, measure: str, debiased: bool
) -> dict[int, Tensor]:
    """`layer_costs` of stages by number, from structures and collected samples."""
    if measure in ("neurons", "index"):
        return {number: _difference(deep, shallow, *pair, measure) for number, pair in pairs.items()}
    if len(samples) < MIN_SAMPLES:
        raise FusionError(f"Expected at least {MIN_SAMPLES} samples to compare layers, got {len(samples)}")
    if measure == "cka":
        return _cka_costs(deep, shallow, samples, pairs, debiased)
    if measure == "cca":
        return _cca_costs(deep, shallow, samples, pairs)
    if measure == "wasserstein":
        return _wasserstein_costs(deep, shallow, samples, pairs)
    raise FusionError(f"Expected a measure of {', '.join(MEASURES)}, got {measure!r}")


def _difference(
    deep: Structure, shallow: Structure, rows_: tuple[Unit, ...], columns: tuple[Unit, ...], measure: str
) -> Tensor:
    def value(structure: Structure, units: tuple[Unit, ...]) -> Tensor:
        widths = [width_of(structure, unit) for unit in units]
        return torch.tensor(widths if measure == "neurons" else range(len(units)), dtype=torch.float64)

    return (value(deep, rows_)[:, None] - value(shallow, columns)[None, :]).square()


def width_of(structure: Structure, unit: Unit) -> int:
    """The number of neurons whose features a unit gives."""
    found = structure.neurons_at(unit.features)
    return 1 if found is None else sum(structure.sizes[space] for space in found[1].spaces)


def _cka_costs(
    deep: Structure, shallow: Structure, samples: Tensor, pairs: StagePairs, debiased: bool
) -> dict[int, Tensor]:
    """1 - CKA from sums of HSIC over mini-batches (Nguyen, Raghu, Kornblith 2021)."""
    sums: dict[int, list[Tensor]] = {}
    batches = chunks(samples) if debiased else (samples,)
    for chunk in tracked(batches, "comparing layers", len(batches)):
        of_deep, of_shallow = _grams(deep, chunk, pairs, 0), _grams(shallow, chunk, pairs, 1)
        for number, (ours, theirs) in pairs.items():
            grams = [of_deep[unit.features] for unit in ours], [of_shallow[unit.features] for unit in theirs]
            sums[number] = hsic_sums(*grams, debiased, onto=sums.get(number))
    return {number: 1 - cka_from_hsic(*parts) for number, parts in sums.items()}


def _grams(structure: Structure, chunk: Tensor, pairs: StagePairs, side: int) -> dict[str, Tensor]:
    """The Gram matrix of every unit's features; parts of the samples run side by side and meet there."""
    size = quick_size([GraphRunner(structure.capture)], len(chunk))
    runs = [_features(structure, part, pairs, side) for part in chunks(chunk, size)]
    return {outputs[0][0]: gram(torch.cat([value for _, value in outputs])) for outputs in zip(*runs, strict=True)}


def _cca_costs(deep: Structure, shallow: Structure, samples: Tensor, pairs: StagePairs) -> dict[int, Tensor]:
    """1 - CCA; its bases are those of all samples, so all features of the stages are held at once."""
    of_deep = dict(_features(deep, samples, pairs, 0))
    of_shallow = dict(_features(shallow, samples, pairs, 1))
    costs = {}
    for number, (ours, theirs) in pairs.items():
        values = [[1 - cca(of_deep[a.features], of_shallow[b.features]) for b in theirs] for a in ours]
        costs[number] = torch.stack([torch.stack(row) for row in values])
    return costs


def _wasserstein_costs(deep: Structure, shallow: Structure, samples: Tensor, pairs: StagePairs) -> dict[int, Tensor]:
    """The optimal transport cost between the neurons of two layers, per observation (root mean square distance)."""
    sums: dict[tuple[str, str], Moments] = {}
    batches = chunks(samples)
    for chunk in tracked(batches, "comparing layers", len(batches)):
        of_shallow = dict(_features(shallow, chunk, pairs, 1))
        partners = {a.features: theirs for ours, theirs in pairs.values() for a in ours}
        for name, value in _features(deep, chunk, pairs, 0):
            for unit in partners[name]:
                key = name, unit.features
                sums[key] = Moments.of(value, of_shallow[unit.features], onto=sums.get(key))
    distances = {}
    for key, moments in tracked(sums.items(), "matching the neurons of layers", len(sums)):
        cost = ground_cost(moments, "euclidean") / moments.count**0.5
        distances[key] = (transport_plan(cost) * cost).sum()
    return {
        number: torch.stack([torch.stack([distances[a.features, b.features] for b in theirs]) for a in ours])
        for number, (ours, theirs) in pairs.items()
    }


def _features(structure: Structure, chunk: Tensor, pairs: StagePairs, side: int) -> Iterable[tuple[str, Tensor]]:
    names = {unit.features for pair in pairs.values() for unit in pair[side]}
    return GraphRunner(structure.capture).observe(as_input(chunk, structure.capture), names)
