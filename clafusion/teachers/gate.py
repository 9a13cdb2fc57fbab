"""Which of several classifiers to trust on a sample, judged without labels from what each of them answers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.statistics.regression import soft_label_regression

#: The least deviation of a logit over the samples that it is divided by.
SMALLEST_DEVIATION = 1e-6
#: Penalty of the gate's weights, in units of the mean square of its inputs.
RIDGE = 0.03


@dataclass(frozen=True, eq=False)
class Gate:
    r"""Shares of several classifiers in an answer, for every sample its own.

    A classifier is confidently wrong on what it has not learned: its probabilities do not tell. But its logits are then
    smaller than they are on the samples that it knows. With the logits :math:`l_k` of classifier k, standardised by
    their mean and deviation over unlabelled samples to :math:`z_k`, its score is :math:`s_k(x) = \max_c z_k(x)_c`. What
    the scores say of a sample alone is noisy, so that a linear model of the logits of *all* classifiers learns it from
    all samples, by the cross entropy with :math:`\mathrm{softmax}_k(s_k / T)`, and the shares are

    .. math:: g(x) = \mathrm{softmax}_k \left(\frac{s_k(x) + v_k \cdot z(x) + b_k}{T} + \log w_k\right)

    Attributes:
        means: of the logits of every classifier over the samples, [classes of it].
        deviations: likewise, [classes of it].
        weight: v, [classifiers, classes of all].
        bias: b, [classifiers].
        temperature: T; the smaller, the more often one classifier decides alone.
    """

    means: tuple[Tensor, ...]
    deviations: tuple[Tensor, ...]
    weight: Tensor
    bias: Tensor
    temperature: float = 1.0

    @classmethod
    def learn(cls, logits: Sequence[Tensor], temperature: float = 1.0) -> "Gate":
        """Learn a gate from what classifiers answer to the same unlabelled samples.

        Args:
            logits: of every classifier, [samples, classes of it].
            temperature: positive.

        Raises:
            FusionError: for fewer than two samples, or logits that are not finite.
        """
        if len(logits[0]) < 2:
            raise FusionError(f"Expected at least 2 samples to learn a gate from, got {len(logits[0])}")
        doubles = [one.double() for one in logits]
        if not all(one.isfinite().all() for one in doubles):
            raise FusionError("Expected finite logits to learn a gate from, got others")
        means = tuple(one.mean(0) for one in doubles)
        deviations = tuple(one.std(0).clamp_min(SMALLEST_DEVIATION) for one in doubles)
        nothing = doubles[0].new_zeros(len(doubles), sum(one.shape[1] for one in doubles) + 1)
        gate = cls(means, deviations, nothing[:, :-1], nothing[:, -1], temperature)
        standard, scores = gate._scores(doubles)
        design = torch.cat([standard, torch.ones_like(standard[:, :1])], 1)
        shares = (scores / temperature).softmax(1)
        found = soft_label_regression(design[:, None], shares[None], nothing[None], RIDGE, intercept=True)[0]
        return cls(means, deviations, found[:, :-1], found[:, -1], temperature)

    def to(self, device: torch.device) -> "Gate":
        """Return the gate with its tensors on a device."""
        means, deviations = (tuple(one.to(device) for one in many) for many in (self.means, self.deviations))
        return Gate(means, deviations, self.weight.to(device), self.bias.to(device), self.temperature)

    def shares(self, logits: Sequence[Tensor], weights: Sequence[float] | None = None) -> Tensor:
        """The share of every classifier in the answer for every sample, [samples, classifiers], float64.

        Args:
            logits: of every classifier, [samples, classes of it].
            weights: w, of every classifier; None: equal. One of weight 0 has no share.
        """
        standard, scores = self._scores([one.double() for one in logits])
        total = scores + standard @ self.weight.to(standard.device).T + self.bias.to(standard.device)
        total = total / self.temperature
        if weights is not None:
            total = total + torch.tensor(weights, dtype=total.dtype, device=total.device).log()
        return total.softmax(1)

    def _scores(self, logits: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The standardised logits side by side, [samples, classes of all], and the scores, [samples, classifiers]."""
        standard = [
            (one - mean.to(one.device)) / deviation.to(one.device)
            for one, mean, deviation in zip(logits, self.means, self.deviations, strict=True)
        ]
        return torch.cat(standard, 1), torch.stack([one.max(1).values for one in standard], 1)
