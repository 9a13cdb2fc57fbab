"""Data modules of a fixed set of files: the folders to look in, and the download."""

from pathlib import Path
from typing import Any

from clafusion.datamodules.arguments import check_flag, check_path
from clafusion.datamodules.images import ImageDataModule
from clafusion.errors import FusionError


class FileDataModule(ImageDataModule):
    """Base of the data modules that read a fixed set of files from a folder.

    A subclass sets `files` and `remedy`, and implements `folders` and `fetch`.

    Args:
        data_dir: Folder of the data; None means the folder `data` here. A leading `~` is the home folder.
        download: Whether to download the files where they are missing.
        **kwargs: The arguments of `ImageDataModule`.

    Raises:
        FusionError: An argument is of the wrong type or out of range.
    """

    files: tuple[str, ...]
    remedy: str

    def __init__(self, data_dir: str | None = None, download: bool = False, **kwargs: Any) -> None:
        if data_dir is not None:
            check_path("data_dir", data_dir)
        check_flag("download", download)
        super().__init__(**kwargs)
        self.data_dir = data_dir
        self.download = download

    @property
    def root(self) -> Path:
        """The folder that downloads go to."""
        return Path(self.data_dir or "data").expanduser()

    def folders(self) -> list[Path]:
        """The folders to look in, the first choice first."""
        raise NotImplementedError

    def fetch(self) -> None:
        """Download the files below `root`."""
        raise NotImplementedError

    def has(self, folder: Path, name: str) -> bool:
        """Whether the folder holds the file of that name."""
        return (folder / name).is_file()

    def _missing(self) -> dict[Path, list[str]]:
        """The files that each folder lacks."""
        return {folder: [name for name in self.files if not self.has(folder, name)] for folder in self.folders()}

    def prepare_data(self) -> None:
        """Download the files if `download` is set and no folder has them all.

        Raises:
            FusionError: The download failed.
        """
        if not self.download or not all(self._missing().values()):
            return
        try:
            self.fetch()
        except (OSError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise FusionError(
                f"Expected to download the images to {self.root}, got {type(error).__name__}: {reason}; "
                "check the network and the folder, or put the files there yourself"
            ) from error

    def folder(self) -> Path:
        """Return the first folder that holds all files.

        Raises:
            FusionError: There is none; the message names the files, the folders and the remedy.
        """
        missing = self._missing()
        for folder, names in missing.items():
            if not names:
                return folder
        closest = min(missing, key=lambda folder: len(missing[folder]))
        content = "none of them"
        if len(missing[closest]) < len(self.files):
            content = f"{closest} without {', '.join(missing[closest])}"
        raise FusionError(
            f"Expected the files {', '.join(self.files)} in one of the folders {', '.join(map(str, missing))}, "
            f"got {content}; {self.remedy}"
        )
