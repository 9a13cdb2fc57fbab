"""Runs two graphs on the same few samples, and names the first layer at which they differ."""

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call

from clafusion.tracing.execution import as_input, observe, working_precision
from clafusion.tracing.parameters import state_of
from clafusion.tracing.structure import Layer, Structure

#: Images and vectors that a check runs; an image has many positions.
IMAGES, VECTORS = 1, 8
#: How far logits may be from what they should be, relative to the largest of them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

#: A layer, what it should give, and what it gives.
Observed = tuple[Layer, Tensor, Tensor]
#: Where an output is: behind a layer, or at a node by its name.
Place = Layer | str
#: What is made of a parameter before it is used, by name.
Change = Callable[[str, Tensor], Tensor]


class _Checked(fx.Interpreter):
    """Runs a captured network in the precision of the checks, with parameters made when a layer's turn comes.

    Args:
        structure: the network.
        graph: the graph to run it by; None: its own.
        change: of its parameters, by name; None: none.
    """

    def __init__(self, structure: Structure, graph: fx.Graph | None = None, change: Change | None = None) -> None:
        super().__init__(structure.module, garbage_collect_values=False, graph=graph)
        self.structure, self.change = structure, change
        self.precision = working_precision(next(structure.module.parameters()))

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A layer, with other parameters than its own."""
        module = self.fetch_attr(target)
        state = {key: self._made(f"{target}.{key}", tensor) for key, tensor in state_of(module).items()}
        return functional_call(module, state, args, kwargs) if state else module(*args, **kwargs)

    def _made(self, name: str, tensor: Tensor) -> Tensor:
        exact = tensor.to(self.precision) if tensor.is_floating_point() else tensor
        return exact if self.change is None else self.change(name, exact)

    def logits(self, few: Tensor) -> Tensor:
        """What the network gives."""
        (end,) = (node.name for node in self.graph.nodes if node.op == "output")
        return next(value for _, value in self._observed(few, [end]))

    def outputs(self, few: Tensor, more: Collection[str] = ()) -> dict[Place, Tensor]:
        """What each layer gives, and nodes that are named besides."""
        nodes = _nodes(self.structure.layers, self.graph)
        found: dict[Place, Tensor] = dict(self._observed(few, {*nodes.values(), *more}))
        return found | {layer: found[node] for layer, node in nodes.items()}

    def _observed(self, few: Tensor, names: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        few = as_input(few, self.structure.module).to(self.precision)
        return observe(self.structure.module, few, names, interpreter=self)


def _few(samples: Tensor) -> Tensor:
    return samples[: VECTORS if samples.ndim == 2 else IMAGES]


def _nodes(layers: Iterable[Layer], graph: fx.Graph) -> dict[Layer, str]:
    """The name of the node that runs each layer."""
    nodes = {node.target: node.name for node in graph.nodes if node.op == "call_module"}
    return {layer: nodes[layer.name] for layer in layers}


def _difference(expected: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest value that was expected."""
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((got - expected).abs().max() / scale)


def _first(observed: Iterable[Observed], structure: Structure) -> str:
    """The first layer that does not give what it should; the last one of all where only what follows it does not."""
    wrong = (layer for layer, expected, got in observed if not _difference(expected, got) <= TOLERANCE[got.dtype])
    return _named(next(wrong, structure.layers[-1]))


def _named(layer: Layer) -> str:
    return f"'{layer.name}.weight' (neuron space {layer.space!r})"
