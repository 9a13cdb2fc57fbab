"""Parents that guess on the test images, found before they are fused: most often the preprocessing is another one."""

import math
from collections.abc import Sequence

from clafusion.errors import FusionError
from clafusion.fusion.record import NetworkRow


def check_above_chance(rows: Sequence[NetworkRow], classes: int) -> None:
    """Refuse parents that do no better than guessing on the test images.

    Args:
        rows: Of the parents.
        classes: How many classes there are.

    Raises:
        FusionError: One of them guesses; too few test images to tell are no reason.
    """
    guessing = [row for row in rows if _guesses(row, classes)]
    if guessing:
        found = ", ".join(f"{row['name']} with {_right(row):.1%} of {_count(row):,}" for row in guessing)
        raise FusionError(
            f"Expected parents that do better than chance on the test images, got {found} right; give the images as in "
            "their training (--data.size, --data.mean, --data.std, the order of the classes), or fuse them all the "
            "same by --check_parents false"
        )


def is_near_chance(right: float, count: int, classes: int) -> bool:
    r"""Whether an accuracy is near that of guessing, and too low to be that of a better network by accident.

    .. math:: p < p_0 + d, \quad p + 2 \sqrt{q (1 - q) / n} < q = p_0 + 2 d, \quad
              p_0 = 1 / C, \quad d = \min(p_0 / 2, (1 - p_0) / 20)

    Args:
        right: The share p of the images that a network is right about.
        count: The number n of the images.
        classes: The number C of classes.

    Example:
        >>> is_near_chance(0.1, 360, 10), is_near_chance(0.1, 20, 10), is_near_chance(0.16, 10_000, 10)
        (True, False, False)
    """
    if classes < 2 or count == 0:
        return False
    chance = 1 / classes
    margin = min(chance / 2, (1 - chance) / 20)
    better = chance + 2 * margin
    return right < chance + margin and right + 2 * math.sqrt(better * (1 - better) / count) < better


def _guesses(row: NetworkRow, classes: int) -> bool:
    return is_near_chance(_right(row), _count(row), row.get("knows", classes))


def _count(row: NetworkRow) -> int:
    """The number of images of the classes that a network knows."""
    return row.get("known_images", row["test_images"])


def _right(row: NetworkRow) -> float:
    """The share of these that it is right about."""
    return row["test_acc"] * row["test_images"] / max(_count(row), 1)
