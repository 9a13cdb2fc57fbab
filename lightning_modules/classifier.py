"""The classifier that is trained, evaluated and fused: a network, its loss, its metrics and its optimizer."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy

from clafusion.errors import FusionError
from clafusion.formats.files import restore, snapshot
from clafusion.formats.stored import StoredNetwork
from clafusion.lightning_modules.checkpoints.reading import (
    PREFIX,
    class_names,
    not_finite,
    read_checkpoint,
    refuse_classes,
)
from clafusion.lightning_modules.compatibility import ImageData, check_images, label_places
from clafusion.lightning_modules.optimizers.building import Optimization
from clafusion.lightning_modules.optimizers.module import RecipeModule
from clafusion.lightning_modules.optimizers.recipes import canonical, go_on_with
from clafusion.teachers.label_sets import Label
from clafusion.tracing.example import with_input_shape
from clafusion.tracing.outputs import logits_in

Batch = tuple[Tensor, Tensor]


class MeanLoss(Metric):
    """The mean of a loss over images, from its means over batches; NaN if it ever was.

    For torchmetrics' `MeanMetric` to look for NaN, each step would have to wait for the GPU; told not to look, it
    ignores the weights.
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, loss: Tensor, count: int) -> None:
        """Add the mean loss of `count` images."""
        self.total += loss.to(self.total) * count
        self.count += count

    def compute(self) -> Tensor:
        """The mean over all images so far."""
        return self.total / self.count


