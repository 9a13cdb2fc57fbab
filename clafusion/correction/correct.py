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

from clafusion.correction.affine import folded_layer
from clafusion.correction.refit import refit_unit
from clafusion.correction.rescaling import add_missing_biases, match_moments
from clafusion.correction.targets import Targets
from clafusion.errors import FusionError
from clafusion.statistics.samples import batch_size, check_finite, chunks
from clafusion.tracing.execution import Cursor, GraphRunner
from clafusion.tracing.structure import Structure, structure_of
from clafusion.tracking import tracked

_WORDS = {"rescale": "rescaling layers", "repair": "repairing layers", "refit": "refitting layers"}


def correct(model: nn.Module, targets: Targets, samples: Tensor) -> None:
    """Correct a fused network in place, as `correction` of the options says.

    Args:
        model: the fused network.
        targets: made of its parents; of the options `correction`, `ridge`, `memory_budget` and `seed` are read.
        samples: unlabelled inputs. Of every network one activation per sample is held at a time.

    Raises:
        FusionError: if activations or the corrected parameters are not finite.

    Warns:
        UserWarning: if a layer is refit from fewer observations than it has unknowns, or if a norm is left as it is.
    """
    options = targets.options
    if options.correction == "none":
        return
    if options.correction == "repair":
        add_missing_biases(model)
    structure = structure_of(model, samples)
    count = sum(layer.weighted for layer in structure.layers)
    if options.correction == "refit":  # projection shortcuts together with the branch that they are added to
        count = sum(len(unit.branch) for unit in structure.units)
    layers = tracked(_layer_by_layer(structure, targets, samples), _WORDS[options.correction], count)
    scarce = [line for line in layers if line]
    _warn(
        scarce,
        "Expected at least as many observations as inputs to refit every layer from, got {}; the ridge decides the "
        "rest, pass more samples",
    )
    _warn(
        _lone_norms(structure),
        "Expected every norm directly behind a Linear or Conv2d, got {} elsewhere; it stays averaged, everything else "
        "is corrected",
    )
    check_finite(model, f"the fused network after {options.correction}", structure)


def _layer_by_layer(structure: Structure, targets: Targets, samples: Tensor) -> Iterator[str | None]:
    """Correct layer after layer, and yield after each what there is to say about it."""
    options = targets.options
    runners = [GraphRunner(structure.module), *targets.balanced.runners]
    parts = chunks(samples, batch_size(runners, options.memory_budget))
    fused, *cursors = (Cursor(runner, parts) for runner in runners)
    generator = torch.Generator().manual_seed(options.seed)
    for unit in structure.units:
        for cursor in (fused, *cursors):
            cursor.advance([unit.input])
        try:
            if options.correction == "refit":
                yield from refit_unit(structure, unit, fused, cursors, targets, generator, options.ridge)
            else:
                yield from match_moments(structure, unit, fused, cursors, targets, shift=options.correction == "repair")
        except FusionError as error:
            raise FusionError(f"{options.correction} of {unit.name!r}: {error}") from error


def _lone_norms(structure: Structure) -> list[str]:
    """The norms that no layer takes along when it is corrected."""
    modules = dict(structure.module.named_modules())
    taken = [folded_layer(structure, layer).norm for layer in structure.layers if layer.weighted]
    norms = [layer.name for layer in structure.layers if layer.kind == "norm"]
    return [repr(name) for name in norms if not any(modules[name] is norm for norm in taken)]


def _warn(names: Sequence[str], message: str) -> None:
    """Give one warning that names the first and counts the others."""
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        warnings.warn(message.format(names[0] + more), UserWarning, stacklevel=3)
