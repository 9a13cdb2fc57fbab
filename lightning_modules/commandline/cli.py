"""The command line.

`clafusion fit | validate | test | predict` are methods of the trainer; `fuse | transfer | pipeline | convert | export |
report` are functions. Each has `--help` and `--config`.
"""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, NoReturn

from clafusion import (
    __version__,
    callbacks,  # noqa: F401 (FusionCallback is known by its short name once it is imported)
    datamodules,
)
from clafusion.errors import FusionError
from clafusion.lightning import (
    HookedCLI,
    LightningArgumentParser,
    LightningCLI,
    LightningDataModule,
    LightningModule,
    SaveConfigCallback,
    Trainer,
    rank_zero_only,
)
from clafusion.lightning_modules import FusionTrainer, ImageClassifier
from clafusion.lightning_modules.commandline.callbacks import check_callbacks
from clafusion.lightning_modules.commandline.checkpoint_data import NO_DATA, without_data_options
from clafusion.lightning_modules.commandline.checkpoint_defaults import WITH_DATA, saved_defaults
from clafusion.lightning_modules.commandline.class_names import MODE
from clafusion.lightning_modules.commandline.completion import PrintCompletion
from clafusion.lightning_modules.commandline.console import quiet
from clafusion.lightning_modules.commandline.exit_codes import ended_by, user_message
from clafusion.lightning_modules.commandline.parser import FusionParser, unknown_command
from clafusion.lightning_modules.commandline.run_folder import check_folder, say_what_was_written
from clafusion.lightning_modules.commandline.saved_request import saving_request
from clafusion.lightning_modules.commandline.shorthand import complete
from clafusion.lightning_modules.commandline.training import (
    add_training_arguments,
    check_training,
    without_training_details,
)
from clafusion.lightning_modules.commands.convert import convert_file
from clafusion.lightning_modules.commands.export import export_file
from clafusion.lightning_modules.commands.fuse import fuse_checkpoints
from clafusion.lightning_modules.commands.predict import PredictedClasses, predictions_file
from clafusion.lightning_modules.commands.transfer import transfer_checkpoint
from clafusion.lightning_modules.experiments import catalogue
from clafusion.lightning_modules.experiments.pipeline import run_pipeline
from clafusion.lightning_modules.experiments.report import report_file
from clafusion.lightning_modules.experiments.runner import ExperimentFailed

#: The commands that are functions; those with a trainer, a model and a datamodule get what the configuration describes.
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "fuse": fuse_checkpoints,
    "transfer": transfer_checkpoint,
    "pipeline": run_pipeline,
    "convert": convert_file,
    "export": export_file,
    "report": report_file,
}
_CLASSES = {"trainer", "model", "datamodule"}
_USAGE = {
    "fuse": "%(prog)s A.ckpt B.ckpt ... -o NAME.ckpt [options]",
    "pipeline": "%(prog)s [NAME] [options]",
}
#: Only training has a course to log; the other commands say on the console what they found.
_WITHOUT_LOGS = {"trainer.logger": False, "trainer.enable_checkpointing": False}
_TRAINER_DEFAULTS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("validate", "test", "predict"), _WITHOUT_LOGS),
    **dict.fromkeys(("fuse", "transfer"), {**_WITHOUT_LOGS, "trainer.enable_progress_bar": False}),
    "pipeline": {
        "trainer.enable_checkpointing": False,
        "trainer.enable_progress_bar": False,
        "trainer.logger": True,
        "trainer.enable_model_summary": False,
    },
}
#: What all parsers have in common.
_COMMON: dict[str, Any] = {
    "allow_abbrev": False,
    "default_env": True,
    "env_prefix": "CLAFUSION",
    "parser_mode": MODE,
}
_EPILOG = """exit codes: 0 success; 1 stages of an experiment failed, or an unexpected error (a traceback, please report
it); 2 something given cannot be used: one line on standard error says what and what to do, and nothing was written; 130
after Ctrl-C, 143 after SIGTERM: the same command goes on, fit with --ckpt_path last."""
_PREDICTIONS = (
    "The file to write, NAME.csv: file or number of each image, its class, and the probability of that class. "
)
_PREDICTIONS += "None given: the name of the checkpoint with .csv."
_GO_ON = "what was saved is kept: give the same command again, fit with --ckpt_path last"


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of a training that has begun, so that a refused one leaves nothing behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: the data, the network and the checkpoint have not been checked."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `config.yaml` beside the logs."""
        super().setup(trainer, pl_module, "fit")


