"""Callbacks of Lightning that would change a training in a way that it could not go on from."""

from clafusion.errors import FusionError
from clafusion.lightning import Trainer

#: Callbacks by name, whether they are refused only where a training goes on, and what to do instead.
_REFUSED = {
    "BatchSizeFinder": (False, "the order of the images belongs to a batch size; give --data.batch_size"),
    "LearningRateFinder": (True, "a training goes on with the learning rate that it had; leave it out"),
}


def check_callbacks(trainer: Trainer, resumes: bool) -> None:
    """Refuse such callbacks, before anything is computed.

    Args:
        trainer: Its callbacks are looked at.
        resumes: Whether a training goes on from a checkpoint.

    Raises:
        FusionError: There is one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for kind in type(callback).__mro__:
            only_resumed, advice = _REFUSED.get(kind.__name__, (True, ""))
            if advice and (resumes or not only_resumed):
                raise FusionError(f"Expected no {kind.__name__}, got one: {advice}")
