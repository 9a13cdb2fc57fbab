"""The logits in what a network returns."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clafusion.errors import FusionError, in_words


def logits_in(output: Any) -> Tensor:
    """The logits in what a network returns.

    Args:
        output: a tensor; an object with `logits`, such as those of Hugging Face; a mapping with `logits`, or with only
            one tensor; or a tuple that begins with one of these, and goes on with auxiliary outputs.

    Raises:
        FusionError: if there is no tensor [samples, classes].
    """
    found = _found(output)
    if not isinstance(found, Tensor) or found.ndim != 2:
        got = in_words(output if found is None else found)
        raise FusionError(
            f"Expected a network that returns logits [samples, classes], got {got}; wrap it in a module that does"
        )
    return found


def _found(output: Any) -> Any:
    """The value in the place of the logits; None if there is no such place."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        tensors = [one for one in output.values() if isinstance(one, Tensor)]
        return output.get("logits", tensors[0] if len(tensors) == 1 else None)
    named = getattr(output, "logits", None)
    if named is not None or not isinstance(output, tuple | list):
        return named
    return _found(next((one for one in output if one is not None), None))
