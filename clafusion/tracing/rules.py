"""Rules: what each operation does to labels, by its name."""

import re
from collections.abc import Iterable

import torch
from torch import Tensor

from clafusion.errors import FusionError
from clafusion.tracing import contractions
from clafusion.tracing.calls import Call, Result, Rule
from clafusion.tracing.joining import concatenate
from clafusion.tracing.labels import Labels, Value


def elementwise(labels: Labels, call: Call) -> Result:
    """Each entry of the result depends on the entries of the tensors at its place."""
    tensors = call.tensors
    return labels.merge(*tensors) if len(tensors) > 1 else tensors[0]


def unchanged(labels: Labels, call: Call) -> Result:
    """The first tensor; what else it is given says nothing about neurons."""
    return call.input


def reduction(labels: Labels, call: Call) -> Result:
    """Symmetric along `dim` (all dimensions by default), and without it afterwards: a sum, a mean, a norm."""
    x, dims = call.input, call["dim"]
    if dims is None or dims == []:
        dims = range(len(x.shape))
    keepdim = len(call.shape) == len(x.shape)
    result = labels.reduce(x, [dims] if isinstance(dims, int) else dims, keepdim=keepdim)
    return [result] * len(call.shapes) if call.several else result


def extreme(labels: Labels, call: Call) -> Result:
    """The largest or smallest entry; where along `dim` it is, is an order."""
    if len(call.tensors) > 1:
        return elementwise(labels, call)
    if call.several:
        labels.pin(call.input, [call["dim"]])
    return reduction(labels, call)


def ordered(labels: Labels, call: Call) -> Result:
    """Along `dim` (all dimensions if it has none) the order of the entries counts: a cumulative sum."""
    dim = call["dim"]
    result = labels.pin(call.input, None if dim is None else [dim])
    return [result] * len(call.shapes) if call.several else result


def positions(labels: Labels, call: Call) -> Result:
    """Neighbours are combined along the last dimensions, each channel for itself: pooling and interpolation."""
    x = call.input
    found = re.search(r"(\d)d", call.name)
    count = int(found[1]) if found else len(x.shape) - 2
    last = set(range(len(x.shape) - count, len(x.shape)))
    if call.name.startswith("adaptive") and all(size == 1 for size in call.shape[-count:]) and not call.several:
        return labels.reduce(x, last)
    x = labels.per_channel(x, last)
    result = [Value(shape, x.arrays) for shape in call.shapes]
    return result if call.several else result[0]


def sampled(labels: Labels, call: Call) -> Result:
    """`grid_sampler`: the second input gives positions."""
    for other in call.tensors[1:]:
        labels.pin(other)
    x = labels.per_channel(call.input, range(2, len(call.input.shape)))
    return Value(call.shape, x.arrays)


def reshaped(labels: Labels, call: Call) -> Result:
    """The entries in the same order under another shape."""
    return labels.reshape(call.input, call.shape)


def spread(labels: Labels, call: Call) -> Result:
    """Broadcast to a shape."""
    x = call.input
    more = len(call.shape) - len(x.shape)
    arrays = tuple(array.reshape((1,) * more + tuple(array.shape)) for array in x.arrays)
    long = {dim + more for dim, size in enumerate(x.shape) if size > 1 and dim not in x.same}
    return labels.tidy(Value(call.shape, arrays, None, frozenset(range(len(call.shape))) - long))


def moved(labels: Labels, call: Call) -> Result:
    """The entries elsewhere, or some of them, or some of them several times."""
    return _moved(labels, call, None)


def moved_as_they_are(labels: Labels, call: Call) -> Result:
    """Moved, whatever the sizes are: a permutation of the dimensions, a roll."""
    return _moved(labels, call, ())


def moved_along(labels: Labels, call: Call) -> Result:
    """Moved along one dimension: a slice, a split."""
    return _moved(labels, call, (call["dim"] or 0,))


