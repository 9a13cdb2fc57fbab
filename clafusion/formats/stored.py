"""A network whose forward is a stored graph."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from clafusion.errors import FusionError
from clafusion.formats.graph_json import DTYPES, FORMAT, MOST_NODES, Reference, Step, decode_nodes, decode_value
from clafusion.formats.stored_operations import TRAINING

#: The module that holds what is neither a parameter nor a saved buffer of the network that was stored.
CONSTANTS = "_constants"
_KEYS = ("name", "version", "input", "nodes", "logits", "tensors")
_DEEPEST = 64
#: Axes of a tensor at most, and the place of its running statistics among the arguments of a norm.
_MOST_AXES, _MEAN, _VARIANCE, _MOMENTUM = 16, 3, 4, 6
_UPDATING = ("aten.batch_norm.default", "aten.instance_norm.default")
#: The operations that multiply by an argument, which is one in a network without weights, by its place.
_SCALES = {
    "aten.batch_norm.default": (1, _VARIANCE),
    "aten.instance_norm.default": (1, _VARIANCE),
    "aten.layer_norm.default": (2,),
    "aten.group_norm.default": (2,),
    "aten.rms_norm.default": (2,),
    "aten.mul.Tensor": (0, 1),
}


class StoredNetwork(nn.Module):
    """Executes the operations of a graph, which are all in one table, on tensors with the names they had.

    It is trained, copied, moved and converted like any other. In training mode dropout drops and BatchNorm uses the
    statistics of the batch and updates its own. Attention drops nothing, and no block is skipped (stochastic depth):
    a graph is that of evaluation, and neither can be seen there. Sizes that the network computed from the size of the
    image are those of the images that it was stored with; the number of samples is free.

    Building one from a description that comes from anyone executes nothing, and allocates nothing beyond the tensors
    that it claims (nothing at all under `torch.device("meta")`). Running one calls the operations of the table, and
    nothing else; they take the time and memory that the graph asks for.

    Args:
        description: as `clafusion.describe` returns it.

    Raises:
        FusionError: The description is not one that `describe` writes.
    """

    def __init__(self, description: Mapping[str, Any]) -> None:
        super().__init__()
        if not isinstance(description, Mapping) or set(description) != set(_KEYS):
            raise FusionError(f"Expected a description with {', '.join(_KEYS)}, got another; save the network again")
        if description["version"] != FORMAT["version"]:
            raise FusionError(
                f"Expected version {FORMAT['version']} of a stored graph, got another; install a newer clafusion"
            )
        self._described: dict[str, Any] = copy.deepcopy(dict(description))
        self._prepare()
        check_input(description["input"])
        _register(self, description["tensors"])
        _initialise(self, self._steps)
        self.register_load_state_dict_post_hook(_tie_again)  # type: ignore[no-untyped-call]

    def _prepare(self) -> None:
        names = _names(self._described["tensors"])
        self._steps = decode_nodes(self._described["nodes"], names)
        self._logits = decode_value(self._described["logits"], self._steps, names, "the logits")
        if not isinstance(self._logits, Reference) or self._logits.kind != "tensor":
            raise FusionError("Expected the logits to be a tensor, got another value; save the network again")
        last: dict[int, int] = {}
        for number, step in enumerate(self._steps):
            last.update((one.key, number) for one in step.references if one.source == "node")
        # A value goes after its last use, or at once if there is none.
        self._done: list[list[int]] = [[] for _ in self._steps]
        for number in range(len(self._steps)):
            self._done[last.get(number, number)].append(number)
        if self._logits.source == "node":
            self._done[last.get(self._logits.key, self._logits.key)].remove(self._logits.key)

    @property
    def description(self) -> dict[str, Any]:
        """The description that the network was made from, as `describe` returns it."""
        return copy.deepcopy(self._described)

    def forward(self, x: Tensor) -> Tensor:
        """Map samples `[N, ...]` to logits `[N, classes]`."""
        return self.observe(x, None)

    def observe(self, x: Tensor, see: Callable[[str, Any], None] | None) -> Tensor:
        """Run the graph, and show `see` each value as it comes, with the name of its operation."""
        values: list[Any] = [None] * len(self._steps)
        dtype = base_dtype(self) or x.dtype

        def find(value: Any) -> Any:
            if isinstance(value, list):
                return [find(part) for part in value]
            if not isinstance(value, Reference):
                return value
            if value.source == "node":
                return values[value.key]
            if value.source == "tensor":
                return attrgetter(value.key)(self)
            return x if value.source == "input" else {"dtype": dtype, "device": x.device}[value.kind]

        for number, step in enumerate(self._steps):
            args = [find(value) for value in step.args]
            if self.training and step.operation in TRAINING:
                self._train(step, args)
            values[number] = step.function(*args, **{key: find(value) for key, value in step.kwargs.items()})
            if see is not None:
                see(f"{step.operation}, operation {number}", values[number])
            for done in self._done[number]:
                values[done] = None
        logits: Tensor = find(self._logits)
        return logits

    def _train(self, step: Step, args: list[Any]) -> None:
        """Turn the arguments of an operation into those of training; count the batches that a norm has seen."""
        place = TRAINING[step.operation]
        if step.operation not in _UPDATING:
            omitted = step.function._schema.arguments[len(args) : place]
            args += [one.default_value for one in omitted]
            args[place : place + 1] = [True]
            return
        mean = step.args[_MEAN]
        if not isinstance(mean, Reference) or mean.source != "tensor" or args[_MEAN].requires_grad:
            return
        args[place] = True
        owner, _, name = mean.key.rpartition(".")
        tracked = getattr(self.get_submodule(owner), "num_batches_tracked", None) if name == "running_mean" else None
        if isinstance(tracked, Tensor) and step.operation == _UPDATING[0]:
            tracked.add_(1)
            if args[_MOMENTUM] == 0:  # of a norm with the mean of all batches
                args[_MOMENTUM] = 1 / float(tracked)

    def __getstate__(self) -> dict[str, Any]:
        made = ("_steps", "_logits", "_done")  # holds functions of PyTorch, and is made again
        return {name: value for name, value in self.__dict__.items() if name not in made}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self._steps)} operations, input {self._described['input']})"


def base_dtype(model: nn.Module) -> torch.dtype | None:
    """The data type of a network: that of its first floating parameter, or else buffer."""
    tensors = (*model.parameters(), *model.buffers())
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def tensor_table(tensors: Mapping[str, Tensor], parameters: Sequence[str] | set[str], dtype: torch.dtype) -> list[Any]:
    """Tensors as JSON-able data, in their order: `[name, kind, shape, type]`, or `[name, "same", the first name]`."""
    table: list[Any] = []
    first: dict[int, str] = {}
    for name, tensor in tensors.items():
        if id(tensor) in first:
            table.append([name, "same", first[id(tensor)]])
            continue
        first[id(tensor)] = name
        kind = "float" if tensor.dtype == dtype else str(tensor.dtype).removeprefix("torch.")
        if kind != "float" and kind not in DTYPES:
            raise FusionError(f"Expected tensors of {', '.join(DTYPES)}, got {kind} in {name}; convert it")
        table.append([name, "parameter" if name in parameters else "buffer", list(tensor.shape), kind])
    return table


def check_input(shape: Any) -> None:
    """Refuse what is no shape of a sample."""
    if not isinstance(shape, list) or not all(type(size) is int and 0 <= size < 2**31 for size in shape):
        raise FusionError("Expected the shape of a sample, got another value; save the network again")


def _names(table: Any) -> set[str]:
    """The names of the tensors of a description; refuses what cannot be one."""
    if not isinstance(table, list) or len(table) > MOST_NODES:
        raise FusionError(f"Expected a list of at most {MOST_NODES} tensors, got another; save a smaller network")
    for entry in table:
        length = 3 if isinstance(entry, list) and entry[1:2] == ["same"] else 4
        if not isinstance(entry, list) or len(entry) != length or not isinstance(entry[0], str):
            raise FusionError("Expected a tensor as [name, kind, shape, type], got another; save the network again")
    names = {entry[0] for entry in table}
    if len(names) != len(table):
        raise FusionError("Expected tensors with names of their own, got one twice; save the network again")
    return names


def _register(network: nn.Module, table: Any) -> None:
    """Give a network the tensors of a description, empty."""
    made: dict[str, Tensor] = {}
    for name, kind, *rest in table:
        made[name] = _tensor(name, kind, rest, made)
        owner, (*path, leaf) = network, name.split(".")
        if len(path) > _DEEPEST or not all((*path, leaf)):
            raise FusionError(f"Expected a dotted name of a tensor, got {name[:80]!r}; rename it")
        try:
            for part in path:
                if part not in owner._modules:
                    owner.add_module(part, nn.Module())
                owner = owner.get_submodule(part)
            if isinstance(made[name], nn.Parameter):
                owner.register_parameter(leaf, made[name])  # type: ignore[arg-type]
            else:
                owner.register_buffer(leaf, made[name])
        except (AttributeError, KeyError) as error:
            raise FusionError(
                f"Expected a name that hides nothing of a module, got {name[:80]!r}; rename it"
            ) from error


def _tensor(name: str, kind: Any, rest: Sequence[Any], made: Mapping[str, Tensor]) -> Tensor:
    if kind == "same" and isinstance(rest[0], str) and rest[0] in made:
        return made[rest[0]]
    if kind in ("parameter", "buffer") and len(rest) == 2 and isinstance(rest[1], str):
        shape, dtype = rest
        check_input(shape)
        if len(shape) <= _MOST_AXES and math.prod(shape) < 2**60 and (dtype == "float" or dtype in DTYPES):
            blank = torch.zeros(shape, dtype=torch.get_default_dtype() if dtype == "float" else DTYPES[dtype])
            return nn.Parameter(blank, blank.is_floating_point()) if kind == "parameter" else blank
    raise FusionError(f"Expected a shape and a type of tensor {name[:80]!r}, got another value; save it again")


@torch.no_grad()
def _initialise(network: nn.Module, steps: Sequence[Step]) -> None:
    """Random weights, as of a layer that PyTorch has just made: matrices uniform, scales one, everything else zero."""
    scales = {
        value.key
        for step in steps
        for place in _SCALES.get(step.operation, ())
        if isinstance(value := step.args[place] if place < len(step.args) else None, Reference)
        if value.source == "tensor" and not value.key.startswith(f"{CONSTANTS}.")
    }
    for name, parameter in network.named_parameters():
        if parameter.ndim > 1 and parameter.is_floating_point() and parameter.numel():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        elif name in scales:
            parameter.fill_(1)
    for name, buffer in network.named_buffers():
        if name in scales:
            buffer.fill_(1)


def _tie_again(network: nn.Module, keys: Any) -> None:
    """Let tensors be one again that were, after loading has put new ones into their places."""
    assert isinstance(network, StoredNetwork)
    for name, kind, first, *_ in network._described["tensors"]:
        if kind == "same":
            owner, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(owner), leaf, attrgetter(first)(network))
