"""`python -m clafusion` and `torchrun -m clafusion`: the command line."""

from clafusion.lightning_modules.commandline import main

if __name__ == "__main__":
    main()
