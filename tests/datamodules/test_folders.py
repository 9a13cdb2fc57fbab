"""Images in folders: what becomes which part, and what is refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder

from clafusion.datamodules import ImageFolderDataModule, TinyImageNetDataModule
from clafusion.errors import FusionError
from clafusion.lightning_modules.commandline.cli import main
from tests.data_fixtures import real_images

CLASSES = ("bag", "boot", "coat")


def write_class_folders(folder: Path, count: int, classes: tuple[str, ...] = CLASSES, offset: int = 0) -> np.ndarray:
    """Real images as PNG files, `count` per class; returns them in the order of the classes."""
    images, _ = real_images(offset + count * len(classes))
    images = images[offset:]
    for number, image in enumerate(images):
        path = folder / classes[number // count] / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return images


def set_up(folder: Path, **arguments: Any) -> ImageFolderDataModule:
    data = ImageFolderDataModule(str(folder), **{"size": 32, **arguments})
    data.setup()
    return data


def test_classes_and_order_are_those_of_torchvision(tmp_path: Path) -> None:
    images = write_class_folders(tmp_path / "train", 4)
    write_class_folders(tmp_path / "test", 2, offset=12)
    data = set_up(tmp_path, val_fraction=0.0)
    theirs = ImageFolder(str(tmp_path / "train"))
    assert data.class_names == theirs.classes and data.num_classes == 3
    part = data.train_dataloader().dataset
    assert part.labels.tolist() == theirs.targets
    assert torch.equal(part.images, torch.tensor(images)[:, None].expand(-1, 3, -1, -1))
    assert data.sizes == {"train": 12, "val": 0, "test": 6}
    pixels = part.images[:1] / 255
    wanted = (pixels - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    assert torch.allclose(data.preprocess(part.images[:1]), wanted)


def test_one_folder_is_split_by_class_and_seed(tmp_path: Path) -> None:
    write_class_folders(tmp_path, 10)
    data, again, other = (set_up(tmp_path, split_seed=seed) for seed in (0, 0, 1))
    assert data.sizes == {"train": 21, "val": 3, "test": 6}
    labels = [loader.dataset.labels.bincount().tolist() for loader in (data.val_dataloader(), data.test_dataloader())]
    assert labels == [[1, 1, 1], [2, 2, 2]]
    tests = [one.test_dataloader().dataset.images for one in (data, again, other)]
    assert torch.equal(tests[0], tests[1]) and not torch.equal(tests[0], tests[2])
    everything = torch.cat([loader.dataset.images for loader in (data.train_dataloader(), data.val_dataloader())])
    assert len(torch.cat([everything, tests[0]]).flatten(1).unique(dim=0)) == 30


@pytest.mark.parametrize(
    ("parts", "sizes"),
    [
        (("train", "val"), {"train": 9, "val": 3, "test": 6}),
        (("train", "val", "test"), {"train": 12, "val": 6, "test": 6}),
    ],
)
def test_val_is_the_test_part_only_where_there_is_no_test(
    tmp_path: Path, parts: tuple[str, ...], sizes: dict[str, int]
) -> None:
    for number, part in enumerate(parts):
        write_class_folders(tmp_path / part, 4 if part == "train" else 2, offset=12 * number)
    assert set_up(tmp_path, val_fraction=0.25).sizes == sizes


def test_images_are_scaled_and_cropped_at_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = (10, 200, 90)
    for name in CLASSES[:2]:
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.fromarray(wide).save(tmp_path / "train" / name / "one.png")
    (tmp_path / "train").rename(tmp_path / "test")
    write_class_folders(tmp_path / "train", 2, CLASSES[:2])
    image = set_up(tmp_path, size=10, val_fraction=0.5).test_dataloader().dataset.images[0]
    assert image[:, 2:8, 2:8].flatten(1).unique(dim=1).tolist() == [[10], [200], [90]]


def test_the_command_line_trains_on_folders_and_its_checkpoint_needs_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_class_folders(tmp_path / "images", 20)
    options = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.default_root_dir", str(tmp_path)]
    data = ["--data", "ImageFolderDataModule", "--data.data_dir", str(tmp_path / "images"), "--data.size", "16"]
    architecture = '{"name": "MLP", "in_features": 768, "hidden": [8], "num_classes": 3}'
    main(["fit", *data, "--model.architecture", architecture, "--trainer.max_epochs", "1", *options])
    main(["test", "--ckpt_path", str(next(tmp_path.glob("**/last.ckpt"))), *data, *options])
    assert "test_acc" in capsys.readouterr().out


def write_tiny_imagenet(folder: Path, classes: int = 200) -> list[str]:
    """Real images in Tiny-ImageNet's layout: one to train on and one to validate with for each class."""
    images, _ = real_images(classes)
    names = [f"n{10_000_000 + 7 * number}" for number in range(classes)]
    (folder / "val" / "images").mkdir(parents=True)
    lines = []
    for number, (name, image) in enumerate(zip(names, images, strict=True)):
        (folder / "train" / name / "images").mkdir(parents=True)
        (folder / "train" / name / f"{name}_boxes.txt").write_text(f"{name}_0.JPEG\t0\t0\t62\t61\n")
        enlarged = Image.fromarray(image).resize((64, 64))
        enlarged.save(folder / "train" / name / "images" / f"{name}_0.JPEG")
        enlarged.convert("RGB").save(folder / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t61\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (folder / "wnids.txt").write_text("\n".join(reversed(names)) + "\n")
    return names


@pytest.mark.parametrize("above", [True, False])
def test_tiny_imagenet_is_read_as_it_is_published(tmp_path: Path, above: bool) -> None:
    names = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    data = TinyImageNetDataModule(str(tmp_path if above else tmp_path / "tiny-imagenet-200"), val_fraction=0.0)
    data.setup()
    assert (data.class_names, data.num_classes, data.image_shape) == (names, 200, (3, 64, 64))
    train, test = data.train_dataloader().dataset, data.test_dataloader().dataset
    assert train.labels.tolist() == list(range(200)) and test.labels.tolist() == list(reversed(range(200)))
    assert (train.images.float() - test.images.flip(0).float()).abs().mean() < 5  # the same images, compressed twice


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_dir": "nowhere"}, "data_dir to be a folder, got 'nowhere', which is none"),
        ({"data_dir": 3}, "data_dir to be a string, got 3"),
        ({"size": 0}, "size to be an integer of at least 1, got 0"),
        ({"test_fraction": 1.0}, r"test_fraction in \(0, 1\), got 1.0"),
        ({"mean": [0.5]}, r"mean as three numbers, got \[0.5\]"),
        ({"std": [1.0, 0.0, 1.0]}, r"std as three numbers above 0, got \[1.0, 0.0, 1.0\]"),
        ({"channels": 1}, "channels to be 3 for these images, got 1"),
    ],
)
def test_bad_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    write_class_folders(tmp_path, 2)
    with pytest.raises(FusionError, match=message):
        ImageFolderDataModule(**{"data_dir": str(tmp_path), **arguments})


