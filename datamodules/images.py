"""The base of all image data modules: three disjoint parts of what a subclass reads, preprocessed on the device."""

from collections.abc import Iterator

import torch
from torch import Tensor

from clafusion.datamodules.arguments import check_classes, check_flag, check_whole
from clafusion.datamodules.domain import Domain, as_domain
from clafusion.datamodules.image_set import LabelledImages, seed_generators, seeded
from clafusion.datamodules.loading import LoadingDataModule
from clafusion.datamodules.selection import Selection
from clafusion.datamodules.split import Split, as_split
from clafusion.datamodules.transforms import augment as crop_and_flip
from clafusion.datamodules.transforms import normalize, pad_to_size
from clafusion.errors import FusionError


class ImageDataModule(LoadingDataModule):
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
        num_workers: Worker processes per loader. None: 0 for images in memory, where that is usually fastest (a GPU
            then holds them in its own memory, if they fit into a quarter of it); for images that are decoded on demand
            one for each core, shared by the processes of the machine, and 8 at most.
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
        num_workers: int | None = None,
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
        super().__init__(batch_size, eval_batch_size, num_workers, allow_changes)
        check_flag("augment", augment)
        self.augment = augment
        self.image_shape = self._shape(pad_to, channels)
        self.split_seed = split_seed
        self.split = as_split(split)
        self.label_set = None if label_set is None else check_classes("label_set", label_set)
        self.domain = as_domain(domain)
        self.selection = Selection(
            val_fraction, split_seed, limit_train, skip_train, self.split, self.label_set, self.domain
        )
        self.selection.check_shape(self.raw_shape)
        self.classes_read = self.num_classes
        self.num_classes = self.selection.classes(self.classes_read)
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

    def read(self) -> tuple[LabelledImages, LabelledImages]:
        """Read the published training and test sets; subclasses implement it.

        Returns:
            The training and the test set: uint8 `[N, *raw_shape]` and int64 labels in `range(num_classes)`.
        """
        raise NotImplementedError

    def read_validation(self) -> LabelledImages | None:
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
        self._parts = self.selection.parts(whole, test, validation)
        self.on_parts()

    def on_parts(self) -> None:
        """Be called once, when the three parts are there; subclasses may change them."""

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
        batches = self._fetch(self._at_hand("train"), samples.split(size))
        return (self.preprocess(images) for images, _ in batches)

    def validation_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return all validation images, normalised, with their labels, on the CPU; the same on every rank.

        Returns:
            An iterator over float32 `[B, *image_shape]` and int64 `[B]`; empty when `val_fraction` is 0.

        Raises:
            FusionError: The data module was not set up.
        """
        batches = self._fetch(self._held("val"), torch.arange(self.val_size).split(self.eval_batch_size))
        return ((self.preprocess(images), labels) for images, labels in batches)
