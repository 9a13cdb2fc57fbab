"""Checkpoints of anyone's LightningModule, with or without a fused network in it, read as plain data."""

import copy
import hashlib
import inspect
import os
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from clafusion.errors import FusionError
from clafusion.fusion.record import ParentFile
from clafusion.lightning_modules.checkpoints.reading import (
    check_weights,
    holds_classifier,
    load_parent,
    load_plain,
    local_file,
    refuse_classes,
)
from clafusion.lightning_modules.files import sha256
from clafusion.lightning_modules.placing import KEY, network_at, place_saved

Module = TypeVar("Module", bound=nn.Module)
#: What Lightning's command line adds to the hyperparameters of a module, and nobody needs to make it.
_ADDED = ("_instantiator", "_class_path", KEY)


def load_module(path: str | os.PathLike[str], kind: type[Module], **arguments: Any) -> Module:
    """Load a LightningModule as its `load_from_checkpoint` does, but safely, and with the fused network in it.

    Args:
        path: A local file, written by Lightning.
        kind: The class of the module.
        **arguments: Arguments of the class, which take the place of those that the checkpoint holds.

    Raises:
        FusionError: The file is missing, remote or damaged, holds pickled objects, or no module of that class.
    """
    checkpoint = load_plain(local_file(path))
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    if not isinstance(checkpoint.get("state_dict"), dict) or not isinstance(hyper_parameters, dict):
        raise FusionError(f"Expected a checkpoint of {kind.__name__}, got {path} without a state_dict; choose another")
    module: Any = _made(kind, hyper_parameters, checkpoint.get("hparams_name"), arguments, path)
    module.configure_model()
    place_saved(module, hyper_parameters)
    try:
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    except (RuntimeError, KeyError) as error:
        raise FusionError(
            f"Expected a checkpoint of {kind.__name__}, got {path}, whose weights are others ({_line(error)}); choose "
            "another, or give the arguments that it was made with"
        ) from error
    loaded: Module = module
    return loaded


def load_networks(parents: Sequence[str | os.PathLike[str] | nn.Module], kind: type[Any], at: str) -> list[nn.Module]:
    """Return the networks of parents, in eval mode, as copies.

    Args:
        parents: Checkpoints of the class, checkpoints of `ImageClassifier` or files of `save_network`; modules of the
            class, or networks.
        kind: The class of the LightningModule that the fused network is for.
        at: The attribute path of the network inside the class; "": the module itself.

    Raises:
        FusionError: A parent is none of these, or has weights that are not finite.
    """
    networks = [_network_of(parent, kind, at) for parent in parents]
    for parent, network in zip(parents, networks, strict=True):
        check_weights(network, name_of(parent))
    return [network.eval() for network in networks]


def name_of(parent: str | os.PathLike[str] | nn.Module) -> str:
    """Return what messages and records call a parent: its path, or its class."""
    return type(parent).__name__ if isinstance(parent, nn.Module) else os.fspath(parent)


def source_of(parent: str | os.PathLike[str] | nn.Module, name: str) -> ParentFile:
    """Return what a parent is called, and the checksum of its file, or of its weights."""
    if not isinstance(parent, nn.Module):
        return {"name": name, "path": name_of(parent), "sha256": sha256(parent)}
    digest = hashlib.sha256()
    for key, tensor in parent.state_dict().items():
        digest.update(key.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"name": name, "path": name_of(parent), "sha256": digest.hexdigest()}


def _network_of(parent: str | os.PathLike[str] | nn.Module, kind: type[Any], at: str) -> nn.Module:
    if not isinstance(parent, nn.Module):
        path = local_file(parent)
        return load_parent(path) if holds_classifier(path) else network_at(load_module(path, kind), at)
    if not hasattr(parent, "training_step"):
        return copy.deepcopy(parent)
    if not isinstance(parent, kind) and not issubclass(kind, type(parent)):
        raise FusionError(
            f"Expected parents of {kind.__name__}, got {type(parent).__name__}; pass the network inside it"
        )
    return copy.deepcopy(network_at(parent, at))


def _made(
    kind: type[Module], saved: Mapping[str, Any], name: Any, given: Mapping[str, Any], path: str | os.PathLike[str]
) -> Module:
    """Make a module of a class from the hyperparameters of a checkpoint.

    Args:
        kind: The class.
        saved: The hyperparameters.
        name: The argument that they were together, if they were one: `save_hyperparameters(config)`.
        given: Arguments that take their place.
        path: The file, for the message.
    """
    plain = {key: value for key, value in saved.items() if key not in _ADDED}
    refuse_classes(plain, path)
    parameters = inspect.signature(kind).parameters
    arguments = {**({name: plain} if name in parameters else plain), **given}
    if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        arguments = {key: value for key, value in arguments.items() if key in parameters or key in given}
    try:
        return kind(**arguments)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise FusionError(
            f"Expected a checkpoint with the arguments of {kind.__name__}, got {path} ({_line(error)}); call "
            "save_hyperparameters() before training, or choose a checkpoint of that class"
        ) from error


def _line(error: BaseException) -> str:
    """Return an error in one line of at most 150 characters."""
    text = " ".join(str(error).partition(":\n")[2].split() or str(error).split())
    return text if len(text) <= 150 else f"{text[:147]}..."
