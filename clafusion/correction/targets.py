"""The aim of a correction: the weighted mean of the parents' features, carried onto the fused network's neurons."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clafusion.options import FusionOptions
from clafusion.tracing.structure import Layer, Unit
from clafusion.transport.balanced import Balanced, Maps


@dataclass(frozen=True)
class Targets:
    """The features that the fused network should have: the mean of its parents'.

    Attributes:
        balanced: the parents.
        maps: per parent the maps of its neurons onto the fused network's, by space.
        weights: per parent, summing to one.
        options: `head` is read, and for `refit` `anchor_lead`: how many times its weight the anchor counts in hidden
            layers against one other parent; against several as much more for each, so that its share stays the same.
    """

    balanced: Balanced
    maps: Sequence[Maps]
    weights: Sequence[float]
    options: FusionOptions

    def shares(self, layer: Layer, unit: Unit) -> dict[int, float]:
        """The share of each parent in the target of a layer, summing to one; a parent without the layer has none."""
        anchor, is_head = self.balanced.anchor, layer.space == self.balanced.structure.output
        if self.options.head == "anchor" and is_head:
            return {anchor: 1.0}
        owned = self.balanced.target_weights(layer, unit, self.weights)
        if not is_head and self.options.correction == "refit":
            lead = 1 + (self.options.anchor_lead - 1) * (len(owned) - 1)
            owned = {k: weight * (lead if k == anchor else 1.0) for k, weight in owned.items()}
        total = sum(owned.values())
        return {k: weight / total if total else 1 / len(owned) for k, weight in owned.items()}

    def moved(self, k: int, layer: Layer, features: Tensor) -> Tensor:
        """Rows of a parent's features carried onto the fused network's neurons, float64."""
        mapping = self.maps[k].get(layer.space)
        return features.double() if mapping is None else features.double() @ mapping
