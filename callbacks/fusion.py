"""The callback that joins training phases: it fuses trained parents into the network that is trained next."""

import signal
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from clafusion import Fusion, FusionOptions, restore
from clafusion.callbacks.signals import HeldSignal
from clafusion.errors import FusionError
from clafusion.formats.files import snapshot
from clafusion.fusion.record import FusionRecord, NetworkRow, Role
from clafusion.lightning import Callback, LightningModule, Trainer, isolate_rng
from clafusion.lightning_modules import ImageClassifier
from clafusion.lightning_modules.commands.evaluation import side_by_side
from clafusion.lightning_modules.commands.figures import Pictures, has_board
from clafusion.lightning_modules.commands.fuse import fuse_and_record
from clafusion.lightning_modules.commands.naming import file_names, logged_names
from clafusion.lightning_modules.compatibility import ImageData, label_places, resumes_from
from clafusion.lightning_modules.distributed import on_rank_zero
from clafusion.lightning_modules.progress import Step, steps
from clafusion.report.pages import fusion_report


class FusionData(ImageData, Protocol):
    """The part of a data module that the callback needs: images to fuse on, and labelled ones to evaluate on."""

    def validation_batches(self) -> Iterable[tuple[Tensor, Tensor]]:
        """Return all validation images and labels, the same on every rank."""
        ...


class FusionCallback(Callback):
    """Fuses trained parents into the network of an `ImageClassifier` or `Distiller`, just before it is trained.

    `fit` begins with a module without a network; this callback gives it one. On several processes rank 0 fuses, on its
    device, and the others receive the result: it is the same everywhere, and the same as on one process. A training
    that is resumed has its network in its checkpoint: nothing is fused again, and the parents are not needed. SIGUSR1,
    by which a cluster announces the end of a job, is held while fusing.

    How it was done (the parents' checksums, options, alignment, costs, accuracies on the validation images) goes to the
    loggers (to TensorBoard also the pictures of which layers correspond and why) and into every checkpoint, as
    `fusion` and as this callback's state.

    Args:
        parents: Two or more checkpoints of fit or fuse, or files of save_network.
        options: The options of the method.

    Raises:
        FusionError: At the beginning of `fit`: a parent, the data or an option cannot be used, or the module has a
            network already.

    Example:
        >>> callback = FusionCallback(["deep.ckpt", "shallow.ckpt"], FusionOptions(num_samples=500))
        >>> trainer = Trainer(max_epochs=5, callbacks=[callback], logger=False, enable_checkpointing=False)
        >>> # trainer.fit(ImageClassifier(lr=0.01), DigitsDataModule())
    """

    def __init__(self, parents: list[str], options: FusionOptions = FusionOptions()) -> None:  # noqa: B008 (frozen)
        self.parents = [str(path) for path in parents]
        self.options = options
        #: How the network was fused, as plain containers; None before.
        self.record: FusionRecord | None = None
        self._signal = HeldSignal(getattr(signal, "SIGUSR1", None))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Fuse, before the strategy wraps the module."""
        if stage != "fit":
            return
        if not isinstance(pl_module, ImageClassifier):
            raise FusionError(
                f"Expected an ImageClassifier or a Distiller to fuse into, got {type(pl_module).__name__}; "
                "leave out FusionCallback"
            )
        if pl_module.network is not None or resumes_from(trainer) is not None:
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "alignment_batches") or not hasattr(datamodule, "validation_batches"):
            raise FusionError(
                f"Expected a data module with images to fuse on, got {type(datamodule).__name__}; "
                "pass one of datamodules to fit"
            )
        strategy = trainer.strategy
        # Random numbers that only rank 0 draws, and only when nothing is resumed, must not change what comes after.
        with self._signal, isolate_rng():
            # As quiet as the trainer, which has no bar of its own yet.
            with steps(trainer.progress_bar_callback is None or not trainer.is_global_zero) as step:
                architecture, weights, self.record = on_rank_zero(
                    strategy, lambda: self._fuse(datamodule, strategy.root_device, step)
                )
            network = restore(architecture)
            network.load_state_dict(weights)
        pl_module.set_network(network)
        pl_module.fusion = self.state_dict()
        pl_module.class_names = self.record["classes"] or None

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
        options = self.options.for_parents(file_names(self.parents), self.parents).to_dict()
        if options["anchor"] == "agreement":
            # What is saved is the parent that was chosen.
            del options["anchor"]
        changed = [f"options.{name}" for name in options if saved["options"].get(name) != options[name]]
        if [parent["path"] for parent in saved["parents"]] != self.parents:
            changed.insert(0, "parents")
        if changed:
            raise FusionError(
                f"Expected FusionCallback as this training began with it, got other {', '.join(changed)}; begin anew, "
                "or leave out FusionCallback to go on with the network as it was fused"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that had a network already; log the record of a fusion."""
        if resumes_from(trainer) is not None:
            return
        if self.record is None or getattr(pl_module, "fusion", None) != self.record:
            raise FusionError(
                "Expected a module without a network for FusionCallback to fuse into, got one with; leave out "
                "--model.architecture"
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

    def _fuse(
        self, data: FusionData, device: torch.device, step: Step
    ) -> tuple[dict[str, Any], dict[str, Tensor], FusionRecord]:
        """Return the architecture and the weights of the fused network, and the record."""
        fusion, record = fuse_and_record(
            self.parents, data, self.options, device, step=step,
            evaluate=lambda parents, fusion: _validated(parents, fusion, data, device),
        )  # fmt: skip
        # What is trained is in single precision, whatever the parents are saved in.
        taken = snapshot(fusion.model.float(), torch.zeros(1, *data.image_shape, device=device))
        return taken.architecture, {name: tensor.cpu() for name, tensor in taken.state.items()}, record


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
        network(images.to(device, like.dtype)).argmax(1).cpu() == (labels if places is None else places[labels])
        for images, labels in data.validation_batches()
    ]
    return torch.cat(right).double().mean().item() if right else None


def _measured(record: FusionRecord) -> dict[str, float]:
    """Return the record's numbers under the names that loggers know them by."""
    names = logged_names([row["name"] for row in record["networks"]])
    accuracies = {f"{name}/val_acc": row["val_acc"] for name, row in zip(names, record["networks"], strict=True)}
    found = {"fusion_seconds": record["seconds"], **accuracies}
    return {name: value for name, value in found.items() if value is not None}
