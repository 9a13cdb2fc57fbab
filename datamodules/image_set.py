"""Seeded choices over an in-memory set of images: every one a pure function of its key."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

from clafusion.datamodules.transforms import beside
from clafusion.errors import FusionError


def derived_seed(*key: int | str) -> int:
    """A seed in `[0, 2^64)` that depends on the key alone.

    The key is hashed, so that neighbouring keys such as `(seed, epoch)` and `(seed + 1, epoch - 1)` share nothing: with
    sums of seeds they would be the same.

    Args:
        key: What the randomness is for, and the numbers that select it.
    """
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def seeded(*key: int | str) -> torch.Generator:
    """A freshly seeded CPU random generator that depends on the key alone, see `derived_seed`.

    Example:
        >>> torch.equal(torch.rand(3, generator=seeded("a", 1)), torch.rand(3, generator=seeded("a", 1)))
        True
    """
    return torch.Generator().manual_seed(derived_seed(*key))


def seed_generators(seed: int, device: torch.device) -> None:
    """Seeds PyTorch's global generators of the CPU and of one device.

    `torch.manual_seed` does the same for the devices of all backends, whether there are any; where there are none, it
    records each time for each backend who called it, which takes half a millisecond.

    Args:
        seed: In `[0, 2^64)`.
        device: Where besides the CPU random numbers are drawn.
    """
    if device.type not in ("cpu", "cuda"):
        torch.manual_seed(seed)
        return
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset):
    """Labelled images in memory, fetched a whole batch at a time.

    Attributes:
        images: uint8 `[N, C, H, W]`.
        labels: int64 `[N]`.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int | list[int]) -> tuple[Tensor, Tensor]:
        """One image `[C, H, W]` and its label `[]`, or several."""
        return self.images[index], self.labels[index]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A batch `[B, C, H, W]` with its labels `[B]`: one indexing instead of B of them and a collation."""
        chosen = beside(self.images, torch.tensor(indices))
        return self.images.index_select(0, chosen), self.labels[chosen]

    @property
    def size_in_bytes(self) -> int:
        """What images and labels take in memory."""
        return self.images.nbytes + self.labels.nbytes

    def to(self, device: torch.device) -> "ImageSet":
        """The images on a device."""
        return ImageSet(self.images.to(device), self.labels.to(device))

    def subset(self, indices: Tensor) -> "ImageSet":
        """The images at the given int64 `[M]` indices, in that order, copied."""
        return ImageSet(self.images[indices], self.labels[indices])

    def check(self, name: str, shape: tuple[int, ...], num_classes: int) -> None:
        """Refuses images or labels that are not what a data module declares.

        Args:
            name: What to call this set in the message.
            shape: C, H, W that each image must have.
            num_classes: Labels must be in `range(num_classes)`.

        Raises:
            FusionError: The set is empty, or an image or label is not as declared.
        """
        images, labels = self.images, self.labels
        if images.shape != (len(labels), *shape) or images.dtype != torch.uint8 or len(labels) == 0:
            raise FusionError(
                f"Expected {name} images as torch.uint8 {[len(labels), *shape]} with at least one image, "
                f"got {images.dtype} {list(images.shape)}; check the data files"
            )
        if labels.min() < 0 or labels.max() >= num_classes:
            raise FusionError(
                f"Expected {name} labels in 0..{num_classes - 1}, "
                f"got {int(labels.min())}..{int(labels.max())}; check the data files"
            )


def stratified_split(labels: Tensor, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Splits indices in two so that each class gives the same fraction of its members, to the nearest whole sample.

    Args:
        labels: int64 `[N]`.
        fraction: Share of each class that goes to the second part, in `[0, 1]`.
        seed: Selects the members.

    Returns:
        Two disjoint int64 index tensors, each increasing, that together hold every index: the rest and the chosen.

    Example:
        >>> rest, chosen = stratified_split(torch.tensor([0, 0, 1, 1]), 0.5, seed=0)
        >>> len(rest), len(chosen)
        (2, 2)
    """
    order = torch.randperm(len(labels), generator=seeded("split", seed))
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = order[labels[order] == label]
        chosen[members[: round(fraction * len(members))]] = True
    return (~chosen).nonzero().flatten(), chosen.nonzero().flatten()
