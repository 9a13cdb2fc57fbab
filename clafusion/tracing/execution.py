"""The runner of captured networks, which holds no output longer than it is needed."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

#: From the name of a parameter or buffer and its tensor to the tensor that a layer uses in its place.
Change = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Bypass:
    """A substitute for the output of a node that is not computed.

    Attributes:
        source: an earlier node, whose output is repeated.
        silent: zeros of the node's own shape instead, for as many samples.
    """

    source: str
    silent: bool = False


class GraphRunner(fx.Interpreter):
    """Runs a captured network, node by node; every output is dropped after its last use.

    The tensors of the network may be changed in place between runs.

    Args:
        module: the captured network, or with `graph` any network that has its layers.
        graph: the graph to run it by; None: its own.
        bypass: the nodes that are not computed, and what stands for their outputs.
        change: of the parameters and buffers that the layers use; None: none.
    """

    def __init__(
        self,
        module: nn.Module,
        graph: fx.Graph | None = None,
        bypass: Mapping[str, Bypass] | None = None,
        change: Change | None = None,
    ) -> None:
        super().__init__(module, garbage_collect_values=False, graph=graph)
        self.bypass, self.change = bypass or {}, change
        self.nodes: dict[str, fx.Node] = {node.name: node for node in self.graph.nodes}
        # The nodes that each node reads, in the order of the graph.
        self.reads = {name: [one.name for one in node.all_input_nodes] for name, node in self.nodes.items()}
        self.reads |= {name: [bypass.source] for name, bypass in self.bypass.items()}

    def observe(self, batch: Tensor, names: Collection[str]) -> Iterator[tuple[str, Any]]:
        """Run a batch and yield (node, output) for the nodes in `names`, in graph order.

        Only what these need is run. Each output is yielded the moment it is computed, so that networks with the same
        graph can be run in step without ever holding more than a few activations.
        """
        self.args_iter = iter([batch])
        yield from self.resume({}, names)

    def resume(self, held: Mapping[str, Any], names: Collection[str]) -> Iterator[tuple[str, Any]]:
        """As `observe`, from the outputs of some nodes, which are held."""
        names = frozenset(names)
        reads = {name: [] if name in held else self.reads[name] for name in self._steps(held, names)}
        last_use = _last_uses(reads)
        outputs: dict[str, Any] = {}
        for name in reads:
            outputs[name] = value = held[name] if name in held else self._output(name, outputs)
            for used in {name, *reads[name]}:
                if last_use[used] == name:
                    del outputs[used]
            if name in names:
                yield name, value

    def live_numbers(self) -> int:
        """Numbers of one sample that are held at once, at most, in a run of the whole network."""
        sizes = {node.name: math.prod(node.meta["shape"][1:]) for node in tensor_nodes(self.graph)}
        reads = {name: [used for used in self.reads[name] if used in sizes] for name in sizes}
        last_use = _last_uses(reads)
        alive = most = 0
        for name, size in sizes.items():
            alive += size
            most = max(most, alive)
            alive -= sum(sizes[used] for used in {name, *reads[name]} if last_use[used] == name)
        return most

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a layer, on changed parameters if there is a change."""
        module = self.fetch_attr(target)
        tensors = (*module.named_parameters(), *module.named_buffers())
        if self.change is None or not tensors:
            return module(*args, **kwargs)
        state = {key: self.change(f"{target}.{key}", tensor) for key, tensor in tensors}
        return functional_call(module, state, args, kwargs)

    def _steps(self, held: Collection[str], names: Collection[str]) -> list[str]:
        """The nodes that it takes to get from what is held to the nodes in `names`, in graph order."""
        needed: set[str] = set()
        missing = list(names)
        while missing:
            name = missing.pop()
            if name not in needed:
                needed.add(name)
                missing += () if name in held else self.reads[name]
        return [name for name in self.nodes if name in needed]

    def _output(self, name: str, outputs: Mapping[str, Any]) -> Any:
        node = self.nodes[name]
        if name in self.bypass:
            source = outputs[self.bypass[name].source]
            shape = node.meta["shape"][1:]
            return source.new_zeros(()).expand(len(source), *shape) if self.bypass[name].silent else source
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda used: outputs[used.name])
        return getattr(self, node.op)(node.target, args, kwargs)


class Cursor:
    """A network halted somewhere, with the activations of all samples that the rest is computed from.

    It holds the nodes that the last `advance` named and nothing else.

    Args:
        runner: runs the network.
        batches: the samples in chunks.
    """

    def __init__(self, runner: GraphRunner, batches: Sequence[Tensor]) -> None:
        self.runner = runner
        entry = next(name for name, node in runner.nodes.items() if node.op == "placeholder")
        self.states: list[dict[str, Tensor]] = [{entry: as_input(batch, runner.module)} for batch in batches]
        self.sizes = [len(batch) for batch in batches]

    def look_ahead(
        self, names: Collection[str], given: Mapping[str, Tensor] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The outputs of nodes, chunk by chunk; nothing of it is kept.

        Args:
            names: of the nodes.
            given: outputs to take for granted instead of computing them, in every chunk.
        """
        for state in self.states:
            yield dict(self.runner.resume({**state, **(given or {})}, names))

    def advance(self, names: Collection[str]) -> None:
        """Move on to where exactly these nodes are held, from which all that is asked for later must follow."""
        for number, state in enumerate(self.states):
            self.states[number] = dict(self.runner.resume(state, names))


def in_step(runners: Sequence[GraphRunner], names: Collection[str], batch: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Run networks with one graph side by side on one batch; yield the outputs of each node in `names`, in order."""
    runs = [runner.observe(as_input(batch, runner.module), names) for runner in runners]
    for outputs in zip(*runs, strict=True):
        yield tuple(value for _, value in outputs)


def _last_uses(reads: Mapping[str, Collection[str]]) -> dict[str, str]:
    """After which of the steps each output is not needed any more; what no later one reads, after its own."""
    return {used: name for name, inputs in reads.items() for used in (name, *inputs)}


def tensor_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The nodes of a captured network whose output is a tensor, in graph order."""
    return [node for node in graph.nodes if node.op != "output" and node.meta["shape"] is not None]


def working_precision(*tensors: Tensor) -> torch.dtype:
    """The precision to compute in: at least single; on an accelerator double, where single may mean much less."""
    wider = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return wider if tensors[0].device.type == "cpu" else torch.float64


def as_input(batch: Tensor, module: nn.Module) -> Tensor:
    """The batch on the device and in the floating dtype of a network."""
    return batch.to(next(module.parameters()))
