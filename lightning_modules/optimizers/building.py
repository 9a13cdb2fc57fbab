"""Optimizers and schedules of the learning rate, made from their descriptions."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from clafusion.errors import FusionError, first_line
from clafusion.lightning_modules.optimizers.descriptions import OPTIMIZER, SCHEDULE, Description, Kind, class_of

#: The errors of PyTorch for arguments that do not go together.
_FAILURES = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
#: The learning rate of the SGD that trains where no optimizer is named.
LR_OF_SGD = 0.1


@dataclass(frozen=True)
class Optimization:
    """The optimizer, its learning rate and the schedule of that.

    Attributes:
        optimizer: its description.
        lr: the learning rate that the schedule begins at.
        schedule: its description; None: the learning rate stays.
    """

    optimizer: Description
    lr: float
    schedule: Description | None

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> "Optimization":
        """Return what canonical hyperparameters say, also those of a checkpoint that knows only SGD and steps."""
        optimizer, schedule = recipe.get("optimizer"), recipe.get("lr_scheduler")
        if optimizer is None:
            optimizer = {"name": "SGD", **{name: recipe.get(name) for name in ("momentum", "weight_decay")}}
        if schedule is None and recipe.get("milestones"):
            schedule = {"name": "MultiStepLR", **{name: recipe.get(name) for name in ("milestones", "gamma")}}
        return cls(optimizer, recipe.get("lr", LR_OF_SGD), schedule)


def make_optimizer(description: Description, weights: Iterable[nn.Parameter], lr: float, fused: bool) -> Optimizer:
    """Return an optimizer of weights.

    Args:
        description: See the module.
        weights: What it changes.
        lr: Learning rate.
        fused: Update all weights in one kernel.

    Raises:
        FusionError: It does not take such arguments or such weights, or has no such kernel.
    """
    owner = _known_class(OPTIMIZER, description["name"])
    parameters = signature(owner).parameters
    if fused and "fused" not in parameters:
        raise FusionError(
            f"Expected an optimizer with one kernel for all weights, got {description['name']}; leave out fused"
        )
    own = {"lr": lr} if "lr" in parameters else {}
    made: Optimizer = _made(owner, description, list(weights), **own, **({"fused": True} if fused else {}))
    return made


def make_schedule(description: Description, optimizer: Optimizer) -> LRScheduler:
    """Return a schedule of an optimizer's learning rate.

    Raises:
        FusionError: It does not take such arguments or such an optimizer.
    """
    owner = _known_class(SCHEDULE, description["name"])
    arguments = {name: value for name, value in description.items() if name != "monitor"}
    schedule: LRScheduler = _made(owner, arguments, optimizer)
    return schedule


def rehearse(recipe: Optimization, weights: int = 1, epochs: int = 1) -> tuple[Optimizer, LRScheduler | None]:
    """Go through a training of that many epochs without learning anything.

    Args:
        recipe: How to train.
        weights: Number of weights in the optimizer.
        epochs: How often the schedule is stepped; one that follows a metric is not.

    Returns:
        The optimizer and the schedule as they are then.

    Raises:
        FusionError: They do not take such arguments, or cannot go on for so long.
    """
    blanks = [nn.Parameter(torch.zeros(1, 1)) for _ in range(weights)]
    made = make_optimizer(recipe.optimizer, blanks, recipe.lr, False)
    try:
        with warnings.catch_warnings():
            # Of schedules about their own last step, and before the first one of the optimizer.
            warnings.simplefilter("ignore")
            made.step(lambda: _no_loss(blanks))
            planned = None if recipe.schedule is None else make_schedule(recipe.schedule, made)
            if planned is not None and not isinstance(planned, ReduceLROnPlateau):
                for _ in range(epochs):
                    planned.step()
    except _FAILURES as error:
        if isinstance(error, FusionError):
            raise
        names = " and ".join(one["name"] for one in (recipe.optimizer, recipe.schedule) if one)
        raise FusionError(
            f"Expected {names} to last for {epochs} epochs, got {first_line(error)}; change the arguments"
        ) from error
    return made, planned


def _no_loss(weights: list[nn.Parameter]) -> float:
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    return 0.0


def _made(owner: Any, description: Description, *given: Any, **more: Any) -> Any:
    """Return an instance of a class; values are tuples where the class has tuples itself."""
    defaults = signature(owner).parameters
    arguments = {
        name: tuple(value) if isinstance(value, list) and isinstance(defaults[name].default, tuple) else value
        for name, value in description.items()
        if name != "name"
    }
    try:
        return owner(*given, **arguments, **more)
    except _FAILURES as error:
        raise FusionError(
            f"Expected {description['name']} to take the arguments {arguments | more}, got {first_line(error)}; "
            "change them"
        ) from error


def _known_class(kind: Kind, name: str) -> Any:
    owner = class_of(kind, name)
    if owner is None:
        raise FusionError(
            f"Expected {name}, a class of your own, got its name from a file; give --{kind.option} {name}"
        )
    return owner
