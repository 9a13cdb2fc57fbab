"""Who wants to know how far a fusion is, is told; the fusion itself is the same."""

import pytest
import torch

from clafusion import FusionOptions, align_layers, fuse
from clafusion.tracking import tracked, tracking
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
