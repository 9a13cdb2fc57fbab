"""The primitives of labels: moving, merging, reducing and pinning."""

import numpy as np
import pytest
import torch

from clafusion.tracing.elements import Elements, turns
from clafusion.tracing.joining import concatenate
from clafusion.tracing.labels import Labels, Value, varies


@pytest.fixture
def labels() -> Labels:
    return Labels()


def elements_of(labels: Labels, value: Value) -> list[list[int]]:
    """The elements of every array of a value, as they are now."""
    return [array.flatten().tolist() for array in labels.tidy(value).arrays]


def test_tied_elements_are_found_through_chains():
    elements = Elements()
    one, two, three = (elements.fresh(3) for _ in range(3))
    elements.tie(three, two)
    elements.tie(two, one[::-1].copy())
    assert elements.find(three).tolist() == one[::-1].tolist()


def test_many_to_one_is_tied_whatever_the_order():
    elements = Elements()
    one, many = elements.fresh(1), elements.fresh(50)
    elements.tie(many, np.repeat(one, 50))
    assert (elements.find(many) == one[0]).all()


def test_what_is_fixed_stays_fixed_when_it_is_tied():
    elements = Elements()
    one, two = elements.fresh(2), elements.fresh(2)
    elements.fix(two[:1], 5)
    elements.tie(one, two)
    assert elements.reason(one).tolist() == [5, -1]


def test_equal_blocks_are_the_same():
    elements = Elements()
    child, block, other = elements.fresh(4), elements.fresh(2), elements.fresh(2)
    elements.put_in_blocks(child, np.repeat(block, 2))
    elements.put_in_blocks(child, np.repeat(other, 2))
    assert elements.find(other).tolist() == elements.find(block).tolist()
    assert len(elements.relations) == 1


def test_blocks_of_one_element_are_that_element():
    elements = Elements()
    child, block = elements.fresh(3), elements.fresh(3)
    elements.put_in_blocks(child, block)
    assert elements.find(block).tolist() == child.tolist()


def test_a_neuron_in_two_blocks_makes_them_one():
    elements = Elements()
    child, block = elements.fresh(2), elements.fresh(4)
    elements.put_in_blocks(np.repeat(child, 2), block)
    root = elements.find(block)
    assert root[0] == root[1] != root[2] == root[3]


def test_turns_count_occurrences():
    assert turns(np.array([7, 7, 3, 7, 3])).tolist() == [0, 1, 0, 2, 1]
    assert turns(np.array([2, 1, 0])).tolist() == [0, 0, 0]


def test_a_flatten_repeats_each_channel(labels):
    value = labels.parameter((4,))
    image = labels.reshape(labels.reshape(value, (1, 4, 1, 1)), (1, 4, 1, 1))
    flat = labels.reshape(Value((2, 4, 3, 3), image.arrays), (2, 36))
    [array] = flat.arrays
    assert tuple(array.shape) == (1, 36)
    assert array.flatten().tolist() == np.repeat(value.arrays[0].numpy(), 9).tolist()


def test_arrays_stay_compact_however_large_the_tensor_is(labels):
    value = Value((64, 256, 256, 96), (labels.fresh((1, 1, 1, 96)),))
    moved = labels.reshape(labels.permute(value, (0, 3, 1, 2)), (64, 8, 12, 65536))
    assert [tuple(array.shape) for array in moved.arrays] == [(1, 8, 12, 1)]


def test_a_sum_ties_its_operands(labels):
    one, two = labels.parameter((5,)), labels.parameter((5,))
    labels.merge(Value((2, 7, 5), (one.arrays[0].reshape(1, 1, 5),)), two)
    assert elements_of(labels, one) == elements_of(labels, two)


def test_what_meets_unlabelled_entries_is_pinned(labels):
    value = labels.parameter((5,))
    labels.place = "add in fc"
    labels.merge(value, Value((2, 5)))
    assert elements_of(labels, value) == []
    assert labels.reasons == ["add in fc"]


@pytest.mark.parametrize(
    ("constant", "pinned"), [(torch.full((5,), 2.0), False), (torch.arange(5.0), True), (torch.tensor(3.0), False)]
)
def test_a_constant_pins_only_where_it_differs(labels, constant, pinned):
    value = labels.parameter((5,))
    labels.merge(value, Value(tuple(constant.shape), (), constant))
    assert (elements_of(labels, value) == []) is pinned


def test_a_mask_pins_the_positions_alone(labels):
    value = labels.parameter((6, 4))
    mask = torch.eye(6)[:, :1].expand(6, 4)
    merged = labels.merge(value, Value((6, 4), (), mask))
    assert [varies(array) for array in merged.arrays] == [{1}]


def test_what_was_broadcast_does_not_pin(labels):
    value = labels.parameter((6, 4))
    labels.merge(value, Value((6, 4), (), None, frozenset({0, 1})))
    assert len(elements_of(labels, value)) == 2


def test_heads_are_left_by_a_sum_over_their_features(labels):
    query, key = (Value((2, 3, 1, 4), (labels.fresh((1, 3, 1, 4)),)) for _ in range(2))
    scores = labels.reduce(labels.merge(query, key), [-1], keepdim=False)
    assert elements_of(labels, query) == elements_of(labels, key)
    [heads] = scores.arrays
    assert tuple(heads.shape) == (1, 3, 1)
    assert labels.elements.implies(query.arrays[0].numpy(), heads.unsqueeze(-1).expand(1, 3, 1, 4).numpy())


def test_a_full_sum_leaves_nothing(labels):
    assert labels.reduce(labels.parameter((3, 4)), [0, 1]).arrays == ()


def test_pinning_one_of_two_dimensions_fixes_columns(labels):
    value = Value((3, 4), (labels.fresh((3, 4)),))
    labels.pin(value, [1])
    [columns] = labels.elements.blocks_of(value.arrays[0].numpy())
    assert labels.elements.are_fixed(labels.elements.find(columns)).all()
    assert not labels.elements.are_fixed(labels.elements.find(value.arrays[0].numpy())).any()


def test_concatenated_channels_stay_themselves(labels):
    one, two = labels.parameter((2,)), labels.parameter((3,))
    [array] = concatenate(labels, [one, two], 0).arrays
    assert array.tolist() == [*one.arrays[0].tolist(), *two.arrays[0].tolist()]


def test_concatenated_tokens_share_their_features(labels):
    token, tokens = Value((2, 1, 5), (labels.fresh((1, 1, 5)),)), Value((2, 8, 5), (labels.fresh((1, 1, 5)),))
    result = concatenate(labels, [token, tokens], 1)
    assert elements_of(labels, token) == elements_of(labels, tokens) == elements_of(labels, result)


@pytest.mark.parametrize(("constant", "fixed"), [(torch.zeros(3), False), (torch.arange(3.0), True)])
def test_equal_constants_beside_neurons_are_free(labels, constant, fixed):
    value = labels.parameter((2,))
    [array] = concatenate(labels, [value, Value((3,), (), constant)], 0).arrays
    assert labels.elements.are_fixed(array.numpy()).tolist() == [False] * 2 + [fixed] * 3


def test_neurons_beside_an_image_stay_free(labels):
    value = labels.parameter((2,))
    [array] = concatenate(labels, [value, Value((3,))], 0).arrays
    assert labels.elements.are_fixed(array.numpy()).tolist() == [False] * 2 + [True] * 3
