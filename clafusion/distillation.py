"""Distillation: a student learns from the labels and from what a teacher says about every class."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from clafusion.errors import FusionError

Reduction = Literal["batchmean", "mean"]


def distillation_loss(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    reduction: Reduction = "batchmean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Cross entropy mixed with the divergence of the softened student from the softened teacher.

    `alpha T^2 KL(softmax(teacher / T) || softmax(student / T)) + (1 - alpha) CE(student, labels)` (Hinton, Vinyals and
    Dean 2015, arXiv 1503.02531); `T^2` keeps the gradient of the first term independent of the temperature T, to first
    order.

    Args:
        student: logits `[N, classes]`.
        teacher: logits, or log-probabilities, `[N, classes]`; detach them unless the teacher learns as well.
        labels: classes `[N]`; not read with alpha 1.
        temperature: T, above 0.
        alpha: share of the teacher, in `[0, 1]`.
        reduction: how the divergence is averaged: `batchmean` over samples, as its definition says; `mean` over samples
            and classes, as in the published runs: smaller by the number of classes.
        label_smoothing: share of the labels that is spread over all classes in the cross entropy, in `[0, 1]`.

    Returns:
        A scalar.

    Raises:
        FusionError: temperature, alpha or reduction is out of its domain, or the shapes do not fit together.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[2.0, 0.0]])
        >>> distillation_loss(logits, logits, torch.tensor([0]), temperature=4.0, alpha=1.0).item()
        0.0
    """
    check_distillation(temperature, alpha, reduction)
    if not 0 <= label_smoothing <= 1:
        raise FusionError(f"Expected label_smoothing in [0, 1], got {label_smoothing}; change label_smoothing")
    if student.ndim != 2 or student.shape != teacher.shape or labels.shape != student.shape[:1]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in (student, teacher, labels))
        raise FusionError(
            f"Expected logits [N, classes] of student and teacher and labels [N], got {shapes}; "
            "choose a teacher with the student's classes"
        )
    soft_student, soft_teacher = (logits.div(temperature).log_softmax(1) for logits in (student, teacher))
    # A class that the teacher excludes has the logarithm minus infinity, and no part in the divergence.
    soft_teacher = soft_teacher.clamp_min(torch.finfo(soft_teacher.dtype).min)
    divergence = kl_div(soft_student, soft_teacher, reduction="batchmean", log_target=True)
    if reduction == "mean":
        # Not left to PyTorch, whose "mean" is going to change its meaning.
        divergence = divergence / student.shape[1]
    taught = alpha * temperature**2 * divergence
    return (
        taught if alpha == 1 else taught + (1 - alpha) * cross_entropy(student, labels, label_smoothing=label_smoothing)
    )


def check_distillation(temperature: float, alpha: float, reduction: str) -> None:
    """Refuse settings of `distillation_loss` outside their domain.

    Raises:
        FusionError: See `distillation_loss`.
    """
    # Written so that NaN is refused as well.
    if not 0 < temperature < float("inf"):
        raise FusionError(f"Expected temperature to be a finite number above 0, got {temperature}; change temperature")
    if not 0 <= alpha <= 1:
        raise FusionError(f"Expected alpha in [0, 1], got {alpha}; change alpha")
    if reduction not in get_args(Reduction):
        raise FusionError(f"Expected reduction {' or '.join(get_args(Reduction))}, got {reduction!r}; change reduction")
