"""What every fusion is checked for while it runs, on a handful of samples, so that none returns a wrong network.

A parent with inserted layers is the function that it was. So is a parent whose neurons are permuted, which holds the
trace and the maps to their word. Maps are maps, and everything is finite. What is violated is named, with its neuron
space and its parameter.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from clafusion.errors import FusionError
from clafusion.graph import observe
from clafusion.maps import Balanced, Maps, moved
from clafusion.matching import Alignment, match_layers, matched_units
from clafusion.options import FusionOptions
from clafusion.parameters import copied_rows, move, state_of
from clafusion.statistics import all_finite, as_input, working_precision
from clafusion.structure import Axis, Layer, Structure, Unit, trace

#: Images and vectors that a check runs; an image has many positions.
IMAGES, VECTORS = 1, 8
#: How far logits may be from what they should be, relative to the largest of them.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: How far the shares in a column of a map may be from summing to one.
SHARE_TOLERANCE = 1e-6

#: A layer, what it should give, and what it gives.
Observed = tuple[Layer, Tensor, Tensor]
#: Where an output is: behind a layer, or at a node by its name.
Place = Layer | str
#: What is made of a parameter before it is used, by name.
Change = Callable[[str, Tensor], Tensor]


def check_finite(model: nn.Module, called: str, structure: Structure | None = None) -> None:
    """Refuse a network with a parameter or buffer that is not finite.

    Args:
        model: the network.
        called: what the message calls it.
        structure: tells the neuron spaces.
    """
    for name, tensor in state_of(model).items():
        if not all_finite(tensor):
            axes = structure.axes.get(name, ()) if structure is not None else ()
            space = next((f" (neuron space {axis.space!r})" for axis in axes if axis is not None), "")
            raise FusionError(f"Expected finite weights, got NaN or infinity in {name!r}{space} of {called}")


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


def check_maps(balanced: Balanced, maps: Sequence[Maps]) -> None:
    """Refuse a map that is not finite, has a negative entry, or a column whose shares do not sum to one."""
    for k, (structure, its_maps) in enumerate(zip(balanced.structures, maps, strict=True)):
        for key, mapping in its_maps.items():
            error = float((mapping.sum(0) - 1).abs().max())
            if not (error <= SHARE_TOLERANCE and mapping.min() >= 0):
                layer = next(layer for layer in structure.layers if key in (layer.name, layer.space))
                raise FusionError(
                    f"Expected maps of neurons with shares that sum to one, got one that is {error:.1e} off, of parent "
                    f"{k} behind {_named(layer)}; report it"
                )


def check_moved(balanced: Balanced, maps: Sequence[Maps], samples: Tensor, options: FusionOptions) -> None:
    """Refuse a parent that is another function once its neurons are permuted.

    They are permuted as its maps say where these are permutations. Where no parent's maps move the neurons of all of
    its spaces, those of the smallest parent are permuted at random as well. One is enough: all share one graph, and
    what is asked is whether that was read aright.

    Args:
        balanced: the parents.
        maps: of each.
        samples: inputs; the first few are run.
        options: `streams` is read.
    """
    # The graph of the template has every layer; those of the others may pass over what was inserted.
    graph, few = balanced.structures[balanced.template].module.graph, _few(samples)
    thorough = False
    for k, (structure, its_maps) in enumerate(zip(balanced.structures, maps, strict=True)):
        if orders := _orders(structure, its_maps, options):
            _check_permuted(f"parent {k}", structure, graph, orders, its_maps, few, options)
            thorough = thorough or not any(order.diagonal().all() for order in orders.values())
    if thorough:
        return
    k, smallest = min(enumerate(balanced.structures), key=lambda pair: sum(pair[1].sizes.values()))
    orders, shared = _shuffled(smallest), replace(options, streams="shared")
    _check_permuted(f"parent {k}", smallest, graph, orders, orders, few, shared)


def _check_permuted(
    called: str, structure: Structure, graph: fx.Graph, orders: Maps, maps: Maps, few: Tensor, options: FusionOptions
) -> None:
    """Compare a network with itself in another order: `orders` by space, and as the fusion has it in `maps`."""

    def permuted(output: Tensor, space: str) -> Tensor:
        return move(output, (None, Axis(space)), (None, orders.get(space)))

    before = _Checked(structure, graph)
    after = _Checked(structure, graph, lambda name, tensor: moved(structure, name, tensor, maps, options))
    error = _difference(permuted(before.logits(few), structure.output), logits := after.logits(few))
    if error <= TOLERANCE[logits.dtype]:
        return
    expected, got = before.outputs(few), after.outputs(few)
    pairs = ((layer, permuted(expected[layer], layer.space), got[layer]) for layer in structure.layers)
    raise FusionError(
        f"Expected {called} to be the same function with its neurons permuted, got logits that differ by {error:.1e} "
        f"(relative), first behind {_first(pairs, structure)}; it cannot be fused safely, report it"
    )


def _orders(structure: Structure, maps: Maps, options: FusionOptions) -> Maps:
    """The permutation of every space that maps are; none where they are anything else."""
    spaces = {layer.name: layer.space for layer in structure.layers}
    orders: Maps = {}
    for key, mapping in maps.items():
        order = orders.setdefault(key if options.streams == "shared" else spaces[key], mapping)
        rows = copied_rows(mapping)
        if not torch.equal(order, mapping) or rows is None or not len(rows) == len(mapping) == len(rows.unique()):
            return {}
    return orders


def _shuffled(structure: Structure) -> Maps:
    """A permutation of every free space; they are unlike, so that spaces that belong together show when they do not."""
    device, generator = next(structure.module.parameters()).device, torch.Generator().manual_seed(0)
    orders = {space: torch.randperm(structure.sizes[space], generator=generator) for space in structure.free_spaces}
    return {space: torch.eye(len(order), dtype=torch.float64)[order].to(device) for space, order in orders.items()}


def check_outputs(model: nn.Module, samples: Tensor) -> None:
    """Refuse a network that gives NaN or infinity for the first few samples.

    Args:
        model: the fused network, in eval mode.
        samples: inputs.
    """
    few = as_input(_few(samples), model)
    if all_finite(model(few)):
        return
    structure = trace(model, few)
    nodes = _nodes(structure.layers, structure.module.graph)
    outputs = dict(observe(structure.module, few, nodes.values()))
    layer = next((layer for layer in structure.layers if not all_finite(outputs[nodes[layer]])), None)
    raise FusionError(
        "Expected finite outputs of the fused network, got NaN or infinity, first behind "
        f"{_named(layer or structure.layers[-1])}; fuse in a wider dtype"
    )


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
