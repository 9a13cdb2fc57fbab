"""An interrupted training that goes on ends with the weights of an uninterrupted one, bit for bit."""

import os
import resource
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, seed_everything
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.environments import SLURMEnvironment

from clafusion import FusionError
from clafusion.datamodules import DigitsDataModule
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, read_checkpoint
from clafusion.lightning_modules.checkpoints.writing import AtomicCheckpointIO
from clafusion.lightning_modules.commandline.cli import main
from tests.processes import clafusion, succeed

# To go on in the same folder is the point.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

# Everything that draws random numbers: the order, the augmentation, dropout; and everything that has a state.
NETWORK = {
    "name": "MLP",
    "in_features": 64,
    "hidden": [16, 12],
    "num_classes": 10,
    "batch_norm": True,
    "dropout": 0.5,
}
DATA = {
    "limit_train": 40,
    "batch_size": 16,
    "augment": True,
    "num_workers": 0,
    "allow_changes": False,
}  # 3 batches, the last one of 8
EPOCHS, STEPS = 3, 9


class Interruption(Exception):
    pass


class InterruptAt(Callback):
    """Ends a training as a kill would, when it is about to train on a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            raise Interruption


def fit(folder: Path, resume: bool = False, stop: int | None = None, **arguments: Any) -> FusionTrainer:
    """Trains from the start or from last.ckpt, to the end or up to a batch."""
    data = {name: arguments.pop(name, value) for name, value in DATA.items()}
    callbacks = arguments.pop("callbacks", [])
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    seed_everything(arguments.pop("seed", 3), verbose=False)
    trainer = FusionTrainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=str(folder),
        callbacks=[*callbacks, *([] if stop is None else [InterruptAt(stop)])],
        **{"max_epochs": EPOCHS, "save_every_n_steps": 1, **quiet, **arguments},
    )
    network = ImageClassifier(NETWORK, lr=0.05, milestones=[1, 2], gamma=0.5)
    path = str(folder / "last.ckpt") if resume and (folder / "last.ckpt").exists() else None
    trainer.fit(network, DigitsDataModule(**data), ckpt_path=path, weights_only=True)
    return trainer


def result(folder: Path) -> dict[str, Any]:
    """All that a training leaves: weights, momenta, learning rates, counters, and the best checkpoint's weights."""
    last, best = (read_checkpoint(folder / name) for name in ("last.ckpt", "best.ckpt"))
    [optimizer] = last["optimizer_states"]
    return {
        **last["state_dict"],
        **{f"best {name}": tensor for name, tensor in best["state_dict"].items()},
        **{f"momentum {name}": state["momentum_buffer"] for name, state in optimizer["state"].items()},
        "score": [state["best_model_score"] for state in last["callbacks"].values() if "best_model_score" in state],
        "rates": (optimizer["param_groups"], last["lr_schedulers"]),
        "steps": (last["epoch"], last["global_step"]),
    }


