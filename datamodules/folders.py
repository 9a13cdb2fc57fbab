"""Image files: one folder per class, and Tiny-ImageNet as it is published."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clafusion.datamodules.arguments import check_path, check_whole
from clafusion.datamodules.image_set import ImageSet, stratified_split
from clafusion.datamodules.images import ImageDataModule
from clafusion.errors import FusionError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
#: The file with the labels of Tiny-ImageNet's validation images.
ANNOTATIONS = "val/val_annotations.txt"

#: Points of an image file at most: it is unpacked before it is scaled.
_LARGEST = 2**26

Samples = list[tuple[Path, int]]


class ImageFolderDataModule(ImageDataModule):
    """Colour images in one folder per class, as torchvision's `ImageFolder` reads them.

    Below `data_dir` are either `train` and `test` (`val` if there is no `test`), each with a folder per class, or the
    folders of the classes themselves; a seeded share of these images is then the test part. If there are `train`, `val`
    and `test`, `val` is the validation part and `val_fraction` has no effect. The images are scaled so that their
    shorter side fits, cropped at the centre, and held in memory: `3 * size * size` bytes each.

    Args:
        data_dir: Folder of the data. A leading `~` is the home folder.
        size: Height and width to which the images are brought.
        test_fraction: Share of each class that is the test part if there is no folder for it, in `(0, 1)`.
        mean: One value per colour to subtract; None: ImageNet's, as torchvision's networks expect.
        std: One value per colour to divide by; None: ImageNet's.
        augment: Whether training images are cropped at random (padding 4) and flipped horizontally.
        **kwargs: The other arguments of `ImageDataModule`.

    Raises:
        FusionError: An argument is of the wrong type or out of range, or there are no folders of classes.
    """

    class_names: list[str]

    def __init__(
        self,
        data_dir: str,
        size: int = 64,
        test_fraction: float = 0.2,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: bool = True,
        **kwargs: Any,
    ) -> None:
        check_whole("size", size, 1)
        if type(test_fraction) is not float or not 0 < test_fraction < 1:
            raise FusionError(f"Expected test_fraction in (0, 1), got {test_fraction!r}; 0.2 holds out a fifth")
        self.root = _existing(data_dir)
        self.size = size
        self.test_fraction = test_fraction
        self.raw_shape = (3, size, size)
        self.mean, self.std = _colours("mean", mean, IMAGENET_MEAN), _colours("std", std, IMAGENET_STD)
        self.class_names, _ = _scan(self._folder_of("train"))
        self.num_classes = len(self.class_names)
        super().__init__(augment=augment, **kwargs)

    def _folder_of(self, part: str) -> Path:
        """The folder of a part; the whole folder if the parts have none of their own."""
        if not (self.root / "train").is_dir():
            return self.root
        names = ("test", "val") if part == "test" else (part,)
        return next((self.root / name for name in names if (self.root / name).is_dir()), self.root / part)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Read the training and the test images."""
        train, test = self._folder_of("train"), self._folder_of("test")
        if train != test:
            return self._images(train), self._images(test)
        whole = self._images(train)
        rest, held_out = stratified_split(whole.labels, self.test_fraction, self.split_seed)
        return whole.subset(rest), whole.subset(held_out)

    def read_validation(self) -> ImageSet | None:
        """Read the validation images if they have a folder that is not the test part's."""
        folder = self.root / "val"
        separate = folder.is_dir() and self._folder_of("test") not in (folder, self.root)
        return self._images(folder) if separate else None

    def predict_files(self) -> list[Path]:
        """Return the files of the test part, in the order of `predict_dataloader`."""
        train, test = self._folder_of("train"), self._folder_of("test")
        _, samples = _scan(test)
        if train == test:
            labels = torch.tensor([label for _, label in samples])
            _, held_out = stratified_split(labels, self.test_fraction, self.split_seed)
            samples = [samples[place] for place in held_out.tolist()]
        return [path for path, label in samples if self.label_set is None or label in self.label_set]

    def _images(self, folder: Path) -> ImageSet:
        classes, samples = _scan(folder)
        if classes != self.class_names:
            odd = sorted(set(classes) ^ set(self.class_names))[0]
            raise FusionError(f"Expected the same classes in every part, got {odd!r} in one of them only; see {folder}")
        return read_images(samples, self.size)


