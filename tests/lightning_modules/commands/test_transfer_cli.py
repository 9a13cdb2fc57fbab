"""`clafusion transfer` and `clafusion fuse --align_only`: what they write, print and refuse."""

import json
from pathlib import Path

import pytest
import torch

from clafusion import FusionError, FusionOptions, average, fuse, layer_costs, networks, transfer
from clafusion.datamodules import DigitsDataModule
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, load_parent, read_checkpoint, save_checkpoint
from clafusion.lightning_modules.commands.transfer import transfer_checkpoint
from tests.helpers import largest_difference
from tests.lightning_modules.commandline.test_cli import DIGITS, QUIET, fuse_arguments, in_an_empty_folder, refused, run  # noqa: F401 (a fixture)

OPTIONS = FusionOptions(num_samples=70, pin_last=0, correction="none")
GIVEN = ["--fusion.num_samples", "70", "--fusion.pin_last", "0", "--fusion.correction", "none"]


def arguments(pair, *more: str) -> list[str]:
    """Of a transfer from the shallow network to the deep one."""
    deep, shallow = pair
    return [
        "transfer",
        "--source",
        str(shallow),
        "--target",
        str(deep),
        "--output",
        "out.ckpt",
        *QUIET,
        *GIVEN,
        *DIGITS,
        *more,
    ]


def record() -> dict:
    return json.loads(Path("out.json").read_text())


def samples() -> list[torch.Tensor]:
    return list(DigitsDataModule().alignment_batches(70, 0))


# --- what it does ----------------------------------------------------------------------------------------------------


def test_transfer_writes_an_ordinary_checkpoint_and_its_record(mlp_checkpoints, capsys):
    run(*arguments(mlp_checkpoints))
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["out.ckpt", "out.json", "out.yaml"]
    found = record()
    assert [row["name"] for row in found["networks"]] == ["source", "target", "result"]
    assert all(0 <= row["test_acc"] <= 1 and row["parameters"] > 0 for row in found["networks"])
    assert found["map"]["pairs"][-1] == [[0, 0]] and len(found["map"]["layer_costs"][0]) == 4
    assert (found["combine"], found["options"]["mapping"], found["seeds"]["fusion"]) == ("none", "optimal", 0)
    assert found["seconds"] > 0 and found["peak_memory_bytes"] > 0 and len(found["source"]["sha256"]) == 64
    assert read_checkpoint("out.ckpt")["fusion"] == found
    deep, shallow = map(load_parent, mlp_checkpoints)
    expected = transfer(shallow, deep, "optimal", samples(), options=OPTIONS)
    assert largest_difference(load_parent("out.ckpt"), expected) == 0
    table = capsys.readouterr().out
    assert f"{found['networks'][-1]['test_acc']:.2%}" in table and "source" in table
    run("test", "--ckpt_path", "out.ckpt", *QUIET)
    assert f"{found['networks'][-1]['test_acc']:.4f}"[:5] in capsys.readouterr().out


@pytest.mark.parametrize("combine", ["average", "transport", "insert"])
def test_what_becomes_of_it_is_composition(mlp_checkpoints, combine):
    run(*arguments(mlp_checkpoints, "--combine", combine, "--mapping", "random", "--fusion.weights", "[1, 3]"))
    options = FusionOptions(**{**OPTIONS.to_dict(), "mapping": "random", "weights": [1, 3]})
    deep, shallow = map(load_parent, mlp_checkpoints)
    moved = transfer(shallow, deep, "random", samples(), options=options)
    expected = {
        "average": lambda: average([deep, moved], [1, 3]),
        "transport": lambda: fuse([deep, moved], samples(), options).model,
        "insert": lambda: fuse([deep, shallow], samples(), options).model,
    }[combine]()
    assert largest_difference(load_parent("out.ckpt"), expected) < 1e-6
    names = [row["name"] for row in record()["networks"]]
    assert names == ["source", "target", *(["transferred"] if combine != "insert" else []), "result"]
    assert ("fusion" in record()) == (combine != "average") and ("map" in record()) == (combine != "insert")


def test_a_target_can_be_drawn_anew(mlp_checkpoints):
    architecture = {"name": "MLP", "in_features": 64, "hidden": [30, 20, 10], "num_classes": 10}
    base = [
        "transfer",
        "--source",
        str(mlp_checkpoints[1]),
        "--target_architecture",
        json.dumps(architecture),
        *QUIET,
        *DIGITS,
    ]
    for output, seed in (("0", 0), ("1", 0), ("2", 1)):
        Path(output).mkdir()
        run(
            *base,
            "--output",
            f"{output}/out.ckpt",
            "--mapping",
            "chain",
            "--classifier",
            "--seed_everything",
            str(seed),
        )
    one, again, other = (load_parent(f"{folder}/out.ckpt") for folder in "012")
    assert one.architecture == networks.build(architecture).architecture
    assert largest_difference(one, again) == 0 and not torch.equal(one.fc3.weight, other.fc3.weight)
    assert torch.equal(one.fc1.weight, other.fc1.weight)
    assert json.loads(Path("0/out.json").read_text())["target_architecture"] == architecture


