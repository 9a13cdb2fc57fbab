"""LightningModules with a fused network in them, loaded again: the library's one door to its Lightning side."""

import os
from importlib import import_module
from typing import Any, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def load_from(path: str | os.PathLike[str], module: type[Module], **arguments: Any) -> Module:
    """Load a LightningModule with the fused network that its checkpoint describes in it.

    It is what `module.load_from_checkpoint(path)` is for others: the module is made with the hyperparameters of the
    checkpoint, whose weights it gets. Nothing in the file is run. Lightning is imported only here.

    Args:
        path: A local checkpoint, of a training that began with `FusionCallback`, or of any other of that class.
        module: The class.
        **arguments: Arguments of the class that the checkpoint does not hold, or others than it holds.

    Returns:
        The module on the CPU, in training mode.

    Raises:
        FusionError: The file is missing, damaged, or of another class, or needs pickled objects.

    Example:
        >>> # module = clafusion.load_from("last.ckpt", MyModule)
    """
    checkpoints = import_module("clafusion.lightning_modules.checkpoints.modules")
    loaded: Module = checkpoints.load_module(path, module, **arguments)
    return loaded
