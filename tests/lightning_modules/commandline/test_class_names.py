"""Class paths of version 0.1 in configurations and on the command line: ours, unless the user has such a class."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commandline.class_names import present_name

#: As version 0.1 saved it beside a training.
SAVED = """
trainer:
  callbacks:
  - class_path: callbacks.FusionCallback
    init_args:
      parents: [a.ckpt, b.ckpt]
model:
  class_path: lightning_modules.Distiller
  init_args:
    teachers: [c.ckpt]
data:
  class_path: datamodules.CIFARDataModule
  init_args: {data_dir: images}
"""
PRESENT = [
    "clafusion.callbacks.FusionCallback",
    "clafusion.lightning_modules.Distiller",
    "clafusion.datamodules.CIFARDataModule",
]
EXPERIMENT = """
experiment:
  name: tiny
  small: {data: {class: datamodules.DigitsDataModule, init_args: {limit_train: 300}}}
data: {class_path: datamodules.MNISTDataModule}
"""


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def printed(capsys, *arguments: str) -> dict:
    """The configuration of a command."""
    with pytest.raises(SystemExit) as end:
        cli.main([*arguments, "--print_config"])
    assert end.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def classes(config: dict) -> list[str]:
    """The class paths of a configuration."""
    parts = [*(config["trainer"]["callbacks"] or []), config["model"], config["data"]]
    return [part["class_path"] for part in parts]


def test_a_configuration_of_version_0_1_names_the_present_classes(capsys):
    Path("old.yaml").write_text(SAVED)
    config = printed(capsys, "fit", "--config", "old.yaml")
    assert classes(config) == PRESENT
    assert config["data"]["init_args"]["data_dir"] == "images" and config["model"]["init_args"]["teachers"] == [
        "c.ckpt"
    ]


@pytest.mark.parametrize("joined", [False, True])
def test_a_command_of_version_0_1_names_the_present_classes(capsys, joined):
    given = {
        "--trainer.callbacks": "callbacks.FusionCallback",
        "--trainer.callbacks.parents": "[a.ckpt, b.ckpt]",
        "--model": "lightning_modules.Distiller",
        "--model.teachers": "[c.ckpt]",
        "--data": "datamodules.CIFARDataModule",
        "--data.data_dir": "images",
    }
    words = (
        [f"{name}={value}" for name, value in given.items()] if joined else [w for item in given.items() for w in item]
    )
    assert classes(printed(capsys, "fit", *words)) == PRESENT


def test_values_and_the_environment_name_the_present_classes(capsys, monkeypatch):
    monkeypatch.setenv(
        "CLAFUSION_FIT__DATA", "{class_path: datamodules.MNISTDataModule, init_args: {variant: fashion}}"
    )
    callback = "[{class_path: callbacks.FusionCallback, init_args: {parents: [a.ckpt, b.ckpt]}}]"
    config = printed(capsys, "fit", f"--trainer.callbacks={callback}", "--model", "lightning_modules.ImageClassifier")
    assert classes(config) == [
        PRESENT[0],
        "clafusion.lightning_modules.ImageClassifier",
        "clafusion.datamodules.MNISTDataModule",
    ]
    assert config["data"]["init_args"]["variant"] == "fashion"


@pytest.mark.parametrize(("scale", "name"), [("full", "MNIST"), ("small", "Digits")])
def test_an_experiment_of_version_0_1_names_the_present_classes(capsys, scale, name):
    Path("tiny.yaml").write_text(EXPERIMENT)
    config = printed(capsys, "pipeline", "--config", "tiny.yaml", "--scale", scale)
    assert config["data"]["class_path"] == f"clafusion.datamodules.{name}DataModule"


def test_other_words_stay_as_they_are():
    for name in (
        "callbacks.Mine",
        "callbacks",
        "datamodules.digits",
        "cli.main.py",
        "callback.FusionCallback",
        "a.b",
        "",
    ):
        assert present_name(name) == name
    assert present_name("callbacks.FusionCallback") == PRESENT[0]


MINE = """
from clafusion.lightning import Callback
from clafusion import datamodules
class MyCallback(Callback): ...
class FusionCallback(Callback): ...
class MyData(datamodules.DigitsDataModule): ...
"""


def test_classes_of_the_users_own_are_theirs():
    """In another process: here `callbacks` is the folder of the checkout."""
    for name in ("callbacks.py", "datamodules.py"):
        Path(name).write_text(MINE)
    data = {"class_path": "datamodules.DigitsDataModule", "init_args": {"limit_train": 7}}
    callbacks = [{"class_path": f"callbacks.{name}"} for name in ("MyCallback", "FusionCallback")]
    Path("mine.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": callbacks}, "data": data}))
    command = [
        sys.executable,
        "-m",
        "clafusion",
        "fit",
        "--config",
        "mine.yaml",
        "--model",
        "lightning_modules.ImageClassifier",
    ]
    for more, found in (
        ([], "clafusion.datamodules.DigitsDataModule"),
        (["--data", "datamodules.MyData"], "datamodules.MyData"),
    ):
        done = subprocess.run([*command, *more, "--print_config"], capture_output=True, text=True, check=True)
        config = yaml.safe_load(done.stdout)
        assert classes(config) == [
            *("callbacks.MyCallback", "callbacks.FusionCallback"),
            *("clafusion.lightning_modules.ImageClassifier", found),
        ]
        assert config["data"]["init_args"]["limit_train"] == 7
