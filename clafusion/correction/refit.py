"""Refit: every layer by the regression of what it should give on what it is given."""

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from clafusion.correction.affine import FoldedLayer, design_rows
from clafusion.correction.steps import Step, row_places
from clafusion.correction.targets import Targets
from clafusion.statistics.regression import BLOCK, RidgeSystem, rectified_regression, soft_label_regression
from clafusion.statistics.samples import rows
from clafusion.teachers.teacher import Teacher
from clafusion.tracing.execution import Cursor
from clafusion.tracing.structure import Structure

#: Observations per unknown of a neuron that a refit uses at most (more change the solution little), and where those
#: would be more numbers than MAX_ENTRIES (64 MiB in float32): at least so many as to leave little to the ridge.
ROWS_PER_INPUT = 64
MIN_ROWS_PER_INPUT = 2
MAX_ENTRIES = 2**24
#: With fewer observations per input than this the ridge of the output layer is one of these multiples, whichever leaves
#: it nearest to the teacher on observations that it is not fitted to (cross-validation in so many parts).
FEW_PER_INPUT = 10
RIDGES = (1.0, 10.0, 100.0, 1000.0)
FOLDS = 5
#: With as many observations one of the parts tells.
ENOUGH = 1000
#: A refit that leaves more than this much of the error there was is undone.
WORSE = 1.05


def refit_step(
    structure: Structure,
    step: Step,
    fused: Cursor,
    cursors: Sequence[Cursor],
    targets: Targets,
    generator: torch.Generator,
    ridge: float,
) -> str | None:
    """Refit the layers of one step, in place.

    Args:
        structure: of the fused network.
        step: the layers.
        fused: the fused network, halted before them.
        cursors: the parents, halted before what corresponds.
        targets: made of the parents' features.
        generator: chooses the observations where there are more than needed.
        ridge: weight of the pull towards the averaged weights.

    Returns:
        None, or a line on the step where it had fewer observations than unknowns, which left the ridge to decide, or
        where it was left as it was.
    """
    parts = step.parts(structure)
    placed = [row_places(fused, part, step) for part in parts]
    if any(one is None for one in placed):
        return f"the entries of {step.last.name!r} are mixed before they are added up"
    is_head = targets.is_head(step)
    observations, available = _choose(fused, step, parts, None if is_head else generator)
    wanted = _wanted(cursors, step, targets, observations, structure)
    base, design = _measured(fused, step, parts, [one for one in placed if one is not None], observations)
    kept = [pair for part in parts for pair in part.keep()]
    if is_head and len(targets.shares(step)) > 1:
        probabilities = _taught(cursors, step, targets, structure)
        _refit_head(parts, design, wanted, base, probabilities, ridge)
    else:
        _refit(step, parts, design, wanted, base, ridge)
        if _is_worse(fused, step, wanted, base, observations):
            for tensor, before in kept:
                tensor.detach().copy_(before)
    unknowns = _unknowns(parts)
    return f"{available} for the {unknowns} of {step.last.name!r}" if available < unknowns else None


def _has_bias(parts: Sequence[FoldedLayer]) -> bool:
    """Whether any of the layers whose outputs are added can hold a bias."""
    return any(part.has_bias for part in parts)


def _unknowns(parts: Sequence[FoldedLayer]) -> int:
    """Weights of one neuron of the layers side by side, and its bias if there is one."""
    return sum(part.fan_in for part in parts) + _has_bias(parts)


def _choose(
    fused: Cursor, step: Step, parts: Sequence[FoldedLayer], generator: torch.Generator | None
) -> tuple[list[Tensor], int]:
    """The observations of every chunk to use, without a generator all, and of how many."""
    shape = fused.runner.nodes[step.node].meta["shape"]
    positions = math.prod(shape) // shape[step.dim]
    counts = [positions * samples for samples in fused.sizes]
    unknowns, available = _unknowns(parts), sum(counts)
    most = max(MAX_ENTRIES / (unknowns * parts[0].groups), MIN_ROWS_PER_INPUT * unknowns)
    share = min(ROWS_PER_INPUT * unknowns, most) / available
    device = parts[0].weight.device
    if generator is None or share >= 1:
        return [torch.arange(count, device=device) for count in counts], available
    # Chosen among all, so that the choice does not depend on how the samples are cut into chunks.
    picked = torch.randperm(available, generator=generator)[: max(1, round(share * available))].sort().values
    ends = torch.tensor(counts).cumsum(0)
    chosen = picked.tensor_split(torch.searchsorted(picked, ends[:-1]))
    starts = (ends - torch.tensor(counts)).tolist()
    return [(part - start).to(device) for part, start in zip(chosen, starts, strict=True)], available


