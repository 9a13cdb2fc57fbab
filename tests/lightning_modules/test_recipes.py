"""Optimizers and schedules of PyTorch: trained as PyTorch itself does, interrupted and resumed, described, refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, seed_everything
from torch import nn
from torch.nn.functional import cross_entropy

from clafusion import distillation_loss
from clafusion.datamodules import DigitsDataModule
from clafusion.errors import FusionError
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, load_parent, read_checkpoint, save_checkpoint

# To go on in the same folder is the point.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

MLP = {"name": "MLP", "in_features": 64, "hidden": [8], "num_classes": 10}
EPOCHS, STEPS = 4, 12
COSINE = {"name": "CosineAnnealingLR", "T_max": EPOCHS}


class Interruption(Exception):
    pass


class Watch(Callback):
    """Notes batches and learning rates; ends the training before a batch, as a kill would."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.batches, self.rates = stop, [], []

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, number: int) -> None:
        if trainer.fit_loop.total_batch_idx == self.stop:
            raise Interruption
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        self.rates.append(optimizer.param_groups[0]["lr"])


def fit(folder: Path, recipe: dict[str, Any], stop: int | None = None, resume: bool = False, **trainer: Any) -> Watch:
    """Trains 3 batches an epoch, from the beginning or from last.ckpt."""
    seed_everything(3, verbose=False)
    watch = Watch(stop)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    runner = FusionTrainer(
        accelerator="cpu", devices=1, default_root_dir=str(folder), callbacks=[watch],
        **{"max_epochs": EPOCHS, "save_every_n_steps": 1, **quiet, **trainer},
    )  # fmt: skip
    path = str(folder / "last.ckpt") if resume else None
    data = DigitsDataModule(limit_train=40, batch_size=16)
    runner.fit(ImageClassifier(MLP, **recipe), data, ckpt_path=path, weights_only=True)
    return watch


def training(folder: Path) -> dict[str, Any]:
    """All that a training leaves behind that its recipe has a part in."""
    last = read_checkpoint(folder / "last.ckpt")
    [optimizer] = last["optimizer_states"]
    return {
        "weights": last["state_dict"],
        "state": optimizer["state"],
        "rates": (optimizer["param_groups"], last["lr_schedulers"]),
        "steps": (last["epoch"], last["global_step"]),
    }


