"""Samples, outputs and parents in the forms that people have them in: the fusion is the same bit by bit."""

from collections import UserDict, deque
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from clafusion import (
    Ensemble,
    FusionError,
    align_layers,
    average,
    fuse,
    layer_costs,
    load_network,
    map_units,
    merge_layers,
    save_network,
    transfer,
)
from clafusion.lightning_modules import ImageClassifier
from clafusion.statistics.batches import batches_of
from clafusion.statistics.samples import collect
from clafusion.tracing.outputs import logits_in
from tests.helpers import mlp, plain, vectors

X, LABELS, COUNT = vectors(70).float(), torch.arange(70), 66
DEEP, SHALLOW = mlp([9, 8, 7], 0).float(), mlp([9, 7], 1).float()
# The samples decide which layers of these correspond.
LONG, SHORT = mlp([9, 8, 7, 6, 5], 0).float(), mlp([9, 7, 5], 1).float()
QUICK = plain(targets="matched", num_samples=COUNT)


class Rows:
    """A data set of the kind that Hugging Face has: rows are dicts, and it is of no class of PyTorch's."""

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(X):
            raise IndexError
        return {"label": LABELS[index], "pixel_values": X[index]}


class Pairs(Dataset):
    """A data set of PyTorch; it notes what is read."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        self.read.append(index)
        return X[index].numpy(), index


class Stream(IterableDataset):
    def __iter__(self):
        return zip(X, LABELS, strict=True)


def frozen(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


FORMS = {
    "tensor": lambda: X,
    "array": lambda: X.numpy(),
    "float64": lambda: X.double().numpy(),
    "read-only array": lambda: frozen(X.numpy()),
    "backward view": lambda: X.numpy()[::-1].copy()[::-1],
    "mapping": lambda: {"image": X, "label": LABELS},
    "list": lambda: [X[:30], X[30:]],
    "split": lambda: X.split(16),
    "deque": lambda: deque(X.split(16)),
    "arrays": lambda: [X[:30].numpy(), X[30:].numpy()],
    "pairs": lambda: list(zip(X.split(16), LABELS.split(16), strict=True)),
    "generator": lambda: (UserDict(x=part, mask=part > 0) for part in X.split(16)),
    "TensorDataset": lambda: TensorDataset(X, LABELS),
    "Dataset": Pairs,
    "Subset": lambda: Subset(Pairs(), range(len(X))),
    "IterableDataset": Stream,
    "DataLoader": lambda: DataLoader(TensorDataset(X, LABELS), batch_size=7),
    "Hugging Face": Rows,
}
NAMED = {
    "key": ([{"left": X * 2, "right": X}], "right"),
    "place": ([(LABELS, X)], 1),
    "function": (X + 1, lambda batch: X[: len(batch)]),
    "rows": (Rows(), "pixel_values"),
    "columns": (TensorDataset(X * 2, X), 1),
}


def result_of(models, batches, **more) -> list[Tensor]:
    return list(fuse(models, batches, QUICK, **more).model.state_dict().values())


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


EXPECTED = result_of([DEEP, SHALLOW], [X])


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_of_the_same_samples_give_the_same_fusion(form):
    before = torch.get_rng_state()
    made = fuse([DEEP, SHALLOW], FORMS[form](), QUICK)
    assert same(list(made.model.state_dict().values()), EXPECTED)
    assert made.num_samples == COUNT
    if form != "DataLoader":  # which draws a seed for its workers
        assert torch.equal(torch.get_rng_state(), before)


def test_samples_count():
    assert not same(result_of([DEEP, SHALLOW], X + 1), EXPECTED)


@pytest.mark.parametrize("form", NAMED)
def test_the_user_says_which_part_is_the_input(form):
    batches, inputs = NAMED[form]
    assert same(result_of([DEEP, SHALLOW], batches, inputs=inputs), EXPECTED)


@pytest.mark.parametrize(
    "function",
    [
        lambda batches, **how: align_layers([DEEP, SHALLOW], batches, **how).costs[1][0],
        lambda batches, **how: layer_costs(DEEP, SHALLOW, batches, **how)[0],
        lambda batches, **how: map_units(LONG, SHORT, "optimal", batches, **how).costs[0],
        lambda batches, **how: transfer(SHORT, LONG, "optimal", batches, **how).fc3.weight,
        lambda batches, **how: merge_layers(DEEP, SHALLOW, ((0, 2), (0,)), batches, **how).fc2.weight,
    ],
)
def test_other_functions_take_them_as_well(function):
    expected = function([X])
    for batches, inputs in ((X, None), (Rows(), "pixel_values"), ([{"a": X * 2, "b": X}], "b")):
        assert torch.equal(function(batches, inputs=inputs), expected)


def test_a_data_set_is_read_in_order_and_no_further_than_needed():
    data = Pairs()
    assert torch.equal(collect(data, 20), X[:20])
    assert data.read == list(range(20))
    assert [len(batch[0]) for batch in batches_of(TensorDataset(X), 100)] == [64, 6]


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (3, "Expected samples as a tensor, a data set with a length, a DataLoader or batches, got int; pass"),
        (SHALLOW, "got MLP; pass unlabelled inputs"),
        ("images", "got str; pass unlabelled inputs"),
        (torch.tensor(1.0), r"Expected batches of samples \[batch, ...\], got Tensor of shape \[\]"),
        (LABELS, r"got Tensor of shape \[70\]; say with `inputs`"),
        ({"a": X, "b": X}, "got dict with 'a', 'b'; say with `inputs`"),
        (np.array([["a"], ["b"]]), "Expected arrays of numbers, got one of <U1; convert them"),
        ([], "Expected at least one batch of samples, got none"),
        (X[:0], "Expected at least 2 samples to measure on, got 0"),
        (X.split(1)[0], "Expected at least 2 samples to measure on, got 1"),
        ([X, X[:, :5]], r"Expected samples of one shape, got \[12\] and \[5\]"),
    ],
)
def test_other_samples_are_refused_in_one_line(batches, message):
    with pytest.raises(FusionError, match=message) as caught:
        fuse([DEEP, SHALLOW], batches, plain())
    assert "\n" not in str(caught.value)


class Raw(Rows):
    def __getitem__(self, index: int) -> dict[str, object]:
        return {"image": object() if self.odd is None else X[index][: 5 + index], "label": 0}

    def __init__(self, odd: str | None) -> None:
        self.odd = odd


@pytest.mark.parametrize("odd", [None, "shapes"])
def test_rows_that_make_no_batch_are_named(odd):
    with pytest.raises(FusionError, match="make a batch of tensors, got dict with 'image', 'label': .*collate_fn"):
        fuse([DEEP, SHALLOW], Raw(odd))


class Output(NamedTuple):
    logits: Tensor
    auxiliary: Tensor


class Late(NamedTuple):
    features: Tensor
    logits: Tensor


class Answering(nn.Module):
    """A network with the same logits in another form."""

    def __init__(self, network: nn.Module, form) -> None:
        super().__init__()
        self.network, self.form = network, form

    def forward(self, x):
        return self.form(self.network(x))


OUTPUTS = {
    "object": lambda logits: SimpleNamespace(loss=None, logits=logits),
    "mapping": lambda logits: {"features": logits * 2, "logits": logits},
    "only entry": lambda logits: {"out": logits},
    "tuple": lambda logits: (logits, logits * 2),
    "none first": lambda logits: (None, logits),
    "nested": lambda logits: [{"logits": logits}, logits * 2],
    "named tuple": lambda logits: Output(logits, logits * 2),
    "later in a named tuple": lambda logits: Late(logits * 2, logits),
}


def hugging_face(logits: Tensor):
    return pytest.importorskip("transformers.modeling_outputs").ImageClassifierOutput(logits=logits)


@pytest.mark.parametrize("form", [*OUTPUTS.values(), hugging_face], ids=[*OUTPUTS, "Hugging Face"])
def test_logits_are_found_in_what_networks_return(form):
    models = [Answering(DEEP, form), Answering(SHALLOW, form)]
    made = fuse(models, X, QUICK)
    assert same(list(made.model.state_dict().values()), EXPECTED)
    assert type(made.model(X)) is type(form(DEEP(X)))  # the result answers as its class does
    assert torch.equal(Ensemble(models)(X), Ensemble([DEEP, SHALLOW])(X))
    classifier = ImageClassifier()
    classifier.network = models[0]
    assert torch.equal(classifier(X), DEEP(X))


def test_a_network_that_returns_an_object_is_saved(tmp_path):
    save_network(Answering(DEEP, OUTPUTS["object"]), tmp_path / "a.safetensors", X)
    torch.testing.assert_close(load_network(tmp_path / "a.safetensors")(X), DEEP(X))


@pytest.mark.parametrize(
    ("form", "got"),
    [
        (lambda logits: {"features": logits, "out": logits}, "dict with 'features', 'out'"),
        (lambda logits: (logits.sum(), logits), r"Tensor of shape \[\]"),
        (lambda logits: logits[:, None], r"Tensor of shape \[2, 1, 4\]"),
        (lambda logits: SimpleNamespace(out=logits), "SimpleNamespace"),
        (lambda logits: (), "tuple of nothing"),
        (lambda logits: None, "NoneType"),
    ],
)
def test_other_outputs_are_refused_and_not_guessed(form, got):
    message = rf"parent 1: Expected a network that returns logits \[samples, classes\], got {got}; wrap it"
    with pytest.raises(FusionError, match=message):
        fuse([DEEP, Answering(SHALLOW, form)], X, QUICK)
    with pytest.raises(FusionError, match=r"got .*; wrap it"):
        logits_in(form(SHALLOW(X)))


FUNCTIONS = [
    (lambda models: fuse(models, X, QUICK), r"fuse\(\[a, b\], batches\)"),
    (lambda models: align_layers(models, X, QUICK), r"align_layers\(\[a, b\], batches\)"),
    (average, r"average\(\[a, b\]\)"),
    (Ensemble, r"Ensemble\(\[a, b\]\)"),
]


@pytest.mark.parametrize(("function", "call"), FUNCTIONS)
def test_parents_are_a_list(function, call):
    for models in (DEEP, nn.Sequential(nn.Linear(12, 4)), "a.ckpt", 2):
        name = type(models).__name__
        with pytest.raises(FusionError, match=f"Expected a list of models, got {name}; write {call}"):
            function(models)
    for models in ({"deep": DEEP, "shallow": SHALLOW}, nn.ModuleDict({"deep": DEEP})):
        with pytest.raises(FusionError, match=r"got (dict|ModuleDict); write list\(models.values\(\)\)"):
            function(models)
    with pytest.raises(FusionError, match=r"Expected models as torch.nn.Module, got str for parent 1; .*load_network"):
        function([DEEP, "b.ckpt"])


def test_a_forgotten_list_is_named():
    with pytest.raises(FusionError, match=r"got MLP; write fuse\(\[a, b\], batches\)"):
        fuse(DEEP, SHALLOW, [X])


@pytest.mark.parametrize("kind", [tuple, iter, nn.ModuleList])
def test_parents_in_other_containers(kind):
    assert same(result_of(kind([DEEP, SHALLOW]), X), EXPECTED)
