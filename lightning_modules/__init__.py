"""The Lightning side: the classifier, the distiller, their checkpoints and the trainer that keeps them."""

from clafusion.old_names import refuse_old_name

refuse_old_name(__name__)

from clafusion.lightning_modules.checkpoints.last import LastCheckpoint
from clafusion.lightning_modules.checkpoints.reading import load_parent, read_checkpoint
from clafusion.lightning_modules.checkpoints.writing import save_checkpoint
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.distiller import Distiller
from clafusion.lightning_modules.trainer import FusionTrainer

__all__ = [
    "Distiller",
    "FusionTrainer",
    "ImageClassifier",
    "LastCheckpoint",
    "load_parent",
    "read_checkpoint",
    "save_checkpoint",
]
