"""How a trainer goes on from a checkpoint: as Lightning does, but a state that fails ends in one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from clafusion.errors import FusionError
from clafusion.lightning import CheckpointConnector, MisconfigurationException
from clafusion.lightning_modules.distributed import is_lost
from clafusion.statistics.memory import is_out_of_memory

#: What Lightning and PyTorch raise for a state of another form.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class CheckedConnector(CheckpointConnector):
    """Restores the state of a training, and says so where it is none."""

    @contextmanager
    def restoring(self, path: Any) -> Iterator[None]:
        """Raise a FusionError where a checkpoint has no such state, or one that does not fit."""
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
    """What an optimizer remembers of a weight is a number or of its shape."""
    for name, value in state.items():
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape != weight.shape:
            raise ValueError(f"{name} of shape {list(value.shape)} for a weight of shape {list(weight.shape)}")
