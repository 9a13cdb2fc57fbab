"""Parents that tell different classes apart: the labels of all, and where each parent's are among them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.naming import parent_name

#: What an output stands for.
Label = int | str


def union_of(classes: Sequence[Sequence[Label]]) -> tuple[Label, ...]:
    """The labels of all parents, sorted."""
    return tuple(sorted({label for one in classes for label in one}))


def check_classes(classes: Sequence[Sequence[Label]], outputs: Sequence[int]) -> None:
    """Refuse labels that do not describe the outputs of the parents.

    Args:
        classes: per parent the labels that its outputs stand for.
        outputs: per parent their number.

    Raises:
        FusionError: if a parent has no labels, another number of them, one twice, or whole numbers beside words.
    """
    if len(classes) != len(outputs):
        raise FusionError(f"Expected the classes of {len(outputs)} parents, got those of {len(classes)}")
    for k, (labels, count) in enumerate(zip(classes, outputs, strict=True)):
        if isinstance(labels, str) or len(labels) != count:
            raise FusionError(f"Expected {count} classes for the outputs of {parent_name(k)}, got {labels!r}")
        twice = next((label for at, label in enumerate(labels) if label in labels[:at]), None)
        if twice is not None:
            raise FusionError(f"Expected the classes of {parent_name(k)} to be different, got {twice!r} twice")
    kinds = {type(label) for labels in classes for label in labels}
    if kinds not in ({int}, {str}):
        names = ", ".join(sorted(kind.__name__ for kind in kinds))
        raise FusionError(f"Expected classes that are all whole numbers or all words, got {names}")


def columns_of(classes: Sequence[Sequence[Label]]) -> tuple[Tensor, ...]:
    """Per parent the places of its classes among those of all."""
    together = union_of(classes)
    return tuple(torch.tensor([together.index(label) for label in labels]) for labels in classes)


def placed(logits: Tensor, columns: Tensor, count: int) -> Tensor:
    """The logits of a classifier in the columns of its classes, [samples, classes of all]; the others are zero."""
    return logits.new_zeros(len(logits), count).index_copy(1, columns.to(logits.device), logits)