def _moved(labels: Labels, call: Call, dims: Iterable[int] | None) -> Result:
    x = call.input
    if not call.several:
        return labels.move(x, call.shape, call.run, dims) if x.arrays else Value(call.shape)
    if not x.arrays:
        return [Value(shape) for shape in call.shapes]

    def part(number: int, shape: tuple[int, ...]) -> Value:
        def cut(array: Tensor) -> Tensor:
            taken = call.run(array)[number]
            assert isinstance(taken, Tensor)
            return taken

        return labels.move(x, shape, cut, dims)

    return [part(number, shape) for number, shape in enumerate(call.shapes)]


def shuffled(labels: Labels, call: Call) -> Result:
    """Channels and positions exchanged: `pixel_shuffle`."""
    return _moved(labels, call, range(1, len(call.input.shape)))


def indexed(labels: Labels, call: Call) -> Result:
    """Entries taken by constant indices."""
    indices = call["indices"]
    if any(index is not None and index.constant is None for index in indices):
        raise call.refusal("by indices that depend on the data")
    if any(index is not None and index.constant.dtype == torch.bool for index in indices):
        return _moved(labels, call, None)
    return _moved(labels, call, [dim for dim, index in enumerate(indices) if index is not None])


def selected(labels: Labels, call: Call) -> Result:
    """Entries along one dimension, taken by constant indices."""
    if call["index"].constant is None:
        raise call.refusal("by indices that depend on the data")
    return _moved(labels, call, None if call.name == "gather" else (call["dim"],))


def embedding(labels: Labels, call: Call) -> Result:
    """Rows of a table: their order is that of the indices."""
    table, indices = call["weight"], call["indices"]
    if indices.constant is not None:
        return labels.move(table, call.shape, lambda array: array[indices.constant], [0])
    table = labels.pin(table, [0])
    columns = labels.drop(labels.reduce(table, [0]), [0])
    return Value(call.shape, tuple(a.reshape(*(1,) * (len(call.shape) - 1), -1) for a in columns.arrays))


def joined(labels: Labels, call: Call) -> Result:
    """One after the other along a dimension."""
    return concatenate(labels, call["tensors"], call["dim"] or 0)


def stacked(labels: Labels, call: Call) -> Result:
    """One after the other along a new dimension."""
    dim = (call["dim"] or 0) % len(call.shape)
    values = [contractions.unsqueezed(labels, value, dim) for value in call["tensors"]]
    return concatenate(labels, values, dim)


def padded(labels: Labels, call: Call) -> Result:
    """A constant put around the entries; beside neurons it is neurons that are never written."""
    x, pads = call.input, list(call["pad"])
    if call["mode"] not in (None, "constant"):
        return edges(labels, call)
    rank = len(x.shape)
    for place, (before, after) in enumerate(zip(pads[::2], pads[1::2], strict=True)):
        dim = rank - 1 - place
        x = _padded_along(labels, x, dim, before, after)
    return x


def _padded_along(labels: Labels, x: Value, dim: int, before: int, after: int) -> Value:
    if before < 0 or after < 0:
        start, length = max(-before, 0), x.shape[dim] - max(-before, 0) - max(-after, 0)
        shape = (*x.shape[:dim], length, *x.shape[dim + 1 :])
        x = labels.move(x, shape, lambda array: array.narrow(dim, start, length), [dim])
    pieces = [_zeros((*x.shape[:dim], max(size, 0), *x.shape[dim + 1 :])) for size in (before, after)]
    return concatenate(labels, [one for one in (pieces[0], x, pieces[1]) if one.shape[dim]], dim)


def edges(labels: Labels, call: Call) -> Result:
    """Entries put around others come from the edges: the order of the positions counts."""
    x = call.input
    fixed = [dim for dim, size in enumerate(call.shape) if size != x.shape[dim]]
    x = labels.per_channel(x, fixed)
    return Value(call.shape, x.arrays)


