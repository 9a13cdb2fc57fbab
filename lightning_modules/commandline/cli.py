"""The command line.

`clafusion fit | validate | test | predict | fuse | transfer | pipeline`, and `convert | export | report`, which need no
trainer. Each has `--help` and `--config`.
"""

import argparse
import logging
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from clafusion import (
    callbacks,  # noqa: F401 (FusionCallback is known by its short name once it is imported)
    configs,
    datamodules,
)
from clafusion.errors import FusionError
from clafusion.lightning import (
    FABRIC,
    PACKAGE,
    LightningArgumentParser,
    LightningCLI,
    LightningModule,
    SaveConfigCallback,
    Trainer,
    rank_zero_only,
)
from clafusion.lightning_modules import FusionTrainer, ImageClassifier, read_checkpoint
from clafusion.lightning_modules.commandline.completion import PrintCompletion
from clafusion.lightning_modules.commandline.exit_codes import ended_by, explained
from clafusion.lightning_modules.commandline.saved_request import REQUEST, as_asked, check_request, request_path
from clafusion.lightning_modules.commandline.shorthand import spell_out
from clafusion.lightning_modules.commands.convert import convert_file
from clafusion.lightning_modules.commands.export import export_file
from clafusion.lightning_modules.experiments import catalogue
from clafusion.lightning_modules.experiments.report import report_file
from clafusion.lightning_modules.experiments.runner import ExperimentFailed
from clafusion.lightning_modules.files import write_text

# Lightning's advertising and remarks on hardware that nobody asked for.
_CHATTER = re.compile(
    r"(GPU|TPU|HPU|IPU) available|💡|Seed set to|Restor(ing|ed)|Loaded model weights|`Trainer\.fit` stopped"
    r"|\s*Detected KeyboardInterrupt|\[rank: \d+\] Received SIGTERM"
)
_SIGNALS = f"{PACKAGE}.trainer.connectors.signal_connector"
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


# What a command gets that names no module or no data.
_DEFAULTS = {
    "model": {"class_path": "clafusion.lightning_modules.ImageClassifier"},
    "data": {"class_path": "clafusion.datamodules.DigitsDataModule"},
}


# What all parsers have in common.
_COMMON: dict[str, Any] = {"allow_abbrev": False, "default_env": True, "env_prefix": "CLAFUSION"}

_EPILOG = """exit codes: 0 success; 1 stages of an experiment failed, or an unexpected error (a traceback, please report
it); 2 something given cannot be used: one line on standard error says what and what to do, and nothing was written; 130
after Ctrl-C, 143 after SIGTERM: the same command goes on, fit with --ckpt_path last."""
_GO_ON = "what was saved is kept: give the same command again, fit with --ckpt_path last"

# How the usage shows some arguments.
_SHORT = {("fuse", "parents"): "A.ckpt B.ckpt", ("fuse", "output"): "-o NAME.ckpt", ("report", "input"): "INPUT"}

# The subcommands that need no trainer: a function each.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "convert": convert_file,
    "export": export_file,
    "report": report_file,
}
_KNOWN = ", ".join(name for name in datamodules.__all__ if name.endswith("DataModule") and name != "ImageDataModule")
_OPTION = rf"Expected an option that the data module has, got --data.\1; name the module by --data, such as {_KNOWN}"
_MODULE = rf"Expected --data to name a data module, got \1; there are {_KNOWN}, or give package.Class of your own"
_COMMAND = "Expected a command, such as fuse (clafusion --help lists them), got "
# The subcommands that Lightning does not have.
_OURS = ("fuse", "transfer", "pipeline")


