"""Parents of equal depth, ready to be transported: which of them really has which unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from clafusion.tracing.structure import Layer, Structure, Unit

Maps = dict[str, Tensor]


@dataclass(frozen=True)
class Balanced:
    """Parents of equal depth and one graph, ready to be transported.

    Attributes:
        structures: one per parent; node, layer and space names are the same in all.
        owners: for every unit, the parents that really have it (in the others it is an inserted identity), and which
            share of it: 1, or less in an average of networks of which only some had it.
        anchor: index of the parent whose neurons the others are carried onto.
        template: index of the parent that owns every unit.
    """

    structures: tuple[Structure, ...]
    owners: Mapping[str, Mapping[int, float]]
    anchor: int
    template: int

    @property
    def structure(self) -> Structure:
        """The structure of the anchor, for all that does not depend on widths."""
        return self.structures[self.anchor]

    def owners_of(self, layer: Layer, unit: Unit, shared: bool) -> frozenset[int]:
        """The parents that have neurons of their own in the space that a layer writes.

        Only a residual unit that a parent lacks is left out, and only its inner neurons: a stream is everybody's, and
        the identity inserted into a plain chain passes real neurons on.
        """
        everybody = frozenset(range(len(self.structures)))
        return frozenset(self.owners[unit.name]) if shared and _is_inside(layer, unit) else everybody

    def target_weights(self, layer: Layer, unit: Unit, weights: Sequence[float]) -> dict[int, float]:
        """The weight of each owner in what a layer writes, where residual streams are shared."""
        return self.inner_weights(unit, weights) if _is_inside(layer, unit) else dict(enumerate(weights))

    def inner_weights(self, unit: Unit, weights: Sequence[float]) -> dict[int, float]:
        """The weight that each owner of a unit brings to what is inside it."""
        return {k: weights[k] * share for k, share in sorted(self.owners[unit.name].items())}

    def reference(self, owners: frozenset[int]) -> int:
        """The parent whose neurons a space of the result has: the anchor, or where it has none the template."""
        return self.anchor if self.anchor in owners else self.template


def _is_inside(layer: Layer, unit: Unit) -> bool:
    """Whether a layer writes neurons that only its own residual unit has."""
    return unit.kind == "residual" and layer.space != unit.output.space
