"""Checkpoints of parents that know other classes: from folders of images to one network that knows all by name."""

import csv
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_digits

from clafusion import FusionOptions, fuse
from clafusion.callbacks import FusionCallback
from clafusion.datamodules import ImageFolderDataModule
from clafusion.errors import FusionError
from clafusion.lightning_modules import (
    FusionTrainer,
    ImageClassifier,
    load_parent,
    read_checkpoint,
    save_checkpoint,
)
from clafusion.lightning_modules.checkpoints.reading import load_classes
from clafusion.lightning_modules.commandline import cli
from clafusion.lightning_modules.commands.evaluation import controls, side_by_side
from clafusion.lightning_modules.compatibility import label_places, load_parents

#: Digits under other names.
NAMES = {"cat": 0, "dog": 1, "car": 2, "truck": 3}
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
SHORT = [*QUIET, "--trainer.enable_model_summary", "false"]
UNITED = ["--fusion.teacher", "auto", "--fusion.targets", "auto", "--fusion.num_samples", "250"]


def write_images(folder: Path, classes: dict[str, int]) -> None:
    """70 training and 20 test images of each class."""
    digits = load_digits()
    for name, digit in classes.items():
        for number, image in enumerate(digits.images[digits.target == digit][:90]):
            path = folder / ("train" if number < 70 else "test") / name / f"{number:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).round().astype(np.uint8)).save(path)


def data(folder: Path) -> list[str]:
    return ["--data", "ImageFolderDataModule", "--data.data_dir", str(folder), "--data.size", "8"]


