"""The comparison of two networks on the same few samples, up to the first layer at which they differ."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from clafusion.tracing.execution import Change, GraphRunner, as_input, working_precision
from clafusion.tracing.structure import Layer, Structure

#: Images and vectors that a check runs; an image has many positions.
IMAGES, VECTORS = 1, 8
#: Logits may be so far from what they should be, relative to the largest of them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: A layer, what it should give, and what it gives.
Observed = tuple[Layer, Tensor, Tensor]


def few_of(samples: Tensor) -> Tensor:
    """As many samples as a check runs."""
    return samples[: VECTORS if samples.ndim == 2 else IMAGES]


def logits_of(structure: Structure, few: Tensor, change: Change | None = None) -> Tensor:
    """The logits in the precision of the checks, with changed parameters if wanted."""
    end = next(node.name for node in structure.module.graph.nodes if node.op == "output")
    return _exact_outputs(structure, few, [end], change)[end]


def outputs_of(
    structure: Structure, few: Tensor, more: Collection[str] = (), change: Change | None = None
) -> dict[str, Tensor]:
    """The outputs of every layer, and of nodes that are named besides, by node; otherwise as `logits_of`."""
    return _exact_outputs(structure, few, {*(layer.node for layer in structure.layers), *more}, change)


def _exact_outputs(
    structure: Structure, few: Tensor, names: Collection[str], change: Change | None
) -> dict[str, Tensor]:
    """The outputs of nodes, with every parameter made when the turn of its layer comes."""
    precision = working_precision(next(structure.module.parameters()))

    def exact(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.to(precision) if tensor.is_floating_point() else tensor
        return tensor if change is None else change(name, tensor)

    inputs = as_input(few, structure.module).to(precision)
    return dict(GraphRunner(structure.module, change=exact).observe(inputs, names))


def difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest value that was expected."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((got - expected).abs().max() / scale)


def first_wrong(observed: Iterable[Observed], structure: Structure) -> str:
    """The first layer that does not give what it should; the last one of all where only what follows it does not."""
    wrong = (layer for layer, expected, got in observed if not difference(expected, got) <= TOLERANCE[got.dtype])
    return in_words(next(wrong, structure.layers[-1]))


def in_words(layer: Layer) -> str:
    """A layer as an error names it."""
    return f"'{layer.name}.weight' (neuron space {layer.space!r})"
