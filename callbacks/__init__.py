"""Lightning callbacks: work between the phases of a training."""

from clafusion.old_names import refuse_old_name

refuse_old_name(__name__)

from clafusion.callbacks.fusion import FusionCallback

__all__ = ["FusionCallback"]
