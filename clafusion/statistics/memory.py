"""Fewer samples at once where memory does not suffice for more."""

import gc
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import TypeVar

import torch

from clafusion.errors import FusionError

T = TypeVar("T")
#: Samples that are run at once where no memory budget says how many.
CHUNK = 32
#: Divisors of the number of samples run at once, tried in turn. With fewer than a fourth of CHUNK, a chunk of
#: near-equal parts could be too small for an unbiased estimate, which takes four.
DIVISORS = (1, 2, 4)
_divisor: ContextVar[int] = ContextVar("divisor of the samples that are run at once", default=1)


def samples_at_once(most: int = CHUNK) -> int:
    """The number of samples to run at once: the given one while memory suffices, at least one."""
    return max(1, most // _divisor.get())


def within_memory(compute: Callable[[], T]) -> T:
    """Call a function; if it runs out of memory, call it again with half as many samples at once, then with a fourth.

    Args:
        compute: the function; it changes nothing before it has succeeded.

    Raises:
        FusionError: if there is not enough memory even for the smallest number of samples.
    """
    for divisor in DIVISORS:
        if divisor > 1:
            warnings.warn(f"Out of memory; trying again with 1/{divisor} of the samples at once", stacklevel=2)
        token = _divisor.set(divisor)
        try:
            return compute()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
        finally:
            _divisor.reset(token)
        # Only here, where the error and with it what it had in hand is gone.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    raise FusionError(
        f"Expected enough memory to run 1/{DIVISORS[-1]} of the samples at once, got {reason}; use another device, or "
        "smaller networks"
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is no more memory, on an accelerator or in the machine."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator: " in str(error)
