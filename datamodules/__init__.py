"""Lightning data modules: real images, in memory or decoded on demand, split into training, validation and test."""

from clafusion.old_names import refuse_old_name

refuse_old_name(__name__)

from clafusion.datamodules.cifar import CIFARDataModule
from clafusion.datamodules.digits import DigitsDataModule
from clafusion.datamodules.domain import Domain
from clafusion.datamodules.folders import ImageFolderDataModule, TinyImageNetDataModule
from clafusion.datamodules.images import ImageDataModule
from clafusion.datamodules.mnist import MNISTDataModule
from clafusion.datamodules.split import Split

__all__ = [
    "CIFARDataModule",
    "DigitsDataModule",
    "Domain",
    "ImageDataModule",
    "ImageFolderDataModule",
    "MNISTDataModule",
    "Split",
    "TinyImageNetDataModule",
]
