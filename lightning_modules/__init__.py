"""The Lightning side: the classifier, the distiller, their checkpoints, the trainer, and the commands as functions."""

from clafusion.old_names import refuse_old_name

refuse_old_name(__name__)

from clafusion.lightning_modules.checkpoints.last import LastCheckpoint
from clafusion.lightning_modules.checkpoints.reading import load_parent, read_checkpoint
from clafusion.lightning_modules.checkpoints.writing import save_checkpoint
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.fuse import fuse_checkpoints
from clafusion.lightning_modules.commands.transfer import transfer_checkpoint
from clafusion.lightning_modules.distiller import Distiller
from clafusion.lightning_modules.experiments.pipeline import run_pipeline
from clafusion.lightning_modules.trainer import FusionTrainer

__all__ = [
    "Distiller",
    "FusionTrainer",
    "ImageClassifier",
    "LastCheckpoint",
    "fuse_checkpoints",
    "load_parent",
    "read_checkpoint",
    "run_pipeline",
    "save_checkpoint",
    "transfer_checkpoint",
]