def differences(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    assert one.keys() == two.keys()
    same = {
        name: torch.equal(value, two[name]) if isinstance(value, torch.Tensor) else value == two[name]
        for name, value in one.items()
    }
    return [name for name in one if not same[name]]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("whole")
    fit(folder)
    return result(folder)


def interrupted(folder: Path, stop: int, **arguments: Any) -> dict[str, Any]:
    with pytest.raises(Interruption):
        fit(folder, stop=stop, **arguments)
    fit(folder, resume=True, **arguments)
    return result(folder)


@pytest.mark.parametrize("stop", range(1, STEPS))
def test_a_training_can_be_interrupted_before_every_batch(uninterrupted, tmp_path, stop):
    assert differences(interrupted(tmp_path, stop), uninterrupted) == []


def test_a_training_can_be_interrupted_again_and_again(uninterrupted, tmp_path):
    for stop in range(1, STEPS):
        with pytest.raises(Interruption):
            fit(tmp_path, resume=True, stop=stop)
    fit(tmp_path, resume=True)
    assert differences(result(tmp_path), uninterrupted) == []


class InterruptValidation(Callback):
    def on_validation_start(self, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch == 1 and not trainer.sanity_checking:
            raise Interruption


def test_a_training_can_be_interrupted_while_it_validates(uninterrupted, tmp_path):
    with pytest.raises(Interruption):
        fit(tmp_path, callbacks=[InterruptValidation()])
    scores = []

    class Scores(Callback):
        def on_validation_end(self, trainer: Any, *_: Any) -> None:
            scores.append(trainer.current_epoch)

    fit(tmp_path, resume=True, callbacks=[Scores()])
    assert differences(result(tmp_path), uninterrupted) == []
    assert scores == [1, 2]  # the epoch that had not been validated is


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_with_worker_processes(uninterrupted, tmp_path, stop):
    assert differences(interrupted(tmp_path, stop, num_workers=2), uninterrupted) == []


# max_steps ends the last epoch before its validation: a run that was interrupted in it has no accuracy to monitor.
@pytest.mark.filterwarnings("ignore:`ModelCheckpoint.monitor='val_acc'.` could not find the monitored key")
@pytest.mark.parametrize("stop", [2, 3, 6, 7])
@pytest.mark.parametrize(
    "arguments",
    [
        {"accumulate_grad_batches": 2},
        {"max_epochs": -1, "max_steps": STEPS - 1},
        {"val_check_interval": 1},
        {"limit_train_batches": 2},
        {"check_val_every_n_epoch": 2},
    ],
    ids=lambda arguments: "-".join(arguments),
)
def test_with_other_settings_of_the_trainer(tmp_path, stop, arguments):
    fit(tmp_path / "whole", **arguments)
    for _ in range(2):
        with suppress(Interruption):
            fit(tmp_path / "cut", resume=True, stop=stop, **arguments)
    fit(tmp_path / "cut", resume=True, **arguments)
    assert differences(result(tmp_path / "cut"), result(tmp_path / "whole")) == []


@pytest.mark.parametrize("stop", [2, 3, 4])
@pytest.mark.parametrize(
    "run",
    [
        {"max_epochs": EPOCHS, "num_workers": 0},
        {"max_epochs": EPOCHS, "num_workers": 2},
        {"max_epochs": -1, "max_steps": STEPS},
    ],
    ids=["epochs", "workers", "steps"],
)
@pytest.mark.parametrize(
    "when",
    [{"every_n_train_steps": 1}, {"save_on_train_epoch_end": False}, {"save_on_train_epoch_end": True}],
    ids=["steps", "after validation", "after epochs"],
)
def test_from_lightnings_own_checkpoints(tmp_path, stop, when, run):
    def mine() -> list[Callback]:
        return [ModelCheckpoint(tmp_path / "mine", filename="mine", enable_version_counter=False, **when)]

    fit(tmp_path, callbacks=mine(), **run)
    whole = read_checkpoint(tmp_path / "last.ckpt")["state_dict"]
    path = tmp_path / "mine" / "mine.ckpt"
    path.unlink()
    with pytest.raises(Interruption):
        fit(tmp_path, callbacks=mine(), stop=stop, **run)
    (tmp_path / "last.ckpt").unlink()
    if path.exists():
        path.rename(tmp_path / "last.ckpt")
    fit(tmp_path, resume=True, callbacks=mine(), **run)
    assert differences(read_checkpoint(tmp_path / "last.ckpt")["state_dict"], whole) == []


# --- what may change, and what may not ---


def resume(folder: Path, **arguments: Any) -> None:
    fit(folder, **{"max_epochs": 1, **arguments.pop("before", {})})
    fit(folder, resume=True, **{"max_epochs": 2, **arguments})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"batch_size": 8}, "batch_size 16, got batch_size 8; change it back"),
        ({"seed": 4}, "seed 3, got seed 4"),
        ({"augment": False, "batch_size": 20}, "augment True, batch_size 16, got augment False, batch_size 20"),
        ({"limit_train": 41}, "limit_train 40, train_size 40, got limit_train 41, train_size 41"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches 1, got accumulate_grad_batches 2"),
        ({"precision": "bf16-mixed"}, "precision 32-true, got precision bf16-mixed"),
    ],
)
def test_a_changed_run_is_refused(tmp_path, changed, message):
    with pytest.raises(FusionError, match="Expected the interrupted run to go on with ") as refusal:
        resume(tmp_path, **changed)
    assert message in str(refusal.value) and "--data.allow_changes true" in str(refusal.value)


@pytest.mark.parametrize("changed", [{"batch_size": 8}, {"seed": 4}, {"limit_train": 16}])
def test_a_changed_run_goes_on_if_told_to(tmp_path, changed):
    with pytest.raises(Interruption):
        fit(tmp_path, stop=5)
    fit(tmp_path, resume=True, allow_changes=True, **changed)
    assert read_checkpoint(tmp_path / "last.ckpt")["epoch"] == EPOCHS - 1


def test_a_run_without_a_seed_goes_on_with_the_one_it_had(uninterrupted, tmp_path, monkeypatch):
    with pytest.raises(Interruption):
        fit(tmp_path, stop=5)
    monkeypatch.setattr(f"{__name__}.seed_everything", lambda seed, verbose: torch.manual_seed(seed + 100))
    fit(tmp_path, resume=True)
    assert differences(result(tmp_path), uninterrupted) == []


