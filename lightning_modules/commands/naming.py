"""What parents are called: in tables, messages, options, records, reports and loggers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

#: The names that other rows of the table have.
_TAKEN = ("ensemble", "gated ensemble", "naive average", "fused")


def file_names(paths: Sequence[str]) -> list[str]:
    """Return what to call each of several files: its name, with as many folders as tell it from the others.

    Args:
        paths: One per file; one that is given again gets a number.

    Example:
        >>> file_names(["runs/deep/best.ckpt", "runs/shallow/best.ckpt", "resnet34.ckpt"])
        ['deep/best.ckpt', 'shallow/best.ckpt', 'resnet34.ckpt']
        >>> file_names(["a.ckpt", "a.ckpt"])
        ['a.ckpt', 'a.ckpt (2)']
    """
    parts = {path: Path(path).absolute().parts for path in paths}
    folders = dict.fromkeys(parts, 0)
    while True:
        names = {path: "/".join(whole[-1 - folders[path] :]) for path, whole in parts.items()}
        shared = Counter([*_TAKEN, *names.values()])
        longer = [path for path, whole in parts.items() if shared[names[path]] > 1 and folders[path] + 1 < len(whole)]
        if not longer:
            break
        folders |= {path: folders[path] + 1 for path in longer}
    times = [paths[:place].count(path) + 1 for place, path in enumerate(paths)]
    return [names[path] if time == 1 else f"{names[path]} ({time})" for path, time in zip(paths, times, strict=True)]


def logged_names(names: Sequence[str]) -> list[str]:
    """Return the names by which loggers know networks: without the suffixes of files, unless those tell them apart.

    Example:
        >>> logged_names(["resnet34.ckpt", "shallow/best.ckpt", "fused"])
        ['resnet34', 'shallow/best', 'fused']
        >>> logged_names(["a.ckpt", "a.safetensors", "naive average"])
        ['a.ckpt', 'a.safetensors', 'naive_average']
    """
    plain = [name.replace(" ", "_") for name in names]
    short = [Path(name).with_suffix("").as_posix() for name in plain]
    return [one if short.count(one) == 1 else whole for one, whole in zip(short, plain, strict=True)]
