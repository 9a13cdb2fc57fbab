"""The pass over a graph that gives every tensor its labels."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.errors import FusionError, first_line
from clafusion.tracing.calls import call_of, constants_of, operation_name, place_of, resolved, shape_of, tensors_in
from clafusion.tracing.exporting import Capture, operation_of
from clafusion.tracing.labels import Labels, Value
from clafusion.tracing.rules import rule_of

#: The operations whose last arguments are running statistics: these have neurons, other buffers are constants.
_NORMS = frozenset(("batch_norm", "instance_norm"))


@dataclass(frozen=True, eq=False)
class Labelling:
    """A graph with its labels.

    Attributes:
        labels: the primitives, with the elements.
        values: what every node stands for: a value, a list of values, or a number.
        axes: the labels along every dimension of every parameter and running statistic by name; None: nothing there.
    """

    labels: Labels
    values: Mapping[fx.Node, Any]
    axes: Mapping[str, tuple[Tensor | None, ...]]


def label(capture: Capture) -> Labelling:
    """Give every tensor of a network its labels.

    Raises:
        FusionError: for an operation without a rule, by name.
    """
    labels, values = Labels(), dict[fx.Node, Any]()
    labelled = _labelled(capture)
    groups = _groups(capture.graph, labelled)
    parameters: dict[int, Value] = {}
    axes: dict[str, tuple[Tensor | None, ...]] = {}
    for node in capture.graph.nodes:
        if node.op == "placeholder" and node in labelled:
            tensor = capture.tensors[labelled[node]]
            if id(tensor) not in parameters:  # tied parameters have the same neurons
                parameters[id(tensor)] = _parameter(labels, tensor, groups.get(node, 1))
            values[node] = parameters[id(tensor)]
            axes[labelled[node]] = _axes(values[node], groups.get(node, 1))
        elif node.op == "placeholder" and node.name in capture.names:
            constant = capture.tensors[capture.names[node.name]].detach()
            values[node] = Value(tuple(constant.shape), (), constant)
        elif node.op == "placeholder":
            values[node] = Value(shape_of(node.meta["val"]))
        elif node.op == "call_function":
            values[node] = _called(labels, node, values)
    return Labelling(labels, values, axes)


def parameters_of(node: fx.Node, names: Mapping[str, str]) -> Iterator[str]:
    """The names of the tensors of the network that a node reads, in the order of its arguments."""
    for used in node.all_input_nodes:
        if used.op == "placeholder" and used.name in names:
            yield names[used.name]


def _labelled(capture: Capture) -> dict[fx.Node, str]:
    """The placeholders of parameters and running statistics, with their names."""
    statistics = {
        one
        for node in capture.graph.nodes
        if operation_of(node) in _NORMS
        for one in node.args[3:5]
        if isinstance(one, fx.Node)
    }
    return {
        node: capture.names[node.name]
        for node in capture.graph.nodes
        if node.op == "placeholder"
        and (capture.names.get(node.name) in capture.parameters or (node in statistics and node.name in capture.names))
    }


def _groups(graph: fx.Graph, labelled: Mapping[fx.Node, str]) -> dict[fx.Node, int]:
    """The number of groups of the parameters that are, or become, the weights of grouped convolutions."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        name = operation_of(node)
        if not name.startswith("conv") or "transpose" in name:
            continue
        groups = call_groups(node)
        weight = node.args[1]
        if groups == 1 or not isinstance(weight, fx.Node) or weight.meta["val"].shape[1] == 1:
            continue
        seen, todo = {weight}, [weight]
        while todo:  # a weight may be computed from the parameter
            one = todo.pop()
            if one in labelled and one.meta["val"].shape == weight.meta["val"].shape:
                found[one] = groups
            new = [used for used in one.all_input_nodes if used not in seen]
            seen.update(new)
            todo.extend(new)
    return found


def call_groups(node: fx.Node) -> int:
    """The number of groups of a convolution."""
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    place = names.index("groups")
    return int(node.kwargs.get("groups", node.args[place] if len(node.args) > place else 1))  # type: ignore[arg-type]


def _parameter(labels: Labels, tensor: Tensor, groups: int) -> Value:
    """A parameter with fresh labels; inputs of groups are others in every group."""
    value = labels.parameter(tensor.shape)
    if groups == 1:
        return value
    outputs, inputs, *kernel = tensor.shape
    own = labels.fresh((groups, 1, inputs)).expand(groups, outputs // groups, inputs)
    array = own.reshape(outputs, inputs, *(1 for _ in kernel))
    others = [one for one in value.arrays if one.shape[1] == 1]
    return Value(value.shape, (*others[:1], array, *others[1:]))


def _axes(value: Value, groups: int) -> tuple[Tensor | None, ...]:
    """The labels of a parameter per dimension; those of all groups one after the other."""
    axes: list[Tensor | None] = [None] * len(value.shape)
    for array in value.arrays:
        if groups > 1 and array.shape[0] > 1 and array.shape[1] > 1:
            axes[1] = array[:: value.shape[0] // groups].reshape(-1)
        else:
            axes[next(dim for dim, size in enumerate(array.shape) if size > 1)] = array.reshape(-1)
    return tuple(axes)


def _called(labels: Labels, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
    """The values that a call returns."""
    args, kwargs = resolved(node, values)
    if node.target is getitem:
        return args[0][args[1]]
    if operation_of(node) == "sym_size":
        return args[0].shape[args[1]]
    tensors = tensors_in([args, kwargs])
    if all(value.constant is not None for value in tensors) and not _is_random(node):
        return _computed(node, args, kwargs)
    labels.place = place_of(node)
    call = call_of(node, values)
    rule = rule_of(call)
    try:
        result = rule(labels, call)
    except FusionError:
        raise
    except Exception as error:  # a rule of somebody else's, or a case that ours do not know
        raise call.refusal(first_line(error)) from error
    found = tuple(value.shape for value in (result if isinstance(result, list) else [result]))
    if found != call.shapes:
        raise call.refusal(f"whose rule gives the shapes {list(found)} in the place of {list(call.shapes)}")
    return result


def _computed(node: fx.Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """The result of an operation on constants."""
    with torch.no_grad():
        result = node.target(  # type: ignore[operator]
            *(constants_of(one) for one in args), **{name: constants_of(one) for name, one in kwargs.items()}
        )

    def wrapped(one: Any) -> Any:
        if isinstance(one, list | tuple):
            return [wrapped(part) for part in one]
        return Value(tuple(one.shape), (), one) if isinstance(one, Tensor) else one

    return wrapped(result)


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and operation_of(node) != "dropout"


__all__ = ["Labelling", "call_groups", "label", "operation_name", "parameters_of"]
