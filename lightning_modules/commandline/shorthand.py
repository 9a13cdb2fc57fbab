"""Shorter ways to type a command, spelled out before the arguments are parsed."""

import json
from collections.abc import Sequence

from clafusion.errors import FusionError

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
_WITH_OUTPUT = frozenset({"fuse", "transfer", "convert", "export", "report"})
#: The arguments that have no value at all.
_ALONE = frozenset({"-h", "--help", "--print_config"})


def spell_out(arguments: Sequence[str]) -> list[str]:
    """Gives a lone flag its value, and names to what stands without: the files of `fuse a.ckpt b.ckpt -o c.ckpt`.

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
    """All arguments of a command, given those that stand without a name and the others."""
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
    """What is neither an option nor the value of one, and the rest, in which `-o` has its long name."""
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
