"""Images that are decoded on demand: the same batches, trainings and samples as with images in memory."""

import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pytorch_lightning import seed_everything
from torch import Tensor
from torchvision.datasets import ImageFolder

from clafusion.datamodules import ImageFolderDataModule, decoding
from clafusion.datamodules.image_files import FileList
from clafusion.errors import FusionError
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, read_checkpoint
from tests.processes import clafusion, succeed

# To go on in the same folder is the point.
pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

CLASSES = ("ant", "bee", "cat")
SIZE = 8
#: Ten images of each class: 3 validation, 6 test and 21 training images.
KNOWLEDGE: list[dict[str, Any]] = [
    {},
    {"label_set": [2, 0], "limit_train": 9, "skip_train": 2},
    {"split": {"kind": "size", "fraction": 0.5}, "domain": {"kind": "rotate", "degrees": 90, "share": 0.4}},
    {"domain": {"kind": "invert", "share": 0.4}, "pad_to": 12},
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty pictures of noise in colour, none of them square, as JPEG and as PNG."""
    generator = np.random.default_rng(0)
    for number in range(30):
        path = tmp_path / "images" / CLASSES[number % 3] / f"{number:02}.{'jpg' if number % 2 else 'png'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(256, size=(9, 13, 3), dtype=np.uint8)).save(path)
    return tmp_path / "images"


def ready(folder: Path, in_memory: Any, **arguments: Any) -> ImageFolderDataModule:
    given = {"size": SIZE, "batch_size": 4, "eval_batch_size": 5, "num_workers": 0, **arguments}
    data = ImageFolderDataModule(str(folder), in_memory=in_memory, **given)
    torch.manual_seed(3)
    data.setup()
    return data


def batches(data: ImageFolderDataModule) -> Iterator[tuple[Tensor, ...]]:
    """All that a data module gives: two epochs, evaluation, and samples to fuse on."""
    loader = data.train_dataloader()
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        yield from loader
    for each in (data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        yield from each
    yield from ((samples,) for samples in data.alignment_batches(7, seed=1, batch_size=3))
    yield from data.validation_batches()


def assert_equal(one: Iterator[tuple[Tensor, ...]], two: Iterator[tuple[Tensor, ...]]) -> None:
    for first, second in zip(one, two, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("arguments", KNOWLEDGE, ids=lambda arguments: "-".join(arguments) or "plain")
def test_batches_are_those_of_images_in_memory(folder, arguments, workers):
    here, there = ready(folder, True, **arguments), ready(folder, False, num_workers=workers, **arguments)
    assert here.sizes == there.sizes
    assert_equal(batches(here), batches(there))
    assert hasattr(here.train_dataloader().dataset.images, "shape")
    assert isinstance(there.train_dataloader().dataset.images, FileList)


@pytest.mark.parametrize("in_memory", [True, False])
def test_pixels_are_those_of_pillow_for_the_files_of_torchvision(folder, in_memory):
    wanted = {
        np.array(ImageOps.fit(image, (SIZE, SIZE), Image.Resampling.BILINEAR)).transpose(2, 0, 1).tobytes(): label
        for image, label in ImageFolder(str(folder))
    }
    data = ready(folder, in_memory)
    found = {
        image.numpy().tobytes(): label
        for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())
        for images, labels in loader
        for image, label in zip(images, labels.tolist(), strict=True)
    }
    assert found == wanted and len(wanted) == 30


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the files that are decoded from now on."""
    decoded: list[int] = []
    original = FileList.decode
    monkeypatch.setattr(FileList, "decode", lambda files, number: decoded.append(number) or original(files, number))
    return decoded


@pytest.mark.parametrize("in_memory", [True, False])
def test_only_the_samples_to_fuse_on_are_decoded(folder, in_memory, monkeypatch):
    decoded = counted(monkeypatch)
    assert sum(map(len, ready(folder, in_memory).alignment_batches(5))) == 5
    assert len(decoded) == len(set(decoded)) == 5


def test_in_memory_a_part_is_decoded_once_and_when_it_is_needed(folder, monkeypatch):
    decoded, data = counted(monkeypatch), ready(folder, True)
    for _ in range(2):
        list(data.test_dataloader())
        assert len(decoded) == 6
    list(data.train_dataloader())
    list(data.alignment_batches(10))
    assert len(decoded) == 6 + 21


def test_drawing_samples_leaves_pytorchs_generator_alone(folder):
    data = ready(folder, False)
    before = torch.get_rng_state()
    list(data.alignment_batches(5))
    assert torch.equal(torch.get_rng_state(), before)


def test_files_can_be_sent_to_workers_that_are_not_forked(folder):
    part = ready(folder, False, **KNOWLEDGE[2])._part("train")
    assert_equal(iter([part[[0, 3, 2]]]), iter([pickle.loads(pickle.dumps(part))[[0, 3, 2]]]))


@pytest.mark.parametrize("arguments", KNOWLEDGE, ids=lambda arguments: "-".join(arguments) or "plain")
def test_a_subset_of_files_is_that_of_their_images(folder, arguments):
    part, chosen = ready(folder, False, **arguments)._part("train"), torch.tensor([4, 0, 3])
    here, there = part.decoded().subset(chosen), part.subset(chosen).decoded()
    assert torch.equal(here.images, there.images) and torch.equal(here.labels, there.labels)
    assert here.size_in_bytes == part.subset(chosen).size_in_bytes


# --- where the images are held


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize(("spare", "held"), [(0, True), (-1, False)])
def test_images_are_held_where_they_fit_into_a_third_of_the_free_memory(
    folder, monkeypatch, caplog, spare, held, processes
):
    needed = processes * 30 * (3 * SIZE * SIZE + 8)
    monkeypatch.setattr(decoding, "free_memory", lambda: 3 * needed + spare)
    monkeypatch.setattr(ImageFolderDataModule, "_neighbours", processes)
    with caplog.at_level("INFO"):
        data = ready(folder, "auto")
    assert (not isinstance(data.train_dataloader().dataset.images, FileList)) is held
    said = "Images are decoded on demand: all 30 would take 0 MiB, more than a third of the 0 MiB that are free"
    assert (said in caplog.text) is not held


def test_too_many_images_to_hold_are_refused_with_their_size(folder):
    data = ready(folder, True, size=2**21)
    with pytest.raises(FusionError, match=r"Expected [\d,]+ MiB of memory for 21 images, got less; .*in_memory auto"):
        data.train_dataloader()


@pytest.mark.parametrize("given", [None, 0, 3])
def test_workers_are_as_given_or_those_that_there_is_use_for(folder, monkeypatch, given):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)), raising=False)
    for in_memory, automatic in ((True, 0), (False, 6)):
        data = ready(folder, in_memory, num_workers=given)
        assert data.train_dataloader().num_workers == (automatic if given is None else given)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_memory": "yes"}, "in_memory to be auto, true or false, got 'yes'"),
        ({"in_memory": 1}, "in_memory to be auto, true or false, got 1"),
        ({"on_error": "skip"}, "on_error to be raise or replace, got 'skip'"),
    ],
)
def test_bad_arguments_are_refused(folder, arguments, message):
    with pytest.raises(FusionError, match=f"Expected {message}"):
        ImageFolderDataModule(str(folder), **arguments)


