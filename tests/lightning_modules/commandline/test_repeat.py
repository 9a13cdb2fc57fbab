"""The file that a command leaves repeats it, to the last bit."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from clafusion.lightning_modules import load_parent
from clafusion.lightning_modules.commandline import cli

QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
FIT = [*QUIET, "--trainer.enable_model_summary", "false", "--trainer.max_epochs", "2"]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def same(one: str | Path, other: str | Path) -> bool:
    ours, theirs = load_parent(one).state_dict(), load_parent(other).state_dict()
    return list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_training(monkeypatch):
    more = ["--model.lr", "0.03", "--seed_everything", "5", "--data.val_fraction", "0.3"]
    cli.main(["fit", "--config", "configs/train/digits_shallow.yaml", *FIT, *more])
    saved = "runs/digits_shallow/logs/version_0/config.yaml"
    torch.manual_seed(99)  # nothing that went before matters
    cli.main(["fit", "--config", saved, "--trainer.default_root_dir", "again"])
    assert same("runs/digits_shallow/last.ckpt", "again/last.ckpt")
    assert same("runs/digits_shallow/best.ckpt", "again/best.ckpt")
    cli.main(["fit", "--config", saved, "--trainer.default_root_dir", "other", "--seed_everything", "6"])
    assert not same("runs/digits_shallow/last.ckpt", "other/last.ckpt")


def test_a_fusion(mlp_checkpoints):
    options = ["--fusion.num_samples", "70", "--fusion.weights", "[0.7, 0.3]", "--fusion.pin_first", "0"]
    more = ["--data", "DigitsDataModule", "--data.split_seed", "3", "--quiet"]
    cli.main(
        ["fuse", *map(str, mlp_checkpoints), "-o", "fused.ckpt", *QUIET, *options, *more, "--check_parents", "false"]
    )
    Path("again").mkdir()
    cli.main(["fuse", "--config", "fused.yaml", "-o", "again/fused.ckpt"])
    assert same("fused.ckpt", "again/fused.ckpt")
    records = [json.loads(Path(folder, "fused.json").read_text()) for folder in (".", "again")]
    for key in ("options", "networks", "layer_costs", "transport_costs", "parents", "seeds"):
        assert records[0][key] == records[1][key]
    # But for where its results went, it is the same request.
    asked = [yaml.safe_load(Path(folder, "fused.yaml").read_text()) for folder in (".", "again")]
    assert asked[0].pop("output") == "fused.ckpt" and asked[1].pop("output") == "again/fused.ckpt"
    assert asked[0] == asked[1]


def test_a_file_of_ones_own_is_not_replaced(mlp_checkpoints, capsys):
    Path("fused.yaml").write_text("fusion: {num_samples: 70}  # mine\n")
    command = [
        "fuse",
        *map(str, mlp_checkpoints),
        "-o",
        "fused.ckpt",
        *QUIET,
        "--config",
        "fused.yaml",
        "--data",
        "DigitsDataModule",
    ]
    with pytest.raises(SystemExit) as end:
        cli.main(command)
    assert end.value.code == 2 and "got fused.yaml, which exists; give --overwrite" in capsys.readouterr().err
    assert [path.name for path in Path.cwd().iterdir()] == ["fused.yaml"]


@pytest.mark.slow
def test_a_transfer(mlp_checkpoints):
    deep, shallow = map(str, mlp_checkpoints)
    cli.main(
        [
            "transfer",
            "--source",
            shallow,
            "--target",
            deep,
            "--output",
            "out.ckpt",
            *QUIET,
            "--combine",
            "transport",
            "--data",
            "DigitsDataModule",
        ]
    )
    Path("again").mkdir()
    cli.main(["transfer", "--config", "out.yaml", "--output", "again/out.ckpt"])
    assert same("out.ckpt", "again/out.ckpt")


EXPERIMENT = """
experiment:
  name: tiny
  parents:
    deep: {architecture: {name: MLP, in_features: 64, hidden: [12, 10, 8], num_classes: 10}, epochs: 1, lr: 0.1}
    shallow: {architecture: {name: MLP, in_features: 64, hidden: [12, 8], num_classes: 10}, epochs: 1, lr: 0.1}
  fusions: {default: {num_samples: 70}}
  small: {data: {class: clafusion.datamodules.DigitsDataModule, init_args: {limit_train: 300}}}
data: {class_path: clafusion.datamodules.MNISTDataModule}
"""


@pytest.mark.parametrize("given, left", [([], 300), (["--data.limit_train", "200"], 200)])
def test_an_experiment(given, left):
    Path("tiny.yaml").write_text(EXPERIMENT)
    cli.main(["pipeline", "--config", "tiny.yaml", "--scale", "small", *given, "--seeds", "[3]", "--quiet", *QUIET])
    cli.main(["pipeline", "--config", "runs/tiny/pipeline.yaml", "--output", "again"])
    found = sorted(path.relative_to("runs/tiny") for path in Path("runs/tiny").rglob("*.ckpt"))
    assert len(found) == 6
    for path in found:
        assert same(Path("runs/tiny", path), Path("again", path))
    assert yaml.safe_load(Path("again/pipeline.yaml").read_text())["data"]["init_args"]["limit_train"] == left
