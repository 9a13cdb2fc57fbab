"""Transfer one parent into the architecture of another."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

from clafusion import FusionOptions, map_units
from clafusion.errors import FusionError
from clafusion.lightning_modules.classifier import ImageClassifier
from clafusion.lightning_modules.commands.fuse import seeds
from clafusion.lightning_modules.commands.records import peak_memory, save_as, versions, write_results
from clafusion.lightning_modules.commands.transfer import Combine, Plan
from clafusion.lightning_modules.compatibility import ImageData, load_alike
from clafusion.lightning_modules.distributed import on_rank_zero
from clafusion.lightning_modules.experiments.context import RunContext
from clafusion.lightning_modules.experiments.stages.base import Draft, MakingResult, Network, Stage, files_of
from clafusion.lightning_modules.experiments.variants import cells
from clafusion.lightning_modules.progress import steps


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
            try:
                # Pairs correspond in all variants or in none.
                if (source, target) not in corresponding:
                    map_units(draft.parents[source], draft.parents[target], "chain")
            except FusionError as error:
                raise FusionError(f"{error} (in experiment.transfers.{variant})") from error
            corresponding.add((source, target))
            outputs = {f"transferred {variant}": Network("transferred.ckpt", "transferred")}
            yield cls(variant, files_of(networks, (source, target)), outputs, **vars(transfer.how()))

    def run(self, context: RunContext, folder: Path, inputs: Mapping[str, Path]) -> MakingResult:
        """Transfer, and write the network with `transfer.json`."""
        data, device = cast(ImageData, context.data), context.trainer.strategy.root_device
        how = Plan(self.combine, self.classifier, self.shortcuts, self.reinitialize, self.options)

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
