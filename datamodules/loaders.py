"""The loader of all data modules: Lightning may interrupt it anywhere, and it names files that cannot be read."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader

from clafusion.errors import FusionError


@dataclass(frozen=True)
class Unreadable:
    """A file that could not be read.

    Attributes:
        path: The file.
        reason: Why.
        replaced: Whether another image stands in for it.
    """

    path: str
    reason: str
    replaced: bool


Report = Callable[[Unreadable], None]


def refuse(failure: Unreadable) -> None:
    """End with the file's name.

    Raises:
        FusionError: Always.
    """
    raise FusionError(f"Expected an image in {failure.path}, got {failure.reason}; remove the file or put it right")


class ResumableLoader(DataLoader[Any]):
    """A `DataLoader` of whole batches `(images, labels)` that Lightning may interrupt anywhere in an epoch.

    The data module keeps the position and gives it to the sampler. Worker processes begin when the first batch is asked
    for, because Lightning asks for an iterator before it sets the epoch. What workers could not read comes with its
    batch, because an error that they raise would come without its one line.

    Args:
        *arguments: As for `DataLoader`.
        report: Is told, in this process, of each file that could not be read.
        **more: As for `DataLoader`.
    """

    def __init__(self, *arguments: Any, report: Report = refuse, **more: Any) -> None:
        super().__init__(*arguments, **{"collate_fn": _whole_batch, **more})
        self.report = report

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        """Yield the batches, in the order that the sampler has when the first of them is asked for."""
        for images, labels, *failures in super().__iter__():
            for failure in failures:
                self.report(failure)
            yield images, labels

    def state_dict(self) -> dict[str, Any]:
        """Return nothing; the method tells Lightning that this loader can be resumed."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing, see `state_dict`."""


def _whole_batch(batch: Any) -> Any:
    """Collate nothing: the data set fetches whole batches already."""
    return batch
