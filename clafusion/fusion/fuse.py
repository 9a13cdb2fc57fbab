"""Fusing trained networks of different depth and width into one: the main path of the library.

`_fuse_at_once` tells the method; the sub-packages named in its imports are its steps.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.alignment.layer_maps import StageCosts, align_stages, as_lists, deep_and_shallow, measure_stages
from clafusion.alignment.parents import check_parents, parents_of, template_of, trace_all, trace_as, with_anchor
from clafusion.alignment.stages import Alignment
from clafusion.balancing.balance import balance
from clafusion.balancing.insertion import inserted
from clafusion.correction.rescaling import add_missing_biases
from clafusion.errors import FusionError
from clafusion.fusion.candidates import Parts, best_candidate
from clafusion.fusion.outputs import with_outputs
from clafusion.fusion.record import FusionSummary
from clafusion.fusion.verification import check_free, check_maps, check_moved, check_outputs
from clafusion.naming import named_parents, parent_name
from clafusion.networks.families import FAMILIES
from clafusion.options import FusionOptions, normalized
from clafusion.statistics.batches import Batches, Inputs
from clafusion.statistics.memory import within_memory
from clafusion.statistics.samples import collect
from clafusion.teachers.label_sets import Label, check_classes, columns_of, union_of
from clafusion.teachers.teacher import Teacher
from clafusion.tracing.example import example_of, with_input_shape
from clafusion.tracing.parameters import independent_copy
from clafusion.tracing.reading import structure_of
from clafusion.tracing.structure import Structure
from clafusion.tracking import bar
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.neuron_maps import neuron_maps


@dataclass(frozen=True)
class Fusion:
    """The result of `fuse`.

    Attributes:
        model: the fused network, in eval mode.
        structure: its structure before a correction, which shares its tensors.
        balancing: what of each parent corresponds to what of the template, and which of them has which unit; where they
            were fused one after another, each as it was fused, and no owners.
        parents: copies of the networks as they were given.
        structures: of these.
        alignments: per parent and stage (the head last) the unit of the template that each of its units became
            (`insert`), or the unit of it that each of the template's stands for (`merge`).
        layer_costs: per parent and stage the matrix of layer dissimilarities [deep, shallow], or None where the map was
            forced and nothing had to be measured.
        maps: per parent the maps [its neurons, the result's neurons] by neuron space (or layer).
        costs: per parent the transport cost of each map.
        weights: per parent, summing to one.
        options: what was asked for, with the anchor that was chosen.
        num_samples: how many samples were measured on.
        candidates: by name how far each network that was tried is from what the parents say together, as the mean
            divergence KL(teacher, network) on samples that were held back; empty where there was no choice.
        chosen: the name of the one that was taken.
        teacher: what the parents say together; None where nothing was refit to it.
        trust: per parent its mean share in what the teacher says; empty without a teacher.
        classes: the labels that the outputs stand for, where they were given.
        steps: where the parents were fused one after another, for each the step that added it, and its place there.
    """

    model: nn.Module
    structure: Structure = field(repr=False)
    balancing: Balanced = field(repr=False)
    parents: tuple[nn.Module, ...] = field(repr=False)
    structures: tuple[Structure, ...] = field(repr=False)
    alignments: tuple[Alignment, ...]
    layer_costs: tuple[StageCosts, ...]
    maps: tuple[Maps, ...]
    costs: tuple[dict[str, float], ...]
    weights: tuple[float, ...]
    options: FusionOptions
    num_samples: int
    candidates: Mapping[str, float] = field(default_factory=dict)
    chosen: str = "matched"
    teacher: Teacher | None = field(default=None, repr=False)
    trust: tuple[float, ...] = ()
    classes: tuple[Label, ...] = ()
    steps: tuple[tuple["Fusion", int], ...] = field(default=(), repr=False)

    @cached_property
    def balanced(self) -> tuple[nn.Module, ...]:
        """Every parent at the fused network's depth, in the order of the parents, as networks of their own.

        Raises:
            FusionError: if the template's class cannot have a parent's widths.
        """
        return tuple(self.balanced_parent(k) for k in range(len(self.parents)))

    def balanced_parent(self, k: int) -> nn.Module:
        """One of `balanced`, made anew where it is not the parent itself."""
        if self.steps:
            step, place = self.steps[k]
            return step.balanced_parent(place)
        if k == self.template:
            return self.parents[k]
        template, network = self.balancing.structure, self.balancing.parents[k].merged
        samples = example_of(template.capture)
        if network is None:
            deep, zero_branches = self.parents[self.template], self.options.streams == "per_layer"
            network = inserted(deep, template, self.structures[k], self.alignments[k], samples, zero_branches)
        return _carry_shape(network, samples.shape[1:])

    @property
    def template(self) -> int:
        """Index of the parent whose depth the result has."""
        return self.balancing.template

    def summary(self) -> FusionSummary:
        """The record of the fusion, as plain containers that `json.dumps` accepts."""
        return {
            "options": self.options.to_dict(),
            "num_samples": self.num_samples,
            "weights": list(self.weights),
            "template": self.template,
            "alignments": [[list(stage) for stage in alignment] for alignment in self.alignments],
            "layer_costs": [as_lists(costs) for costs in self.layer_costs],
            "transport_costs": [dict(costs) for costs in self.costs],
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "classes": list(self.classes),
            "candidates": dict(self.candidates),
            "chosen": self.chosen,
            "teacher": None if self.teacher is None else self.teacher.kind,
            "trust": list(self.trust),
        }


@torch.inference_mode(False)  # where the caller's is on, no gradient could be taken to choose neurons by
@torch.no_grad()
def fuse(
    models: Iterable[nn.Module],
    batches: Batches,
    options: FusionOptions | None = None,
    classes: Sequence[Sequence[Label]] | None = None,
    *,
    inputs: Inputs = None,
    progress: bool | None = None,
) -> Fusion:
    """Fuse trained networks of different depth and width into one (CLAFusion, Nguyen et al. 2023).

    Args:
        models: at least two networks that `trace` understands, with the same input and classes; left as they are.
        batches: unlabelled samples: a tensor or an array [samples, ...]; a data set of PyTorch or Hugging Face, read in
            its order; or batches, such as a DataLoader, a list or a generator yields: tensors, arrays, or tuples and
            mappings that hold one. They are read once, up to `options.num_samples` samples.
        options: how; None: the defaults.
        classes: per parent the labels that its outputs stand for, whole numbers or words, if they are not the same; the
            outputs of the result stand for the labels of all, sorted (`Fusion.classes`).
        inputs: the part of a batch that the networks take: a key, a place, or a function of the batch. None: the first
            of a tuple; of a mapping the entry `pixel_values`, `image`, `x` or the like, or its only floating tensor.
        progress: whether to show a bar on standard error; None: on a terminal and in a notebook, after a second.

    Returns:
        The fused network, with the anchor's widths and the template's depth, and how it came about.

    Raises:
        FusionError: if the networks, the samples or the options do not fit together; nothing has been changed then.

    Example:
        >>> from clafusion.networks import MLP
        >>> a, b = MLP(8, [6, 5, 4], num_classes=3), MLP(8, [6, 4], num_classes=3)
        >>> fusion = fuse([a, b], torch.randn(64, 8))
        >>> fusion.model(torch.randn(2, 8)).shape
        torch.Size([2, 3])
    """
    parents = parents_of(models, "fuse([a, b], batches)")
    options = FusionOptions() if options is None else options
    check_parents(parents, options)
    with bar(progress) as step:
        step(f"fusing {len(parents)} networks")
        return _fuse(parents, collect(batches, options.num_samples, inputs), options, classes)


def _fuse(
    models: Sequence[nn.Module],
    samples: Tensor,
    options: FusionOptions,
    classes: Sequence[Sequence[Label]] | None,
) -> Fusion:
    """`fuse` on samples that were collected, with as many of them at once as memory allows."""
    if len(samples) < 2:
        raise FusionError(f"Expected at least 2 samples to measure on, got {len(samples)}; pass more")
    weights = normalized(options.weights, len(models))
    copies = [independent_copy(model) for model in models]

    def compute() -> Fusion:
        parents, columns = (copies, None) if classes is None else _with_labels(copies, classes, samples, options)
        structures = trace_all(parents, samples)
        for number, structure in enumerate(structures):
            check_free(structure, parent_name(number))
        anchored = with_anchor(structures, samples, options, columns)
        one_by_one = anchored.many == "iterative" and len(parents) > 2
        if one_by_one:
            found = _fuse_one_by_one(parents, structures, samples, weights, anchored)
        else:
            found = _fuse_at_once(parents, structures, samples, weights, anchored, columns=columns)
        _carry_shape(found.model, samples.shape[1:])
        return found if classes is None else replace(found, classes=union_of(classes))

    return within_memory(compute)


def _with_labels(
    parents: Sequence[nn.Module], classes: Sequence[Sequence[Label]], samples: Tensor, options: FusionOptions
) -> tuple[list[nn.Module], tuple[Tensor, ...] | None]:
    """The parents with outputs for the labels of all, and which of those each knows; None if all know the same."""
    structures = [trace_as(parent, samples, parent_name(k)) for k, parent in enumerate(parents)]
    check_classes(classes, [structure.logits.shape[1] for structure in structures])
    together = union_of(classes)
    if all(tuple(labels) == together for labels in classes):
        return list(parents), None
    wanted = {"correction": "refit", "head": "average", "many": "many_to_one"}
    for name, value in wanted.items():
        if getattr(options, name) != value and (name != "many" or len(parents) > 2):
            raise FusionError(f"Expected {name} {value} for parents of different classes, got {getattr(options, name)}")
    columns = columns_of(classes)
    pairs = zip(parents, structures, columns, strict=True)
    return [with_outputs(parent, one, own, len(together), samples) for parent, one, own in pairs], columns


def _fuse_at_once(
    models: Sequence[nn.Module],
    structures: Sequence[Structure],
    samples: Tensor,
    weights: Sequence[float],
    options: FusionOptions,
    first_shares: Mapping[str, float] | None = None,
    columns: tuple[Tensor, ...] | None = None,
) -> Fusion:
    """Carry every parent onto the anchor and average once; `first_shares`: see `balance`; `columns`: see `Parts`."""
    # Equal depth: which layers correspond; identities stand in for those that a parent lacks, or layers are merged.
    template = template_of(structures, options)
    pairs = [deep_and_shallow(structures[template], structure, options) for structure in structures]
    layer_costs = tuple(measure_stages(*pair, samples, options) for pair in pairs)
    alignments = tuple(align_stages(*pair, each, options) for pair, each in zip(pairs, layer_costs, strict=True))
    balanced, model, structure = balance(models, structures, template, alignments, samples, options, first_shares)
    # Which neurons correspond.
    maps, costs = neuron_maps(balanced, samples, options)
    check_maps(balanced, maps)
    check_moved(balanced, maps, samples)
    # One network, and its features given back what averaging took.
    made = best_candidate(Parts(model, structure, balanced, maps, tuple(weights), columns), samples, options)
    check_outputs(made.model, made.corrected, samples)
    return Fusion(
        made.model.requires_grad_(True), made.structure, balanced, tuple(models), tuple(structures), alignments,
        layer_costs, maps, costs, tuple(weights), options, len(samples), candidates=made.scores, chosen=made.name,
        teacher=made.teacher, trust=made.trust,
    )  # fmt: skip


def _carry_shape(network: nn.Module, shape: Sequence[int]) -> nn.Module:
    """Let a network of a foreign class say which samples it takes, for those who describe and save it."""
    return network if type(network) in FAMILIES else with_input_shape(network, shape)


def _fuse_one_by_one(
    models: Sequence[nn.Module],
    structures: Sequence[Structure],
    samples: Tensor,
    weights: Sequence[float],
    options: FusionOptions,
) -> Fusion:
    """Fuse one parent after another into the result so far, which keeps the share that its parents ask for."""
    if options.correction == "repair":
        # Repairing one step gives its result biases, which the next parent must have as well.
        models = [add_missing_biases(independent_copy(model)) for model in models]
        structures = trace_all(models, samples)
    # Here all are named as they were given; what is refused later is refused after some of the work.
    template = template_of(structures, options)
    anchor = options.anchor_index
    others = [k for k in range(len(models)) if k != anchor]
    pairwise = replace(options, anchor=0, weights=None)
    current, structure, weight, shares = models[anchor], structures[anchor], weights[anchor], None
    steps: dict[int, Fusion] = {}
    for k in others:
        total = weight + weights[k]
        pair = [weight / total, weights[k] / total] if total else [0.5, 0.5]
        try:
            if steps:
                structure = structure_of(current, samples)
            both = [current, models[k]], [structure, structures[k]]
            with named_parents(["the result so far", parent_name(k)]):
                steps[k] = _fuse_at_once(*both, samples, pair, pairwise, shares)
        except FusionError as error:
            raise FusionError(f"adding {parent_name(k)} to the result so far: {error}") from error
        current, weight, shares = steps[k].model, total, steps[k].balancing.unit_shares(pair)
    # Each parent is described by the step that added it, the anchor by the first step.
    told = [(steps[others[0]], 0) if k == anchor else (steps[k], 1) for k in range(len(models))]
    by_parent: dict[str, Any] = {
        name: tuple(getattr(step, name)[i] for step, i in told)
        for name in ("alignments", "layer_costs", "maps", "costs")
    }
    last = steps[others[-1]]
    parents = tuple(step.balancing.parents[i] for step, i in told)
    balanced = Balanced(parents, {}, anchor, template, last.balancing.layout)
    return Fusion(
        current, last.structure, balanced, tuple(models), tuple(structures), **by_parent, weights=tuple(weights),
        options=options, num_samples=len(samples), steps=tuple(told),
    )  # fmt: skip
