"""The command line as a script: `python cli.py fit ...` is `clafusion fit ...`."""

from clafusion.old_names import refuse_old_name

refuse_old_name(__name__)

from clafusion.lightning_modules.commandline import main  # noqa: E402

if __name__ == "__main__":
    main()
