"""From checkpoints to one fused network, with the record of how it came about."""

import os
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clafusion import Fusion, FusionOptions, fuse
from clafusion.errors import FusionError
from lightning_modules.checkpoints import load_parent, sha256
from lightning_modules.checks import ImageData, check_images
from lightning_modules.results import peak_memory, versions


@dataclass(frozen=True)
class Fused:
    """What `fuse_checkpoints` made; networks and samples are on the device that was asked for.

    Attributes:
        parents: as they were loaded.
        fusion: what `fuse` made of them.
        record: as plain containers the parents' checksums, the options, alignment, costs, seconds, memory, seeds and
            versions.
        batches: the samples that were measured on.
    """

    parents: list[nn.Module]
    fusion: Fusion
    record: dict[str, Any]
    batches: list[Tensor]


def fuse_checkpoints(paths: list[str], data: ImageData, options: FusionOptions, device: torch.device) -> Fused:
    """Fuses the networks of checkpoints.

    Args:
        paths: Two or more checkpoints of fit or fuse, or files of save_network.
        data: Unlabelled training images.
        options: How to fuse.
        device: Where to compute.

    Returns:
        The networks, the samples, and how it came about.

    Raises:
        FusionError: The parents, the data and the options do not fit together.
    """
    check_number(paths)
    networks = load_alike(paths, data, "parents")
    batches = list(data.alignment_batches(options.num_samples, options.seed))

    started = time.perf_counter()
    batches = [batch.to(device) for batch in batches]
    result = fuse([network.to(device) for network in networks], batches, options)
    record = {
        "parents": parents_of(paths),
        **result.summary(),
        "seconds": time.perf_counter() - started,
        "peak_memory_bytes": peak_memory(device),
        "seeds": seeds(options),
        "versions": versions(),
    }
    return Fused(networks, result, record, batches)


def check_number(paths: list[str]) -> None:
    """Refuses fewer than two parents.

    Raises:
        FusionError: There are fewer.
    """
    if len(paths) < 2:
        raise FusionError(f"Expected two or more parents, got {len(paths)}; name them, such as a.ckpt b.ckpt")


def parents_of(paths: list[str]) -> list[dict[str, str]]:
    """The parents' files with their checksums."""
    return [{"path": path, "sha256": sha256(path)} for path in paths]


def seeds(options: FusionOptions) -> dict[str, int]:
    """The seeds that a result depends on."""
    return {"fusion": options.seed, "global": int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))}


def load_alike(paths: list[str], data: ImageData, role: str) -> list[nn.Module]:
    """Loads networks, all of which take the data's images and tell the same number of classes apart.

    Args:
        paths: Checkpoints of fit or fuse, or files of save_network.
        data: What the networks will be run on.
        role: What to call them in the message, in the plural.

    Raises:
        FusionError: A file cannot be used, or a network does not fit the data or the others.

    Warns:
        UserWarning: The networks tell more classes apart than the data has.
    """
    networks = [load_parent(path) for path in paths]
    classes = [check_images(network, data, path) for path, network in zip(paths, networks, strict=True)]
    if len(set(classes)) > 1:
        found = ", ".join(f"{path}: {count}" for path, count in zip(paths, classes, strict=True))
        raise FusionError(f"Expected {role} with the same number of classes, got {found}; choose others")
    if classes[0] > data.num_classes:
        warnings.warn(
            f"Expected {role} with the {data.num_classes} classes of {type(data).__name__}, got {classes[0]}; their "
            "accuracies mean nothing if they were trained on other data", UserWarning, stacklevel=2,
        )  # fmt: skip
    return networks
