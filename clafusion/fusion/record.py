"""The schema of a fusion's record, NAME.json beside NAME.ckpt: who writes and who reads it share these types."""

import math
from collections.abc import Mapping
from typing import Any, Literal, TypedDict, get_args

from clafusion.teachers.label_sets import Label

#: What a network is: one that was given, something to compare with, or the result.
Role = Literal["parent", "control", "fused"]


class _File(TypedDict):
    path: str
    sha256: str


class ParentFile(_File, total=False):
    """The file of a parent, its SHA-256 checksum, and what it is called, which files of earlier versions do not say."""

    name: str


class NetworkRow(TypedDict, total=False):
    """A network and its accuracies, each from 0 to 1: on the test images or on the validation images.

    `knows` is the number of classes that a parent tells apart, where the result tells more, and `known_images` that of
    the test images of these. Files of earlier versions have neither `role` nor `test_images`; there parents are called
    `parent 1`, `parent 2`, ...
    """

    name: str
    role: Role
    knows: int
    known_images: int
    parameters: int
    test_acc: float
    test_images: int
    val_acc: float | None


def parent_names(record: Mapping[str, Any]) -> list[str]:
    """Return what the parents of a record are called: in files of earlier versions by number, from 1 on.

    Example:
        >>> parent_names({"parents": [{"name": "deep.ckpt"}, {}], "alignments": [[], []]})
        ['deep.ckpt', 'parent 2']
    """
    files = record.get("parents") or [{}] * len(record["alignments"])
    return [str(file.get("name") or f"parent {number}") for number, file in enumerate(files, 1)]


def role_of(row: Mapping[str, Any]) -> str:
    """Return the role of a network, which in files of earlier versions only its name tells."""
    name = str(row["name"])
    known: str = row.get("role") or ("parent" if name.startswith("parent ") else name)
    return known if known in get_args(Role) else "control"


def shown_name(row: Mapping[str, Any], classes: int) -> str:
    """Return the name of a network, with how many of the classes it knows if it does not know all."""
    return f"{row['name']} (knows {row['knows']} of {classes} classes)" if "knows" in row else str(row["name"])


def standard_error(row: Mapping[str, Any]) -> float | None:
    r"""Return the standard error of a test accuracy p over n images; None where n is not known.

    .. math:: s = \sqrt{p (1 - p) / n}

    Example:
        >>> standard_error({"test_acc": 0.9, "test_images": 900})
        0.01
    """
    count = row.get("test_images")
    return round(math.sqrt(row["test_acc"] * (1 - row["test_acc"]) / count), 12) if count else None


def in_percent(row: Mapping[str, Any]) -> str:
    """Return a test accuracy in percent, with its standard error where that is known.

    Example:
        >>> in_percent({"test_acc": 0.9, "test_images": 900}), in_percent({"test_acc": 0.9})
        ('90.00% ± 1.00%', '90.00%')
    """
    error = standard_error(row)
    return f"{row['test_acc']:.2%}" + ("" if error is None else f" ± {error:.2%}")


class Circumstances(TypedDict, total=False):
    """When (UTC, ISO 8601), on which host and device, and on what data (class and arguments) a result was computed."""

    date: str
    host: str
    device: str
    data: dict[str, Any]


class FusionSummary(TypedDict):
    """What `Fusion.summary` returns.

    Of the labels that the outputs stand for to the parents' shares, `Fusion` says what they are; files of earlier
    versions lack them.
    """

    options: dict[str, Any]
    num_samples: int
    weights: list[float]
    template: int
    alignments: list[list[list[int]]]
    layer_costs: list[list[list[list[float]] | None]]
    transport_costs: list[dict[str, float]]
    parameters: int
    classes: list[Label]
    candidates: dict[str, float]
    chosen: str
    teacher: Literal["mean", "gated"] | None
    trust: list[float]


class FusionRecord(FusionSummary, Circumstances, total=False):
    """How a network was fused from files: the content of NAME.json and of a checkpoint's `fusion`.

    `output` and `networks` are there if the networks were evaluated, `report` if a page is drawn from the record.
    """

    output: str
    networks: list[NetworkRow]
    parents: list[ParentFile]
    seconds: float
    peak_memory_bytes: int
    seeds: dict[str, int]
    versions: dict[str, str]
    report: dict[str, Any]


class AlignmentRecord(Circumstances):
    """The content of NAME.json after `fuse --align_only`: which layers correspond, and nothing was fused."""

    parents: list[ParentFile]
    options: dict[str, Any]
    num_samples: int
    template: int
    units: list[list[list[str]]]
    alignments: list[list[list[int]]]
    layer_costs: list[list[list[list[float]]]]
    seconds: float
    seeds: dict[str, int]
    versions: dict[str, str]
