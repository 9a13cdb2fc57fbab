"""Calls: a node of a graph with values in the place of tensors, as the rules read it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.errors import FusionError
from clafusion.tracing.exporting import module_path, operation_of
from clafusion.tracing.labels import Labels, Value


@dataclass(frozen=True, eq=False)
class Call:
    """One operation of a network.

    Attributes:
        name: the operation, such as `conv2d` or `my_namespace::my_op`.
        place: the operation and the path of its module, for messages.
        arguments: by their names in the operation's schema, defaults filled in; a `Value` for every tensor.
        shapes: the shapes of the tensors that it returns.
        several: whether it returns a list.
        dtype: of the (first) tensor that it returns.
        target: the operation itself.
    """

    name: str
    place: str
    arguments: Mapping[str, Any]
    shapes: tuple[tuple[int, ...], ...]
    several: bool = False
    dtype: torch.dtype = torch.float32
    target: Callable[..., Any] = field(default=torch.clone, repr=False)

    def __getitem__(self, name: str) -> Any:
        return self.arguments.get(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the (first) tensor that it returns."""
        return self.shapes[0]

    @property
    def tensors(self) -> tuple[Value, ...]:
        """The values among its arguments, in lists as well."""
        return tuple(tensors_in(self.arguments))

    @property
    def input(self) -> Value:
        """The first of its tensors."""
        return self.tensors[0]

    def run(self, first: Tensor) -> Any:
        """The operation itself, on another tensor in the place of its first argument."""
        rest = dict(list(self.arguments.items())[1:])
        return self.target(first, **{name: constants_of(value) for name, value in rest.items()})

    def refusal(self, why: str = "") -> FusionError:
        """The error that says that the labels cannot follow this operation."""
        name = self.name if "::" in self.name else f"aten::{self.name}"
        return FusionError(
            f"Expected operations that fusion understands, got {self.place}{why and ', ' + why}; replace it, or say "
            f'how it treats neurons with clafusion.register_operation("{name}", ...)'
        )


Result = Value | list[Value]
Rule = Callable[[Labels, Call], Result]


def operation_name(node: fx.Node) -> str:
    """The name that rules are registered by: `conv2d` for ATen's own, `my_namespace::my_op` for others."""
    name = operation_of(node)
    namespace = getattr(node.target, "namespace", "aten")
    return name if namespace == "aten" else f"{namespace}::{name}"


def place_of(node: fx.Node) -> str:
    """The operation of a node and the path of its module, as messages name them."""
    return f"{operation_name(node)} in {module_path(node) or 'the network'}"


def call_of(node: fx.Node, values: Mapping[fx.Node, Any]) -> Call:
    """A node with the values of what it reads."""
    args, kwargs = resolved(node, values)
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        arguments = {str(place): value for place, value in enumerate(args)} | kwargs
    else:
        arguments = {argument.name: argument.default_value for argument in schema.arguments}
        arguments.update(zip(arguments, args, strict=False))
        arguments.update(kwargs)
    found = node.meta.get("val")
    parts = found if isinstance(found, list | tuple) else [found]
    tensors = [one for one in parts if isinstance(one, Tensor)]
    shapes = tuple(shape_of(one) for one in tensors)
    dtype = tensors[0].dtype if tensors else torch.float32
    return Call(operation_name(node), place_of(node), arguments, shapes, parts is found, dtype, node.target)  # type: ignore[arg-type]


def resolved(node: fx.Node, values: Mapping[fx.Node, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a node with the values of what it reads."""

    def value_of(argument: Any) -> Any:
        if isinstance(argument, fx.Node):
            return values[argument]
        if isinstance(argument, list | tuple):
            return [value_of(one) for one in argument]
        return argument

    return tuple(value_of(one) for one in node.args), {name: value_of(one) for name, one in node.kwargs.items()}


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a fake tensor, with two samples: the batch that the network was exported with.

    One sample would not do: `squeeze()` would take the batch away, and a batch would broadcast.
    """
    return tuple(size if type(size) is int else int(size.node.hint) for size in tensor.shape)  # type: ignore[attr-defined]


def tensors_in(arguments: Any) -> list[Value]:
    """The values in nested arguments."""
    if isinstance(arguments, Value):
        return [arguments]
    if isinstance(arguments, Mapping):
        arguments = list(arguments.values())
    if isinstance(arguments, list | tuple):
        return [value for one in arguments for value in tensors_in(one)]
    return []


def constants_of(argument: Any) -> Any:
    """Arguments with the constants of their values."""
    if isinstance(argument, Value):
        return argument.constant
    if isinstance(argument, list | tuple):
        return [constants_of(one) for one in argument]
    return argument
