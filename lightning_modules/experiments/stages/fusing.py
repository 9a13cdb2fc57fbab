"""The stages that make networks of the parents without training: fusions and transfers."""

import time
import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

from clafusion import FusionOptions, map_units
from clafusion.alignment.layer_maps import align_stages
from clafusion.alignment.parents import template_of, trace_all, trace_as
from clafusion.balancing.correspondence import correspond
from clafusion.balancing.insertion import check_insertable
from clafusion.errors import FusionError
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.fuse import fuse_and_record
from clafusion.lightning_modules.commands.outputs import save_as
from clafusion.lightning_modules.commands.records import peak_memory, seeds, versions, write_results
from clafusion.lightning_modules.commands.transfer import Combine, TransferSettings
from clafusion.lightning_modules.compatibility import ImageData, load_alike
from clafusion.lightning_modules.distributed import on_rank_zero
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.stage_folder import slug
from clafusion.lightning_modules.experiments.stages.base import Draft, MakingResult, Network, Stage, files_of
from clafusion.lightning_modules.experiments.variants import cells, first_with
from clafusion.lightning_modules.progress import steps
from clafusion.naming import named_parents, parent_name
from clafusion.teachers.label_sets import union_of
from clafusion.tracing.structure import Structure

#: The options that a balanced network depends on.
_BALANCING = (
    *("layer_measure", "debiased", "pin_first", "pin_last", "mapping", "balance", "relu"),
    *("streams", "anchor", "many", "num_samples", "seed"),
)


@dataclass(frozen=True)
class FuseStage(Stage):
    """Fuse the parents, and keep the parents that balancing has changed as controls.

    Attributes:
        options: how to fuse.
        balanced: the parents whose balanced networks are kept.
        classes: per parent the labels that its outputs stand for; None: those of the data.
    """

    kind: ClassVar[str] = "fuse"
    options: FusionOptions
    balanced: list[str]
    classes: list[list[int]] | None = None

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["FuseStage"]:
        """Yield one stage for each variant; only the first of those that balance alike keeps its balanced networks.

        Raises:
            FusionError: The parents cannot be fused.
        """
        inputs, classes = files_of(draft.networks, draft.parents), draft.label_sets(draft.parents)
        variants = cells(draft.experiment.fusions)
        options = {variant: how.options.for_parents(list(draft.parents)) for variant, how in variants.items()}
        keeping = first_with({name: _balancing(options[name]) for name, how in variants.items() if how.balanced})
        structures: Sequence[Structure] = ()
        for variant in variants:
            try:
                with named_parents(list(draft.parents)):
                    # The random numbers that it draws are nobody's: every stage begins with a seed of its own.
                    structures = structures or _structures(draft, classes)
                    # Parents of different classes are balanced with outputs for all of them: that says nothing alone.
                    balanced = [] if classes else _changed(draft, structures, options[variant])
            except FusionError as error:
                raise FusionError(f"{error} (in experiment.fusions.{variant})") from error
            outputs = {f"fused {variant}": Network("fused.ckpt", "fused")}
            kept = balanced if variant in keeping else []
            for name in kept:
                word = f" {variant}" if keeping[variant] else ""
                outputs[f"balanced {name}{word}"] = Network(_balanced_file(name), "control")
            yield cls(variant, inputs, outputs, options[variant], kept, classes)

    def _run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> MakingResult:
        """Fuse, measure for the report, and write the networks with `fusion.json`."""
        strategy = context.trainer.strategy

        def compute() -> MakingResult:
            paths, data = [str(path) for path in inputs.values()], cast(ImageData, context.data)
            with steps(context.quiet) as step:
                device = strategy.root_device
                fusion, record = fuse_and_record(
                    paths, data, self.options, device, classes=self.classes, names=list(inputs),
                    report=context.report, step=step,
                )  # fmt: skip
            save_as(ImageClassifier(), fusion.model, record, folder / "fused.ckpt")
            for name in self.balanced:
                balanced = fusion.balanced_parent(list(inputs).index(name))
                save_as(ImageClassifier(), balanced, None, folder / _balanced_file(name))
            write_results(record, folder / "fusion.json")
            return {"seconds": record["seconds"], "peak_memory_bytes": record["peak_memory_bytes"]}

        return on_rank_zero(strategy, compute)


