"""Lightning's restoration of a training, with a one-line error for a state that does not load."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.optim import LBFGS

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
                # LBFGS keeps all weights in one row, with the first of them.
                for weight, state in optimizer.state.items() if not isinstance(optimizer, LBFGS) else ():
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
    """Refuse tensors of an optimizer's state that have neither the shape of their weight nor one number.

    Adafactor keeps sums over rows and columns, so an axis may have the length 1.
    """
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.ndim == 0:
            continue
        axes = zip(value.shape, weight.shape, strict=False)
        if value.ndim != weight.ndim or any(mine not in (1, length) for mine, length in axes):
            raise ValueError(f"{name} of shape {list(value.shape)} for a weight of shape {list(weight.shape)}")
