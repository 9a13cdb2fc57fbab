"""The structure of a network: which parameter axis indexes which neurons, and what its units and stages are.

A *neuron space* is a set of neurons that must be permuted together; a residual stream is one space per stage, because
every addition ties the spaces of its operands. Between two *cut points* (nodes after which a single tensor is alive)
lies a *unit*: plain (one weighted layer) or residual (it contains an addition). A *stage* is a maximal run of units of
one kind and one output resolution; the head (the unit that gives the logits) is a stage of its own. No layer names and
no architecture tables are involved: the same rule reads an MLP, a VGG, a ResNet or a network of the user's own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from torch import Tensor, fx, nn

from clafusion.errors import FusionError
from clafusion.tracing.capture import capture
from clafusion.tracing.execution import as_input
from clafusion.tracing.propagation import Propagation, Signal, propagate


@dataclass(frozen=True)
class Axis:
    """One axis of a parameter: the neurons of a space, each repeated `repeat` times (after a flatten).

    Attributes:
        space: the neuron space, shared by all that a residual stream ties together.
        repeat: how many consecutive entries belong to one neuron.
        layers: the layers whose own maps, averaged, move this axis when every layer has a map of its own.
    """

    space: str
    repeat: int = 1
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """A module with parameters.

    Attributes:
        name: its path in the network.
        kind: `linear`, `conv`, `depthwise` or `norm`.
        space: the neuron space that it writes (for `depthwise` and `norm`: that it keeps).
        shortcut: whether it lies on the projection shortcut of a residual unit.
        node: the graph node that runs it.
        pre: the graph node of its features before the activation (after its norm; for the last layer of a residual
            branch: after the addition).
        post: the node of its features after the activation; `pre` where none follows.
        activation: the name of the activation between the two, or None.
    """

    name: str
    kind: str
    space: str
    shortcut: bool
    node: str
    pre: str
    post: str
    activation: str | None

    @property
    def weighted(self) -> bool:
        """Whether it is a Linear or a convolution (not a norm)."""
        return self.kind != "norm"


@dataclass(frozen=True)
class Unit:
    """A part between two cut points: one weighted layer with its norm, or one residual block.

    Attributes:
        name: the name of its first weighted layer.
        kind: `plain` or `residual`.
        layers: its layers, the branch before the shortcut, each in forward order.
        input: the graph node that it reads, a cut point.
        closing: the layer that writes the output of the residual branch; of a plain unit its last layer.
        resolution: spatial size of the output, () after a flatten.
        insertable: whether an identity can stand in its place: it keeps the resolution, needs no projection, and does
            not read the network's input.
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    input: str
    closing: str
    resolution: tuple[int, ...]
    insertable: bool

    @property
    def branch(self) -> tuple[Layer, ...]:
        """The weighted layers that are not on the shortcut."""
        return tuple(layer for layer in self.layers if layer.weighted and not layer.shortcut)

    @property
    def output(self) -> Layer:
        """The layer whose `pre` and `post` are the features of the unit as a whole."""
        return self.branch[-1]