@dataclass(frozen=True)
class TransferStage(Stage):
    """Transfer one parent, the first input, into the architecture of another, the second.

    Attributes:
        combine: what becomes of the transferred network, as for `clafusion transfer --combine`.
        classifier: as for `clafusion.filter_transfer.transfer`, and so are those below.
        shortcuts: see `clafusion.filter_transfer.transfer`.
        reinitialize: see `clafusion.filter_transfer.transfer`.
        options: how to align layers, and how to fuse.
    """

    kind: ClassVar[str] = "transfer"
    combine: Combine
    classifier: bool
    shortcuts: bool
    reinitialize: bool
    options: FusionOptions

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["TransferStage"]:
        """Yield one stage for each variant.

        Raises:
            FusionError: A pair has layers that do not correspond.
        """
        parents, networks = list(draft.parents), draft.networks
        corresponding: set[tuple[str, str]] = set()
        for variant, transfer in cells(draft.experiment.transfers).items():
            source, target = transfer.source or parents[-1], transfer.target or parents[0]
            draft.check_all_classes((source, target), f"experiment.transfers.{variant}")
            try:
                # Pairs correspond in all variants or in none.
                if (source, target) not in corresponding:
                    map_units(draft.parents[source], draft.parents[target], "chain")
            except FusionError as error:
                raise FusionError(f"{error} (in experiment.transfers.{variant})") from error
            corresponding.add((source, target))
            outputs = {f"transferred {variant}": Network("transferred.ckpt", "transferred")}
            how = replace(transfer.how(), options=transfer.options.for_parents([target, source]))
            yield cls(variant, files_of(networks, (source, target)), outputs, **vars(how))

    def _run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> MakingResult:
        """Transfer, and write the network with `transfer.json`."""
        data, device = cast(ImageData, context.data), context.trainer.strategy.root_device
        how = TransferSettings(self.combine, self.classifier, self.shortcuts, self.reinitialize, self.options)

        def compute() -> MakingResult:
            source, target = load_alike([str(path) for path in inputs.values()], data, "source and target")
            batches = [batch.to(device) for batch in data.alignment_batches(how.options.num_samples, how.options.seed)]
            started = time.perf_counter()
            with steps(context.quiet) as step:
                step(f"transferring {self.subject}")
                made, summary = how.run(source.to(device), target.to(device), batches)
            cost: MakingResult = {
                "seconds": time.perf_counter() - started,
                "peak_memory_bytes": peak_memory(device),
            }
            record = {**self.settings, **summary, **cost, "seeds": seeds(how.options), "versions": versions()}
            save_as(ImageClassifier(), made["result"], record, folder / "transferred.ckpt")
            write_results(record, folder / "transfer.json")
            return cost

        return on_rank_zero(context.trainer.strategy, compute)


def _structures(draft: Draft, classes: list[list[int]] | None) -> list[Structure]:
    """Return the structures of the parents.

    Raises:
        FusionError: One cannot be traced, or their classes are not those of the data.
    """
    parents, count = list(draft.parents.values()), cast(ImageData, draft.data).num_classes
    if classes is None:
        return trace_all(parents, draft.blank_images)
    missing = sorted(set(range(count)) - set(union_of(classes)))
    if missing:
        raise FusionError(f"Expected a parent for every class of the data, got none for {missing[0]}; give label_sets")
    return [trace_as(parent, draft.blank_images, parent_name(number)) for number, parent in enumerate(parents)]


def _balanced_file(parent: str) -> str:
    return f"balanced_{slug(parent)}.ckpt"


def _balancing(options: FusionOptions) -> Hashable:
    """The settings that a balanced network depends on; in an iterative fusion these include the weights."""
    weights = options.weights if options.many == "iterative" else None
    return weights, *(getattr(options, name) for name in _BALANCING)


def _changed(draft: Draft, structures: Sequence[Structure], options: FusionOptions) -> list[str]:
    """Return the names of the parents that balancing changes.

    Raises:
        FusionError: The parents cannot be fused.

    Warns:
        UserWarning: One is left out, since the class of the template cannot have its widths.
    """
    template = template_of(structures, options)
    deep, network = structures[template], list(draft.parents.values())[template]
    found = []
    for number, (name, structure) in enumerate(zip(draft.parents, structures, strict=True)):
        if [len(stage) for stage in structure.stages] == [len(stage) for stage in deep.stages]:
            continue
        found.append(name)
        if options.balance == "merge":
            continue
        alignment = align_stages(deep, structure, (None,) * len(deep.stages), options)
        correspond(deep, structure, alignment, parent_name(number))
        try:
            check_insertable(network, deep, structure, alignment, draft.blank_images)
        except FusionError as error:
            warnings.warn(f"balanced {name} is left out: {error}", UserWarning, stacklevel=2)
            found.remove(name)
    return found
