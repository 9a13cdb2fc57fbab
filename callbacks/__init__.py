"""Lightning callbacks: what happens between the phases of a training."""

from clafusion.callbacks.fusion import FusionCallback

__all__ = ["FusionCallback"]
