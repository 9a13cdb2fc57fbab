"""Shorter ways to give a command, spelled out before the arguments are parsed."""

import json
import os
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from clafusion import configs
from clafusion.errors import FusionError
from clafusion.lightning_modules.commandline.class_names import present_name
from clafusion.lightning_modules.experiments import catalogue

#: The arguments that may stand without a value, which is then true.
_FLAGS = frozenset(
    f"--{name}"
    for names in (("overwrite", "align_only", "report", "figures"), ("classifier", "shortcuts", "reinitialize"),
                  ("quiet", "json"))
    for name in names
)  # fmt: skip
#: What the parser reads as the value of such an argument.
_VALUES = frozenset({"true", "false", "yes", "no", "True", "False"})
#: The commands that write one file, which `-o` names.
_WITH_OUTPUT = frozenset({"predict", "fuse", "transfer", "convert", "export", "report"})
#: The arguments that have no value at all.
_ALONE = frozenset({"-h", "--help", "--print_config"})


def complete(arguments: Sequence[str], environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return all arguments of a command in the form that the parser understands.

    Args:
        arguments: Those of the command line, the subcommand first.
        environment: May name arguments, too, which those of the command line take the place of.

    Raises:
        FusionError: Arguments are given in two ways, or there is no experiment of that name.
    """
    command, *others = spell_out([_present(argument) for argument in arguments]) or [""]
    if command == "pipeline":
        others = at_scale(named(others))
    return [*([command] if command else []), *_from_environment(command, environment), *others]


def _present(argument: str) -> str:
    """Replace `configs/...` by the installed file where the current folder has none, and old class paths."""
    option, equals, value = argument.rpartition("=")
    installed = configs.FOLDER / value.removeprefix("configs/")
    if value.startswith("configs/") and not Path(value).exists() and installed.is_file():
        return f"{option}{equals}{installed}"
    return f"{option}{equals}{present_name(value)}"


def _from_environment(command: str, environment: Mapping[str, str]) -> list[str]:
    """Return the options of the module and of the data that the environment names: `CLAFUSION_FIT__MODEL__LR=0.5`.

    The parser itself does not look for those: which there are depends on the class.
    """
    prefix = f"CLAFUSION_{command.upper()}__"
    values = {name.removeprefix(prefix): value for name, value in environment.items() if name.startswith(prefix)}
    nested = [item for item in sorted(values.items()) if item[0].startswith(("MODEL__", "DATA__"))]
    return [f"--{name.lower().replace('__', '.')}={value}" for name, value in nested]


def named(arguments: Sequence[str]) -> list[str]:
    """Replace the name of an experiment, which may stand first, by its file.

    Args:
        arguments: Those of `pipeline`.

    Raises:
        FusionError: There is no experiment of that name.
    """
    if not arguments or arguments[0].startswith("-"):
        return list(arguments)
    return ["--config", str(catalogue.find(arguments[0])), *arguments[1:]]


def at_scale(arguments: Sequence[str]) -> list[str]:
    """Add the data module that an experiment has at its small scale, if that is the one asked for.

    It stands right after the configurations: what the user says about the data after them wins.

    Args:
        arguments: Those of `pipeline`, the experiment by its file.
    """
    config: dict[str, Any] = {}
    scale, end = None, 0
    for place, (argument, follower) in enumerate(zip_longest(arguments, arguments[1:], fillvalue=""), 1):
        option, equals, value = argument.partition("=")
        if option in ("-c", "--config"):
            config |= catalogue.read(value if equals else follower)
            end = place if equals else place + 1
        elif option == "--scale":
            scale = value if equals else follower
    experiment = config.get("experiment")
    small = experiment.get("small") if isinstance(experiment, dict) else None
    data = small.get("data") if isinstance(small, dict) else None
    if (scale or config.get("scale")) != "small" or not isinstance(data, dict) or "class" not in data:
        return list(arguments)
    module = {"class_path": data["class"], "init_args": data.get("init_args", {})}
    return [*arguments[:end], f"--data={json.dumps(module)}", *arguments[end:]]


def without_details(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Leave out what arguments say about the classes of some options, but not a question for their help.

    Args:
        arguments: Those of the command line.
        options: Names of the options that choose a class.

    Example:
        >>> without_details(["test", "--data.size", "8", "--data.data_dir=photos", "--ckpt_path", "a.ckpt"], ["data"])
        ['test', '--ckpt_path', 'a.ckpt']
    """
    details = tuple(f"--{option}." for option in options)
    kept, words = [], iter(arguments)
    for word in words:
        if not word.startswith(details) or ".help" in word:
            kept.append(word)
        elif "=" not in word:
            next(words, None)
    return kept


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Give a lone flag its value, and names to what stands without: the files of `fuse a.ckpt b.ckpt -o c.ckpt`.

    Args:
        arguments: Those of the command line, the subcommand first.

    Returns:
        Arguments that the parser understands.

    Raises:
        FusionError: Parents or the output are given in both ways.

    Example:
        >>> spell_out(["fuse", "a.ckpt", "b.ckpt", "-o", "c.ckpt", "--overwrite"])
        ['fuse', '--overwrite=true', '--parents=["a.ckpt", "b.ckpt"]', '--output=c.ckpt']
        >>> spell_out(["convert", "a.pt", "b.ckpt"])
        ['convert', '--input=a.pt', '--output=b.ckpt']
    """
    followers = [*arguments[1:], "--"]
    spelled = [
        f"{argument}=true" if argument in _FLAGS and follower not in _VALUES else argument
        for argument, follower in zip(arguments, followers, strict=False)
    ]
    if spelled[:1] == [] or spelled[0] not in _WITH_OUTPUT:
        return spelled
    words, others = _sorted(spelled[1:])
    return [spelled[0], *_named(spelled[0], words, others)]


def _named(command: str, words: Sequence[str], others: list[str]) -> list[str]:
    """Return all arguments of a command, given those that stand without a name and the others."""
    given = {argument.partition("=")[0] for argument in others}
    if command == "fuse" and words:
        if "--parents" in given:
            raise FusionError(f"Expected parents once, got {' '.join(words)} and --parents; leave one of them out")
        words = [f"--parents={json.dumps(words)}"]
    elif command in ("convert", "export"):
        names = [name for name in ("--input", "--output") if name not in given]
        words = [*(f"{name}={word}" for name, word in zip(names, words, strict=False)), *words[len(names) :]]
    outputs = [argument for argument in others if argument.startswith("--output=")]
    if len(outputs) + ("--output" in others) > 1:
        raise FusionError("Expected one output, got several; give -o or --output once")
    return [*(argument for argument in others if argument not in outputs), *words, *outputs]


def _sorted(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return what is neither an option nor the value of one, and the rest, in which `-o` has its long name."""
    words: list[str] = []
    others: list[str] = []
    found = iter(arguments)
    for argument in found:
        if argument.startswith("-o") and not argument.startswith("--"):
            output = argument[2:].removeprefix("=") or next(found, "")
            if not output or output.startswith("-"):
                raise FusionError(f"Expected a file after -o, got {output or 'none'}; give -o NAME")
            others.append(f"--output={output}")
        elif argument.startswith("-"):
            others.append(argument)
            if "=" not in argument and argument not in _ALONE:
                others += [value for value in [next(found, None)] if value is not None]
        else:
            words.append(argument)
    return words, others
