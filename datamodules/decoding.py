"""Data modules whose images are files: decoded all at once where they fit into memory, or on demand."""

import hashlib
import warnings
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from torch.utils.data import DataLoader

from clafusion.datamodules.image_files import ImageFiles
from clafusion.datamodules.image_set import ImageSet, LabelledImages
from clafusion.datamodules.images import ImageDataModule
from clafusion.datamodules.loaders import ResumableLoader, Unreadable, refuse
from clafusion.datamodules.memory import free_memory
from clafusion.errors import FusionError
from clafusion.lightning import rank_zero_info

OnError = Literal["raise", "replace"]
#: The part of the free memory that images may take: one in so many.
_SHARE = 3


class DecodingDataModule(ImageDataModule):
    """Base of the data modules whose images are files; a subclass reads `ImageFiles`.

    In memory a part is decoded when its first loader is made. On demand worker processes decode the images of each
    batch. Both give the same batches in the same order, and an interrupted training may go on the other way. To fuse,
    only the images that are drawn are decoded.

    Args:
        in_memory: Whether all images are decoded at once and held in memory. `auto`: if those of the three parts take
            no more than a third of the memory that is free, which the processes on a machine share.
        on_error: What is done about a training image that cannot be read. `raise`: the command ends. `replace`: the
            next image of the same class in the training part stands in for it, so that batches, steps and processes
            stay as they are; a warning names and counts each such file. Validation and test images are never replaced,
            because accuracies and predictions would be those of other images.
        **kwargs: The arguments of `ImageDataModule`.

    Attributes:
        unreadable: Why a file could not be read, by its path: training images that others stand in for. Each process
            has its own.

    Raises:
        FusionError: An argument is of the wrong type or out of range.
    """

    def __init__(self, in_memory: bool | Literal["auto"] = "auto", on_error: OnError = "raise", **kwargs: Any) -> None:
        if type(in_memory) is not bool and in_memory != "auto":
            raise FusionError(f"Expected in_memory to be auto, true or false, got {in_memory!r}; change in_memory")
        if on_error not in get_args(OnError):
            raise FusionError(f"Expected on_error to be raise or replace, got {on_error!r}; change on_error")
        super().__init__(**kwargs)
        self.in_memory = in_memory
        self.on_error = on_error
        self.unreadable: dict[str, str] = {}
        self._holds = in_memory is True
        self._decoded: dict[str, ImageSet] = {}

    def on_parts(self) -> None:
        """Say what stands in for training images that cannot be read; decide whether the images are held in memory."""
        train = self._parts["train"]
        assert isinstance(train, ImageFiles)
        self._parts["train"] = replace(train, replaces=self.on_error == "replace")
        if self.in_memory == "auto":
            self._holds = self._fits()

    def predict_files(self) -> list[Path]:
        """Return the files of the test part, in the order of `predict_dataloader`; only after `setup`."""
        part = self._part("test")
        return [part.images.path(number) for number in range(len(part))]

    def _fits(self) -> bool:
        """Whether all images fit into their share of the free memory; if not, that is said."""
        needed = sum(part.size_in_bytes for part in self._parts.values()) * self._neighbours
        free = free_memory()
        if needed * _SHARE <= free:
            return True
        rank_zero_info(
            f"Images are decoded on demand: all {sum(self.sizes.values()):,} would take {_mebibytes(needed)} MiB, more "
            f"than a third of the {_mebibytes(free)} MiB that are free (in_memory)"
        )
        return False

    def _at_hand(self, part: str) -> LabelledImages:
        """Return the images of a part in memory if they are there already, otherwise the files."""
        return self._decoded.get(part, self._part(part))

    def _held(self, part: str) -> LabelledImages:
        """Return the images of a part in memory if they are held there, otherwise the files."""
        images = self._part(part)
        if self._holds and part not in self._decoded:
            assert isinstance(images, ImageFiles)
            self._decoded[part] = images.decoded(self._report)
        return self._at_hand(part)

    def _loader_of(self, images: LabelledImages, **arguments: Any) -> DataLoader[Any]:
        return ResumableLoader(images, report=self._report, **arguments)

    def _report(self, failure: Unreadable) -> None:
        """End with a file's name, or say once that another image stands in for it."""
        if not failure.replaced:
            refuse(failure)
        if failure.path in self.unreadable:
            return
        self.unreadable[failure.path] = failure.reason
        warnings.warn(
            f"Expected an image in {failure.path}, got {failure.reason}; another one of its class stands in for it "
            f"({len(self.unreadable)} so far)",
            stacklevel=2,
        )

    @cached_property
    def fingerprint(self) -> str:
        """The number of files, and a digest of their names and sizes; only after `setup`."""
        parts = [part.images.fingerprint() for part in self._parts.values()]
        return f"{sum(self.sizes.values())} of digest {hashlib.sha256(' '.join(parts).encode()).hexdigest()[:12]}"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.0f}"
