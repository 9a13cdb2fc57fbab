"""A parent with inserted layers is the function that it was: checked on a handful of samples."""

from collections.abc import Iterator, Mapping

from torch import Tensor

from clafusion.balancing.correspondence import Alignment, match_layers, matched_units
from clafusion.errors import FusionError
from clafusion.tracing.comparison import TOLERANCE, Observed, Place, _Checked, _difference, _few, _first
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
    ours, theirs, few = _Checked(network), _Checked(original), _few(samples)
    error = _difference(theirs.logits(few), ours.logits(few))
    if error <= TOLERANCE.get(next(original.module.parameters()).dtype, 1e-3):
        return
    partners = matched_units(network, original, alignment)
    ends = [node for unit in network.units for node in (unit.input, unit.output.post)]
    expected, got = theirs.outputs(few), ours.outputs(few, ends)
    pairs = (pair for unit in network.units for pair in _inserted(unit, partners, expected, got))
    raise FusionError(
        f"Expected inserted layers to leave {called}'s function as it is, got logits that differ by {error:.1e} "
        f"(relative), first behind {_first(pairs, network)}; only ReLU-like activations pass an identity"
    )


def _inserted(
    unit: Unit, partners: Mapping[str, Unit], expected: Mapping[Place, Tensor], got: Mapping[Place, Tensor]
) -> Iterator[Observed]:
    """What the layers of a unit should give: what its partner's give, or without one what the unit is given."""
    if unit.name in partners:
        pairs = match_layers(unit, partners[unit.name])
        yield from ((layer, expected[other], got[layer]) for layer, other in pairs)
        return
    if unit.kind == "plain":
        yield from ((layer, got[unit.input], got[layer]) for layer in unit.layers)
    closing = next(layer for layer in unit.layers if layer.name == unit.closing)
    yield closing, got[unit.input], got[unit.output.post]
