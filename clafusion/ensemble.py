"""The prediction ensemble: the baseline that a fused network is measured against."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.options import normalized


class Ensemble(nn.Module):
    """Several classifiers that answer as one.

    Args:
        models: classifiers returning logits [samples, classes]; kept as they are, not copied.
        weights: per model, at least 0 with a positive sum; None: equal.
        space: `probability`: logarithm of the weighted mean of the softmax; `logits`: weighted mean of the logits.

    Raises:
        FusionError: for no models, weights that do not fit, or another space.

    Example:
        >>> members = [nn.Linear(3, 2), nn.Linear(3, 2)]
        >>> Ensemble(members)(torch.zeros(5, 3)).exp().sum(1).allclose(torch.ones(5))
        True
    """

    def __init__(
        self, models: Sequence[nn.Module], weights: Sequence[float] | None = None, space: str = "probability"
    ) -> None:
        super().__init__()
        if space not in ("probability", "logits"):
            raise FusionError(f"Expected space probability or logits, got {space!r}")
        self.space = space
        self.models = nn.ModuleList(models)
        self.weights = normalized(weights, len(self.models))

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities, or mean logits, [samples, classes]."""
        outputs = torch.stack([model(x) for model in self.models])
        weights = torch.tensor(self.weights, dtype=outputs.dtype, device=outputs.device)[:, None, None]
        if self.space == "logits":
            return (weights * outputs).sum(0)
        return (weights.log() + outputs.log_softmax(-1)).logsumexp(0)