def test_other_data_are_refused(tmp_path, monkeypatch):
    class Others(DigitsDataModule):
        pass

    with pytest.raises(Interruption):
        fit(tmp_path, stop=5)
    monkeypatch.setattr(f"{__name__}.DigitsDataModule", Others)
    with pytest.raises(FusionError, match="last.ckpt to hold the state of an interrupted training on .*Others, got"):
        fit(tmp_path, resume=True)
    fit(tmp_path, resume=True, allow_changes=True)


def test_evaluating_with_another_batch_size_is_no_change(tmp_path):
    fit(tmp_path, max_epochs=1)
    quiet = {"logger": False, "enable_progress_bar": False}
    trainer = FusionTrainer(accelerator="cpu", devices=1, default_root_dir=str(tmp_path), **quiet)
    data = DigitsDataModule(batch_size=7, eval_batch_size=100)
    trainer.test(ImageClassifier(), data, ckpt_path=str(tmp_path / "last.ckpt"), verbose=False, weights_only=True)


def test_a_seed_is_that_of_the_run_after_it_too(tmp_path):
    fit(tmp_path, max_epochs=1)
    assert torch.initial_seed() == 3


# --- from the command line ---

COMMAND = [
    *["fit", "--ckpt_path", "last", "--seed_everything", "3"],
    *["--model.architecture", str(NETWORK).replace("True", "true"), "--model.lr", "0.05"],
    *["--model.milestones", "[1, 2]", "--model.gamma", "0.5"],
    *["--data", "DigitsDataModule", "--data.limit_train", "40", "--data.batch_size", "16", "--data.augment", "true"],
    *["--trainer.accelerator", "cpu", "--trainer.max_epochs", str(EPOCHS), "--trainer.save_every_n_steps", "1"],
    *["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"],
    *["--trainer.enable_model_summary", "false"],
]


PROCESSES = {1: [], 2: ["--config", "configs/trainer/ddp.yaml"]}


def test_last_is_the_beginning_where_there_is_none_and_the_end_where_it_is(uninterrupted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*COMMAND, "--trainer.max_epochs", "1"])
    assert read_checkpoint("runs/last.ckpt")["epoch"] == 0
    main(COMMAND)
    assert differences(result(Path("runs")), uninterrupted) == []


