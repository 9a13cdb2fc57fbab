"""The examples, at tiny scale."""

import gc
import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torchvision.models import resnet18, resnet34

from clafusion import load_network
from clafusion.lightning_modules import load_parent
from clafusion.lightning_modules.commandline import cli
from tests.datamodules.test_folders import write_class_folders
from tests.helpers import ROOT

EXAMPLES = ROOT / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_networks_of_torchvision_on_a_folder_of_images(tmp_path):
    write_class_folders(tmp_path / "images", 20)
    output = tmp_path / "fused.safetensors"
    scale = ["--size", "32", "--epochs", "1", "--samples", "40", "--correction", "repair"]
    accuracies = example("torchvision_folder").main([str(tmp_path / "images"), *scale, "--output", str(output)])
    assert list(accuracies) == ["deep", "shallow", "ensemble", "fused"]
    assert len(load_network(output).fc.weight) == 3


@pytest.mark.slow
def test_the_way_from_torchvision_in_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for part in ("train", "test"):
        write_class_folders(tmp_path / "photos" / part, 20)
    torch.manual_seed(0)
    for name, network in {"deep": resnet34, "shallow": resnet18}.items():
        torch.save(network(num_classes=3).state_dict(), f"{name}.pt")
    readme = (EXAMPLES.parent / "README.md").read_text()
    commands = re.findall("^    clafusion (.*)$", readme, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["convert", "convert", "fuse"]
    few = ["--fusion.num_samples", "40", "--fusion.correction", "repair", "--trainer.accelerator", "cpu"]
    for command in commands:
        cli.main([*shlex.split(command), *(few if command.startswith("fuse") else [])])
    assert load_parent("fused.ckpt").architecture["blocks"] == [3, 4, 6, 3]
    assert "fused" in Path("fused.html").read_text() and len(list(Path("fused_figures").iterdir())) > 20


@pytest.mark.slow
def test_different_skills_become_one():
    accuracies = example("skill_transfer").main(["--epochs", "20"])
    assert accuracies["ensemble"] > max(accuracies["general"], accuracies["personal"])
    best = max(value for name, value in accuracies.items() if name.startswith("fused"))
    assert best > max(accuracies["general"], accuracies["personal"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_a_stream_of_shards_is_trained_and_fused_on():
    pytest.importorskip("webdataset")
    accuracies = example("streaming").main(["--epochs", "3"])
    # WebDataset leaves the shards of a stream that is not read to its end to the garbage collector.
    gc.collect()
    assert list(accuracies) == ["deep", "shallow", "fused"] and min(accuracies.values()) > 0.5


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"torchvision_folder", "skill_transfer", "streaming"}
