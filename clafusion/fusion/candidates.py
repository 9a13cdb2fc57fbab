"""The networks that a fusion may end in, and which of them says best what the parents say together.

Where parents know the same, nothing is better than the anchor with an output layer that is fitted to all of them. Where
they know different things, neurons of all of them are. Without labels, the divergence from the parents' teacher on
samples that no layer was fitted to tells which.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from clafusion.correction.correct import correct
from clafusion.correction.targets import Targets
from clafusion.errors import FusionError
from clafusion.fusion.averaging import moved_average
from clafusion.options import ALONE, FusionOptions
from clafusion.statistics.samples import logits_of
from clafusion.teachers.doubts import warn_of_doubts
from clafusion.teachers.teacher import ALIKE, Teacher, agreement, teacher_of
from clafusion.tracing.resizing import room_for
from clafusion.tracing.structure import Structure
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.pooling import pool_neurons

#: The share of the samples that candidates are compared on.
HELD_BACK = 0.2
#: Of fewer samples than this too few can be held back.
COMPARABLE = 10
#: Makes a candidate of samples; the second argument says whether it is a trial.
Maker = Callable[[Tensor, bool], "Candidate"]
#: With fewer samples than this, means of similar neurons are tried beside single ones: they vary less with the samples.
FEW = 1000


@dataclass(frozen=True, eq=False)
class Parts:
    """What a network is made of.

    Attributes:
        model: a copy of the parent whose depth the result has, with room for the anchor's neurons; it becomes the
            result.
        structure: of that.
        balanced: the parents.
        maps: of their neurons.
        weights: per parent, summing to one.
        columns: per parent the places of its classes among those of all; None: all have the same.
    """

    model: nn.Module
    structure: Structure
    balanced: Balanced
    maps: Sequence[Maps]
    weights: tuple[float, ...]
    columns: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, eq=False)
class Candidate:
    """A network that was made.

    Attributes:
        name: what it is: `anchor`, `matched`, `matched, equal`, `union` or `centroids`.
        model: the network.
        structure: before its correction.
        corrected: the structure after it.
        teacher: what its output layer was refit to.
        trust: per parent its mean share in what the teacher says.
        scores: the divergence of every candidate, by name; empty where there was no choice.
    """

    name: str
    model: nn.Module
    structure: Structure
    corrected: Structure
    teacher: Teacher | None = None
    trust: tuple[float, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)


def best_candidate(parts: Parts, samples: Tensor, options: FusionOptions) -> Candidate:
    """Make the network that `correction` and `targets` of the options ask for.

    Args:
        parts: what it is made of.
        samples: unlabelled inputs.
        options: how.

    Raises:
        FusionError: if no network can be made, or not of the pooled neurons that are asked for.

    Warns:
        UserWarning: of a parent that answers by chance, or that the teacher hardly ever trusts.
    """
    if options.correction != "refit":
        return _matched(parts, options, "matched", None, samples)
    if options.targets == "matched" and options.teacher == "mean":
        teacher = Teacher(parts.weights, None, parts.columns)
        return replace(_matched(parts, options, "matched", teacher, samples), trust=parts.weights)
    logits = [logits_of(parent.structure, samples) for parent in parts.balanced.parents]
    kind = "mean" if options.head != "average" else options.teacher
    teacher = teacher_of(logits, parts.weights, kind, options.gate_temperature, parts.columns)
    trust = tuple(teacher.shares(logits).mean(0).tolist())
    warn_of_doubts(teacher, logits, trust)
    alike = options.head == "average" and agreement(logits, parts.columns) > ALIKE
    if options.targets == "matched":
        made = _matched(parts, options, "matched", teacher, samples)
    elif options.targets in ("union", "centroids"):
        made = _union(parts, options, teacher, samples)
    elif alike or len(samples) < COMPARABLE:
        made = _matched_makers(parts, options, teacher)["anchor"](samples, False)
    else:
        made = _nearest(parts, samples, options, teacher, logits)
    return replace(made, trust=trust)


def _nearest(
    parts: Parts, samples: Tensor, options: FusionOptions, teacher: Teacher, logits: Sequence[Tensor]
) -> Candidate:
    """The candidate that is nearest to the teacher on samples that are held back, made anew of all samples.

    Where neurons of all parents are better than the anchor's, matched ones are not tried: in none of 37 runs of
    `benchmarks/union.py` were they better still.
    """
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(samples), generator=generator).to(samples.device)
    count = round(HELD_BACK * len(samples))
    held, given = order[:count].sort().values, order[count:].sort().values
    wanted = teacher.log_probabilities([one[held] for one in logits])
    scores: dict[str, float] = {}

    def divergence(make: Maker) -> float:
        answer = logits_of(make(samples[given], True).corrected, samples[held]).to(wanted).log_softmax(1)
        return float(torch.where(wanted.isfinite(), wanted.exp() * (wanted - answer), 0.0).sum(1).mean())

    matched = _matched_makers(parts, options, teacher)
    kinds: tuple[Literal["union", "centroids"], ...] = ("union", "centroids") if len(samples) < FEW else ("union",)
    pooled: dict[str, Maker] = {kind: partial(_union, parts, replace(options, targets=kind), teacher) for kind in kinds}
    scores["anchor"] = divergence(matched["anchor"])
    for name, make in pooled.items():
        with suppress(FusionError):  # not every network has neurons that can be pooled
            scores[name] = divergence(make)
    if min(scores.values()) == scores["anchor"]:
        scores |= {name: divergence(make) for name, make in matched.items() if name not in scores}
    best = min(scores, key=scores.__getitem__)
    return replace((matched | pooled)[best](samples, False), scores=scores)


def _matched_makers(parts: Parts, options: FusionOptions, teacher: Teacher) -> dict[str, Maker]:
    """By name what makes candidates with a neuron for each of the anchor's."""
    leads = (("anchor", ALONE), ("matched", options.anchor_lead), ("matched, equal", 1.0))
    chosen = {name: replace(options, targets="matched", anchor_lead=lead) for name, lead in leads}
    return {name: partial(_matched, parts, one, name, teacher) for name, one in chosen.items()}


def _matched(
    parts: Parts, options: FusionOptions, name: str, teacher: Teacher | None, samples: Tensor, trial: bool = False
) -> Candidate:
    """The moved average, corrected; of a trial the room stays as it is, and no warning is given."""
    network, structure = parts.model, parts.structure
    if trial:
        network, structure = room_for(network, structure, structure.sizes, samples)
    moved_average(parts.balanced, structure, parts.maps, parts.weights, options)
    targets = Targets(parts.balanced, parts.maps, parts.weights, options, teacher)
    return Candidate(name, network, structure, correct(network, structure, targets, samples, trial), teacher)


def _union(parts: Parts, options: FusionOptions, teacher: Teacher, samples: Tensor, trial: bool = False) -> Candidate:
    """The parents' neurons side by side, as many of them as the result has room for, refit."""
    pool = pool_neurons(parts.balanced, samples, options, teacher)
    network, structure = room_for(parts.model, parts.structure, {**parts.structure.sizes, **pool.sizes}, samples)
    balanced = replace(parts.balanced, layout=structure.axes)
    moved_average(balanced, structure, parts.maps, parts.weights, options, pool)
    targets = Targets(balanced, parts.maps, parts.weights, options, teacher, pool)
    return Candidate(options.targets, network, structure, correct(network, structure, targets, samples, trial), teacher)
