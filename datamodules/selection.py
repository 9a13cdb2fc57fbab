"""Which images become the training, the validation and the test part, and what is left out or changed."""

from dataclasses import dataclass

import torch
from torch import Tensor

from clafusion.datamodules.arguments import check_whole
from clafusion.datamodules.domain import Domain
from clafusion.datamodules.image_set import LabelledImages, seeded, stratified_split
from clafusion.datamodules.split import Split
from clafusion.errors import FusionError


@dataclass(frozen=True)
class Selection:
    """What becomes of the images that a data module reads.

    Attributes: the arguments of `ImageDataModule` that have these names.

    Raises:
        FusionError: An attribute is of the wrong type or out of range.
    """

    val_fraction: float
    split_seed: int
    limit_train: int | None
    skip_train: int | None
    split: Split | None
    label_set: tuple[int, ...] | None
    domain: Domain | None

    def __post_init__(self) -> None:
        check_whole("split_seed", self.split_seed, 0)
        if type(self.val_fraction) not in (int, float) or not 0 <= self.val_fraction < 1:
            raise FusionError(f"Expected val_fraction in [0, 1), got {self.val_fraction!r}; 0.1 holds out a tenth")
        for name, count, least in (("limit_train", self.limit_train, 1), ("skip_train", self.skip_train, 0)):
            if count is not None:
                check_whole(name, count, least)

    def classes(self, num_classes: int) -> int:
        """Return the number of classes that are left.

        Args:
            num_classes: Of the data.

        Raises:
            FusionError: A class of `label_set`, or one of `split` among those that are left, is not there.
        """
        left = len(self.label_set or range(num_classes))
        named = self.split.classes if self.split else ()
        for name, labels, count in (("label_set", self.label_set or (), num_classes), ("labels of split", named, left)):
            unknown = [label for label in labels if label >= count]
            if unknown:
                raise FusionError(f"Expected {name} in 0..{count - 1}, got {unknown[0]}; choose classes of this data")
        return left

    def check_shape(self, shape: tuple[int, int, int]) -> None:
        """Refuse images C, H, W that the domain would give another shape."""
        if self.domain is not None:
            self.domain.check_shape(shape)

    def parts(
        self, whole: LabelledImages, test: LabelledImages, validation: LabelledImages | None
    ) -> dict[str, LabelledImages]:
        """Return the parts `train`, `val` and `test`.

        Args:
            whole: Training images.
            test: Test images.
            validation: Validation images; None: a share of the training images.

        Raises:
            FusionError: The training part would be empty, or the validation part against `val_fraction`.
        """
        fraction = self.val_fraction if validation is None else 0.0
        rest, held_out = stratified_split(whole.labels, fraction, self.split_seed)
        if self.label_set is not None:
            whole, test = whole.relabelled(self.label_set), test.relabelled(self.label_set).labelled()
            validation = validation and validation.relabelled(self.label_set).labelled()
            rest, held_out = (indices[whole.labels[indices] >= 0] for indices in (rest, held_out))
        if len(rest) == 0 or (len(held_out) == 0 and fraction > 0):
            raise FusionError(
                f"Expected training and validation images, got {len(rest)} and {len(held_out)} with "
                f"val_fraction {fraction} of {len(whole)}; change val_fraction"
            )
        train = self._own_part(whole.labels, self._limited(rest))
        if validation is None:
            validation = whole.subset(held_out)
        parts = {"train": whole.subset(train), "val": validation, "test": test}
        domain = self.domain
        return parts if domain is None else {name: domain.change(part, name) for name, part in parts.items()}

    def _limited(self, indices: Tensor) -> Tensor:
        """Return the training indices that `skip_train` and `limit_train` keep."""
        if self.limit_train is None and self.skip_train is None:
            return indices
        first = self.skip_train or 0
        count = max(1, len(indices) - first) if self.limit_train is None else self.limit_train
        if first + count > len(indices):
            skipped = f" after skip_train {first}" if first else ""
            raise FusionError(
                f"Expected limit_train of at most the {len(indices)} training images, got {count}{skipped}; "
                "lower limit_train, skip_train or val_fraction"
            )
        order = torch.randperm(len(indices), generator=seeded("limit", self.split_seed))
        return indices[order[first : first + count]]

    def _own_part(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Return those training indices that are in the part of `split`."""
        if self.split is None:
            return indices
        part = indices[self.split.indices(labels[indices])]
        if len(part) == 0:
            raise FusionError(
                f"Expected training images in part {self.split.part} of the split, got none of {len(indices)}; "
                "change split"
            )
        return part
