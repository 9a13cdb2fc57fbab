"""Checkpoints of the user's own LightningModule, fused into one of that class: `clafusion fuse --module`."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clafusion import Fusion, FusionOptions
from clafusion.errors import FusionError
from clafusion.formats.atomic import Writer
from clafusion.formats.files import check_saved
from clafusion.fusion.record import FusionRecord
from clafusion.lightning import LightningDataModule, Trainer
from clafusion.lightning_modules.checkpoints.modules import load_module, load_networks, name_of, source_of
from clafusion.lightning_modules.checkpoints.reading import holds_classifier, load_plain
from clafusion.lightning_modules.checkpoints.writing import checkpoint_of
from clafusion.lightning_modules.commands.naming import file_names
from clafusion.lightning_modules.commands.recording import Evaluate, described, record_fusion
from clafusion.lightning_modules.placing import find_network, place
from clafusion.lightning_modules.progress import Step
from clafusion.lightning_modules.samples import module_samples


@dataclass(frozen=True)
class ModuleFusion:
    """How checkpoints of one's own class are fused.

    Attributes:
        module: the class, as `package.Class`.
        network: the attribute path of what is fused inside it; None: found, see `find_network`.
        inputs: which part of a batch the network takes: a key or a place; None: found, see `inputs_of`.
    """

    module: str
    network: str | None
    inputs: str | None

    def run(
        self,
        trainer: Trainer,
        data: LightningDataModule,
        parents: list[str],
        options: FusionOptions,
        output: str,
        step: Step = lambda words: None,
    ) -> tuple[Writer, FusionRecord]:
        """Fuse, on training data of any data module.

        Args:
            trainer: Says on which device.
            data: Any data module.
            parents: Checkpoints of the class, of which the first one gives the hyperparameters of the result.
            options: How to fuse.
            output: The file that the caller is going to write; recorded.
            step: Called with what is done next.

        Returns:
            What writes a checkpoint of the class, and the record.

        Raises:
            FusionError: The class, a parent, the data or an option cannot be used.
        """
        kind, device = _imported(self.module), trainer.strategy.root_device
        step(f"fusing {len(parents)} networks")
        own = [parent for parent in parents if not holds_classifier(parent)]
        if not own:
            raise FusionError(f"Expected a checkpoint of {self.module} among the parents, got none; leave out --module")
        result: Any = load_module(own[0], kind)
        at = find_network(result, self.network)
        networks = load_networks(parents, kind, at)
        inputs = int(self.inputs) if self.inputs and self.inputs.isdecimal() else self.inputs
        batches = module_samples(data, trainer, inputs, options.num_samples, options.seed)
        fusion, record = fuse_parents(parents, networks, batches, options, device, data, output=output)
        taken = described(fusion)
        place(result, at, taken.architecture).load_state_dict(taken.state)
        name = load_plain(Path(own[0])).get("hparams_name", "kwargs")
        content = {**checkpoint_of(result), "hparams_name": name, "fusion": dict(record)}
        return lambda file: torch.save(content, file), record


def fuse_parents(
    parents: Sequence[str | nn.Module],
    networks: list[nn.Module],
    batches: list[Tensor],
    options: FusionOptions,
    device: torch.device,
    data: object,
    *,
    output: str | None = None,
    evaluate: Evaluate | None = None,
) -> tuple[Fusion, FusionRecord]:
    """Fuse the networks of parents as `record_fusion` does, if the result can be saved.

    Args:
        parents: What the networks came from, files or modules; recorded.
        networks: Moved to the device.
        batches: As for `record_fusion`; so are `options`, `device`, `data`, `output` and `evaluate`.
        options: How to fuse.
        device: Where to compute.
        data: The data module that the samples come from.
        output: The file that the caller is going to write.
        evaluate: Evaluates the parents and the result.

    Raises:
        FusionError: The parents, the samples and the options do not fit together.
    """
    paths = [name_of(parent) for parent in parents]
    names = file_names(paths)
    for name, network in zip(names, networks, strict=True):
        check_saved(network.to(device), torch.zeros_like(batches[0][:2], device=device), name)
    sources = [source_of(parent, name) for parent, name in zip(parents, names, strict=True)]
    together = dict(zip(names, networks, strict=True))
    options = options.for_parents(names, paths)
    return record_fusion(together, sources, batches, options, device, data, output=output, evaluate=evaluate)


def _imported(path: str) -> type[nn.Module]:
    """Return the class of a LightningModule by its path."""
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise FusionError(f"Expected package.Class for --module, got {path} ({error}); check the path") from error
    if not isinstance(kind, type) or not issubclass(kind, nn.Module) or not hasattr(kind, "training_step"):
        raise FusionError(f"Expected a LightningModule for --module, got {path}; choose another class")
    return kind
