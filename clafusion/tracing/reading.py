"""A network read: captured, compared with its graph, its neurons and its units found."""

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.tracing.execution import GraphRunner
from clafusion.tracing.exporting import Capture, export_graph, first_line, logits_of, shell
from clafusion.tracing.spaces import find_spaces
from clafusion.tracing.structure import Structure
from clafusion.tracing.units import find_units

#: Samples that a network and its graph are compared on.
EXAMPLES = 3
#: Logits may be so far from those of the graph, relative to the largest of them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


def capture(model: nn.Module, example: Tensor) -> tuple[Capture, Tensor]:
    """Export a network, and compare the graph with the network on a few samples.

    Args:
        model: a network whose forward takes one tensor; left as it is.
        example: samples that it accepts, [samples, ...].

    Returns:
        The captured network, which shares the tensors of `model`, and its logits for the samples.

    Raises:
        FusionError: if the network does not accept the samples, cannot be exported, or is another function than its
            graph.
    """
    name = type(model).__name__
    network = shell(model)
    try:
        with torch.no_grad():
            expected = logits_of(network(example.clone()))
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise FusionError(
            f"Expected samples that {name} accepts, got a batch of shape {list(example.shape)}: {first_line(error)}"
        ) from error
    captured = export_graph(model, example)
    _check_constants(captured, name)
    with torch.no_grad():
        logits: Tensor = dict(GraphRunner(captured).observe(example, [captured.logits]))[captured.logits]
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    error = float((logits - expected).abs().max() / scale)
    if expected.isfinite().all() and not error <= TOLERANCE.get(expected.dtype, 1e-4):
        raise FusionError(
            f"Expected {name} to be the function of its graph, got logits that differ by {error:.1e} (relative); it may "
            "draw random numbers, or depend on its data or on the number of samples in what it does"
        )
    return captured, expected


def _check_constants(captured: Capture, name: str) -> None:
    """Refuse a network that runs on stored results of parameters: new parameters would change nothing."""
    stored = [
        key
        for key, tensor in captured.tensors.items()
        if "lifted_tensor" in key and tensor.is_floating_point() and tensor.numel() > 1
    ]
    if stored and captured.unused:
        raise FusionError(
            f"Expected {name} to compute with its parameters, got {stored[0]!r}, a tensor that it has stored, while "
            f"{captured.unused[0]!r} is not used; pass a fresh copy of the network, with load_state_dict"
        )


def trace(model: nn.Module, example: Tensor) -> Structure:
    """Read the neuron spaces, units and stages of a network off its graph.

    Args:
        model: a classifier whose forward takes one tensor and returns logits [samples, classes].
        example: a batch that it accepts, [samples, ...].

    Raises:
        FusionError: if torch.export cannot capture the network, its graph is not the same function, or for the first
            operation or parameter that is not understood, by name.

    Example:
        >>> import torch
        >>> from clafusion.networks import MLP
        >>> structure = trace(MLP(4, [3, 2], num_classes=2), torch.zeros(1, 4))
        >>> [[unit.name for unit in stage] for stage in structure.stages]
        [['fc1', 'fc2'], ['fc3']]
        >>> structure.free_spaces
        ('fc1', 'fc2')
    """
    captured, logits = capture(model, example)
    spaces = find_spaces(captured)
    stages, transitions = find_units(captured, spaces)
    return Structure(spaces, stages, transitions, captured, logits)


def structure_of(model: nn.Module, samples: Tensor) -> Structure:
    """`trace`, on as few of the samples as it takes.

    Args:
        model: what `trace` accepts.
        samples: of any device and floating dtype.
    """
    reference = next((one for one in model.parameters() if one.is_floating_point()), None)
    return trace(model, samples[:EXAMPLES] if reference is None else samples[:EXAMPLES].to(reference))
