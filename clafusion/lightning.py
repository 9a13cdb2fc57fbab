"""The one place that decides which Lightning is used, and the only one that touches its private interfaces.

`pytorch_lightning` and `lightning.pytorch` are the same code under two names, and a trainer of the one refuses the
modules of the other. The one that the program has imported first is used, so `import lightning` before anything of
ours selects that; a program that has imported neither gets the one that the environment variable CLAFUSION_LIGHTNING
names, `pytorch_lightning` without it. The library itself needs neither: only `clafusion.lightning_modules`,
`clafusion.datamodules` and `clafusion.callbacks` import this module.

What is private here may change with every minor release of Lightning; setup.cfg therefore has an upper bound.
"""

import copy
import importlib
import os
import sys
from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import TYPE_CHECKING, Any

#: The names of the two packages, each with the name of its Fabric.
_FABRICS = {"pytorch_lightning": "lightning_fabric", "lightning.pytorch": "lightning.fabric"}
#: The package that is used; the variable is for the command line, which imports classes of the user's last.
PACKAGE = next(
    (name for name in sys.modules if name in _FABRICS), os.environ.get("CLAFUSION_LIGHTNING", "pytorch_lightning")
)
if PACKAGE not in _FABRICS:
    raise ImportError(f"Expected CLAFUSION_LIGHTNING to be {' or '.join(_FABRICS)}, got {PACKAGE}; change it")
FABRIC = _FABRICS[PACKAGE]

if TYPE_CHECKING:
    from lightning_fabric.plugins import TorchCheckpointIO
    from pytorch_lightning import (
        Callback,
        LightningDataModule,
        LightningModule,
        Trainer,
        __version__,
        seed_everything,
    )
    from pytorch_lightning.callbacks import Checkpoint, ModelCheckpoint
    from pytorch_lightning.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
    from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger
    from pytorch_lightning.loops import _Loop
    from pytorch_lightning.plugins.environments import SLURMEnvironment
    from pytorch_lightning.strategies import Strategy
    from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher
    from pytorch_lightning.trainer.connectors.checkpoint_connector import _CheckpointConnector
    from pytorch_lightning.utilities.combined_loader import CombinedLoader
    from pytorch_lightning.utilities.exceptions import MisconfigurationException, SIGTERMException
    from pytorch_lightning.utilities.rank_zero import rank_zero_info, rank_zero_only
    from pytorch_lightning.utilities.seed import isolate_rng
    from pytorch_lightning.utilities.types import OptimizerLRScheduler
else:
    for _module, _names in {
        PACKAGE: "Callback LightningDataModule LightningModule Trainer __version__ seed_everything",
        f"{PACKAGE}.callbacks": "Checkpoint ModelCheckpoint",
        f"{PACKAGE}.cli": "LightningArgumentParser LightningCLI SaveConfigCallback",
        f"{PACKAGE}.loggers": "CSVLogger Logger TensorBoardLogger",
        f"{PACKAGE}.loops": "_Loop",
        f"{PACKAGE}.plugins.environments": "SLURMEnvironment",
        f"{PACKAGE}.strategies": "Strategy",
        f"{PACKAGE}.strategies.launchers": "_MultiProcessingLauncher",
        f"{PACKAGE}.trainer.connectors.checkpoint_connector": "_CheckpointConnector",
        f"{PACKAGE}.utilities.combined_loader": "CombinedLoader",
        f"{PACKAGE}.utilities.exceptions": "MisconfigurationException SIGTERMException",
        f"{PACKAGE}.utilities.rank_zero": "rank_zero_info rank_zero_only",
        f"{PACKAGE}.utilities.seed": "isolate_rng",
        f"{PACKAGE}.utilities.types": "OptimizerLRScheduler",
        f"{FABRIC}.plugins": "TorchCheckpointIO",
    }.items():
        _loaded = importlib.import_module(_module)
        globals().update({_name: getattr(_loaded, _name) for _name in _names.split()})

__all__ = [
    "FABRIC",
    "PACKAGE",
    "CSVLogger",
    "Callback",
    "Checkpoint",
    "CheckpointConnector",
    "CombinedLoader",
    "HookedCLI",
    "HookedTrainer",
    "LightningArgumentParser",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "Logger",
    "MisconfigurationException",
    "ModelCheckpoint",
    "OptimizerLRScheduler",
    "SIGTERMException",
    "SLURMEnvironment",
    "SaveConfigCallback",
    "Strategy",
    "TensorBoardLogger",
    "TorchCheckpointIO",
    "Trainer",
    "__version__",
    "begin_next_epoch",
    "checkpoint_to_restore",
    "cluster_environment",
    "content_to_restore",
    "data_settings",
    "isolate_rng",
    "rank_zero_info",
    "rank_zero_only",
    "seed_everything",
    "starts_workers_itself",
    "to_device",
    "training_loader",
    "training_settings",
]

