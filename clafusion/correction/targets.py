"""The aim of a correction: the parents' features, carried onto the fused network's neurons."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clafusion.correction.steps import Step
from clafusion.options import FusionOptions
from clafusion.teachers.teacher import Teacher
from clafusion.tracing.parameters import axis_move
from clafusion.tracing.spaces import Axis
from clafusion.tracing.structure import Structure
from clafusion.transport.balanced import Balanced, Maps
from clafusion.transport.pooling import Pool


@dataclass(frozen=True)
class Targets:
    """The features that the fused network should have: the mean of its parents', or those of chosen neurons.

    Attributes:
        balanced: the parents.
        maps: per parent the maps of its neurons onto the fused network's, by space.
        weights: per parent, summing to one.
        options: `head` is read, and for `refit` `anchor_lead`: how many times its weight the anchor counts in hidden
            layers against one other parent; against several as much more for each, so that its share stays the same.
        teacher: what the parents say together, for the output layer; None: their weighted mean.
        pool: the neurons of the result, where they are chosen among those of all parents.
    """

    balanced: Balanced
    maps: Sequence[Maps]
    weights: Sequence[float]
    options: FusionOptions
    teacher: Teacher | None = None
    pool: Pool | None = None

    def is_head(self, step: Step) -> bool:
        """Whether a step gives the logits."""
        return step.node == self.balanced.structure.capture.logits

    def gives_logits(self, step: Step) -> bool:
        """Whether a step gives the logits, or what only moves such as pooling make the logits of."""
        axis = self.balanced.structure.written(step.last)
        return self.is_head(step) or (axis is not None and self.balanced.structure.output in axis.spaces)

    def is_fitted(self, step: Step) -> bool:
        """Whether a step is refit: hidden ones are not where they are to be the anchor's."""
        return not self.options.only_anchor or self.gives_logits(step)

    def shares(self, step: Step) -> dict[int, float]:
        """The share of each parent in the target of a step, summing to one; a parent that lacks it has none."""
        anchor = self.balanced.anchor
        if self.options.head == "anchor" and self.is_head(step):
            return {anchor: 1.0}
        if self._pooled(step):
            return {k: 1.0 for k, parent in enumerate(self.balanced.parents) if step.node in parent.nodes}
        layer = step.last
        owned = self.balanced.layer_weights(layer, step.unit, self.weights)
        owned = {k: weight for k, weight in owned.items() if step.node in self.balanced.parents[k].nodes}
        return self.led(owned, not self.gives_logits(step))

    def led(self, owned: dict[int, float], hidden: bool = True) -> dict[int, float]:
        """Weights of some parents as shares, with the lead of the anchor where something hidden is refit."""
        if hidden and self.options.correction == "refit" and self.pool is None:
            lead = 1 + (self.options.anchor_lead - 1) * (len(owned) - 1)
            owned = {k: weight * (lead if k == self.balanced.anchor else 1.0) for k, weight in owned.items()}
        total = sum(owned.values())
        return {k: weight / total if total else 1 / len(owned) for k, weight in owned.items()}

    def beside(self, k: int, step: Step, output: Tensor, result: Structure) -> Tensor:
        """A parent's output at a step with the neurons along its other dimensions carried onto the fused network's."""
        parent = self.balanced.parents[k]
        old, new = (
            one.spaces.of_node(name) for one, name in ((parent.structure, parent.nodes[step.node]), (result, step.node))
        )
        for dim, (ours, theirs) in enumerate(zip(new or (), old or (), strict=False)):
            move = axis_move(theirs, ours, self._maps(k), parent.spaces) if dim != step.dim % output.ndim else None
            output = output if move is None else move.apply(output, dim)
        return output

    def moved(self, k: int, step: Step, features: Tensor, result: Structure) -> Tensor:
        """Rows of a parent's features at a step carried onto the fused network's neurons, float64."""
        parent = self.balanced.parents[k]
        old = _axis(parent.structure, parent.nodes[step.node], step.dim)
        fixed_share = self.weights[k] if self._pooled(step) else 1.0
        move = axis_move(old, _axis(result, step.node, step.dim), self._maps(k), parent.spaces, fixed_share=fixed_share)
        return features.double() if move is None else move.apply(features.double(), 1)

    def _maps(self, k: int) -> Maps:
        return self.maps[k] if self.pool is None else {**self.maps[k], **self.pool.places[k]}

    def _pooled(self, step: Step) -> bool:
        """Whether the neurons of a step are chosen among those of all parents."""
        found = self.balanced.structure.neurons_at(step.node)
        if self.pool is None or found is None:
            return False
        return any(space in self.pool.sizes for space in found[1].spaces)


def _axis(structure: Structure, node: str, dim: int) -> Axis | None:
    axes = structure.spaces.of_node(node)
    return None if axes is None else axes[dim]