def scattered(labels: Labels, call: Call) -> Result:
    """A slice replaced by another tensor: what is before it, the tensor, and what is after it."""
    x, source, dim = call["self"], call["src"], call["dim"] or 0
    length = x.shape[dim]
    if call.name == "select_scatter":
        start, end, step = call["index"] % length, call["index"] % length + 1, 1
        source = contractions.unsqueezed(labels, source, dim) if source.constant is None else _unsqueezed(source, dim)
    else:
        start, end, step = slice(call["start"], call["end"], call["step"]).indices(length)
    if step != 1:
        raise call.refusal("with a step")

    def part(first: int, last: int) -> Value:
        shape = (*x.shape[:dim], last - first, *x.shape[dim + 1 :])
        return labels.move(x, shape, lambda array: array.narrow(dim, first, last - first), [dim])

    end = max(end, start)
    before, after = ([part(*ends)] if ends[0] < ends[1] else [] for ends in ((0, start), (end, length)))
    return concatenate(labels, [*before, *([source] if source.shape[dim] else []), *after], dim)


def _unsqueezed(value: Value, dim: int) -> Value:
    assert value.constant is not None
    constant = value.constant.unsqueeze(dim)
    return Value(tuple(constant.shape), (), constant)


def unfolded(labels: Labels, call: Call) -> Result:
    """`im2col`: the windows of an image as columns; every channel once for each place in the window."""
    x = labels.per_channel(call.input, [-1, -2])
    turns = call.shape[1] // x.shape[1]
    return labels.move(
        labels.drop(x, [2, 3]),
        call.shape,
        lambda array: array.repeat_interleave(turns, 1).unsqueeze(2),
        [1],
    )


