"""Fuse the parents."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from clafusion import FusionOptions
from clafusion.alignment.parents import template_of, trace_all
from clafusion.errors import FusionError
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.fuse import drawn, fuse_checkpoints
from clafusion.lightning_modules.commands.records import save_as, write_results
from clafusion.lightning_modules.compatibility import ImageData
from clafusion.lightning_modules.distributed import on_rank_zero
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.stage_folder import slug
from clafusion.lightning_modules.experiments.stages.base import Draft, MakingResult, Network, Stage, files_of
from clafusion.lightning_modules.experiments.variants import cells, first_with
from clafusion.lightning_modules.progress import steps
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
    """

    kind: ClassVar[str] = "fuse"
    options: FusionOptions
    balanced: list[str]

    @classmethod
    def plan(cls, draft: Draft) -> Iterator["FuseStage"]:
        """Yield one stage for each variant; only the first of those that balance alike keeps its balanced networks.

        Raises:
            FusionError: The parents cannot be fused.
        """
        inputs = files_of(draft.networks, draft.parents)
        variants = cells(draft.experiment.fusions)
        keeping = first_with({variant: _balancing(how.options) for variant, how in variants.items() if how.balanced})
        structures: Sequence[Structure] = ()
        for variant, how in variants.items():
            try:
                # The random numbers that it draws are nobody's: every stage begins with a seed of its own.
                structures = structures or trace_all(list(draft.parents.values()), draft.blank_images)
                balanced = _changed(list(draft.parents), structures, how.options)
            except FusionError as error:
                numbered = ", ".join(f"parent {number}: {name}" for number, name in enumerate(draft.parents))
                raise FusionError(f"{error} (in experiment.fusions.{variant}; {numbered})") from error
            outputs = {f"fused {variant}": Network("fused.ckpt", "fused")}
            kept = balanced if variant in keeping else []
            for name in kept:
                word = f" {variant}" if keeping[variant] else ""
                outputs[f"balanced {name}{word}"] = Network(_balanced_file(name), "control")
            yield cls(variant, inputs, outputs, how.options, kept)

    def run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> MakingResult:
        """Fuse, measure for the report, and write the networks with `fusion.json`."""
        strategy = context.trainer.strategy

        def compute() -> MakingResult:
            paths, data = [str(path) for path in inputs.values()], cast(ImageData, context.data)
            with steps(context.quiet) as step:
                step(f"fusing {len(paths)} networks")
                made = fuse_checkpoints(paths, data, self.options, strategy.root_device)
                step("measuring for the report")
                more = {"report": drawn(made, data)} if context.report else {}
            fusion, record = made.fusion, {**made.record, **more}
            save_as(ImageClassifier(), fusion.model, record, folder / "fused.ckpt")
            for name in self.balanced:
                balanced = fusion.balanced[list(inputs).index(name)]
                save_as(ImageClassifier(), balanced, None, folder / _balanced_file(name))
            write_results(record, folder / "fusion.json")
            return {"seconds": record["seconds"], "peak_memory_bytes": record["peak_memory_bytes"]}

        return on_rank_zero(strategy, compute)


def _balanced_file(parent: str) -> str:
    return f"balanced_{slug(parent)}.ckpt"


def _balancing(options: FusionOptions) -> Hashable:
    """What a balanced network depends on; one after another, parents are balanced with what the weights made."""
    weights = options.weights if options.many == "iterative" else None
    return weights, *(getattr(options, name) for name in _BALANCING)


def _changed(parents: Sequence[str], structures: Sequence[Structure], options: FusionOptions) -> list[str]:
    """Return the names of the parents that balancing changes."""
    template = template_of(structures, options)
    depths = [[len(stage) for stage in structure.stages] for structure in structures]
    return [name for name, depth in zip(parents, depths, strict=True) if depth != depths[template]]
