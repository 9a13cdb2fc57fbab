"""`clafusion --print_completion bash`: a script by which the shell completes what is typed."""

import argparse
from typing import Any

from jsonargparse import ArgumentParser

from clafusion.lightning_modules.experiments import catalogue

_SHELLS = ("bash", "zsh", "tcsh")
#: Arguments whose classes are Lightning's and PyTorch's.
_CLASSES = ("trainer.", "optimizer", "lr_scheduler")
#: Arguments that are files or folders.
_FILES = frozenset({"input", "output", "source", "target", "ckpt_path", "data_dir", "parents"})


class PrintCompletion(argparse.Action):
    """Prints the script for a shell, and ends."""

    def __init__(self, option_strings: list[str], dest: str, **_: Any) -> None:
        super().__init__(
            option_strings, dest, default=argparse.SUPPRESS, choices=_SHELLS,
            help="Prints a script for shell completion: source it, or put it where the shell looks for such.",
        )  # fmt: skip

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the script."""
        commands = parser._subcommands_action.choices
        for name, command in commands.items():
            _prepare(command, name)
        parser._actions.remove(self)
        print(parser.get_completion_script(f"shtab-{values}"))
        raise SystemExit(0)


def _prepare(parser: ArgumentParser, name: str) -> None:
    """Add what the types of the arguments do not say: which are files, and which may stand without a name."""
    import shtab

    if name == "pipeline":
        parser._actions.append(argparse.Action([], "experiment_name", nargs="?", choices=catalogue.names()))
    if name == "fuse":
        parser._actions += [argparse.Action(["-o"], "output"), argparse.Action([], "parents", "*")]
    for action in parser._actions:
        # These classes and all their arguments would make a script of 136 MB.
        is_class = f"--{action.dest}.help" in parser._option_string_actions and action.dest.startswith(_CLASSES)
        if action.dest in _FILES or is_class:
            vars(action)["complete"] = shtab.FILE
