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
        columns: per classifier, which of the classes of all it tells apart, [its classes]; the other columns of its
            logits are not read. None: all.
    """

    weights: tuple[float, ...]
    gate: Gate | None = None
    columns: tuple[Tensor, ...] | None = None

    def shares(self, logits: Sequence[Tensor]) -> Tensor:
        """The trust in each classifier on every sample, [samples, classifiers]."""
        if self.gate is not None:
            return self.gate.shares(own_columns(logits, self.columns), self.weights)
        return logits[0].new_tensor(self.weights).expand(len(logits[0]), -1)

    def log_probabilities(self, logits: Sequence[Tensor]) -> Tensor:
        """The logarithm of the common answer, [samples, classes], from the logits of every classifier."""
        # One of weight 0 keeps so little that a gradient is defined.
        shares = self.shares(logits).to(logits[0].dtype).clamp_min(torch.finfo(logits[0].dtype).tiny)
        answers = torch.stack(log_softmaxes(logits, self.columns), 1)
        return (shares.log()[:, :, None] + answers).logsumexp(1)


def own_columns(logits: Sequence[Tensor], columns: Sequence[Tensor] | None) -> list[Tensor]:
    """The logits of every classifier for the classes that it tells apart."""
    if columns is None:
        return list(logits)
    return [one[:, own.to(one.device)] for one, own in zip(logits, columns, strict=True)]


def log_softmaxes(logits: Sequence[Tensor], columns: Sequence[Tensor] | None) -> list[Tensor]:
    """The log-probabilities of every classifier, [samples, classes of all]: of what it does not know minus infinity."""
    answers = [one.log_softmax(-1) for one in own_columns(logits, columns)]
    if columns is None:
        return answers
    return [
        torch.full_like(one, -torch.inf).index_copy(1, own.to(one.device), answer)
        for one, own, answer in zip(logits, columns, answers, strict=True)
    ]


def agreement(logits: Sequence[Tensor], columns: Sequence[Tensor] | None = None) -> float:
    """The share of samples for which all classifiers give the same class."""
    answers = torch.stack([one.argmax(1) for one in log_softmaxes(logits, columns)])
    return float((answers == answers[0]).all(0).double().mean())


def teacher_of(
    logits: Sequence[Tensor],
    weights: Sequence[float],
    kind: Literal["auto", "mean", "gated"],
    temperature: float,
    columns: tuple[Tensor, ...] | None = None,
) -> Teacher:
    """The teacher that some classifiers make, judged by what they answer to unlabelled samples.

    Args:
        logits: of every classifier, [samples, classes].
        weights: of every classifier, summing to one.
        kind: `mean`: the weighted mean of the probabilities; `gated`: by a gate; `auto`: by a gate where they all agree
            on fewer than three of four samples.
        temperature: of the gate.
        columns: per classifier the classes that it tells apart; None: all.
    """
    gated = kind == "gated" or (kind == "auto" and agreement(logits, columns) < AGREEMENT)
    gate = Gate.learn(own_columns(logits, columns), temperature) if gated else None
    return Teacher(tuple(weights), gate, columns)
