"""`fit` from the command line: its optimizer and schedule, its folder, Lightning's callbacks and loggers."""

import re
from pathlib import Path

import pytest
import torch
from pytorch_lightning import callbacks

from clafusion.lightning_modules import read_checkpoint
from clafusion.lightning_modules.commandline import cli

# To go on in the same folder is the point; three batches an epoch are too few for some finders and monitors.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
MLP = ["--model.architecture", "{name: MLP, in_features: 64, hidden: [8], num_classes: 10}"]
DATA = ["--data", "DigitsDataModule", "--data.limit_train", "40", "--data.batch_size", "16"]
FIT = ["fit", *MLP, *DATA, *QUIET, "--trainer.enable_model_summary", "false", "--trainer.max_epochs"]
ADAMW = ["--optimizer", "AdamW", "--optimizer.lr", "1e-3"]
COSINE = ["--lr_scheduler", "CosineAnnealingLR", "--lr_scheduler.T_max", "20"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def refused(capsys, *arguments: str) -> str:
    """The one line that a command ends with, which has changed no file."""
    before = {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")}
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments])
    assert end.value.code == 2
    assert {path: path.stat().st_mtime_ns for path in Path.cwd().rglob("*")} == before
    error = capsys.readouterr().err
    assert re.fullmatch(r"clafusion: error: [^\n]+\n", error), error
    return error


def saved() -> dict:
    return read_checkpoint("runs/last.ckpt")


# --- optimizer and schedule ---


def test_the_options_of_lightnings_command_line_train_and_go_on(capsys):
    cli.main([*FIT, "1", *ADAMW, *COSINE, "--model.warmup_epochs", "0.5"])
    parameters = saved()["hyper_parameters"]
    assert (parameters["optimizer"], parameters["lr"]) == ({"name": "AdamW"}, 1e-3)
    assert parameters["lr_scheduler"] == {"name": "CosineAnnealingLR", "T_max": 20}
    assert parameters["warmup_epochs"] == 0.5
    lines = capsys.readouterr().out.splitlines()
    assert all(re.fullmatch(r"wrote runs/(best|last)\.ckpt: val_acc \d+\.\d\d%", line) for line in lines[-2:])
    go_on = ["fit", *QUIET, "--trainer.enable_model_summary", "false", "--ckpt_path", "last", "--trainer.max_epochs"]
    cli.main([*go_on, "2"])
    assert saved()["hyper_parameters"]["optimizer"] == {"name": "AdamW"} and saved()["epoch"] == 1
    cli.main([*go_on, "3", "--optimizer.weight_decay", "0.2"])
    assert saved()["hyper_parameters"]["optimizer"] == {"name": "AdamW", "weight_decay": 0.2}
    assert saved()["hyper_parameters"]["lr"] == 1e-3
    cli.main([*go_on, "4", "--optimizer", "RMSprop"])
    assert saved()["hyper_parameters"]["optimizer"] == {"name": "RMSprop"}
    assert saved()["hyper_parameters"]["lr"] == 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer", "AdamX"], "--optimizer to name a class of torch.optim, got AdamX; did you mean Adam? there"),
        ([*ADAMW, "--optimizer.weight_deca", "1"], "--optimizer names, got weight_deca; did you mean weight_decay?"),
        ([*ADAMW, "--optimizer.lr", "fast"], "Expected --optimizer.lr as float, got fast"),
        (["--optimizer.lr", "1"], "Expected --optimizer to name a class that takes lr, got none or another"),
        ([*ADAMW, "--model.lr", "1"], "the settings of AdamW as --optimizer.NAME, got --model.lr, which it does not"),
        ([*COSINE, "--model.milestones=[1]"], "of CosineAnnealingLR as --lr_scheduler.NAME, got --model.milestones"),
        (["--model.optimizer", "{name: AdamW}"], "Expected --optimizer, got --model.optimizer"),
        (["--lr_scheduler", "CosineAnnealingLR"], "Expected --lr_scheduler.T_max, got none"),
        (["--lr_scheduler", "CosinAnnealingLR"], "got CosinAnnealingLR; did you mean CosineAnnealingLR?"),
        (
            ["--lr_scheduler", "LambdaLR", "--lr_scheduler.lr_lambda", "math.sqrt"],
            "Expected plain values in lr_schedul",
        ),
        (["--model.label_smoothing", "2"], "Expected label_smoothing in [0, 1], got 2.0"),
    ],
)
def test_what_cannot_be_trained_by_is_one_line(capsys, arguments, message):
    assert message in refused(capsys, *FIT, "1", *arguments)


@pytest.mark.parametrize("recipe", ["finetune_cnn", "finetune_transformer"])
def test_the_recipes_for_finetuning_train(mlp_checkpoints, recipe):
    given = ["--config", f"configs/train/{recipe}.yaml", "--ckpt_path", str(mlp_checkpoints[0])]
    cli.main(["fit", *given, *DATA, *QUIET, "--trainer.max_epochs", "1", "--trainer.logger", "false"])
    parameters = read_checkpoint(f"runs/{recipe}/last.ckpt")["hyper_parameters"]
    assert parameters["lr_scheduler"] == {"name": "CosineAnnealingLR", "T_max": 20}
    assert parameters["optimizer"]["name"] == ("SGD" if recipe == "finetune_cnn" else "AdamW")


