"""The network inside a LightningModule of anyone: where it stands, and how a fused one takes its place."""

from collections.abc import Mapping
from types import MethodType
from typing import Any

from torch import nn

from clafusion.errors import FusionError
from clafusion.formats.files import restore

#: The hyperparameter of a module, and of its checkpoints, that describes the fused network in it.
KEY = "fused_network"
#: Of its value.
_FORM = {"at": str, "architecture": dict}
#: The attribute that a fused network gets in a module that is a network itself.
_OWN = "network"


def find_network(module: nn.Module, at: str | None = None) -> str:
    """Return the attribute path of what is to be fused inside a module; "" if that is the module itself.

    Args:
        module: A LightningModule.
        at: Its attribute path, such as `net` or `model.backbone`. None: `network`, or the only child with parameters,
            or the module itself if it has several of them and a `forward`.

    Raises:
        FusionError: There is no such network, or several may be meant.
    """
    if at is not None:
        owner, _, name = at.rpartition(".")
        # None: the module makes its network later.
        if not at or getattr(network_at(module, owner), name, False) is not None:
            network_at(module, at)
        return at
    own = getattr(module, _OWN, False)
    if own is None or isinstance(own, nn.Module):
        return _OWN
    children = [name for name, child in module.named_children() if any(True for _ in child.parameters())]
    alone = not any(True for _ in module.parameters(recurse=False))
    if len(children) == 1 and alone:
        return children[0]
    if (children or not alone) and "forward" in _written(type(module)):
        return ""
    names = " or ".join(repr(name) for name in children) or "no child with parameters"
    raise FusionError(f"Expected one network in {type(module).__name__}, got {names}; name it with network=")


def network_at(module: nn.Module, at: str) -> nn.Module:
    """Return what stands at an attribute path of a module.

    Raises:
        FusionError: There is no network there.
    """
    network: Any = module
    for name in at.split(".") if at else ():
        network = getattr(network, name, None)
    if not isinstance(network, nn.Module):
        names = ", ".join(name for name, _ in module.named_children()) or "none"
        raise FusionError(
            f"Expected a network at {at!r} of {type(module).__name__}, got none; its children are: {names}"
        )
    return network


def place(module: nn.Module, at: str, architecture: Mapping[str, Any]) -> nn.Module:
    """Put a network with fresh weights into a module, whose later checkpoints describe it.

    Args:
        module: A LightningModule, changed in place. If it was a network itself, its layers go, and its `forward`
            becomes that of its new child `network`.
        at: The attribute path, as of `find_network`.
        architecture: As `clafusion.describe` returns it.

    Returns:
        The network.

    Raises:
        FusionError: The architecture cannot be built, or the module has no such path.
    """
    network = restore(architecture)
    owner, _, name = (at or _OWN).rpartition(".")
    if not at:
        _remove_layers(module)
        module.forward = MethodType(_forward_of_network, module)
    setattr(network_at(module, owner), name, network)
    hyper_parameters: Any = module.hparams
    hyper_parameters[KEY] = {"at": at, "architecture": dict(architecture)}
    return network


def place_saved(module: nn.Module, hyper_parameters: Mapping[str, Any]) -> nn.Module | None:
    """Put the network that a checkpoint describes into a module; return it, or None if none is described.

    Args:
        module: A LightningModule, changed in place.
        hyper_parameters: Those of the checkpoint.

    Raises:
        FusionError: As `place`, or the description has another form.
    """
    described = hyper_parameters.get(KEY)
    if described is None:
        return None
    if not isinstance(described, dict) or {name: type(one) for name, one in described.items()} != _FORM:
        raise FusionError(f"Expected {KEY} of a checkpoint with `at` and `architecture`, got another; save it again")
    return place(module, **described)


def is_placed(module: nn.Module) -> bool:
    """Whether a module has a fused network."""
    return KEY in module.hparams  # type: ignore[operator]


def _written(kind: type) -> set[str]:
    """The methods that a class has from its users, and not from PyTorch or Lightning."""
    frameworks = ("torch.", "pytorch_lightning.", "lightning.", "lightning_fabric.")
    return {name for one in kind.__mro__ if not one.__module__.startswith(frameworks) for name in vars(one)}


def _remove_layers(module: nn.Module) -> None:
    """Remove what has parameters from a module; metrics and losses stay."""
    for name, child in list(module.named_children()):
        if any(True for _ in child.parameters()):
            delattr(module, name)
    for name, _ in list(module.named_parameters(recurse=False)):
        delattr(module, name)


def _forward_of_network(module: Any, *inputs: Any, **more: Any) -> Any:
    """The `forward` of a module that was a network itself."""
    return module.network(*inputs, **more)
