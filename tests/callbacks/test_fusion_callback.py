"""Fusing at the beginning of a training: what is trained, recorded and resumed, and what is refused."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pytorch_lightning import Callback, Trainer

import clafusion.callbacks.fusion
from clafusion import FusionError, FusionOptions, describe, fuse
from clafusion.callbacks import FusionCallback
from clafusion.callbacks.signals import HeldSignal
from clafusion.datamodules import DigitsDataModule
from clafusion.lightning_modules import (
    Distiller,
    FusionTrainer,
    ImageClassifier,
    load_parent,
    read_checkpoint,
    save_checkpoint,
)
from clafusion.lightning_modules.commandline import cli
from tests.helpers import ROOT

MLP = {"name": "MLP", "in_features": 64, "hidden": [12, 8], "num_classes": 10}
OPTIONS = FusionOptions(num_samples=80)
QUIET = {"enable_progress_bar": False, "enable_model_summary": False}
# The tests put parents and results into one folder, and resume in another one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create the checkpoint"),
]


def fit(folder, parents, module=None, *, epochs=1, options=OPTIONS, more=(), digits=None, **arguments) -> FusionTrainer:
    """Trains what the callback fuses; `last.ckpt` is in the folder then."""
    torch.manual_seed(0)
    parents = [str(path) for path in parents]
    trainer = FusionTrainer(
        accelerator="cpu",
        default_root_dir=str(folder),
        max_epochs=epochs,
        callbacks=[FusionCallback(parents, options), *more],
        logger=arguments.pop("logger", False),
        **QUIET,
    )
    trainer.fit(module or ImageClassifier(lr=0.05), digits or data(), weights_only=True, **arguments)
    return trainer


def data(**arguments) -> DigitsDataModule:
    return DigitsDataModule(batch_size=100, eval_batch_size=100, limit_train=300, **arguments)


def fused(parents, digits=None) -> torch.nn.Module:
    """What the library makes of the parents."""
    return fuse([load_parent(path) for path in parents], (digits or data()).alignment_batches(80, 0), OPTIONS).model


def same(one, other) -> bool:
    one, other = (model.state_dict() if isinstance(model, torch.nn.Module) else model for model in (one, other))
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class AtStart(Callback):
    """Notes what is about to be trained."""

    def on_train_start(self, trainer, pl_module):
        self.network = {name: tensor.clone() for name, tensor in pl_module.network.state_dict().items()}
        self.training = all(module.training for module in pl_module.network.modules())


# --- what is trained ---


@pytest.mark.parametrize("kind", ["ImageClassifier", "Distiller"])
def test_the_fused_network_is_what_is_trained(mlp_checkpoints, tmp_path, kind):
    teachers = [str(path) for path in mlp_checkpoints]
    module = ImageClassifier(lr=0.05) if kind == "ImageClassifier" else Distiller(teachers, lr=0.05)
    start = AtStart()
    fit(tmp_path, mlp_checkpoints, module, more=[start])
    expected = fused(mlp_checkpoints)
    assert same(start.network, expected) and start.training
    assert module.hparams["architecture"] == describe(expected)
    assert not same(module.network, expected)
    assert same(load_parent(tmp_path / "last.ckpt"), module.network)


def test_a_trainer_of_lightning_will_do(mlp_checkpoints, tmp_path):
    start = AtStart()
    parents = [str(path) for path in mlp_checkpoints]
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        max_epochs=1,
        callbacks=[FusionCallback(parents, OPTIONS), start],
        logger=False,
        **QUIET,
    )
    trainer.fit(ImageClassifier(lr=0.05), data())
    assert same(start.network, fused(mlp_checkpoints))


def test_parents_in_double_precision_are_trained_on_in_single(mlp_checkpoints, tmp_path):
    paths = []
    for path in mlp_checkpoints:
        paths.append(tmp_path / path.name)
        save_checkpoint(ImageClassifier.load_from_checkpoint(path).double(), paths[-1])
    module = ImageClassifier(lr=0.05)
    fit(tmp_path, paths, module)
    assert {parameter.dtype for parameter in module.network.parameters()} == {torch.float32}


def test_random_numbers_are_as_without_fusing(mlp_checkpoints, tmp_path):
    class Draw(Callback):
        def setup(self, trainer, pl_module, stage):
            self.drawn = torch.rand(3)

    draw = Draw()
    fit(tmp_path, mlp_checkpoints, more=[draw])
    torch.manual_seed(0)
    ImageClassifier()
    assert torch.equal(draw.drawn, torch.rand(3))


# --- what is recorded ---


def test_how_it_was_fused_is_in_the_checkpoint(mlp_checkpoints, tmp_path):
    fit(tmp_path, mlp_checkpoints)
    content = read_checkpoint(tmp_path / "last.ckpt")
    record = content["fusion"]
    assert content["callbacks"]["FusionCallback"] == record
    assert json.loads(json.dumps(record)) == record
    assert [parent["path"] for parent in record["parents"]] == [str(path) for path in mlp_checkpoints]
    assert all(len(parent["sha256"]) == 64 for parent in record["parents"])
    assert record["options"] == OPTIONS.to_dict() and len(record["alignments"]) == 2
    assert [row["name"] for row in record["networks"]] == ["deep.ckpt", "shallow.ckpt", "fused"]
    assert "teachers" not in content["hyper_parameters"]


def test_the_recorded_accuracies_are_those_of_validation(mlp_checkpoints, tmp_path):
    trainer = fit(tmp_path, mlp_checkpoints)
    rows = trainer.lightning_module.fusion["networks"]
    for row, network in zip(rows, [*map(load_parent, mlp_checkpoints), fused(mlp_checkpoints)], strict=True):
        classifier = ImageClassifier()
        classifier.network = network
        [validated] = trainer.validate(classifier, data(), verbose=False)
        assert row["val_acc"] == pytest.approx(validated["val_acc"])
        assert row["parameters"] == sum(parameter.numel() for parameter in network.parameters())


def test_the_figures_are_logged(mlp_checkpoints, tmp_path):
    trainer = fit(tmp_path, mlp_checkpoints, logger=True)
    folder = Path(trainer.logger.log_dir)
    logged = yaml.safe_load((folder / "hparams.yaml").read_text())["fusion"]
    assert logged["options"]["num_samples"] == 80 and len(logged["parents"]) == 2
    header, first, *_ = ((folder / "metrics.csv").read_text()).splitlines()
    row = dict(zip(header.split(","), first.split(","), strict=True))
    rows = trainer.lightning_module.fusion["networks"]
    names = ("deep/val_acc", "shallow/val_acc", "fused/val_acc")
    assert [float(row[name]) for name in names] == pytest.approx([row["val_acc"] for row in rows])


@pytest.mark.filterwarnings("ignore:Total length of .* across ranks is zero")
@pytest.mark.filterwarnings("ignore:`ModelCheckpoint\\(monitor='val_acc'\\)` could not find")
def test_without_validation_images_there_are_no_accuracies(mlp_checkpoints, tmp_path):
    module = ImageClassifier(lr=0.05)
    fit(tmp_path, mlp_checkpoints, module, digits=data(val_fraction=0.0), logger=True)
    assert [row["val_acc"] for row in module.fusion["networks"]] == [None] * 3


# --- resuming ---


@pytest.fixture
def moved(mlp_checkpoints, tmp_path) -> list[Path]:
    """Parents that a test may delete."""
    paths = [tmp_path / path.name for path in mlp_checkpoints]
    for source, path in zip(mlp_checkpoints, paths, strict=True):
        path.write_bytes(source.read_bytes())
    return paths


@pytest.mark.parametrize("kind", ["a module with the architecture", "a module without"])
def test_a_resumed_training_does_not_fuse_and_equals_one_without_a_stop(moved, tmp_path, monkeypatch, kind):
    whole = fit(tmp_path / "whole", moved, epochs=2).lightning_module
    fit(tmp_path / "run", moved, epochs=1)
    last = tmp_path / "run/last.ckpt"
    record = read_checkpoint(last)["fusion"]
    for path in moved:
        path.unlink()
    monkeypatch.setattr(clafusion.callbacks.fusion, "fuse_and_record", None)
    architecture = read_checkpoint(last)["hyper_parameters"]["architecture"] if "the" in kind else None
    resumed = ImageClassifier(architecture, lr=0.05)
    trainer = fit(tmp_path / "run", moved, resumed, epochs=2, ckpt_path=str(last))
    assert trainer.current_epoch == 2 and same(resumed.network, whole.network)
    content = read_checkpoint(last)
    assert content["fusion"] == content["callbacks"]["FusionCallback"] == record


def test_last_is_resumed_without_fusing(moved, tmp_path, monkeypatch):
    fit(tmp_path / "run", moved)
    for path in moved:
        path.unlink()
    monkeypatch.setattr(clafusion.callbacks.fusion, "fuse_and_record", None)
    trainer = fit(tmp_path / "run", moved, epochs=2, ckpt_path="last")
    assert trainer.current_epoch == 2


def test_training_goes_on_without_the_callback(mlp_checkpoints, tmp_path):
    fit(tmp_path / "run", mlp_checkpoints)
    module = ImageClassifier(lr=0.05)
    trainer = FusionTrainer(
        accelerator="cpu", default_root_dir=str(tmp_path / "more"), max_epochs=2, logger=False, **QUIET
    )
    trainer.fit(module, data(), ckpt_path=str(tmp_path / "run/last.ckpt"), weights_only=True)
    assert read_checkpoint(tmp_path / "more/last.ckpt")["fusion"] == module.fusion is not None


def test_a_resumed_training_with_other_settings_is_refused(mlp_checkpoints, tmp_path):
    fit(tmp_path / "run", mlp_checkpoints)
    resume = {"epochs": 2, "ckpt_path": str(tmp_path / "run/last.ckpt")}
    for parents, options, changed in (
        (mlp_checkpoints[::-1], OPTIONS, "parents"),
        (mlp_checkpoints, FusionOptions(num_samples=70), "options.num_samples"),
        (mlp_checkpoints[::-1], FusionOptions(num_samples=80, ridge=1.0), "parents, options.ridge"),
    ):
        with pytest.raises(FusionError, match=f"got other {changed}; begin anew"):
            fit(tmp_path / "run", parents, options=options, **resume)


def test_a_checkpoint_that_began_otherwise_is_refused(mlp_checkpoints, tmp_path):
    with pytest.raises(FusionError, match="leave out FusionCallback to go on from it"):
        fit(tmp_path / "run", mlp_checkpoints, ckpt_path=str(mlp_checkpoints[0]))


# --- signals ---


def test_a_signal_is_held_and_delivered_once():
    received = []
    with HeldSignal(signal.SIGUSR1) as held:
        os.kill(os.getpid(), signal.SIGUSR1)
    assert held.arrived and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    signal.signal(signal.SIGUSR1, lambda number, frame: received.append(number))
    try:
        held.deliver()
        held.deliver()
        with HeldSignal(signal.SIGUSR1) as untouched:
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert received == [signal.SIGUSR1] * 2 and not untouched.arrived


def test_a_signal_while_fusing_waits_for_its_handler(mlp_checkpoints, tmp_path, monkeypatch):
    received = []

    class Handler(Callback):
        """Stands for Lightning's own handler under SLURM."""

        def on_fit_start(self, trainer, pl_module):
            assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
            signal.signal(signal.SIGUSR1, lambda number, frame: received.append(trainer.global_step))

    def interrupted(*args, **more):
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args, **more)

    original = clafusion.callbacks.fusion.fuse_and_record
    monkeypatch.setattr(clafusion.callbacks.fusion, "fuse_and_record", interrupted)
    try:
        fit(tmp_path, mlp_checkpoints, more=[Handler()])
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    assert received == [0]


