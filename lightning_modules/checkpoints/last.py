"""The checkpoint from which an interrupted training goes on as if nothing had happened."""

import logging
import os
import signal
import subprocess
from pathlib import Path
from types import FrameType
from typing import Any

from clafusion.lightning import Checkpoint, LightningModule, SLURMEnvironment, Trainer, cluster_environment

_log = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Keeps `last.ckpt` up to date: after every epoch, every n optimizer steps, and when a cluster takes the job away.

    Lightning's `ModelCheckpoint(save_last=True)` writes only when there is a new best as well. This one writes only
    between steps: after an optimizer step, never inside a group of accumulated batches, and after the last batch of an
    epoch only when the epoch has been validated.

    Under SLURM (with `auto_requeue`, see `configs/trainer/slurm.yaml`) it holds the requeue signal, SIGUSR1 by default,
    from the beginning, so that the signal does not end the process before the first step. After the next step all ranks
    agree, write the checkpoint and ask SLURM to requeue the job. (Lightning's own handler saves in the middle of a
    step.)

    Args:
        folder: The folder of `last.ckpt`.
        every_n_steps: Write after every n-th optimizer step, too; None: at the ends of epochs only.
    """

    def __init__(self, folder: str | os.PathLike[str], every_n_steps: int | None = None) -> None:
        self.path = Path(folder) / "last.ckpt"
        self.every_n_steps = every_n_steps
        self._stepped = False
        self._signalled = False
        #: The signal that is held, with the handler it had; None if there is no job to requeue.
        self._previous: tuple[int, Any] | None = None

    def listen(self, trainer: Trainer) -> None:
        """Hold the requeue signal from now on, if the trainer runs in a SLURM job that is to be requeued."""
        environment: Any = cluster_environment(trainer)
        if self._previous is not None or not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
            return
        if environment.requeue_signal is not None:
            # Lightning leaves a handler that is there already in its place.
            self._previous = environment.requeue_signal, signal.signal(environment.requeue_signal, self._hold)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hold the requeue signal, unless `listen` was called before."""
        if stage == "fit":
            self.listen(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the signal's handler."""
        if stage == "fit" and self._previous is not None:
            signal.signal(*self._previous)
            self._previous = None

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Note that this batch ends with an optimizer step."""
        self._stepped = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Write after every n-th step and for a requeue; `on_train_epoch_end` writes at the end of an epoch."""
        stepped, self._stepped = self._stepped, False
        if not stepped or trainer.is_last_batch or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        requeue = self._must_requeue(trainer)
        if requeue or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            trainer.save_checkpoint(self.path, weights_only=False)
        if requeue:
            self._requeue(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write, after the callbacks that use the validation."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        trainer.save_checkpoint(self.path, weights_only=False)
        if self._must_requeue(trainer):
            self._requeue(trainer)

    def _hold(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def _must_requeue(self, trainer: Trainer) -> bool:
        """Whether any rank has been signalled; all ranks ask together."""
        return self._previous is not None and trainer.strategy.reduce_boolean_decision(self._signalled, all=False)

    def _requeue(self, trainer: Trainer) -> None:
        """Ask SLURM, which then ends this job and starts it again; until then the training goes on."""
        self._signalled = False
        if not trainer.is_global_zero:
            return
        job = os.environ["SLURM_JOB_ID"]
        if "SLURM_ARRAY_JOB_ID" in os.environ:
            job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
        _log.info("Requeueing job %s after step %d", job, trainer.global_step)
        asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
        if asked.returncode:
            _log.warning("SLURM did not requeue job %s: %s", job, asked.stderr.strip())
