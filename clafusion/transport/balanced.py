"""Parents side by side, ready to be transported: which of them has which unit, and what stands for what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor, nn

from clafusion.tracing.execution import GraphRunner
from clafusion.tracing.spaces import Axis
from clafusion.tracing.structure import Layer, Structure, Unit
from clafusion.tracing.writers import writers_of

#: By neuron space of the template (or by layer) a map [neurons of a parent, neurons of the result].
Maps = dict[str, Tensor]


@dataclass(frozen=True)
class Correspondence:
    """One parent, seen from the template.

    Attributes:
        structure: of the parent.
        units: by unit of the template the parent's unit; a unit that the parent lacks is missing.
        nodes: by node of the template the parent's node with the same meaning.
        parameters: by parameter of the template the parent's.
        spaces: by neuron space of the template the parent's.
        identities: by unit of a chain that the parent lacks, the neuron space of the parent that it would pass on.
        merged: the parent shrunk to the template's depth, where layers were merged; the structure is of it.
    """

    structure: Structure
    units: Mapping[str, Unit] = field(repr=False)
    nodes: Mapping[str, str] = field(repr=False)
    parameters: Mapping[str, str] = field(repr=False)
    spaces: Mapping[str, str] = field(repr=False)
    identities: Mapping[str, str] = field(default_factory=dict, repr=False)
    merged: nn.Module | None = field(default=None, repr=False)

    def runner(self) -> GraphRunner:
        """The runner of the parent."""
        return GraphRunner(self.structure.capture)


@dataclass(frozen=True)
class Balanced:
    """Parents that correspond to one of them, the template.

    Attributes:
        parents: in the order they were given.
        owners: for every unit of the template, the parents that really have it (in the others it is an identity), and
            which share of it: 1, or less in an average of networks of which only some had it.
        anchor: index of the parent whose neurons the others are carried onto.
        template: index of the parent that owns every unit.
        layout: by parameter of the template the axes that it has in the result, whose spaces have the template's names.
    """

    parents: tuple[Correspondence, ...]
    owners: Mapping[str, Mapping[int, float]]
    anchor: int
    template: int
    layout: Mapping[str, tuple[Axis | None, ...]] = field(repr=False)

    @property
    def structure(self) -> Structure:
        """The structure of the template, whose names of nodes, parameters, layers and spaces are used for all."""
        return self.parents[self.template].structure

    @property
    def runners(self) -> list[GraphRunner]:
        """One per parent."""
        return [parent.runner() for parent in self.parents]

    def is_inside(self, space: str, unit: Unit) -> bool:
        """Whether neurons are only inside a residual unit, so that a parent without the unit has none of them."""
        if unit.kind != "residual":
            return False
        found = self.structure.neurons_at(unit.output)
        return found is None or space not in found[1].spaces

    def reference(self, space: str) -> int:
        """The parent whose neurons a space of the result has: the anchor, or where it has none the template."""
        return self.anchor if space in self.parents[self.anchor].spaces else self.template

    def holders(self, space: str) -> list[int]:
        """The parents that have neurons of a space, in an order that does not depend on that of the parents."""
        found = [k for k, parent in enumerate(self.parents) if space in parent.spaces]
        return sorted(found, key=lambda k: self.parents[k].structure.rank)

    def width(self, k: int, space: str) -> int:
        """The number of neurons that a parent has of a space."""
        parent = self.parents[k]
        return parent.structure.sizes[parent.spaces[space]]

    def layer_weights(self, layer: Layer, unit: Unit, weights: Sequence[float]) -> dict[int, float]:
        """The weight of each parent in what a layer should give, where residual streams are shared."""
        if unit.kind == "residual" and not self.joins_stream(layer, unit):
            return self.inner_weights(unit, weights)
        return dict(enumerate(weights))

    @staticmethod
    def joins_stream(layer: Layer, unit: Unit) -> bool:
        """Whether a layer is fitted to the stream behind its unit, which every parent has."""
        return layer.total is not None and layer.total in (unit.features, unit.output)

    def inner_weights(self, unit: Unit, weights: Sequence[float]) -> dict[int, float]:
        """The weight that each owner of a unit brings to what is inside it."""
        return {k: weights[k] * share for k, share in sorted(self.owners[unit.name].items())}

    def unit_shares(self, weights: Sequence[float]) -> dict[str, float]:
        """The share that an average of the parents has of each unit: the weight of those that really have it."""
        return {unit.name: sum(self.inner_weights(unit, weights).values()) for unit in self.structure.units}

    @cached_property
    def layer_of(self) -> Mapping[str, Layer]:
        """The layer that a weight or bias belongs to, by its name."""
        return {name: layer for layer in self.structure.layers for name in (layer.weight, layer.bias) if name}

    @cached_property
    def contracted(self) -> frozenset[str]:
        """The neurons in blocks that no layer reads: queries and keys, which are summed over in attention scores."""
        axes = [self.structure.read(layer) for layer in self.structure.layers]
        read = {space for axis in axes if axis is not None for space in axis.spaces}
        blocks = {space.parent for space in self.structure.spaces.spaces.values()}
        return frozenset(
            name for name, space in self.structure.spaces.spaces.items() if space.parent and name not in read | blocks
        )

    def writers(self, parameter: str, dim: int) -> tuple[str, ...]:
        """The layers whose own maps, averaged, would move the neurons along an axis of a parameter."""
        return self._writers.get((parameter, dim), ())

    @cached_property
    def _writers(self) -> Mapping[tuple[str, int], tuple[str, ...]]:
        return writers_of(self.structure)
