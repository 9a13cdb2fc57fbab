"""The weights of a network among all that a file of somebody else holds: averages, losses, prefixes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clafusion.errors import FusionError
from clafusion.formats.recognition import recognise

#: What no network needs: the counter of `AveragedModel`.
_COUNTERS = frozenset({"n_averaged"})
#: The entries that say nothing about which weights they are.
_USUAL = frozenset({"state_dict", "model_state_dict"})


@dataclass(frozen=True)
class FoundWeights:
    """The weights of one network.

    Attributes:
        state: The tensors by their names in the network.
        assumed: What was chosen and what was left out, in words.
    """

    state: Mapping[Any, Any]
    assumed: tuple[str, ...] = ()


def find_weights(content: Mapping[Any, Any], wanted: str | None = None) -> FoundWeights:
    """Find the weights of a network in the content of a file.

    They are the content itself, or one entry of it, such as `state_dict`, `model` or `net`; within these, what lies
    below a common prefix (`module.` of DataParallel and of `AveragedModel`, the attribute of a LightningModule), beside
    which there may be a loss or metrics with tensors of their own.

    Args:
        content: As `torch.load` returns it.
        wanted: The entry or the attribute to take where there are several; None: there is one.

    Raises:
        FusionError: There are several networks, and `wanted` is none of them; the message lists them.

    Example:
        >>> import torch
        >>> found = find_weights({"net": {"module.fc1.weight": torch.ones(2, 3), "n_averaged": torch.tensor(4)}})
        >>> list(found.state), found.assumed
        (['fc1.weight'], ("the weights are those under 'net'", "left out 'n_averaged'", "names lose 'module.'"))
    """
    entries = {str(name): value for name, value in content.items() if _is_state(value)}
    entries = {name: state for name, state in entries.items() if _holds_network(state)} or entries
    if entries:
        name = next(iter(entries)) if len(entries) == 1 and wanted not in entries else _only(entries, wanted)
        found = _within(entries[name], None if wanted == name else wanted)
        assumed = () if name in _USUAL else (f"the weights are those under {name!r}",)
        return FoundWeights(found.state, (*assumed, *found.assumed))
    return _within(content, wanted)


def _within(state: Mapping[Any, Any], wanted: str | None) -> FoundWeights:
    """Return the network of a state dict that may hold more."""
    kept = {name: value for name, value in state.items() if name not in _COUNTERS}
    assumed = tuple(f"left out {name!r}" for name in state if name in _COUNTERS)
    parts = _parts(kept)
    spare = [head for head in parts if "loss" in head or "criterion" in head]
    rest = {name: value for name, value in kept.items() if str(name).partition(".")[0] not in spare}
    if wanted is None and spare and _is_network(rest):
        return FoundWeights(rest, (*assumed, *(f"left out {head!r}" for head in spare)))
    if wanted is None and (_is_network(kept) or not any(_holds_network(part) for part in parts.values())):
        return FoundWeights(kept, assumed)
    networks = {head: part for head, part in parts.items() if _holds_network(part)}
    name = _only(networks, wanted)
    found = _within(networks[name], None)
    others = tuple(f"left out {head!r}" for head in parts if head != name)
    return FoundWeights(found.state, (*assumed, *others, f"names lose '{name}.'", *found.assumed))


def _only(networks: Mapping[str, Any], wanted: str | None) -> str:
    """Return the name of the only network, or of that which is wanted."""
    if wanted in networks:
        return str(wanted)
    if wanted is not None or len(networks) != 1:
        raise FusionError(
            f"Expected one network, got {', '.join(networks) or 'none'}{f', none called {wanted}' if wanted else ''}; "
            f"choose by --weights, such as --weights {next(iter(networks), 'NAME')}"
        )
    return next(iter(networks))


def _is_state(value: object) -> bool:
    """Whether something maps names to tensors."""
    return isinstance(value, Mapping) and bool(value) and all(isinstance(one, Tensor) for one in value.values())


def _holds_network(state: Mapping[Any, Any]) -> bool:
    """Whether a state dict is that of a network, or holds one below a prefix."""
    if _is_network(state):
        return True
    return any(_holds_network(part) for part in _parts(state).values())


def _parts(state: Mapping[Any, Any]) -> dict[str, dict[str, Any]]:
    """Return what lies below each name before the first dot; what has no dot lies below nothing and is left out."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in state.items():
        head, dot, rest = str(name).partition(".")
        if dot:
            parts.setdefault(head, {})[rest] = value
    return parts


def _is_network(state: Mapping[Any, Any]) -> bool:
    """Whether names and shapes are those of a network that `convert` knows."""
    if not _is_state(state):
        return False
    try:
        recognise({str(name): tuple(value.shape) for name, value in state.items()})
    except FusionError:
        return False
    return True
