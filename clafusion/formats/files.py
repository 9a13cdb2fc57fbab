"""Networks as plain data and as files: safetensors with the architecture as JSON metadata, and no pickle anywhere.

A file of `save_network` holds everything that `load_network` needs. Loading it runs no code of the file, and takes no
more memory than the file has bytes, whatever sizes its metadata claims.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from clafusion import networks
from clafusion.errors import FusionError
from clafusion.formats import first_version
from clafusion.formats.atomic import write_together
from clafusion.formats.graph_json import FORMAT, check_storable, encode_nodes
from clafusion.formats.stored import CONSTANTS, StoredNetwork, base_dtype, tensor_table
from clafusion.networks.families import FAMILIES
from clafusion.tracing.example import check_sizes, example_for
from clafusion.tracing.exporting import export_graph

#: The types that saved weights may have.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_FORMAT = {"format": "clafusion", "version": "1"}


@dataclass(frozen=True)
class Snapshot:
    """A network as data.

    Attributes:
        architecture: as `describe` returns it.
        state: the tensors that `restore(architecture).load_state_dict` takes. Besides those of the network's own state
            dict, the constants that its graph reads: buffers that the state dict leaves out, and what was computed from
            buffers. Their names begin with `_constants.`. They share the memory of the network.
    """

    architecture: dict[str, Any]
    state: dict[str, Tensor]


def describe(model: nn.Module, example: Tensor | None = None) -> dict[str, Any]:
    """Describe a network as JSON-able data from which `restore` rebuilds it.

    Args:
        model: An `MLP`, `VGG` or `ResNet`, or any network that torch.export can capture; not changed.
        example: Samples that it takes, `[N, ...]`, for a network that is none of ours. None: those of the shape that
            it declares (`default_cfg` of timm, `config.image_size` of Hugging Face), or of the first common size that
            works; a network that computes something else for every size then needs an example.

    Returns:
        The network's own `architecture`, or `{"name": "aten", "version": 1, "input": [...], "nodes": [...], "logits":
        {...}, "tensors": [...]}`, which is the graph of evaluation: see `StoredNetwork` for what training makes of it.

    Raises:
        FusionError: The network cannot be captured or uses something that cannot be stored; the message names it.

    Example:
        >>> describe(networks.MLP(4, [3], 2))["hidden"]
        [3]
    """
    return snapshot(model, example).architecture


def snapshot(model: nn.Module, example: Tensor | None = None) -> Snapshot:
    """Describe a network as `describe` does, and return with it the tensors that belong to the description."""
    state = model.state_dict()
    architecture = _known_architecture(model, state)
    if architecture is not None:
        return Snapshot(architecture, state)
    example, control = example_for(model) if example is None else (example, None)
    taken = captured(model, example)
    skeleton = _skeleton(taken.architecture)
    _require_equal(skeleton, taken.state, type(model).__name__)
    if control is not None:
        skeleton.load_state_dict(taken.state, assign=True)
        check_sizes(model, skeleton.eval(), control)
    return taken


def check_saved(model: nn.Module, example: Tensor, called: str) -> None:
    """Refuse a network whose graph cannot be saved at other widths either, before anything is computed with it.

    Args:
        model: the network.
        example: samples that it takes.
        called: what the message calls it.

    Raises:
        FusionError: It has an operation or an argument that cannot be stored.
    """
    if type(model) in FAMILIES or isinstance(model, StoredNetwork):
        return
    try:
        check_storable(export_graph(model, example))
    except FusionError as error:
        raise FusionError(f"{error} (in {called})") from error


def captured(model: nn.Module, example: Tensor) -> Snapshot:
    """Describe a network by its graph."""
    capture = export_graph(model, example)
    own = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    tensors = {name: own[name] for name in model.state_dict() if name in own}
    stored = {name: name for name in tensors}
    count = sum(name.startswith(f"{CONSTANTS}.") for name in tensors)
    for name, tensor in capture.tensors.items():
        if name not in stored:
            stored[name] = f"{CONSTANTS}.{count}"
            tensors[stored[name]] = tensor
            count += 1
    parameters = {stored[name] for name in capture.parameters} | {name for name, _ in model.named_parameters()}
    dtype = base_dtype(model) or example.dtype
    nodes, logits = encode_nodes(capture, stored, dtype)
    architecture = {
        **FORMAT,
        "input": list(example.shape[1:]),
        "nodes": nodes,
        "logits": logits,
        "tensors": tensor_table(tensors, parameters, dtype),
    }
    return Snapshot(architecture, {name: tensor.detach() for name, tensor in tensors.items()})


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
        name = architecture.get("name") if isinstance(architecture, Mapping) else None
        if name == FORMAT["name"]:
            return StoredNetwork(architecture)
        return first_version.decode(architecture) if name == "graph" else networks.build(architecture)
    except FusionError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError) as error:
        raise FusionError(
            f"Expected an architecture written by describe, got one that fails ({_line(error)}); save it again"
        ) from error


def save_network(model: nn.Module, path: str | os.PathLike[str], example: Tensor | None = None) -> None:
    """Write a network to one file: its tensors as safetensors, its architecture as JSON metadata.

    The file appears whole or not at all; one that exists is replaced.

    Args:
        model: A network that `describe` accepts. Tensors keep their dtype; those that share memory are written
            separately, and one with two names is one again when it is loaded.
        path: File to write, usually `*.safetensors`; its folder must exist.
        example: As for `describe`.

    Raises:
        FusionError: The network cannot be described, or the file cannot be written.
    """
    taken = snapshot(model, example)
    metadata = {**_FORMAT, "architecture": json.dumps(taken.architecture, allow_nan=False)}
    try:
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in taken.state.items()}
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


def _known_architecture(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return what a network knows about itself; None for a foreign one, or one changed beyond it."""
    try:
        if type(model) in FAMILIES:
            architecture: dict[str, Any] | None = model.architecture  # type: ignore[assignment]
        elif isinstance(model, StoredNetwork):
            architecture = model.description
        else:
            architecture = first_version.description_of(model)
        if architecture is None:
            return None
        skeleton = _skeleton(architecture)
        _require_equal(skeleton, state, type(model).__name__)
    except FusionError:
        return None
    # Without the networks themselves: every graph module has a class of its own.
    rebuilt, given = ([(name, type(one)) for name, one in net.named_modules()][1:] for net in (skeleton, model))
    return architecture if rebuilt == given else None


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
