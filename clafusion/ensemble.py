"""The prediction ensemble: the baseline that a fused network is measured against."""

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clafusion.alignment.parents import parents_of
from clafusion.errors import FusionError
from clafusion.options import normalized
from clafusion.statistics.samples import chunks
from clafusion.teachers.label_sets import Label, check_classes, columns_of, placed, union_of
from clafusion.teachers.teacher import Teacher, teacher_of
from clafusion.tracing.outputs import logits_in

Space = Literal["probability", "logits", "gated", "auto"]


class Ensemble(nn.Module):
    """Several classifiers that answer as one.

    Args:
        models: classifiers returning logits [samples, classes], as `fuse` takes them; kept as they are, not copied.
        weights: per model, at least 0 with a positive sum; None: equal.
        space: `probability`: logarithm of the weighted mean of the softmax; `logits`: weighted mean of the logits;
            `gated`: logarithm of a mean of the softmax whose weights are those of each sample (`Gate`), for models that
            know different things; `auto`: gated unless they agree on more than nine of ten samples, then probability.
        samples: for `gated` and `auto`: unlabelled samples, mixed as those that will be asked; the models run on them
            once.
        gate_temperature: of the gate.
        classes: per model the labels that its outputs stand for, if they are not the same; the outputs of the ensemble
            stand for the labels of all, sorted. Not for `logits`.

    Raises:
        FusionError: for no models, weights that do not fit, another space, samples without a gate or none for one, or
            labels that do not describe the outputs.

    Example:
        >>> members = [nn.Linear(3, 2), nn.Linear(3, 2)]
        >>> Ensemble(members)(torch.zeros(5, 3)).exp().sum(1).allclose(torch.ones(5))
        True
        >>> Ensemble(members, space="gated", samples=torch.randn(50, 3))(torch.zeros(5, 3)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        models: Iterable[nn.Module],
        weights: Sequence[float] | None = None,
        space: Space = "probability",
        samples: Tensor | None = None,
        gate_temperature: float = 1.0,
        classes: Sequence[Sequence[Label]] | None = None,
    ) -> None:
        super().__init__()
        if space not in get_args(Space):
            raise FusionError(f"Expected space probability, logits, gated or auto, got {space!r}")
        if (samples is not None) != (space in ("gated", "auto")):
            raise FusionError(f"Expected samples with space gated or auto, and with no other, got space {space}")
        if classes is not None and space == "logits":
            raise FusionError("Expected another space for models of different classes, got logits")
        self.space = space
        self.models = nn.ModuleList(parents_of(models, "Ensemble([a, b])"))
        self.weights = normalized(weights, len(self.models))
        self.columns, self.count = None, 0
        if classes is not None:
            if len(classes) != len(self.models):
                raise FusionError(f"Expected the classes of {len(self.models)} models, got those of {len(classes)}")
            check_classes(classes, [len(labels) for labels in classes])
            self.columns, self.count = columns_of(classes), len(union_of(classes))
        self.teacher = Teacher(tuple(self.weights), None, self.columns)
        if samples is not None:
            with torch.no_grad():
                parts = zip(*(self._outputs(chunk) for chunk in chunks(samples)), strict=True)
                outputs = [torch.cat(part) for part in parts]
                kind: Literal["auto", "gated"] = "auto" if space == "auto" else "gated"
                self.teacher = teacher_of(outputs, self.weights, kind, gate_temperature, self.columns)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities, or mean logits, [samples, classes]."""
        outputs = self._outputs(x)
        if self.space == "logits":
            return torch.stack([weight * one for weight, one in zip(self.weights, outputs, strict=True)]).sum(0)
        return self.teacher.log_probabilities(outputs)

    def _outputs(self, x: Tensor) -> list[Tensor]:
        """The logits of every model, in the columns of its classes among those of all."""
        outputs = [logits_in(model(x)) for model in self.models]
        if self.columns is None:
            return outputs
        return [placed(one, own, self.count) for one, own in zip(outputs, self.columns, strict=True)]
