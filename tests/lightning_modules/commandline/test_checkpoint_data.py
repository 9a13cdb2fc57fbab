"""The data that a command takes: that of its checkpoints, or what the user names, or none."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clafusion import FusionError
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commandline.checkpoint_data import common_data, saved_data
from tests.lightning_modules.commandline.test_cli import QUIET, in_an_empty_folder, refused  # noqa: F401 (a fixture)

FOLDER = "ImageFolderDataModule"


def trained(source: Path, path: str, name: str = "DigitsDataModule", **arguments: Any) -> str:
    """A checkpoint as a training on some data leaves it."""
    content = torch.load(source, weights_only=True)
    torch.save({**content, name: {"seed": 5}, "datamodule_hyper_parameters": arguments}, path)
    return path


def test_checkpoints_say_what_they_were_trained_or_fused_on():
    path = f"clafusion.datamodules.{FOLDER}"
    assert saved_data({FOLDER: {"seed": 0}, "datamodule_hyper_parameters": {"size": 8}}) == {
        "class_path": path,
        "init_args": {"size": 8},
    }
    assert saved_data({"fusion": {"data": {"class_path": path, "init_args": {}}}})["class_path"] == path
    # A file can name no other class, which would be imported.
    assert saved_data({"fusion": {"data": {"class_path": "os.system", "init_args": {}}}}) is None
    assert saved_data({}) is None


def test_parents_may_differ_in_the_choice_of_images_but_not_in_the_images(mlp_checkpoints):
    deep, shallow = mlp_checkpoints
    common = {"size": 8, "mean": None, "augment": True}
    one = trained(deep, "one.ckpt", FOLDER, **common, split={"part": "A"}, limit_train=50, batch_size=7)
    two = trained(shallow, "two.ckpt", FOLDER, **common, split={"part": "B"}, limit_train=50, batch_size=9)
    assert common_data([one, two])["init_args"] == {**common, "limit_train": 50, "batch_size": 7}
    for name, value in {"size": 9, "mean": [0.5], "data_dir": "x"}.items():
        other = trained(shallow, "other.ckpt", FOLDER, **{**common, name: value})
        with pytest.raises(FusionError, match=f"images, got {name} .* for one.ckpt and .* for other.ckpt; say by --da"):
            common_data([one, other])
    with pytest.raises(FusionError, match="got class ImageFolderDataModule for one.ckpt and DigitsDataModule for digi"):
        common_data([one, trained(shallow, "digits.ckpt", **common)])


@pytest.mark.parametrize(
    "command",
    [["test", "--ckpt_path", "{0}"], ["predict", "--ckpt_path", "{0}", "-o", "x.csv"],
     ["fuse", "{0}", "{1}", "-o", "x.ckpt"], ["transfer", "--source", "{0}", "--target", "{1}", "-o", "x.ckpt"]],
    ids=lambda command: command[0],
)  # fmt: skip
def test_a_checkpoint_that_does_not_say_needs_data(mlp_checkpoints, capsys, command):
    given = [word.format(*mlp_checkpoints) for word in command]
    assert "Expected --data, got none, and nothing in deep.ckpt" in refused(capsys, *given, *QUIET)


def test_one_option_of_the_data_may_be_changed(mlp_checkpoints, capsys):
    path = trained(mlp_checkpoints[0], "one.ckpt", "MNISTDataModule", data_dir="nowhere", pad_to=None)
    # Only that data module has the option.
    assert "none/here" in refused(capsys, "test", "--ckpt_path", path, "--data.data_dir", "none/here", *QUIET)
    cli.main(["test", "--ckpt_path", path, "--data", "DigitsDataModule", *QUIET])
    assert "test_acc" in capsys.readouterr().out


def test_the_shape_of_an_export_is_that_of_the_data(mlp_checkpoints, capsys):
    cli.main(["export", trained(mlp_checkpoints[0], "one.ckpt", batch_size=7), "one.pt2"])
    assert "takes [samples, 1, 8, 8]" in capsys.readouterr().out
    assert "Expected --shape, got none" in refused(capsys, "export", str(mlp_checkpoints[0]), "two.pt2")
