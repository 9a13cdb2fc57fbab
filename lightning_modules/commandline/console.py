"""Remarks and warnings on the terminal: Lightning's advertising is left out, a warning is one line."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from clafusion.lightning import FABRIC, PACKAGE

#: Lightning's advertising and remarks on hardware that nobody asked for.
_CHATTER = re.compile(
    r"(GPU|TPU|HPU|IPU) available|💡|Seed set to|Restor(ing|ed)|Loaded model weights|`Trainer\.fit` stopped"
    r"|\s*Detected KeyboardInterrupt|\[rank: \d+\] Received SIGTERM"
)
_NEEDLESS_WARNINGS = (
    # The images are in memory already: a worker process would only add start-up time.
    r"The '\w+_dataloader' does not have many workers",
    # Lightning compares the length of an epoch with log_every_n_steps.
    r"The number of training batches",
    # The help says that checkpoints of an earlier run are replaced.
    r"Checkpoint directory .* exists and is not empty",
    # A training that goes on in another folder keeps its own best checkpoint there.
    r"The dirpath has changed",
    # validate, test and predict do without the callbacks that training had.
    r"Be aware that when using `ckpt_path`, callbacks used to create the checkpoint",
    # Between Lightning and PyTorch.
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
)
_CHATTERING = (
    *(f"{package}.utilities.rank_zero" for package in (PACKAGE, FABRIC)),
    f"{FABRIC}.utilities.seed",
    f"{PACKAGE}.trainer.connectors.signal_connector",
)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out those remarks and warnings of Lightning that help nobody here."""

    def worth_saying(record: logging.LogRecord) -> bool:
        return not _CHATTER.match(record.getMessage())

    loggers = [logging.getLogger(name) for name in _CHATTERING]
    formatted = warnings.formatwarning
    warnings.formatwarning = _one_line
    with warnings.catch_warnings():
        for message in _NEEDLESS_WARNINGS:
            warnings.filterwarnings("ignore", message)
        for logger in loggers:
            logger.addFilter(worth_saying)
        try:
            yield
        finally:
            warnings.formatwarning = formatted
            for logger in loggers:
                logger.removeFilter(worth_saying)


def _one_line(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:
    """Return a warning's text: one of ours is about what was given, not about a line of a program."""
    if str(message).startswith("Expected "):
        return f"clafusion: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