def folded(labels: Labels, call: Call) -> Result:
    """`col2im`: overlapping windows, summed."""
    x = call.input
    places = (x.shape[0], call.shape[1], x.shape[1] // call.shape[1], x.shape[2])
    x = labels.per_channel(labels.reshape(x, places), [2, 3])
    return labels.tidy(Value(call.shape, x.arrays))


def masked(labels: Labels, call: Call) -> Result:
    """A triangle of every matrix: rows and columns have an order."""
    return labels.pin(call.input, [-1, -2])


def filled(labels: Labels, call: Call) -> Result:
    """A result that takes nothing of a tensor but its shape."""
    constant = call.run(torch.zeros((), dtype=call.dtype).expand(call.input.shape))
    return Value(call.shape, (), constant)


def _zeros(shape: tuple[int, ...]) -> Value:
    return Value(shape, (), torch.zeros(()).expand(shape))


def copied(labels: Labels, call: Call) -> Result:
    """The second tensor in the shape of the first."""
    source = call["src"]
    return source if source.shape == call.shape else labels.tidy(labels.merge(Value((1,) * len(call.shape)), source))


def _table(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


_RULES: dict[str, Rule] = {
    **_table(
        elementwise,
        """relu relu6 gelu silu sigmoid tanh hardtanh hardswish hardsigmoid elu selu celu leaky_relu rrelu softplus
        softsign mish logsigmoid log_sigmoid threshold hardshrink softshrink tanhshrink exp exp2 expm1 log log2 log10
        log1p neg negative positive sqrt rsqrt abs absolute square sign sgn sin cos tan asin acos atan sinh cosh asinh
        acosh atanh erf erfc erfinv reciprocal floor ceil round trunc frac clamp clamp_min clamp_max clip pow
        float_power logit sigmoid_backward nan_to_num isnan isinf isfinite logical_not bitwise_not dropout
        feature_dropout alpha_dropout feature_alpha_dropout i0 sinc digamma lgamma polygamma add sub subtract rsub mul
        multiply div divide true_divide floor_divide fmod remainder maximum minimum fmax fmin where addcmul addcdiv
        lerp atan2 arctan2 hypot logaddexp logaddexp2 xlogy eq ne lt le gt ge equal not_equal less greater masked_fill
        logical_and logical_or logical_xor bitwise_and bitwise_or bitwise_xor heaviside copysign isclose""",
    ),
    **_table(
        unchanged,
        "to _to_copy type_as float double half bfloat16 contiguous clone alias detach lift_fresh lift_fresh_copy",
    ),
    **_table(
        reduction,
        """mean sum nansum nanmean amax amin prod var std var_mean std_mean logsumexp norm linalg_vector_norm
        frobenius_norm all any count_nonzero""",
    ),
    **_table(extreme, "max min aminmax"),
    **_table(ordered, "cumsum cumprod cummax cummin logcumsumexp diff"),
    **_table(
        positions,
        """max_pool1d max_pool2d max_pool3d max_pool2d_with_indices max_pool1d_with_indices max_pool3d_with_indices
        avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
        adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d
        upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d _upsample_nearest_exact3d
        upsample_linear1d upsample_bilinear2d upsample_bicubic2d upsample_trilinear3d _upsample_bilinear2d_aa
        _upsample_bicubic2d_aa""",
    ),
    **_table(sampled, "grid_sampler grid_sampler_2d grid_sampler_3d"),
    **_table(
        reshaped,
        "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as ravel atleast_1d atleast_2d",
    ),
    **_table(spread, "expand expand_as broadcast_to"),
    **_table(moved, "unfold diagonal repeat tile rot90"),
    **_table(
        moved_as_they_are,
        "permute transpose t numpy_T swapaxes swapdims movedim moveaxis adjoint mT T roll flip fliplr flipud",
    ),
    **_table(
        moved_along,
        "slice select narrow split split_with_sizes chunk unbind unsafe_chunk unsafe_split tensor_split",
    ),
    **_table(shuffled, "pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle repeat_interleave"),
    **_table(indexed, "index"),
    **_table(selected, "index_select gather"),
    **_table(embedding, "embedding"),
    **_table(joined, "cat concat concatenate"),
    **_table(stacked, "stack"),
    **_table(padded, "constant_pad_nd pad"),
    **_table(
        edges,
        "reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d",
    ),
    **_table(scattered, "slice_scatter select_scatter"),
    **_table(unfolded, "im2col"),
    **_table(folded, "col2im"),
    **_table(masked, "tril triu"),
    **_table(filled, "zeros_like ones_like full_like new_zeros new_ones new_full zero fill"),
    **_table(copied, "copy"),
    **_table(contractions.linear, "linear"),
    **_table(contractions.matmul, "matmul mm bmm mv dot inner_product"),
    **_table(contractions.addmm, "addmm baddbmm addmv"),
    **_table(contractions.attention, "scaled_dot_product_attention"),
    **_table(contractions.einsum, "einsum"),
    **_table(
        contractions.convolution,
        "conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d",
    ),
    **_table(contractions.softmax, "softmax log_softmax _softmax _log_softmax softmin"),
    **_table(contractions.layer_norm, "layer_norm rms_norm"),
    **_table(contractions.batch_norm, "batch_norm instance_norm"),
    **_table(contractions.group_norm, "group_norm"),
    **_table(contractions.weight_norm, "_weight_norm _weight_norm_interface"),
    **_table(contractions.prelu, "prelu"),
    **_table(contractions.glu, "glu"),
    **_table(contractions.similarity, "cosine_similarity"),
    **_table(contractions.distances, "cdist"),
}
_REGISTERED: dict[str, Rule] = {}


def register_operation(name: str, rule: Rule) -> None:
    """Say how an operation that fusion does not know, such as one of your own, treats neurons.

    Args:
        name: `my_namespace::my_op`, or `aten::foo` for one of PyTorch's own.
        rule: from the labels of its tensors to those of its result: one of `clafusion.tracing.rules`, such as
            `elementwise` or `reduction`, or a function of your own of the primitives `labels.move`, `merge`, `reduce`
            and `pin`. A rule that does not describe the operation makes the fused network a wrong one.

    Raises:
        FusionError: if the name has no namespace.

    Example:
        >>> import torch
        >>> from clafusion.tracing.rules import elementwise, register_operation
        >>> @torch.library.custom_op("docs::wave", mutates_args=())
        ... def wave(x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        ...     return torch.sin(x) + shift
        >>> _ = wave.register_fake(lambda x, shift: torch.empty_like(x))
        >>> register_operation("docs::wave", elementwise)
    """
    namespace, _, operation = name.partition("::")
    if not operation:
        raise FusionError(f'Expected a name such as "my_namespace::my_op", got "{name}"; put its namespace before it')
    _REGISTERED[operation if namespace == "aten" else name] = rule


def rule_of(call: Call) -> Rule:
    """The rule of an operation; what was registered comes first.

    Raises:
        FusionError: if there is none.
    """
    rule = _REGISTERED.get(call.name) or _RULES.get(call.name)
    if rule is None:
        raise call.refusal()
    return rule