def test_a_folder_without_classes_or_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="a folder with images for each class in .*, got none"):
        ImageFolderDataModule(str(tmp_path))
    (tmp_path / "train" / "bag").mkdir(parents=True)
    with pytest.raises(FusionError, match="a folder with images for each class in .*train, got none: .*bag"):
        ImageFolderDataModule(str(tmp_path))


def test_parts_of_other_classes_are_refused(tmp_path: Path) -> None:
    write_class_folders(tmp_path / "train", 2)
    write_class_folders(tmp_path / "test", 2, (*CLASSES[:2], "shirt"))
    with pytest.raises(FusionError, match="the same classes in every part, got 'coat' in one of them only; see .*test"):
        set_up(tmp_path)


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", None])
def test_a_broken_image_is_named(tmp_path: Path, content: bytes | None, in_memory: bool) -> None:
    write_class_folders(tmp_path, 4)
    path = tmp_path / "bag" / "0001.png"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    data = set_up(tmp_path, val_fraction=0.0, in_memory=in_memory)
    with pytest.raises(FusionError, match="Expected an image in .*0001.png, got .*; remove the file or put it right$"):
        for loader in (data.train_dataloader(), data.test_dataloader()):
            list(loader)


def test_what_is_not_tiny_imagenet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FusionError, match="the folder tiny-imagenet-200 in .*, got no wnids.txt; unpack"):
        TinyImageNetDataModule(str(tmp_path))
    write_tiny_imagenet(tmp_path, classes=3)
    annotations = tmp_path / "val" / "val_annotations.txt"
    annotations.write_text(annotations.read_text() + "val_0.JPEG\tn0\n")
    with pytest.raises(FusionError, match="a class of wnids.txt in each line of .*, got 'val_0.JPEG.tn0'"):
        TinyImageNetDataModule(str(tmp_path)).setup()
