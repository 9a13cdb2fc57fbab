"""Distilling: the frozen teachers, where the student comes from, what is saved and what is refused."""

import os
from pathlib import Path

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from clafusion import Ensemble, FusionError, distillation_loss, networks, save_network
from clafusion.datamodules import DigitsDataModule
from clafusion.lightning_modules import (
    Distiller,
    FusionTrainer,
    ImageClassifier,
    load_parent,
    read_checkpoint,
    save_checkpoint,
)
from clafusion.teachers.teacher import Teacher

MLP = {"name": "MLP", "in_features": 64, "hidden": [12, 8], "num_classes": 10}
# The tests put teachers and results into one folder.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
RECIPE = {"lr": 0.05, "temperature": 4.0, "alpha": 0.7}


def make_trainer(folder: Path, **arguments) -> FusionTrainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "max_epochs": 1}
    return FusionTrainer(accelerator="cpu", default_root_dir=str(folder), **{**quiet, **arguments})


def data(**arguments) -> DigitsDataModule:
    return DigitsDataModule(batch_size=100, eval_batch_size=100, limit_train=300, **arguments)


def saved(path: Path, **architecture) -> Path:
    torch.manual_seed(1)
    save_checkpoint(ImageClassifier({**MLP, "dropout": 0.5, **architecture}), path)
    return path


def make(*teachers, **arguments) -> Distiller:
    torch.manual_seed(0)
    return Distiller([str(path) for path in teachers], **{**RECIPE, "architecture": MLP, **arguments})


@pytest.fixture
def teacher(tmp_path) -> Path:
    return saved(tmp_path / "teacher.ckpt")


class Spy(Distiller):
    """Notes the losses, and what it could wrongly do to its teachers."""

    def training_step(self, batch, batch_idx):
        self.train()
        [teacher] = self._teacher
        assert not any(module.training for module in teacher.modules())
        assert not any(parameter.requires_grad for parameter in teacher.parameters())
        self.seen = [*getattr(self, "seen", []), (batch, {k: v.clone() for k, v in self.network.state_dict().items()})]
        loss = super().training_step(batch, batch_idx)
        self.losses = [*getattr(self, "losses", []), loss.detach()]
        self.taught = (teacher,)
        return loss


# --- what is learnt, and from whom ---


@pytest.mark.parametrize("reduction", ["batchmean", "mean"])
@pytest.mark.parametrize("count", [1, 2])
def test_the_loss_is_that_of_the_library_with_the_frozen_teachers(mlp_checkpoints, tmp_path, teacher, count, reduction):
    paths = [teacher, mlp_checkpoints[0]][:count]
    torch.manual_seed(0)
    spy = Spy([str(path) for path in paths], architecture=MLP, reduction=reduction, **RECIPE)
    make_trainer(tmp_path).fit(spy, data())
    assert len(spy.losses) == 3
    # Dropout: only the eval mode gives these logits.
    teachers = [load_parent(path) for path in paths]
    expert = teachers[0] if count == 1 else Ensemble(teachers)
    student = networks.build(MLP)
    for ((images, labels), weights), loss in zip(spy.seen, spy.losses, strict=True):
        student.load_state_dict(weights)
        with torch.no_grad():
            expected = distillation_loss(student(images), expert(images), labels, 4.0, 0.7, reduction)
            assert torch.allclose(loss, expected, rtol=1e-5)
            assert not torch.allclose(loss, cross_entropy(student(images), labels), rtol=1e-2)
    for name, tensor in expert.state_dict().items():
        assert torch.equal(tensor, spy.taught[0].state_dict()[name])


def test_a_student_learns_from_the_teacher_alone(tmp_path):
    torch.manual_seed(0)
    expert = ImageClassifier(MLP, lr=0.1)
    make_trainer(tmp_path / "expert", max_epochs=20).fit(expert, data())
    [before] = make_trainer(tmp_path).test(make("x"), data(), verbose=False)
    distiller = make(tmp_path / "expert/last.ckpt", alpha=1.0, lr=0.02)
    make_trainer(tmp_path, max_epochs=10).fit(distiller, data())
    [after] = make_trainer(tmp_path).test(distiller, data(), verbose=False)
    assert after["test_acc"] > before["test_acc"] + 0.3


def test_teachers_come_from_save_network_too_and_in_any_precision(tmp_path):
    save_network(networks.build(MLP).double(), tmp_path / "teacher.safetensors")
    make_trainer(tmp_path).fit(make(tmp_path / "teacher.safetensors"), data())


