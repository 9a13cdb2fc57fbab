"""The callback that joins training phases: it fuses trained parents into the network that is trained next."""

import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from clafusion import Fusion, FusionOptions, restore
from clafusion.callbacks.signals import HeldSignal
from clafusion.errors import FusionError
from clafusion.fusion.record import FusionRecord, NetworkRow, Role
from clafusion.lightning import (
    Callback,
    LightningModule,
    Trainer,
    checkpoint_to_restore,
    content_to_restore,
    isolate_rng,
)
from clafusion.lightning_modules import ImageClassifier
from clafusion.lightning_modules.checkpoints.modules import load_networks, name_of
from clafusion.lightning_modules.commands.evaluation import side_by_side
from clafusion.lightning_modules.commands.figures import Pictures, has_board
from clafusion.lightning_modules.commands.fuse import fuse_and_record
from clafusion.lightning_modules.commands.fuse_modules import fuse_parents
from clafusion.lightning_modules.commands.naming import file_names, logged_names
from clafusion.lightning_modules.commands.recording import Evaluate, described
from clafusion.lightning_modules.compatibility import ImageData, label_places
from clafusion.lightning_modules.distributed import on_rank_zero
from clafusion.lightning_modules.placing import find_network, is_placed, place, place_saved
from clafusion.lightning_modules.progress import Step, steps
from clafusion.lightning_modules.samples import training_samples
from clafusion.report.pages import fusion_report
from clafusion.statistics.batches import Inputs
from clafusion.tracing.outputs import logits_in