def test_data_and_seed_are_those_of_the_checkpoint_unless_given(uninterrupted, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([*COMMAND, "--trainer.max_epochs", "1"])
    brief = ["fit", "--ckpt_path", "runs/last.ckpt", *COMMAND[COMMAND.index("--trainer.accelerator") :]]
    for changed in (["--data.batch_size", "8"], ["--seed_everything", "4"], ["--data", "MNISTDataModule"]):
        with pytest.raises(SystemExit) as end:
            main([*brief, *changed])
        assert end.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert all("clafusion: error: Expected" in error for error in errors[-3:])
    assert "got batch_size 8" in errors[-3] and "got seed 4" in errors[-2]
    main(brief)
    assert differences(result(Path("runs")), uninterrupted) == []


# --- files ---


def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path):
    path, big = tmp_path / "last.ckpt", {"tensor": torch.zeros(100_000)}
    AtomicCheckpointIO().save_checkpoint({"tensor": torch.ones(3)}, path)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(FusionError, match="to write the checkpoint .*last.ckpt, got File too large; the previous"):
            AtomicCheckpointIO().save_checkpoint(big, path)
        with pytest.raises(FusionError, match="got File too large; there is none yet: make room and resume"):
            AtomicCheckpointIO().save_checkpoint(big, tmp_path / "new.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_kill_while_writing_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    io = AtomicCheckpointIO()
    io.save_checkpoint({"number": 1}, path)

    def torn(checkpoint: object, file: Any) -> None:
        file.write(b"half")
        raise Interruption

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(Interruption):
            io.save_checkpoint({"number": 2}, path)
    (tmp_path / ".last.ckpt.part").write_bytes(b"half")  # as a kill leaves it, after which nothing is cleaned up
    assert io.load_checkpoint(path) == {"number": 1}
    io.save_checkpoint({"number": 3}, path)
    assert io.load_checkpoint(path) == {"number": 3} and list(tmp_path.iterdir()) == [path]


def test_a_training_with_a_full_disk_ends_with_one_line_and_can_be_resumed(uninterrupted, tmp_path, monkeypatch):
    write = AtomicCheckpointIO.save_checkpoint

    def limited(self: AtomicCheckpointIO, checkpoint: dict[str, Any], *arguments: Any, **more: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000 if checkpoint["global_step"] == 5 else limits[0], limits[1]))
        try:
            write(self, checkpoint, *arguments, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch, pytest.raises(FusionError, match="the previous one is kept"):
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", limited)
        fit(tmp_path)
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4
    fit(tmp_path, resume=True)
    assert differences(result(tmp_path), uninterrupted) == []


def test_checkpoints_are_local_files_of_plain_data(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"class": Path}, tmp_path / "last.ckpt")
    with pytest.raises(FusionError, match="got pickled objects, which were not run"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    with pytest.raises(FusionError, match="Expected a local file for a checkpoint, got s3://x/last.ckpt"):
        AtomicCheckpointIO().save_checkpoint({}, "s3://x/last.ckpt")
    with pytest.raises(FusionError, match="Expected a local file, got the address"):
        AtomicCheckpointIO().load_checkpoint("https://x/last.ckpt")


def test_an_io_of_the_user_stays(tmp_path):
    class Mine(AtomicCheckpointIO):
        pass

    assert (
        type(FusionTrainer(default_root_dir=str(tmp_path), logger=False).strategy.checkpoint_io) is AtomicCheckpointIO
    )
    mine = FusionTrainer(default_root_dir=str(tmp_path), logger=False, plugins=Mine())
    assert type(mine.strategy.checkpoint_io) is Mine


@pytest.mark.parametrize("steps", [0, -3])
def test_steps_between_checkpoints_are_counted(steps):
    with pytest.raises(FusionError, match=f"Expected save_every_n_steps of at least 1, got {steps}"):
        FusionTrainer(save_every_n_steps=steps)


# --- on a cluster ---


class SignalAt(Callback):
    """Signals this process while it is training on a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_before_backward(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGUSR1)


@pytest.fixture
def requeued(monkeypatch) -> list[list[str]]:
    """A SLURM job of one task; what it asks SLURM to do."""
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("NTASKS", "NTASKS_PER_NODE", "NNODES"):
        monkeypatch.setenv(f"SLURM_{name}", "1")
    for name in ("PROCID", "LOCALID", "NODEID"):
        monkeypatch.setenv(f"SLURM_{name}", "0")
    monkeypatch.setenv("SLURM_JOB_ID", "42")
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("clafusion.lightning_modules.checkpoints.last.subprocess.run", run)
    return asked


@pytest.mark.parametrize(("batch", "step"), [(0, 1), (1, 2), (2, 3), (3, 4)])
def test_a_requeue_signal_saves_after_the_step(uninterrupted, tmp_path, requeued, batch, step):
    with pytest.raises(Interruption):
        fit(tmp_path, stop=batch + 1, callbacks=[SignalAt(batch)], save_every_n_steps=None)
    assert requeued == [["scontrol", "requeue", "42"]]
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # Lightning tears nothing down after an exception
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == step
    assert not list(tmp_path.glob("hpc*"))
    fit(tmp_path, resume=True, save_every_n_steps=None)
    assert differences(result(tmp_path), uninterrupted) == []
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_requeue_signal_before_the_training_is_held(tmp_path, requeued, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "40")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    trainer = FusionTrainer(accelerator="cpu", devices=1, default_root_dir=str(tmp_path), logger=False, max_epochs=1)
    os.kill(os.getpid(), signal.SIGUSR1)
    trainer.fit(ImageClassifier(NETWORK), DigitsDataModule(limit_train=40, batch_size=16))
    assert requeued == [["scontrol", "requeue", "40_2"]]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_without_requeueing_the_signal_is_left_alone(tmp_path, requeued):
    FusionTrainer(default_root_dir=str(tmp_path), logger=False, plugins=SLURMEnvironment(auto_requeue=False))
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


# --- kill -9 ---


@pytest.fixture(scope="module")
def wholes(tmp_path_factory) -> dict[int, dict[str, Any]]:
    """What the command leaves if nobody kills it, by the number of processes."""
    found = {}
    for processes, more in PROCESSES.items():
        folder = tmp_path_factory.mktemp("whole")
        succeed(folder, *COMMAND, *more)
        found[processes] = result(folder / "runs")
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kills", "workers"), [(1, [1, 3, 8], 2), (2, [1, 2], 0)])
def test_the_same_command_after_a_kill(wholes, tmp_path, processes, kills, workers):
    """Killed in the middle of an epoch and between two epochs; an epoch has 3 batches, or 2 on each of 2 processes."""
    command = [*COMMAND, *PROCESSES[processes], "--data.num_workers", str(workers)]
    command += ["--trainer.callbacks+=processes.KillAt", f"--trainer.callbacks.batches={kills}"]
    command += [f"--trainer.callbacks.folder={tmp_path}"]
    for _ in kills:
        assert clafusion(tmp_path, *command).returncode == -signal.SIGKILL
    succeed(tmp_path, *command)
    assert len(list(tmp_path.glob("killed-*"))) == len(kills)
    assert differences(result(tmp_path / "runs"), wholes[processes]) == []
