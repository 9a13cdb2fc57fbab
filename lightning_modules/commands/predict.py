"""How often a network gives each class, which `clafusion predict` shows."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clafusion.lightning import Callback, LightningModule, Trainer
from clafusion.teachers.label_sets import Label


class PredictedClasses(Callback):
    """Prints a table of the classes that were predicted, by name where the module has `class_names`."""

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *places: int
    ) -> None:
        """Count the most probable class of every image."""
        counts = outputs.argmax(1).bincount(minlength=outputs.shape[1])
        self._counts = counts if self._counts is None else self._counts + counts

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table once, for the images of all processes."""
        if self._counts is None:
            return
        counts: Any = trainer.strategy.reduce(self._counts, reduce_op="sum")
        self._counts = None
        if trainer.is_global_zero:
            _print_counts(counts.tolist(), getattr(pl_module, "class_names", None))


def _print_counts(counts: Sequence[int], names: Sequence[Label] | None) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("predicted class", "images", "share")
    table.columns[1].justify = table.columns[2].justify = "right"
    for number, count in enumerate(counts):
        if count:
            table.add_row(str(names[number] if names else number), f"{count:,}", f"{count / sum(counts):.2%}")
    Console().print(table)