def same(one: Any, two: Any) -> bool:
    """Whether two containers of tensors are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(two, torch.Tensor) and one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(value, two[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


OPTIMIZERS = (
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "Adagrad", "Adadelta", "Adafactor"),
    *("ASGD", "LBFGS"),
)
SCHEDULES = [
    {"name": "StepLR", "step_size": 2},
    {"name": "MultiStepLR", "milestones": [1, 3]},
    {"name": "ExponentialLR", "gamma": 0.5},
    COSINE,
    {"name": "CosineAnnealingWarmRestarts", "T_0": 2},
    {"name": "LinearLR", "total_iters": 3},
    {"name": "ConstantLR", "total_iters": 2},
    {"name": "PolynomialLR", "total_iters": 4},
    {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 4},
    {"name": "CyclicLR", "base_lr": 0.01, "max_lr": 0.1, "step_size_up": 2},
    {"name": "ReduceLROnPlateau", "monitor": "val_loss", "patience": 0, "threshold": 10.0},
    {"name": "ReduceLROnPlateau", "monitor": "train_loss", "patience": 0, "threshold": 10.0},
]


def families() -> Iterator[Any]:
    for name in OPTIMIZERS:
        yield pytest.param({"optimizer": {"name": name}, "warmup_epochs": 1.5}, id=name)
    for schedule in SCHEDULES:
        recipe = {"optimizer": {"name": "AdamW", "lr": 0.01}, "lr_scheduler": schedule}
        yield pytest.param(recipe, id=f"{schedule['name']}-{schedule.get('monitor', '')}")


@pytest.mark.parametrize("recipe", list(families()))
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, recipe):
    fit(tmp_path / "whole", recipe)
    for stop in (4, 6):
        with pytest.raises(Interruption):
            fit(tmp_path / "cut", recipe, stop, resume=stop > 4)
    fit(tmp_path / "cut", recipe, resume=True)
    assert same(training(tmp_path / "cut"), training(tmp_path / "whole"))


@pytest.mark.parametrize("every", [1, 2])
def test_a_schedule_that_follows_a_metric_lowers_the_rate_once_an_epoch_that_was_validated(tmp_path, every):
    schedule = {"name": "ReduceLROnPlateau", "monitor": "val_acc", "patience": 0, "threshold": 10.0, "factor": 0.5}
    watch = fit(tmp_path, {"lr": 0.1, "lr_scheduler": schedule}, check_val_every_n_epoch=every)
    found = [rate for rate, _ in zip(watch.rates[::3], range(EPOCHS), strict=True)]
    assert found == pytest.approx([0.1, 0.05, 0.025, 0.0125] if every == 1 else [0.1, 0.1, 0.05, 0.05])


def test_adamw_by_options_equals_pytorchs_own_loop(tmp_path):
    recipe = {
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "betas": [0.8, 0.9]}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.CosineAnnealingLR", "init_args": {"T_max": EPOCHS}},
        "label_smoothing": 0.1,
        "warmup_epochs": 2,
    }
    seed_everything(3, verbose=False)
    network = ImageClassifier(MLP).network.train()
    watch = fit(tmp_path, recipe)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01, betas=(0.8, 0.9))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=EPOCHS)
    for step, (images, labels) in enumerate(watch.batches):
        optimizer.zero_grad()
        cross_entropy(network(images), labels, label_smoothing=0.1).backward()
        [group] = optimizer.param_groups
        rate = group["lr"]
        group["lr"] = rate * min(1, (step + 1) / 6)
        optimizer.step()
        group["lr"] = rate
        if step % 3 == 2:
            schedule.step()
    assert len(watch.batches) == STEPS
    assert same(network.state_dict(), load_parent(tmp_path / "last.ckpt").state_dict())


def test_warming_up_takes_equal_steps_on_top_of_the_schedule(tmp_path):
    watch = fit(tmp_path, {"lr": 0.4, "milestones": [1], "gamma": 0.5, "warmup_epochs": 4 / 3})
    assert watch.rates[:5] == pytest.approx([0.1, 0.2, 0.3, 0.2, 0.2])
    watch = fit(tmp_path / "groups", {"lr": 0.4, "warmup_epochs": 1}, accumulate_grad_batches=2)
    assert watch.rates[:3] == pytest.approx([0.2, 0.4, 0.4])


def test_labels_are_smoothed_in_training_only():
    torch.manual_seed(0)
    classifier = ImageClassifier(MLP, label_smoothing=0.3)
    logits, labels = torch.randn(5, 10), torch.arange(5)
    classifier.network = nn.Identity()
    classifier.log = classifier.log_dict = lambda *_, **__: None
    assert torch.equal(
        classifier.training_step((logits, labels), 0), cross_entropy(logits, labels, label_smoothing=0.3)
    )
    classifier.validation_step((logits, labels), 0)
    assert classifier.metrics["val_loss"].compute().item() == pytest.approx(cross_entropy(logits, labels).item())
    loss = distillation_loss(logits, torch.zeros(5, 10), labels, 2.0, 0.0, label_smoothing=0.3)
    assert torch.equal(loss, cross_entropy(logits, labels, label_smoothing=0.3))


# --- what a checkpoint holds ---


def test_a_checkpoint_holds_plain_canonical_descriptions(tmp_path):
    init_args = {"lr": 0.01, "weight_decay": 0.05, "betas": (0.9, 0.999), "foreach": None, "fused": None}
    schedule = {"class_path": "pytorch_lightning.cli.ReduceLROnPlateau", "init_args": {"monitor": "val_acc"}}
    classifier = ImageClassifier(
        MLP, optimizer={"class_path": "torch.optim.AdamW", "init_args": init_args}, lr_scheduler=schedule
    )
    save_checkpoint(classifier, tmp_path / "a.ckpt")
    saved = read_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]
    assert saved["lr"] == 0.01 and saved["optimizer"] == {"name": "AdamW", "weight_decay": 0.05}
    assert saved["lr_scheduler"] == {"name": "ReduceLROnPlateau", "monitor": "val_acc"}
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt", lr=0.5)
    optimizer = loaded.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.AdamW
    assert [optimizer.param_groups[0][name] for name in ("lr", "weight_decay")] == [0.5, 0.05]


def test_a_checkpoint_of_before_loads_and_goes_on(tmp_path):
    fit(tmp_path, {"lr": 0.2, "milestones": [1]}, max_epochs=1)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    for name in ("optimizer", "lr_scheduler", "warmup_epochs", "label_smoothing"):
        del content["hyper_parameters"][name]
    torch.save(content, tmp_path / "last.ckpt")
    assert ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt").lr == 0.2
    fit(tmp_path, {"lr": 0.2, "milestones": [1]}, resume=True)
    fit(tmp_path / "whole", {"lr": 0.2, "milestones": [1]})
    assert same(training(tmp_path), training(tmp_path / "whole"))


class Mine(torch.optim.SGD):
    """An optimizer of the user's own."""