class FusionParser(LightningArgumentParser):
    """A parser whose errors are one line, and whose classes have defaults."""

    def add_subclass_arguments(self, baseclass: Any, nested_key: str, *args: Any, **kwargs: Any) -> None:
        """Adds the choice of a class, with the class that a command gets that names none."""
        # Given here, not set later: else the type would admit None, too, and its errors would say so at length.
        super().add_subclass_arguments(baseclass, nested_key, *args, default=_DEFAULTS[nested_key], **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Ends the program with one line and exit code 2."""
        if message.startswith("the following arguments are required: "):
            message = _wanted(re.findall(r"(\w+)\.([\w.]+)", message)) or message
        message = re.sub(r"argument subcommand: invalid choice: (.*) \(choose.*", rf"{_COMMAND}\1", message)
        message = re.sub(r'expected "subcommand" to be one of .*', f"{_COMMAND}none", message)
        # "model": "lr": ... and "model": Option 'lr' ... are both about --model.lr.
        message = re.sub(r'Parser key "(model|data)":\s+(Parser key "|Option \')', r"\2\1.", message)
        message = re.sub(r"Option 'data\.(.*)' is not accepted.*", _OPTION, message)
        message = re.sub(
            r'Parser key "data":.*Expected a dot import path string: (.*)', _MODULE, message, flags=re.DOTALL
        )
        raise FusionError(message) from ex


def _wanted(missing: Sequence[tuple[str, str]]) -> str | None:
    """What to say about arguments that were not given, by command and name; None if there is no command either."""
    names = " and ".join(_SHORT.get(one, f"--{one[1]}") for one in missing)
    return f"Expected {names}, got none; give it, see clafusion {missing[0][0]} --help" if missing else None


class SaveConfig(SaveConfigCallback):
    """Saves the configuration of a training that has begun, so that a refused one leaves nothing behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: the data, the network and the checkpoint have not been checked."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves `config.yaml` beside the logs."""
        super().setup(trainer, pl_module, "fit")


class ListExperiments(argparse.Action):
    """Shows the experiments that can be named, and ends."""

    def __init__(self, option_strings: Sequence[str], dest: str, **kwargs: Any) -> None:
        super().__init__(
            option_strings, dest, nargs=0, default=argparse.SUPPRESS, help="Lists the experiments by NAME."
        )

    def __call__(self, parser: Any, *_: Any) -> None:
        """Prints the list."""
        catalogue.print_list()
        parser.exit()


class FusionCLI(LightningCLI):
    """Lightning's command line, with `fuse` and with checkpoints that are only read, never run."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommands and those arguments of their methods that the command line fills in itself."""
        given = {name: arguments | {"weights_only"} for name, arguments in LightningCLI.subcommands().items()}
        return {**given, **{name: {"model", "datamodule"} for name in _OURS}}

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments; a configuration of ours is found in the installed package as well."""
        arguments = spell_out([_find_config(argument) for argument in args])
        if arguments[:1] == ["pipeline"]:
            arguments = ["pipeline", *catalogue.at_scale(catalogue.named(arguments[1:]))]
        self._arguments = [*arguments[:1], *_from_environment(*arguments[:1]), *arguments[1:]]
        self.config = parser.parse_args(self._arguments)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand != "fit":
            # Only training has a course to log; the others say on the console what they found.
            parser.set_defaults({"trainer.logger": False, "trainer.enable_checkpointing": False})
        if subcommand in _OURS:
            parser.set_defaults({"trainer.enable_progress_bar": False})
        if subcommand == "pipeline":
            parser.set_defaults({"trainer.logger": True, "trainer.enable_model_summary": False})
            parser.usage = "%(prog)s [NAME] [options]"
            parser.add_argument("--list", action=ListExperiments)
        if subcommand == "fuse":
            parser.usage = "%(prog)s A.ckpt B.ckpt ... -o NAME.ckpt [options]"
        return parser

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        super()._add_subcommands(parser, **kwargs)
        parser.add_argument("--print_completion", action=PrintCompletion)
        commands = parser._subcommands_action
        assert commands is not None
        for name, function in _FUNCTIONS.items():
            summary = (function.__doc__ or "").partition("\n")[0]
            self._subcommand_parsers[name] = self.init_parser(**_COMMON, description=summary)
            self._subcommand_method_arguments[name] = self._subcommand_parsers[name].add_function_arguments(
                function, as_positional=name == "report"
            )
            commands.add_subcommand(name, self._subcommand_parsers[name], help=summary)

    def _set_seed(self) -> None:
        if self.subcommand not in _FUNCTIONS:
            super()._set_seed()

    def instantiate_classes(self) -> None:
        """Makes the module, the data and the trainer, for the subcommands that need them."""
        if self.subcommand == "pipeline":
            # Every stage records what it depends on.
            self.save_config_callback = None
            catalogue.check_plain(self.config["pipeline"]["experiment"])
        if self.subcommand not in _FUNCTIONS:
            super().instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand not in _FUNCTIONS:
            return self._run_and_keep(subcommand)
        names = self._subcommand_method_arguments[subcommand]
        _FUNCTIONS[subcommand](**{name: self.config[subcommand][name] for name in names})

    def _run_and_keep(self, subcommand: str) -> None:
        """Runs a method of the trainer; what was asked of one of ours is kept beside its results."""
        config = self.config[subcommand]
        path = None if config.get("align_only") else request_path(subcommand, config)
        check_request(path, config.get("overwrite", False))
        failure = None
        try:
            super()._run_subcommand(subcommand)
        except ExperimentFailed as error:
            failure = error
        if path is not None and self.trainer.is_global_zero:
            write_text(path, REQUEST + self._parser(subcommand).dump(as_asked(config)))
        if failure is not None:
            raise failure

    def _parse_ckpt_path(self) -> None:
        """Takes what the user did not give from `--ckpt_path`: the network's recipe and, to go on, data and seed.

        Lightning would put the checkpoint over the command line; here it only replaces the defaults. `last` is the
        `last.ckpt` in `default_root_dir`; where there is none yet, training begins at its beginning.
        """
        subcommand = self.config["subcommand"]
        path = self.config[subcommand].get("ckpt_path")
        if path == "last":
            last = Path(self.config[subcommand]["trainer.default_root_dir"] or "runs") / "last.ckpt"
            path = str(last) if last.is_file() else None
            self.config[subcommand]["ckpt_path"] = path
        if path is None or path in ("best", "hpc"):
            return
        checkpoint = read_checkpoint(path)
        if subcommand == "fit":
            self._parser(subcommand).set_defaults(_interrupted_run(checkpoint))
        saved = checkpoint["hyper_parameters"]
        # A distillation goes on as one, unless the user names another class.
        distilled = {
            "class_path": "clafusion.lightning_modules.Distiller",
            "init_args": {"teachers": saved.get("teachers")},
        }
        chosen = self._parse_with(distilled if "teachers" in saved else _DEFAULTS["model"])
        known = {name: saved[name] for name in vars(chosen["init_args"]) if name in saved}
        self._parse_with({"class_path": chosen["class_path"], "init_args": known})
        self.config[subcommand]["ckpt_path"] = path

    def _parse_with(self, model: dict[str, Any]) -> Any:
        """Parses the arguments once more, with other defaults of the module; returns what they say about it."""
        subcommand = self.config["subcommand"]
        self._parser(subcommand).set_defaults({"model": model})
        self.config = self.parser.parse_args(self._arguments)
        return self.config[subcommand]["model"]

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return kwargs if subcommand in _OURS else {**kwargs, "weights_only": True}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: The arguments; None takes those of the process.

    Raises:
        SystemExit: With code 2, after one line on standard error, if the input cannot be used; with code 1 if stages of
            an experiment have failed, or another process is gone; with code 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _quiet():
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
                    "version": version("clafusion"),
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
        found = explained(error)
        if found is None:
            raise
        _end("error:" if found[1] == 2 else "failed:", *found)


def _end(kind: str, reason: object, code: int) -> NoReturn:
    """Ends the program with one line; None: with none."""
    if reason is not None:
        # Written at once: other processes of the run may be writing theirs.
        sys.stderr.write(f"clafusion: {kind} {' '.join(str(reason).split())}\n")
    sys.exit(code)


def _interrupted_run(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Data and seed of the training that a checkpoint interrupted; nothing for a checkpoint of `fuse`."""
    for name in datamodules.__all__:
        state = checkpoint.get(name)
        if isinstance(state, dict) and type(state.get("seed")) is int:
            arguments = checkpoint.get("datamodule_hyper_parameters", {})
            data = {"class_path": f"clafusion.datamodules.{name}", "init_args": arguments}
            # PyTorch seeds itself with more bits than a seed on the command line may have.
            return {"data": data, **({"seed_everything": state["seed"]} if state["seed"] < 2**32 else {})}
    return {}


def _from_environment(subcommand: str = "") -> list[str]:
    """The options of the module and of the data that the environment names, such as `CLAFUSION_FIT__MODEL__LR=0.5`.

    The parser itself does not look for those: which there are depends on the class.
    """
    prefix = f"CLAFUSION_{subcommand.upper()}__"
    found = {name.removeprefix(prefix): value for name, value in os.environ.items() if name.startswith(prefix)}
    nested = {name: value for name, value in sorted(found.items()) if re.match("(MODEL|DATA)__", name)}
    return [f"--{name.lower().replace('__', '.')}={value}" for name, value in nested.items()]


def _find_config(argument: str) -> str:
    """Replaces `configs/...` by the file of the installed package where the working directory has none."""
    option, equals, value = argument.rpartition("=")
    installed = configs.FOLDER / value.removeprefix("configs/")
    if value.startswith("configs/") and not Path(value).exists() and installed.is_file():
        return f"{option}{equals}{installed}"
    return argument


@contextmanager
def _quiet() -> Iterator[None]:
    """Leaves out what Lightning says that helps nobody here; everything else is shown."""

    def worth_saying(record: logging.LogRecord) -> bool:
        return not _CHATTER.match(record.getMessage())

    loggers = [logging.getLogger(f"{name}.utilities.rank_zero") for name in (PACKAGE, FABRIC)]
    loggers += map(logging.getLogger, (f"{FABRIC}.utilities.seed", _SIGNALS))
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
    """A warning: one of ours is about what was given, not about a line of a program."""
    if str(message).startswith("Expected "):
        return f"clafusion: warning: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


if __name__ == "__main__":
    main()
