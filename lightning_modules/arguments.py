"""Shorter ways to type a command, spelled out before the arguments are parsed."""

import json
from collections.abc import Sequence

from clafusion.errors import FusionError

#: The arguments that may stand without a value, which is then true.
_FLAGS = frozenset(
    f"--{name}"
    for name in (
        "overwrite",
        "align_only",
        "report",
        "figures",
        "classifier",
        "shortcuts",
        "reinitialize",
        "quiet",
        "json",
    )
)
#: What the parser reads as the value of such an argument.
_VALUES = frozenset({"true", "false", "yes", "no", "True", "False"})
#: The arguments that have no value at all.
_ALONE = frozenset({"-h", "--help", "--print_config"})


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Gives a lone flag its value, and the checkpoints of `fuse a.ckpt b.ckpt -o c.ckpt` their names.

    Args:
        arguments: Those of the command line, the subcommand first.

    Returns:
        Arguments that the parser understands.

    Raises:
        FusionError: Parents or the output are given in both ways.

    Example:
        >>> spell_out(["fuse", "a.ckpt", "b.ckpt", "-o", "c.ckpt", "--overwrite"])
        ['fuse', '--overwrite=true', '--parents=["a.ckpt", "b.ckpt"]', '--output=c.ckpt']
    """
    followers = [*arguments[1:], "--"]
    spelled = [
        f"{argument}=true" if argument in _FLAGS and follower not in _VALUES else argument
        for argument, follower in zip(arguments, followers, strict=False)
    ]
    return ["fuse", *_parents_named(spelled[1:])] if spelled[:1] == ["fuse"] else spelled


def _parents_named(arguments: Sequence[str]) -> list[str]:
    """The arguments of `fuse`: what is no option and no value of one is a parent."""
    parents: list[str] = []
    outputs: list[str] = []
    others: list[str] = []
    found = iter(arguments)
    for argument in found:
        if argument.startswith("-o") and not argument.startswith("--"):
            outputs.append(argument[2:].removeprefix("=") or next(found, ""))
            if not outputs[-1] or outputs[-1].startswith("-"):
                raise FusionError(f"Expected a file after -o, got {outputs[-1] or 'none'}; give -o NAME.ckpt")
        elif argument.startswith("-"):
            others.append(argument)
            if "=" not in argument and argument not in _ALONE:
                others += [value for value in [next(found, None)] if value is not None]
        else:
            parents.append(argument)
    given = {argument.partition("=")[0] for argument in others}
    if parents and "--parents" in given:
        raise FusionError(f"Expected parents once, got {' '.join(parents)} and --parents; leave one of them out")
    if len(outputs) + ("--output" in given) > 1:
        raise FusionError("Expected one output, got several; give -o or --output once")
    named = [f"--parents={json.dumps(parents)}"] if parents else []
    return [*others, *named, *(f"--output={output}" for output in outputs)]
