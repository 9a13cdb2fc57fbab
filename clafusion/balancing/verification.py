"""The check that a unit which a parent lacks is an identity, on a handful of samples."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.tracing.comparison import TOLERANCE, difference, exact_outputs
from clafusion.tracing.execution import GraphRunner
from clafusion.tracing.exporting import operation_of
from clafusion.tracing.structure import Structure, Unit
from clafusion.tracing.units import IDEMPOTENT
from clafusion.transport.identities import identity_value


@torch.no_grad()
def check_passing(structure: Structure, units: Sequence[Unit], few: Tensor) -> None:
    """Refuse a unit that does not pass its input on when its parameters are those of an identity.

    What stands for a unit is not built for the parent that lacks it; so this is tried on the network that has it.

    Args:
        structure: of the network that has the units.
        units: those that another network lacks.
        few: samples.
    """
    inputs = exact_outputs(structure, few, [unit.input for unit in units])
    for unit in units:
        expected = activated(structure, unit, inputs[unit.input])
        error = difference(expected, _passed(structure, unit, inputs[unit.input], few))
        if not error <= TOLERANCE[expected.dtype]:
            raise FusionError(
                f"Expected {unit.name!r} to pass its input on with the parameters of an identity, got features that "
                f"differ by {error:.1e} (relative); it cannot be inserted safely, report it"
            )


def _passed(structure: Structure, unit: Unit, stream: Tensor, few: Tensor) -> Tensor:
    """The output of a unit for a stream once its parameters are those of an identity."""
    tensors, found = structure.capture.tensors, structure.neurons_at(unit.input)
    size = 0 if found is None else len(found[1].of)

    def fetch(name: str) -> Tensor:
        tensor = tensors[name].detach()
        tensor = tensor.to(stream.dtype) if tensor.is_floating_point() else tensor
        if name in unit.closing:
            return torch.zeros_like(tensor)
        if unit.kind == "plain" and name in unit.parameters:
            return identity_value(name, unit.layers[0], structure, size, tensor)
        return tensor

    # Sizes that depend on the number of samples are read off the network's input.
    runner, entry = GraphRunner(structure.capture, fetch), structure.capture.entry
    output: Tensor = dict(runner.resume({entry: few.to(stream), unit.input: stream}, [unit.output]))[unit.output]
    return output


def activated(structure: Structure, unit: Unit, stream: Tensor) -> Tensor:
    """A stream behind the activations that end a unit."""
    for name in unit.nodes[unit.nodes.index(unit.features) + 1 if unit.features in unit.nodes else 0 :]:
        node = structure.nodes[name]
        if operation_of(node) in IDEMPOTENT:
            stream = node.target(stream, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return stream
