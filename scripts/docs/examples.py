"""Lets Griffe, which reads the docstrings for the site, take `Example:` for what it knows as `Examples:`."""

import re
from typing import Any

from griffe import Extension, Object


class ExampleSections(Extension):
    """Renames the sections, so that what is in them is shown as a session and not read as Markdown."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for everything that is read, once."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