@dataclass(frozen=True)
class Structure:
    """The result of `trace`.

    Attributes:
        axes: for every parameter and buffer, by name, one `Axis` per dimension (None: not indexed by neurons).
        sizes: the number of neurons of every space.
        input: the space of the network's input; never permuted.
        output: the space of the logits; permuted only where that is asked for.
        stages: the units, stage by stage, in forward order; the last stage is the head alone.
        module: the captured graph, sharing the tensors of the network.
        logits: what the network gave for the example.
    """

    axes: Mapping[str, tuple[Axis | None, ...]]
    sizes: Mapping[str, int]
    input: str
    output: str
    stages: tuple[tuple[Unit, ...], ...]
    module: fx.GraphModule = field(repr=False, compare=False)
    logits: Tensor = field(repr=False, compare=False)

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units in forward order."""
        return tuple(unit for stage in self.stages for unit in stage)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in forward order (a residual branch before its shortcut)."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def free_spaces(self) -> tuple[str, ...]:
        """The spaces whose neurons may be permuted without changing the function, in forward order."""
        return tuple(space for space in self.sizes if space not in (self.input, self.output))


def trace(model: nn.Module, example: Tensor) -> Structure:
    """Read the neuron spaces, units and stages of a network off its `torch.fx` graph.

    Args:
        model: a classifier whose forward takes one tensor and returns logits [samples, classes].
        example: a batch that it accepts, [samples, ...].

    Raises:
        FusionError: if torch.fx cannot trace the network, or for the first operation or parameter that is not
            understood, by name.

    Example:
        >>> import torch
        >>> from clafusion.networks import MLP
        >>> structure = trace(MLP(4, [3, 2], num_classes=2), torch.zeros(1, 4))
        >>> [[unit.name for unit in stage] for stage in structure.stages]
        [['fc1', 'fc2'], ['fc3']]
        >>> structure.free_spaces
        ('fc1', 'fc2')
    """
    module, logits = capture(model, example)
    found = propagate(module)
    axes = {name: tuple(_axis(signal, found) for signal in signals) for name, signals in found.axes.items()}
    sizes: dict[str, int] = {}
    for name, size in found.sizes.items():
        sizes.setdefault(found.root(name), size)
    output = found.root(found.output.space)
    units = [_unit(draft, found) for draft in found.units]
    return Structure(axes, sizes, found.root("input"), output, _stages(units, output), module, logits)


def _axis(signal: Signal | None, found: Propagation) -> Axis | None:
    return None if signal is None else Axis(found.root(signal.space), signal.repeat, signal.layers)


def _unit(draft: Sequence[str], found: Propagation) -> Unit:
    """Freeze one unit: `draft` holds the names of its layers."""
    residual = found.closing.get(draft[0])
    ordered = tuple(sorted((_layer(name, found) for name in draft), key=lambda layer: layer.shortcut))
    first = next(layer for layer in ordered if layer.weighted)
    last = [layer for layer in ordered if layer.weighted and not layer.shortcut][-1]
    return Unit(
        name=first.name,
        kind="plain" if residual is None else "residual",
        layers=ordered,
        input=found.inputs[draft[0]],
        closing=ordered[-1].name if residual is None else residual,
        resolution=found.observation_nodes(last.name, False)[0].meta["shape"][2:],
        insertable=draft[0] in found.insertable,
    )


def _layer(name: str, found: Propagation) -> Layer:
    shortcut = name in found.shortcuts
    pre, post, activation = found.observation_nodes(name, shortcut)
    space, node = found.root(found.spaces[name]), found.nodes[name]
    return Layer(name, found.kinds[name], space, shortcut, node.name, pre.name, post.name, activation)


def _stages(units: Sequence[Unit], output: str) -> tuple[tuple[Unit, ...], ...]:
    def key(unit: Unit) -> tuple[object, ...]:
        return unit.kind, unit.resolution, unit.output.space == output

    return tuple(tuple(stage) for _, stage in groupby(units, key))


def check_same_stages(a: Structure, b: Structure, names: tuple[str, str] = ("the first network", "the second")) -> None:
    """Refuse two structures whose stages cannot be matched one to one."""
    kinds = [[stage[0].kind for stage in structure.stages] for structure in (a, b)]
    if kinds[0] != kinds[1]:
        raise FusionError(
            f"Expected networks with the same stages, got {len(kinds[0])} ({', '.join(kinds[0])}) in {names[0]} and "
            f"{len(kinds[1])} ({', '.join(kinds[1])}) in {names[1]}"
        )


def structure_of(model: nn.Module, samples: Tensor) -> Structure:
    """`trace`, on as few of the samples as it takes: one.

    Args:
        model: what `trace` accepts.
        samples: of any device and floating dtype.
    """
    return trace(model, as_input(samples[:1], model))
