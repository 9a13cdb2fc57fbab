"""The figures of a report as files beside it, and among the images of the run's TensorBoard."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image

from clafusion.errors import FusionError
from clafusion.lightning import Logger, TensorBoardLogger
from clafusion.lightning_modules.files import write_atomically, writer
from clafusion.report.pages import Figure, rasterised, svg_files


@dataclass(frozen=True)
class Pictures:
    """The figures of a report.

    Attributes:
        drawings: by name, as SVG.
        images: by name, as PNG; none on a machine without a font.
    """

    drawings: Mapping[str, str]
    images: Mapping[str, bytes]

    @classmethod
    def of(cls, figures: Iterable[Figure]) -> "Pictures":
        """Draw the figures of a report."""
        drawings = svg_files(figures)
        return cls(drawings, rasterised(drawings))

    @property
    def files(self) -> dict[str, bytes]:
        """By the name of a file its content."""
        vectors = {f"{name}.svg": text.encode() for name, text in self.drawings.items()}
        return {**vectors, **{f"{name}.png": data for name, data in self.images.items()}}

    def write(self, folder: Path) -> None:
        """Write every file, whole or not at all, and remove the figures of an earlier report of that name.

        Raises:
            FusionError: The folder or a file cannot be written.
        """
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise FusionError(
                f"Expected a folder that can be written, got {folder}: {error.strerror}; choose another output"
            ) from error
        for name, data in self.files.items():
            write_atomically(folder / name, writer(data))
        for path in folder.iterdir():
            if path.suffix in (".svg", ".png") and path.name not in self.files:
                path.unlink()

    def log(self, loggers: Iterable[Logger], step: int = 0) -> None:
        """Add the images to those loggers that show images in TensorBoard, as `report/NAME`."""
        for board in _boards(loggers):
            for name, data in self.images.items():
                image = np.asarray(Image.open(BytesIO(data)).convert("RGB"))
                board.experiment.add_image(f"report/{name}", image, step, dataformats="HWC")


def has_board(loggers: Iterable[Logger]) -> bool:
    """Whether one of the loggers shows images in TensorBoard."""
    return bool(_boards(loggers))


def _boards(loggers: Iterable[Logger]) -> list[TensorBoardLogger]:
    return [logger for logger in loggers if isinstance(logger, TensorBoardLogger)]


def folder_beside(page: Path) -> Path:
    """The folder of the figures of a report: `NAME_figures` beside `NAME.html`."""
    return page.with_name(f"{page.stem}_figures")


def check_folder(page: Path, overwrite: bool) -> None:
    """Refuse to replace figures unasked.

    Raises:
        FusionError: There are some and they may not be replaced, or something else has their name.
    """
    folder = folder_beside(page)
    if folder.exists() and not (folder.is_dir() and (overwrite or not any(folder.iterdir()))):
        raise FusionError(
            f"Expected to write a new folder, got {folder}, which exists; give --overwrite, or a new folder"
        )
