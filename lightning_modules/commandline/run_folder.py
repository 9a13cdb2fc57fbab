"""The folder that `fit` writes into: an earlier run in it is never replaced unasked, and what is written is said."""

from pathlib import Path
from typing import Any

from clafusion.errors import FusionError
from clafusion.lightning import Callback, LightningModule, ModelCheckpoint, Trainer
from clafusion.lightning_modules.checkpoints.last import LastCheckpoint

#: The files by which a run is recognized.
_RUN = ("last.ckpt", "best.ckpt")


def check_folder(trainer: Trainer, goes_on_from: str | None, overwrite: bool) -> None:
    """Refuse to train into the folder of an earlier run, unless it goes on, or is to be replaced.

    Args:
        trainer: What is replaced is removed when it begins to train, not before.
        goes_on_from: The checkpoint of the user, a file or a word such as `last`; None: there is none.
        overwrite: Replace an earlier run.

    Raises:
        FusionError: There is an earlier run.
    """
    last = _last(trainer)
    if last is None:
        return
    folder = last.path.parent
    earlier = [folder / name for name in _RUN if (folder / name).is_file()]
    goes_on = goes_on_from is not None and (
        "/" not in goes_on_from and "." not in goes_on_from or _in(goes_on_from, folder)
    )
    if overwrite and goes_on:
        raise FusionError(f"Expected --overwrite or --ckpt_path {goes_on_from}, got both; leave one of them out")
    if overwrite:
        trainer.callbacks.append(_Replacement(earlier))  # type: ignore[attr-defined]
    elif earlier and not goes_on:
        raise FusionError(
            f"Expected a folder without a run, got {folder} with {' and '.join(path.name for path in earlier)}; go on "
            "with --ckpt_path last, or give --overwrite, or another folder by --trainer.default_root_dir"
        )


def say_what_was_written(trainer: Trainer) -> None:
    """Print the checkpoints of a training that has ended, and how good they are."""
    last = _last(trainer)
    if last is None or not trainer.is_global_zero:
        return
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.best_model_path:
            score = callback.best_model_score
            print(f"wrote {_relative(callback.best_model_path)}{_in_words(callback.monitor, score)}")
    if last.path.is_file():
        print(f"wrote {last.path}{_in_words('val_acc', trainer.callback_metrics.get('val_acc'))}")


class _Replacement(Callback):
    """Removes the checkpoints of an earlier run before the first step: a kill after it must not bring them back."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove them, once all that can be refused has been."""
        if trainer.is_global_zero:
            for file in self.files:
                file.unlink(missing_ok=True)


def _last(trainer: Trainer) -> LastCheckpoint | None:
    """Return what writes `last.ckpt`; None if nothing does."""
    found = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, LastCheckpoint)]
    return None if trainer.fast_dev_run or not found else found[0]  # type: ignore[attr-defined]


def _in(file: str, folder: Path) -> bool:
    return Path(file).resolve().parent == folder.resolve()


def _relative(file: str) -> Path:
    """Return a path below the current folder as seen from there, any other as it is."""
    path, here = Path(file), Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def _in_words(name: str | None, value: Any) -> str:
    if name is None or value is None:
        return ""
    return f": {name} {float(value):.2%}" if name.endswith("_acc") else f": {name} {float(value):.4g}"
