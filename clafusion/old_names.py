"""The names that packages had in version 0.1, and the message that an import of one of them gets.

In 0.1 four names of ours stood beside `clafusion`; a program written for it begins with `from callbacks import ...`.
Such an import fails with a line that names the present package, if it finds nothing else: a package of that name in the
user's project is theirs.
"""

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

#: By the old name of a package the present one.
NEW_NAMES = {
    "lightning_modules": "clafusion.lightning_modules",
    "datamodules": "clafusion.datamodules",
    "callbacks": "clafusion.callbacks",
    "cli": "clafusion.lightning_modules.commandline",
}


def refuse_old_name(name: str) -> None:
    """Refuse the import of a package by its old name, by which Python finds the folders of a checkout.

    Args:
        name: The `__name__` of a package; only an old one is refused.

    Raises:
        ModuleNotFoundError: Names the present package.
    """
    if name in NEW_NAMES:
        present = NEW_NAMES[name]
        raise ModuleNotFoundError(f"Expected {present}, got {name}; write `from {present} import ...`", name=name)


class OldNames:
    """The last finder of modules: it finds nothing, but says why an old name is not found any more.

    It speaks only when a module is being imported. `importlib.util.find_spec`, by which tools ask whether a module
    exists, gets None, as before: a spec would say that it does, and an exception is what no such tool expects.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Refuse an old name that no other finder knows."""
        if name in NEW_NAMES and _is_imported() and not self._is_known_later(name):
            refuse_old_name(name)
        return None

    def _is_known_later(self, name: str) -> bool:
        later = sys.meta_path[sys.meta_path.index(self) + 1 :] if self in sys.meta_path else []
        return any(finder.find_spec(name, None) is not None for finder in later)


def _is_imported() -> bool:
    """Whether an import asks, and no tool: both come by the same way, which only Python's own frames tell apart."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name == "_find_spec":
        frame = frame.f_back
    return frame.f_code.co_name == "_find_and_load_unlocked"


def explain_old_names() -> None:
    """Let imports of old names say what to write instead, from now on; does nothing the second time."""
    if not any(isinstance(finder, OldNames) for finder in sys.meta_path):
        sys.meta_path.append(OldNames())
