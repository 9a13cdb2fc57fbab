"""The state of a run that a data module keeps in checkpoints, from which the run goes on."""

import os
from collections.abc import Mapping
from typing import Any

import torch

from clafusion.datamodules.image_set import derived_seed
from clafusion.errors import FusionError
from clafusion.lightning import LightningDataModule, begin_next_epoch, data_settings, training_settings

#: The settings of a trainer that an interrupted training is compared in.
_COMPARED = ("accumulate_grad_batches", "precision", "gradient_clip_val")


class ResumableDataModule(LightningDataModule):
    """Base of data modules whose trainings can be interrupted after any batch.

    Checkpoints hold the epoch, the number of batches seen, the seed and the configuration of the run. All randomness of
    a batch is a function of seed, rank, epoch and batch, so that the resumed run equals the uninterrupted one.

    Args:
        allow_changes: Whether an interrupted training may go on with other data, seed or number of processes.
    """

    def __init__(self, allow_changes: bool = False) -> None:
        super().__init__()
        self.allow_changes = allow_changes
        #: Seed of the run.
        self._seed = torch.initial_seed()
        #: Epoch and batches of the checkpoint to resume, and its seed unless another was named.
        self._start: tuple[int, int] | None = None
        self._saved_seed: int | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """Number of images in each part, by name; subclasses implement it."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str | None:
        """A digest by which other files of the images are noticed; None: the images have no files of their own."""
        return None

    @property
    def _rank(self) -> tuple[int, int]:
        """This process's rank and the number of processes."""
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def state_dict(self) -> dict[str, Any]:
        """Return the position and the configuration of a training, as plain values; nothing outside of a training."""
        if self.trainer is None or self.trainer.state.fn != "fit":
            return {}
        epoch, batches = self._position()
        return {"epoch": epoch, "batches": batches, "seed": self._seed, "recipe": self._recipe()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Make the next training go on where the checkpoint's ended.

        Args:
            state_dict: What `state_dict` returned.

        Raises:
            FusionError: The training is configured differently now, and `allow_changes` is false.
        """
        if self.trainer is None or self.trainer.state.fn != "fit":
            return
        seed = _named_seed()
        if not self.allow_changes:
            now = {**self._recipe(), "seed": state_dict["seed"] if seed is None else seed}
            _check_unchanged({**state_dict["recipe"], "seed": state_dict["seed"]}, now)
        self._start = state_dict["epoch"], state_dict["batches"]
        self._saved_seed = state_dict["seed"] if seed is None else None

    def teardown(self, stage: str) -> None:
        """End a run: the next one begins at its beginning, and PyTorch's seed is again that of the run."""
        if stage == "fit":
            torch.manual_seed(self._seed)
        self._start = self._saved_seed = None

    def _begin(self) -> tuple[int, int]:
        """Settle the run's seed; return the epoch to begin with and the number of its batches to skip.

        Raises:
            FusionError: A training goes on from a checkpoint that has no state of this kind of data.
        """
        if self._start is None:
            self._refuse_foreign_run()
        elif self._start[1] == 0 and self.trainer is not None:
            begin_next_epoch(self.trainer)
        seed = torch.initial_seed() if self._saved_seed is None else self._saved_seed
        # Ranks that were not seeded have different initial seeds; their shares would overlap.
        self._seed = seed if self.trainer is None else self.trainer.strategy.broadcast(seed)
        return self._start or (0, 0)

    def _batch_seed(self, purpose: str) -> int:
        """Return the seed of the training batch being fetched, a pure function of seed, rank, epoch and batch."""
        trainer: Any = self.trainer
        # The loop counts a batch when it is on the device: batch_idx is still that of the batch before.
        batch_idx = trainer.fit_loop.epoch_loop.batch_idx + 1
        return derived_seed(purpose, self._seed, trainer.global_rank, trainer.current_epoch, batch_idx)

    def _position(self) -> tuple[int, int]:
        """Return the current epoch, or the next one between two, and the number of its batches trained on."""
        loop: Any = self.trainer.fit_loop  # type: ignore[union-attr]
        epochs = loop.epoch_progress.current
        over = epochs.processed == epochs.ready
        return epochs.processed, 0 if over else loop.epoch_loop.batch_progress.current.processed

    def _recipe(self) -> dict[str, Any]:
        """Return what must stay the same for a resumed run to equal an uninterrupted one, as plain values by name."""
        trainer = self.trainer
        assert trainer is not None
        settings = training_settings(trainer)
        sizes = {f"{part}_size": size for part, size in self.sizes.items()}
        kept = {name: settings[name] for name in _COMPARED}
        files = {} if self.fingerprint is None else {"files": self.fingerprint}
        return {**data_settings(self), **sizes, **files, "world_size": trainer.world_size, **kept}

    def _refuse_foreign_run(self) -> None:
        trainer: Any = self.trainer
        if trainer is None or not trainer.ckpt_path or self.allow_changes:
            return
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready:
            raise FusionError(
                f"Expected {trainer.ckpt_path} to hold the state of an interrupted training on {type(self).__name__}, "
                "got that of other data; choose its data, "
                "or accept another result by allow_changes=true (--data.allow_changes true)"
            )


def _named_seed() -> int | None:
    """Return the seed of `seed_everything` if PyTorch was seeded with it; None if nobody named a seed."""
    seed = torch.initial_seed()
    return seed if os.environ.get("PL_GLOBAL_SEED") == str(seed) else None


def _check_unchanged(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if changed:
        old, new = (", ".join(f"{name} {values.get(name)}" for name in changed) for values in (before, now))
        raise FusionError(
            f"Expected the interrupted run to go on with {old}, got {new}; change it back, "
            "or accept another result by allow_changes=true (--data.allow_changes true)"
        )
