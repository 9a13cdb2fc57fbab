"""Parents that guess are refused before anything is fused, and only where there are enough images to tell."""

import pytest

from clafusion import FusionError
from clafusion.lightning_modules.commands.chance import check_above_chance, is_near_chance


@pytest.mark.parametrize(
    ("right", "count", "classes", "expected"),
    [
        (0.10, 360, 10, True),
        (0.13, 10_000, 10, True),
        (0.16, 10_000, 10, False),
        (0.14, 100, 10, False),  # one with 19 % right has so few by accident
        (0.0, 10, 10, False),
        (0.01, 10_000, 100, True),
        (0.03, 10_000, 100, False),
        (0.5, 10_000, 2, True),
        (0.7, 10_000, 2, False),  # few classes: half as much again would be a fair network
        (0.5, 100, 2, False),
        (1.0, 100, 1, False),
        (0.0, 0, 10, False),
    ],
)
def test_what_counts_as_guessing(right, count, classes, expected):
    assert is_near_chance(right, count, classes) is expected


def row(name: str, accuracy: float, **more: int) -> dict:
    return {"name": name, "role": "parent", "parameters": 1, "test_acc": accuracy, "test_images": 1000, **more}


def test_the_line_names_those_that_guess_and_what_to_look_at():
    check_above_chance([row("a.ckpt", 0.9), row("b.ckpt", 0.4)], 10)
    with pytest.raises(FusionError, match=r"got b.ckpt with 9.0% of 1,000 right; .*--data.mean.*--check_parents false"):
        check_above_chance([row("a.ckpt", 0.9), row("b.ckpt", 0.09)], 10)


def test_a_parent_is_judged_on_the_classes_that_it_knows():
    # Right about every second image of the tenth that it knows: five percent of all.
    check_above_chance([row("a.ckpt", 0.05, knows=10, known_images=100)], 100)
    with pytest.raises(FusionError, match="got a.ckpt with 10.0% of 500 right"):
        check_above_chance([row("a.ckpt", 0.05, knows=10, known_images=500)], 20)