def module(folder: Path) -> ImageFolderDataModule:
    return ImageFolderDataModule(str(folder), size=8, augment=False, val_fraction=0.1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of images: those of each parent, of both, of a class that nobody knows, and with other names."""
    root = tmp_path_factory.mktemp("images")
    content = {
        "pets": {name: NAMES[name] for name in ("cat", "dog")},
        "vehicles": {name: NAMES[name] for name in ("car", "truck")},
        "all": NAMES,
        "foreign": {"cat": 0, "zebra": 4},
    }
    for name, classes in content.items():
        write_images(root / name, classes)
    return {name: root / name for name in content}


@pytest.fixture(scope="module")
def parents(folders, tmp_path_factory) -> list[Path]:
    """Checkpoints of `fit`: of a network that knows cats and dogs, and of one that knows cars and trucks."""
    root = tmp_path_factory.mktemp("parents")
    for name, hidden in (("pets", [24, 16, 12]), ("vehicles", [24, 16])):
        architecture = {"name": "MLP", "in_features": 192, "hidden": hidden, "num_classes": 2, "bias": True}
        given = ["--model.architecture", json.dumps(architecture), "--model.lr", "0.05", "--data.augment", "false"]
        where = ["--trainer.default_root_dir", str(root / name), "--trainer.max_epochs", "30", *SHORT]
        cli.main(["fit", *data(folders[name]), *given, "--data.batch_size", "32", "--trainer.logger", "false", *where])
    return [root / "pets" / "last.ckpt", root / "vehicles" / "last.ckpt"]


@pytest.fixture(scope="module")
def united(folders, parents, tmp_path_factory) -> Path:
    """What `fuse` makes of both, in a folder with its record."""
    output = tmp_path_factory.mktemp("united") / "fused.ckpt"
    run("fuse", *parents, *data(folders["all"]), "-o", output, *UNITED, "--figures", "false", "--quiet", *QUIET)
    return output


def run(*args: Any) -> None:
    cli.main([str(arg) for arg in args])


def refused(capsys, *args: Any) -> str:
    with pytest.raises(SystemExit) as end:
        run(*args)
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert re.fullmatch(r"clafusion: error: [^\n]+\n", error), error
    return error


@torch.no_grad()
def accuracy(path: Path, folder: Path, names: list[str]) -> float:
    """The accuracy on test images, with the outputs in the order of some names."""
    images = module(folder)
    images.setup()
    part = images.test_dataloader().dataset
    answers = load_parent(path)(images.preprocess(part.images)).argmax(1).tolist()
    right = [names[a] == images.class_names[label] for a, label in zip(answers, part.labels.tolist(), strict=True)]
    return sum(right) / len(right)


def measured(capsys, path: Path, folder: Path) -> float:
    capsys.readouterr()
    run("test", "--ckpt_path", path, *data(folder), *QUIET)
    [value] = re.findall(r"test_acc\W+([\d.]+)", capsys.readouterr().out)
    return float(value)


def test_a_training_on_folders_keeps_the_names(parents):
    assert [read_checkpoint(path)["class_names"] for path in parents] == [["cat", "dog"], ["car", "truck"]]
    assert ImageClassifier.load_from_checkpoint(parents[0]).class_names == ["cat", "dog"]


def test_parents_that_know_other_classes_become_one_that_knows_all_by_name(folders, parents, united):
    saved, record = read_checkpoint(united), json.loads(united.with_suffix(".json").read_text())
    assert saved["class_names"] == record["classes"] == ["car", "cat", "dog", "truck"]
    rows = {row["name"]: row["test_acc"] for row in record["networks"]}
    assert list(rows) == [
        *("pets/last.ckpt", "vehicles/last.ckpt", "ensemble", "gated ensemble", "fused"),
    ]
    assert [row.get("knows") for row in record["networks"]] == [2, 2, None, None, None]
    # A parent is right about its own images and no others.
    for row, path, own in zip(rows.values(), parents, ("pets", "vehicles"), strict=False):
        assert row == pytest.approx(accuracy(path, folders[own], read_checkpoint(path)["class_names"]) / 2)
    assert rows["fused"] == pytest.approx(accuracy(united, folders["all"], record["classes"]))
    assert rows["fused"] > max(list(rows.values())[:2]) + 0.1


def test_the_record_says_which_network_was_chosen_and_who_was_trusted(united):
    record = json.loads(united.with_suffix(".json").read_text())
    assert set(record["candidates"]) == {"anchor", "union", "centroids"}
    assert record["chosen"] == min(record["candidates"], key=record["candidates"].get)
    assert record["teacher"] == "gated" and sum(record["trust"]) == pytest.approx(1)
    page = united.with_suffix(".html").read_text()
    assert "Which network was chosen" in page and "Which parents were trusted" in page
    assert all(f"{score:.4f}" in page for score in record["candidates"].values())
    assert all(f"{share:.1%}" in page for share in record["trust"])
    assert "Between the parents" not in page  # an average of other outputs means nothing


def test_images_are_matched_by_the_names_of_their_classes(folders, united, capsys):
    names = ["car", "cat", "dog", "truck"]
    for part in ("all", "pets", "vehicles"):
        wanted = accuracy(united, folders[part], names)
        assert measured(capsys, united, folders[part]) == pytest.approx(wanted)
    assert accuracy(united, folders["pets"], ["cat", "dog", *names]) < 0.7  # by number it would be wrong


def test_images_of_a_class_that_the_network_does_not_know_are_refused(folders, united, capsys):
    error = refused(capsys, "test", "--ckpt_path", united, *data(folders["foreign"]), *QUIET)
    assert "classes that the network can tell apart (car, cat, dog, truck), got 'zebra' from ImageFolder" in error


def test_predict_shows_and_writes_names(folders, united, tmp_path, capsys):
    capsys.readouterr()
    run("predict", "--ckpt_path", united, *data(folders["pets"]), *QUIET)
    shown = dict(re.findall(r"(\w+)\s+│\s+(\d+) │\s+[\d.]+% │", capsys.readouterr().out))
    assert set(shown) <= set(NAMES) and sum(map(int, shown.values())) == 40
    header, *rows = csv.reader(united.with_suffix(".csv").read_text().splitlines())
    assert header == ["file", "class", "probability"]
    assert {name: str(count) for name, count in Counter(row[1] for row in rows).items()} == shown
    right = sum(Path(file).parent.name == name for file, name, _ in rows) / len(rows)
    assert right == pytest.approx(accuracy(united, folders["pets"], ["car", "cat", "dog", "truck"]))
    assert all(0.25 < float(probability) <= 1 for _, _, probability in rows)
    # Labels are not looked at: those of another class do no harm.
    run("predict", "--ckpt_path", united, *data(folders["foreign"]), *QUIET, "-o", tmp_path / "other.csv")
    assert len((tmp_path / "other.csv").read_text().splitlines()) == 41
    error = refused(capsys, "predict", "--ckpt_path", united, *data(folders["pets"]), *QUIET)
    assert "fused.csv, which exists; give --overwrite" in error


def test_finetuning_goes_on_with_the_classes_of_all(folders, united, tmp_path, capsys):
    options = ["--trainer.max_epochs", "3", "--trainer.default_root_dir", tmp_path, "--trainer.logger", "false"]
    run("fit", "--ckpt_path", united, *data(folders["vehicles"]), *options, "--model.lr", "0.01", *SHORT)
    assert read_checkpoint(tmp_path / "last.ckpt")["class_names"] == ["car", "cat", "dog", "truck"]
    assert measured(capsys, tmp_path / "last.ckpt", folders["vehicles"]) > 0.8  # not taught that cars are cats


def test_the_command_line_may_name_the_classes(folders, parents, united, tmp_path, capsys):
    given = ["fuse", *parents, *data(folders["all"]), *UNITED, "--report", "false", *QUIET]
    run(*given, "--classes", "[[cat, dog], [car, truck]]", "-o", tmp_path / "named.ckpt")
    shown = capsys.readouterr().out
    assert re.search(r"chosen: .*; divergence from what the parents say together: anchor \d", shown)
    assert re.search(r"trusted: pets/last.ckpt \d+%, vehicles/last.ckpt \d+% of the samples", shown)
    ours, theirs = load_parent(tmp_path / "named.ckpt").state_dict(), load_parent(united).state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    asked = yaml.safe_load((tmp_path / "named.yaml").read_text())
    assert asked["classes"] == [["cat", "dog"], ["car", "truck"]]
    # Whole numbers are the labels of the data: car 0, cat 1, dog 2, truck 3.
    run(*given, "--classes", "[[1, 2], [0, 3]]", "-o", tmp_path / "numbered.ckpt", "--overwrite", "--json")
    record = json.loads(capsys.readouterr().out)
    assert record["classes"] == read_checkpoint(tmp_path / "numbered.ckpt")["class_names"] == [0, 1, 2, 3]
    ours = load_parent(tmp_path / "numbered.ckpt").state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


def test_layers_of_parents_that_know_other_classes_are_aligned(folders, parents, tmp_path, capsys):
    run("fuse", *parents, *data(folders["all"]), "-o", tmp_path / "x.ckpt", "--align_only", *QUIET)
    assert "onto the depth of pets/last.ckpt" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("folder", "more", "message"),
    [
        ("foreign", [], "classes that the parents together can tell apart (car, cat, dog, truck), got 'zebra'"),
        ("all", ["--classes", "[[cat, dog], [car]]"], "2 classes for the outputs of vehicles/last.ckpt, got ['car']"),
        ("all", ["--classes", "[[1, 2], [2, 3]]"], "can tell apart (1, 2, 3), got 0 from ImageFolderDataModule"),
        ("all", ["--classes", "cat"], "classes"),
    ],
)
def test_classes_that_do_not_fit_are_refused(folders, parents, tmp_path, capsys, folder, more, message):
    given = ["fuse", *parents, *data(folders[folder]), "-o", tmp_path / "x.ckpt", *QUIET, *more]
    assert message in refused(capsys, *given)
    assert not list(tmp_path.iterdir())


def test_images_of_one_parent_alone_give_a_warning(folders, parents):
    with pytest.warns(UserWarning, match="images of the 4 classes of all parents, got 2 classes from ImageFolder"):
        load_parents([str(path) for path in parents], module(folders["pets"]), [["cat", "dog"], ["car", "truck"]])


def test_a_callback_fuses_parents_that_know_other_classes(folders, parents, tmp_path):
    callback = FusionCallback([str(path) for path in parents], FusionOptions(teacher="gated", num_samples=250))
    trainer = FusionTrainer(
        max_epochs=1, callbacks=[callback], default_root_dir=str(tmp_path), accelerator="cpu", logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    classifier = ImageClassifier(lr=1e-4)
    trainer.fit(classifier, module(folders["all"]))
    assert classifier.class_names == ["car", "cat", "dog", "truck"]
    rows = {row["name"]: row["val_acc"] for row in callback.record["networks"]}
    assert list(rows) == ["pets/last.ckpt", "vehicles/last.ckpt", "fused"]
    assert max(list(rows.values())[:2]) <= 0.5 < rows["fused"]
    assert read_checkpoint(tmp_path / "last.ckpt")["class_names"] == classifier.class_names


def test_the_teacher_that_was_used_is_among_the_contestants(folders, parents):
    images = module(folders["all"])
    networks, batches = [load_parent(path) for path in parents], list(images.alignment_batches(250))
    classes = [["cat", "dog"], ["car", "truck"]]
    fusion = fuse(networks, batches, FusionOptions(teacher="gated"), classes)
    parents_by_name = dict(zip(("pets", "vehicles"), networks, strict=True))
    found = side_by_side(parents_by_name, fusion) | controls(parents_by_name, fusion)
    x = torch.cat(batches)
    with torch.no_grad():
        wide = [found[name](x) for name in list(found)[:2]]
        assert torch.equal(wide[0][:, [1, 2]], networks[0](x)) and (wide[0][:, [0, 3]] == -torch.inf).all()
        torch.testing.assert_close(found["gated ensemble"](x), fusion.teacher.log_probabilities(wide))
        assert not torch.allclose(found["gated ensemble"](x), found["ensemble"](x))


# --- names in files and of data ---


class Named:
    image_shape, num_classes, class_names = (1, 8, 8), 3, ["b", "a", "c"]


class Unnamed:
    image_shape, num_classes = (1, 8, 8), 3


def test_outputs_are_found_by_name_or_by_number():
    assert label_places(Named(), ["a", "b", "c", "d"], "it").tolist() == [1, 0, 2]
    assert label_places(Named(), ["b", "a", "c", "d"], "it") is None
    assert label_places(Unnamed(), ["a", "b", "c", "d"], "it") is None
    assert label_places(Named(), [0, 2, 1, 7], "it").tolist() == [0, 2, 1]
    for images, classes, message in (
        (Named(), ["a", "b", "d"], r"it can tell apart \(a, b, d\), got 'c' from Named"),
        (Unnamed(), ["a", "b"], r"\(a, b\), got 3 classes from Unnamed"),
        (Unnamed(), [0, 1, 3], r"\(0, 1, 3\), got 2 from Unnamed"),
    ):
        with pytest.raises(FusionError, match=message):
            label_places(images, classes, "it")


def test_older_checkpoints_have_no_names(mlp_checkpoints, parents):
    assert load_classes([str(path) for path in mlp_checkpoints]) is None
    assert load_classes([str(mlp_checkpoints[0]), str(parents[0])]) is None
    assert load_classes([str(path) for path in parents]) == [["cat", "dog"], ["car", "truck"]]


@pytest.mark.parametrize("names", ["ab", [["a"], ["b"]], ["a", "a"], ["a", 1], {"a": 1}, []])
def test_names_of_another_form_are_refused(names, parents, tmp_path):
    content = torch.load(parents[0], weights_only=True)
    torch.save({**content, "class_names": names}, tmp_path / "odd.ckpt")
    with pytest.raises(FusionError, match="class_names in .* as different words, got others"):
        load_classes([str(tmp_path / "odd.ckpt")])
    with pytest.raises(FusionError, match="class_names in the checkpoint as different words"):
        ImageClassifier.load_from_checkpoint(tmp_path / "odd.ckpt")


def test_names_survive_being_saved_by_hand(tmp_path):
    classifier = ImageClassifier({"name": "MLP", "in_features": 4, "hidden": [3], "num_classes": 2})
    classifier.class_names = ["no", "yes"]
    save_checkpoint(classifier, tmp_path / "a.ckpt")
    assert ImageClassifier.load_from_checkpoint(tmp_path / "a.ckpt").class_names == ["no", "yes"]
