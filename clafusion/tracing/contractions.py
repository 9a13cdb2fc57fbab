"""Rules of the operations that sum products (linear, convolution, attention) and of norms."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from clafusion.tracing.calls import Call, Result
from clafusion.tracing.labels import Labels, Value


def normalised(labels: Labels, value: Value, dims: Iterable[int]) -> Value:
    """A value divided by something that is symmetric along `dims`, such as a sum over them."""
    labels.reduce(value, dims)  # puts elements in blocks
    return labels.tidy(value)


def contracted(labels: Labels, one: Value, other: Value) -> Value:
    """The sum of products over the last dimension of what two values broadcast to."""
    return labels.reduce(labels.merge(one, other), [-1], keepdim=False)


def unsqueezed(labels: Labels, value: Value, dim: int) -> Value:
    """A value with a dimension of size 1 put before `dim`."""
    dim %= len(value.shape) + 1
    return labels.reshape(value, (*value.shape[:dim], 1, *value.shape[dim:]))


def along(labels: Labels, value: Value, dim: int, rank: int) -> Value:
    """A vector as a tensor of a rank, along one of its dimensions."""
    return labels.reshape(value, [value.shape[0] if one == dim else 1 for one in range(rank)])


def transposed(labels: Labels, value: Value) -> Value:
    """A value with its last two dimensions swapped."""
    rank = len(value.shape)
    return labels.permute(value, [*range(rank - 2), rank - 1, rank - 2])


def product(labels: Labels, one: Value, other: Value) -> Value:
    """The matrix product, with the dimensions of `torch.matmul`."""
    vectors = [len(value.shape) == 1 for value in (one, other)]
    left = unsqueezed(labels, one, 0) if vectors[0] else one
    right = unsqueezed(labels, other, 1) if vectors[1] else other
    result = contracted(
        labels, unsqueezed(labels, left, -2), unsqueezed(labels, transposed(labels, right), len(right.shape) - 2)
    )
    gone = [dim for dim, vector in zip((-2, -1), vectors, strict=True) if vector]
    return labels.drop(result, gone) if gone else result


def linear(labels: Labels, call: Call) -> Result:
    """`input @ weight.T + bias`."""
    result = contracted(labels, unsqueezed(labels, call["input"], -2), call["weight"])
    return labels.merge(result, call["bias"]) if call["bias"] is not None else result


def matmul(labels: Labels, call: Call) -> Result:
    """The product of two matrices, or batches of them."""
    return product(labels, *call.tensors[:2])


def addmm(labels: Labels, call: Call) -> Result:
    """A tensor plus the product of two matrices."""
    return labels.merge(call.tensors[0], product(labels, *call.tensors[1:3]))


def attention(labels: Labels, call: Call) -> Result:
    """Scaled dot product attention."""
    query, key, value = call["query"], call["key"], call["value"]
    if call["is_causal"]:
        query, key, value = (labels.pin(one, [-2]) for one in (query, key, value))
    mask = call["attn_mask"]
    if call["enable_gqa"]:
        turns = query.shape[-3] // key.shape[-3]
        key, value = (_repeated(labels, one, turns) for one in (key, value))
    scores = product(labels, query, transposed(labels, key))
    if mask is not None:
        scores = labels.merge(scores, mask)
    return product(labels, normalised(labels, scores, [-1]), value)


def _repeated(labels: Labels, value: Value, turns: int) -> Value:
    """Every head several times."""
    shape = (*value.shape[:-3], value.shape[-3] * turns, *value.shape[-2:])
    return labels.move(value, shape, lambda array: array.repeat_interleave(turns, -3), [-3])


def einsum(labels: Labels, call: Call) -> Result:
    """`torch.einsum`: the operands side by side, summed over the letters that the result does not have."""
    equation, operands = str(call["equation"]).replace(" ", ""), call["tensors"]
    inputs, arrow, output = equation.partition("->")
    terms = inputs.split(",")
    if "." in equation or any(len(set(term)) < len(term) for term in terms):
        raise call.refusal("with an ellipsis or a diagonal")
    if not arrow:
        letters = inputs.replace(",", "")
        output = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    summed = [letter for letter in dict.fromkeys(inputs.replace(",", "")) if letter not in output]
    order = [*output, *summed]
    spread = [_spread(labels, value, term, order) for value, term in zip(operands, terms, strict=True)]
    result = labels.merge(*spread)
    return labels.reduce(result, range(len(output), len(order)), keepdim=False) if summed else result


def _spread(labels: Labels, value: Value, term: str, order: Sequence[str]) -> Value:
    """An operand with a dimension for every letter."""
    value = labels.permute(value, sorted(range(len(term)), key=lambda dim: order.index(term[dim])))
    sizes = iter(value.shape)
    return labels.reshape(value, [next(sizes) if letter in term else 1 for letter in order])


def convolution(labels: Labels, call: Call) -> Result:
    """A convolution of any rank: a linear map of the channels of each group, at fixed positions."""
    x, weight, bias, groups = call["input"], call["weight"], call["bias"], call["groups"]
    kernel = len(weight.shape) - 2
    weight = _without_positions(labels, weight, kernel)
    if call["transposed"] or "transpose" in call.name:
        if groups > 1 and weight.shape[1] > 1:
            raise call.refusal("with several output channels per group")
        weight = labels.reshape(weight, (groups, weight.shape[0] // groups, weight.shape[1]))
        weight = transposed(labels, weight)
    else:
        weight = labels.reshape(weight, (groups, weight.shape[0] // groups, weight.shape[1]))
    x = _without_positions(labels, x, kernel)
    x = labels.reshape(x, (*x.shape[:-1], groups, 1, x.shape[-1] // groups))
    result = contracted(labels, x, weight)
    result = labels.reshape(result, (*result.shape[:-2], weight.shape[0] * weight.shape[1]))
    if bias is not None:
        result = labels.merge(result, bias)
    return Value(call.shape, tuple(array.reshape(*array.shape, *(1,) * kernel) for array in result.arrays))


def _without_positions(labels: Labels, value: Value, count: int) -> Value:
    """A value without its last dimensions, whose order is fixed."""
    rank = len(value.shape)
    last = range(rank - count, rank)
    if value.constant is not None:  # which kernels are equal
        kernels = value.constant.reshape(-1, value.constant[0, 0].numel())
        same = torch.unique(kernels, dim=0, return_inverse=True)[1].reshape(value.shape[: rank - count])
        return Value(value.shape[: rank - count], (), same)
    return labels.drop(labels.per_channel(value, last), last)


def softmax(labels: Labels, call: Call) -> Result:
    """Anything that is normalised along `dim`."""
    return normalised(labels, call.input, [call["dim"]])


def layer_norm(labels: Labels, call: Call) -> Result:
    """Normalised along the last dimensions, then scaled and shifted."""
    value = normalised(labels, call["input"], range(-len(call["normalized_shape"]), 0))
    return labels.merge(value, *(one for one in (call["weight"], call["bias"]) if one is not None))


def batch_norm(labels: Labels, call: Call) -> Result:
    """Scaled and shifted per channel, by the statistics of the batch or stored ones."""
    x, live = call["input"], call["training"] or call["use_input_stats"]
    rank = len(x.shape)
    if live:
        first = 2 if call["use_input_stats"] else 0
        x = normalised(labels, x, [dim for dim in range(first, rank) if dim != 1])
    stored = () if live else (call["running_mean"], call["running_var"])
    vectors = [one for one in (call["weight"], call["bias"], *stored) if one is not None]
    return labels.merge(x, *(along(labels, one, 1, rank) for one in vectors))


def group_norm(labels: Labels, call: Call) -> Result:
    """Normalised over the channels of each group, and the positions."""
    x, groups = call["input"], call["num_groups"]
    grouped = labels.reshape(x, (x.shape[0], groups, x.shape[1] // groups, *x.shape[2:]))
    x = labels.reshape(normalised(labels, grouped, range(2, len(grouped.shape))), x.shape)
    vectors = [one for one in (call["weight"], call["bias"]) if one is not None]
    return labels.merge(x, *(along(labels, one, 1, len(x.shape)) for one in vectors))


def weight_norm(labels: Labels, call: Call) -> Result:
    """A weight with the norms `g`: `v * g / norm(v)`."""
    v, g, kept = call["v"], call["g"], call["dim"]
    dims = [dim for dim in range(len(v.shape)) if dim != kept]
    result = labels.merge(normalised(labels, v, dims), g)
    return [result, g] if call.several else result


def prelu(labels: Labels, call: Call) -> Result:
    """ReLU with a slope per channel."""
    x, weight = call["self"], call["weight"]
    return labels.merge(x, along(labels, weight, 1 if len(x.shape) > 1 else 0, max(len(x.shape), 1)))


def glu(labels: Labels, call: Call) -> Result:
    """One half times a function of the other."""
    x, dim = call["self"], call["dim"]
    half = x.shape[dim] // 2
    shape = call.shape

    def part(start: int) -> Value:
        def cut(array: Tensor) -> Tensor:
            return array.narrow(dim, start, half)

        return labels.move(x, shape, cut, [dim])

    return labels.merge(part(0), part(half))


def similarity(labels: Labels, call: Call) -> Result:
    """`cosine_similarity`: the products of two tensors, summed along `dim`."""
    merged = labels.merge(call["x1"], call["x2"])
    return labels.reduce(merged, [call["dim"]], keepdim=False)


def distances(labels: Labels, call: Call) -> Result:
    """`cdist`: distances between all rows of two matrices."""
    return product(labels, call["x1"], transposed(labels, call["x2"]))
