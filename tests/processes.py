"""Runs the command line in processes of its own, which can be killed without further notice."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from pytorch_lightning import Callback

from tests.helpers import ROOT


class KillAt(Callback):
    """Kills all processes of the run before a batch (and before an epoch's last checkpoint); once for each number.

    Args:
        batches: Numbers of batches, counted over all epochs.
        folder: Where it notes what it has done.
    """

    def __init__(self, batches: list[int], folder: str) -> None:
        self.batches = batches
        self.folder = Path(folder)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        batch = trainer.fit_loop.total_batch_idx
        mark = self.folder / f"killed-{batch}"
        if batch in self.batches and trainer.is_global_zero and not mark.exists():
            mark.touch()
            os.killpg(0, signal.SIGKILL)


class SignalRank(Callback):
    """Signals one process of the run before a batch.

    Args:
        batch: Number of the batch, counted over all epochs.
        number: Of the signal.
        rank: Of the process.
    """

    def __init__(self, batch: int, number: int, rank: int = 0) -> None:
        self.batch, self.number, self.rank = batch, number, rank

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.fit_loop.total_batch_idx == self.batch and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def clafusion(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a folder, in a process group of its own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PL_", "CLAFUSION_"))}
    environment = {**clean, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "clafusion", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
        start_new_session=True,
    )


def succeed(folder: Path, *arguments: str) -> str:
    """The standard output of a command that must end well."""
    done = clafusion(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
