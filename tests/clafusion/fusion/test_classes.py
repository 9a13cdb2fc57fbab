"""Parents that tell different classes apart are fused into a network with the classes of all."""

import pytest
import torch
from torch import Tensor, nn

from clafusion import Ensemble, FusionError, FusionOptions, fuse, load_network, save_network
from clafusion.fusion.outputs import with_outputs
from clafusion.networks import MLP
from clafusion.tracing.reading import structure_of
from tests.helpers import accuracy, trained

UNITED = FusionOptions(teacher="auto", targets="auto", num_samples=600)


def specialists(labels: list[list[int]], seed: int = 0) -> tuple[list[nn.Module], Tensor, Tensor, Tensor]:
    """Networks that were trained on some of seven classes each, samples of all, and a test set."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2.5 * torch.randn(7, 10, generator=generator)

    def draw(count: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(7, (count,), generator=generator)
        return centres[y] + torch.randn(count, 10, generator=generator), y

    x, y = draw(2000)
    parents: list[nn.Module] = []
    for number, own in enumerate(labels):
        torch.manual_seed(seed + number)
        network = MLP(10, [24, 16], len(own), bias=True)
        mine = torch.isin(y, torch.tensor(own))
        targets = torch.tensor([own.index(int(label)) for label in y[mine]])
        parents.append(trained(network, x[mine], targets, 120))
    return parents, draw(600)[0], *draw(1000)


@pytest.mark.parametrize("labels", [[[0, 1, 2, 3], [4, 5, 6]], [[3, 1, 0, 2, 4], [6, 2, 5, 4]]])
def test_the_result_tells_the_classes_of_all_apart(labels, tmp_path):
    parents, samples, x, y = specialists(labels)
    fusion = fuse(parents, [samples], UNITED, classes=labels)
    ensemble = Ensemble(parents, space="gated", samples=samples, classes=labels)
    assert fusion.classes == (0, 1, 2, 3, 4, 5, 6) and fusion.model(x).shape == (1000, 7)
    most = max(len(own) for own in labels) / 7  # what a parent can know
    assert accuracy(fusion.model, x, y) > most + 0.1
    assert accuracy(fusion.model, x, y) > accuracy(ensemble, x, y) - 0.05
    save_network(fusion.model, tmp_path / "united.safetensors")
    with torch.no_grad():
        assert torch.equal(load_network(tmp_path / "united.safetensors")(x), fusion.model(x))


def test_the_names_of_the_labels_decide_their_order():
    labels = [[0, 1, 2, 3], [4, 5, 6]]
    words = ["bird", "cat", "deer", "dog", "frog", "horse", "ship"]
    parents, samples, x, _ = specialists(labels)
    numbers = fuse(parents, [samples], UNITED, classes=labels)
    named = fuse(parents, [samples], UNITED, classes=[[words[label] for label in own] for own in labels])
    assert named.classes == tuple(words)
    with torch.no_grad():
        assert torch.equal(named.model(x), numbers.model(x))


def test_equal_label_sets_are_as_none_given():
    parents, samples, x, _ = specialists([[0, 1, 2], [0, 1, 2]])
    plain, given = (
        fuse(parents, [samples], FusionOptions(num_samples=600), classes=c) for c in (None, [[0, 1, 2]] * 2)
    )
    with torch.no_grad():
        assert torch.equal(plain.model(x), given.model(x))


def test_more_outputs_leave_those_that_there_were():
    (parent, _), samples, x, _ = specialists([[0, 1, 2], [3, 4]])
    wider = with_outputs(parent, structure_of(parent, samples), torch.tensor([4, 0, 2]), 6, samples)
    with torch.no_grad():
        torch.testing.assert_close(wider(x)[:, [4, 0, 2]], parent(x))
        assert not wider(x)[:, [1, 3, 5]].any()


def test_the_ensemble_gives_nothing_to_what_no_model_knows_alone():
    labels = [[0, 1, 2, 3], [4, 5, 6]]
    parents, _, x, _ = specialists(labels)
    together = Ensemble(parents, [1, 0], classes=labels)(x).exp()
    torch.testing.assert_close(together[:, :4], parents[0](x).softmax(1))
    assert not together[:, 4:].any()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ([[0, 1, 2, 3]], "the classes of 2 parents, got those of 1"),
        ([[0, 1, 2], [4, 5, 6]], r"4 classes for the outputs of parent 0, got \[0, 1, 2\]"),
        ([[0, 1, 2, 2], [4, 5, 6]], "the classes of parent 0 to be different, got 2 twice"),
        ([[0, 1, 2, "x"], [4, 5, 6]], "classes that are all whole numbers or all words, got int, str"),
        (["abcd", [4, 5, 6]], "4 classes for the outputs of parent 0, got 'abcd'"),
    ],
)
def test_labels_that_contradict_the_outputs_are_refused(classes, message):
    parents, samples, *_ = specialists([[0, 1, 2, 3], [4, 5, 6]])
    with pytest.raises(FusionError, match=f"Expected {message}"):
        fuse(parents, [samples], UNITED, classes=classes)


@pytest.mark.parametrize("changes", [{"correction": "none"}, {"head": "anchor"}])
def test_what_cannot_join_label_sets_is_refused(changes):
    parents, samples, *_ = specialists([[0, 1, 2, 3], [4, 5, 6]])
    (name,) = changes
    with pytest.raises(FusionError, match=f"Expected {name} .* for parents of different classes, got"):
        fuse(parents, [samples], FusionOptions(num_samples=600, **changes), classes=[[0, 1, 2, 3], [4, 5, 6]])
