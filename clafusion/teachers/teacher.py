"""What several classifiers say together: the target of a fused network's output layer, and the teacher to distil."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clafusion.teachers.gate import Gate

#: Classifiers that give the same answer to a smaller share of the samples than this know different things.
AGREEMENT = 0.75


@dataclass(frozen=True, eq=False)
class Teacher:
    r"""Several classifiers as one: :math:`p(x) = \sum_k g_k(x) \, \mathrm{softmax}(l_k(x))`.

    Attributes:
        weights: of every classifier, summing to one.
        gate: gives the shares :math:`g_k(x)` of each sample; None: the weights are the shares of all.
    """

    weights: tuple[float, ...]
    gate: Gate | None = None

    def shares(self, logits: Sequence[Tensor]) -> Tensor:
        """How much each classifier is trusted on every sample, [samples, classifiers]."""
        if self.gate is not None:
            return self.gate.shares(logits, self.weights)
        return logits[0].new_tensor(self.weights).expand(len(logits[0]), -1)

    def log_probabilities(self, logits: Sequence[Tensor]) -> Tensor:
        """The logarithm of the common answer, [samples, classes], from the logits of every classifier."""
        shares = self.shares(logits).to(logits[0].dtype)
        answers = torch.stack([one.log_softmax(-1) for one in logits], 1)
        return (shares.log()[:, :, None] + answers).logsumexp(1)


def agreement(logits: Sequence[Tensor]) -> float:
    """The share of samples for which all classifiers give the same class."""
    answers = torch.stack([one.argmax(1) for one in logits])
    return float((answers == answers[0]).all(0).double().mean())


def teacher_of(
    logits: Sequence[Tensor], weights: Sequence[float], kind: Literal["auto", "mean", "gated"], temperature: float
) -> Teacher:
    """The teacher that some classifiers make, judged by what they answer to unlabelled samples.

    Args:
        logits: of every classifier, [samples, classes].
        weights: of every classifier, summing to one.
        kind: `mean`: the weighted mean of the probabilities; `gated`: by a gate; `auto`: by a gate where they all agree
            on fewer than three of four samples.
        temperature: of the gate.
    """
    gated = kind == "gated" or (kind == "auto" and agreement(logits) < AGREEMENT)
    return Teacher(tuple(weights), Gate.learn(logits, temperature) if gated else None)
