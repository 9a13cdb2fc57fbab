"""Who wants to know how far a fusion is, is told or sees a bar; the fusion itself is the same."""

import io
import sys

import pytest
import torch

from clafusion import FusionOptions, align_layers, fuse, layer_costs, map_units, transfer
from clafusion.tracking import bar, tracked, tracking
from tests.helpers import images, largest_difference, mlp, plain, resnet, vectors


def told(compute) -> list[tuple[str, int, int]]:
    """For every loop what is done, how many items were announced and how many there were."""
    found = []

    def track(items, words, total):
        taken = 0
        for item in items:
            yield item
            taken += 1
        found.append((words, total, taken))

    with tracking(track):
        compute()
    return found


@pytest.mark.parametrize(
    "options, expected",
    [
        (FusionOptions(), {"comparing layers": 4, "matching neurons": 5, "refitting layers": 6}),
        (FusionOptions(num_samples=96), {"measuring neurons": 2}),
        (FusionOptions(correction="rescale"), {"rescaling layers": 6}),
        (FusionOptions(correction="repair"), {"repairing layers": 6}),
        (plain(features="weights"), {"matching neurons": 5}),
        (plain(layer_measure="wasserstein"), {"matching the neurons of layers": 15}),
    ],
)
def test_every_loop_says_how_far_it_is(options, expected):
    models, samples = [mlp([9, 8, 7, 6, 5], 0), mlp([9, 7, 5], 1)], vectors(100)
    found = told(lambda: fuse(models, [samples], options))
    assert all(total == taken for _, total, taken in found)
    counts = {words: total for words, total, _ in found}
    assert expected.items() <= counts.items()


def test_projections_are_refit_with_the_branch_that_they_are_added_to():
    models, samples = [resnet([2, 1], 0), resnet([1, 1], 1)], images(12, 8)
    for correction, layers in (("refit", 8), ("rescale", 9)):
        *_, last = told(lambda c=correction: fuse(models, [samples], FusionOptions(correction=c, targets="matched")))
        assert last[1:] == (layers, layers)


def test_aligning_alone_says_how_far_it_is():
    assert told(lambda: align_layers([mlp([9, 8], 0), mlp([9], 1)], [vectors(200)]))[0] == ("comparing layers", 7, 7)


def test_nobody_is_told_by_default_and_a_fusion_is_the_same():
    models, samples, made = [mlp([9, 8, 7], 0), mlp([9, 7], 1)], vectors(40), []
    told(lambda: made.append(fuse(models, [samples])))
    assert largest_difference(made[0].model, fuse(models, [samples]).model) == 0
    items = [1, 2]
    assert tracked(items, "counting", 2) is items
    with pytest.raises(RuntimeError), tracking(lambda items, words, total: [torch.tensor(0)]):
        raise RuntimeError
    assert tracked(items, "counting", 2) is items


class Output(io.StringIO):
    """Standard error that is a terminal, or is none."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@pytest.fixture
def written(monkeypatch):
    """Runs something with another standard error, every look at the clock `seconds` later; returns what it writes."""
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")

    def run(compute, terminal=True, seconds=2.0):
        looks = iter(range(10**6))
        monkeypatch.setattr("clafusion.tracking.monotonic", lambda: seconds * next(looks))
        monkeypatch.setattr(sys, "stderr", output := Output(terminal))
        compute()
        assert sys.stderr is output
        return output.getvalue()

    return run


UNLIKE = mlp([9, 8, 7, 6, 5], 0), mlp([9, 7, 5], 1)
MODELS, SAMPLES, QUICK = [mlp([9, 8, 7], 0), mlp([9, 7], 1)], vectors(40), plain(targets="matched")


@pytest.mark.parametrize(
    ("terminal", "progress", "seconds", "shown"),
    [(True, None, 2.0, True), (True, None, 1e-6, False), (False, None, 2.0, False),
     (True, False, 2.0, False), (False, True, 2.0, True), (True, True, 2.0, True)],
)  # fmt: skip
def test_a_bar_is_shown_on_a_terminal_for_what_takes_long(written, terminal, progress, seconds, shown):
    text = written(lambda: fuse(MODELS, SAMPLES, QUICK, progress=progress), terminal, seconds)
    assert ("matching neurons" in text) == shown
    assert text == "" or shown
    # It takes itself away again, and gives the cursor back.
    assert not shown or (text.endswith("\x1b[2K") and text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"))


@pytest.mark.parametrize(
    ("compute", "words"),
    [
        (lambda **how: align_layers(MODELS, SAMPLES, **how), "aligning the layers of 2 networks"),
        (lambda **how: layer_costs(*MODELS, SAMPLES, **how), "comparing layers"),
        (lambda **how: map_units(*UNLIKE, "optimal", SAMPLES, **how), "comparing layers"),
        (lambda **how: transfer(*UNLIKE, "optimal", SAMPLES, **how), "comparing layers"),
    ],
)
def test_other_functions_show_it_as_well(written, compute, words):
    assert words in written(compute)
    assert written(lambda: compute(progress=False)) == ""


def test_there_is_one_bar_at_a_time(written):
    assert written(lambda: told(lambda: fuse(MODELS, SAMPLES, QUICK, progress=True))) == ""

    def command(progress):
        with bar(progress, delay=0) as step:
            step("reading files")
            fuse(MODELS, SAMPLES, QUICK)

    shown = written(lambda: command(None))
    assert "reading files" in shown and "matching neurons" in shown and shown.count("\x1b[?25l") == 1
    assert written(lambda: command(False)) == "" == written(lambda: command(None), terminal=False)


def test_a_bar_ends_with_an_error(written):
    def fail():
        with pytest.raises(ValueError, match="at least 2 samples"):
            fuse(MODELS, SAMPLES[:1], QUICK)

    assert written(fail).endswith("\x1b[2K")
    assert tracked(items := [1], "counting", 1) is items


def test_a_fusion_with_a_bar_is_the_same(written):
    made = []
    written(lambda: made.append(fuse(MODELS, SAMPLES, QUICK)))
    assert largest_difference(made[0].model, fuse(MODELS, SAMPLES, QUICK, progress=False).model) == 0
