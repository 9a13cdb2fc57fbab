"""Labelled images, and seeded choices among them, each a pure function of its key."""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clafusion.datamodules.transforms import beside
from clafusion.errors import FusionError

#: Makes uint8 `[B, C, H, W]` of the same, each image by itself.
Change = Callable[[Tensor], Tensor]


def derived_seed(*key: int | str) -> int:
    """Return a seed in `[0, 2^64)` that depends on the key alone.

    The key is hashed, so that neighbouring keys such as `(seed, epoch)` and `(seed + 1, epoch - 1)` share nothing; sums
    of seeds would be the same for both.

    Args:
        key: The purpose of the randomness, and the numbers that select it.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def seeded(*key: int | str) -> torch.Generator:
    """Return a freshly seeded CPU random generator that depends on the key alone, see `derived_seed`.

    Example:
        >>> torch.equal(torch.rand(3, generator=seeded("a", 1)), torch.rand(3, generator=seeded("a", 1)))
        True
    """
    return torch.Generator().manual_seed(derived_seed(*key))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed PyTorch's global generators of the CPU and of one device.

    `torch.manual_seed` does the same for all backends. For each backend without a device it records who called it,
    which takes half a millisecond every time.

    Args:
        seed: In `[0, 2^64)`.
        device: The device on which random numbers are drawn besides the CPU.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@dataclass(frozen=True, eq=False)
class LabelledImages(Dataset[tuple[Any, ...]]):
    """Labelled images, fetched a whole batch at a time; a subclass knows where their pixels are.

    Attributes:
        images: What the pixels are taken from.
        labels: int64 `[N]`.
    """

    images: Any
    labels: Tensor

    def __len__(self) -> int:
        """The number of images."""
        return len(self.labels)

    @property
    def shape(self) -> tuple[int, ...]:
        """N, C, H, W."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The type of the pixels: uint8, unless the data files are wrong."""
        return torch.uint8

    @property
    def size_in_bytes(self) -> int:
        """The memory that images and labels take where they are in memory."""
        return math.prod(self.shape) * self.dtype.itemsize + self.labels.nbytes

    def subset(self, indices: Tensor) -> "LabelledImages":
        """Return the images at the given int64 `[M]` indices, in that order."""
        raise NotImplementedError

    def changed(self, indices: Tensor, change: Change) -> "LabelledImages":
        """Return the images, some of them changed.

        Args:
            indices: Of the images to change, int64 `[M]`.
            change: Can be pickled, so that worker processes can do it.
        """
        raise NotImplementedError

    def relabelled(self, classes: Sequence[int]) -> "LabelledImages":
        """Return the images with the places of their labels among the classes; -1 for a label that is not there."""
        places = torch.full((max(int(self.labels.max()), *classes) + 1,), -1)
        places[list(classes)] = torch.arange(len(classes))
        return replace(self, labels=places[self.labels])

    def labelled(self) -> "LabelledImages":
        """Return the images whose label is a class, not -1."""
        return self.subset((self.labels >= 0).nonzero().flatten())

    def check(self, name: str, shape: tuple[int, ...], num_classes: int) -> None:
        """Refuse images or labels that are not as a data module declares them.

        Args:
            name: The name of this set in the message.
            shape: C, H, W that each image must have.
            num_classes: Labels must be in `range(num_classes)`.

        Raises:
            FusionError: The set is empty, or an image or label is not as declared.
        """
        labels = self.labels
        if self.shape != (len(labels), *shape) or self.dtype != torch.uint8 or len(labels) == 0:
            raise FusionError(
                f"Expected {name} images as torch.uint8 {[len(labels), *shape]} with at least one image, "
                f"got {self.dtype} {list(self.shape)}; check the data files"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise FusionError(
                f"Expected {name} labels in 0..{num_classes - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}; check the data files"
            )


@dataclass(frozen=True, eq=False)
class ImageSet(LabelledImages):
    """Labelled images in memory.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
    """

    images: Tensor
    labels: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """N, C, H, W."""
        return tuple(self.images.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the pixels."""
        return self.images.dtype

    def __getitem__(self, index: int | list[int]) -> tuple[Tensor, Tensor]:
        """Return one image `[C, H, W]` and its label `[]`, or several."""
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch `[B, C, H, W]` with its labels `[B]` by one indexing instead of B and a collation."""
        batch = beside(self.images, torch.tensor(indices))
        return self.images.index_select(0, batch), self.labels[batch]

    def to(self, device: torch.device) -> "ImageSet":
        """Return the images on a device."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def subset(self, indices: Tensor) -> "ImageSet":
        """Return copies of the images at the given int64 `[M]` indices, in that order."""
        return ImageSet(self.images[indices], self.labels[indices])

    def changed(self, indices: Tensor, change: Change) -> "ImageSet":
        """Return copies of the images, some of them changed."""
        return ImageSet(self.images.index_copy(0, indices, change(self.images[indices])), self.labels)


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Split indices in two so that each class gives the same fraction of its members, to the nearest whole sample.

    Args:
        labels: int64 `[N]`.
        fraction: Share of each class that goes to the second part, in `[0, 1]`.
        seed: Selects the members.

    Returns:
        Two disjoint int64 index tensors, each increasing, that together hold every index: the first part (the rest)
        and the second.

    Example:
        >>> first, second = stratified_split(torch.tensor([0, 0, 1, 1]), 0.5, seed=0)
        >>> len(first), len(second)
        (2, 2)
    """
    order = torch.randperm(len(labels), generator=seeded("split", seed))
    in_second = torch.zeros(len(labels), dtype=torch.bool)
    for label in torch.unique(labels):
        members = order[labels[order] == label]
        in_second[members[: round(fraction * len(members))]] = True
    return (~in_second).nonzero().flatten(), in_second.nonzero().flatten()
