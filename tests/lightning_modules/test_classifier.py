"""The classifier, its checkpoints and what is refused when they are read."""

import os
import re
from pathlib import Path

import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.nn.functional import cross_entropy

from clafusion import networks, save_network
from clafusion.datamodules import DigitsDataModule
from clafusion.errors import FusionError
from clafusion.lightning_modules import (
    FusionTrainer,
    ImageClassifier,
    LastCheckpoint,
    load_parent,
    read_checkpoint,
    save_checkpoint,
)
from clafusion.lightning_modules.classifier import MeanLoss
from clafusion.lightning_modules.compatibility import check_images

MLP = {"name": "MLP", "in_features": 64, "hidden": [12, 8], "num_classes": 10}


def make_trainer(folder: Path, **arguments) -> FusionTrainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return FusionTrainer(accelerator="cpu", default_root_dir=str(folder), **{**quiet, **arguments})


def make_classifier(**arguments) -> ImageClassifier:
    torch.manual_seed(0)
    return ImageClassifier(MLP, **arguments)


def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=100, eval_batch_size=100, limit_train=1000)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory) -> Path:
    """The folder of a short training with a schedule."""
    folder = tmp_path_factory.mktemp("fitted")
    torch.manual_seed(0)
    make_trainer(folder, max_epochs=2).fit(make_classifier(milestones=[1]), data())
    return folder


def test_the_training_loss_is_the_mean_over_all_images_of_an_epoch(tmp_path, monkeypatch):
    seen: list[list[tuple[float, int]]] = [[], []]
    kept = ImageClassifier.training_step

    def step(self, batch, batch_idx):
        loss = kept(self, batch, batch_idx)
        seen[self.current_epoch].append((float(loss.detach()), len(batch[1])))
        return loss

    monkeypatch.setattr(ImageClassifier, "training_step", step)
    make_trainer(tmp_path, max_epochs=2, logger=None, enable_checkpointing=False).fit(
        make_classifier(), DigitsDataModule(batch_size=300, limit_train=1000, split_seed=1)
    )
    lines = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    logged = [float(row["train_loss"]) for row in rows if row["train_loss"]]
    expected = [sum(loss * count for loss, count in epoch) / 1000 for epoch in seen]
    assert [count for _, count in seen[0]] == [300, 300, 300, 100]
    assert logged == pytest.approx(expected, rel=1e-6)


def test_a_loss_that_was_nan_once_is_nan():
    mean = MeanLoss()
    for loss in (1.0, float("nan"), 2.0):
        mean.update(torch.tensor(loss), 10)
    assert mean.compute().isnan()


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    save_checkpoint(make_classifier(), tmp_path / "a.ckpt")
    return tmp_path / "a.ckpt"


def rewrite(path: Path, change) -> Path:
    """Changes the content of a checkpoint in place."""
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)
    return path


class Bomb:
    """A pickle that touches a file when it is loaded."""

    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


# --- the module ---


def test_the_hyperparameters_hold_the_canonical_architecture():
    classifier = ImageClassifier(
        {"class_path": "clafusion.networks.MLP", "init_args": {k: MLP[k] for k in list(MLP)[1:]}}
    )
    assert classifier.hparams["architecture"] == networks.build(MLP).architecture
    assert "class_path" not in str(dict(classifier.hparams))


