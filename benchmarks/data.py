"""How fast images reach the network: the data modules here against torchvision's transforms in a DataLoader.

    python benchmarks/data.py

50,000 images of 3x32x32 in memory, shuffled, in batches of 128, random crop with padding 4 and flip, normalised, in one
process of one thread and without worker processes. Both `torchvision` rows do the same image by image: on PIL images,
as in most recipes, and on uint8 tensors with `torchvision.transforms.v2`.
"""

from functools import partial

import torch
from common import fastest, print_machine, print_table, quietly
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import v2

from clafusion.datamodules import ImageDataModule
from clafusion.datamodules.image_set import ImageSet
from clafusion.lightning_modules import FusionTrainer

SIZE, BATCH, MEAN, STD = 50_000, 128, (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


def images_of(count: int, seed: int = 0) -> ImageSet:
    """Random bytes with labels."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 10)


class RandomImages(ImageDataModule):
    """Random images through the base of all data modules."""

    def __init__(self, augment: bool, size: int = SIZE) -> None:
        self.num_classes, self.raw_shape, self.mean, self.std = 10, (3, 32, 32), MEAN, STD
        self.size = size
        super().__init__(batch_size=BATCH, augment=augment, val_fraction=0.0)

    def read(self) -> tuple[ImageSet, ImageSet]:
        """The training and a small test set."""
        return images_of(self.size), images_of(100)


class Single(Dataset[tuple[Tensor, int]]):
    """The same images one by one, each transformed, as torchvision's data sets give them."""

    def __init__(self, images: ImageSet, transform: transforms.Compose | v2.Compose, pil: bool) -> None:
        self.labels = images.labels.tolist()
        self.images = [transforms.ToPILImage()(image) for image in images.images] if pil else list(images.images)
        self.transform = transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """One transformed image and its label."""
        return self.transform(self.images[index]), self.labels[index]


def ours(augment: bool, device: str) -> RandomImages:
    """A data module that is set up for a trainer on a device."""
    module = RandomImages(augment)
    module.setup()
    module.trainer = FusionTrainer(accelerator=device, devices=1, logger=False, enable_checkpointing=False)
    return module


def pass_over(module: RandomImages, device: str) -> None:
    """One epoch, as the trainer goes through it."""
    generator = torch.Generator().manual_seed(0) if module.augment else None
    for images, _ in module.train_dataloader():
        module.preprocess(images.to(device, non_blocking=True), generator)


def theirs(images: ImageSet, pil: bool, augment: bool, workers: int = 0) -> DataLoader:
    """The transforms of torchvision in a DataLoader."""
    transform: transforms.Compose | v2.Compose
    if pil:
        chosen = [transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip()] if augment else []
        transform = transforms.Compose([*chosen, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    else:
        chosen = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()] if augment else []
        transform = v2.Compose([*chosen, v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])
    return DataLoader(
        Single(images, transform, pil), BATCH, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def pass_over_theirs(loader: DataLoader, device: str) -> None:
    """One epoch of it."""
    for images, _ in loader:
        images.to(device)


def compared(augment: bool, few: int, device: str = "cpu", workers: int = 0) -> list[dict[str, object]]:
    """Rows of the table; torchvision's go over `few` images, which is enough to know their speed."""
    module, some = ours(augment, device), images_of(few)
    with_workers = f", {workers} workers" if workers else ""
    loaders = {
        f"torchvision, PIL{with_workers}": theirs(some, True, augment, workers),
        f"torchvision, v2 on tensors{with_workers}": theirs(some, False, augment, workers),
    }
    passes = {name: partial(pass_over_theirs, loader, device) for name, loader in loaders.items()}
    passes = {"here": partial(pass_over, module, device), **passes}
    found = fastest(passes, rounds=3, device=device)
    speeds = {name: (SIZE if name == "here" else few) / value for name, value in found.items()}
    first = {"crop and flip": "yes" if augment else "no"}
    unit = "images per CPU second" if device == "cpu" else "images per second"
    return [
        {**first, "": name, unit: speed, "here is faster by": speeds["here"] / speed} for name, speed in speeds.items()
    ]


def main() -> None:
    """The table."""
    quietly()
    print_machine()
    print_table("One epoch of batches of 128", [*compared(True, 5_000), *compared(False, 5_000)])


if __name__ == "__main__":
    main()
