"""Parents of equal depth, ready to be transported: which of them really has which unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from clafusion.tracing.execution import Bypass, GraphRunner
from clafusion.tracing.structure import Layer, Structure, Unit

Maps = dict[str, Tensor]


@dataclass(frozen=True)
class BalancedParent:
    """One parent at the template's depth.

    Attributes:
        network: with the parent's widths; it shares no tensor with what the user gave.
        structure: of the network.
        bypass: the nodes that need not be computed, since an inserted unit gives what it is given.
    """

    network: nn.Module
    structure: Structure
    bypass: Mapping[str, Bypass] = field(default_factory=dict)


@dataclass(frozen=True)
class Balanced:
    """Parents of equal depth and one graph, ready to be transported.

    Attributes:
        parents: in the order they were given; node, layer and space names are the same in all.
        owners: for every unit, the parents that really have it (in the others it is an inserted identity), and which
            share of it: 1, or less in an average of networks of which only some had it.
        anchor: index of the parent whose neurons the others are carried onto.
        template: index of the parent that owns every unit.
    """

    parents: tuple[BalancedParent, ...]
    owners: Mapping[str, Mapping[int, float]]
    anchor: int
    template: int

    @property
    def structures(self) -> tuple[Structure, ...]:
        """One per parent."""
        return tuple(parent.structure for parent in self.parents)

    @property
    def runners(self) -> list[GraphRunner]:
        """One per parent; what inserted units give is taken for granted."""
        return [GraphRunner(parent.structure.module, bypass=parent.bypass) for parent in self.parents]

    @property
    def structure(self) -> Structure:
        """The structure of the anchor, for all that does not depend on widths."""
        return self.structures[self.anchor]

    def owners_of(self, layer: Layer, unit: Unit, shared: bool) -> frozenset[int]:
        """The parents that have neurons of their own in the space that a layer writes.

        Only a residual unit that a parent lacks is left out, and only its inner neurons: a stream is everybody's, and
        the identity inserted into a plain chain passes real neurons on.
        """
        everybody = frozenset(range(len(self.parents)))
        return frozenset(self.owners[unit.name]) if shared and _is_inside(layer, unit) else everybody

    def target_weights(self, layer: Layer, unit: Unit, weights: Sequence[float]) -> dict[int, float]:
        """The weight of each owner in what a layer writes, where residual streams are shared."""
        return self.inner_weights(unit, weights) if _is_inside(layer, unit) else dict(enumerate(weights))

    def inner_weights(self, unit: Unit, weights: Sequence[float]) -> dict[int, float]:
        """The weight that each owner of a unit brings to what is inside it."""
        return {k: weights[k] * share for k, share in sorted(self.owners[unit.name].items())}

    def unit_shares(self, weights: Sequence[float]) -> dict[str, float]:
        """The share that an average of the parents has of each unit: the weight of those that really have it."""
        return {unit.name: sum(self.inner_weights(unit, weights).values()) for unit in self.structure.units}

    def reference(self, owners: frozenset[int]) -> int:
        """The parent whose neurons a space of the result has: the anchor, or where it has none the template."""
        return self.anchor if self.anchor in owners else self.template


def _is_inside(layer: Layer, unit: Unit) -> bool:
    """Whether a layer writes neurons that only its own residual unit has."""
    return unit.kind == "residual" and layer.space != unit.output.space