def test_a_torchvision_class_path_is_saved_as_plain_data(tmp_path):
    torch.manual_seed(0)
    path = {"class_path": "torchvision.models.resnet18", "init_args": {"num_classes": 3}}
    classifier = ImageClassifier(path).eval()
    save_checkpoint(classifier, tmp_path / "a.ckpt")
    assert "class_path" not in str(torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"])
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt").eval()(images), classifier(images))
    assert torch.equal(load_parent(tmp_path / "a.ckpt")(images), classifier(images))


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"class_path": "torchvision.models.no_such_net"}, "no_such_net"),
        ({"class_path": "no_such_package.Net"}, "no_such_package"),
        ({"class_path": "torch.nn.Linear", "init_args": {"wrong": 1}}, "wrong"),
        ({"class_path": "collections.Counter"}, "torch.nn.Module, got Counter"),
        ({"class_path": "torch.nn.Linear", "arguments": {}}, "class_path 'package.Class' and init_args"),
        ({"name": "NoSuchNet"}, "NoSuchNet"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(architecture, message):
    with pytest.raises(FusionError, match=re.escape(message)):
        ImageClassifier(architecture)


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay", "gamma"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
def test_recipes_out_of_range_are_refused(name, value):
    with pytest.raises(FusionError, match=f"Expected {name} to be"):
        ImageClassifier(MLP, **{name: value})


def test_milestones_multiply_the_learning_rate():
    [optimizer], [schedule] = make_classifier(lr=1.0, milestones=[2, 1], gamma=0.5).configure_optimizers()
    rates = []
    for _ in range(3):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 0.5, 0.25]


def test_metrics_are_exact_over_uneven_batches(tmp_path):
    classifier, digits = make_classifier(), DigitsDataModule(eval_batch_size=77)
    trainer = make_trainer(tmp_path)
    [tested] = trainer.test(classifier, digits, verbose=False)
    [validated] = trainer.validate(classifier, digits, verbose=False)
    for part, loader, logged in (
        ("test", digits.test_dataloader(), tested),
        ("val", digits.val_dataloader(), validated),
    ):
        batches = list(loader)
        assert len({len(labels) for _, labels in batches}) == 2
        images = torch.cat([digits.preprocess(images) for images, _ in batches])
        labels = torch.cat([labels for _, labels in batches])
        with torch.no_grad():
            logits = classifier.eval()(images)
        assert logged[f"{part}_acc"] == pytest.approx((logits.argmax(1) == labels).double().mean().item())
        assert logged[f"{part}_loss"] == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-5)


def test_predictions_are_probabilities(tmp_path):
    predictions = torch.cat(make_trainer(tmp_path).predict(make_classifier(), data()))
    assert predictions.shape == (data_size(), 10)
    assert torch.allclose(predictions.sum(1), torch.ones(len(predictions)))


def data_size() -> int:
    digits = data()
    digits.setup()
    return digits.test_size


def test_without_an_architecture_nothing_is_trained(tmp_path):
    with pytest.raises(FusionError, match="Expected a network, got none; give --model.architecture or --ckpt_path"):
        make_trainer(tmp_path, max_epochs=1).fit(ImageClassifier(), data())


def test_training_learns(fitted):
    [before] = make_trainer(fitted).test(make_classifier(), data(), verbose=False)
    [after] = make_trainer(fitted).test(load_classifier(fitted / "best.ckpt"), data(), verbose=False)
    assert after["test_acc"] > before["test_acc"] + 0.2


def load_classifier(path: Path) -> ImageClassifier:
    return ImageClassifier.load_from_checkpoint(path)


# --- checkpoints ---


def test_a_fitted_checkpoint_loads_alone_in_all_ways(fitted, tmp_path):
    images = torch.rand(4, 1, 8, 8)
    expected = load_parent(fitted / "last.ckpt")(images)
    assert torch.equal(load_classifier(fitted / "last.ckpt").eval()(images), expected)
    empty = ImageClassifier()
    make_trainer(fitted).test(empty, data(), ckpt_path=str(fitted / "last.ckpt"), verbose=False, weights_only=True)
    assert torch.equal(empty.eval()(images), expected)


def test_a_saved_classifier_starts_training_from_its_weights(checkpoint, tmp_path):
    start = load_parent(checkpoint).state_dict()
    for lr, same in ((0.0, True), (0.1, False)):
        classifier = ImageClassifier(MLP, lr=lr)
        trainer = make_trainer(tmp_path / str(lr), max_epochs=1)
        trainer.fit(classifier, data(), ckpt_path=str(checkpoint), weights_only=True)
        assert trainer.current_epoch == 1
        assert all(torch.equal(start[name], tensor) for name, tensor in classifier.network.state_dict().items()) == same


