"""Images in folders, one folder per class: one's own, those of ImageNet's layout, Tiny-ImageNet."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clafusion.errors import FusionError
from datamodules.checks import check_flag, check_whole
from datamodules.images import ImageDataModule
from datamodules.sampling import ImageSet, stratified_split

#: Other files, Tiny-ImageNet's bounding boxes for instance, are passed over.
EXTENSIONS = frozenset((".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"))
ANNOTATIONS = "val_annotations.txt"
_SHOWN = 5


class Sample(NamedTuple):
    """An image file and the number of its class."""

    path: Path
    label: int


class ImageFolderDataModule(ImageDataModule):
    """Images in folders, one folder per class; the classes are numbered in the order of their names.

    `data_dir` holds one of

    - `train/CLASS/`, `val/CLASS/` and `test/CLASS/`: training, validation and test images (`val_fraction` is not used);
    - `train/CLASS/` and one of the others, as ImageNet: that one is the test set;
    - Tiny-ImageNet as published (http://cs231n.stanford.edu/tiny-imagenet-200.zip): `val/images` with
      `val/val_annotations.txt` is the test set, because the published `test` has no labels;
    - `train/CLASS/` alone, or `CLASS/`: the test set is a stratified share of the images.

    In a class's folder, images are looked for at any depth. Each is scaled so that it covers a square of `size` pixels,
    of which its centre is kept; `3 * size * size` bytes for each stay in memory. They are normalised with ImageNet's
    mean and standard deviation.

    Args:
        data_dir: The folder; a leading `~` is the home folder.
        size: Height and width of the images.
        grey: Whether to read one channel instead of three.
        test_fraction: Share of each class that is the test set where no folder is.
        test_seed: Selects these images.
        **kwargs: The arguments of `ImageDataModule`.

    Raises:
        FusionError: An argument is of the wrong type or out of range, or the folder has none of these layouts.
    """

    def __init__(
        self,
        data_dir: str,
        size: int = 64,
        grey: bool = False,
        test_fraction: float = 0.2,
        test_seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if type(data_dir) is not str or not data_dir:
            raise FusionError(f"Expected data_dir to be a string, got {data_dir!r}; write the folder's path")
        check_whole("size", size, 1)
        check_flag("grey", grey)
        if type(test_fraction) is not float or not 0 < test_fraction < 1:
            raise FusionError(f"Expected test_fraction between 0 and 1, got {test_fraction!r}; change test_fraction")
        check_whole("test_seed", test_seed, 0)
        self.root = Path(data_dir).expanduser()
        self.classes = _classes(_training_folder(self.root))
        self.num_classes = len(self.classes)
        self.raw_shape = (1 if grey else 3, size, size)
        # Grey: the means over ImageNet's three channels.
        self.mean = (0.449,) if grey else (0.485, 0.456, 0.406)
        self.std = (0.226,) if grey else (0.229, 0.224, 0.225)
        super().__init__(**kwargs)
        self.test_fraction, self.test_seed = test_fraction, test_seed
        self._own_validation = 0

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Reads all images; those of a validation folder are the last of the first set."""
        train, validation, test = self._samples()
        self._own_validation = len(validation)
        return self._load(train + validation), self._load(test)

    def divide(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The images of the validation folder if there is one, else a share of the training images."""
        if not self._own_validation:
            return super().divide(labels)
        train = len(labels) - self._own_validation
        return torch.arange(train), torch.arange(train, len(labels))

    def _samples(self) -> tuple[list[Sample], list[Sample], list[Sample]]:
        """The files of training, validation (none: a share of the training images) and test."""
        training = _training_folder(self.root)
        train, val, test = self._listed(training), self.root / "val", self.root / "test"
        if training == self.root or not (val.is_dir() or test.is_dir()):
            labels = torch.tensor([sample.label for sample in train])
            rest, chosen = stratified_split(labels, self.test_fraction, self.test_seed)
            if not len(chosen):
                raise FusionError(
                    f"Expected test images, got none of {len(train)} with test_fraction {self.test_fraction}; raise it"
                )
            return [train[index] for index in rest], [], [train[index] for index in chosen]
        if (val / ANNOTATIONS).is_file():
            return train, [], _annotated(val, self.classes)
        if val.is_dir() and test.is_dir():
            return train, self._listed(val), self._listed(test)
        return train, [], self._listed(test if test.is_dir() else val)

    def _listed(self, folder: Path) -> list[Sample]:
        """The images of a folder, in the order of classes and names.

        Raises:
            FusionError: The folder has other classes, or a class without images.
        """
        found = _classes(folder)
        if odd := sorted(set(found) ^ set(self.classes)):
            raise FusionError(
                f"Expected the same classes in {folder} as among the training images, got {_shown(odd)} in only one of "
                "them; make their folders alike"
            )
        paths = {name: _images(folder / name) for name in found}
        if empty := [name for name in found if not paths[name]]:
            raise FusionError(
                f"Expected images ({' '.join(sorted(EXTENSIONS))}) of every class in {folder}, got none of "
                f"{_shown(empty)}; remove these folders or fill them"
            )
        return [Sample(path, label) for label, name in enumerate(found) for path in paths[name]]

    def _load(self, samples: Sequence[Sample]) -> ImageSet:
        """Decodes the files, several at once."""
        images = torch.empty((len(samples), *self.raw_shape), dtype=torch.uint8)
        with ThreadPoolExecutor() as pool:
            for index, image in enumerate(pool.map(partial(_decode, shape=self.raw_shape), samples)):
                images[index] = image
        return ImageSet(images, torch.tensor([sample.label for sample in samples], dtype=torch.int64))


def _training_folder(root: Path) -> Path:
    """The folder of the training images, or of all images."""
    if not root.is_dir():
        raise FusionError(f"Expected a folder of images, got {root}; change data_dir")
    if (root / "train").is_dir():
        return root / "train"
    if lonely := [name for name in ("val", "test") if (root / name).is_dir()]:
        raise FusionError(f"Expected a folder train beside {lonely[0]} in {root}, got none; add it or change data_dir")
    return root


def _classes(folder: Path) -> list[str]:
    """The names of the class folders; a hidden folder is none."""
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found:
        raise FusionError(f"Expected a folder for each class in {folder}, got none; move the images to CLASS/ there")
    return found


def _images(folder: Path) -> list[Path]:
    """The image files below a folder, in torchvision's order."""
    # Not rglob: it does not follow links to folders.
    walk = sorted(os.walk(folder, followlinks=True))
    paths = [Path(below, name) for below, _, names in walk for name in sorted(names)]
    return [path for path in paths if path.suffix.lower() in EXTENSIONS and not path.name.startswith(".")]


def _annotated(folder: Path, classes: Sequence[str]) -> list[Sample]:
    """Tiny-ImageNet's labelled validation images: a line has the name of a file, its class, and a box.

    Raises:
        FusionError: A line is not of that kind, or there is none.
    """
    numbers = {name: label for label, name in enumerate(classes)}
    path = folder / ANNOTATIONS
    lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    wrong = next((line for line in lines if len(line) < 2 or line[1] not in numbers), None)
    if wrong or not lines:
        raise FusionError(
            f"Expected lines of a file's name and one of the {len(classes)} classes of the training images in {path}, "
            f"got {' '.join(wrong) if wrong else 'none'}; unpack the archive again"
        )
    return [Sample(folder / "images" / line[0], numbers[line[1]]) for line in lines]


def _decode(sample: Sample, shape: tuple[int, int, int]) -> Tensor:
    """An image as uint8 `[C, H, W]`.

    Raises:
        FusionError: The file is missing or is no intact image.
    """
    # Pillow and its plugins are not needed by the other data modules.
    from PIL import Image, ImageOps

    channels, height, width = shape
    try:
        with Image.open(sample.path) as image:
            whole = image.convert("L" if channels == 1 else "RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FusionError(
            f"Expected an intact image {sample.path}, got {type(error).__name__}: {error}; replace or remove it"
        ) from error
    square = ImageOps.fit(whole, (width, height), Image.Resampling.BILINEAR)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(height, width, channels).permute(2, 0, 1)


def _shown(names: Sequence[str]) -> str:
    """Some names, and how many there are beside them."""
    rest = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
