"""The command line as a script: `python cli.py fit ...` is `clafusion fit ...`."""

from clafusion.lightning_modules.commandline import main

if __name__ == "__main__":
    main()