def _wanted(
    cursors: Sequence[Cursor], step: Step, targets: Targets, observations: Sequence[Tensor], structure: Structure
) -> Tensor:
    """The weighted mean of the parents' moved features, [observations, neurons]."""
    shares = targets.shares(step)
    nodes = {k: targets.balanced.parents[k].nodes[step.node] for k in shares}
    runs = [cursors[k].look_ahead([nodes[k]]) for k in shares]
    result = []
    for indices, *outputs in zip(observations, *runs, strict=True):
        parts = [
            share * targets.moved(k, step, _rows_of(targets, k, step, output[nodes[k]], structure)[indices], structure)
            for (k, share), output in zip(shares.items(), outputs, strict=True)
        ]
        result.append(torch.stack(parts).sum(0))
    return torch.cat(result)


def _rows_of(targets: Targets, k: int, step: Step, output: Tensor, structure: Structure) -> Tensor:
    return rows(targets.beside(k, step, output, structure), step.dim)


def _measured(
    fused: Cursor,
    step: Step,
    parts: Sequence[FoldedLayer],
    placed: Sequence[Sequence[Tensor | None]],
    observations: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """The outputs of the step as it is, [observations, neurons], and the inputs of its layers side by side."""
    base, design = [], []
    names = {step.node, *(part.layer.input for part in parts)}
    for chunk, (indices, outputs) in enumerate(zip(observations, fused.look_ahead(names), strict=True)):
        base.append(rows(outputs[step.node], step.dim)[indices])
        columns = []
        for part, places in zip(parts, placed, strict=True):
            own = places[chunk]
            columns.append(design_rows(part, outputs[part.layer.input], indices if own is None else own[indices]))
        x = torch.cat(columns, 2)
        if _has_bias(parts):
            x = torch.cat([x, torch.ones_like(x[:, :, :1])], 2)
        design.append(x.to(torch.promote_types(x.dtype, torch.float32)))  # in half precision nothing can be solved
    return torch.cat(base), torch.cat(design)


def _prior(parts: Sequence[FoldedLayer]) -> Tensor:
    """The present weights of the layers side by side, [groups, neurons per group, inputs]."""
    weights, biases = zip(*(part.read() for part in parts), strict=True)
    columns = [*weights, torch.stack(biases).sum(0)[:, None]] if _has_bias(parts) else weights
    prior: Tensor = torch.cat(columns, 1).unflatten(0, (parts[0].groups, -1))
    return prior


def _refit(
    step: Step, parts: Sequence[FoldedLayer], design: Tensor, wanted: Tensor, base: Tensor, ridge: float
) -> None:
    """Ridge regression of one layer, or of several whose outputs are added up."""
    prior = _prior(parts)
    target, now = _by_group(wanted, prior), _by_group(base.double(), prior)
    system = RidgeSystem.of(design, ridge, _has_bias(parts))
    if (step.last.activation or "").startswith("relu"):
        solved = rectified_regression(system, target, now, prior)
    else:
        solved = system.regress(target - now, prior)
    _write(parts, solved, system)


def _by_group(outputs: Tensor, prior: Tensor) -> Tensor:
    """[observations, neurons] as [groups, observations, neurons per group]."""
    grouped: Tensor = outputs.unflatten(1, prior.shape[:2])
    return grouped.transpose(0, 1)


@torch.no_grad()
def _is_worse(fused: Cursor, step: Step, wanted: Tensor, base: Tensor, observations: Sequence[Tensor]) -> bool:
    """Whether the first chunk is further from its target than it was."""
    count = len(observations[0])
    if not count:
        return False
    outputs = next(iter(fused.look_ahead([step.node])))
    now = rows(outputs[step.node], step.dim)[observations[0]].double()
    target, before = wanted[:count], base[:count].double()
    if (step.last.activation or "").startswith("relu"):
        now, target, before = (one.clamp_min(0) for one in (now, target, before))
    rounding = torch.finfo(base.dtype).eps * target.square().sum()
    return not bool((now - target).square().sum() <= WORSE * (before - target).square().sum() + rounding)


def _refit_head(
    parts: Sequence[FoldedLayer], design: Tensor, wanted: Tensor, base: Tensor, probabilities: Tensor, ridge: float
) -> None:
    """The head is fitted to the parents' mean logits, and from there to their teacher's probabilities."""
    prior, has_bias = _prior(parts), _has_bias(parts)
    system = RidgeSystem.of(design, ridge, has_bias)
    missing = wanted - base
    offset = base.double() - system.apply(prior.double())[0]  # of what else is added to the logits
    if FOLDS <= len(design) < FEW_PER_INPUT * design.shape[2]:
        ridge = _validated_ridge(design[:, 0], missing, probabilities, offset, prior, ridge, has_bias)
        system = RidgeSystem.of(design, ridge, has_bias)
    start = system.regress(_by_group(missing, prior), prior)
    _write(parts, soft_label_regression(design, probabilities[None], start, ridge, has_bias, offset[None]), system)


def _validated_ridge(
    x: Tensor, missing: Tensor, probabilities: Tensor, offset: Tensor, prior: Tensor, ridge: float, intercept: bool
) -> float:
    """The multiple of a ridge that leaves the output layer nearest to the teacher, by cross-validation.

    Args:
        x: inputs of the output layer, [observations, inputs].
        missing: what its present weights lack of the parents' mean logits, [observations, classes].
        probabilities: those of the teacher, [observations, classes].
        offset: what is added to the layer's outputs, [observations, classes].
        prior: its present weights, [1, classes, inputs].
        ridge: to be multiplied.
        intercept: whether the last input is the constant one.
    """
    parts = torch.arange(len(x) // FOLDS * FOLDS, device=x.device).reshape(-1, FOLDS).T
    tried = list(product(RIDGES, range(FOLDS if len(x) < ENOUGH else 1)))
    errors = dict.fromkeys(RIDGES, 0.0)
    at_once = max(1, BLOCK // x.numel())
    for first in range(0, len(tried), at_once):
        multiples, folds = zip(*tried[first : first + at_once], strict=True)
        held = parts[list(folds)]  # [trials, observations]
        given = torch.stack([torch.cat([*parts[:fold], *parts[fold + 1 :]]) for fold in folds])
        ridges, design = ridge * torch.tensor(multiples, dtype=torch.float64, device=x.device), x[given].transpose(0, 1)
        start = RidgeSystem.of(design, ridges, intercept).regress(missing[given], prior.expand(len(folds), -1, -1))
        weights = soft_label_regression(design, probabilities[given], start, ridges, intercept, offset[given])
        said = (x[held].double() @ weights.mT + offset[held]).log_softmax(-1)
        for multiple, error in zip(multiples, -(probabilities[held] * said).sum((1, 2)), strict=True):
            errors[multiple] += float(error)
    return ridge * min(errors, key=errors.__getitem__)


def _write(parts: Sequence[FoldedLayer], solved: Tensor, system: RidgeSystem) -> None:
    """Split jointly fitted weights and write them to their layers; the first one that can hold the bias takes it."""
    holder = next((part for part in parts if part.has_bias), None)
    bias = solved[..., -1].flatten() if system.intercept else solved.new_zeros(solved.shape[0] * solved.shape[1])
    start = 0
    for part in parts:
        span = slice(start, start + part.fan_in)
        weight = solved[..., span]
        moments = system.moments(weight, span) if part.norm is not None else None
        part.write(weight.flatten(0, 1), bias if part is holder else torch.zeros_like(bias), moments)
        start += part.fan_in


def _taught(cursors: Sequence[Cursor], step: Step, targets: Targets, structure: Structure) -> Tensor:
    """The probabilities that the parents' teacher gives, [samples, classes]."""
    teacher = targets.teacher or Teacher(tuple(targets.weights))
    nodes = [parent.nodes[step.node] for parent in targets.balanced.parents]
    runs = [cursor.look_ahead([node]) for cursor, node in zip(cursors, nodes, strict=True)]
    result = []
    for outputs in zip(*runs, strict=True):
        pairs = enumerate(zip(outputs, nodes, strict=True))
        logits = [targets.moved(k, step, output[node], structure) for k, (output, node) in pairs]
        result.append(teacher.log_probabilities(logits).exp())
    return torch.cat(result)