class TinyImageNetDataModule(ImageDataModule):
    """Tiny-ImageNet: 200 classes, 3x64x64, from the folder `tiny-imagenet-200` of its archive.

    The published validation images are the test part, since the published test images have no labels; validation images
    are held out of the training images. Classes are numbered in the alphabetical order of their identifiers.

    Args:
        data_dir: The folder `tiny-imagenet-200`, or the one that it is in. A leading `~` is the home folder.
        augment: Whether training images are cropped at random (padding 4) and flipped horizontally.
        **kwargs: The other arguments of `ImageDataModule`.

    Raises:
        FusionError: An argument is of the wrong type or out of range, or the folder is not Tiny-ImageNet's.
    """

    class_names: list[str]
    raw_shape = (3, 64, 64)
    mean, std = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)

    def __init__(self, data_dir: str = "data", augment: bool = True, **kwargs: Any) -> None:
        root = _existing(data_dir)
        self.root = next((at for at in (root / "tiny-imagenet-200", root) if (at / "wnids.txt").is_file()), root)
        missing = [name for name in ("wnids.txt", "train", ANNOTATIONS) if not (self.root / name).exists()]
        if missing:
            raise FusionError(
                f"Expected the folder tiny-imagenet-200 in {root}, got no {missing[0]}; "
                "unpack tiny-imagenet-200.zip there"
            )
        self.class_names = sorted((self.root / "wnids.txt").read_text().split())
        self.num_classes = len(self.class_names)
        super().__init__(augment=augment, **kwargs)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Read the training images, and the validation images with their annotations."""
        numbers = {name: number for number, name in enumerate(self.class_names)}
        train = [
            (path, numbers[name])
            for name in self.class_names
            for path in sorted((self.root / "train" / name).glob("*/*"))
        ]
        test = []
        for line in (self.root / ANNOTATIONS).read_text().splitlines():
            file, name = (line.split("\t") + [""])[:2]
            if name not in numbers or Path(file).name != file:
                raise FusionError(
                    f"Expected a file and a class of wnids.txt in each line of {self.root / ANNOTATIONS}, got {line!r}"
                )
            test.append((self.root / "val" / "images" / file, numbers[name]))
        return read_images(train, self.raw_shape[1]), read_images(test, self.raw_shape[1])


def read_images(samples: Samples, size: int) -> ImageSet:
    """Read image files in colour, scale the shorter side to `size`, and crop at the centre.

    Args:
        samples: Files and their labels.
        size: Height and width of the result.

    Raises:
        FusionError: A file is missing or is not an image that can be read.
    """
    images = torch.empty(len(samples), 3, size, size, dtype=torch.uint8)
    for place, (path, _) in enumerate(samples):
        images[place] = _read_image(path, size)
    return ImageSet(images, torch.tensor([label for _, label in samples], dtype=torch.int64))


def _read_image(path: Path, size: int) -> Tensor:
    # Imported late: only this data module needs it.
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as file:
            if file.width * file.height > _LARGEST:
                raise ValueError(f"{file.width}x{file.height} points, more than are read")
            fitted = ImageOps.fit(file.convert("RGB"), (size, size), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise FusionError(f"Expected an image in {path}, got {reason}; remove the file or put it right") from error
    return torch.from_numpy(np.array(fitted)).movedim(-1, 0)


def _scan(folder: Path) -> tuple[list[str], Samples]:
    """Return the classes of a folder, in alphabetical order, and their files."""
    from torchvision.datasets import ImageFolder

    try:
        dataset = ImageFolder(str(folder))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FusionError(f"Expected a folder with images for each class in {folder}, got none: {reason}") from error
    return dataset.classes, [(Path(path), label) for path, label in dataset.samples]


def _existing(data_dir: str) -> Path:
    check_path("data_dir", data_dir)
    path = Path(data_dir).expanduser()
    if not path.is_dir():
        raise FusionError(f"Expected data_dir to be a folder, got {data_dir!r}, which is none; check the path")
    return path


def _colours(name: str, values: Sequence[float] | None, default: tuple[float, ...]) -> tuple[float, ...]:
    colours = default if values is None else tuple(values)
    usable = all(type(value) in (int, float) and math.isfinite(value) for value in colours)
    if len(colours) != 3 or not usable or (name == "std" and min(colours) <= 0):
        raise FusionError(f"Expected {name} as three numbers{' above 0' if name == 'std' else ''}, got {values!r}")
    return colours
