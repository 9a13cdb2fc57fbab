"""Networks as plain data and as files: safetensors with the architecture as JSON metadata, and no pickle anywhere.

A file of `save_network` holds everything that `load_network` needs. Loading it runs no code of the file, and takes no
more memory than the file has bytes, whatever sizes its metadata claims.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clafusion import networks
from clafusion.errors import FusionError
from clafusion.formats import graph_json as encoding
from clafusion.formats.atomic import write_together

#: The types that saved weights may have.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FORMAT = {"format": "clafusion", "version": "1"}
_OWN = (networks.MLP, networks.VGG, networks.ResNet)


def describe(model: nn.Module) -> dict[str, Any]:
    """Describe a network as JSON-able data from which `restore` rebuilds it.

    Args:
        model: An `MLP`, `VGG` or `ResNet`, or any network of common torch.nn modules that torch.fx can trace; not
            changed.

    Returns:
        The network's own `architecture`, or `{"name": "graph", "nodes": [...], "modules": {...}}`.

    Raises:
        FusionError: The network cannot be traced or uses something that cannot be stored; the message names it.

    Example:
        >>> describe(networks.MLP(4, [3], 2))["hidden"]
        [3]
    """
    state = model.state_dict()
    architecture = _own_architecture(model, state)
    if architecture is None:
        architecture = encoding.encode(model)
        _require_equal(_skeleton(architecture), state, type(model).__name__)
    return architecture


def restore(architecture: Mapping[str, Any]) -> nn.Module:
    """Rebuild the network that `describe` described, with fresh random weights, in training mode.

    Args:
        architecture: What `describe` returned, or anything `networks.build` takes.

    Returns:
        A network whose state dict has the names and shapes of the described one, in the same order.

    Raises:
        FusionError: Neither `describe` nor `networks.build` knows such an architecture.
    """
    try:
        if isinstance(architecture, Mapping) and architecture.get("name") == "graph":
            return encoding.decode(architecture)
        return networks.build(architecture)
    except FusionError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        raise FusionError(
            f"Expected an architecture written by describe, got one that fails ({_line(error)}); save it again"
        ) from error


def save_network(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a network to one file: its tensors as safetensors, its architecture as JSON metadata.

    The file appears whole or not at all; one that exists is replaced.

    Args:
        model: A network that `describe` accepts. Tensors keep their dtype; those that share memory are written
            separately.
        path: File to write, usually `*.safetensors`; its folder must exist.

    Raises:
        FusionError: The network cannot be described, or the file cannot be written.
    """
    metadata = {**_FORMAT, "architecture": json.dumps(describe(model), allow_nan=False)}
    try:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in model.state_dict().items()}
        content = save(tensors, metadata)
        write_together({Path(path): lambda file: file.write(content)})
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise FusionError(f"Expected to write {path}, got {_line(error)}; choose a writable path") from error


def load_network(path: str | os.PathLike[str]) -> nn.Module:
    """Load a network that `save_network` wrote.

    Args:
        path: The file. It may come from anyone: nothing in it is executed.

    Returns:
        The network on the CPU in eval mode, every tensor with the dtype it was saved with.

    Raises:
        FusionError: The file is missing, damaged or not of `save_network`, or its architecture does not fit its
            tensors.
    """
    metadata, tensors = _read(Path(path))
    if {key: metadata.get(key) for key in _FORMAT} != _FORMAT or "architecture" not in metadata:
        raise FusionError(f"Expected a file written by save_network, got {path} without its metadata; save it again")
    try:
        architecture = json.loads(metadata["architecture"])
    except (ValueError, RecursionError) as error:
        raise FusionError(f"Expected JSON metadata in {path}, got {_line(error)}; save it again") from error
    try:
        network = _skeleton(architecture)
    except FusionError as error:
        raise FusionError(f"{error} (in {path})") from error
    _require_equal(network, tensors, str(path))
    network.load_state_dict(tensors, assign=True)
    return network.eval()


def _own_architecture(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the `architecture` of one of our networks; None for another, or one changed beyond it."""
    if type(model) not in _OWN:
        return None
    try:
        architecture: dict[str, Any] = model.architecture  # type: ignore[assignment]
        skeleton = _skeleton(architecture)
        _require_equal(skeleton, state, type(model).__name__)
    except FusionError:
        return None
    same = [(name, type(module)) for name, module in skeleton.named_modules()]
    return architecture if same == [(name, type(module)) for name, module in model.named_modules()] else None


def _skeleton(architecture: Mapping[str, Any]) -> nn.Module:
    """Build the network without memory for its tensors: claimed sizes cost nothing until real tensors agree."""
    with torch.device("meta"):
        return restore(architecture)


def _require_equal(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise unless `tensors` are, by name, shape and kind of number, the state of `network`."""
    expected = network.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        article, actual = ("a", "none") if name in expected else ("no", "one")
        raise FusionError(f"Expected {article} tensor {name!r} in {source}, got {actual}; save the network again")
    for name, tensor in tensors.items():
        blank = expected[name]
        if tensor.shape != blank.shape:
            raise FusionError(
                f"Expected {name!r} of shape {list(blank.shape)}, got {list(tensor.shape)} in {source}; "
                "save the network again"
            )
        floating = blank.is_floating_point()
        if tensor.is_floating_point() != floating or not (floating or tensor.dtype == blank.dtype):
            raise FusionError(f"Expected {name!r} of type {blank.dtype}, got {tensor.dtype} in {source}; save it again")


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and tensors of a safetensors file; clones, so that nothing depends on the file afterwards."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FusionError(f"Expected a saved network at {path}, got no such file; check the path") from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise FusionError(f"Expected a safetensors file at {path}, got {_line(error)}; save it again") from error


def _line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type; of a system's error its words without a file's name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.strip().partition("\n")[0] or type(error).__name__
