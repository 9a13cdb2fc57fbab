"""Results and failures that all processes of a command share."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
from torch import distributed

from clafusion.errors import FusionError
from clafusion.lightning import Strategy

T = TypeVar("T")
#: How long a rank that has failed waits for the others, which may be waiting for it.
PATIENCE = timedelta(minutes=5)


def on_rank_zero(strategy: Strategy, compute: Callable[[], T]) -> T:
    """Compute on rank 0, and give every rank the result, or the reason why there is none.

    Args:
        strategy: The trainer's, with its processes running.
        compute: Called on rank 0 only; what it returns is pickled for the others.

    Raises:
        FusionError: On the other ranks, when `compute` failed on rank 0; there it is the failure itself.
    """
    result, failure = None, None
    if strategy.is_global_zero:
        try:
            result = compute()
        except Exception as error:
            failure = error
    # Without it the other ranks would wait for ever.
    result, reason = strategy.broadcast((result, None if failure is None else str(failure)))
    if failure is not None:
        raise failure
    if reason is not None:
        raise FusionError(reason)
    return cast(T, result)


def gathered(value: T) -> list[T]:
    """Return what every rank gives, in their order; on one process that is `value` alone.

    Args:
        value: This rank's; it is pickled for the others.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    found: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(found, value)
    return found


class FailureGroup:
    """A group of processes in which every rank learns of the first failure.

    It is separate from the group of the training, so that a reported failure is not mistaken for a gradient that
    another rank waits for. If that one waits for ever, the first loses its patience, and the command ends.
    """

    def __init__(self) -> None:
        several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
        self._group: Any = distributed.new_group(backend="gloo", timeout=PATIENCE) if several else None

    def first(self, failure: str | None) -> str | None:
        """Return the first failure of any rank; None if there is none.

        Args:
            failure: This rank's.

        Raises:
            RuntimeError: Another rank did not answer.
        """
        if self._group is None:
            return failure
        found: list[str | None] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, failure, group=self._group)
        return next((reason for reason in found if reason is not None), None)


#: How gloo says that it has lost a process; NCCL has an error of its own.
_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "Read error")


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of a training does not answer any more."""
    backend = isinstance(error, torch.distributed.DistBackendError)
    return backend or (isinstance(error, RuntimeError) and any(words in str(error) for words in _LOST))