class FusionData(ImageData, Protocol):
    """The part of a data module that the callback needs: images to fuse on, and labelled ones to evaluate on."""

    def validation_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return all validation images and labels, the same on every rank."""
        ...


class FusionCallback(Callback):
    """Fuses trained parents into the network of a LightningModule, just before it is trained.

    The module may be anyone's, and so may the data that `fit` is given: nothing of ours has to be implemented. A fused
    network takes the place of the one in the module, whose other layers, losses and metrics stay as they are. (An
    `ImageClassifier` or `Distiller` begins without a network and is given one.) On several processes rank 0 fuses, on
    its device, and the others receive the result: it is the same everywhere, and the same as on one process. A training
    that is resumed has its network in its checkpoint: nothing is fused again, and the parents are not needed. SIGUSR1,
    by which a cluster announces the end of a job, is held while fusing.

    The samples come from `alignment_batches(num_samples, seed)` of the data module if it has them, otherwise they are
    the first of the training data, in the order that `options.seed` gives them if the loader shuffles.

    How it was done (the parents' checksums, options, alignment, costs, and the accuracies if the data module has
    `validation_batches()`) goes to the loggers (to TensorBoard also the pictures of which layers correspond and why)
    and into every checkpoint, as this callback's state. The checkpoint's hyperparameters describe the fused network;
    `clafusion.load_from(checkpoint, Module)` makes the module with it again.

    Args:
        parents: Two or more checkpoints of the module's class, of fit or of fuse, files of save_network, or modules.
        options: The options of the method.
        network: The attribute path of what is fused inside the module, such as `net` or `model.backbone`. None:
            `network`, or the only child with parameters, or the module itself if it has several of them and a
            `forward`.
        inputs: Which part of a batch the network takes: a key, a place, or a function of the batch. None: the tensor,
            the first of a tuple, or in a dict `image`, `x` and the like, or its only floating-point tensor.

    Raises:
        FusionError: At the beginning of `fit`: a parent, the data or an option cannot be used, the network in the
            module cannot be found, or an `ImageClassifier` has one already.

    Example:
        >>> callback = FusionCallback(["deep.ckpt", "shallow.ckpt"], FusionOptions(num_samples=500))
        >>> trainer = Trainer(max_epochs=5, callbacks=[callback], logger=False, enable_checkpointing=False)
        >>> # trainer.fit(ImageClassifier(lr=0.01), DigitsDataModule())
    """

    def __init__(
        self,
        parents: Sequence[str | os.PathLike[str] | nn.Module],
        options: FusionOptions = FusionOptions(),  # noqa: B008 (it is frozen)
        network: str | None = None,
        inputs: Inputs = None,
    ) -> None:
        self.parents = [parent if isinstance(parent, nn.Module) else os.fspath(parent) for parent in parents]
        self.options = options
        self.network = network
        self.inputs = inputs
        #: How the network was fused, as plain containers; None before.
        self.record: FusionRecord | None = None
        self._fused: nn.Module | None = None
        self._signal = HeldSignal(getattr(signal, "SIGUSR1", None))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fuse, or put the network of the checkpoint to be restored in place, before the strategy wraps the module."""
        if checkpoint_to_restore(trainer) is not None:
            if not isinstance(pl_module, ImageClassifier):
                self._fused = place_saved(pl_module, content_to_restore(trainer).get("hyper_parameters", {}))
            return
        if stage != "fit" or self._has_network(pl_module):
            return
        at = find_network(pl_module, self.network)
        # Random numbers that only rank 0 draws, and only when nothing is resumed, must not change what comes after.
        with self._signal, isolate_rng():
            # As quiet as the trainer, which has no bar of its own yet.
            with steps(trainer.progress_bar_callback is None or not trainer.is_global_zero) as step:
                architecture, weights, self.record = on_rank_zero(
                    trainer.strategy, lambda: self._fuse(trainer, at, step)
                )
            self._fused = self._put(pl_module, at, architecture)
            self._fused.load_state_dict(weights)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume a training that began otherwise."""
        if trainer.state.fn != "fit":
            return
        saved = checkpoint.get("callbacks", {}).get(self.state_key)
        if saved is None:
            raise FusionError(
                "Expected a checkpoint of a training that began with FusionCallback, got another; leave out "
                "FusionCallback to go on from it"
            )
        paths = [name_of(parent) for parent in self.parents]
        options = self.options.for_parents(file_names(paths), paths).to_dict()
        if options["anchor"] == "agreement":
            # What is saved is the parent that was chosen.
            del options["anchor"]
        changed = [f"options.{name}" for name in options if saved["options"].get(name) != options[name]]
        if [parent["path"] for parent in saved["parents"]] != paths:
            changed.insert(0, "parents")
        if changed:
            raise FusionError(
                f"Expected FusionCallback as this training began with it, got other {', '.join(changed)}; begin anew, "
                "or leave out FusionCallback to go on with the network as it was fused"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that had a network already; log the record of a fusion."""
        if checkpoint_to_restore(trainer) is not None:
            return
        if self.record is None or not self._is_fused(pl_module):
            raise FusionError(
                "Expected a module without a network for FusionCallback to fuse into, got one with; leave out "
                "--model.architecture, or what replaces the fused network in setup or configure_model"
            )
        names = ("parents", "options", "weights", "alignments", "num_samples")
        settings = {name: value for name, value in self.record.items() if name in names}
        for logger in trainer.loggers:
            logger.log_hyperparams({"fusion": settings})
            logger.log_metrics(_measured(self.record), step=0)
        if trainer.is_global_zero and has_board(trainer.loggers):
            # The report's table is about test images, which nobody has looked at yet.
            shown = {name: value for name, value in self.record.items() if name != "networks"}
            Pictures.of(fusion_report(shown).figures).log(trainer.loggers)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Deliver a signal that arrived while fusing: now there are handlers."""
        self._signal.deliver()

    def state_dict(self) -> dict[str, Any]:
        """Return how the network was fused, as plain containers."""
        return dict(self.record or {})

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over how the network was fused."""
        self.record = cast(FusionRecord, state_dict)

    def _has_network(self, module: LightningModule) -> bool:
        """Whether a module has the network that it is to be trained with: one that was fused, here or before."""
        if isinstance(module, ImageClassifier):
            return module.network is not None
        return self.record is not None and is_placed(module)

    def _is_fused(self, module: LightningModule) -> bool:
        """Whether a module has the network that this callback has given it."""
        if isinstance(module, ImageClassifier):
            return module.fusion == self.record
        return any(one is self._fused for one in module.modules())

    def _put(self, module: LightningModule, at: str, architecture: Mapping[str, Any]) -> nn.Module:
        """Put the fused network into a module, with its record if it is one of ours; return the network."""
        if not isinstance(module, ImageClassifier):
            return place(module, at, architecture)
        assert self.record is not None
        network = restore(architecture)
        module.set_network(network)
        module.fusion = self.state_dict()
        module.class_names = self.record["classes"] or None
        return network

    def _fuse(self, trainer: Trainer, at: str, step: Step) -> tuple[dict[str, Any], dict[str, Tensor], FusionRecord]:
        """Return the architecture and the weights of the fused network, and the record."""
        device = trainer.strategy.root_device
        data: Any = getattr(trainer, "datamodule", None)

        def evaluate(parents: Mapping[str, nn.Module], fusion: Fusion) -> list[NetworkRow]:
            return _validated(parents, fusion, data, device)

        evaluated = evaluate if hasattr(data, "validation_batches") else None
        paths = [parent for parent in self.parents if isinstance(parent, str)]
        ours = isinstance(trainer.lightning_module, ImageClassifier) and hasattr(data, "alignment_batches")
        if ours and len(paths) == len(self.parents):
            fusion, record = fuse_and_record(paths, data, self.options, device, step=step, evaluate=evaluated)
        else:
            fusion, record = self._fuse_any(trainer, at, step, evaluated)
        taken = described(fusion)
        return taken.architecture, taken.state, record

    def _fuse_any(
        self, trainer: Trainer, at: str, step: Step, evaluate: Evaluate | None
    ) -> tuple[Fusion, FusionRecord]:
        """Fuse parents of any kind on whatever `fit` was given."""
        options, device = self.options, trainer.strategy.root_device
        step(f"fusing {len(self.parents)} networks")
        networks = load_networks(self.parents, type(trainer.lightning_module), at)
        data: Any = getattr(trainer, "datamodule", None)
        if hasattr(data, "alignment_batches"):
            batches = list(data.alignment_batches(options.num_samples, options.seed))
        else:
            batches = training_samples(trainer, self.inputs, options.num_samples, options.seed)
        return fuse_parents(self.parents, networks, batches, options, device, data, evaluate=evaluate)