#: Settings of a trainer that change what a network learns.
_TRAINER = (
    *("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "limit_train_batches"),
    *("limit_val_batches", "overfit_batches", "val_check_interval", "check_val_every_n_epoch"),
)
#: Arguments of data modules that do not.
_INDIFFERENT = frozenset({"eval_batch_size", "num_workers", "data_dir", "download", "in_memory", "on_error"})


class CheckpointConnector(_CheckpointConnector):
    """Restores a training; `restoring` surrounds each step of it."""

    def restoring(self, path: Any) -> AbstractContextManager[None]:
        """Return the context in which the state in a checkpoint is loaded; subclasses override it."""
        return nullcontext()

    def _restore_modules_and_callbacks(self, checkpoint_path: Any = None, *arguments: Any) -> None:
        with self.restoring(checkpoint_path):
            super()._restore_modules_and_callbacks(checkpoint_path, *arguments)

    def restore_training_state(self) -> None:
        """Restore loops, optimizers and schedules."""
        with self.restoring(self.trainer.ckpt_path):
            super().restore_training_state()


class HookedTrainer(Trainer):
    """A trainer that restores checkpoints by a connector of ours."""

    def use_connector(self, kind: type[CheckpointConnector]) -> None:
        """Restore checkpoints by another connector."""
        self._checkpoint_connector = kind(self)


class HookedCLI(LightningCLI):
    """Lightning's command line with public methods in place of private ones, and with commands of its own.

    Lightning has a command for each of `subcommands`, which are methods of the trainer. `own_parsers` adds others,
    which need no trainer.
    """

    def own_parsers(self) -> dict[str, LightningArgumentParser]:
        """Return the parsers of further commands, by name."""
        return {}

    def add_classes(self, parser: LightningArgumentParser, data: type[LightningDataModule]) -> None:
        """Add the arguments of trainer, module and data, as Lightning does, for data of another class."""
        own, self._datamodule_class = self._datamodule_class, data
        self.add_core_arguments_to_parser(parser)
        self._datamodule_class = own

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Set up the parser and those of all commands."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        commands = self.parser._subcommands_action
        assert commands is not None
        for name, parser in self.own_parsers().items():
            self._subcommand_parsers[name] = parser
            commands.add_subcommand(name, parser, help=parser.description)

    def parser_of(self, command: str) -> LightningArgumentParser:
        """Return the parser of a command."""
        return self._parser(command)

    def take_from_checkpoint(self) -> None:
        """Change the parsed configuration by the checkpoint that it names."""
        super()._parse_ckpt_path()

    def fixed_arguments(self, command: str) -> dict[str, Any]:
        """Return arguments for the trainer's method besides those of the configuration."""
        return {}

    def run(self, command: str) -> None:
        """Run a command; as it is here, the method of the trainer that has its name."""
        super()._run_subcommand(command)

    def _parse_ckpt_path(self) -> None:
        self.take_from_checkpoint()

    def _set_seed(self) -> None:
        if "seed_everything" in self.config[self.subcommand]:
            super()._set_seed()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), **self.fixed_arguments(subcommand)}

    def _run_subcommand(self, subcommand: str) -> None:
        self.run(subcommand)


def cluster_environment(trainer: Trainer) -> Any:
    """Return the cluster environment that a trainer runs in, such as SLURM's; None without one."""
    return trainer._accelerator_connector.cluster_environment


def checkpoint_to_restore(trainer: Trainer) -> Any:
    """Return the checkpoint that the present run of a trainer restores, or has restored; None without one.

    It may have been named by the user, by `last` or by a cluster's requeue. Lightning has decided on it before `setup`,
    but tells no one before it has read it.
    """
    return _arguments_of_run(trainer).get("ckpt_path")


def content_to_restore(trainer: Trainer) -> dict[str, Any]:
    """Read the checkpoint of `checkpoint_to_restore` as Lightning will, as safely or unsafely as the user has said."""
    arguments = _arguments_of_run(trainer)
    content: dict[str, Any] = trainer.strategy.load_checkpoint(
        arguments["ckpt_path"], weights_only=arguments["weights_only"]
    )
    return content


def _arguments_of_run(trainer: Trainer) -> dict[str, Any]:
    """Return the arguments of the method that runs everything, which is the only one that has them all."""
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is Trainer._run.__code__ and frame.f_locals["self"] is trainer:
            return frame.f_locals
        frame = frame.f_back
    return {}


def training_loader(trainer: Trainer) -> CombinedLoader:
    """Return what `fit` was given to train on, as the module, the data module or the caller made it.

    Lightning has not shared it between processes yet.
    """
    loader = trainer.fit_loop._data_source.dataloader()
    return copy.copy(loader) if isinstance(loader, CombinedLoader) else CombinedLoader(loader)


def to_device(trainer: Trainer, batch: Any) -> Any:
    """Move a batch to the trainer's device, through the hooks of the data module or of the module."""
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch)


def starts_workers_itself(strategy: Strategy) -> bool:
    """Whether a strategy starts its processes from this one, as `ddp_spawn` does, and not by running the command."""
    return isinstance(strategy.launcher, _MultiProcessingLauncher)


def begin_next_epoch(trainer: Trainer) -> None:
    """Go on with the epoch after the one that a checkpoint has finished.

    With `max_steps`, Lightning takes a finished epoch for an interrupted one: it would end it once more, and number the
    following ones wrongly.
    """
    _Loop.restarting.fset(trainer.fit_loop, False)  # type: ignore[attr-defined]


def training_settings(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a trainer that change what a network learns, as plain values by name."""
    found = {name: getattr(trainer, name) for name in _TRAINER}
    return {
        name: value if isinstance(value, bool | int | float | None) else str(value) for name, value in found.items()
    }


def data_settings(data: LightningDataModule) -> dict[str, Any]:
    """Return the arguments of a data module that change what a network learns, by name."""
    return {name: value for name, value in data.hparams.items() if name not in _INDIFFERENT}
