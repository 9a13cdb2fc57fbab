"""A network read: captured, compared with its graph, its neurons and its units found."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError, first_line
from clafusion.tracing.execution import GraphRunner
from clafusion.tracing.exporting import Capture, export_graph, shell
from clafusion.tracing.fingerprints import fingerprint
from clafusion.tracing.outputs import logits_in
from clafusion.tracing.parameters import state_of
from clafusion.tracing.spaces import find_spaces
from clafusion.tracing.structure import Structure
from clafusion.tracing.units import find_units, unwritten

#: Samples that a network and its graph are compared on; others than `exporting.SHOWN`, which says why.
EXAMPLES = 2
#: Logits may be so far from those of the graph, relative to the largest of them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


#: Networks of the same graph, of which the last ones read are kept.
_KNOWN: "OrderedDict[Hashable, Structure]" = OrderedDict()
_MOST_KNOWN = 64
_LOCK = threading.Lock()


def _logits(model: nn.Module, example: Tensor) -> Tensor:
    """The logits of a network for a few samples; it is left as it is."""
    network = shell(model)
    try:
        with torch.no_grad():
            output = network(example.clone())
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        raise FusionError(
            f"Expected samples that {type(model).__name__} accepts, got a batch of shape {list(example.shape)}: "
            f"{first_line(error)}"
        ) from error
    return logits_in(output)


def _check_same(captured: Capture, expected: Tensor, example: Tensor, name: str) -> None:
    """Refuse a graph that is another function than its network.

    Args:
        captured: the graph.
        expected: the logits of the network.
        example: for these samples.
        name: what the message calls the network.
    """
    with torch.no_grad():
        logits: Tensor = dict(GraphRunner(captured).observe(example, [captured.logits]))[captured.logits]
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    error = float((logits - expected).abs().max() / scale)
    if expected.isfinite().all() and not error <= TOLERANCE.get(expected.dtype, 1e-4):
        raise FusionError(
            f"Expected {name} to be the function of its graph, got logits that differ by {error:.1e} (relative); it "
            "may draw random numbers, or depend on its data or on the number of samples in what it does"
        )


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
    logits, name = _logits(model, example), type(model).__name__
    key = fingerprint(model, example)
    with _LOCK:
        known = _KNOWN.get(key) if key is not None else None
    if known is not None:
        structure = replace(on_network(known, model), logits=logits)
    else:
        captured = export_graph(model, example)
        _check_constants(captured, name)
        found = find_spaces(captured)
        spaces = found.without(unwritten(captured, found))
        structure = Structure(spaces, *find_units(captured, spaces), captured, logits)
        if key is not None:
            with _LOCK:
                _KNOWN[key] = _without_tensors_of(model, structure)
                while len(_KNOWN) > _MOST_KNOWN:
                    _KNOWN.popitem(last=False)
    _check_same(structure.capture, logits, example, name)
    return structure


def structure_of(model: nn.Module, samples: Tensor) -> Structure:
    """`trace`, on as few of the samples as it takes.

    Args:
        model: what `trace` accepts.
        samples: of any device and floating dtype.
    """
    reference = next((one for one in model.parameters() if one.is_floating_point()), None)
    return trace(model, samples[:EXAMPLES] if reference is None else samples[:EXAMPLES].to(reference))


def on_network(structure: Structure, network: nn.Module) -> Structure:
    """A structure on the tensors of another network of the same graph."""
    state = {
        **dict(network.named_buffers(remove_duplicate=False)),
        **dict(network.named_parameters(remove_duplicate=False)),
    }
    tensors = {
        name: state[name] if name in state else structure.capture.tensors[name]
        for name in structure.capture.names.values()
    }
    return replace(structure, capture=replace(structure.capture, tensors=tensors))


def _without_tensors_of(network: nn.Module, structure: Structure) -> Structure:
    """A structure that keeps constants alone, and none of the network's tensors in memory."""
    state = state_of(network)
    kept = {name: one for name, one in structure.capture.tensors.items() if name not in state}
    return replace(structure, capture=replace(structure.capture, tensors=kept), logits=torch.empty(0))