def _validated(
    parents: Mapping[str, nn.Module], fusion: Fusion, data: FusionData, device: torch.device
) -> list[NetworkRow]:
    """Return the validation accuracies of the parents and of the fused network, which comes last."""
    places = label_places(data, fusion.classes, "the network") if fusion.classes else None
    roles: dict[Role, dict[str, nn.Module]] = {
        "parent": side_by_side(parents, fusion),
        "fused": {"fused": fusion.model},
    }
    return [
        {
            "name": name,
            "role": role,
            "parameters": sum(parameter.numel() for parameter in network.parameters()),
            "val_acc": _accuracy(network.to(device), data, device, places),
        }
        for role, networks in roles.items()
        for name, network in networks.items()
    ]


@torch.no_grad()
def _accuracy(network: nn.Module, data: FusionData, device: torch.device, places: Tensor | None) -> float | None:
    """Return the share of the validation images that a network gets right; None without any."""
    like = next(network.parameters())
    right = [
        logits_in(network(images.to(device, like.dtype))).argmax(1).cpu()
        == (labels if places is None else places[labels])
        for images, labels in data.validation_batches()
    ]
    return torch.cat(right).double().mean().item() if right else None


def _measured(record: FusionRecord) -> dict[str, float]:
    """Return the record's numbers under the names that loggers know them by."""
    rows = record.get("networks", [])
    names = logged_names([row["name"] for row in rows])
    accuracies = {f"{name}/val_acc": row["val_acc"] for name, row in zip(names, rows, strict=True)}
    found = {"fusion_seconds": record["seconds"], **accuracies}
    return {name: value for name, value in found.items() if value is not None}