# --- the folder ---


def test_an_earlier_run_is_not_replaced_unasked(capsys):
    cli.main([*FIT, "1", "--trainer.logger", "false"])
    error = refused(capsys, *FIT, "2")
    assert (
        "Expected a folder without a run, got runs with last.ckpt and best.ckpt; go on with --ckpt_path last" in error
    )
    assert "got both" in refused(capsys, *FIT, "2", "--overwrite", "--ckpt_path", "last")
    Path("runs/last.ckpt").rename("other.ckpt")
    assert "with best.ckpt; go on" in refused(capsys, *FIT, "2", "--ckpt_path", "other.ckpt")
    cli.main([*FIT, "1", "--ckpt_path", "last"])  # as a requeued job whose first epoch was cut off
    assert saved()["epoch"] == 0
    cli.main([*FIT, "2", "--overwrite", "--trainer.logger", "false"])
    assert saved()["epoch"] == 1
    cli.main([*FIT, "1", "--trainer.fast_dev_run", "true"])  # writes nothing


def test_a_run_that_is_replaced_is_gone_with_its_first_step(monkeypatch):
    cli.main([*FIT, "1"])
    monkeypatch.setattr(cli.FusionTrainer, "save_checkpoint", lambda *_, **__: None)
    cli.main([*FIT, "1", "--overwrite"])
    assert not list(Path("runs").glob("*.ckpt"))  # what is killed before it saves does not go on with the earlier run


# --- Lightning's callbacks and loggers ---


def callback(name: str, *more: str) -> list[str]:
    return [f"--trainer.callbacks+={name}", *(f"--trainer.callbacks.{argument}" for argument in more)]


def logger(name: str, *more: str) -> list[str]:
    return ["--trainer.logger", name, *(f"--trainer.logger.{argument}" for argument in more)]


EXTRAS = {
    "ema": callback("EMAWeightAveraging", "decay=0.9"),
    "timer": callback("Timer", "duration=00:01:00:00"),
    "rich": [*callback("RichProgressBar"), "--trainer.enable_progress_bar", "true"],
    "swa": callback("StochasticWeightAveraging", "swa_lrs=0.01", "swa_epoch_start=1"),
    "rates": callback("LearningRateMonitor"),
    "stopping": callback("EarlyStopping", "monitor=val_acc", "mode=max"),
    "tensorboard": logger("TensorBoardLogger", "save_dir=board"),
    "csv": logger("CSVLogger", "save_dir=tables"),
    "mlflow": logger("MLFlowLogger", "tracking_uri=sqlite:///mlflow.db"),
    "wandb": logger("WandbLogger", "offline=true", "save_dir=wb"),
}


@pytest.mark.slow
@pytest.mark.parametrize("extra", EXTRAS)
def test_what_lightning_has_works_and_goes_on(extra):
    if extra in ("tensorboard", "mlflow", "wandb"):
        pytest.importorskip(extra)
    if extra == "mlflow":
        pytest.importorskip("sqlalchemy")  # which mlflow-skinny does without
    if extra == "ema" and not hasattr(callbacks, "EMAWeightAveraging"):
        pytest.skip("this Lightning has no EMAWeightAveraging")
    for epochs in ("1", "3"):
        cli.main([*FIT, epochs, "--ckpt_path", "last", *EXTRAS[extra]])
    cli.main([*FIT, "3", *EXTRAS[extra], "--trainer.default_root_dir", "whole"])
    assert saved()["epoch"] == 2
    weights, whole = saved()["state_dict"], read_checkpoint("whole/last.ckpt")["state_dict"]
    assert all(torch.equal(tensor, whole[name]) for name, tensor in weights.items())


@pytest.mark.slow
def test_a_learning_rate_that_was_found_is_that_of_the_training(capsys):
    finder = callback("LearningRateFinder", "num_training_steps=30", "early_stop_threshold=null")
    more = ["--data.limit_train", "600"]  # as many steps in one epoch as the search takes
    cli.main([*FIT, "1", *more, *ADAMW, *finder])
    found = saved()["hyper_parameters"]["lr"]
    assert found != 1e-3 and saved()["optimizer_states"][0]["param_groups"][0]["lr"] == found
    cli.main([*FIT, "2", *more, "--ckpt_path", "last"])
    assert saved()["optimizer_states"][0]["param_groups"][0]["lr"] == found
    capsys.readouterr()
    error = refused(capsys, *FIT, "3", *more, "--ckpt_path", "last", *finder)
    assert "Expected no LearningRateFinder, got one: a training goes on with the learning rate that it had" in error


class Unreachable(callbacks.Callback):
    """A callback that cannot be made."""

    def __init__(self) -> None:
        raise RuntimeError("no server\nanswers")


def test_arguments_that_a_callback_refuses_are_one_line(capsys):
    error = refused(capsys, *FIT, "1", *callback(f"{__name__}.Unreachable"))
    assert "Expected callbacks and loggers that can be made, got no server answers; change them" in error
    assert "swa_lrs" in refused(capsys, *FIT, "1", *callback("StochasticWeightAveraging", "swa_lrs=-1.0"))


def test_a_batch_size_is_not_searched_for(capsys):
    error = refused(capsys, *FIT, "1", *callback("BatchSizeFinder"))
    assert "Expected no BatchSizeFinder, got one" in error and "give --data.batch_size" in error
