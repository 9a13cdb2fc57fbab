"""Warnings about parents that add nothing, judged without labels from what they answer."""

import math
import warnings
from collections.abc import Sequence

from torch import Tensor

from clafusion.naming import parent_name
from clafusion.teachers.teacher import ALIKE, Teacher, agreement, own_columns

#: A parent that is trusted on a smaller share of the samples was asked about hardly anything that it knows.
TRUSTED = 0.05
#: A parent whose answers say less about the sample, as a share of what they could, answers by chance. Untrained
#: networks of three families say 0.0003 of the digits at most, ones that are right about half of them 0.0017 at least.
INFORMATION = 0.001


def warn_of_doubts(teacher: Teacher, logits: Sequence[Tensor], trust: Sequence[float]) -> None:
    """Warn of parents that answer by chance, and of those that a gate hardly ever trusts.

    A parent of weight 0 is no concern.

    Args:
        teacher: what all parents say together.
        logits: of every parent, [samples, classes].
        trust: per parent its mean share in what the teacher says.

    Warns:
        UserWarning: for each of them.
    """
    heard = [k for k, weight in enumerate(teacher.weights) if weight > 0]
    by_chance = []
    if agreement(logits, teacher.columns) < ALIKE:
        own = own_columns(logits, teacher.columns)
        by_chance = [k for k in heard if own[k].shape[1] > 1 and information(own[k]) < INFORMATION]
    # If all do, nothing speaks for one or the other.
    for k in by_chance if len(by_chance) < len(heard) else ():
        warnings.warn(
            f"Expected trained parents, got {parent_name(k)}, whose answers do not depend on the sample; give it "
            "weight 0 or leave it out", UserWarning, stacklevel=2,
        )  # fmt: skip
    if teacher.gate is None:
        return
    shares = ", ".join(f"{parent_name(k)}: {share:.1%}" for k, share in enumerate(trust))
    for k in heard:
        if trust[k] < TRUSTED and k not in by_chance:
            warnings.warn(
                f"Expected samples of what every parent knows, but {parent_name(k)} is trusted on only {trust[k]:.1%} "
                f"of the samples ({shares}); the samples seem to come from what the other parents know: pass samples "
                f"of all, or leave {parent_name(k)} out", UserWarning, stacklevel=2,
            )  # fmt: skip


def information(logits: Tensor) -> float:
    r"""The information of a classifier's answers about the sample, as a share of the most that there could be.

    .. math:: \frac{H(\mathrm{mean}_x\, p(x)) - \mathrm{mean}_x\, H(p(x))}{\log C}, \quad p(x) = \mathrm{softmax}(l(x))

    This is the mutual information of sample and answer: 0 where every sample gets the same answer, unsure or not; 1
    where all C classes are given equally often and without doubt. What the right answers are does not matter.

    Args:
        logits: l, [samples, classes]; at least two classes.

    Example:
        >>> import torch
        >>> [round(information(logits), 6) for logits in (torch.zeros(6, 3), 100 * torch.eye(3))]
        [0.0, 1.0]
    """
    answers = logits.double().softmax(1)
    together = answers.mean(0)
    entropies = -(answers * answers.clamp_min(1e-300).log()).sum(1)
    spread = -(together * together.clamp_min(1e-300).log()).sum()
    return max(float(spread - entropies.mean()), 0.0) / math.log(logits.shape[1])
