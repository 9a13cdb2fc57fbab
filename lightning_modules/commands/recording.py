"""One fusion of loaded networks, with the record of how it was done, and its result as data."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from clafusion import Fusion, FusionOptions, fuse
from clafusion.formats.files import Snapshot, snapshot
from clafusion.fusion.record import FusionRecord, NetworkRow, ParentFile
from clafusion.lightning_modules.commands.records import circumstances, peak_memory, seeds, versions
from clafusion.naming import named_parents
from clafusion.teachers.label_sets import Label
from clafusion.tracing.example import example_of

#: Called with the parents by name and what became of them; returns the evaluations to record.
Evaluate = Callable[[Mapping[str, nn.Module], Fusion], list[NetworkRow]]


def record_fusion(
    parents: Mapping[str, nn.Module],
    files: list[ParentFile],
    batches: list[Tensor],
    options: FusionOptions,
    device: torch.device,
    data: object,
    *,
    classes: Sequence[Sequence[Label]] | None = None,
    output: str | None = None,
    rows: Sequence[NetworkRow] = (),
    evaluate: Evaluate | None = None,
    measure: Callable[[Fusion, list[Tensor]], dict[str, Any]] | None = None,
) -> tuple[Fusion, FusionRecord]:
    """Fuse networks, and record how.

    Args:
        parents: The networks by name; moved to the device.
        files: What they came from.
        batches: Unlabelled samples, as the networks get them.
        options: As for `fuse_and_record`; so are `device`, `classes`, `output` and `evaluate`.
        device: Where to compute.
        data: The data module that the samples come from; recorded.
        classes: Per parent the labels that its outputs stand for.
        output: The file that the caller is going to write.
        rows: Evaluations of the parents that are there already; recorded.
        evaluate: Evaluates the parents and the result.
        measure: Called with the fusion and the samples; returns what the report shows beyond the other figures.

    Returns:
        The fusion, whose networks are on the device, and its record.

    Raises:
        FusionError: The parents, the samples and the options do not fit together.
    """
    started = time.perf_counter()
    batches = [batch.to(device) for batch in batches]
    with named_parents(list(parents)):
        fusion = fuse([parent.to(device) for parent in parents.values()], batches, options, classes)
    cost = {"seconds": time.perf_counter() - started, "peak_memory_bytes": peak_memory(device)}
    # Before the networks are evaluated, which may move them to another device.
    measured = measure and measure(fusion, batches)
    record = {
        "output": output,
        "networks": evaluate and [*rows, *evaluate(parents, fusion)],
        "parents": files,
        **fusion.summary(),
        **cost,
        **circumstances(device, data),
        "seeds": seeds(options),
        "versions": versions(),
        "report": measured,
    }
    return fusion, cast(FusionRecord, {name: value for name, value in record.items() if value is not None})


def described(fusion: Fusion) -> Snapshot:
    """Return the fused network as data: in single precision, whatever the parents are saved in; tensors on the CPU."""
    example = example_of(fusion.structure.capture)[:1]
    taken = snapshot(fusion.model.float(), example.float() if example.is_floating_point() else example)
    return Snapshot(taken.architecture, {name: tensor.cpu() for name, tensor in taken.state.items()})
