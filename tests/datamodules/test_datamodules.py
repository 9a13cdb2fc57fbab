"""The data modules: what they read, how they split it, what a network gets to see, and what they refuse."""

import gzip
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from clafusion.datamodules import CIFARDataModule, DigitsDataModule, ImageDataModule, MNISTDataModule
from clafusion.datamodules.idx import read_idx
from clafusion.datamodules.image_set import ImageSet, seed_generators, seeded, stratified_split
from clafusion.datamodules.pickles import read_pickle
from clafusion.datamodules.samplers import EpochSampler
from clafusion.datamodules.transforms import augment, normalize, pad_to_size
from clafusion.errors import FusionError
from tests.data_fixtures import FASHION, MNIST_FILES, python2_pickle, write_cifar, write_mnist

# Lightning 2.6 with torch 2.14: Lightning's own use of a deprecated name.
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning")

needs_fashion = pytest.mark.skipif(not FASHION.is_dir(), reason="the Debian package dataset-fashion-mnist is missing")


def keys(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def ready(**arguments: Any) -> DigitsDataModule:
    data = DigitsDataModule(**arguments)
    data.setup()
    return data


class Numbered(ImageDataModule):
    """Images whose first pixels say which image it is, so that every one of them is recognised anywhere."""

    num_classes = 5
    raw_shape = (1, 4, 5)
    mean = (0.0,)
    std = (1 / 255,)

    def read(self) -> tuple[ImageSet, ImageSet]:
        images = torch.arange(300)[:, None, None, None].expand(300, 1, 4, 5).clone()
        images = torch.where(torch.arange(5) == 0, images // 256, images % 256).to(torch.uint8)
        labels = torch.arange(300) % 5
        return ImageSet(images[:200], labels[:200]), ImageSet(images[200:], labels[200:])


def numbers(images: Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 256 + images[:, 0, 0, 1]).round().int().tolist()


class OnDevice(Trainer):
    """A trainer that says it computes on a device that is not there."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
        self.strategy._root_device = device  # type: ignore[attr-defined]


@pytest.mark.parametrize(("free", "workers", "moved"), [(1 << 40, 0, True), (1000, 0, False), (1 << 40, 1, False)])
def test_images_are_held_by_the_gpu_where_they_fit_a_quarter_of_it(monkeypatch, free, workers, moved) -> None:
    data, gpu, asked = Numbered(num_workers=workers), torch.device("cuda", 0), []
    data.setup()
    data.trainer = OnDevice(gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1 << 40))
    monkeypatch.setattr(ImageSet, "to", lambda images, device: asked.append(device) or images)
    loader = data.val_dataloader()
    assert asked == ([gpu] if moved else [])
    assert loader.dataset is data._part("val")


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_seeding_is_that_of_torch(device: str) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.rand(2)
    seed_generators(7, torch.device(device))
    assert torch.initial_seed() == 7
    assert torch.equal(torch.rand(3), expected)


# --- what the images are


def test_digits_are_all_of_sklearns_with_their_grey_levels() -> None:
    from sklearn.datasets import load_digits

    data = ready()
    assert (data.image_shape, data.num_classes) == ((1, 8, 8), 10)
    assert data.train_size + data.val_size + data.test_size == 1797
    parts = [data.train_dataloader().dataset, data.val_dataloader().dataset, data.test_dataloader().dataset]
    levels = torch.cat([part.images for part in parts])
    expected = torch.from_numpy(load_digits().images)
    assert levels.dtype == torch.uint8
    assert torch.equal((levels.double() * 16 / 255).round().sum(0)[0], expected.sum(0))
    assert sorted(levels.unique().tolist()) == [round(level * 255 / 16) for level in range(17)]


def test_digits_constants_are_those_of_the_training_images() -> None:
    whole, _ = DigitsDataModule().read()
    scaled = whole.images / 255
    assert DigitsDataModule.mean == (round(scaled.mean().item(), 4),)
    assert DigitsDataModule.std == (round(scaled.std(correction=0).item(), 4),)


@needs_fashion
def test_fashion_is_the_published_set_with_the_published_normalisation() -> None:
    data = MNISTDataModule("fashion", val_fraction=0.1)
    data.setup()
    assert (data.train_size, data.val_size, data.test_size) == (54_000, 6_000, 10_000)
    assert data.test_dataloader().dataset.labels.bincount().tolist() == [1000] * 10
    assert data.val_dataloader().dataset.labels.bincount().tolist() == [600] * 10
    # The extremes of the samples that the published implementation was run on: a black and a white pixel.
    batch = next(data.alignment_batches(512))
    assert torch.equal(batch.aminmax().min, torch.tensor(-0.42421296))
    assert torch.equal(batch.aminmax().max, torch.tensor(2.8214867))


@pytest.mark.parametrize("below", ["", "MNIST/raw"])
@pytest.mark.parametrize("compress", [False, True])
def test_mnist_is_found_plain_and_compressed(tmp_path: Path, below: str, compress: bool) -> None:
    written = write_mnist(tmp_path / below, compress=compress)
    train, test = MNISTDataModule(data_dir=str(tmp_path)).read()
    images = torch.cat([train.images, test.images]).squeeze(1).numpy()
    assert (len(train), len(test)) == (60, 20)
    assert (train.images.dtype, train.labels.dtype) == (torch.uint8, torch.int64)
    np.testing.assert_array_equal(images, written["images"])
    np.testing.assert_array_equal(torch.cat([train.labels, test.labels]).numpy(), written["labels"])


@pytest.mark.parametrize("num_classes", [10, 100])
def test_cifar_reads_its_published_format(tmp_path: Path, num_classes: int) -> None:
    written = write_cifar(tmp_path, num_classes, per_batch=20, test=10)
    data = CIFARDataModule(num_classes, data_dir=str(tmp_path))
    train, test = data.read()
    assert (len(train), len(test), data.num_classes, data.image_shape) == (100, 10, num_classes, (3, 32, 32))
    np.testing.assert_array_equal(torch.cat([train.images, test.images]).numpy(), written["images"])
    np.testing.assert_array_equal(torch.cat([train.labels, test.labels]).numpy(), written["labels"])


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_cifar_reads_what_todays_numpy_writes(tmp_path: Path, protocol: int) -> None:
    written = write_cifar(tmp_path, per_batch=20, test=10)
    for path in (tmp_path / "cifar-10-batches-py").iterdir():
        entries = {
            key.encode(): value.encode() if isinstance(value, str) else value
            for key, value in read_pickle(path).items()
        }
        path.write_bytes(pickle.dumps(entries, protocol=protocol))
    train, _ = CIFARDataModule(data_dir=str(tmp_path)).read()
    np.testing.assert_array_equal(train.images.numpy(), written["images"][:100])


def test_pickled_arrays_keep_their_type_and_order(tmp_path: Path) -> None:
    arrays = {
        "a": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "b": np.arange(3, dtype=">i2"),
        "c": b"\xff",
        "d": "é",
    }
    for protocol in (2, 4, 5):
        (tmp_path / "file").write_bytes(pickle.dumps(arrays, protocol=protocol))
        read = read_pickle(tmp_path / "file")
        for name in ("a", "b"):
            np.testing.assert_array_equal(read[name], arrays[name])
            assert read[name].dtype == arrays[name].dtype
        assert (read["c"], read["d"]) == (b"\xff", "é")


# --- how they are split


def test_parts_are_disjoint_and_together_everything() -> None:
    data = Numbered()
    data.setup()
    loaders = [data.train_dataloader(), data.val_dataloader(), data.test_dataloader()]
    parts = [numbers(loader.dataset.images.float()) for loader in loaders]
    assert sorted(sum(parts, [])) == list(range(300))
    assert sorted(parts[2]) == list(range(200, 300))
    assert (data.train_size, data.val_size, data.test_size) == (180, 20, 100)


def test_validation_part_is_stratified_and_selected_by_its_seed() -> None:
    first, again, other = (Numbered(split_seed=seed) for seed in (0, 0, 1))
    chosen = []
    for data in (first, again, other):
        data.setup()
        part = data.val_dataloader().dataset
        assert part.labels.bincount().tolist() == [4] * 5
        chosen.append(keys(part.images))
    assert chosen[0] == chosen[1] != chosen[2]


def test_stratified_split_rounds_per_class() -> None:
    labels = torch.tensor([0] * 10 + [1] * 5 + [2])
    rest, chosen = stratified_split(labels, 0.3, seed=3)
    assert labels[chosen].bincount(minlength=3).tolist() == [3, 2, 0]
    assert sorted(rest.tolist() + chosen.tolist()) == list(range(16))


def test_limit_keeps_a_random_few_of_the_training_part_only() -> None:
    whole, limited, more = Numbered(), Numbered(limit_train=30), Numbered(limit_train=60)
    for data in (whole, limited, more):
        data.setup()
    assert (limited.train_size, limited.val_size, limited.test_size) == (30, whole.val_size, whole.test_size)
    images = [keys(data.train_dataloader().dataset.images) for data in (limited, more, whole)]
    assert images[0] < images[1] < images[2]
    assert len(limited.train_dataloader().dataset.labels.unique()) == 5
    assert keys(limited.val_dataloader().dataset.images) == keys(whole.val_dataloader().dataset.images)


def test_setup_twice_changes_nothing() -> None:
    data = ready()
    before = data.train_dataloader().dataset
    data.setup("test")
    assert data.train_dataloader().dataset is before


def test_no_validation_part_means_no_batches() -> None:
    data = ready(val_fraction=0)
    assert (data.val_size, list(data.val_dataloader())) == (0, [])
    assert data.train_size + data.test_size == 1797


# --- in which order


def visited(data: Numbered, epoch: int) -> list[int]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [number for images, _ in loader for number in numbers(images.float())]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    orders = {}
    for seed in (1, 2):
        data = Numbered(batch_size=64)
        data.setup()
        seed_everything(seed, verbose=False)
        torch.rand(seed)  # what was drawn before must not matter
        for epoch in (1, 0, 1):
            order = visited(data, epoch)
            assert orders.setdefault((seed, epoch), order) == order
    assert len({tuple(order) for order in orders.values()}) == 4
    assert len({tuple(sorted(order)) for order in orders.values()}) == 1
    assert len(orders[1, 0]) == len(set(orders[1, 0])) == 180


def test_sampler_alone() -> None:
    sampler = EpochSampler(50, seed=7)
    first = list(sampler)
    assert len(sampler) == 50 and sorted(first) == list(range(50)) and list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_fetch_whole_batches_with_their_labels(workers: int) -> None:
    data = Numbered(batch_size=50, eval_batch_size=30, num_workers=workers)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        for images, labels in loader:
            assert images.dtype == torch.uint8 and labels.dtype == torch.int64
            assert [number % 5 for number in numbers(images.float())] == labels.tolist()
    assert [len(labels) for _, labels in data.train_dataloader()] == [50, 50, 50, 30]
    assert numbers(torch.cat([images for images, _ in data.test_dataloader()]).float()) == list(range(200, 300))


def test_generators_of_neighbouring_keys_differ() -> None:
    draws = {tuple(torch.randint(1000, (4,), generator=seeded("x", *key)).tolist()) for key in np.ndindex(3, 3, 3)}
    assert len(draws) == 27


# --- what a network sees


def slow_augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """The same choices, applied one image at a time with slices."""
    count, _, height, width = images.shape
    top, left = torch.randint(9, (2, count, 1), generator=generator)
    flipped = torch.randint(2, (count, 1), generator=generator)
    results = []
    for image, row, column, flip in zip(images, top, left, flipped, strict=True):
        padded = torch.zeros(image.shape[0], height + 8, width + 8, dtype=image.dtype)
        padded[:, 4:-4, 4:-4] = image
        crop = padded[:, int(row) : int(row) + height, int(column) : int(column) + width]
        results.append(torch.flip(crop, dims=(2,)) if flip else crop)
    return torch.stack(results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_equals_a_loop_over_the_images(dtype: torch.dtype) -> None:
    images = torch.randint(256, (64, 3, 7, 9), generator=seeded("images")).to(dtype)
    before = images.clone()
    result = augment(images, seeded("augment", 1))
    assert torch.equal(result, slow_augment(images, seeded("augment", 1)))
    assert torch.equal(result, augment(images, seeded("augment", 1)))
    assert not torch.equal(result, augment(images, seeded("augment", 2)))
    assert torch.equal(images, before) and result.dtype == dtype


def test_augmentation_reaches_every_crop_and_both_sides() -> None:
    marked = torch.zeros(4000, 1, 9, 9)
    marked[:, 0, 4, 4] = 1
    marked[:, 0, 4, 3] = 2  # to the left of the centre, unless flipped
    result = augment(marked, seeded("reach"))
    centres = {tuple(position) for position in (result[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert centres == {(row, column) for row in range(9) for column in range(9)}
    inside = (result == 1).flatten(1).float().argmax(1) % 9
    tail = (result == 2).flatten(1).float().argmax(1) % 9
    visible = (result == 2).flatten(1).any(1)
    flipped = (tail > inside)[visible].float().mean()
    assert 0.45 < flipped < 0.55


def test_preprocessing_equals_torchvisions() -> None:
    from torchvision.transforms import v2

    images = torch.randint(256, (10, 3, 32, 32), dtype=torch.uint8, generator=seeded("images"))
    mean, std = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
    expected = v2.Normalize(mean, std)(v2.ToDtype(torch.float32, scale=True)(images))
    assert CIFARDataModule().mean == mean and CIFARDataModule().std == std
    torch.testing.assert_close(CIFARDataModule().preprocess(images), expected, rtol=0, atol=1e-6)


def test_padding_is_black_and_grey_becomes_three_equal_channels() -> None:
    data = ready(pad_to=11, channels=3)
    assert data.image_shape == (3, 11, 11)
    plain, padded = next(ready().alignment_batches(20)), next(data.alignment_batches(20))
    black = (0 - data.mean[0]) / data.std[0]
    assert padded.shape == (20, 3, 11, 11) and padded.is_contiguous()
    for channel in range(3):
        assert torch.equal(padded[:, channel, 1:9, 1:9], plain[:, 0])
    frame = torch.ones(11, 11, dtype=torch.bool)
    frame[1:9, 1:9] = False
    torch.testing.assert_close(padded[:, :, frame], torch.full_like(padded[:, :, frame], black))


def test_padding_and_normalisation_alone() -> None:
    images = torch.full((1, 2, 1, 2), 255, dtype=torch.uint8)
    assert pad_to_size(images, 2, 5)[0, 0].tolist() == [[0, 255, 255, 0, 0], [0, 0, 0, 0, 0]]
    assert normalize(images, (0.0, 0.5), (1.0, 0.25), 2)[0, :, 0, 0].tolist() == [1.0, 2.0]


def test_alignment_batches_are_a_seeded_choice_of_training_images() -> None:
    data = Numbered(augment=True, val_fraction=0.2)
    batches = list(data.alignment_batches(70, seed=3, batch_size=32))
    assert [len(batch) for batch in batches] == [32, 32, 6]
    assert {(batch.dtype, batch.device.type, batch.requires_grad) for batch in batches} == {
        (torch.float32, "cpu", False)
    }
    chosen = numbers(torch.cat(batches))
    assert len(set(chosen)) == 70
    assert set(chosen) <= set(numbers(data.train_dataloader().dataset.images.float()))
    assert numbers(torch.cat(list(data.alignment_batches(70, seed=3)))) == chosen
    assert numbers(torch.cat(list(data.alignment_batches(40, seed=3)))) == chosen[:40]
    assert numbers(torch.cat(list(data.alignment_batches(70, seed=4)))) != chosen
    assert len(torch.cat(list(data.alignment_batches(160)))) == 160
    assert len(torch.cat(list(data.alignment_batches(161)))) == 160  # at most


@pytest.mark.parametrize("count", [1, 0, -5, 10.0, True])
def test_alignment_batches_refuse_at_once_too_few(count: Any) -> None:
    with pytest.raises(FusionError, match=rf"num_samples to be an integer of at least 2, got {count}"):
        Numbered(val_fraction=0.2).alignment_batches(count)


# --- under a trainer


class Recorder(LightningModule):
    """A linear classifier that keeps what it is given."""

    def __init__(self, data: ImageDataModule) -> None:
        super().__init__()
        self.layer = nn.Linear(int(np.prod(data.image_shape)), data.num_classes)
        self.seen: dict[tuple[str, int, int], Tensor] = {}
        self.losses: list[float] = []

    def record(self, kind: str, batch_idx: int, images: Tensor) -> None:
        self.seen[kind, self.current_epoch, batch_idx] = images.clone()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        self.record("train", batch_idx, images)
        loss = nn.functional.cross_entropy(self.layer(images.flatten(1)), labels)
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.record("val", batch_idx, batch[0])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.record("test", batch_idx, batch[0])

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0].flatten(1)).argmax(1)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def small_trainer(folder: Path, **arguments: Any) -> Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, **{"max_epochs": 2, **quiet, **arguments})


def fitted(folder: Path, data: ImageDataModule, seed: int = 0, **arguments: Any) -> tuple[Recorder, Trainer]:
    seed_everything(seed, verbose=False)
    model, trainer = Recorder(data), small_trainer(folder, **arguments)
    trainer.fit(model, datamodule=data)
    return model, trainer


def test_fit_test_and_predict_on_digits(tmp_path: Path) -> None:
    data = DigitsDataModule(batch_size=32)
    model, trainer = fitted(tmp_path, data, max_epochs=3)
    assert np.mean(model.losses[-10:]) < 0.5 < np.mean(model.losses[:5])
    trainer.test(model, datamodule=data, verbose=False)
    predictions = torch.cat(trainer.predict(model, datamodule=data))
    assert (predictions == data.test_dataloader().dataset.labels).float().mean() > 0.85


def test_trainer_shuffles_anew_each_epoch_and_repeats_itself(tmp_path: Path) -> None:
    runs = [fitted(tmp_path, Numbered(), seed)[0].seen for seed in (5, 5, 6)]
    first = {key: numbers(images) for key, images in runs[0].items() if key[0] == "train"}
    assert set(first) == {("train", epoch, batch) for epoch in (0, 1) for batch in (0, 1)}
    for epoch in (0, 1):
        order = torch.randperm(180, generator=seeded("epoch", 5, epoch))
        data = Numbered()
        data.setup()
        expected = numbers(data.train_dataloader().dataset.images[order].float())
        assert first["train", epoch, 0] + first["train", epoch, 1] == expected
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[0])
    assert numbers(runs[2]["train", 0, 0]) != first["train", 0, 0]


def test_only_training_is_augmented_and_by_seed_epoch_and_batch(tmp_path: Path) -> None:
    data = ready(augment=True, batch_size=128)
    model, trainer = fitted(tmp_path, data, seed=9)
    trainer.test(model, datamodule=data, verbose=False)
    part = data.train_dataloader().dataset
    for epoch in (0, 1):
        order = torch.randperm(data.train_size, generator=seeded("epoch", 9, epoch))
        for batch in range(data.train_size // 128):
            images = part.images[order[batch * 128 : (batch + 1) * 128]]
            expected = data.preprocess(images, seeded("augment", 9, 0, epoch, batch))
            assert torch.equal(model.seen["train", epoch, batch], expected)
            assert not torch.equal(expected, data.preprocess(images))
    assert torch.equal(model.seen["val", 0, 0], data.preprocess(data.val_dataloader().dataset.images))
    tested = torch.cat([images for key, images in model.seen.items() if key[0] == "test"])
    assert torch.equal(tested, data.preprocess(data.test_dataloader().dataset.images))


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    model, _ = fitted(tmp_path, DigitsDataModule(augment=True, num_workers=workers, limit_train=200), seed=1)
    reference, _ = fitted(tmp_path, DigitsDataModule(augment=True, limit_train=200), seed=1)
    assert torch.equal(model.layer.weight, reference.layer.weight)


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_images_follow_the_trainers_precision(tmp_path: Path, precision: str, dtype: torch.dtype) -> None:
    model, _ = fitted(tmp_path, DigitsDataModule(limit_train=200), precision=precision, max_epochs=1)
    assert model.seen["train", 0, 0].dtype == dtype == model.seen["val", 0, 0].dtype


def test_fit_without_validation_part(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Total length of `ResumableLoader` across ranks is zero"):
        model, _ = fitted(tmp_path, DigitsDataModule(val_fraction=0.0, limit_train=200), max_epochs=1)
    assert {kind for kind, _, _ in model.seen} == {"train"}


def test_arguments_travel_in_a_checkpoint_as_plain_values(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data", per_batch=20, test=10)
    data = CIFARDataModule(10, data_dir=str(tmp_path / "data"), limit_train=50)
    _, trainer = fitted(tmp_path, data, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = torch.load(tmp_path / "model.ckpt", weights_only=True)["datamodule_hyper_parameters"]
    assert loaded == {
        "num_classes": 10, "data_dir": str(tmp_path / "data"), "download": False, "augment": True, "limit_train": 50,
        "batch_size": 128, "eval_batch_size": 512, "num_workers": None, "val_fraction": 0.1, "split_seed": 0,
        "pad_to": None, "channels": None, "split": None, "skip_train": None, "label_set": None, "domain": None,
    }  # fmt: skip
    assert {type(value) for value in loaded.values()} <= {int, str, bool, float, type(None)}
    assert CIFARDataModule(**loaded).hparams == data.hparams


@pytest.mark.parametrize("module", [DigitsDataModule, MNISTDataModule, CIFARDataModule])
def test_command_line_sees_every_argument(module: type[ImageDataModule]) -> None:
    from jsonargparse import ArgumentParser

    parser = ArgumentParser()
    parser.add_class_arguments(module, "data")
    parsed = parser.parse_args(["--data.pad_to=32", "--data.channels=3", "--data.batch_size=7", "--data.augment=true"])
    data = module(**vars(parsed.data))
    assert (type(data), data.image_shape, data.batch_size, data.augment) == (module, (3, 32, 32), 7, True)
    names = set(vars(parsed.data))
    own = {"num_classes", "variant", "data_dir", "download", "allow_changes"}
    assert names - own == set(DigitsDataModule().hparams)


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size to be an integer of at least 1, got 0"),
        ({"batch_size": 1.5}, "batch_size to be an integer of at least 1, got 1.5"),
        ({"batch_size": True}, "batch_size to be an integer of at least 1, got True"),
        ({"batch_size": np.int64(8)}, "batch_size to be an integer"),
        ({"eval_batch_size": -1}, "eval_batch_size to be an integer of at least 1, got -1"),
        ({"num_workers": -1}, "num_workers to be an integer of at least 0, got -1"),
        ({"val_fraction": 1.0}, r"val_fraction in \[0, 1\), got 1.0"),
        ({"val_fraction": -0.1}, r"val_fraction in \[0, 1\), got -0.1"),
        ({"val_fraction": float("nan")}, r"val_fraction in \[0, 1\), got nan"),
        ({"val_fraction": "0.1"}, r"val_fraction in \[0, 1\), got '0.1'"),
        ({"split_seed": None}, "split_seed to be an integer of at least 0, got None"),
        ({"augment": 1}, "augment to be true or false, got 1"),
        ({"pad_to": 7}, "pad_to to be an integer of at least 8, got 7"),
        ({"pad_to": "32"}, "pad_to to be an integer of at least 8, got '32'"),
        ({"channels": 2}, "channels to be 1 or 3 for these images, got 2"),
        ({"channels": 0}, "channels to be an integer of at least 1, got 0"),
        ({"limit_train": 0}, "limit_train to be an integer of at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        DigitsDataModule(**arguments)


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (CIFARDataModule, {"channels": 1}, "channels to be 3 for these images, got 1"),
        (CIFARDataModule, {"num_classes": 20}, "num_classes to be 10 or 100, got 20"),
        (CIFARDataModule, {"num_classes": 10.0}, "num_classes to be 10 or 100, got 10.0"),
        (CIFARDataModule, {"data_dir": Path("x")}, "data_dir to be a string"),
        (CIFARDataModule, {"data_dir": ""}, "data_dir to be a string, got ''"),
        (MNISTDataModule, {"variant": "letters"}, "variant to be mnist or fashion, got 'letters'"),
        (MNISTDataModule, {"download": "yes"}, "download to be true or false, got 'yes'"),
    ],
)
def test_bad_arguments_of_file_modules_are_refused(module: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        module(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"limit_train": 181}, "at most the 180 training images, got 181"),
        ({"val_fraction": 0.001}, "got 200 and 0 with val_fraction 0.001 of 200"),
        ({"val_fraction": 0.999}, "got 0 and 200 with val_fraction 0.999 of 200"),
    ],
)
def test_impossible_splits_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(FusionError, match=message):
        Numbered(**arguments).setup()


@pytest.mark.parametrize("name", ["train_size", "val_size", "test_size"])
def test_sizes_before_setup_are_refused(name: str) -> None:
    with pytest.raises(FusionError, match="call setup"):
        getattr(DigitsDataModule(), name)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(4, 1, 4, 4, dtype=torch.uint8), torch.zeros(4).long(), r"uint8 \[4, 1, 4, 5\] .* \[4, 1, 4, 4\]"),
        (torch.zeros(4, 1, 4, 5), torch.zeros(4).long(), "torch.uint8 .* got torch.float32"),
        (torch.zeros(3, 1, 4, 5, dtype=torch.uint8), torch.zeros(4).long(), r"\[4, 1, 4, 5\] .* \[3, 1, 4, 5\]"),
        (torch.zeros(0, 1, 4, 5, dtype=torch.uint8), torch.zeros(0).long(), "at least one image"),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.tensor([0, 5]), r"labels in 0\.\.4, got 0\.\.5"),
        (torch.zeros(2, 1, 4, 5, dtype=torch.uint8), torch.tensor([-1, 4]), r"labels in 0\.\.4, got -1\.\.4"),
    ],
)
def test_sets_that_are_not_as_declared_are_refused(images: Tensor, labels: Tensor, message: str) -> None:
    good = Numbered().read()[0]
    for sets in ((ImageSet(images, labels), good), (good, ImageSet(images, labels))):
        data = Numbered()
        data.read = lambda sets=sets: sets  # type: ignore[method-assign]
        with pytest.raises(FusionError, match=message):
            data.setup()


# --- files that are missing or damaged


def test_missing_mnist_names_files_folders_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(FusionError) as caught:
        MNISTDataModule("fashion", data_dir=str(tmp_path)).setup()
    message = str(caught.value)
    for part in (*MNIST_FILES, str(tmp_path / "FashionMNIST" / "raw"), "download=true", "dataset-fashion-mnist"):
        assert part in message
    assert "\n" not in message and "got none of them" in message


def test_partly_missing_mnist_names_what_is_missing(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    (tmp_path / MNIST_FILES[2]).unlink()
    with pytest.raises(FusionError, match=f"got {tmp_path} without {MNIST_FILES[2]};"):
        MNISTDataModule(data_dir=str(tmp_path)).setup()


@pytest.mark.parametrize("num_classes", [10, 100])
def test_missing_cifar_names_files_and_remedy(tmp_path: Path, num_classes: int) -> None:
    with pytest.raises(FusionError, match="test.* in one of the folders .*cifar-10.*download=true"):
        CIFARDataModule(num_classes, data_dir=str(tmp_path)).setup()


def test_default_folder_is_data_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_mnist(tmp_path / "data")
    data = MNISTDataModule()
    data.setup()
    assert data.test_size == 20
    with pytest.raises(FusionError, match="data/cifar-10-batches-py"):
        CIFARDataModule().setup()


IMAGES = bytes((0, 0, 8, 3)) + struct.pack(">3I", 2, 3, 4) + bytes(24)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f", b"", "begins with nothing"),
        ("f", IMAGES[:10], "begins with 00000803"),
        ("f", IMAGES[:-1], r"24 values \[2, 3, 4\] in .*f, got 23"),
        ("f", IMAGES + b"x", "got more"),
        ("f", bytes((0, 0, 8, 1)) + IMAGES[4:], "in 3 dimensions, got .*f that begins with 00000801"),
        ("f", bytes((0, 0, 13, 3)) + IMAGES[4:], "unsigned bytes"),
        ("f.gz", gzip.compress(IMAGES)[:-9], "intact file .*f.gz"),
        ("f.gz", IMAGES, "intact file .*f.gz"),
        ("f.gz", gzip.compress(IMAGES)[:10] + b"\xff" * 30, "intact file .*f.gz"),
        ("f.gz", b"", "begins with nothing"),
    ],
    ids=["empty", "short header", "short", "long", "other dimensions", "other type"]
    + [f"gz {kind}" for kind in ("cut", "plain", "garbage", "empty")],
)
def test_damaged_idx_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FusionError, match=message):
        read_idx(tmp_path / name, dimensions=3)


def test_intact_idx_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(IMAGES[:-1] + b"\x07")
    assert read_idx(tmp_path / "f", 3).shape == (2, 3, 4) and int(read_idx(tmp_path / "f", 3)[1, 2, 3]) == 7


@pytest.mark.parametrize("length", [0, 1, 50, 30_000, -1])
def test_truncated_cifar_is_named(tmp_path: Path, length: int) -> None:
    write_cifar(tmp_path, per_batch=20, test=10)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(FusionError, match="data_batch_3") as caught:
        CIFARDataModule(data_dir=str(tmp_path)).setup()
    assert "\n" not in str(caught.value)


PIXELS = np.zeros((2, 3072), np.uint8)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"labels": [0, 1]}, "'data' as uint8 .* got NoneType"),
        ({"data": PIXELS}, "'labels' as 2 integers in 0..9"),
        ({"data": PIXELS, "labels": [0]}, "'labels' as 2 integers"),
        ({"data": PIXELS, "labels": [0, 10]}, "'labels' as 2 integers"),
        ({"data": PIXELS, "labels": [0, 2**70]}, "'labels' as 2 integers"),
        ({"data": PIXELS, "labels": [0, [1]]}, "'labels' as 2 integers"),
        ({"data": PIXELS, "labels": np.zeros((2, 2), int)}, "'labels' as 2 integers"),
        ({"data": PIXELS[:, 1:], "labels": [0, 1]}, r"got uint8 \[2, 3071\]"),
        ({"data": PIXELS.astype(np.int64), "labels": [0, 1]}, r"got int64 \[2, 3072\]"),
        ({"data": np.array(3, np.uint8), "labels": [0, 1]}, r"got uint8 \[\]"),
        ([1, 2], "cannot be used"),
    ],
)
def test_cifar_files_with_other_contents_are_named(tmp_path: Path, entries: Any, message: str) -> None:
    write_cifar(tmp_path, per_batch=20, test=10)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(entries))
    with pytest.raises(FusionError, match=message) as caught:
        CIFARDataModule(data_dir=str(tmp_path)).setup()
    assert "test_batch" in str(caught.value)


# --- pickles that want to run code


class Evil:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def evil_pickles(target: Path) -> dict[str, bytes]:
    """Pickles that would leave a file at `target`, or that abuse the names that are known."""
    good = python2_pickle({"data": PIXELS, "labels": [0, 1]})
    return {
        "eval": pickle.dumps({"data": Evil(eval, f"open({str(target)!r}, 'w')")}),
        "open": pickle.dumps({"data": Evil(open, str(target), "w")}),
        "mkdir": pickle.dumps(Evil(Path.mkdir, target)),
        "system": f"cos\nsystem\n(S'touch {target}'\ntR.".encode(),
        "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R.",
        "after the dictionary": good[:-1] + f"0cos\nsystem\n(S'touch {target}'\ntR.".encode(),
        "dotted": b"\x80\x04\x8c\x05numpy\x8c\x0edtype.__base__\x93)R.",
        "numpy": b"\x80\x02cnumpy\nload\n(U\x01xtR.",
        "submodule": b"\x80\x04\x8c\x0anumpy.core\x8c\x16multiarray.sys.modules\x93.",
        "object array": pickle.dumps({"data": np.array([Evil(eval, "1")], dtype=object)}),
        "object dtype": b"\x80\x02cnumpy\ndtype\nU\x02O8K\x00K\x01\x87R.",
        "codec": b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86R.",
        "altered name": b"\x80\x02cnumpy\ndtype\n}U\x08functionK\x01sb}.",
        "altered name by slots": b"\x80\x02cnumpy\ndtype\nN}U\x08functionK\x01s\x86b}.",
        "called class": b"\x80\x02cnumpy\nndarray\nK\x05\x85R.",
        "new object": b"\x80\x02cnumpy\nndarray\n)\x81.",
        "persistent": b"Pthing\n.",
        "extension": b"\x80\x02\x82\x01.",
        "huge": b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",
        "deep": b"\x80\x02" + b"(" * 200_000 + b"t" * 200_000 + b".",
    }


REASONS = {
    "eval": "it names builtins.eval",
    "open": f"it names {open.__module__}.open",  # io, and since Python 3.13 _io
    "dotted": "it names numpy.dtype.__base__",
    "submodule": "it names numpy.core.multiarray.sys.modules",
    "object dtype": "its arrays are of type O8",
    "codec": "it encodes text as rot13",
    "altered name": "changes the meaning of a name",
    "altered name by slots": "changes the meaning of a name",
    "called class": "builds an array in an unusual way",
    "persistent": "persistent",
}


@pytest.mark.parametrize("kind", evil_pickles(Path("x")))
def test_pickles_run_nothing(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "executed"
    path = tmp_path / "batch"
    path.write_bytes(evil_pickles(target)[kind])
    with pytest.raises(FusionError, match="batch") as caught:
        read_pickle(path)
    assert not target.exists()
    assert REASONS.get(kind, "") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_evil_pickles_are_evil(tmp_path: Path) -> None:
    """The control: an ordinary unpickler does run them."""
    for kind in ("eval", "open", "mkdir", "system", "after the dictionary"):
        target = tmp_path / kind.replace(" ", "_")
        loaded = pickle.loads(evil_pickles(target)[kind])
        assert target.exists()
        if isinstance(loaded, dict):
            loaded["data"].close()


def test_malicious_cifar_is_refused_by_the_data_module(tmp_path: Path) -> None:
    write_cifar(tmp_path, per_batch=20, test=10)
    target = tmp_path / "executed"
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(evil_pickles(target)["system"])
    with pytest.raises(FusionError, match="data_batch_1 .*names os.system"):
        CIFARDataModule(data_dir=str(tmp_path)).setup()
    assert not target.exists()


# --- downloads


def test_cifar_is_downloaded_once_on_demand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fake(root: str, download: bool) -> None:
        calls.append((root, download))
        write_cifar(Path(root), 100, per_batch=20, test=10)

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fake)
    data = CIFARDataModule(100, data_dir=str(tmp_path / "here"), download=True)
    data.prepare_data()
    data.prepare_data()
    data.setup()
    assert calls == [(str(tmp_path / "here"), True)] and data.test_size == 10
    CIFARDataModule(100, data_dir=str(tmp_path / "there")).prepare_data()
    assert len(calls) == 1


@pytest.mark.parametrize(("variant", "name"), [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
def test_mnist_is_downloaded_for_alignment_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: Any, name: str
) -> None:
    def fake(root: str, download: bool) -> None:
        write_mnist(Path(root) / name / "raw", compress=True)

    monkeypatch.setattr(torchvision.datasets, name, fake)
    data = MNISTDataModule(variant, data_dir=str(tmp_path), download=True)
    assert next(data.alignment_batches(10)).shape == (10, 1, 28, 28)


@pytest.mark.parametrize("error", [OSError("no\nroute"), RuntimeError("File not found or corrupted.")])
def test_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fake(root: str, download: bool) -> None:
        raise error

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    with pytest.raises(FusionError, match="download the images to .*(no route|corrupted).*check the network") as caught:
        CIFARDataModule(data_dir=str(tmp_path), download=True).prepare_data()
    assert "\n" not in str(caught.value)
