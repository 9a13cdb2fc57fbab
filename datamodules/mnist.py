"""MNIST and Fashion-MNIST from their IDX files."""

from pathlib import Path
from typing import Any, Literal, get_args

from clafusion.datamodules.files import FileDataModule
from clafusion.datamodules.idx import locate_idx, read_idx
from clafusion.datamodules.image_set import ImageSet
from clafusion.errors import FusionError

Variant = Literal["mnist", "fashion"]
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
_TORCHVISION_NAME = {"mnist": "MNIST", "fashion": "FashionMNIST"}


class MNISTDataModule(FileDataModule):
    """Grey 1x28x28 images of ten classes: handwritten digits, or pieces of clothing.

    It reads the four IDX files, plain or gzipped, from `data_dir`, from `MNIST/raw` or `FashionMNIST/raw` below it
    (torchvision's folders) or, for Fashion-MNIST without `data_dir`, from the folder of the Debian package
    `dataset-fashion-mnist`. Both variants are normalised with MNIST's mean .1307 and standard deviation .3081: the
    published Fashion-MNIST runs were, and a network only works on data normalised as it was trained.

    Args:
        variant: `mnist` or `fashion`.
        data_dir: Folder of the data; None means the folder `data` here. A leading `~` is the home folder.
        download: Whether to download the files where they are missing.
        **kwargs: The arguments of `ImageDataModule`.

    Raises:
        FusionError: An argument is of the wrong type or out of range.

    Example:
        >>> data = MNISTDataModule("fashion", pad_to=32, channels=3)
        >>> data.image_shape
        (3, 32, 32)
    """

    num_classes = 10
    raw_shape = (1, 28, 28)
    mean = (0.1307,)
    std = (0.3081,)
    files = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

    def __init__(
        self, variant: Variant = "mnist", data_dir: str | None = None, download: bool = False, **kwargs: Any
    ) -> None:
        if variant not in get_args(Variant):
            raise FusionError(f"Expected variant to be mnist or fashion, got {variant!r}; change variant")
        super().__init__(data_dir=data_dir, download=download, **kwargs)
        self.variant = variant
        package = " or install the Debian package dataset-fashion-mnist" if variant == "fashion" else ""
        self.remedy = f"put them there (.gz is fine), set download=true{package}"

    def folders(self) -> list[Path]:
        """The folders to look in, the first choice first."""
        below = [self.root, self.root / _TORCHVISION_NAME[self.variant] / "raw"]
        return below + ([DEBIAN_FASHION] if self.variant == "fashion" and self.data_dir is None else [])

    def has(self, folder: Path, name: str) -> bool:
        """Whether the folder holds the file, plain or gzipped."""
        return locate_idx(folder, name) is not None

    def fetch(self) -> None:
        """Download the files through torchvision, which checks their sums."""
        # torchvision takes a second to import and is not needed to read the files.
        from torchvision import datasets

        getattr(datasets, _TORCHVISION_NAME[self.variant])(str(self.root), download=True)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Read the four files."""
        folder = self.folder()
        return self._read_set(folder, *self.files[:2]), self._read_set(folder, *self.files[2:])

    def _read_set(self, folder: Path, image_file: str, label_file: str) -> ImageSet:
        images = read_idx(locate_idx(folder, image_file) or folder / image_file, dimensions=3)
        labels = read_idx(locate_idx(folder, label_file) or folder / label_file, dimensions=1)
        return ImageSet(images.unsqueeze(1), labels.long())
