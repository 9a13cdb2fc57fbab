"""What several classifiers say together: the target of a fused network's output layer, and the teacher to distil."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clafusion.teachers.gate import Gate

#: Classifiers that give the same answer to a larger share of the samples than this know the same.
ALIKE = 0.9
#: The least disagreement that a gate's temperature is divided by: beyond it all shares are equal anyway.
LEAST_DISAGREEMENT = 1e-3


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

    @property
    def kind(self) -> Literal["mean", "gated"]:
        """Whether every sample has the same shares, or its own."""
        return "mean" if self.gate is None else "gated"

    def shares(self, logits: Sequence[Tensor]) -> Tensor:
        """The trust in each classifier on every sample, [samples, classifiers]."""
        if self.gate is not None:
            return self.gate.shares(own_columns(logits, self.columns), self.weights)
        return logits[0].new_tensor(self.weights).expand(len(logits[0]), -1)

    def log_probabilities(self, logits: Sequence[Tensor]) -> Tensor:
        """The logarithm of the common answer, [samples, classes], from the logits of every classifier."""
        heard = [k for k, weight in enumerate(self.weights) if weight > 0]
        # The logarithm of a share that has underflowed would have no gradient.
        shares = self.shares(logits)[:, heard].to(logits[0].dtype).clamp_min(torch.finfo(logits[0].dtype).tiny)
        answers = torch.stack(log_softmaxes(logits, self.columns), 1)[:, heard]
        return (shares.log()[:, :, None] + answers).logsumexp(1)

    def to(self, device: torch.device) -> "Teacher":
        """Return the teacher with its tensors on a device."""
        columns = None if self.columns is None else tuple(one.to(device) for one in self.columns)
        return Teacher(self.weights, None if self.gate is None else self.gate.to(device), columns)


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
    r"""The teacher that some classifiers make, judged by what they answer to unlabelled samples.

    Classifiers that often agree know much of the same, and what a gate would tell apart is then mostly noise, while
    their mean has less of it than each of them. So the gate is the softer, the larger the agreement a: it is learnt at
    the temperature :math:`T / (1 - a^2)`.

    Args:
        logits: of every classifier, [samples, classes].
        weights: of every classifier, summing to one.
        kind: `mean`: the weighted mean of the probabilities; `gated`: by a gate; `auto`: by a gate unless they all
            agree on more than nine of ten samples.
        temperature: T, of the gate of classifiers that never agree.
        columns: per classifier the classes that it tells apart; None: all.
    """
    agreed = agreement(logits, columns)
    if kind == "mean" or (kind == "auto" and agreed > ALIKE):
        return Teacher(tuple(weights), None, columns)
    softened = temperature / max(LEAST_DISAGREEMENT, 1 - agreed**2)
    return Teacher(tuple(weights), Gate.learn(own_columns(logits, columns), softened), columns)