def test_a_training_goes_on_with_the_teachers_it_began_with(tmp_path, teacher):
    make_trainer(tmp_path).fit(make(teacher), data())
    before, last = teacher.read_bytes(), str(tmp_path / "last.ckpt")
    assert len(read_checkpoint(last)["teachers_sha256"]) == 1
    saved(teacher, hidden=[4])
    with pytest.raises(FusionError, match="Expected the teachers that this training began with, got other ones in .*;"):
        make_trainer(tmp_path, max_epochs=2).fit(make(teacher), data(), ckpt_path=last, weights_only=True)
    teacher.write_bytes(before)
    make_trainer(tmp_path, max_epochs=2).fit(make(teacher), data(), ckpt_path=last, weights_only=True)


# --- teachers that know different things ---


def expert_of(path: Path, part: str) -> Path:
    """A teacher that is trained on half of the classes."""
    torch.manual_seed(0)
    split = {"kind": "labels", "labels": [0, 1, 2, 3, 4], "part": part}
    classifier = ImageClassifier(MLP, lr=0.1)
    make_trainer(path.parent / path.stem, max_epochs=10).fit(classifier, DigitsDataModule(batch_size=100, split=split))
    save_checkpoint(classifier, path)
    return path


@pytest.fixture(scope="module")
def experts(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("experts")
    return [expert_of(folder / f"{part}.ckpt", part) for part in "AB"]


def gated(paths: list[Path], kind: str = "gated", count: int = 150, **arguments) -> Ensemble:
    """The teacher that `Distiller` is to have."""
    samples = torch.cat(list(data().alignment_batches(count, 0)))
    return Ensemble([load_parent(path) for path in paths], space=kind, samples=samples, **arguments)


def target_of(distiller: Spy, images: torch.Tensor) -> torch.Tensor:
    [teacher] = distiller.taught
    return teacher(images)


def spied(folder: Path, paths: list[Path], epochs: int = 1, seed: int = 0, **arguments) -> Spy:
    torch.manual_seed(seed)
    given = {**RECIPE, "architecture": MLP, "num_samples": 150, **arguments}
    ckpt = given.pop("ckpt_path", None)
    spy = Spy([str(path) for path in paths], **given)
    make_trainer(folder, max_epochs=epochs).fit(spy, data(), ckpt_path=ckpt, weights_only=True)
    return spy


@pytest.mark.parametrize(("teacher", "temperature"), [("gated", 0.5), ("auto", 1.0)])
def test_the_target_is_what_the_gated_ensemble_says(tmp_path, experts, teacher, temperature):
    spy = spied(tmp_path, experts, teacher=teacher, gate_temperature=temperature)
    expert, plain = gated(experts, gate_temperature=temperature), Ensemble([load_parent(path) for path in experts])
    student = networks.build(MLP)
    for ((images, labels), weights), loss in zip(spy.seen, spy.losses, strict=True):
        student.load_state_dict(weights)
        with torch.no_grad():
            expected = distillation_loss(student(images), expert(images), labels, 4.0, 0.7)
            mean = distillation_loss(student(images), plain(images), labels, 4.0, 0.7)
        assert torch.allclose(loss, expected, rtol=1e-5) and not torch.allclose(loss, mean, rtol=1e-2)


def test_auto_is_the_mean_of_teachers_that_agree(tmp_path, experts):
    spy = spied(tmp_path, [experts[0], experts[0]], teacher="auto")
    assert spy.taught[0].teacher.gate is None


def test_the_gate_is_the_same_after_an_interruption_and_the_student_too(tmp_path, experts):
    whole = spied(tmp_path / "whole", experts, 2, teacher="gated")
    spied(tmp_path / "run", experts, 1, teacher="gated")
    resumed = spied(tmp_path / "run", experts, 2, seed=5, teacher="gated", ckpt_path=str(tmp_path / "run/last.ckpt"))
    one, two = (spy.taught[0].teacher.gate for spy in (whole, resumed))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)
    assert all(torch.equal(*pair) for pair in zip(one.means + one.deviations, two.means + two.deviations, strict=True))
    images = torch.rand(20, 1, 8, 8)
    assert torch.equal(target_of(whole, images), target_of(resumed, images))
    weights, others = whole.network.state_dict(), resumed.network.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in weights)


def test_every_rank_has_the_gate_of_the_first(tmp_path, experts, monkeypatch):
    first = gated([experts[1], experts[0]]).teacher

    def told(strategy, value, src=0):
        return first if isinstance(value, Teacher) else value

    monkeypatch.setattr(SingleDeviceStrategy, "broadcast", told)
    spy = spied(tmp_path, experts, teacher="gated")
    assert torch.equal(spy.taught[0].teacher.gate.weight, first.gate.weight)


