"""Images in folders: which layouts are understood, what a network gets to see of them, and what is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets import ImageFolder

import cli
from clafusion import FusionError
from datamodules import ImageFolderDataModule
from tests.data_fixtures import real_images

NAMES = ("bag", "coat", "shirt")
PER_CLASS = 10


def colour(grey: np.ndarray) -> np.ndarray:
    return np.stack([grey, grey // 2, 255 - grey], axis=-1)


def write_classes(folder: Path, first: int = 0, count: int = PER_CLASS, names: tuple[str, ...] = NAMES) -> None:
    """Writes real images 32x32, each only once anywhere, as PNG files below a folder for each class."""
    images, _ = real_images(first + count * len(names))
    for place, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            picture = Image.fromarray(colour(images[first + place * count + number]))
            picture.save(folder / name / f"{number}.{'PNG' if number % 2 else 'png'}")


def write_parts(root: Path, **counts: int) -> Path:
    first = 0
    for name, count in counts.items():
        write_classes(root / name, first, count)
        first += count * len(NAMES)
    return root


def ready(root: Path, **arguments: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(str(root), **{"size": 32, "val_fraction": 0.25, **arguments})
    data.setup()
    return data


def part(data: ImageFolderDataModule, name: str) -> tuple[Tensor, Tensor]:
    images = getattr(data, f"{name}_dataloader")().dataset
    return images.images, images.labels


def torchvisions(folder: Path) -> tuple[Tensor, Tensor]:
    pairs = list(ImageFolder(str(folder), transform=lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)))
    return torch.stack([image for image, _ in pairs]), torch.tensor([label for _, label in pairs])


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


# --- layouts ---


def test_three_folders_are_the_three_parts_as_torchvision_reads_them(tmp_path):
    write_parts(tmp_path, train=6, val=2, test=3)
    (tmp_path / "train" / "bag" / "deeper").mkdir()
    (tmp_path / "train" / "bag" / "0.png").rename(tmp_path / "train" / "bag" / "deeper" / "0.png")
    (tmp_path / "train" / "bag" / "boxes.txt").write_text("not an image")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    data = ready(tmp_path)
    assert (data.classes, data.num_classes, data.image_shape) == (list(NAMES), 3, (3, 32, 32))
    (tmp_path / "train" / ".ipynb_checkpoints").rmdir()
    for name in ("train", "val", "test"):
        assert_same(part(data, name), torchvisions(tmp_path / name))


@pytest.mark.parametrize("other", ["val", "test"])
def test_the_only_folder_beside_the_training_images_is_the_test_set(tmp_path, other):
    data = ready(write_parts(tmp_path, train=10, **{other: 3}), val_fraction=0.2)
    assert_same(part(data, "test"), torchvisions(tmp_path / other))
    assert data.sizes == {"train": 24, "val": 6, "test": 9}


@pytest.mark.parametrize("below", ["", "train"])
def test_one_folder_is_split_by_seed(tmp_path, below):
    write_classes(tmp_path / below)
    data, again = ready(tmp_path), ready(tmp_path)
    parts = {name: part(data, name) for name in ("train", "val", "test")}
    assert [len(parts[name][1]) for name in ("train", "val", "test")] == [18, 6, 6]
    assert parts["test"][1].bincount().tolist() == [2, 2, 2]
    everything = torch.cat([images for images, _ in parts.values()]).flatten(1)
    assert len(everything.unique(dim=0)) == 30
    assert torch.equal(everything.sum(0), torchvisions(tmp_path / below)[0].flatten(1).sum(0))
    for name, expected in parts.items():
        assert_same(part(again, name), expected)
    # The test set does not depend on which images are held out for validation.
    assert_same(part(ready(tmp_path, split_seed=1), "test"), parts["test"])
    assert not torch.equal(part(ready(tmp_path, test_seed=1), "test")[0], parts["test"][0])
    assert ready(tmp_path, test_fraction=0.5).test_size == 15


def write_tiny_imagenet(root: Path) -> Path:
    """The published layout, with two classes: boxes beside the images, annotations, a test set without labels."""
    images, _ = real_images(12)
    for place, name in enumerate(("n01443537", "n01629819")):
        folder = root / "train" / name / "images"
        folder.mkdir(parents=True)
        (folder.parent / f"{name}_boxes.txt").write_text("0.JPEG\t0\t0\t62\t62\n")
        for number in range(3):
            Image.fromarray(colour(images[place * 3 + number])).save(folder / f"{name}_{number}.JPEG")
    for name, first in (("val", 6), ("test", 9)):
        (root / name / "images").mkdir(parents=True)
        for number in range(3):
            Image.fromarray(images[first + number]).save(root / name / "images" / f"{name}_{number}.JPEG")
    lines = (
        "val_2.JPEG\tn01443537\t0\t32\t44\t62",
        "val_0.JPEG\tn01629819\t52\t55\t57\t59",
        "val_1.JPEG\tn01443537\t4\t0",
    )
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def test_tiny_imagenet_is_tested_on_its_annotated_images(tmp_path):
    data = ready(write_tiny_imagenet(tmp_path), val_fraction=0.0)
    assert data.classes == ["n01443537", "n01629819"] and data.sizes == {"train": 6, "val": 0, "test": 3}
    images, labels = part(data, "test")
    assert labels.tolist() == [0, 1, 0]
    for image, number in zip(images, (2, 0, 1), strict=True):
        with Image.open(tmp_path / "val" / "images" / f"val_{number}.JPEG") as picture:
            assert torch.equal(image, torch.from_numpy(np.array(picture)).expand(3, -1, -1))


# --- what a network gets to see ---


def test_images_of_any_shape_and_kind_are_scaled_and_cut_to_the_centre(tmp_path):
    pixels = np.zeros((20, 60, 4), np.uint8)
    pixels[:, 20:40] = (200, 100, 50, 255)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "0.png")
    Image.fromarray(pixels[..., 0]).save(tmp_path / "a" / "1.png")
    write_classes(tmp_path, count=5, names=("b", "c"))
    images, _ = ImageFolderDataModule(str(tmp_path), size=8).read()
    assert images.images[:2, :, 2:6, 2:6].flatten(2).unique(dim=2).squeeze(2).tolist() == [[200, 100, 50], [200] * 3]
    grey, _ = ImageFolderDataModule(str(tmp_path), size=8, grey=True).read()
    assert grey.images.shape == (10, 1, 8, 8) and grey.images[1, 0, 4, 4] == 200


def test_images_are_normalised_as_imagenets(tmp_path):
    write_classes(tmp_path)
    data = ready(tmp_path)
    batch = next(data.alignment_batches(4, batch_size=4))
    black = batch * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) + torch.tensor([0.485, 0.456, 0.406]).view(
        3, 1, 1
    )
    assert batch.shape == (4, 3, 32, 32) and black.min().abs() < 1e-6 and (black.max() - 1).abs() < 1e-6


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")
def test_a_network_is_trained_and_tested_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_parts(tmp_path / "mine", train=10, test=4)
    data = ["--data", "ImageFolderDataModule", "--data.data_dir", "mine", "--data.size", "16"]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.logger", "false"]
    network = '{"name": "MLP", "in_features": 768, "hidden": [8], "num_classes": 3}'
    run = ["--trainer.default_root_dir", "run", "--trainer.max_epochs", "1", "--trainer.log_every_n_steps", "1"]
    cli.main(["fit", *data, *quiet, *run, "--data.batch_size", "9", "--model.architecture", network])
    [checkpoint] = tmp_path.rglob("best.ckpt")
    cli.main(["test", "--ckpt_path", str(checkpoint), *data, *quiet])
    assert "test_acc" in capsys.readouterr().out


# --- what is refused ---


def removed(path: Path) -> None:
    for inside in path.iterdir():
        inside.unlink()
    path.rmdir()


def broken(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


BREAK = [
    (lambda root: broken(root / "train/coat/3.PNG"), "Expected an intact image .*train/coat/3.PNG, got OSError"),
    (lambda root: (root / "test/bag/0.png").write_text("text"), "test/bag/0.png, got UnidentifiedImageError"),
    (lambda root: removed(root / "test/coat"), "same classes in .*test as among the training images, got coat in only"),
    (lambda root: (root / "test/zebra").mkdir(), "got zebra in only one of them; make their folders alike"),
    (lambda root: (root / "train/zebra").mkdir(), "of every class in .*train, got none of zebra; remove"),
]


@pytest.mark.parametrize(("change", "message"), BREAK, ids=range(len(BREAK)))
def test_images_that_cannot_be_used_are_refused(tmp_path, change, message):
    write_parts(tmp_path, train=4, test=1)
    change(tmp_path)
    with pytest.raises(FusionError, match=message):
        ready(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "val_0.JPEG\tn9\t0",
            "one of the 2 classes of the training images in .*val_annotations.txt, got val_0.JPEG n9 0;",
        ),
        ("val_0.JPEG", "got val_0.JPEG; unpack the archive again"),
        ("", "val_annotations.txt, got none; unpack"),
        ("val_7.JPEG\tn01443537", "Expected an intact image .*val_7.JPEG, got FileNotFoundError"),
    ],
)
def test_annotations_that_cannot_be_used_are_refused(tmp_path, line, message):
    write_tiny_imagenet(tmp_path)
    (tmp_path / "val" / "val_annotations.txt").write_text(line)
    with pytest.raises(FusionError, match=message):
        ready(tmp_path)


def test_a_test_set_without_images_is_refused(tmp_path):
    write_classes(tmp_path)
    with pytest.raises(FusionError, match="Expected test images, got none of 30 with test_fraction 0.01; raise it"):
        ready(tmp_path, test_fraction=0.01)


def test_folders_that_are_none_of_the_layouts_are_refused(tmp_path):
    with pytest.raises(FusionError, match="Expected a folder of images, got .*missing; change data_dir"):
        ImageFolderDataModule(str(tmp_path / "missing"))
    with pytest.raises(FusionError, match="Expected a folder for each class in .*, got none; move the images"):
        ImageFolderDataModule(str(tmp_path))
    (tmp_path / "val" / "bag").mkdir(parents=True)
    with pytest.raises(FusionError, match="Expected a folder train beside val in .*, got none"):
        ImageFolderDataModule(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_dir": ""}, "Expected data_dir to be a string, got ''"),
        ({"size": 0}, "Expected size to be an integer of at least 1, got 0"),
        ({"grey": 1}, "Expected grey to be true or false, got 1"),
        ({"test_fraction": 1.0}, "Expected test_fraction between 0 and 1, got 1.0"),
        ({"test_seed": -1}, "Expected test_seed to be an integer of at least 0, got -1"),
        ({"val_fraction": 2}, "Expected val_fraction in .0, 1., got 2"),
    ],
)
def test_arguments_that_cannot_be_are_refused(tmp_path, arguments, message):
    (tmp_path / "bag").mkdir()
    with pytest.raises(FusionError, match=message):
        ImageFolderDataModule(**{"data_dir": str(tmp_path), **arguments})


def test_the_command_line_refuses_with_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["fit", "--data", "ImageFolderDataModule", "--data.data_dir", str(tmp_path / "none")])
    assert end.value.code == 2
    assert re.fullmatch(r"clafusion: error: [^\n]*Expected a folder of images, got [^\n]+\n", capsys.readouterr().err)
