"""Checkpoint files, read as plain data: nothing in them is run."""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.formats.files import FLOATS, load_network, restore
from clafusion.formats.stored import CONSTANTS
from clafusion.lightning_modules.checkpoints.inspection import Foreign, check_content, check_file
from clafusion.statistics.samples import all_finite
from clafusion.teachers.label_sets import Label

PREFIX = "network."
# Old Lightning versions kept hyperparameters here; `load_from_checkpoint` still merges them.
_LEGACY_KEYS = ("hparams", "module_arguments")


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a checkpoint of `ImageClassifier` as plain containers and tensors on the CPU; run no code from it.

    Args:
        path: A local file, written by Lightning or by `save_checkpoint`.

    Returns:
        The checkpoint. Its `state_dict` and `hyper_parameters` have been checked; the architecture in them is plain.

    Raises:
        FusionError: The file is missing, remote, damaged, holds pickled objects or is no such checkpoint.
    """
    path = local_file(path)
    if _is_safetensors(path):
        raise _foreign(path, "the content of save_network, which only fuse reads")
    checkpoint = load_plain(path)
    hyper_parameters = checkpoint.get("hyper_parameters")
    if _is_state(checkpoint):
        raise FusionError(
            f"Expected a checkpoint of ImageClassifier, got {path} with weights alone; make it one by "
            f"clafusion convert {path} NAME.ckpt"
        )
    if not _is_state(checkpoint.get("state_dict")) or not isinstance(hyper_parameters, dict):
        raise _foreign(path, "no state_dict with hyper_parameters")
    if any(key in checkpoint for key in _LEGACY_KEYS):
        raise _foreign(path, "hyperparameters in the format of an old Lightning version")
    if not isinstance(hyper_parameters.get("architecture"), dict):
        raise _foreign(path, "no architecture in its hyper_parameters")
    refuse_classes(hyper_parameters, path)
    _blank_network(checkpoint, path)
    return checkpoint


def load_parent(path: str | os.PathLike[str]) -> nn.Module:
    """Load the network of a checkpoint of `ImageClassifier`, or of a file written by `save_network`.

    Args:
        path: A local file; its content tells which of the two formats it has.

    Returns:
        The network in eval mode on the CPU, in the dtype it was saved with.

    Raises:
        FusionError: As `read_checkpoint`; or the weights do not fit the stored architecture, or are not finite.
    """
    path = local_file(path)
    if _is_safetensors(path):
        network = load_network(path)
    else:
        checkpoint = read_checkpoint(path)
        network = _blank_network(checkpoint, path)
        network.load_state_dict(_weights(checkpoint), assign=True)
    check_weights(network, path)
    return network.eval()


def check_weights(network: nn.Module, owner: str | os.PathLike[str]) -> None:
    """Refuse a network with weights that cannot be fused.

    Args:
        network: Left as it is.
        owner: What to call it in the message, such as its file.

    Raises:
        FusionError: A weight is of a type that is not computed with, or not finite.
    """
    state = network.state_dict()
    for name, tensor in state.items():
        if tensor.is_floating_point() and tensor.dtype not in FLOATS:
            raise FusionError(f"Expected {name} in {owner} of type {FLOATS[0]}, got {tensor.dtype}; convert it")
    spoilt = not_finite(state)
    if spoilt is not None:
        raise FusionError(f"Expected finite weights in {owner}, got NaN or infinity in {spoilt}; train it again")


def read_content(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a file says besides its network: the checkpoint; nothing for a file of `save_network`.

    Args:
        path: As for `load_parent`.

    Raises:
        FusionError: As `read_checkpoint`.
    """
    path = local_file(path)
    return {} if _is_safetensors(path) else read_checkpoint(path)


def holds_classifier(path: str | os.PathLike[str]) -> bool:
    """Whether a file is for `load_parent`: one of `save_network`, or a checkpoint of `ImageClassifier`.

    Args:
        path: A local file.

    Raises:
        FusionError: It cannot be read.
    """
    path = local_file(path)
    if _is_safetensors(path):
        return True
    saved = load_plain(path).get("hyper_parameters")
    architecture = saved.get("architecture") if isinstance(saved, dict) else None
    # Others may call one of their hyperparameters like this; networks of ours have a name.
    return isinstance(architecture, dict) and "name" in architecture


