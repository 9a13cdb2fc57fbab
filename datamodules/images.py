"""The base of all image data modules: one uint8 tensor in memory, three disjoint parts, preprocessing on the device."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from clafusion.datamodules.arguments import check_classes, check_flag, check_whole
from clafusion.datamodules.domain import Domain, as_domain
from clafusion.datamodules.image_set import ImageSet, seed_generators, seeded, stratified_split
from clafusion.datamodules.resuming import ResumableDataModule
from clafusion.datamodules.samplers import EpochSampler, ResumableLoader, ShardSampler
from clafusion.datamodules.split import Split, as_split
from clafusion.datamodules.transforms import augment as crop_and_flip
from clafusion.datamodules.transforms import normalize, pad_to_size
from clafusion.errors import FusionError


def _whole_batch(batch: Any) -> Any:
    """Collate nothing: the data set fetches whole batches already."""
    return batch


def _image_memory(device: torch.device) -> int:
    """The bytes on a GPU that images may take: a quarter of the free ones, the rest is for the network."""
    return torch.cuda.mem_get_info(device)[0] // 4


class ImageDataModule(ResumableDataModule):
    """Base of the image data modules; a subclass reads the images (`read`).

    Training, validation and test are three disjoint parts: the validation part is a seeded, stratified share of the
    published training set, the test part is the published test set. Batches are uint8 until they are on the device;
    there they are padded, augmented (while training, with `augment`), scaled to `[0, 1]` and normalised by `mean`,
    `std`.

    A subclass sets `num_classes`, `raw_shape` (C, H, W as read), `mean` and `std` (one value per channel) before it
    calls `super().__init__`, and `class_names`, in the order of the labels, where the classes have names. A module may
    have its outputs in another order: its `label_places` says which of them stands for each class.

    Args:
        batch_size: Images per training batch.
        eval_batch_size: Images per batch of validation, test and prediction.
        num_workers: Worker processes per loader. The images are in memory already, so 0 is usually fastest: a GPU then
            holds them in its own memory, if they fit into a quarter of it.
        val_fraction: Share of each class of the training set held out for validation, in `[0, 1)`.
        split_seed: Selects the validation images, and the order in which `skip_train` and `limit_train` count.
        augment: Whether training images are cropped at random (padding 4) and flipped horizontally.
        pad_to: Zero-pad the images on all sides to this height and width.
        channels: 3 repeats grey images as RGB; None keeps the channels as they are.
        limit_train: Keep this many training images, chosen at random; the validation and test parts stay whole.
        split: Train on one of two parts of the remaining training images; None: on all of them.
        skip_train: Leave out this many training images before `limit_train` counts, so that networks which skip 0,
            2,000 and 4,000 and are limited to 2,000 share none.
        label_set: Images of these classes alone, in all three parts; their labels are 0, 1, ... in the order given.
        domain: Turn or invert the images, or a share of them, in all three parts; None: as they are.
        allow_changes: Whether an interrupted training may go on with other data, seed or number of processes.

    Raises:
        FusionError: An argument is of the wrong type or out of range.
    """

    num_classes: int
    class_names: list[str] | None = None
    raw_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __init__(
        self,
        batch_size: int = 128,
        eval_batch_size: int = 512,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        split_seed: int = 0,
        augment: bool = False,
        pad_to: int | None = None,
        channels: int | None = None,
        limit_train: int | None = None,
        split: Split | None = None,
        allow_changes: bool = False,
        skip_train: int | None = None,
        label_set: list[int] | None = None,
        domain: Domain | None = None,
    ) -> None:
        super().__init__(allow_changes)
        check_whole("batch_size", batch_size, 1)
        check_whole("eval_batch_size", eval_batch_size, 1)
        check_whole("num_workers", num_workers, 0)
        check_whole("split_seed", split_seed, 0)
        check_flag("augment", augment)
        check_flag("allow_changes", allow_changes)
        if type(val_fraction) not in (int, float) or not 0 <= val_fraction < 1:
            raise FusionError(f"Expected val_fraction in [0, 1), got {val_fraction!r}; 0.1 holds out a tenth")
        for name, count, least in (("limit_train", limit_train, 1), ("skip_train", skip_train, 0)):
            if count is not None:
                check_whole(name, count, least)
        self.image_shape = self._shape(pad_to, channels)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.augment = augment
        self.limit_train = limit_train
        self.skip_train = skip_train
        self.split = as_split(split)
        self.domain = as_domain(domain)
        if self.domain is not None:
            self.domain.check_shape(self.raw_shape)
        self.classes_read = self.num_classes
        self.label_set = None if label_set is None else check_classes("label_set", label_set)
        self._check_known("label_set", self.label_set or ())
        self.num_classes = len(self.label_set or range(self.num_classes))
        self._check_known("labels of split", self.split.classes if self.split else ())
        self._parts: dict[str, ImageSet] = {}
        # allow_changes belongs to one command, not to the run.
        self.save_hyperparameters(ignore=["allow_changes"])
        # A checkpoint holds plain containers only.
        plain = {name: value and value.to_dict() for name, value in (("split", self.split), ("domain", self.domain))}
        self.save_hyperparameters({**plain, "label_set": None if label_set is None else list(label_set)})

    def _shape(self, pad_to: int | None, channels: int | None) -> tuple[int, int, int]:
        """Return the shape (C, H, W) of a preprocessed image."""
        planes, height, width = self.raw_shape
        if channels is not None:
            check_whole("channels", channels, 1)
            if channels != planes and (planes, channels) != (1, 3):
                valid = "1 or 3" if planes == 1 else str(planes)
                raise FusionError(f"Expected channels to be {valid} for these images, got {channels}; change channels")
        if pad_to is not None:
            check_whole("pad_to", pad_to, max(height, width))
        return channels or planes, pad_to or height, pad_to or width

    def _check_known(self, name: str, labels: Sequence[int]) -> None:
        unknown = [label for label in labels if label >= self.num_classes]
        if unknown:
            raise FusionError(
                f"Expected {name} in 0..{self.num_classes - 1}, got {unknown[0]}; choose classes of this data"
            )

    def read(self) -> tuple[ImageSet, ImageSet]:
        """Read the published training and test sets; subclasses implement it.

        Returns:
            The training and the test set: uint8 `[N, *raw_shape]` and int64 labels in `range(num_classes)`.
        """
        raise NotImplementedError

    def read_validation(self) -> ImageSet | None:
        """Read the validation images if they are a set of their own; None: they are a share of the training set."""
        return None

    def setup(self, stage: str | None = None) -> None:
        """Read the images and split them, once; later calls change nothing.

        Args:
            stage: Ignored: the three parts are always defined together.

        Raises:
            FusionError: The data cannot be read, or a part would be empty.
        """
        if self._parts:
            return
        whole, test = self.read()
        validation = self.read_validation()
        for name, images in (("training", whole), ("test", test), ("validation", validation)):
            if images is not None:
                images.check(name, self.raw_shape, self.classes_read)
        fraction = self.val_fraction if validation is None else 0.0
        rest, held_out = stratified_split(whole.labels, fraction, self.split_seed)
        if self.label_set is not None:
            whole, test = whole.relabelled(self.label_set), test.relabelled(self.label_set).labelled()
            validation = validation and validation.relabelled(self.label_set).labelled()
            rest, held_out = (indices[whole.labels[indices] >= 0] for indices in (rest, held_out))
        if len(rest) == 0 or (len(held_out) == 0 and fraction > 0):
            raise FusionError(
                f"Expected training and validation images, got {len(rest)} and {len(held_out)} with "
                f"val_fraction {fraction} of {len(whole)}; change val_fraction"
            )
        train = self._own_part(whole.labels, self._limited(rest))
        if validation is None:
            validation = whole.subset(held_out)
        parts = {"train": whole.subset(train), "val": validation, "test": test}
        domain = self.domain
        self._parts = parts if domain is None else {name: domain.change(part, name) for name, part in parts.items()}

    def _limited(self, indices: Tensor) -> Tensor:
        """Return the training indices that `skip_train` and `limit_train` keep."""
        if self.limit_train is None and self.skip_train is None:
            return indices
        first = self.skip_train or 0
        count = max(1, len(indices) - first) if self.limit_train is None else self.limit_train
        if first + count > len(indices):
            skipped = f" after skip_train {first}" if first else ""
            raise FusionError(
                f"Expected limit_train of at most the {len(indices)} training images, got {count}{skipped}; "
                "lower limit_train, skip_train or val_fraction"
            )
        order = torch.randperm(len(indices), generator=seeded("limit", self.split_seed))
        return indices[order[first : first + count]]

    def _own_part(self, labels: Tensor, indices: Tensor) -> Tensor:
        """Return those training indices that are in the part of `split`."""
        if self.split is None:
            return indices
        part = indices[self.split.indices(labels[indices])]
        if len(part) == 0:
            raise FusionError(
                f"Expected training images in part {self.split.part} of the split, got none of {len(indices)}; "
                "change split"
            )
        return part

    def _part(self, name: str) -> ImageSet:
        if not self._parts:
            raise FusionError("Expected a data module that was set up, got a fresh one; call setup() first")
        return self._parts[name]

    @property
    def sizes(self) -> dict[str, int]:
        """The number of images in each part, by name; empty before `setup`."""
        return {name: len(part) for name, part in self._parts.items()}

    @property
    def train_size(self) -> int:
        """The number of training images; there is none before `setup`."""
        return len(self._part("train"))

    @property
    def val_size(self) -> int:
        """The number of validation images; there is none before `setup`."""
        return len(self._part("val"))

    @property
    def test_size(self) -> int:
        """The number of test images; there is none before `setup`."""
        return len(self._part("test"))

    def _loader(self, part: str, batch_size: int | None, sampler: Sampler[Any] | None = None) -> DataLoader[Any]:
        images = self._part(part)
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if device.type == "cuda" and self.num_workers == 0 and images.size_in_bytes <= _image_memory(device):
            images = images.to(device)
        return ResumableLoader(
            images,
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_whole_batch,
            pin_memory=torch.cuda.is_available() and not images.images.is_cuda,
            persistent_workers=self.num_workers > 0,
        )

    def _fixed_loader(self, part: str) -> DataLoader[Any]:
        """Return all images of a part in fixed order; on several processes each rank has its own share."""
        size = len(self._part(part))
        rank, processes = self._rank
        if processes == 1 or size == 0:
            return self._loader(part, self.eval_batch_size)
        return self._loader(part, None, ShardSampler(size, self.eval_batch_size, rank, processes, part))

    def train_dataloader(self) -> DataLoader[Any]:
        """Return batches of the training part, in an order that is a pure function of the run's seed and the epoch.

        The seed is that of `torch.manual_seed` (`seed_everything`). Without one each run has its own order, and a
        resumed run has the order of its checkpoint. On several processes each rank has a share of the same order.

        Raises:
            FusionError: A training goes on from a checkpoint that has no state of this kind of data.
        """
        epoch, batches = self._begin()
        sampler = EpochSampler(self.train_size, self._seed, *self._rank, epoch, batches * self.batch_size)
        if self.allow_changes:
            # An epoch that is shorter than it was ends with its last batch, not with none.
            sampler.skip = min(sampler.skip, (len(sampler) - 1) // self.batch_size * self.batch_size)
        return self._loader("train", self.batch_size, sampler)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return batches of the validation part in fixed order: none if `val_fraction` is 0; then Lightning warns."""
        return self._fixed_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        """Return batches of the test part in fixed order."""
        return self._fixed_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        """Return batches `(images, labels)` of the test part in fixed order."""
        return self.test_dataloader()

    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor], dataloader_idx: int) -> tuple[Tensor, Tensor]:
        """Preprocess a batch on the device, in the trainer's precision; augment it only while training.

        Args:
            batch: uint8 images `[B, *raw_shape]` and labels `[B]`.
            dataloader_idx: Ignored.

        Returns:
            Images `[B, *image_shape]` and the labels: the numbers of the module's outputs that stand for them.
        """
        images, labels = batch
        if self.trainer is None:
            return self.preprocess(images), labels
        places: Tensor | None = getattr(self.trainer.lightning_module, "label_places", None)
        if places is not None:
            labels = places[labels]
        generator = None
        if self.trainer.training:
            # Dropout draws from the global generators; they become a function of epoch and batch, too.
            seed_generators(self._batch_seed("global"), images.device)
            generator = torch.Generator().manual_seed(self._batch_seed("augment")) if self.augment else None
        prepared = self.preprocess(images, generator)
        return self.trainer.precision_plugin.convert_input(prepared), labels

    def preprocess(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Pad, augment (with a generator), scale and normalise: `(x / 255 - mean) / std`.

        Args:
            images: uint8 `[B, *raw_shape]`.
            generator: CPU generator of the augmentation; None leaves the images as they are.

        Returns:
            float32 `[B, *image_shape]` on the same device.
        """
        channels, height, width = self.image_shape
        padded = pad_to_size(images, height, width)
        cropped = padded if generator is None else crop_and_flip(padded, generator)
        return normalize(cropped, self.mean, self.std, channels)

    def alignment_batches(self, num_samples: int, seed: int = 0, batch_size: int | None = None) -> Iterator[Tensor]:
        """Return training images without labels, for fusing: normalised, never augmented, on the CPU.

        A larger `num_samples` with the same seed begins with the same images. If the data was not set up, it is fetched
        (with `download`) and set up first.

        Args:
            num_samples: How many images at most, chosen at random without replacement from the training part.
            seed: Selects them.
            batch_size: Images per batch; None means `eval_batch_size`.

        Returns:
            An iterator over float32 `[B, *image_shape]`; the last batch may be smaller.

        Raises:
            FusionError: Fewer than 2 samples were asked for, or there are fewer.
        """
        if not self._parts:
            self.prepare_data()
            self.setup()
        check_whole("seed", seed, 0)
        size = self.eval_batch_size if batch_size is None else batch_size
        check_whole("batch_size", size, 1)
        check_whole("num_samples", num_samples, 2)
        if self.train_size < 2:
            raise FusionError(f"Expected at least 2 training images, got {self.train_size}; raise limit_train")
        samples = torch.randperm(self.train_size, generator=seeded("alignment", seed))[:num_samples]
        images = self._part("train").images
        starts = range(0, len(samples), size)
        return (self.preprocess(images[samples[start : start + size]]) for start in starts)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return all validation images, normalised, with their labels, on the CPU; the same on every rank.

        Returns:
            An iterator over float32 `[B, *image_shape]` and int64 `[B]`; empty when `val_fraction` is 0.

        Raises:
            FusionError: The data module was not set up.
        """
        part = self._part("val")
        batches = (torch.split(values, self.eval_batch_size) for values in (part.images, part.labels))
        return ((self.preprocess(images), labels) for images, labels in zip(*batches, strict=True) if len(labels))