class ListExperiments(argparse.Action):
    """Shows the experiments that can be named, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(
            option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="Lists the experiments by NAME."
        )

    def __call__(self, parser: Any, *_: Any) -> None:
        """Print the list."""
        catalogue.print_list()
        parser.exit()


class FusionCLI(HookedCLI):
    """Lightning's command line, with our commands, and with checkpoints that are only read, never run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the trainer's commands and those of their arguments that the command line fills in itself."""
        return {name: arguments | {"weights_only"} for name, arguments in LightningCLI.subcommands().items()}

    def fixed_arguments(self, command: str) -> dict[str, Any]:
        """Return what the command line fills in itself."""
        return {"weights_only": True}

    def setup_parser(
        self, add_subcommands: bool, main_kwargs: dict[str, Any], subparser_kwargs: dict[str, Any]
    ) -> None:
        """Set up the parsers of all commands."""
        super().setup_parser(add_subcommands, main_kwargs, subparser_kwargs)
        self.parser.add_argument("--print_completion", action=PrintCompletion)
        predict = self.parser_of("predict")
        predict.add_argument("--output", type=str | None, help=_PREDICTIONS)
        predict.add_argument("--overwrite", type=bool, default=False, help="Whether output may replace a file.")
        for name, defaults in _TRAINER_DEFAULTS.items():
            self.parser_of(name).set_defaults(defaults)
        add_training_arguments(self.parser_of("fit"))
        for name in WITH_DATA:
            self.parser_of(name).set_defaults({"data": NO_DATA})

    def own_parsers(self) -> dict[str, LightningArgumentParser]:
        """Return the parsers of the commands that are functions."""
        return {name: self._function_parser(name, function) for name, function in FUNCTIONS.items()}

    def _function_parser(self, name: str, function: Callable[..., Any]) -> LightningArgumentParser:
        summary = (function.__doc__ or "").partition("\n")[0]
        parser = self.init_parser(**_COMMON, description=summary, usage=_USAGE.get(name))
        if _has_classes(name):
            self.add_default_arguments_to_parser(parser)
            if name == "fuse":
                self.add_classes(parser, LightningDataModule)
            else:
                self.add_core_arguments_to_parser(parser)
        parser.add_function_arguments(function, skip=set(_CLASSES), as_positional=name == "report")
        if name == "pipeline":
            parser.add_argument("--list", action=ListExperiments)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse the arguments, of which some may be given in a short form or in the environment."""
        if args and not args[0].startswith("-") and args[0] not in {*self.subcommands(), *FUNCTIONS}:
            raise FusionError(unknown_command(repr(args[0])))
        self.arguments = complete(args)
        # Options of what only the checkpoint names, which is read next, are left for then.
        given = without_training_details(self.arguments)
        try:
            self.config = parser.parse_args(given)
        except FusionError:
            most, given = given, without_data_options(given)
            if given == most:
                raise
            self.config = parser.parse_args(given)
        self.partial = given != self.arguments

    def take_from_checkpoint(self) -> None:
        """Take what the user did not give from the checkpoints: the network's recipe, the data and, to go on, the seed.

        Lightning would put the checkpoint over the command line; here it only replaces the defaults. `last` is the
        `last.ckpt` in `default_root_dir`; where there is none yet, training begins at its beginning.
        """
        command = self.config["subcommand"]
        config = self.config[command]
        path = config.get("ckpt_path")
        self.goes_on_from = path
        if path == "last":
            last = Path(config["trainer.default_root_dir"] or "runs") / "last.ckpt"
            path = config["ckpt_path"] = str(last) if last.is_file() else None
        defaults = {} if path in ("best", "hpc") else saved_defaults(command, config, path)
        if not defaults and not self.partial:
            return
        self.parser_of(command).set_defaults(defaults)
        self.config = self.parser.parse_args(self.arguments)
        if command not in FUNCTIONS:
            self.config[command]["ckpt_path"] = path

    def instantiate_classes(self) -> None:
        """Make the module, the data and the trainer, for the commands that need them."""
        if self.subcommand == "fit":
            check_training(self.arguments, self.config["fit"])
        if self.subcommand in FUNCTIONS:
            # These keep what was asked for beside their results.
            self.save_config_callback = None
        if self.subcommand == "pipeline":
            catalogue.check_plain(self.config["pipeline"]["experiment"])
        if not _has_classes(self.subcommand):
            return
        try:
            super().instantiate_classes()
        except ValueError as error:
            # The parser wraps what a callback or a logger says about its arguments.
            if error.__cause__ is None or user_message(error) is not None:
                raise
            reason = " ".join(str(error.__cause__).split())
            raise FusionError(f"Expected callbacks and loggers that can be made, got {reason}; change them") from error

    def run(self, command: str) -> None:
        """Run a function, or the method of the trainer; what was asked of a function is kept beside its results."""
        if command not in FUNCTIONS:
            if command == "predict":
                asked = self.config[command]
                output = predictions_file(asked["output"], asked["ckpt_path"], asked["overwrite"])
                self.trainer.callbacks.append(PredictedClasses(output))  # type: ignore[attr-defined]
            if command == "fit":
                check_callbacks(self.trainer, self.config["fit"]["ckpt_path"] is not None)
                check_folder(self.trainer, self.goes_on_from, self.config["fit"]["overwrite"])
            super().run(command)
            if command == "fit":
                say_what_was_written(self.trainer)
            return
        classes: dict[str, Any] = {}
        config, writes = self.config[command], True
        if _has_classes(command):
            classes = {"trainer": self.trainer, "model": self.model, "datamodule": self.datamodule}
            config, writes = self.config_init[command], self.trainer.is_global_zero
        names = signature(FUNCTIONS[command]).parameters.keys() - classes.keys()
        with saving_request(command, self.config[command], self.parser_of(command), writes):
            FUNCTIONS[command](**classes, **{name: config[name] for name in names})


