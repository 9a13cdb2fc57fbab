"""Networks as graphs of ATen operations: exported once, made functional, and compared with the network itself.

`torch.export` runs the network on tensors without data and records the operations, in the *training IR*: a Linear, a
convolution, a norm and attention are one node each. Parameters and buffers are inputs of the graph with the names that
they have in the network, so that the same graph runs on other tensors.
"""

import copy
import inspect
import operator
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.utils import _pytree as pytree

from clafusion.errors import FusionError, first_line
from clafusion.tracing.outputs import logits_in

aten = torch.ops.aten
#: Samples that a network is exported with: others than it is compared with its graph on, so that a graph which holds
#: for so many only is another function there.
SHOWN = 3
#: `torch.export` changes global state while it runs.
_LOCK = threading.Lock()
#: The operations that return their input under another shape: to write into the result is to write into the input.
_VIEWS = frozenset(
    ("view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "select", "slice", "flatten")
    + ("split", "chunk", "unbind", "split_with_sizes", "unflatten", "narrow", "movedim", "view_as", "detach", "alias")
)
#: The views that can be written back: the operation that puts a part into its whole.
_SCATTERS = {"slice": aten.slice_scatter.default, "select": aten.select_scatter.default}
#: The operations that take nothing but the kind of their input, and what they fill a new tensor with.
_FILLED = {"new_zeros": 0, "new_ones": 1, "new_full": 0}
#: The nodes that check and compute nothing.
_CHECKS = frozenset(("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "_assert_async"))


@dataclass(frozen=True)
class Capture:
    """A network as a graph of ATen operations that writes into none of its inputs.

    Attributes:
        graph: its placeholders are the tensors of the network and its input; every other node is a call. Each node
            has `meta["shape"]`, the shape of its tensor for a batch of one sample, or None; and `meta["batch"]`, the
            dimensions whose size depends on the number of samples.
        entry: the name of the placeholder of the input.
        logits: the name of the node that gives the logits.
        names: from the name of a placeholder to the name of its parameter, buffer or constant.
        tensors: parameters, buffers and constants by name; they share the memory of the network.
        parameters: the names of those that are parameters.
        unused: the parameters and buffers of the network that no operation reads.
    """

    graph: fx.Graph = field(repr=False)
    entry: str
    logits: str
    names: Mapping[str, str] = field(repr=False)
    tensors: Mapping[str, Tensor] = field(repr=False)
    parameters: frozenset[str] = field(repr=False)
    unused: tuple[str, ...] = ()

    @property
    def reference(self) -> Tensor:
        """A parameter: its device and dtype are those of the network."""
        return next(tensor for name, tensor in self.tensors.items() if name in self.parameters)


def operation_of(node: fx.Node) -> str:
    """The name of the operation of a node without its overload, such as `conv2d`; empty for a placeholder."""
    if node.op != "call_function":
        return ""
    name = getattr(node.target, "__name__", str(node.target))
    return name.partition(".")[0]


def module_path(node: fx.Node) -> str:
    """The path of the module that a node belongs to, as messages name it; empty at the top of the network."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed([entry[0] for entry in stack.values()]), "")
    return "" if path.startswith("_") else str(path)


def export_graph(model: nn.Module, example: Tensor) -> Capture:
    """Export a network in eval mode, with a batch of any size; nothing is run on data.

    Args:
        model: in eval mode; left as it is.
        example: samples that it accepts, [samples, ...]; it is shown SHOWN of that shape, without data.

    Raises:
        FusionError: if the network takes several inputs, depends on its data in what it does, or cannot be exported.
    """
    _check_signature(model)
    program = _exported(model, torch.cat([example] * SHOWN)[:SHOWN])
    signature, graph = program.graph_signature, program.graph
    parameters = dict(signature.inputs_to_parameters)
    names = {**parameters, **signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}
    state = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    tensors = {name: state[name] if name in state else program.constants[name] for name in names.values()}
    _inline(graph, program.graph_module)
    _fold_constants(graph, parameters, names, tensors)
    _make_functional(graph)
    output = next(node for node in graph.nodes if node.op == "output")
    [logits] = pytree.tree_leaves(output.args)
    output.args = (logits,)
    graph.eliminate_dead_code()
    for node in [node for node in graph.nodes if node.op == "placeholder" and node.name in names and not node.users]:
        graph.erase_node(node)
    names = {node.name: names[node.name] for node in graph.nodes if node.name in names}
    entry = next(node for node in graph.nodes if node.op == "placeholder" and node.name not in names)
    for node in graph.nodes:
        node.meta["shape"], node.meta["batch"] = _shape(node.meta.get("val"))
    _check_batch(model, entry)
    used = set(names.values())
    return Capture(
        graph,
        entry.name,
        logits.name,
        names,
        {name: tensors[name] for name in names.values()},
        frozenset(parameters.values()) & used,
        tuple(name for name in state if name not in used),
    )


def _check_batch(model: nn.Module, entry: fx.Node) -> None:
    """Refuse a graph that holds for as many samples as it was exported with only."""
    samples = entry.meta["val"].shape[0]
    if isinstance(samples, int) or samples.node.maybe_as_int() is not None:
        raise FusionError(
            f"Expected a network that takes any number of samples, got {type(model).__name__}, whose graph would hold "
            f"for {samples} only; write x.shape[0] instead of len(x), and compare it with nothing"
        )


def _check_signature(model: nn.Module) -> None:
    try:
        arguments = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):  # written in C, or compiled
        return
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one.name for one in arguments if one.kind in kinds and one.default is inspect.Parameter.empty]
    if len(needed) > 1:
        raise FusionError(
            f"Expected a network with one input, got {type(model).__name__}, whose forward takes {', '.join(needed)}; "
            "wrap it in a module that fills in the others"
        )


def _exported(model: nn.Module, example: Tensor) -> ExportedProgram:
    network = shell(model)
    forward = network.forward

    @wraps(forward)
    def logits(*inputs: Any) -> Tensor:
        return logits_in(forward(*inputs))

    # Of a result of any other type torch.export would have to be told what is in it.
    network.forward = logits
    try:
        with _LOCK, warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return export(network, (example,), dynamic_shapes=({0: Dim.AUTO},), strict=False)
    except Exception as error:  # torch.export and the network's own code raise many types
        raise FusionError(
            f"Expected a network that torch.export can capture, got {type(model).__name__}: {first_line(error)}"
        ) from error


def shell(model: nn.Module) -> nn.Module:
    """A structural copy in eval mode that shares the tensors of `model` but none of its hooks.

    Running it changes nothing in `model`; what a network stores in eval mode and drops in training mode is dropped.
    """
    return bare(copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}))


def bare(copied: nn.Module) -> nn.Module:
    """A copy of a network that is ours alone, put into eval mode, without its hooks and what it had stored."""
    for module in copied.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            getattr(module, name).clear()
    return copied.train().eval()


def _inline(graph: fx.Graph, module: fx.GraphModule) -> None:
    """Put the operations of nested graphs (`autocast`, `no_grad`) in the place of their calls."""
    for node in list(graph.nodes):
        if node.op != "call_function" or not operation_of(node).startswith("wrap_with_"):
            continue
        place, called = next(
            (i, one) for i, one in enumerate(node.args) if isinstance(one, fx.Node) and one.op == "get_attr"
        )
        nested = cast(fx.GraphModule, module.get_submodule(str(called.target)))
        if operation_of(node) == "wrap_with_autocast" and node.args[2]:
            raise FusionError(
                f"Expected a network without autocast inside, got it in {module_path(node) or 'its forward'}; call it "
                "around the network"
            )
        _inline(nested.graph, nested)
        entries = [one for one in nested.graph.nodes if one.op == "placeholder"]
        inner: dict[fx.Node, Any] = dict(zip(entries, node.args[place + 1 :], strict=True))
        with graph.inserting_before(node):
            outputs = cast(Sequence[fx.Node], graph.graph_copy(nested.graph, inner))
        for user in list(node.users):  # one getitem per output
            user.replace_all_uses_with(outputs[cast(int, user.args[1])])
            graph.erase_node(user)
        graph.erase_node(node)


def _fold_constants(
    graph: fx.Graph, parameters: Mapping[str, str], names: dict[str, str], tensors: dict[str, Tensor]
) -> None:
    """Compute what depends neither on the input nor on a parameter, and keep the results as constants."""
    known: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder" and node.name in names and node.name not in parameters:
            known[node] = tensors[names[node.name]]
        elif (
            node.op == "call_function"
            and all(used in known for used in node.all_input_nodes)
            and not _is_random(node)
            and operation_of(node) not in _CHECKS
        ):
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: known[used])
            mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
            if mutable and any(one.op == "placeholder" for one in node.all_input_nodes):
                continue  # never into a tensor of the network
            with torch.no_grad():
                known[node] = node.target(*args, **kwargs)
        elif operation_of(node) in _FILLED and all(type(size) is int for size in node.args[1]):
            value = node.args[2] if operation_of(node) == "new_full" else _FILLED[operation_of(node)]
            like = node.meta["val"]
            known[node] = torch.full(node.args[1], value, dtype=like.dtype, device=like.device)
    count = 0
    for node, value in known.items():
        if node.op == "placeholder" or not isinstance(value, Tensor) or all(user in known for user in node.users):
            continue
        while f"constant_{count}" in tensors:
            count += 1
        with graph.inserting_before(next(iter(graph.nodes))):
            entry = graph.placeholder(f"constant_{count}")
        entry.meta = dict(node.meta)
        node.replace_all_uses_with(entry, delete_user_cb=lambda user: user not in known)
        names[entry.name] = f"constant_{count}"
        tensors[f"constant_{count}"] = value.detach().clone()
        count += 1


def _shape(value: Any) -> tuple[tuple[int, ...] | None, tuple[int, ...]]:
    """The shape of a tensor without data for one sample, and the dimensions that grow with the number of samples."""
    if not isinstance(value, Tensor):
        return None, ()
    sizes = [size if isinstance(size, int) else size.node.expr for size in value.shape]
    free = tuple(dim for dim, size in enumerate(sizes) if not isinstance(size, int) and size.free_symbols)
    one = [size if isinstance(size, int) else size.subs({symbol: 1 for symbol in size.free_symbols}) for size in sizes]
    return tuple(map(int, one)), free


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and operation_of(node) != "dropout"


def _make_functional(graph: fx.Graph) -> None:
    """Replace every operation that writes into a tensor by one that returns a new one."""
    order = {node: place for place, node in enumerate(graph.nodes)}
    viewed: dict[fx.Node, fx.Node] = {}  # a view and the tensor that it is a view of
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        name = operation_of(node)
        if name in _CHECKS:
            graph.erase_node(node)
            continue
        if name in ("view", "_unsafe_view"):
            # The strides of other tensors than those that were traced may forbid a view.
            node.target = aten.reshape.default
        if name in _VIEWS or (node.target is operator.getitem and node.args[0] in viewed):
            viewed[node] = node.all_input_nodes[0]
        if not isinstance(node.target, torch._ops.OpOverload) or not node.target._schema.is_mutable:
            continue
        written, overload = node.args[0], node.target._overloadname
        packet = getattr(aten, name.removesuffix("_"), None)
        if not isinstance(written, fx.Node) or packet is None or overload not in packet.overloads():
            raise FusionError(_unsupported(node, "which writes into a tensor"))
        node.target = getattr(packet, overload)
        _write_back(graph, node, written, viewed, order)


def _write_back(
    graph: fx.Graph, result: fx.Node, written: fx.Node, viewed: Mapping[fx.Node, fx.Node], order: Mapping[fx.Node, int]
) -> None:
    """Let all that comes after `result` read it instead of the tensor that was written into."""

    def is_later(user: fx.Node) -> bool:
        return order.get(user, -1) > order[result]

    def needed(whole: fx.Node) -> bool:
        """Whether a tensor that has been written into, or one that it is a view of, is read again."""
        return any(map(is_later, whole.users)) or (whole in viewed and needed(viewed[whole]))

    update = result
    written.replace_all_uses_with(result, delete_user_cb=is_later)
    while written in viewed:
        whole = viewed[written]
        others = [one for one, base in viewed.items() if base is whole and one is not written]
        stale = any(is_later(user) and order[one] < order[result] for one in others for user in one.users)
        if needed(whole) or stale:
            scatter = _SCATTERS.get(operation_of(written))
            if scatter is None or stale:
                raise FusionError(_unsupported(result, "which writes into a view of a tensor that is used again"))
            with graph.inserting_after(update):
                part, update = update, graph.call_function(scatter, (whole, update, *written.args[1:]))
            update.meta = dict(whole.meta)
            whole.replace_all_uses_with(update, delete_user_cb=is_later)
            assert part is not update
        written = whole


def _unsupported(node: fx.Node, why: str) -> str:
    return (
        f"Expected operations that fusion understands, got {operation_of(node)} in "
        f"{module_path(node) or 'the network'}, {why}; write it without the underscore"
    )