def test_provenance_survives_loading_and_training(checkpoint, tmp_path):
    classifier = load_classifier(checkpoint)
    classifier.fusion = {"parents": ["a", "b"]}
    save_checkpoint(classifier, checkpoint)
    assert load_classifier(checkpoint).fusion == {"parents": ["a", "b"]}
    make_trainer(tmp_path / "x", max_epochs=1).fit(
        make_classifier(), data(), ckpt_path=str(checkpoint), weights_only=True
    )
    assert read_checkpoint(tmp_path / "x" / "last.ckpt")["fusion"] == {"parents": ["a", "b"]}


def test_resuming_equals_not_stopping(fitted, tmp_path):
    whole, resumed = make_classifier(milestones=[1]), make_classifier(milestones=[1])
    torch.manual_seed(0)
    make_trainer(tmp_path / "a", max_epochs=3).fit(whole, data())
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="The dirpath has changed"):
        make_trainer(tmp_path / "b", max_epochs=3).fit(
            resumed, data(), ckpt_path=str(fitted / "last.ckpt"), weights_only=True
        )
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_new_recipe_wins_over_the_one_in_the_checkpoint(fitted):
    classifier = make_classifier(lr=0.5, momentum=0.3, weight_decay=0.01, milestones=[1, 9], gamma=0.5)
    trainer = make_trainer(fitted, max_epochs=3, enable_checkpointing=False)
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint"):
        trainer.fit(classifier, data(), ckpt_path=str(fitted / "last.ckpt"), weights_only=True)
    [group], schedule = trainer.optimizers[0].param_groups, trainer.lr_scheduler_configs[0].scheduler
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.25, 0.3, 0.01)
    assert (schedule.gamma, sorted(schedule.milestones), schedule.get_last_lr()) == (0.5, [1, 9], [0.25])


def test_another_architecture_than_the_checkpoints_is_refused(checkpoint, tmp_path):
    other = ImageClassifier({**MLP, "hidden": [12]})
    with pytest.raises(FusionError, match="leave out --model.architecture"):
        make_trainer(tmp_path).test(other, data(), ckpt_path=str(checkpoint), weights_only=True)


def test_parents_may_be_files_of_save_network(tmp_path):
    network = networks.build(MLP).eval()
    save_network(network, tmp_path / "a.safetensors")
    images = torch.rand(3, 1, 8, 8)
    assert torch.equal(load_parent(tmp_path / "a.safetensors")(images), network(images))


def test_parents_keep_their_dtype(tmp_path):
    save_checkpoint(make_classifier().double(), tmp_path / "a.ckpt")
    assert {tensor.dtype for tensor in load_parent(tmp_path / "a.ckpt").parameters()} == {torch.float64}


