"""The Lightning side: the classifier, its checkpoints and the trainer that can fuse."""

from lightning_modules.checkpoints import load_parent, read_checkpoint, save_checkpoint
from lightning_modules.classifier import ImageClassifier
from lightning_modules.trainer import FusionTrainer

__all__ = ["FusionTrainer", "ImageClassifier", "load_parent", "read_checkpoint", "save_checkpoint"]