def test_without_the_labels_these_have_no_influence(tmp_path, experts):
    class Mislabelled(DigitsDataModule):
        def read(self):
            train, test = super().read()
            return type(train)(train.images, (train.labels * 3 + 1) % 10), test

    students = []
    # The same images are held out: the classes only change their numbers.
    for kind in (DigitsDataModule, Mislabelled):
        torch.manual_seed(0)
        distiller = make(*experts, alpha=1.0, teacher="gated")
        make_trainer(tmp_path / kind.__name__).fit(distiller, kind(batch_size=100))
        students.append(distiller.network.state_dict())
    assert all(torch.equal(students[0][name], students[1][name]) for name in students[0])


def test_teachers_with_labels_of_their_own_teach_a_student_of_all(tmp_path):
    classes = [[0, 2, 4, 6], [1, 3, 5, 7, 8, 9]]
    paths = [saved(tmp_path / f"{len(own)}.ckpt", num_classes=len(own)) for own in classes]
    spy = spied(tmp_path / "run", paths, teacher="gated", classes=classes)
    images = torch.rand(20, 1, 8, 8)
    torch.testing.assert_close(target_of(spy, images), gated(paths, classes=classes)(images))
    assert read_checkpoint(tmp_path / "run/last.ckpt")["hyper_parameters"]["classes"] == classes
    for wrong, message in (
        ([[0, 2, 4], classes[1]], "Expected 4 classes for the outputs of parent 0"),
        ([[0, 2, 4, 1], [1, 3, 5, 7, 8, 9]], "got output of shape .9. from "),
        ([classes[0]], "Expected the classes of 2 teachers, got"),
    ):
        with pytest.raises(FusionError, match=message):
            make_trainer(tmp_path / "x").fit(make(*paths, classes=wrong), data())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"teacher": "best"}, "Expected teacher to be one of auto, mean, gated, got 'best'"),
        ({"gate_temperature": 0.0}, "Expected a positive gate_temperature, got 0.0"),
        ({"num_samples": 1}, "Expected num_samples of at least 2, got 1"),
    ],
)
def test_gates_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(FusionError, match=message):
        make("a.ckpt", **arguments)


def test_a_gate_needs_unlabelled_images(tmp_path, experts):
    loader = DataLoader([(torch.rand(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))], batch_size=None)
    with pytest.raises(FusionError, match="Expected a data module with alignment_batches to learn a gate from, got"):
        make_trainer(tmp_path).fit(make(*experts, teacher="gated"), loader, loader)


# --- where the student comes from ---


def test_a_student_from_a_file_begins_with_its_weights_and_its_history(tmp_path, teacher):
    start = load_parent(teacher)
    content = torch.load(teacher, weights_only=True)
    torch.save({**content, "fusion": {"parents": ["a", "b"]}}, tmp_path / "student.ckpt")
    distiller = make(teacher, student=str(tmp_path / "student.ckpt"), architecture=None, lr=0.0)
    make_trainer(tmp_path).fit(distiller, data())
    assert all(torch.equal(start.state_dict()[k], v) for k, v in distiller.network.state_dict().items())
    assert all(module.training for module in distiller.network.modules())
    trained = read_checkpoint(tmp_path / "last.ckpt")
    assert (
        trained["fusion"] == {"parents": ["a", "b"]} and trained["hyper_parameters"]["architecture"]["dropout"] == 0.5
    )