def test_a_class_of_ones_own_is_used_but_never_imported_because_a_file_names_it(tmp_path):
    path = f"{__name__}.Mine"
    classifier = ImageClassifier(MLP, optimizer={"class_path": path, "init_args": {"lr": 0.1}})
    assert type(classifier.configure_optimizers()) is Mine
    assert classifier.hparams["optimizer"]["name"] == path
    unknown = ImageClassifier(MLP, lr=0.1, optimizer={"name": "no_such_package.Mine"})
    with pytest.raises(
        FusionError, match="Expected no_such_package.Mine, a class of your own, got its name from a file"
    ):
        unknown.configure_optimizers()


# --- to go on with another recipe ---


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"lr": 0.1}, {"lr": 0.05}),
        ({"lr": 0.1}, {"optimizer": {"name": "AdamW", "lr": 0.01}, "lr_scheduler": COSINE}),
        ({"optimizer": {"name": "AdamW"}, "lr_scheduler": COSINE}, {"optimizer": {"name": "AdamW", "lr": 0.02}}),
        ({"lr": 0.1, "lr_scheduler": COSINE}, {"lr": 0.1, "lr_scheduler": {"name": "StepLR", "step_size": 1}}),
        ({"lr": 0.1, "milestones": [1]}, {"lr": 0.2, "milestones": [2, 3]}),
    ],
)
@pytest.mark.parametrize("stop", [6, 7])
def test_the_rates_are_those_of_the_new_recipe_from_then_on(tmp_path, before, after, stop):
    """After 2 epochs, or in the third: as if it had been the recipe from the beginning."""
    with pytest.raises(Interruption):
        fit(tmp_path, before, stop)
    resumed, whole = fit(tmp_path, after, resume=True), fit(tmp_path / "whole", after)
    assert resumed.rates == whole.rates[stop:]
    groups = [training(folder)["rates"][0][0] for folder in (tmp_path, tmp_path / "whole")]
    assert groups[0] == groups[1]


# --- refused ---


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"optimizer": {"name": "AdamX"}}, "a class of torch.optim, got AdamX; did you mean Adam? there are ASGD"),
        ({"optimizer": {"class_path": "torch.optim.AdamV"}}, "got torch.optim.AdamV; did you mean Adam"),
        ({"optimizer": {"class_path": "torch.nn.Linear"}}, "got torch.nn.Linear"),
        ({"optimizer": {"name": "AdamW", "weight_deca": 1}}, "got weight_deca; did you mean weight_decay?"),
        ({"optimizer": {"AdamW": 1}}, "Expected optimizer as {name: ..., arguments}, got {'AdamW': 1}"),
        ({"optimizer": {"name": "AdamW", "betas": [2, 2]}}, "Expected AdamW to take the arguments"),
        ({"optimizer": {"name": "SparseAdam"}}, "SparseAdam does not support dense gradients"),
        ({"optimizer": {"name": "AdamW", "lr": -1}}, "Expected lr to be a finite number of at least 0, got -1"),
        ({"lr_scheduler": {"name": "CosineAnnealing"}}, "did you mean CosineAnnealingLR?"),
        ({"lr_scheduler": {"name": "CosineAnnealingLR"}}, "Expected T_max for CosineAnnealingLR, got none"),
        ({"lr_scheduler": {"name": "CosineAnnealingLR", "T_max": 0}}, "Expected SGD and CosineAnnealingLR to last"),
        (
            {"lr_scheduler": {"name": "LambdaLR", "lr_lambda": abs}},
            "Expected plain values in lr_scheduler, got lr_lambda",
        ),
        ({"lr_scheduler": {"name": "ReduceLROnPlateau"}}, "Expected monitor for ReduceLROnPlateau, got none"),
        (
            {"lr_scheduler": {"name": "ReduceLROnPlateau", "monitor": "acc"}},
            "one of train_loss, val_loss, val_acc, got",
        ),
        ({"warmup_epochs": -1}, "Expected warmup_epochs to be a finite number of at least 0"),
        ({"label_smoothing": 1.5}, "Expected label_smoothing in [0, 1], got 1.5"),
    ],
)
def test_recipes_that_cannot_be_trained_by_are_refused(recipe, message):
    with pytest.raises(FusionError, match=re.escape(message)):
        ImageClassifier(MLP, **recipe)


def test_a_schedule_that_ends_before_the_training_is_refused(tmp_path):
    schedule = {"name": "OneCycleLR", "max_lr": 0.1, "total_steps": 2}
    with pytest.raises(
        FusionError, match="Expected SGD and OneCycleLR to last for 4 epochs, got Tried to step 3 times"
    ):
        fit(tmp_path, {"lr_scheduler": schedule})
    assert not list(tmp_path.iterdir())


def test_one_kernel_for_all_weights_is_refused_where_there_is_none():
    with pytest.raises(FusionError, match="one kernel for all weights, got Rprop; leave out fused"):
        ImageClassifier(MLP, optimizer={"name": "Rprop"}, fused=True).configure_optimizers()
