"""Refit: every layer by the regression of what it should give on what it is given."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from clafusion.correction.affine import FoldedLayer, design_rows, folded_layer
from clafusion.correction.regression import RidgeSystem, rectified_regression, soft_label_regression
from clafusion.correction.targets import Targets
from clafusion.statistics.samples import rows
from clafusion.tracing.execution import Cursor
from clafusion.tracing.structure import Layer, Structure, Unit

#: Observations per unknown of a neuron that a refit uses at most (more change the solution little), and where those
#: would be more numbers than MAX_ENTRIES (64 MiB in float32): at least so many as to leave little to the ridge.
ROWS_PER_INPUT = 64
MIN_ROWS_PER_INPUT = 2
MAX_ENTRIES = 2**24
#: Activations that let nothing negative through.
RECTIFIERS = ("ReLU", "ReLU6")


def refit_unit(
    structure: Structure,
    unit: Unit,
    fused: Cursor,
    cursors: Sequence[Cursor],
    targets: Targets,
    generator: torch.Generator,
    ridge: float,
) -> Iterator[str | None]:
    """Refit the layers of one unit in forward order, in place.

    Args:
        structure: the fused network's structure.
        unit: one of its units.
        fused: the fused network, halted before the unit.
        cursors: the balanced parents, halted there too.
        targets: made of the parents' features.
        generator: chooses the observations where there are more than needed.
        ridge: weight of the pull towards the averaged weights.

    Yields:
        After every layer None, or a line on it where it had fewer observations than unknowns, which left the ridge to
        decide.
    """
    for layer in unit.branch:
        shortcuts = [other for other in unit.layers if other.weighted and other.shortcut]
        closes = layer == unit.branch[-1] and unit.kind == "residual"
        together = [folded_layer(structure, one) for one in (layer, *(shortcuts if closes else ()))]
        # The rest of a residual unit follows from the stream that it reads and from where its branch has got to.
        stream = {unit.input} if unit.kind == "residual" else set()
        fused.advance({part.input for part in together} | stream)
        for k in targets.shares(layer, unit):
            cursors[k].advance({layer.pre} | (set() if closes else stream))
        is_head = layer.space == structure.output
        observations, available = _choose(fused, layer, together, None if is_head else generator)
        wanted = _wanted(cursors, layer, unit, targets, observations)
        if is_head and len(targets.shares(layer, unit)) > 1:
            _refit_head(fused, together[0], wanted, _mean_probability(cursors, layer, targets), ridge)
        else:
            _refit(fused, layer, together, wanted, observations, ridge, on_top_of_shortcut=closes and not shortcuts)
        unknowns = _unknowns(together)
        yield f"{available} for the {unknowns} of {layer.name!r}" if available < unknowns else None


def _has_bias(together: Sequence[FoldedLayer]) -> bool:
    """Whether any of the layers whose outputs are added can hold a bias."""
    return any(part.has_bias for part in together)


def _unknowns(together: Sequence[FoldedLayer]) -> int:
    """Weights of one neuron of the layers side by side, and its bias if there is one."""
    return sum(part.fan_in for part in together) + _has_bias(together)


def _choose(
    fused: Cursor, layer: Layer, together: Sequence[FoldedLayer], generator: torch.Generator | None
) -> tuple[list[Tensor], int]:
    """The observations of every chunk to use, without a generator all, and of how many."""
    positions = math.prod(fused.runner.nodes[layer.pre].meta["shape"][2:])
    counts = [positions * samples for samples in fused.sizes]
    unknowns, available = _unknowns(together), sum(counts)
    most = max(MAX_ENTRIES / (unknowns * together[0].groups), MIN_ROWS_PER_INPUT * unknowns)
    share = min(ROWS_PER_INPUT * unknowns, most) / available
    device = together[0].module.weight.device
    if generator is None or share >= 1:
        return [torch.arange(count, device=device) for count in counts], available
    # Chosen among all, so that the choice does not depend on how the samples are cut into chunks.
    picked = torch.randperm(available, generator=generator)[: max(1, round(share * available))].sort().values
    ends = torch.tensor(counts).cumsum(0)
    parts = picked.tensor_split(torch.searchsorted(picked, ends[:-1]))
    starts = (ends - torch.tensor(counts)).tolist()
    return [(part - start).to(device) for part, start in zip(parts, starts, strict=True)], available


def _wanted(
    cursors: Sequence[Cursor], layer: Layer, unit: Unit, targets: Targets, observations: Sequence[Tensor]
) -> list[Tensor]:
    """Chunk by chunk the weighted mean of the parents' moved pre-activations, [observations, neurons]."""
    shares = targets.shares(layer, unit)
    runs = [cursors[k].look_ahead([layer.pre]) for k in shares]
    result = []
    for indices, *outputs in zip(observations, *runs, strict=True):
        features = [rows(output[layer.pre])[indices] for output in outputs]
        parts = [share * targets.moved(k, layer, x) for (k, share), x in zip(shares.items(), features, strict=True)]
        result.append(torch.stack(parts).sum(0))
    return result