def test_resuming_equals_not_stopping_and_needs_no_file_of_the_student(tmp_path, teacher):
    student = saved(tmp_path / "student.ckpt", hidden=[9], dropout=0.0)

    def fit(folder, epochs, **arguments):
        torch.manual_seed(0)
        distiller = make(teacher, student=str(student), architecture=None)
        make_trainer(folder, max_epochs=epochs).fit(distiller, data(), weights_only=True, **arguments)
        return distiller.network.state_dict()

    whole = fit(tmp_path / "whole", 2)
    fit(tmp_path / "run", 1)
    student.unlink()
    resumed = fit(tmp_path / "run", 2, ckpt_path=str(tmp_path / "run/last.ckpt"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


# --- what is saved ---


def test_a_checkpoint_is_an_ordinary_one_without_the_teachers(tmp_path, teacher):
    distiller = make(teacher, milestones=[3, 2])
    make_trainer(tmp_path).fit(distiller, data())
    teacher.unlink()
    path = tmp_path / "last.ckpt"
    content = read_checkpoint(path)
    assert {name.partition(".")[0] for name in content["state_dict"]} == {"network"}
    assert content["hyper_parameters"]["teachers"] == [str(teacher)]
    assert content["hyper_parameters"]["milestones"] == [2, 3]
    images = torch.rand(4, 1, 8, 8)
    expected = load_parent(path)(images)
    for kind in (Distiller, ImageClassifier):
        loaded = kind.load_from_checkpoint(path).eval()
        assert torch.equal(loaded(images), expected)
        make_trainer(tmp_path).test(loaded, data(), ckpt_path=str(path), verbose=False, weights_only=True)
    assert loaded.hparams["lr"] == 0.05


def test_the_architecture_is_saved_as_plain_data(teacher):
    path = {"class_path": "clafusion.networks.MLP", "init_args": {k: MLP[k] for k in list(MLP)[1:]}}
    distiller = make(teacher, architecture=path)
    assert distiller.hparams["architecture"] == networks.build(MLP).architecture


def test_teachers_are_no_part_of_the_module(tmp_path, teacher):
    counted = {}

    class Counter(Distiller):
        def on_train_start(self):
            counted.update(parameters=len(list(self.parameters())), modules=list(self.modules()), mine=self._teacher)

    torch.manual_seed(0)
    distiller = Counter([str(teacher)], architecture=MLP, **RECIPE)
    make_trainer(tmp_path).fit(distiller, data())
    [taught] = counted["mine"]
    assert counted["parameters"] == len(list(networks.build(MLP).parameters()))
    assert isinstance(taught, nn.Module) and not any(taught is module for module in counted["modules"])
    assert distiller._teacher == ()


# --- what is refused ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0}, "Expected temperature to be a finite number above 0, got 0"),
        ({"temperature": float("nan")}, "temperature"),
        ({"alpha": 1.5}, r"Expected alpha in \[0, 1\], got 1.5"),
        ({"reduction": "sum"}, "Expected reduction batchmean or mean, got 'sum'"),
        ({"lr": -1.0}, "Expected lr to be"),
    ],
)
def test_settings_out_of_their_domain_are_refused(arguments, message):
    with pytest.raises(FusionError, match=message):
        make("a.ckpt", **arguments)


@pytest.mark.parametrize("teachers", [[], "a.ckpt"])
def test_without_a_list_of_teachers_nothing_is_distilled(teachers):
    with pytest.raises(FusionError, match="Expected a list of teachers"):
        Distiller(teachers)


@pytest.mark.filterwarnings("ignore:Expected teachers with the 10 classes of DigitsDataModule, got 12:UserWarning")
def test_unusable_teachers_are_refused_before_training(mlp_checkpoints, tmp_path, teacher):
    deep, _ = mlp_checkpoints
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(deep.read_bytes()[:3000])
    many = saved(tmp_path / "many.ckpt", num_classes=12)
    for teachers, message in (
        ([tmp_path / "none.ckpt"], "Expected a checkpoint, got .*none.ckpt, which is no file"),
        ([truncated], "truncated or damaged"),
        ([saved(tmp_path / "wide.ckpt", in_features=49)], "49 values, as .*wide.ckpt takes, got 1x8x8"),
        ([many], "Expected a teacher with the student's 10 classes, got 12 from .*many.ckpt"),
        ([teacher, many], "Expected teachers with the same number of classes"),
    ):
        with pytest.raises(FusionError, match=message):
            make_trainer(tmp_path / "run").fit(make(*teachers), data())
    assert not list((tmp_path / "run").rglob("*.ckpt"))


def test_a_teacher_of_other_classes_is_noticed_without_a_data_module_too(tmp_path):
    digits = data()
    digits.setup()
    batches = [(digits.preprocess(images), labels) for images, labels in digits.train_dataloader()]
    loader = DataLoader(batches, batch_size=None)
    with pytest.raises(FusionError, match="choose a teacher with the student's classes"):
        make_trainer(tmp_path).fit(make(saved(tmp_path / "many.ckpt", num_classes=12)), loader, loader)


def test_pickled_code_in_a_teacher_is_not_run(tmp_path, monkeypatch):
    class Bomb:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "exploded"),)

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.ckpt")
    for arguments in ({}, {"student": str(tmp_path / "bomb.ckpt"), "architecture": None}):
        with pytest.raises(FusionError, match="pickled objects, which were not run"):
            make_trainer(tmp_path / "run").fit(make(tmp_path / "bomb.ckpt", **arguments), data())
    assert not (tmp_path / "exploded").exists()


def test_a_student_has_one_origin(tmp_path, teacher):
    with pytest.raises(FusionError, match="Expected one origin of the student, got a network besides the file"):
        make_trainer(tmp_path).fit(make(teacher, student=str(teacher)), data())


def test_without_a_student_nothing_is_trained(tmp_path, teacher):
    with pytest.raises(FusionError, match="Expected a network, got none"):
        make_trainer(tmp_path).fit(make(teacher, architecture=None), data())
