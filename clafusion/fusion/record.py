"""The schema of `fusion.json`: who writes a part of it and who reads it share these types."""

from typing import Any, Literal, TypedDict

from clafusion.teachers.label_sets import Label


class ParentFile(TypedDict):
    """The file of a parent, and its SHA-256 checksum."""

    path: str
    sha256: str


class NetworkRow(TypedDict, total=False):
    """A network and its accuracies, each from 0 to 1: on the test images or on the validation images."""

    name: str
    parameters: int
    test_acc: float
    val_acc: float | None


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


class FusionRecord(FusionSummary, total=False):
    """How a network was fused from files: the content of `fusion.json` and of a checkpoint's `fusion`.

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


class AlignmentRecord(TypedDict):
    """The content of `fusion.json` after `fuse --align_only`: which layers correspond, and nothing was fused."""

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
