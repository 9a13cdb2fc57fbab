"""The signature of a part of a graph: what it does, without the widths of what it does it to."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx

from clafusion.tracing.exporting import Capture, operation_of

#: Operations of which the arguments that are numbers and words belong to the function (not to a width), by position.
_CONSTANTS: Mapping[str, Sequence[int]] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), (3, 4, 5)),
    **dict.fromkeys(("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d"), range(1, 6)),
    **dict.fromkeys(("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d"), (1,)),
    **dict.fromkeys(
        ("leaky_relu", "elu", "celu", "hardtanh", "clamp", "clamp_min", "clamp_max", "softplus"), (1, 2, 3)
    ),
    **dict.fromkeys(
        ("permute", "transpose", "softmax", "log_softmax", "mean", "sum", "amax", "roll", "select"), (1, 2)
    ),
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div", "pow"), (1, 2)),
    **dict.fromkeys(("cat", "stack", "unsqueeze", "squeeze", "glu", "pixel_shuffle", "pixel_unshuffle"), (1,)),
    "gelu": (),
    "batch_norm": (7,),
    "layer_norm": (4,),
    "group_norm": (4,),
    # Not by how much: that may depend on the size of the images that a network was made for.
    "pad": (2, 3),
    "constant_pad_nd": (2,),
    "upsample_nearest2d": (2, 3),
}
#: Operations that in eval mode give their input.
TRANSPARENT = frozenset(
    ("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "native_dropout", "contiguous", "clone")
    + ("alias", "detach", "lift_fresh_copy")
)
_ATTENTION = frozenset(("softmax", "scaled_dot_product_attention"))
#: A signature: per operation its name, its constants and where its operands come from.
Signature = tuple[tuple[Any, ...], ...]


def source_of(node: fx.Node) -> fx.Node:
    """The node whose output a node gives: itself, or behind operations that give their input theirs."""
    while operation_of(node) in TRANSPARENT:
        node = node.all_input_nodes[0]
    return node


def signature_of(nodes: Sequence[fx.Node], capture: Capture) -> Signature:
    """The doings of a sequence of operations: equal for parts that differ only in their widths.

    The scale of attention scores follows from the head size, and so is not compared; nor are operations that give their
    input, which `nodes` must not contain.
    """
    places = {node: number for number, node in enumerate(nodes)}
    attention = any(operation_of(node) in _ATTENTION for node in nodes)

    def operand(used: fx.Node) -> Any:
        used = source_of(used)
        if used in places:
            return places[used] - places[node]
        return "parameter" if used.name in capture.names else "input"

    parts = []
    for node in nodes:
        name = operation_of(node)
        constants = [node.args[at] for at in _CONSTANTS.get(name, ()) if at < len(node.args)]
        scales = attention and name in ("mul", "div")
        plain = tuple("scale" if scales and isinstance(one, float) else one for one in map(_plain, constants))
        words = () if scales else tuple((key, value) for key, value in node.kwargs.items() if isinstance(value, str))
        parts.append((name, *plain, *words, *_geometry(node), *(operand(used) for used in node.all_input_nodes)))
    return tuple(parts)


def _plain(value: Any) -> Any:
    """A constant argument, as a value that can be compared; operands are compared elsewhere."""
    if isinstance(value, list | tuple):
        return tuple(_plain(one) for one in value)
    return None if isinstance(value, fx.Node) else value


def _geometry(node: fx.Node) -> tuple[Any, ...]:
    """Kernel size and kind of grouping of a convolution."""
    if not operation_of(node).startswith("conv"):
        return ()
    shape = node.args[1].meta["shape"]  # type: ignore[union-attr]
    groups = node.args[6] if len(node.args) > 6 else 1
    kind = "dense" if groups == 1 else "depthwise" if shape[1] == 1 else "grouped"
    return (*shape[2:], kind)


def in_words(part: Sequence[Any] | None) -> str:
    """One operation of a signature as a message shows it."""
    if part is None:
        return "nothing"
    constants = [str(one) for one in part[1:] if not isinstance(one, str) and one is not None and one != ()]
    name = f"{part[0]}({', '.join(constants[:3])})" if part[0].startswith(("conv", "max", "avg")) else str(part[0])
    return f"{name} without bias" if part[0].startswith(("conv", "linear")) and part.count("parameter") == 1 else name


def first_difference(one: Signature, other: Signature) -> tuple[str, str]:
    """The first operations at which two parts differ."""
    for a, b in zip(one, other, strict=False):
        if a != b:
            return in_words(a), in_words(b)
    shorter = min(len(one), len(other))
    return in_words((*one, None)[shorter]), in_words((*other, None)[shorter])