# --- images that cannot be read


def broken(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_bytes(b"no image")


def training_files(folder: Path) -> list[str]:
    files = ready(folder, False)._part("train").images
    return [str(files.path(number).relative_to(folder)) for number in range(len(files.names))]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_an_epoch_by_its_name_alone(folder, workers):
    broken(folder, training_files(folder)[5])
    loader = ready(folder, False, num_workers=workers).train_dataloader()
    with pytest.raises(FusionError, match="^Expected an image in .*, got cannot identify.*; remove") as refusal:
        list(loader)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("in_memory", "workers"), [(True, 0), (False, 0), (False, 2)])
def test_the_next_image_of_its_class_stands_in(folder, in_memory, workers):
    names = training_files(folder)
    labels = ready(folder, False)._part("train").labels.tolist()
    ants = [number for number, label in enumerate(labels) if label == 0]
    whole = ready(folder, True)._part("train").decoded().images
    wanted = whole.clone()
    wanted[ants[1]] = wanted[ants[2]] = whole[ants[3]]
    wanted[ants[-1]] = whole[ants[0]]
    broken(folder, *(names[ants[place]] for place in (1, 2, -1)))
    data = ready(folder, in_memory, num_workers=workers, on_error="replace")
    with pytest.warns(UserWarning) as warnings:
        found = list(data.train_dataloader())
    order = list(data.train_dataloader().sampler)
    assert torch.equal(torch.cat([images for images, _ in found]), wanted[order])
    assert torch.cat([each for _, each in found]).tolist() == [labels[number] for number in order]
    said = sorted(str(warning.message) for warning in warnings)
    assert len(said) == 3 and all("another one of its class stands in for it (" in line for line in said)
    assert sorted(line.rpartition("(")[2] for line in said) == ["1 so far)", "2 so far)", "3 so far)"]
    assert sorted(data.unreadable) == sorted(str(folder / names[ants[place]]) for place in (1, 2, -1))
    list(data.train_dataloader())  # and is said once


def test_nothing_stands_in_for_a_whole_class_or_for_an_evaluated_image(folder):
    broken(folder, *(name for name in training_files(folder) if name.startswith("ant")))
    with pytest.raises(FusionError, match="Expected an image in .*ant.*; remove"):
        list(ready(folder, False, on_error="replace").train_dataloader())
    data = ready(folder, False, on_error="replace")
    files = data._part("test").images
    files.path(2).write_bytes(b"")
    with pytest.raises(FusionError, match=f"Expected an image in {files.path(2)}, got cannot identify"):
        list(data.test_dataloader())


# --- trainings


