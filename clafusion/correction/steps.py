"""The order of a correction: which layers are fitted together, and to the outputs of which node."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.correction.affine import FoldedLayer, folded_layer
from clafusion.tracing.execution import Cursor
from clafusion.tracing.exporting import operation_of
from clafusion.tracing.signatures import TRANSPARENT
from clafusion.tracing.structure import Layer, Structure, Unit


@dataclass(frozen=True)
class Step:
    """Layers whose outputs are added up, fitted together; mostly one.

    Attributes:
        unit: that they are in.
        layers: in forward order.
        node: the graph node whose output is fitted: of the sum, or of the layer behind its norm.
        dim: the dimension of that output along which neurons lie.
        joined: whether the node is a sum.
    """

    unit: Unit
    layers: tuple[Layer, ...]
    node: str
    dim: int
    joined: bool

    @property
    def last(self) -> Layer:
        """The layer of the branch."""
        return next((layer for layer in self.layers if not layer.shortcut), self.layers[0])

    def parts(self, structure: Structure) -> list[FoldedLayer]:
        """The layers, the one of the branch first, to be read and written."""
        ordered = sorted(self.layers, key=lambda layer: layer.shortcut)
        return [folded_layer(structure, layer, with_scale=self.joined) for layer in ordered]


def alone(unit: Unit, layer: Layer) -> Step:
    """A layer by itself, at its own output."""
    return Step(unit, (layer,), layer.norm or layer.node, layer.dim, False)


def steps_of(structure: Structure) -> list[Step]:
    """The steps in an order in which each depends on earlier ones only: that of the last layers of each."""
    groups: dict[tuple[str, str], list[tuple[Layer, Unit]]] = {}
    for unit in structure.units:
        for layer in unit.layers:
            if layer.weight is not None:
                key = ("sum", layer.total) if _joins(structure, layer) else ("own", layer.node)
                groups.setdefault((key[0], str(key[1])), []).append((layer, unit))
    steps = []
    for (kind, node), members in groups.items():
        layers, unit = tuple(layer for layer, _ in members), members[0][1]
        if kind == "sum":
            found = structure.neurons_at(node)
            assert found is not None
            steps.append(Step(unit, layers, node, found[0], True))
        else:
            steps.append(alone(unit, layers[0]))
    order = {name: place for place, name in enumerate(structure.nodes)}
    return sorted(steps, key=lambda step: max(order[layer.node] for layer in step.layers))


def _joins(structure: Structure, layer: Layer) -> bool:
    """Whether a layer can be fitted to the sum that it ends in."""
    found, written = structure.neurons_at(layer.total) if layer.total is not None else None, structure.written(layer)
    # Behind a transposition the sum may be over other neurons than those that the layer writes.
    if found is None or written is None or found[1].spaces != written.spaces or len(found[1].of) != len(written.of):
        return False
    tensors = structure.capture.tensors
    return layer.scale is None or tensors[layer.scale].numel() in (1, len(tensors[str(layer.weight)]))


def earliest(steps: Sequence[Step], order: Mapping[str, int]) -> str:
    """The first node of the layers of some steps, by the place of every node in the graph."""
    return min((layer.node for step in steps for layer in step.layers), key=order.__getitem__)


def row_places(cursor: Cursor, part: FoldedLayer, step: Step) -> list[Tensor | None] | None:
    """For every chunk the row of a layer's output that each row of the fitted node comes from.

    Args:
        cursor: the network, halted before the layer.
        part: the layer.
        step: that it is in.

    Returns:
        Per chunk places [rows of the node], or None where both have the same rows; None altogether if entries are moved
        along the neurons as well.
    """
    if not step.joined or not _moves(cursor, part, step):
        return [None] * len(cursor.states)
    result: list[Tensor | None] = []
    for state, outputs in zip(cursor.states, cursor.look_ahead([part.output]), strict=True):
        shape = outputs[part.output].shape
        entries = torch.arange(outputs[part.output].numel(), dtype=torch.float64, device=outputs[part.output].device)
        before = _path(cursor, part)[-1]
        runner = cursor.runner.with_ones(part.layer.scale)
        moved = dict(runner.resume({**state, part.output: entries.reshape(shape)}, [before]))[before]
        rows = moved.movedim(step.dim, -1).flatten(0, -2).round().long()
        neurons = rows.shape[1]
        if part.dim == -1:
            places, channels = rows // neurons, rows % neurons
        else:
            positions = int(torch.tensor(shape[2:]).prod())
            places = rows // (neurons * positions) * positions + rows % positions
            channels = rows // positions % neurons
        expected = torch.arange(neurons, device=rows.device)
        if not (channels == expected).all() or not (places == places[:, :1]).all():
            return None
        result.append(places[:, 0])
    return result


def _path(cursor: Cursor, part: FoldedLayer) -> list[str]:
    """The output of a layer and the nodes between it and the sum that it ends in."""
    nodes, names = cursor.runner.nodes, [part.output]
    while True:
        user = next(iter(nodes[names[-1]].users))
        if operation_of(user) == "add":
            return names
        names.append(user.name)


def _moves(cursor: Cursor, part: FoldedLayer, step: Step) -> bool:
    """Whether anything but a scale or nothing lies between a layer and its sum, or neurons lie elsewhere there."""
    nodes = cursor.runner.nodes
    between = [operation_of(nodes[name]) for name in _path(cursor, part)[1:]]
    shape = nodes[part.output].meta["shape"]
    same = part.dim % len(shape) == step.dim % len(nodes[step.node].meta["shape"])
    return not same or any(name not in TRANSPARENT | {"mul"} for name in between)
