"""The operations that a stored network may use: all there is to execute in a file that comes from anyone.

An operation is added here if it returns what its arguments say and nothing else: it writes into none of them, reads
neither files nor memory beyond its arguments, and calls no code of the user. `batch_norm` and `instance_norm`, which
update running statistics in training mode, are no exception: those are tensors of the network.
"""

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

_UNARY = (
    *("abs", "ceil", "cos", "erf", "exp", "expm1", "floor", "log", "log10", "log1p", "log2", "logical_not", "neg"),
    *("positive", "reciprocal", "round", "rsqrt", "sigmoid", "sign", "sin", "sqrt", "square", "tan", "tanh", "trunc"),
    *("acos", "asin", "atan", "cosh", "sinh", "isnan", "isinf", "isfinite"),
)
_ACTIVATIONS = (
    *("celu", "elu", "gelu", "hardshrink", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid"),
    *("mish", "prelu", "relu", "relu6", "rrelu", "selu", "silu", "softplus", "softshrink", "threshold", "glu"),
    *("clamp", "clamp_max", "clamp_min"),
)
_BINARY = (
    *("add.Tensor", "add.Scalar", "sub.Tensor", "sub.Scalar", "mul.Tensor", "mul.Scalar", "div.Tensor", "div.Scalar"),
    *("div.Tensor_mode", "div.Scalar_mode", "rsub.Tensor", "rsub.Scalar", "floor_divide", "floor_divide.Scalar"),
    *("pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "remainder.Tensor", "remainder.Scalar", "maximum"),
    *("minimum", "max.other", "min.other", "atan2", "lerp.Scalar", "lerp.Tensor", "addcmul", "addcdiv"),
    *(f"{name}.{kind}" for name in ("eq", "ne", "lt", "le", "gt", "ge") for kind in ("Tensor", "Scalar")),
    *("logical_and", "logical_or", "logical_xor", "bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_not"),
    *("where.self", "where.ScalarSelf", "where.ScalarOther", "where.Scalar", "masked_fill.Scalar"),
    *("masked_fill.Tensor", "clamp.Tensor", "clamp_min.Tensor", "clamp_max.Tensor"),
)
_REDUCTIONS = (
    *("sum", "sum.dim_IntList", "mean", "mean.dim", "amax", "amin", "max", "max.dim", "min", "min.dim", "prod"),
    *("prod.dim_int", "var", "var.dim", "var.correction", "std", "std.dim", "std.correction", "var_mean"),
    *("var_mean.dim", "var_mean.correction", "std_mean.correction", "norm.Scalar", "norm.ScalarOpt_dim"),
    *("linalg_vector_norm", "logsumexp", "softmax.int", "log_softmax.int", "_softmax", "_log_softmax", "cumsum"),
    *("cumprod", "any", "any.dim", "all", "all.dim", "argmax", "argmin", "topk", "sort", "argsort"),
)
_MATRICES = (
    *("linear", "bilinear", "matmul", "mm", "bmm", "addmm", "addbmm", "baddbmm", "mv", "dot", "einsum", "outer"),
    *("scaled_dot_product_attention", "tensordot", "embedding", "one_hot", "cosine_similarity", "cdist"),
    *("conv1d", "conv1d.padding", "conv2d", "conv2d.padding", "conv3d", "conv3d.padding", "convolution"),
    *("conv_transpose1d", "conv_transpose2d.input", "conv_transpose3d.input"),
)
_NORMS = ("batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm")
_RECURRENT = ("lstm.input", "gru.input")
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout")
_POOLING = (
    *(f"{name}{dims}d" for name in ("avg_pool", "max_pool", "adaptive_avg_pool") for dims in (1, 2, 3)),
    *(f"adaptive_max_pool{dims}d" for dims in (1, 2, 3)),
    *("max_pool1d_with_indices", "max_pool2d_with_indices", "max_pool3d_with_indices"),
    *(f"upsample_{name}.vec" for name in ("nearest1d", "nearest2d", "linear1d", "bilinear2d", "bicubic2d")),
    *("_upsample_bilinear2d_aa.vec", "_upsample_bicubic2d_aa.vec", "_upsample_nearest_exact2d.vec"),
    *("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_nearest3d.vec"),
    *("grid_sampler", "affine_grid_generator", "im2col", "col2im"),
)
_MOVES = (
    *("reshape", "permute", "transpose.int", "t", "unsqueeze", "squeeze", "squeeze.dim", "squeeze.dims", "expand"),
    *("expand_as", "view_as", "reshape_as", "flatten.using_ints", "unflatten.int", "select.int", "slice.Tensor"),
    *("narrow", "split.Tensor", "split.sizes", "split_with_sizes", "chunk", "tensor_split.sections", "unbind.int"),
    *("cat", "concat", "stack", "hstack", "vstack", "repeat", "repeat_interleave.self_int", "tile", "roll", "flip"),
    *("movedim.int", "movedim.intlist", "swapaxes", "moveaxis.int", "moveaxis.intlist", "rot90", "pixel_shuffle"),
    *("pixel_unshuffle", "channel_shuffle", "native_channel_shuffle", "pad", "constant_pad_nd", "reflection_pad1d"),
    *("reflection_pad2d", "replication_pad1d", "replication_pad2d", "index.Tensor", "index_select", "gather"),
    *("take_along_dim", "tril", "triu", "diagonal", "slice_scatter", "select_scatter", "index_put", "broadcast_to"),
    *("broadcast_tensors", "meshgrid", "meshgrid.indexing", "unfold", "adjoint", "mT", "numpy_T"),
)
_COPIES = (
    *(
        "copy",
        "zero",
        "clone",
        "contiguous",
        "detach",
        "alias",
        "to.dtype",
        "to.device",
        "to.dtype_layout",
        "to.other",
        "type_as",
    ),
    *("_to_copy", "lift_fresh_copy", "zeros_like", "ones_like", "full_like", "sym_size.int", "sym_numel"),
)
#: The operations that make a tensor of a size that their arguments say.
CREATIONS = frozenset(
    f"aten.{name if '.' in name else name + '.default'}"
    for name in (
        *("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"),
        *("arange", "arange.start", "arange.start_step"),
    )
)
#: The operations of ATen, with their overloads, that may be stored and are executed when a file is loaded.
OPERATIONS = CREATIONS | frozenset(
    f"aten.{name if '.' in name else name + '.default'}"
    for table in (
        (_UNARY, _ACTIVATIONS, _BINARY, _REDUCTIONS, _MATRICES, _NORMS, _RECURRENT, _DROPOUTS)
        + (_POOLING, _MOVES, _COPIES)
    )
    for name in table
)
#: The place of the argument that tells training from evaluation.
TRAINING = {
    "aten.batch_norm.default": 5,
    "aten.instance_norm.default": 5,
    "aten.dropout.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.alpha_dropout.default": 2,
    "aten.feature_alpha_dropout.default": 2,
    "aten.native_dropout.default": 2,
    "aten.rrelu.default": 3,
    "aten.lstm.input": 6,
    "aten.gru.input": 6,
}
_LARGEST = 2**63


def _on_sizes(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """An operator of Python that takes nothing but numbers, and gives none that only a forged graph can ask for."""

    def compute(first: Any, second: Any) -> Any:
        for number in (first, second):
            if not isinstance(number, int | float | torch.SymInt | torch.SymFloat):
                raise TypeError(f"arithmetic on sizes takes numbers, not {type(number).__name__}")
        result = function(first, second)
        if type(result) is int and abs(result) >= _LARGEST:
            raise OverflowError("a size exceeds 64 bits")
        return result

    return compute


_ARITHMETIC = ("add", "sub", "mul", "floordiv", "truediv")
#: The functions of Python that may be stored: arithmetic on sizes, and parts of what an operation returns.
FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "getitem": operator.getitem,
    **{name: _on_sizes(getattr(operator, name)) for name in _ARITHMETIC},
}
#: Their names by what a graph calls.
NAMES = {operator.getitem: "getitem", **{getattr(operator, name): name for name in _ARITHMETIC}}


def overload_of(name: str) -> Any:
    """The operation of PyTorch by a name in `OPERATIONS`; None for another name, or if this PyTorch lacks it."""
    if name not in OPERATIONS:
        return None
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet, None), overload, None)
