"""The Lightning side: the classifier, the distiller, their checkpoints and the trainer that can fuse."""

from lightning_modules.checkpoints import load_parent, read_checkpoint, save_checkpoint
from lightning_modules.classifier import ImageClassifier
from lightning_modules.distiller import Distiller
from lightning_modules.last_checkpoint import LastCheckpoint
from lightning_modules.trainer import FusionTrainer

__all__ = [
    "Distiller",
    "FusionTrainer",
    "ImageClassifier",
    "LastCheckpoint",
    "load_parent",
    "read_checkpoint",
    "save_checkpoint",
]
