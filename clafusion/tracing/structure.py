"""The structure of a network: its neurons, its layers, its units, and its stages.

Between two *cut points* (nodes after which a single tensor is alive) lies a *unit*: plain (one layer, or branches
side by side) or residual (it ends in an addition). A *stage* is a maximal run of units of one kind and one output
resolution without pooling or reshaping between them; the head (the unit that gives the logits) is a stage of its own.
No layer names and no architecture tables are involved: the same rules read an MLP, a ResNet, a vision transformer or a
network of the user's own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx

from clafusion.tracing.execution import GraphRunner
from clafusion.tracing.exporting import Capture
from clafusion.tracing.signatures import Signature
from clafusion.tracing.spaces import Axis, Spaces


@dataclass(frozen=True)
class Layer:
    """A Linear or a convolution: an operation with a weight.

    Attributes:
        name: the path of its module in the network.
        kind: `linear`, `conv`, `depthwise` or `grouped`.
        node: the graph node that runs it.
        input: the graph node that it reads.
        weight: the name of its weight; None where the weight is computed from parameters.
        bias: the name of its bias, or None.
        norm: the graph node of the BatchNorm directly behind it, which can be folded into it, or None.
        shortcut: whether it lies on the projection shortcut of a residual unit.
        total: the graph node of the sum that it ends in: nothing but moves of entries and a scale lie between.
        scale: the name of the parameter that its output is multiplied with before the sum, or None.
        pre: the graph node of its features before the activation (after its norm; where it ends in a sum and is no
            shortcut, of the sum).
        post: the node of its features after the activation; `pre` where none follows.
        activation: the operation between the two, or None.
    """

    name: str
    kind: str
    node: str
    input: str
    weight: str | None
    bias: str | None
    norm: str | None
    shortcut: bool
    total: str | None
    scale: str | None
    pre: str
    post: str
    activation: str | None

    @property
    def dim(self) -> int:
        """The dimension of its input and of its output along which neurons lie."""
        return -1 if self.kind == "linear" else 1


@dataclass(frozen=True)
class Unit:
    """A part between two cut points.

    Attributes:
        name: of its first layer; without a layer, of its first parameter.
        kind: `plain`, `residual`, or `other` for one without a layer.
        layers: its layers in forward order.
        beside: layers that compute something for it from parameters alone, such as a table of relative positions.
        parameters: the names of its parameters and running statistics, in the order of their use.
        nodes: the graph nodes that it runs, without those that give their input.
        signature: tells units that do the same at any width from others.
        input: the graph node that it reads, a cut point.
        output: the graph node of its result.
        closing: the parameters that, set to zero, make the branch of a residual unit zero; empty if there are none.
        features: the graph node by which units are compared: before the last activation.
        resolution: sizes of the output without samples and neurons.
        insertable: whether an identity can stand in its place.
    """

    name: str
    kind: str
    layers: tuple[Layer, ...]
    beside: tuple[Layer, ...]
    parameters: tuple[str, ...]
    nodes: tuple[str, ...]
    signature: Signature = field(repr=False)
    input: str
    output: str
    closing: tuple[str, ...]
    features: str
    resolution: tuple[int, ...]
    insertable: bool

    @property
    def branch(self) -> tuple[Layer, ...]:
        """The layers that are not on the shortcut."""
        return tuple(layer for layer in self.layers if not layer.shortcut)


@dataclass(frozen=True)
class Transition:
    """The operations between two units that have no neurons of their own: pooling, reshaping, a selection of tokens."""

    nodes: tuple[str, ...]
    signature: Signature


@dataclass(frozen=True)
class Structure:
    """The result of `trace`.

    Attributes:
        spaces: the neurons: which axis of which parameter indexes which of them.
        stages: the units, stage by stage, in forward order; the last stage is the head alone.
        transitions: for every unit, by name, the operations between the unit before it and it.
        capture: the captured graph, sharing the tensors of the network.
        logits: what the network gave for the first few examples.
    """

    spaces: Spaces = field(repr=False)
    stages: tuple[tuple[Unit, ...], ...]
    transitions: Mapping[str, Transition] = field(repr=False)
    capture: Capture = field(repr=False, compare=False)
    logits: Tensor = field(repr=False, compare=False)

    @property
    def units(self) -> tuple[Unit, ...]:
        """All units in forward order."""
        return tuple(unit for stage in self.stages for unit in stage)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """All layers in forward order."""
        return tuple(layer for unit in self.units for layer in unit.layers)

    @cached_property
    def rank(self) -> tuple[int, float]:
        """Its place among networks, by what they are and not by where they stand: parameters, and their sum."""
        tensors = [tensor.detach() for tensor in self.capture.tensors.values()]
        return sum(tensor.numel() for tensor in tensors), sum(float(tensor.double().sum()) for tensor in tensors)

    @cached_property
    def unit_of(self) -> Mapping[str, Unit]:
        """The unit of every layer, by the layer's name."""
        return {layer.name: unit for unit in self.units for layer in unit.layers}

    @cached_property
    def nodes(self) -> Mapping[str, fx.Node]:
        """The nodes of the graph by name, in order."""
        return {node.name: node for node in self.capture.graph.nodes}

    @property
    def axes(self) -> Mapping[str, tuple[Axis | None, ...]]:
        """For every parameter and running statistic, by name, one `Axis` per dimension (None: not of neurons)."""
        return self.spaces.axes

    @property
    def sizes(self) -> Mapping[str, int]:
        """The number of neurons of every space."""
        return {name: space.size for name, space in self.spaces.spaces.items()}

    @cached_property
    def output(self) -> str | None:
        """The space of the logits; permuted only where that is asked for."""
        axes = self.spaces.of_node(self.capture.logits)
        axis = axes[-1] if axes else None
        return axis.spaces[0] if axis is not None and axis.spaces else None

    @property
    def free_spaces(self) -> tuple[str, ...]:
        """The spaces whose neurons may be permuted without changing the function, in forward order."""
        return tuple(space for space in self.sizes if space != self.output)

    def run(self, batch: Tensor) -> Tensor:
        """The logits of the graph for a batch."""
        with torch.no_grad():
            logits: Tensor = dict(GraphRunner(self.capture).observe(batch, [self.capture.logits]))[self.capture.logits]
        return logits

    def written(self, layer: Layer) -> Axis | None:
        """The neurons that a layer writes, along the outputs of its weight."""
        return self._weight_axes(layer)[0]

    def read(self, layer: Layer) -> Axis | None:
        """The neurons that a layer reads, along the inputs of its weight (for groups: of all groups)."""
        return self._weight_axes(layer)[1]

    def _weight_axes(self, layer: Layer) -> tuple[Axis | None, ...]:
        if layer.weight is not None:
            return self.axes[layer.weight]
        return self.spaces.of_node(str(self.nodes[layer.node].args[1])) or (None, None)

    def neurons_at(self, node: str) -> tuple[int, Axis] | None:
        """The dimension of a node's output along which its neurons lie, and these; None where there is not just one."""
        axes = self.spaces.of_node(node) or ()
        found = [(dim, axis) for dim, axis in enumerate(axes) if axis is not None]
        return found[0] if len(found) == 1 else None
