"""The command line `clafusion`."""

from collections.abc import Sequence


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; see `clafusion.lightning_modules.commandline.cli.main`."""
    # Imported late: the other modules of this folder are read without the data modules and callbacks.
    from clafusion.lightning_modules.commandline.cli import main

    main(args)
