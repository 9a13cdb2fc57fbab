"""Networks as plain data and as files: safetensors with the architecture as JSON metadata, and no pickle anywhere.

A file written by `save_network` holds everything `load_network` needs, runs no code of the file's when loaded, and
never costs more memory than the file has bytes, whatever sizes its metadata claims.
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

_FORMAT = {"format": "clafusion", "version": "1"}
_OWN = (networks.MLP, networks.VGG, networks.ResNet)


def describe(model: nn.Module) -> dict[str, Any]:
    """Describe a network as JSON-able data from which `restore` rebuilds it.

    Args:
        model: An `MLP`, `VGG` or `ResNet`, or any network that torch.fx can trace and that is made of common
            torch.nn modules. It is not changed.

    Returns:
        The network's own `architecture`, or `{"name": "graph", "nodes": [...], "modules": {...}}`.

    Raises:
        FusionError: The network cannot be traced or uses something that cannot be stored; it is named.

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
        A network with the state-dict names and shapes, in the order, of the described one.

    Raises:
        FusionError: The architecture is not one that `describe` or `networks.build` knows.
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
        model: What `describe` accepts. Tensors keep their dtype; tensors that share memory are written separately.
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
        FusionError: The file is missing, damaged, not one of ours, or its architecture does not fit its tensors.
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
    """The `architecture` of one of our networks, None if it is another or was changed beyond what that can say."""
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
    """The network without memory for its tensors: claimed sizes cost nothing until real tensors agree with them."""
    with torch.device("meta"):
        return restore(architecture)


def _require_equal(network: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Raise unless `tensors` are, by name, shape and kind of number, the state of `network`."""
    expected = network.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        wanted, there = ("a", "none") if name in expected else ("no", "one")
        raise FusionError(f"Expected {wanted} tensor {name!r} in {source}, got {there}; save the network again")
    for name, tensor in tensors.items():
        shape, wanted_shape = list(tensor.shape), list(expected[name].shape)
        if shape != wanted_shape:
            raise FusionError(
                f"Expected {name!r} of shape {wanted_shape}, got {shape} in {source}; save the network again"
            )
        floating = expected[name].is_floating_point()
        if tensor.is_floating_point() != floating or not (floating or tensor.dtype == expected[name].dtype):
            raise FusionError(
                f"Expected {name!r} of type {expected[name].dtype}, got {tensor.dtype} in {source}; save it again"
            )


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; clones, so that nothing depends on the file afterwards."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return file.metadata() or {}, {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise FusionError(f"Expected a saved network at {path}, got no such file; check the path") from error
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise FusionError(f"Expected a safetensors file at {path}, got {_line(error)}; save it again") from error


def _line(error: BaseException) -> str:
    """The first line of an error's text, or its type; of the file system the words without a file's name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.strip().partition("\n")[0] or type(error).__name__
