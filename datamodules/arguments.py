"""Checks of the data modules' plain arguments."""

from clafusion.errors import FusionError


def check_whole(name: str, value: object, minimum: int) -> None:
    """Refuse anything but a plain integer of at least `minimum`.

    Raises:
        FusionError: The value is of another type (bool and numpy integers included) or too small.
    """
    if type(value) is not int or value < minimum:
        raise FusionError(f"Expected {name} to be an integer of at least {minimum}, got {value!r}; change {name}")


def check_flag(name: str, value: object) -> None:
    """Refuse anything but True and False.

    Raises:
        FusionError: The value is of another type.
    """
    if type(value) is not bool:
        raise FusionError(f"Expected {name} to be true or false, got {value!r}; change {name}")


def check_path(name: str, value: object) -> None:
    """Refuse anything but a path as a string that is not empty.

    Raises:
        FusionError: The value is of another type or empty.
    """
    if type(value) is not str or not value:
        raise FusionError(f"Expected {name} to be a string, got {value!r}; write the folder's path")
