"""CIFAR-10 and CIFAR-100 from the pickled batches of their Python version."""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clafusion.datamodules.files import FileDataModule
from clafusion.datamodules.image_set import ImageSet
from clafusion.datamodules.pickles import read_pickle
from clafusion.errors import FusionError

_PIXELS = 3 * 32 * 32


class CIFARDataModule(FileDataModule):
    """Colour images, 3x32x32, of 10 or 100 (fine) classes.

    It reads the pickled batches of the Python version (https://www.cs.toronto.edu/~kriz/cifar.html) from
    `cifar-10-batches-py` or `cifar-100-python` below `data_dir`, or from `data_dir` itself, and runs no code that a
    pickle may name. Training images are augmented unless `augment` is false.

    Args:
        num_classes: 10 for CIFAR-10, 100 for CIFAR-100.
        data_dir: Folder of the data; None means the folder `data` here. A leading `~` is the home folder.
        download: Whether to download the files where they are missing.
        augment: Whether training images are cropped at random (padding 4) and flipped horizontally.
        **kwargs: The other arguments of `ImageDataModule`.

    Raises:
        FusionError: An argument is of the wrong type or out of range.

    Example:
        >>> data = CIFARDataModule(num_classes=100)
        >>> data.image_shape, data.num_classes
        ((3, 32, 32), 100)
    """

    raw_shape = (3, 32, 32)

    def __init__(
        self,
        num_classes: Literal[10, 100] = 10,
        data_dir: str | None = None,
        download: bool = False,
        augment: bool = True,
        **kwargs: Any,
    ) -> None:
        if type(num_classes) is not int or num_classes not in (10, 100):
            raise FusionError(f"Expected num_classes to be 10 or 100, got {num_classes!r}; change num_classes")
        self.num_classes = num_classes
        super().__init__(data_dir=data_dir, download=download, augment=augment, **kwargs)
        if num_classes == 10:
            self.mean, self.std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
            self.files = (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch")
        else:
            self.mean, self.std = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
            self.files = ("train", "test")
        self.remedy = "put them there or set download=true"

    def folders(self) -> list[Path]:
        """The folders to look in, the first choice first."""
        below = "cifar-10-batches-py" if self.classes_read == 10 else "cifar-100-python"
        return [self.root / below, self.root]

    def fetch(self) -> None:
        """Download the archive through torchvision, which checks its sum and unpacks it."""
        # torchvision takes a second to import and is not needed to read the files.
        from torchvision import datasets

        getattr(datasets, f"CIFAR{self.classes_read}")(str(self.root), download=True)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Read the training batches and the test batch."""
        folder = self.folder()
        *training, test = (self._read_batch(folder / name) for name in self.files)
        images = torch.cat([batch.images for batch in training])
        return ImageSet(images, torch.cat([batch.labels for batch in training])), test

    def _read_batch(self, path: Path) -> ImageSet:
        entries = read_pickle(path)
        key = "labels" if self.classes_read == 10 else "fine_labels"
        images, labels = entries.get("data"), entries.get(key)
        if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.shape[1:] != (_PIXELS,):
            kind = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
            raise FusionError(f"Expected 'data' as uint8 [N, {_PIXELS}] in {path}, got {kind}; fetch it again")
        classes = labels.tolist() if isinstance(labels, np.ndarray) else labels
        if not isinstance(classes, list) or len(classes) != len(images) or not all(map(self._is_class, classes)):
            raise FusionError(
                f"Expected '{key}' as {len(images)} integers in 0..{self.classes_read - 1} in {path}, "
                "got something else; fetch it again"
            )
        return ImageSet(torch.tensor(images).view(-1, *self.raw_shape), torch.tensor(classes, dtype=torch.int64))

    def _is_class(self, label: object) -> bool:
        return type(label) is int and 0 <= label < self.classes_read