class ImageClassifier(RecipeModule):
    """A network that classifies images, trained on the cross entropy by SGD or another optimizer of PyTorch.

    Logs, over whole epochs, `train_loss`, and `val_loss`, `val_acc`, `test_loss` and `test_acc` (exact on any number
    of processes). Its checkpoints hold the architecture as a plain dict, so they load without further arguments, and
    the names of the classes if the data has them: data with fewer classes, or in another order, is matched by name.

    Args:
        architecture: `{"name": "MLP", ...}` as for `clafusion.networks.build`, a published name such as
            `{"name": "resnet34_half"}`, or `{"class_path": "torchvision.models.resnet18", "init_args": {...}}`. None:
            the network comes from a checkpoint or from `set_network`.
        lr: Learning rate; None: 0.1, or with `optimizer` the one that its class has.
        momentum: Momentum of SGD, where no `optimizer` is given.
        weight_decay: Weight decay of SGD, where no `optimizer` is given.
        milestones: Epochs at which the learning rate is multiplied by `gamma`, where no `lr_scheduler` is given.
        gamma: See `milestones`.
        optimizer: A class of `torch.optim` with its arguments, `{"name": "AdamW", "lr": 0.001, "weight_decay": 0.05}`,
            or `{"class_path": ..., "init_args": {...}}`. Its `lr` wins over `lr`. On the command line: --optimizer.
        lr_scheduler: A class of `torch.optim.lr_scheduler`, given likewise and stepped after every epoch.
            `ReduceLROnPlateau` follows a `monitor`: `val_acc` (with mode `max`), `val_loss` or `train_loss`. On the
            command line: --lr_scheduler.
        warmup_epochs: Epochs, also a part of one, in which the learning rate rises in equal steps to what it is
            otherwise.
        label_smoothing: Share of the labels that is spread over all classes, in `[0, 1]`; in training only.
        channels_last: Lay images and weights out with the channels last: faster convolutions on GPUs.
        compile: Compile the network with `torch.compile` before it is used.
        fused: Let the optimizer update all weights in one kernel. Like `channels_last` and `compile` it belongs to a
            command, not to the network, and is not saved.

    Raises:
        FusionError: The architecture cannot be built or a number is out of range.

    Example:
        >>> classifier = ImageClassifier({"name": "MLP", "in_features": 64, "hidden": [32, 16], "num_classes": 10})
        >>> classifier(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """

    #: Which output stands for each class of the data, [classes of the data]; None: the one of its number.
    label_places: Tensor | None

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        lr: float | None = None,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        milestones: list[int] | None = None,
        gamma: float = 0.1,
        optimizer: dict[str, Any] | None = None,
        lr_scheduler: dict[str, Any] | None = None,
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.0,
        channels_last: bool = False,
        compile: bool = False,
        fused: bool = False,
    ) -> None:
        super().__init__()
        recipe = canonical(
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "milestones": milestones,
                "gamma": gamma,
                "optimizer": optimizer,
                "lr_scheduler": lr_scheduler,
                "warmup_epochs": warmup_epochs,
                "label_smoothing": label_smoothing,
            }
        )
        # What is logged and saved is canonical, never the class_path the user may have given.
        lr, milestones, optimizer, lr_scheduler = (
            recipe[name] for name in ("lr", "milestones", "optimizer", "lr_scheduler")
        )
        self._fused = recipe.pop("fused") or fused
        self.network = None if architecture is None else _build(architecture)
        self.lr: float = recipe["lr"]
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.milestones: list[int] = recipe["milestones"]
        self.gamma = gamma
        self.label_smoothing = label_smoothing
        self._channels_last = channels_last
        self._compiled = compile
        #: How this network was fused, as plain containers; it stays in every later checkpoint.
        self.fusion: dict[str, Any] | None = None
        #: What the outputs stand for, in their order, where that is known; it stays in every later checkpoint.
        self.class_names: list[Label] | None = None
        self.register_buffer("label_places", None, persistent=False)
        self._data: ImageData | None = None
        self.metrics = nn.ModuleDict(
            {
                f"{stage}_{name}": metric
                for stage in ("val", "test")
                for name, metric in (("loss", MeanLoss()), ("acc", MulticlassAccuracy(average="micro")))
            }
        )
        self.metrics["train_loss"] = MeanLoss()
        self._constants: dict[str, Tensor] = {}
        architecture = None if self.network is None else self._describe(self.network)
        self._saved = {"architecture": architecture, **recipe}
        self.save_hyperparameters(ignore=["channels_last", "compile", "fused"])
        # A subclass has arguments of its own, which Lightning has collected as they were given.
        self.hparams.update(self._saved)

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> "ImageClassifier":
        """Load a checkpoint as Lightning does, but always safely: nothing in the file is run.

        Args:
            checkpoint_path: A local file.
            *args: As for Lightning's method.
            **kwargs: As for Lightning's method; `weights_only` is always true.

        Raises:
            FusionError: The file cannot be used, see `read_checkpoint`.
        """
        read_checkpoint(checkpoint_path)
        return super().load_from_checkpoint(checkpoint_path, *args, **{**kwargs, "weights_only": True})

    def set_network(self, network: nn.Module) -> None:
        """Make `network` the one that is trained and saved.

        Raises:
            FusionError: The network cannot be described as plain data.
        """
        self.hparams["architecture"] = self._describe(network)
        self.network = network

    def describe_for(self, image_shape: Sequence[int]) -> None:
        """Describe a network of a foreign class anew if it was described for images of another shape."""
        architecture, shape = self.hparams["architecture"] or {}, list(image_shape)
        if architecture.get("input", shape) != shape and not isinstance(self.network, StoredNetwork):
            self.set_network(with_input_shape(self._network(), shape))

    def forward(self, images: Tensor) -> Tensor:
        """The logits `[N, classes]` of images `[N, C, H, W]`."""
        if self._channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return logits_in(self._network()(images))

    def setup(self, stage: str) -> None:
        """Check that the data fits the network, before anything is computed."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        # Nobody looks at labels while predicting.
        self._data = datamodule if stage != "predict" and hasattr(datamodule, "num_classes") else None
        if self.network is not None and hasattr(datamodule, "image_shape"):
            outputs = check_images(self.network, datamodule, "the network")
            self.describe_for(datamodule.image_shape)
            names = getattr(datamodule, "class_names", None)
            if stage == "fit" and self.class_names is None and names is not None and len(names) == outputs:
                self.class_names = list(names)
        if stage == "fit":
            self.check_length(self.trainer.max_epochs)
        self._find_labels()
        self._prepare()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The cross entropy of a batch."""
        images, labels = batch
        loss = cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        return self._learnt(loss, len(labels))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to `val_loss` and `val_acc`."""
        self._evaluate(batch, "val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add a batch to `test_loss` and `test_acc`."""
        self._evaluate(batch, "test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The class probabilities `[N, classes]` of a batch."""
        images, _ = batch
        probabilities: Tensor = self(images).softmax(dim=1)
        return probabilities

    def trained_weights(self) -> Iterator[nn.Parameter]:
        """The weights of the network."""
        return self._network().parameters()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add how the network was fused, if it was, and the names of the classes, if they are known.

        Raises:
            FusionError: The training has diverged; the checkpoint before is kept.
        """
        name = not_finite(checkpoint["state_dict"])
        if name is not None:
            raise FusionError(
                f"Expected finite weights to save, got NaN or infinity in {name.removeprefix(PREFIX)} after "
                f"{checkpoint['global_step']} steps: the training has diverged; lower the learning rate and begin anew"
            )
        constants = {f"{PREFIX}{name}": tensor.cpu() for name, tensor in self._constants.items()}
        checkpoint["state_dict"] = {**checkpoint["state_dict"], **constants}
        if self.fusion is not None:
            checkpoint["fusion"] = self.fusion
        if self.class_names is not None:
            checkpoint["class_names"] = self.class_names

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Build the network if there is none yet; let this module's recipe win over the checkpoint's."""
        saved = checkpoint.get("hyper_parameters", {})
        if "architecture" not in saved:
            raise FusionError("Expected a checkpoint of ImageClassifier, got one without architecture; choose another")
        refuse_classes(saved, "the checkpoint")
        if self.network is None:
            self.set_network(restore(saved["architecture"]))
            self._prepare()
        elif self.hparams["architecture"] != saved["architecture"]:
            raise FusionError(
                "Expected a checkpoint of the given architecture "
                f"{_in_words(self.hparams['architecture'])}, got one of {_in_words(saved['architecture'])}; leave out "
                "--model.architecture"
            )
        own = {f"{PREFIX}{name}" for name in self._constants}
        checkpoint["state_dict"] = {name: one for name, one in checkpoint["state_dict"].items() if name not in own}
        self.fusion = checkpoint.get("fusion")
        self.class_names = class_names(checkpoint, "the checkpoint") or self.class_names
        self._find_labels()
        for state in checkpoint.get("optimizer_states", []):
            for group in state["param_groups"]:
                if "fused" in group:
                    group["fused"] = self._fused or None
        go_on_with(self._optimization(), Optimization.of(saved), checkpoint)

    def _describe(self, network: nn.Module) -> dict[str, Any]:
        """Describe a network; keep the constants that its description needs and its own state dict leaves out."""
        taken, own = snapshot(network), network.state_dict()
        self._constants = {name: tensor for name, tensor in taken.state.items() if name not in own}
        return taken.architecture

    def _find_labels(self) -> None:
        """Find the outputs that stand for the classes of the data."""
        self.label_places = None
        if self._data is not None and self.class_names is not None:
            self.label_places = label_places(self._data, self.class_names, "the network")

    def _prepare(self) -> None:
        """Make the network as fast as was asked for, in place: the names of its weights stay as they are."""
        if self.network is not None and self._channels_last:
            self.network.to(memory_format=torch.channels_last)
        if self.network is not None and self._compiled:
            self.network.compile()

    def _learnt(self, loss: Tensor, count: int) -> Tensor:
        """Add the mean loss of `count` images to `train_loss` and return the loss."""
        mean = self._metric("train_loss")
        if mean.update_count == 0:
            # Once an epoch is enough, and half a millisecond cheaper in every other step.
            self.log("train_loss", mean, on_step=False, on_epoch=True, prog_bar=True)
        mean.update(loss.detach(), count)
        return loss

    def _evaluate(self, batch: Batch, stage: str) -> None:
        images, labels = batch
        logits = self(images)
        loss, accuracy = self._metric(f"{stage}_loss"), self._metric(f"{stage}_acc")
        loss.update(cross_entropy(logits, labels), len(labels))
        accuracy.update(logits, labels)
        self.log_dict({f"{stage}_loss": loss, f"{stage}_acc": accuracy}, on_epoch=True, prog_bar=stage == "val")

    def _metric(self, name: str) -> Metric:
        metric = self.metrics[name]
        assert isinstance(metric, Metric)
        return metric

    def _network(self) -> nn.Module:
        if self.network is None:
            raise FusionError("Expected a network, got none; give --model.architecture or --ckpt_path")
        return self.network


def _build(architecture: Mapping[str, Any]) -> nn.Module:
    """The network that an architecture of the user names."""
    if "class_path" not in architecture:
        return restore(architecture)
    path = architecture["class_path"]
    unknown = set(architecture) - {"class_path", "init_args"}
    if unknown or not isinstance(path, str) or "." not in path:
        raise FusionError(f"Expected an architecture with class_path 'package.Class' and init_args, got {architecture}")
    module, _, name = path.rpartition(".")
    try:
        network = getattr(importlib.import_module(module), name)(**architecture.get("init_args") or {})
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise FusionError(f"Expected a network to come from {path}: {error}; check class_path and init_args") from error
    if not isinstance(network, nn.Module):
        raise FusionError(f"Expected {path} to make a torch.nn.Module, got {type(network).__name__}; choose another")
    return network


def _in_words(architecture: Any) -> str:
    """An architecture in one line, however long its graph."""
    graph = isinstance(architecture, Mapping) and "nodes" in architecture
    return f"of {len(architecture['nodes'])} operations" if graph else str(architecture)