def test_saving_leaves_nothing_behind_when_it_fails(tmp_path):
    (tmp_path / "a.ckpt").mkdir()
    with pytest.raises(FusionError, match="Expected a file that can be written"):
        save_checkpoint(make_classifier(), tmp_path / "a.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_only_parents_may_be_files_of_save_network(tmp_path):
    save_network(networks.build(MLP), tmp_path / "a.safetensors")
    with pytest.raises(FusionError, match="with the content of save_network, which only fuse reads"):
        load_classifier(tmp_path / "a.safetensors")


def test_the_trainer_refuses_checkpoints_of_other_modules(tmp_path, checkpoint):
    rewrite(checkpoint, lambda content: content.pop("hyper_parameters"))
    with pytest.raises(FusionError, match="got one without architecture"):
        make_trainer(tmp_path).test(ImageClassifier(), data(), ckpt_path=str(checkpoint), weights_only=True)


# --- refused files ---


def test_missing_and_remote_files_are_refused(tmp_path):
    with pytest.raises(FusionError, match="none.ckpt, which is no file"):
        load_parent(tmp_path / "none.ckpt")
    with pytest.raises(FusionError, match="Expected a local file, got the address https://example.org/a.ckpt"):
        load_parent("https://example.org/a.ckpt")


@pytest.mark.parametrize("size", [0, 1, 100, -100])
def test_truncated_files_are_refused(checkpoint, size):
    checkpoint.write_bytes(checkpoint.read_bytes()[:size])
    with pytest.raises(FusionError, match="a.ckpt, which is truncated or damaged"):
        load_parent(checkpoint)


def test_other_files_are_refused(tmp_path):
    text = tmp_path / "a.ckpt"
    text.write_text("not a checkpoint at all\n")
    with pytest.raises(FusionError, match="truncated or damaged"):
        load_parent(text)
    torch.save(nn.Linear(2, 2).state_dict(), text)
    with pytest.raises(FusionError, match="Expected a checkpoint of ImageClassifier"):
        load_parent(text)
    torch.save([1, 2], text)
    with pytest.raises(FusionError, match="with a list"):
        load_parent(text)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("load", [load_parent, load_classifier])
def test_pickled_code_is_never_run(checkpoint, monkeypatch, tmp_path, load, zipped):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    content = torch.load(checkpoint, weights_only=True)
    content["callbacks"] = {"x": Bomb(tmp_path / "exploded")}
    torch.save(content, checkpoint, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FusionError, match="pickled objects, which were not run"):
        load(checkpoint)
    assert not (tmp_path / "exploded").exists()


def test_the_bomb_of_the_test_above_works(checkpoint, tmp_path):
    torch.save({"x": Bomb(tmp_path / "exploded")}, checkpoint)
    torch.load(checkpoint, weights_only=False)
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("load", [load_parent, load_classifier])
@pytest.mark.parametrize(
    "change",
    [
        lambda c: c["hyper_parameters"].update(architecture={"class_path": "os.mkdir", "init_args": {"path": "x"}}),
        lambda c: c["hyper_parameters"]["architecture"].update(bias={"class_path": "os.mkdir"}),
        lambda c: c["hyper_parameters"].update(_instantiator="pytorch_lightning.cli.instantiate_module"),
        lambda c: c["hyper_parameters"].update(milestones=[{"_class_path": "os.mkdir"}]),
        lambda c: c.update(hparams={"architecture": {"class_path": "os.mkdir"}}),
        lambda c: c.update(module_arguments={"_instantiator": "pytorch_lightning.cli.instantiate_module"}),
    ],
)
def test_checkpoints_that_name_classes_are_refused(checkpoint, monkeypatch, load, change):
    monkeypatch.setattr("importlib.import_module", lambda name: pytest.fail(f"imported {name}"))
    with pytest.raises(FusionError, match="Expected plain hyperparameters|format of an old Lightning version"):
        load(rewrite(checkpoint, change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state_dict"].pop("network.fc2.weight"), r"fc2.weight in .* to have shape \(8, 12\), got None"),
        (lambda c: c["state_dict"].update({"network.x": torch.ones(1)}), r"x in .* to have shape None, got \(1,\)"),
        (lambda c: c["hyper_parameters"]["architecture"].update(in_features=2**24), r"shape \(12, 16777216\)"),
        (lambda c: c["hyper_parameters"]["architecture"].update(name="Nothing"), "that can be built"),
        (lambda c: c["hyper_parameters"].pop("architecture"), "no architecture"),
        (lambda c: c.pop("state_dict"), "no state_dict"),
        (lambda c: c["state_dict"].update({"network.fc2.weight": 1}), "no state_dict"),
    ],
)
def test_checkpoints_that_do_not_fit_together_are_refused(checkpoint, change, message):
    with pytest.raises(FusionError, match=message):
        load_parent(rewrite(checkpoint, change))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_named(checkpoint, value):
    def spoil(content):
        content["state_dict"]["network.fc2.weight"][1, 2] = value

    with pytest.raises(FusionError, match="NaN or infinity in fc2.weight"):
        load_parent(rewrite(checkpoint, spoil))


# --- does the data fit? ---


def test_images_that_do_not_fit_are_refused_with_both_shapes(tmp_path):
    digits = data()
    with pytest.raises(FusionError, match="with 784 values, as the network takes, got 1x8x8 from DigitsDataModule"):
        make_trainer(tmp_path).test(ImageClassifier({**MLP, "in_features": 784}), digits)
    vgg = networks.build({"name": "VGG", "channels": [[4], [4]], "num_classes": 10})
    with pytest.raises(FusionError, match="with 3 channels .* got 1x8x8"):
        check_images(vgg, digits, "it")


def test_too_few_classes_are_refused():
    with pytest.raises(FusionError, match="at least 10 classes for DigitsDataModule, got .*4"):
        check_images(networks.build({**MLP, "num_classes": 4}), data(), "it")


def test_checking_leaves_the_network_alone():
    network = networks.build({**MLP, "batch_norm": True})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert check_images(network, data(), "it") == 10
    assert network.training and all(torch.equal(before[k], v) for k, v in network.state_dict().items())


# --- the trainer ---


def test_a_checkpoint_callback_of_the_user_takes_the_place_of_ours(tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    mine = ModelCheckpoint(tmp_path)
    best, last = make_trainer(tmp_path, callbacks=mine).checkpoint_callbacks
    assert best is mine and isinstance(last, LastCheckpoint)
    assert make_trainer(tmp_path, enable_checkpointing=False).checkpoint_callbacks == []
    assert make_trainer(tmp_path).checkpoint_callback.monitor == "val_acc"


def test_the_trainer_is_a_lightning_trainer(tmp_path):
    assert isinstance(
        make_trainer(tmp_path, barebones=True, logger=None, enable_progress_bar=None, enable_model_summary=None),
        Trainer,
    )


# --- how fast ---


@pytest.mark.parametrize("options", [{"channels_last": True}, {"compile": True}, {"fused": True}], ids=str)
def test_a_faster_network_is_the_same_network_in_its_checkpoints(tmp_path, options, monkeypatch):
    # "eager" compiles as far as it can be done without a C++ compiler.
    compiled = torch.compile
    calls = []
    monkeypatch.setattr(torch, "compile", lambda f, *a, **k: calls.append(1) or compiled(f, backend="eager"))
    # With fewer channels PyTorch 2.15 crashes in the backward pass of a strided 1x1 convolution in channels_last.
    resnet = {"name": "ResNet", "blocks": [1, 1], "width": 8, "num_classes": 10, "in_channels": 1}
    results = []
    for name, more in (("plain", {}), ("fast", options)):
        torch.manual_seed(0)
        classifier = ImageClassifier(resnet, lr=0.01, **more)
        torch.manual_seed(0)
        make_trainer(tmp_path / name, max_epochs=1, limit_train_batches=4).fit(classifier, data())
        results.append(read_checkpoint(tmp_path / name / "last.ckpt"))
    plain, fast = results
    assert plain["hyper_parameters"] == fast["hyper_parameters"] and bool(calls) == ("compile" in options)
    assert list(plain["state_dict"]) == list(fast["state_dict"])
    [group] = fast["optimizer_states"][0]["param_groups"]
    assert bool(group["fused"]) == ("fused" in options)
    for name, tensor in plain["state_dict"].items():
        assert torch.allclose(tensor, fast["state_dict"][name], atol=1e-4), name
    resumed = ImageClassifier(**options)
    trainer = make_trainer(tmp_path / "fast", max_epochs=1)
    trainer.test(resumed, data(), ckpt_path=str(tmp_path / "fast" / "last.ckpt"), verbose=False, weights_only=True)
    ImageClassifier(lr=0.01).on_load_checkpoint(fast)
    assert not group["fused"], "a training that goes on is as fast as its own command says"
    if "channels_last" in options:
        assert any(
            parameter.is_contiguous(memory_format=torch.channels_last) and not parameter.is_contiguous()
            for parameter in resumed.parameters()
            if parameter.ndim == 4
        )