def _design(fused: Cursor, together: Sequence[FoldedLayer], observations: Sequence[Tensor]) -> Iterator[Tensor]:
    """Chunk by chunk the inputs of the layers side by side, with a constant one if there is a bias."""
    for indices, outputs in zip(observations, fused.look_ahead({part.input for part in together}), strict=True):
        x = torch.cat([design_rows(part.module, outputs[part.input], indices) for part in together], 2)
        if _has_bias(together):
            x = torch.cat([x, torch.ones_like(x[:, :, :1])], 2)
        yield x.to(torch.promote_types(x.dtype, torch.float32))  # in half precision nothing can be solved


def _offset(fused: Cursor, layer: Layer, branch: FoldedLayer, observations: Sequence[Tensor]) -> Tensor:
    r"""The offset of the layer that closes a branch: what the shortcut adds to it, [observations, neurons].

    The unit gives :math:`y = s + W z + b` before its activation, z being the input of the layer. The target is one for
    y, so that W and b are fitted to the target minus s. To get s, run the unit with a branch that gives zero.
    """
    nothing = {branch.output: branch.module.weight.new_zeros(())}
    runs = fused.look_ahead([layer.pre], given=nothing)
    return torch.cat([rows(output[layer.pre])[indices] for indices, output in zip(observations, runs, strict=True)])


def _prior(together: Sequence[FoldedLayer]) -> Tensor:
    """The present weights of the layers side by side, [groups, neurons per group, inputs]."""
    weights, biases = zip(*(part.read() for part in together), strict=True)
    parts = [*weights, torch.stack(biases).sum(0)[:, None]] if _has_bias(together) else weights
    prior: Tensor = torch.cat(parts, 1).unflatten(0, (together[0].groups, -1))
    return prior


def _refit(
    fused: Cursor,
    layer: Layer,
    together: Sequence[FoldedLayer],
    wanted: Sequence[Tensor],
    observations: Sequence[Tensor],
    ridge: float,
    on_top_of_shortcut: bool,
) -> None:
    """Ridge regression of one layer, or of the layer that closes a branch jointly with the projection shortcut."""
    x, prior = torch.cat(list(_design(fused, together, observations))), _prior(together)
    target = _by_group(torch.cat(list(wanted)), prior)
    offset = (
        _by_group(_offset(fused, layer, together[0], observations), prior) if on_top_of_shortcut else x.new_zeros(())
    )
    system = RidgeSystem.of(x, ridge, _has_bias(together))
    if layer.activation in RECTIFIERS:
        solved = rectified_regression(system, target, offset, prior)
    else:
        solved = system.regress(target - offset, prior)
    _write(together, solved, system)


def _by_group(outputs: Tensor, prior: Tensor) -> Tensor:
    """[observations, neurons] as [groups, observations, neurons per group]."""
    grouped: Tensor = outputs.unflatten(1, prior.shape[:2])
    return grouped.transpose(0, 1)


def _refit_head(
    fused: Cursor, head: FoldedLayer, wanted: Sequence[Tensor], probabilities: Tensor, ridge: float
) -> None:
    """The head is fitted to the parents' mean logits, and from there to their mean probability."""
    everything = [torch.arange(len(logits), device=logits.device) for logits in wanted]
    x = torch.cat(list(_design(fused, [head], everything)))
    system, prior = RidgeSystem.of(x, ridge, head.has_bias), _prior([head])
    start = system.regress(_by_group(torch.cat(list(wanted)), prior), prior)
    solved = soft_label_regression(x[:, 0], probabilities, start[0], ridge, head.has_bias)
    _write([head], solved[None], system)


def _write(together: Sequence[FoldedLayer], solved: Tensor, system: RidgeSystem) -> None:
    """Split jointly fitted weights and write them to their layers; the first one that can hold the bias takes it."""
    holder = next((part for part in together if part.has_bias), None)
    bias = solved[..., -1].flatten() if system.intercept else solved.new_zeros(solved.shape[0] * solved.shape[1])
    start = 0
    for part in together:
        span = slice(start, start + part.fan_in)
        weight = solved[..., span]
        moments = system.moments(weight, span) if part.norm is not None else None
        part.write(weight.flatten(0, 1), bias if part is holder else torch.zeros_like(bias), moments)
        start += part.fan_in


def _mean_probability(cursors: Sequence[Cursor], layer: Layer, targets: Targets) -> Tensor:
    """The prediction of the parents' ensemble, [samples, classes]."""
    parts = []
    for outputs in zip(*(cursor.look_ahead([layer.pre]) for cursor in cursors), strict=True):
        each = [
            weight * targets.moved(k, layer, output[layer.pre]).softmax(-1)
            for k, (weight, output) in enumerate(zip(targets.weights, outputs, strict=True))
        ]
        parts.append(torch.stack(each).sum(0))
    return torch.cat(parts)