def test_align_only_shows_the_maps_and_the_costs_of_all_stages(mlp_checkpoints, capsys):
    run(*fuse_arguments(mlp_checkpoints), "--align_only")
    assert [path.name for path in Path.cwd().iterdir()] == ["fused.json"]
    found = json.loads(Path("fused.json").read_text())
    # Both ends are pinned, which forces the map; the costs are measured all the same.
    assert found["alignments"] == [[[0, 1, 2, 3], [0]], [[0, 3], [0]]] and found["template"] == 0
    deep, shallow = map(load_parent, mlp_checkpoints)
    for cost, expected in zip(found["layer_costs"][1], layer_costs(deep, shallow, samples()), strict=True):
        assert torch.allclose(torch.tensor(cost).double(), expected, atol=1e-6)
    assert [parent["path"] for parent in found["parents"]] == list(map(str, mlp_checkpoints))
    out = capsys.readouterr().out
    assert "shallow.ckpt onto the depth of deep.ckpt" in out and "fc2 = fc4" in out
    assert f"{found['layer_costs'][1][0][3][1]:.3f}" in out
    # Only the record is in its way, and what it left is not replaced unasked.
    assert "got fused.json, which exists" in refused(capsys, *fuse_arguments(mlp_checkpoints), "--align_only")


def test_align_only_agrees_with_fuse(mlp_checkpoints):
    for pins in ("0", "1"):
        run(*fuse_arguments(mlp_checkpoints), "--align_only", "--overwrite", "--fusion.pin_last", pins)
        alone = json.loads(Path("fused.json").read_text())
        run(*fuse_arguments(mlp_checkpoints), "--overwrite", "--fusion.pin_last", pins)
        fused = json.loads(Path("fused.json").read_text())
        assert alone["alignments"] == fused["alignments"] and alone["template"] == fused["template"]
        measured = fused["layer_costs"][1]
        assert (measured == [None, None]) == (pins == "1")
        assert pins == "1" or measured[0] == alone["layer_costs"][1][0]


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"target": None}, "a target or a target_architecture, got neither; give one of --target and"),
        ({"target_architecture": {"name": "vgg11"}}, "a target or a target_architecture, got both"),
        ({"source": "none.ckpt"}, "Expected a checkpoint, got none.ckpt"),
        ({"source": {"name": "MLP", "in_features": 49, "hidden": [4], "num_classes": 10}}, "49 values, as .* takes"),
        ({"source": {"name": "VGG", "channels": [[4], [4]], "in_channels": 1}}, "the same stages"),
        ({"combine": "insert", "classifier": True}, "no classifier with combine insert"),
        ({"output": "out.pt"}, "NAME.ckpt"),
        ({"output": "none/out.ckpt"}, "a folder that can be written"),
    ],
)
def test_bad_transfers_are_refused(mlp_checkpoints, given, message):
    if isinstance(given.get("source"), dict):
        save_checkpoint(ImageClassifier(given["source"]), "source.ckpt")
        given = {"source": "source.ckpt"}
    deep, shallow = map(str, mlp_checkpoints)
    before = list(Path.cwd().iterdir())
    trainer = FusionTrainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(FusionError, match=message):
        transfer_checkpoint(
            trainer,
            ImageClassifier(),
            DigitsDataModule(),
            **{"source": shallow, "target": deep, "output": "out.ckpt", **given},
        )
    assert list(Path.cwd().iterdir()) == before


def test_bad_use_ends_with_one_line(mlp_checkpoints, capsys):
    assert "mapping" in refused(capsys, *arguments(mlp_checkpoints, "--mapping", "magic"))
    given = ["--model.architecture", "{name: MLP, in_features: 64, hidden: [4], num_classes: 10}"]
    assert "leave out --model.architecture" in refused(capsys, *arguments(mlp_checkpoints, *given))


def test_existing_results_are_replaced_only_on_demand(mlp_checkpoints, capsys):
    Path("out.json").write_text("precious")
    assert "got out.json, which exists; give --overwrite" in refused(capsys, *arguments(mlp_checkpoints))
    run(*arguments(mlp_checkpoints), "--overwrite")
    assert record()["output"] == "out.ckpt"


def test_iterative_alignment_alone_is_refused(mlp_checkpoints, capsys):
    three = fuse_arguments([*mlp_checkpoints, mlp_checkpoints[1]])
    line = refused(capsys, *three, "--align_only", "--fusion.many", "iterative")
    assert "Expected many=many_to_one to align layers alone, got iterative" in line
