"""Lightning's restoration of a training, with a one-line error for a state that does not load."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from clafusion.errors import FusionError
from clafusion.lightning import CheckpointConnector, MisconfigurationException
from clafusion.lightning_modules.distributed import is_lost
from clafusion.statistics.memory import is_out_of_memory

#: The errors of Lightning and PyTorch for a state of another form.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class CheckedConnector(CheckpointConnector):
    """Restores the state of a training; reports one that does not load in one line."""

    @contextmanager
    def restoring(self, path: Any) -> Iterator[None]:
        """Raise a FusionError if a checkpoint has no such state, or one that does not fit."""
        try:
            yield
            for optimizer in self.trainer.optimizers:
                for weight, state in optimizer.state.items():
                    _check_shapes(weight, state)
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
    """Refuse tensors of an optimizer's state that have neither the shape of their weight nor one number."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape != weight.shape:
            raise ValueError(f"{name} of shape {list(value.shape)} for a weight of shape {list(weight.shape)}")
