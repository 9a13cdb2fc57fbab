"""Two disjoint parts of the training images, for two parents of which each has a skill that the other lacks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from clafusion.datamodules.arguments import check_classes, check_whole, from_mapping
from clafusion.datamodules.image_set import stratified_split
from clafusion.errors import FusionError

Kind = Literal["personal", "labels", "size"]
Part = Literal["A", "B"]
#: The attributes of each kind of split, besides the part and the seed.
_GIVEN: dict[str, tuple[str, ...]] = {"personal": ("label", "fraction"), "labels": ("labels",), "size": ("fraction",)}


@dataclass(frozen=True)
class Split:
    """One of two disjoint parts that together are all training images; validation and test images stay whole.

    - `personal`: A is all of the class `label` and `fraction` of every other class, B the rest (the skill transfer of
      OTFusion, Singh and Jaggi 2020).
    - `labels`: A is all of the classes `labels`, B the rest.
    - `size`: A is `fraction` of every class, B the rest.

    Fractions are to the nearest whole image of each class.

    Attributes:
        kind: `personal`, `labels` or `size`.
        part: The part to train on, A or B.
        label: The class of `personal`.
        labels: The classes of `labels`.
        fraction: Between 0 and 1; of `personal` and `size`.
        seed: Selects the images of `personal` and `size`.

    Raises:
        FusionError: An attribute is missing, is not one of the kind, is of the wrong type or out of range.

    Example:
        >>> Split("personal", label=4, fraction=0.1).indices(torch.tensor([4, 4, 1]))
        tensor([0, 1])
    """

    kind: Kind
    part: Part = "A"
    label: int | None = None
    labels: Sequence[int] | None = None
    fraction: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in (("kind", get_args(Kind)), ("part", get_args(Part))):
            if getattr(self, name) not in choices:
                raise FusionError(
                    f"Expected {name} of split to be one of {', '.join(choices)}, got {getattr(self, name)!r}"
                )
        for name in ("label", "labels", "fraction"):
            self._check_given(name)
        if self.label is not None:
            check_whole("label of split", self.label, 0)
        if self.labels is not None:
            object.__setattr__(self, "labels", check_classes("labels of split", self.labels))
        if self.fraction is not None and (type(self.fraction) not in (int, float) or not 0 < self.fraction < 1):
            raise FusionError(f"Expected fraction of split between 0 and 1, got {self.fraction!r}; change it")
        check_whole("seed of split", self.seed, 0)

    def _check_given(self, name: str) -> None:
        wanted, value = name in _GIVEN[self.kind], getattr(self, name)
        if wanted != (value is not None):
            article, actual = ("a", "none") if wanted else ("no", repr(value))
            raise FusionError(
                f"Expected {article} value of {name} for a split of kind {self.kind}, got {actual}; it is given "
                f"{' and '.join(_GIVEN[self.kind])}"
            )

    @property
    def classes(self) -> tuple[int, ...]:
        """The classes that it names."""
        return tuple(self.labels or ()) if self.label is None else (self.label,)

    def indices(self, labels: Tensor) -> Tensor:
        """Return the images that are in the part.

        Args:
            labels: Of all images, int64 `[N]`.

        Returns:
            Indices, int64 `[M]`, increasing; those of A and those of B are disjoint and together `range(N)`.
        """
        in_a = torch.isin(labels, torch.tensor(self.classes, dtype=labels.dtype))
        if self.fraction is not None:
            _, share = stratified_split(labels, self.fraction, self.seed)
            in_a[share] = True
        return (in_a if self.part == "A" else ~in_a).nonzero().flatten()

    def to_dict(self) -> dict[str, Any]:
        """Return the split as plain containers, from which `as_split` makes it again."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        return {name: value for name, value in values.items() if value is not None}


def as_split(value: Split | Mapping[str, Any] | None) -> Split | None:
    """Return the split of a dictionary of `Split.to_dict`; None and a split stay as they are.

    Raises:
        FusionError: The value is something else, or has a key that is no attribute of a split.
    """
    return from_mapping(Split, value, "split")
