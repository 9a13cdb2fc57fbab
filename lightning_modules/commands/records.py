"""When, where, on what and with which versions: what every record holds besides its results; records as JSON."""

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch

from clafusion import FusionOptions
from clafusion.fusion.record import Circumstances, ParentFile
from clafusion.lightning_modules.files import sha256, write_text

PACKAGES = ("clafusion", "torch", "pytorch-lightning", "torchmetrics", "POT", "scipy", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a result depends on."""
    return {"python": platform.python_version(), **{package: version(package) for package in PACKAGES}}


def circumstances(device: torch.device, data: object) -> Circumstances:
    """Return when, where and on what data a result is computed.

    Args:
        device: That computes.
        data: A data module, whose arguments are those that it has saved as hyperparameters; None: there is none.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found: Circumstances = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "host": platform.node(),
        "device": f"{device} ({name})",
    }
    if data is not None:
        # What is not plain, such as a path or a function of the user's own, is kept in words.
        arguments = json.loads(json.dumps(dict(getattr(data, "hparams", {})), default=str))
        found["data"] = {"class_path": public_path(type(data)), "init_args": arguments}
    return found


def public_path(kind: type) -> str:
    """Return the shortest path by which a class can be imported from its package, or its module.

    Example:
        >>> from clafusion.lightning_modules import ImageClassifier
        >>> public_path(ImageClassifier)
        'clafusion.lightning_modules.ImageClassifier'
    """
    package = kind.__module__.rpartition(".")[0]
    short = getattr(sys.modules.get(package), kind.__name__, None) is kind
    return f"{package if short else kind.__module__}.{kind.__qualname__}"


def seeds(options: FusionOptions) -> dict[str, int]:
    """Return the seeds that a result depends on."""
    return {"fusion": options.seed, "global": int(os.environ.get("PL_GLOBAL_SEED", torch.initial_seed()))}


def parent_files(paths: Sequence[str], names: Sequence[str]) -> list[ParentFile]:
    """Return the files of parents with what they are called and their checksums."""
    return [{"name": name, "path": path, "sha256": sha256(path)} for name, path in zip(names, paths, strict=True)]


def peak_memory(device: torch.device) -> int:
    """Return the most bytes this process has held so far, or since `reset_peak_memory`.

    On the GPU if `device` is one, otherwise in main memory; 0 where the system does not count them (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` count from now on, where the system allows it (CUDA, Linux); else it goes on counting."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            # Linux: the high-water mark of this process becomes what it holds now.
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def as_json(results: Mapping[str, object]) -> str:
    """Return the results as JSON, for people to read as well."""
    return json.dumps(results, indent=2, allow_nan=False) + "\n"


def write_results(results: Mapping[str, object], path: str | os.PathLike[str]) -> None:
    """Write the results as JSON, whole or not at all.

    Raises:
        FusionError: The file cannot be written.
    """
    write_text(path, as_json(results))