def test_the_handler_is_as_before_when_fusing_fails(tmp_path):
    with pytest.raises(FusionError):
        fit(tmp_path, ["none.ckpt", "none.ckpt"])
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL


# --- what is refused ---


def saved(path: Path, **architecture) -> Path:
    save_checkpoint(ImageClassifier({**MLP, **architecture}), path)
    return path


def test_unusable_parents_are_refused(mlp_checkpoints, tmp_path):
    deep, shallow = mlp_checkpoints
    truncated = tmp_path / "truncated.ckpt"
    truncated.write_bytes(deep.read_bytes()[:3000])
    for parents, message in (
        (["none.ckpt", shallow], "Expected a checkpoint, got none.ckpt, which is no file"),
        ([truncated, shallow], "truncated.ckpt, which is truncated or damaged"),
        ([deep], "Expected two or more parents, got 1"),
        ([deep, saved(tmp_path / "wide.ckpt", in_features=49)], "49 values, as .*wide.ckpt takes, got 1x8x8"),
        ([deep, saved(tmp_path / "many.ckpt", num_classes=12)], "Expected parents with the same number of classes"),
    ):
        with pytest.raises(FusionError, match=message):
            fit(tmp_path / "run", parents)
    assert not list((tmp_path / "run").rglob("*.ckpt"))