NETWORK = {"name": "MLP", "in_features": 3 * SIZE * SIZE, "hidden": [6], "num_classes": 3, "dropout": 0.5}


class Interruption(Exception):
    pass


def fit(root: Path, folder: Path, stop: int | None = None, **arguments: Any) -> dict[str, Tensor]:
    """Two epochs of 6 batches from the beginning or from last.ckpt, up to a batch or to the end."""

    class Stopping(ImageClassifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trainer.fit_loop.total_batch_idx == stop:
                raise Interruption
            return super().training_step(batch, batch_idx)

    seed_everything(3, verbose=False)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "limit_val_batches": 1}
    trainer = FusionTrainer(
        accelerator="cpu", devices=1, max_epochs=2, default_root_dir=str(root), save_every_n_steps=1, **quiet
    )
    data = ImageFolderDataModule(str(folder), **{"size": SIZE, "batch_size": 4, "num_workers": 0, **arguments})
    last = root / "last.ckpt"
    trainer.fit(Stopping(NETWORK, lr=0.05), data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    return read_checkpoint(last)["state_dict"]


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(("first", "then"), [(False, False), (True, False), (False, True)])
def test_a_training_goes_on_in_the_middle_of_an_epoch(folder, tmp_path, first, then):
    whole = fit(tmp_path / "whole", folder, in_memory=True)
    with pytest.raises(Interruption):
        fit(tmp_path / "cut", folder, stop=8, in_memory=first)
    assert_same(fit(tmp_path / "cut", folder, in_memory=then), whole)


def test_a_training_that_an_unreadable_image_ended_goes_on_with_others_in_its_place(folder, tmp_path):
    names, order = training_files(folder), list(ready(folder, True).train_dataloader().sampler)
    broken(folder, names[order[13]])  # of the fourth batch
    with pytest.warns(UserWarning, match="stands in for it"):
        whole = fit(tmp_path / "whole", folder, in_memory=True, on_error="replace")
    with pytest.raises(FusionError, match="Expected an image in"):
        fit(tmp_path / "cut", folder, in_memory=False)
    assert read_checkpoint(tmp_path / "cut" / "last.ckpt")["global_step"] == 3
    with pytest.warns(UserWarning, match="stands in for it"):
        assert_same(fit(tmp_path / "cut", folder, in_memory=False, on_error="replace"), whole)


@pytest.mark.parametrize("change", ["removed", "renamed", "modified"])
def test_files_that_changed_since_the_checkpoint_are_noticed(folder, tmp_path, change):
    with pytest.raises(Interruption):
        fit(tmp_path / "run", folder, stop=2)
    path = folder / "bee" / "01.jpg"
    if change == "modified":
        path.write_bytes(path.read_bytes() + b"\0")
    else:
        path.rename(folder / "bee" / "99.jpg" if change == "renamed" else tmp_path / "gone.jpg")
    now = 29 if change == "removed" else 30
    with pytest.raises(FusionError, match=rf"go on with files 30 of digest \w+.*, got files {now} of digest \w+"):
        fit(tmp_path / "run", folder)
    fit(tmp_path / "run", folder, allow_changes=True)


def test_a_folder_may_be_moved_and_copied(folder, tmp_path):
    with pytest.raises(Interruption):
        fit(tmp_path / "run", folder, stop=2)
    folder.rename(tmp_path / "moved")
    for path in (tmp_path / "moved").rglob("*.*"):
        path.touch()
    fit(tmp_path / "run", tmp_path / "moved")


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "workers"), [(1, 2), (2, 1)])
def test_a_training_on_demand_that_is_killed_ends_as_one_in_memory(folder, tmp_path, processes, workers):
    """Of 6 batches in an epoch, or 3 on each of 2 processes, killed in the middle of the first."""
    architecture = str(NETWORK).replace("'", '"')
    command = ["fit", "--ckpt_path", "last", "--seed_everything", "3", "--model.architecture", architecture]
    command += ["--data", "ImageFolderDataModule", "--data.data_dir", str(folder), "--data.size", str(SIZE)]
    command += ["--data.batch_size", "4", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "2"]
    command += ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    command += ["--trainer.save_every_n_steps", "1"]
    command += ["--config", "configs/trainer/ddp.yaml"] if processes > 1 else []
    on_demand = [*command, "--data.in_memory", "false", "--data.num_workers", str(workers)]
    on_demand += ["--trainer.default_root_dir", "killed", "--trainer.callbacks+=processes.KillAt"]
    on_demand += ["--trainer.callbacks.batches=[2]", f"--trainer.callbacks.folder={tmp_path}"]
    assert clafusion(tmp_path, *on_demand).returncode == -signal.SIGKILL
    succeed(tmp_path, *on_demand)
    succeed(tmp_path, *command, "--data.in_memory", "true", "--trainer.default_root_dir", "whole")
    killed, whole = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("killed", "whole"))
    assert killed["global_step"] == whole["global_step"] == 12 // processes
    assert_same(killed["state_dict"], whole["state_dict"])
