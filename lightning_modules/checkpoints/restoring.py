"""How a trainer goes on from a checkpoint: as Lightning does, but a state that fails ends in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.lightning_modules.distributed import is_lost
from clafusion.statistics.memory import is_out_of_memory

#: What Lightning and PyTorch raise for a state of another form.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class CheckedConnector(_CheckpointConnector):
    """Restores the state of a training, and says so where it is none."""

    def _restore_modules_and_callbacks(self, checkpoint_path: Any = None, *arguments: Any) -> None:
        with _explained(checkpoint_path):
            super()._restore_modules_and_callbacks(checkpoint_path, *arguments)

    def restore_training_state(self) -> None:
        """Restores loops, optimizers and schedules.

        Raises:
            FusionError: The checkpoint has no such state, or one that does not fit.
        """
        with _explained(self.trainer.ckpt_path):
            super().restore_training_state()
            for optimizer in self.trainer.optimizers:
                for weight, state in optimizer.state.items():
                    _check_shapes(weight, state)


@contextmanager
def _explained(path: Any) -> Iterator[None]:
    try:
        yield
    except (FusionError, MisconfigurationException):
        raise
    except _FAILURES as error:
        if is_lost(error) or is_out_of_memory(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise FusionError(
            f"Expected the state of a training in {path}, got one that fails ({type(error).__name__}: {reason}); "
            "choose another, or begin anew"
        ) from error


def _check_shapes(weight: Any, state: Any) -> None:
    """What an optimizer remembers of a weight is a number or of its shape."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape != weight.shape:
            raise ValueError(f"{name} of shape {list(value.shape)} for a weight of shape {list(weight.shape)}")
