"""The one exception that says: this input cannot be used, and here is what to do about it."""


class FusionError(ValueError):
    """An input that CLAFusion cannot use.

    The message is one line: what was expected, what came, and what to do next. The command line prints it and exits
    with code 2; a library caller may catch it as a `ValueError`.
    """
