"""Image files that are decoded when they are asked for, in the processes that ask for them."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clafusion.datamodules.image_set import Change, ImageSet, LabelledImages
from clafusion.datamodules.loaders import Report, Unreadable, refuse
from clafusion.errors import FusionError

#: Points of an image file at most: it is unpacked before it is scaled.
_LARGEST = 2**26


@dataclass(frozen=True, eq=False)
class FileList:
    """Image files below a folder, and the size that they are brought to.

    Attributes:
        folder: The folder.
        names: Their paths below it, in the file system's encoding, `[N]`. One array and not a list: worker processes
            share its memory with the process that they come from, which objects with reference counts would prevent.
        size: Height and width.
    """

    folder: Path
    names: np.ndarray
    size: int

    def path(self, number: int) -> Path:
        """Return the path of a file."""
        return self.folder / os.fsdecode(self.names[number])

    def decode(self, number: int) -> Tensor:
        """Read a file in colour, scale the shorter side to `size`, and crop at the centre: uint8 `[3, size, size]`.

        Raises:
            ValueError: The file is missing or is not an image that can be read; the message says why.
        """
        # Imported late: only images in files need it.
        from PIL import Image, ImageOps

        try:
            with Image.open(self.path(number)) as file:
                if file.width * file.height > _LARGEST:
                    raise ValueError(f"{file.width}x{file.height} points, more than are read")
                fitted = ImageOps.fit(file.convert("RGB"), (self.size, self.size), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(" ".join(str(error).split())) from error
        return torch.from_numpy(np.array(fitted)).movedim(-1, 0)

    def fingerprint(self) -> str:
        """Return a digest of the names and sizes of the files, in their order; it does not depend on `folder`."""
        digest = hashlib.sha256()
        for number, name in enumerate(self.names.tolist()):
            try:
                size = self.path(number).stat().st_size
            except OSError:
                size = -1
            digest.update(b"%s\0%d\0" % (name, size))
        return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ImageFiles(LabelledImages):
    """Labelled images in files, decoded when they are fetched.

    A batch `(images, labels)` is followed by what could not be read, an `Unreadable` for each file.

    Attributes:
        images: The files.
        labels: int64 `[N]`.
        changes: Changes of the decoded images, each with the images that it is made of, bool `[N]`.
        replaces: Whether the next image of the same class stands in for one that cannot be read.
    """

    images: FileList
    labels: Tensor
    changes: tuple[tuple[Tensor, Change], ...] = field(default=())
    replaces: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """N, C, H, W."""
        return len(self.images.names), 3, self.images.size, self.images.size

    def __getitem__(self, indices: Sequence[int]) -> tuple[Tensor | Unreadable, ...]:
        """Return a batch `[B, C, H, W]` with its labels `[B]`, and what could not be read."""
        images = torch.zeros(len(indices), *self.shape[1:], dtype=torch.uint8)
        failures: list[Unreadable] = []
        for place, number in enumerate(indices):
            failures += self._decode_into(images[place], number)
        return images, self.labels[torch.tensor(indices, dtype=torch.int64)], *failures

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor | Unreadable, ...]:
        """Return a batch as `[]` does."""
        return self[indices]

    def subset(self, indices: Tensor) -> "ImageFiles":
        """Return the images at the given int64 `[M]` indices, in that order."""
        files = replace(self.images, names=self.images.names[indices.numpy()])
        changes = tuple((chosen[indices], change) for chosen, change in self.changes)
        return replace(self, images=files, labels=self.labels[indices], changes=changes)

    def changed(self, indices: Tensor, change: Change) -> "ImageFiles":
        """Return the images, some of which are changed after they are decoded."""
        chosen = torch.zeros(len(self), dtype=torch.bool).index_fill(0, indices, True)
        return replace(self, changes=(*self.changes, (chosen, change)))

    def decoded(self, report: Report = refuse) -> ImageSet:
        """Decode all images.

        Args:
            report: Is told of each file that could not be read.

        Raises:
            FusionError: There is not enough memory, or an image cannot be read.
        """
        try:
            images = torch.empty(self.shape, dtype=torch.uint8)
        except (RuntimeError, MemoryError) as error:
            raise FusionError(
                f"Expected {self.size_in_bytes >> 20:,} MiB of memory for {len(self):,} images, got less; decode them "
                "on demand by in_memory=auto (--data.in_memory auto)"
            ) from error
        for number in range(len(self)):
            for failure in self._decode_into(images[number], number):
                report(failure)
        return ImageSet(images, self.labels)

    def _decode_into(self, target: Tensor, number: int) -> list[Unreadable]:
        """Decode an image, or the one that stands in for it, into `[C, H, W]`; return the files that were not read."""
        failures: list[tuple[Path, str]] = []
        for candidate in self._candidates(number):
            try:
                image = self.images.decode(candidate)
            except ValueError as error:
                failures.append((self.images.path(candidate), str(error)))
                continue
            for chosen, change in self.changes:
                image = change(image[None])[0] if chosen[candidate] else image
            target.copy_(image)
            return [Unreadable(str(path), reason, True) for path, reason in failures]
        return [Unreadable(str(path), reason, False) for path, reason in failures]

    def _candidates(self, number: int) -> Iterator[int]:
        """Yield an image and, if they may stand in for it, the others of its class: those after it, then the rest."""
        yield number
        if self.replaces:
            same = (self.labels == self.labels[number]).nonzero().flatten()
            yield from same[same > number].tolist()
            yield from same[same < number].tolist()