class Bomb:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return os.mkdir, (self.target,)


def test_pickled_code_is_not_run(mlp_checkpoints, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    bomb = tmp_path / "bomb.ckpt"
    torch.save({"state_dict": Bomb(tmp_path / "exploded")}, bomb)
    with pytest.raises(FusionError, match="pickled objects, which were not run"):
        fit(tmp_path / "run", [mlp_checkpoints[0], bomb])
    with pytest.raises(Exception, match="[Ww]eights.only|pickled objects"):
        fit(tmp_path / "run", mlp_checkpoints, ckpt_path=str(bomb))
    assert not (tmp_path / "exploded").exists()


def test_a_module_with_a_network_is_refused(mlp_checkpoints, tmp_path):
    module = ImageClassifier(MLP)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(FusionError, match="got one with; leave out --model.architecture"):
        fit(tmp_path, mlp_checkpoints, module)
    assert same(before, module.state_dict())


# --- the command line ---

SHORT = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.max_epochs"]


def arguments(parents, folder, epochs=1, *more) -> list[str]:
    fused = ["--trainer.callbacks+=FusionCallback", "--trainer.callbacks.parents", f"[{', '.join(map(str, parents))}]"]
    few = ["--trainer.callbacks.options.num_samples", "80", "--trainer.default_root_dir", str(folder)]
    quiet = ["--trainer.enable_model_summary", "false"]
    return ["fit", *fused, *few, *SHORT, str(epochs), *quiet, "--model.lr", "0.05", *map(str, more)]


@pytest.fixture
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("kind", ["ImageClassifier", "Distiller"])
def test_the_command_line_fuses_trains_resumes_and_tests(moved, kind):
    teachers = f"[{', '.join(map(str, moved))}]"
    more = ["--model", "Distiller", "--model.teachers", teachers] if kind == "Distiller" else []
    cli.main(arguments(moved, "whole", 2, *more))
    cli.main(arguments(moved, "run", 1, *more))
    [record] = [read_checkpoint(path)["fusion"] for path in [Path("run/last.ckpt")]]
    if kind == "ImageClassifier":
        for path in moved:
            path.unlink()
    # The configuration that was saved says `architecture: null`: the checkpoint decides.
    saved = ["--config", "run/logs/version_0/config.yaml", "--trainer.max_epochs", "2"]
    cli.main(["fit", *saved, "--ckpt_path", "run/last.ckpt"])
    resumed = read_checkpoint("run/last.ckpt")
    assert resumed["epoch"] == 1 and resumed["fusion"] == record
    assert same(load_parent("run/last.ckpt"), load_parent("whole/last.ckpt"))
    for path in moved:
        path.unlink(missing_ok=True)
    cli.main(["test", "--ckpt_path", "run/last.ckpt", "--trainer.accelerator", "cpu"])


@pytest.mark.usefixtures("in_an_empty_folder")
def test_the_command_line_refuses_with_one_line(mlp_checkpoints, capsys):
    deep, shallow = mlp_checkpoints
    architecture = ["--model.architecture", json.dumps(MLP)]
    distiller = ["--model", "Distiller", "--model.teachers", f"[{deep}]"]
    for given, message in (
        (arguments([deep, "none.ckpt"], "run"), "none.ckpt, which is no file"),
        (arguments([deep], "run"), "Expected two or more parents"),
        (arguments(mlp_checkpoints, "run", 1, *architecture), "leave out --model.architecture"),
        (arguments(mlp_checkpoints, "run", 1, *distiller, "--model.temperature", "0"), "temperature"),
        (arguments(mlp_checkpoints, "run", 1, *distiller, "--model.alpha", "2"), "alpha"),
        (arguments(mlp_checkpoints, "run", 1, *distiller[:2]), "teachers"),
        (arguments(mlp_checkpoints, "run", 1, *distiller[:3], "[none.ckpt]"), "none.ckpt, which is no file"),
        (arguments(mlp_checkpoints, "run", 1, "--trainer.callbacks.options.num_samples", "1"), "num_samples"),
        (arguments(mlp_checkpoints, "run", 1, "--trainer.callbacks.options.magic", "1"), "magic"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.main(given)
        assert end.value.code == 2
        error = capsys.readouterr().err
        assert re.fullmatch(r"clafusion: error: [^\n]+\n", error) and message in error, error
    assert not [path for path in Path.cwd().rglob("*") if path.is_file()]


@pytest.mark.usefixtures("in_an_empty_folder")
@pytest.mark.parametrize("name", ["digits_finetune", "digits_distill"])
def test_the_configurations_train_what_they_say(mlp_checkpoints, name):
    for folder, path in zip(("digits_deep", "digits_shallow"), mlp_checkpoints, strict=True):
        Path("runs", folder).mkdir(parents=True)
        Path("runs", folder, "best.ckpt").write_bytes(path.read_bytes())
    cli.main(["fit", "--config", f"configs/train/{name}.yaml", *SHORT, "1"])
    content = read_checkpoint(f"runs/{name}/last.ckpt")
    assert len(content["fusion"]["parents"]) == 2
    assert ("teachers" in content["hyper_parameters"]) == (name == "digits_distill")


# --- several processes ---


def process(launcher: list[str], given: list[str], folder: Path) -> subprocess.CompletedProcess:
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, str(ROOT / "cli.py"), *given]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=120)


LAUNCHERS = {"ddp": [], "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]}
TWO = ["--trainer.strategy", "ddp", "--trainer.devices", "2"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_fuse_as_one(mlp_checkpoints, tmp_path, launcher):
    still = ["--model.lr", "0"]
    end = process(LAUNCHERS[launcher], arguments(mlp_checkpoints, "run", 1, *still, *TWO), tmp_path)
    assert end.returncode == 0, end.stderr
    ours = load_parent(tmp_path / "run/last.ckpt").state_dict()
    alone = fused(mlp_checkpoints, DigitsDataModule()).state_dict()
    assert ours.keys() == alone.keys() and all(torch.allclose(ours[name], alone[name], atol=1e-6) for name in alone)


@pytest.mark.slow
def test_two_processes_refuse_together(mlp_checkpoints, tmp_path):
    end = process([], arguments([mlp_checkpoints[0], "none.ckpt"], "run", 1, *TWO), tmp_path)
    assert end.returncode == 2, end.stderr
    lines = [line for line in end.stderr.splitlines() if line.startswith("clafusion: error:")]
    assert 1 <= len(lines) <= 2 and all("none.ckpt, which is no file" in line for line in lines)
