"""How a network is trained, as hyperparameters: checked, made canonical, and written over those of a checkpoint."""

from collections.abc import Mapping
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning_modules.optimizers.building import LR_OF_SGD, Optimization, rehearse
from clafusion.lightning_modules.optimizers.descriptions import OPTIMIZER, SCHEDULE, default_lr, describe


def canonical(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the hyperparameters of a training in the form in which they are saved.

    Args:
        recipe: The arguments of `ImageClassifier` of those names, as the user gave them.

    Returns:
        The same names, with plain values; the learning rate is in `lr` alone. `fused` says whether the description of
        the optimizer asked for that.

    Raises:
        FusionError: A number is out of range, or there is no such optimizer or schedule.
    """
    optimizer, schedule, lr = recipe["optimizer"], recipe["lr_scheduler"], recipe["lr"]
    fused = False
    if optimizer is not None:
        optimizer = describe(OPTIMIZER, optimizer)
        fused = bool(optimizer.pop("fused", False))
        lr = optimizer.pop("lr", lr)
        lr = default_lr(optimizer) if lr is None else lr
    schedule = None if schedule is None else describe(SCHEDULE, schedule)
    lr = LR_OF_SGD if lr is None else lr
    milestones = sorted(recipe["milestones"] or [])
    found = {**recipe, "lr": lr, "milestones": milestones, "optimizer": optimizer, "lr_scheduler": schedule}
    for name in ("lr", "momentum", "weight_decay", "gamma", "warmup_epochs"):
        # Written so that NaN is refused as well.
        if not 0 <= found[name] < float("inf"):
            raise FusionError(f"Expected {name} to be a finite number of at least 0, got {found[name]}; change {name}")
    if not 0 <= found["label_smoothing"] <= 1:
        raise FusionError(f"Expected label_smoothing in [0, 1], got {found['label_smoothing']}; change label_smoothing")
    # Classes of the user's own that come from a file are not known yet.
    if not any("." in one["name"] for one in (optimizer, schedule) if one is not None):
        rehearse(Optimization.of(found))
    return {**found, "fused": fused}


def go_on_with(recipe: Optimization, saved: Optimization, checkpoint: dict[str, Any]) -> None:
    """Write a recipe over the one in the states of optimizer and schedule, where they differ.

    The learning rate is that of an uninterrupted training with the new recipe; one that follows a metric begins anew.
    What the optimizer has gathered is kept, unless it was another optimizer.

    Args:
        recipe: How the training goes on.
        saved: How it was trained so far.
        checkpoint: Its states are replaced.

    Raises:
        FusionError: The schedule does not last for so many epochs.
    """
    states = checkpoint.get("optimizer_states", [])
    if recipe == saved or len(states) != 1 or len(states[0]["param_groups"]) != 1:
        return
    [group] = states[0]["param_groups"]
    optimizer, schedule = rehearse(recipe, len(group["params"]), _finished_epochs(checkpoint))
    state = optimizer.state_dict()
    state["state"] = states[0]["state"] if recipe.optimizer["name"] == saved.optimizer["name"] else {}
    checkpoint["optimizer_states"] = [state]
    checkpoint["lr_schedulers"] = [] if schedule is None else [schedule.state_dict()]


def _finished_epochs(checkpoint: Mapping[str, Any]) -> int:
    """Return the number of epochs whose batches have all been learned from."""
    progress = checkpoint.get("loops", {}).get("fit_loop", {}).get("epoch_loop.batch_progress", {})
    return int(checkpoint["epoch"]) + bool(progress.get("is_last_batch", False))
