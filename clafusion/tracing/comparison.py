"""The comparison of two networks on the same few samples, up to the first layer at which they differ."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from clafusion.tracing.execution import GraphRunner, as_input, working_precision
from clafusion.tracing.structure import Layer, Structure

#: Images and vectors that a check runs; an image has many positions.
IMAGES, VECTORS = 1, 8
#: Logits may be so far from what they should be, relative to the largest of them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: From the name of a parameter and its tensor to the tensor that is run in its place.
Change = Callable[[str, Tensor], Tensor]
#: A layer, what it should give, and what it gives.
Observed = tuple[Layer, Tensor, Tensor]


def few_of(samples: Tensor) -> Tensor:
    """As many samples as a check runs."""
    return samples[: VECTORS if samples.ndim == 2 else IMAGES]


def exact_outputs(
    structure: Structure, few: Tensor, names: Iterable[str], change: Change | None = None
) -> dict[str, Tensor]:
    """The outputs of nodes in the precision of the checks.

    Args:
        structure: of the network.
        few: samples.
        names: of the nodes.
        change: of the parameters, when their turn comes; None: none.
    """
    capture = structure.capture
    precision = working_precision(capture.reference)

    def fetch(name: str) -> Tensor:
        tensor = capture.tensors[name].detach()
        tensor = tensor.to(precision) if tensor.is_floating_point() else tensor
        return tensor if change is None else change(name, tensor)

    inputs = as_input(few, capture).to(precision)
    return dict(GraphRunner(capture, fetch).observe(inputs, frozenset(names)))


def difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest value that was expected."""
    expected, got = expected.detach(), got.detach()
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((got - expected).abs().max() / scale)


def first_wrong(observed: Iterable[Observed], structure: Structure) -> str:
    """The first layer that does not give what it should; the last one of all where only what follows it does not."""
    wrong = (layer for layer, expected, got in observed if not difference(expected, got) <= TOLERANCE[got.dtype])
    return in_words(next(wrong, structure.layers[-1]), structure)


def in_words(layer: Layer, structure: Structure) -> str:
    """A layer as an error names it."""
    axis = structure.written(layer)
    return f"'{layer.weight or layer.name}'" + (f" (neuron space {axis.spaces[0]!r})" if axis is not None else "")
