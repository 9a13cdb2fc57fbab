"""The class of every image: a table of how often each is given, and a CSV file: `clafusion predict`."""

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DistributedSampler

from clafusion.lightning import Callback, LightningModule, Trainer
from clafusion.lightning_modules.commands.outputs import check_new, check_output
from clafusion.lightning_modules.distributed import gathered
from clafusion.lightning_modules.files import write_text
from clafusion.teachers.label_sets import Label

#: The number of an image in the data, of its class, and the probability of that.
Row = tuple[int, int, float]


def predictions_file(output: str | None, checkpoint: str | None, overwrite: bool) -> Path:
    """Return where predictions go: to `output`, else to a file that is named after the checkpoint.

    Raises:
        FusionError: It cannot be written, or exists and may not be replaced.
    """
    default = "predictions.csv" if checkpoint is None else str(Path(checkpoint).with_suffix(".csv"))
    path = check_output(output or default, (".csv",))
    check_new([path], overwrite)
    return path


class PredictedClasses(Callback):
    """Writes the predicted class of every image, and prints how often each was predicted.

    Classes have their names where the module has `class_names`, images those of their files where the data module has
    `predict_files()`; otherwise both have numbers. On several processes rank 0 writes the images of all.

    Args:
        output: The file to write or replace: one line for each image, in the order of the data.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self._rows: list[Row] = []
        self._places: Iterator[Sequence[int]] | None = None

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *places: int
    ) -> None:
        """Keep the most probable class of every image of a batch."""
        if self._places is None:
            self._places = _shares(trainer.predict_dataloaders)
        probabilities, classes = outputs.float().max(1)
        first = len(self._rows)
        numbers = next(self._places, range(first, first + len(classes)))
        self._rows += zip(numbers, classes.tolist(), probabilities.tolist(), strict=True)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file and print the table once, for the images of all processes."""
        rows = sorted(row for share in gathered(self._rows) for row in share)
        self._rows, self._places = [], None
        if not trainer.is_global_zero or not rows:
            return
        names: Sequence[Label] | None = getattr(pl_module, "class_names", None)
        data: Any = getattr(trainer, "datamodule", None)
        files = data.predict_files() if hasattr(data, "predict_files") else None
        write_text(self.output, _as_csv(rows, names, files))
        _print_counts([number for _, number, _ in rows], names)
        print(f"wrote {self.output}: {len(rows):,} images")


def _shares(loader: Any) -> Iterator[Sequence[int]]:
    """Yield for every batch which images it has, where this process has a share of them; otherwise nothing."""
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        yield from (loader.batch_sampler if loader.batch_sampler is not None else sampler)


def _as_csv(rows: Sequence[Row], names: Sequence[Label] | None, files: Sequence[Path] | None) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index" if files is None else "file", "class", "probability"])
    for place, number, probability in rows:
        image = place if files is None else files[place]
        writer.writerow([image, names[number] if names else number, f"{probability:.6f}"])
    return text.getvalue()


def _print_counts(classes: Sequence[int], names: Sequence[Label] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("predicted class", "images", "share")
    table.columns[1].justify = table.columns[2].justify = "right"
    for number in sorted(set(classes)):
        count = classes.count(number)
        table.add_row(str(names[number] if names else number), f"{count:,}", f"{count / len(classes):.2%}")
    Console().print(table)