def _has_classes(command: str | None) -> bool:
    """Whether a command has a trainer, a module and data."""
    return command not in FUNCTIONS or set(signature(FUNCTIONS[command]).parameters) >= _CLASSES


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The arguments; None takes those of the process.

    Raises:
        SystemExit: With code 2, after one line on standard error, if the input cannot be used; with code 1 if stages of
            an experiment have failed, or another process is gone; with code 130 after Ctrl-C, 143 after SIGTERM.
    """
    if not {"", os.getcwd()} & set(sys.path):
        # Last: a folder of the user's hides no installed package.
        sys.path.append(os.getcwd())
    try:
        with quiet():
            FusionCLI(
                model_class=ImageClassifier,  # or a subclass of it, such as Distiller
                datamodule_class=datamodules.ImageDataModule,
                trainer_class=FusionTrainer,
                parser_class=FusionParser,
                parser_kwargs={
                    **_COMMON,
                    "prog": "clafusion",
                    "description": "Trains classifiers and fuses them, of whatever depth and width, into one.",
                    "epilog": _EPILOG,
                    "version": __version__,
                    **{name: dict(_COMMON) for name in FusionCLI.subcommands()},
                },
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                save_config_callback=SaveConfig,
                save_config_kwargs={"overwrite": True},
                auto_configure_optimizers=False,
                # The classifier says itself what is saved; the parsed configuration may name classes.
                load_from_checkpoint_support=False,
                args=sys.argv[1:] if args is None else list(args),
            )
    except ExperimentFailed as failure:
        _end("failed:", failure, 1)
    except BaseException as error:
        number = ended_by(error)
        if number is not None:
            # Of one process: all of them are told.
            words = f"{signal.Signals(number).name}; {_GO_ON}" if getattr(rank_zero_only, "rank", 0) == 0 else None
            _end("ended by", words, 128 + number)
        message = user_message(error)
        if message is None:
            raise
        _end("error:" if message[1] == 2 else "failed:", *message)


def _end(kind: str, reason: object, code: int) -> NoReturn:
    """End the program with one line; None: with none."""
    if reason is not None:
        # Written at once: other processes of the run may be writing theirs.
        sys.stderr.write(f"clafusion: {kind} {' '.join(str(reason).split())}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
