"""What of a batch is the network's input."""

from collections import UserDict

import numpy as np
import pytest
import torch

from clafusion.errors import FusionError
from clafusion.statistics.batches import inputs_of

X, OTHER, LABELS = torch.rand(4, 3), torch.rand(4, 2), torch.arange(4)


@pytest.mark.parametrize(
    "batch",
    [
        X, X.numpy(), (X, LABELS), [X, LABELS], (X.numpy(), LABELS.numpy()), ({"x": X}, LABELS), [[X, X], LABELS],
        {"pixel_values": X, "labels": LABELS}, {"label": LABELS, "img": X.numpy()}, {"anything": X, "label": LABELS},
        UserDict(input=X, mask=OTHER), {"weights": OTHER, "image": X}, {"inputs": (X, OTHER)},
    ],
)  # fmt: skip
def test_the_usual_forms(batch):
    torch.testing.assert_close(inputs_of(batch), X)


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ({"left": X, "right": OTHER}, "left"), ((LABELS, X), 1), ([OTHER, X], -1), ({0: OTHER, 1: X}, 1),
        ({"views": [OTHER, X]}, lambda batch: batch["views"][1]), (X + 1, lambda batch: batch - 1),
        ({"array": X.numpy(), "image": OTHER}, "array"),
    ],
)  # fmt: skip
def test_what_the_user_names(batch, inputs):
    torch.testing.assert_close(inputs_of(batch, inputs), X)


@pytest.mark.parametrize(
    ("batch", "inputs", "message"),
    [
        ({"left": X, "right": OTHER}, None, "got dict with 'left', 'right'; say with `inputs` which part"),
        ({"label": LABELS}, None, "got dict with 'label'; say with"),
        ({"left": X}, "right", "Expected inputs='right' to be in each batch, got dict with 'left'"),
        ((X, LABELS), 2, "Expected inputs=2 to be in each batch, got tuple of Tensor, Tensor"),
        (X.numpy(), "x", "Expected inputs='x' to be in each batch, got ndarray of shape"),
        (X, 1, "Expected inputs=1 to be in each batch, got Tensor of shape"),
        ((X, LABELS), 1, "got tuple of Tensor, Tensor; say with"),
        ("words", None, "got str; say with"),
        (np.zeros(4), None, r"got ndarray of shape \[4\]; say"),
    ],
)
def test_refusals_say_what_there_is(batch, inputs, message):
    with pytest.raises(FusionError, match=message):
        inputs_of(batch, inputs)
