"""Lightning data modules: real images in memory, split into training, validation and test."""

from datamodules.cifar import CIFARDataModule
from datamodules.digits import DigitsDataModule
from datamodules.folders import ImageFolderDataModule
from datamodules.images import ImageDataModule
from datamodules.mnist import MNISTDataModule
from datamodules.split import Split

__all__ = [
    "CIFARDataModule",
    "DigitsDataModule",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "Split",
]
