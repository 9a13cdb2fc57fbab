"""The parser of every command: classes have defaults, and an error is one line that says what to do."""

from typing import Any, NoReturn

from clafusion import datamodules
from clafusion.errors import FusionError
from clafusion.lightning import LightningArgumentParser
from clafusion.lightning_modules.commandline.training import KINDS, about_training

#: The classes that a command gets that names none.
DEFAULTS = {
    "model": {"class_path": "clafusion.lightning_modules.ImageClassifier"},
    "data": {"class_path": "clafusion.datamodules.DigitsDataModule"},
}
#: How a message shows some arguments.
_SHOWN = {"fuse.parents": "A.ckpt B.ckpt", "fuse.output": "-o NAME.ckpt", "report.input": "INPUT"}
_DATA = ", ".join(name for name in datamodules.__all__ if name.endswith("DataModule") and name != "ImageDataModule")


class FusionParser(LightningArgumentParser):
    """A parser whose classes have defaults, and whose errors are one line each."""

    def add_subclass_arguments(self, baseclass: Any, nested_key: str, *args: Any, **kwargs: Any) -> None:
        """Add the choice of a class, with the class that a command gets that names none."""
        # Given here, not set later: else the type would admit None, too, and its errors would say so at length.
        if nested_key in DEFAULTS:
            kwargs["default"] = DEFAULTS[nested_key]
        super().add_subclass_arguments(baseclass, nested_key, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End the program with one line and exit code 2."""
        raise FusionError(reworded(message)) from ex


def reworded(message: str) -> str:
    r"""Return a message of the parser in words that say what to do, where there are better ones than its own.

    Example:
        >>> reworded('Parser key "model":\n  Parser key "lr":\n    Expected a float')
        'Parser key "model.lr": Expected a float'
        >>> reworded("the following arguments are required: report.input")
        'Expected INPUT, got none; give it, see clafusion report --help'
    """
    required = message.removeprefix("the following arguments are required: ")
    if required != message and "." in required:
        return _missing(required.split(", "))
    if message.startswith('expected "subcommand" to be one of'):
        return unknown_command("none")
    # Each class inside a class adds its key in front.
    keys: list[str] = []
    rest = message
    while rest.startswith('Parser key "'):
        key, _, rest = rest.removeprefix('Parser key "').partition('":')
        keys, rest = [*keys, key], rest.strip()
    if keys and keys[0] in KINDS:
        return about_training(keys[0], rest)
    if rest.startswith("Option '") and keys:
        option, _, rest = rest.removeprefix("Option '").partition("'")
        if keys[0] == "data":
            return (
                f"Expected an option that the data module has, got --data.{option}; name the module by --data, such as "
                f"{_DATA}"
            )
        return f"Option '{'.'.join([*keys, option])}'{rest}"
    _, is_no_class, name = rest.partition("Expected a dot import path string: ")
    if is_no_class and keys == ["data"]:
        return (
            f"Expected --data to name a data module, got {name}; there are {_DATA}, or give package.Class of your own"
        )
    return f'Parser key "{".".join(keys)}": {rest}' if keys else message


def unknown_command(command: str) -> str:
    """Return what to say where a command is expected."""
    return f"Expected a command, such as fuse (clafusion --help lists them), got {command}"


def _missing(arguments: list[str]) -> str:
    """Return what to say about required arguments, such as `fuse.output`."""
    names = " and ".join(_SHOWN.get(one, f"--{one.partition('.')[2]}") for one in arguments)
    return f"Expected {names}, got none; give it, see clafusion {arguments[0].partition('.')[0]} --help"
