"""The check that a parent with inserted layers is the function that it was, on a handful of samples."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from clafusion.alignment.layer_maps import Alignment
from clafusion.balancing.correspondence import match_layers, matched_units
from clafusion.errors import FusionError
from clafusion.tracing.comparison import TOLERANCE, Observed, difference, few_of, first_wrong, logits_of, outputs_of
from clafusion.tracing.structure import Structure, Unit


def check_inserted(network: Structure, original: Structure, alignment: Alignment, samples: Tensor, called: str) -> None:
    """Refuse a network that its inserted layers have made another function.

    Args:
        network: with inserted units.
        original: without them.
        alignment: per stage, the unit of the network that each unit of the original became.
        samples: inputs; the first few are run.
        called: what the message calls the network.
    """
    few = few_of(samples)
    error = difference(logits_of(original, few), logits_of(network, few))
    if error <= TOLERANCE.get(next(original.module.parameters()).dtype, 1e-3):
        return
    partners = matched_units(network, original, alignment)
    ends = [node for unit in network.units for node in (unit.input, unit.output.post)]
    expected, got = outputs_of(original, few), outputs_of(network, few, ends)
    pairs = (pair for unit in network.units for pair in _inserted(unit, partners, expected, got))
    raise FusionError(
        f"Expected inserted layers to leave {called}'s function as it is, got logits that differ by {error:.1e} "
        f"(relative), first behind {first_wrong(pairs, network)}; only ReLU-like activations pass an identity"
    )


def _inserted(
    unit: Unit, partners: Mapping[str, Unit], expected: Mapping[str, Tensor], got: Mapping[str, Tensor]
) -> Iterator[Observed]:
    """The outputs that the layers of a unit should have: those of its partner, or without one the input of the unit."""
    if unit.name in partners:
        pairs = match_layers(unit, partners[unit.name])
        yield from ((layer, expected[other.node], got[layer.node]) for layer, other in pairs)
        return
    if unit.kind == "plain":
        yield from ((layer, got[unit.input], got[layer.node]) for layer in unit.layers)
    closing = next(layer for layer in unit.layers if layer.name == unit.closing)
    yield closing, got[unit.input], got[unit.output.post]
