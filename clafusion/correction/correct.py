"""Correction: what averaging took from the features is given back, on unlabelled samples and without a gradient.

Averaging aligned neurons that agree only in part shrinks the variance of what they compute, layer after layer, until
little of the signal is left. Three remedies, each walking the layers in forward order, so that every layer sees what
the corrected layers before it give:

- `rescale`: each neuron is scaled to the mean of the parents' standard deviations;
- `repair`: scaled and shifted to the mean of the parents' standard deviations and means (Jordan et al. 2023);
- `refit`: each layer is replaced by the ridge regression of what it *should* give (the weighted mean of the parents'
  moved pre-activations) on what it *is* given in the fused network; the head by the softmax regression of the parents'
  mean probability. Errors of earlier layers are thereby made up for by later ones.
"""

import warnings
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from clafusion.correction.refit import refit_step
from clafusion.correction.rescaling import add_missing_biases, match_moments
from clafusion.correction.steps import Step, alone, earliest, steps_of
from clafusion.correction.targets import Targets
from clafusion.errors import FusionError
from clafusion.statistics.samples import batch_size, check_finite, chunks
from clafusion.tracing.execution import Cursor, GraphRunner
from clafusion.tracing.exporting import operation_of
from clafusion.tracing.parameters import state_of
from clafusion.tracing.reading import structure_of
from clafusion.tracing.structure import Structure
from clafusion.tracing.units import LAYERS, NORMS
from clafusion.tracking import tracked
from clafusion.transport.moving import moved_parameter, parameter_moves, parameter_of

_WORDS = {"rescale": "rescaling layers", "repair": "repairing layers", "refit": "refitting layers"}


def correct(
    model: nn.Module, structure: Structure, targets: Targets, samples: Tensor, quiet: bool = False
) -> Structure:
    """Correct a fused network in place, as `correction` of the options says.

    Args:
        model: the fused network.
        structure: its structure, which shares its tensors.
        targets: made of its parents; of the options `correction`, `ridge`, `memory_budget` and `seed` are read.
        samples: unlabelled inputs. Of every network the activations that are alive at one place are held at a time.
        quiet: whether to give no warning, because what is made is only tried.

    Returns:
        The structure of the corrected network; a repair may have given it biases.

    Raises:
        FusionError: if activations or the corrected parameters are not finite.

    Warns:
        UserWarning: if a layer is refit from fewer observations than it has unknowns, or if a layer or a norm is left
            as it is.
    """
    options = targets.options
    if options.correction == "none":
        return structure
    if options.correction == "repair":
        before = len(list(model.parameters()))
        add_missing_biases(model)
        if len(list(model.parameters())) != before:
            structure = structure_of(model, samples)
    if options.correction == "refit" and targets.pool is None and not options.only_anchor:
        _average_with_lead(structure, targets)
    if options.correction == "refit":
        steps = [step for step in steps_of(structure) if targets.is_fitted(step)]
    else:
        layered = [(unit, layer) for unit in structure.units for layer in unit.layers]
        steps = [alone(unit, layer) for unit, layer in layered if layer.weight is not None]
    layers = tracked(_layer_by_layer(structure, steps, targets, samples), _WORDS[options.correction], len(steps))
    notes = [line for line in layers if line]
    if not quiet:
        _tell(notes, [] if options.only_anchor else _left_alone(structure))
    check_finite(state_of(model), f"the fused network after {options.correction}", structure.axes)
    return structure


def _tell(notes: Sequence[str], left_alone: Sequence[str]) -> None:
    """Warn of what a correction could not do."""
    _warn(
        [line for line in notes if " for the " in line],
        "Expected at least as many observations as inputs to refit every layer from, got {}; the ridge decides the "
        "rest, pass more samples",
    )
    _warn(
        [*(line for line in notes if " for the " not in line), *left_alone],
        "Expected layers and norms that can be corrected, got {}; this stays averaged, everything else is corrected",
    )


def _layer_by_layer(
    structure: Structure, steps: Sequence[Step], targets: Targets, samples: Tensor
) -> Iterator[str | None]:
    """Correct layer after layer, and yield after each what there is to say about it."""
    options, parents = targets.options, targets.balanced.parents
    runners = [GraphRunner(structure.capture), *targets.balanced.runners]
    parts = chunks(samples, batch_size(runners, options.memory_budget))
    fused, *cursors = (Cursor(runner, parts) for runner in runners)
    generator = torch.Generator().manual_seed(options.seed)
    for number, step in enumerate(steps):
        rest = steps[number:]
        fused.advance(earliest(rest, fused.runner.order))
        for cursor, parent in zip(cursors, parents, strict=True):
            ahead = [parent.nodes[one.node] for one in rest if one.node in parent.nodes]
            if ahead:
                cursor.advance(min(ahead, key=cursor.runner.order.__getitem__))
        try:
            if options.correction == "refit":
                yield refit_step(structure, step, fused, cursors, targets, generator, options.ridge)
            else:
                match_moments(structure, step, fused, cursors, targets, shift=options.correction == "repair")
                yield None
        except FusionError as error:
            raise FusionError(f"{options.correction} of {step.last.name!r}: {error}") from error


@torch.no_grad()
def _average_with_lead(structure: Structure, targets: Targets) -> None:
    """Give class tokens and positions the anchor's lead: added as they are, they are refit by their average."""
    balanced = targets.balanced
    known = {
        name
        for node in structure.nodes.values()
        if operation_of(node) in LAYERS | NORMS | {"mul"}
        for name in (structure.capture.names.get(used.name) for used in node.all_input_nodes)
        if name
    }
    for unit in structure.units:
        for name in unit.parameters:
            if name in known or name not in structure.capture.parameters:
                continue
            weights = targets.led(balanced.inner_weights(unit, targets.weights))
            tensors = {k: parameter_of(balanced, k, name) for k in weights}
            found = {k: tensor for k, tensor in tensors.items() if tensor is not None}
            if len(found) == len(weights):
                moves = {k: parameter_moves(balanced, k, name, targets.maps[k], targets.options) for k in found}
                total = sum(
                    weights[k] * moved_parameter(balanced, k, name, tensor.double(), moves[k])
                    for k, tensor in found.items()
                )
                assert isinstance(total, Tensor)
                structure.capture.tensors[name].copy_(total)


def _left_alone(structure: Structure) -> list[str]:
    """The layers whose weights are computed, and the BatchNorms that no layer takes along when it is corrected."""
    taken = {layer.norm for layer in structure.layers if layer.weight is not None}
    lone = [name for name, node in structure.nodes.items() if operation_of(node) == "batch_norm" and name not in taken]
    norms = [
        structure.capture.names.get(used.name, "").rpartition(".")[0]
        for name in lone
        for used in structure.nodes[name].all_input_nodes[1:2]
    ]
    computed = [f"{layer.name!r}, whose weight is computed" for layer in structure.layers if layer.weight is None]
    return [*computed, *(f"the norm {name!r}, which follows no layer directly" for name in norms)]


def _warn(names: Sequence[str], message: str) -> None:
    """Give one warning that names the first and counts the others."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(message.format(names[0] + more), UserWarning, stacklevel=4)