def load_fusion(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the record of the fusion that a file's network came from; None if the file has none.

    Args:
        path: As for `load_parent`.

    Raises:
        FusionError: As `read_checkpoint`.
    """
    return read_content(path).get("fusion")


def load_classes(paths: Sequence[str]) -> list[list[Label]] | None:
    """Return per file the labels that its network's outputs stand for; None if one of them does not say.

    Args:
        paths: As for `load_parent`.

    Raises:
        FusionError: As `read_checkpoint`, or the labels are of another form.
    """
    files = [local_file(path) for path in paths]
    named = [None if _is_safetensors(file) else class_names(read_checkpoint(file), file) for file in files]
    found = [names for names in named if names is not None]
    return found if len(found) == len(paths) else None


def class_names(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> list[Label] | None:
    """Return the labels that a network's outputs stand for, words or whole numbers; None if the file does not say.

    Args:
        checkpoint: The content of the file.
        path: The file, for the message.

    Raises:
        FusionError: It says something else.
    """
    names = checkpoint.get("class_names")
    kinds = {type(name) for name in names} if isinstance(names, list) else None
    if names is not None and (kinds not in ({int}, {str}) or len(set(names)) < len(names)):
        raise FusionError(f"Expected class_names in {path} as different words, got others; save it again")
    return names


def load_plain(path: Path) -> dict[str, Any]:
    """Read the content of a checkpoint file: only tensors and plain containers."""
    size = path.stat().st_size
    if size > _memory():
        raise FusionError(f"Expected a checkpoint that fits into memory, got {path} of {size:,} bytes; choose another")
    try:
        check_file(path)
        # weights_only is always given: an environment variable can turn the default off.
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        check_content(checkpoint, size)
    except Foreign as error:
        raise FusionError(
            f"Expected only tensors and plain values in {path}, got {error}; save network.state_dict() for "
            "clafusion convert, or the network by save_network"
        ) from error
    # A damaged file can make the unpickler fail in any way, MemoryError included.
    except Exception as error:
        raise _damaged(path) from error
    if not isinstance(checkpoint, dict):
        raise _foreign(path, f"a {type(checkpoint).__name__}")
    return checkpoint


def local_file(path: str | os.PathLike[str]) -> Path:
    """Return the path of an existing local file; refuse URLs, whose content is not under the user's control."""
    if "://" in str(path):
        raise FusionError(f"Expected a local file, got the address {path}; download it first")
    if not Path(path).is_file():
        raise FusionError(f"Expected a checkpoint, got {path}, which is no file; check the path")
    return Path(path)


def not_finite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor with NaN or infinity; None if there is none.

    Constants of a stored graph may be infinite, as in a mask of attention.
    """
    constants = (f"{CONSTANTS}.", f"{PREFIX}{CONSTANTS}.")
    weights = ((name, tensor) for name, tensor in state.items() if not name.startswith(constants))
    return next((name for name, tensor in weights if not all_finite(tensor)), None)


def refuse_classes(value: object, path: str | os.PathLike[str]) -> None:
    """Refuse hyperparameters that name a class or an instantiator: loading them would import and call code."""
    if isinstance(value, dict):
        for key in value:
            if key == "class_path" or str(key).startswith("_"):
                raise FusionError(f"Expected plain hyperparameters in {path}, got {key!r}; only your own command may")
            refuse_classes(value[key], path)
    elif isinstance(value, (list, tuple)):
        for item in value:
            refuse_classes(item, path)


def _memory() -> int:
    """Return the bytes of memory of this machine; no limit if the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return sys.maxsize


def _weights(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the network in a checkpoint, by their names in the network."""
    state = checkpoint["state_dict"]
    return {name.removeprefix(PREFIX): tensor for name, tensor in state.items() if name.startswith(PREFIX)}


def _blank_network(checkpoint: Mapping[str, Any], path: str | os.PathLike[str]) -> nn.Module:
    """Build a checkpoint's network on the meta device, where a forged size costs no memory, and compare its shapes."""
    try:
        with torch.device("meta"):
            network = restore(checkpoint["hyper_parameters"]["architecture"])
    except FusionError as error:
        raise FusionError(f"Expected a network in {path} that can be built: {error}") from error
    blanks, weights = network.state_dict(), _weights(checkpoint)
    expected = {name: tuple(tensor.shape) for name, tensor in blanks.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted(expected.keys() | shapes.keys()):
        if expected.get(name) != shapes.get(name):
            raise FusionError(
                f"Expected {name} in {path} to have shape {expected.get(name)}, got {shapes.get(name)}; save it again"
            )
        types = FLOATS if blanks[name].is_floating_point() else (blanks[name].dtype,)
        if weights[name].dtype not in types:
            raise FusionError(f"Expected {name} in {path} of type {types[0]}, got {weights[name].dtype}; convert it")
    return network


def _is_state(state: object) -> bool:
    """Whether an object maps names to tensors."""
    return isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: eight bytes of length, then JSON."""
    with open(path, "rb") as file:
        return file.read(9)[8:] == b"{"


def _foreign(path: str | os.PathLike[str], content: str) -> FusionError:
    return FusionError(
        f"Expected a checkpoint of ImageClassifier, got {path} with {content}; save it with fit or fuse, or try "
        "clafusion convert"
    )


def _damaged(path: Path) -> FusionError:
    return FusionError(f"Expected a readable checkpoint, got {path}, which is truncated or damaged; save it again")
