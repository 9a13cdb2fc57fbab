"""The runner of captured networks, which holds no output longer than it is needed."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from clafusion.tracing.exporting import Capture

#: From the name of a parameter, buffer or constant to its tensor.
Fetch = Callable[[str], Tensor]


class GraphRunner:
    """Runs a captured network, node by node; every output is dropped after its last use.

    The tensors of the network may be changed in place between runs.

    Args:
        capture: the captured network.
        fetch: gives the tensors to run it with, when their turn comes; None: those of the capture.
    """

    def __init__(self, capture: Capture, fetch: Fetch | None = None) -> None:
        self.capture = capture
        self.fetch: Fetch = capture.tensors.__getitem__ if fetch is None else fetch
        self.nodes: dict[str, fx.Node] = {node.name: node for node in capture.graph.nodes if node.op != "output"}
        self.order = {name: place for place, name in enumerate(self.nodes)}
        # The nodes that each node reads; tensors of the network are fetched and not kept.
        self.reads = {
            name: [one.name for one in node.all_input_nodes if one.name not in capture.names]
            for name, node in self.nodes.items()
        }

    def with_ones(self, name: str | None) -> "GraphRunner":
        """The same with ones in the place of one of the tensors."""
        fetch = self.fetch
        return GraphRunner(self.capture, lambda key: torch.ones_like(fetch(key)) if key == name else fetch(key))

    def observe(self, batch: Tensor, names: Collection[str]) -> Iterator[tuple[str, Any]]:
        """Run a batch and yield (node, output) for the nodes in `names`, in graph order.

        Only what these need is run. Each output is yielded the moment it is computed, so that networks can be run side
        by side without ever holding more than a few activations.
        """
        yield from self.resume({self.capture.entry: batch}, names)

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
        sizes = {name: math.prod(node.meta["shape"]) for name, node in self.nodes.items() if is_tensor(node)}
        sizes = {name: size for name, size in sizes.items() if name not in self.capture.names}
        reads = {name: [used for used in self.reads[name] if used in sizes] for name in sizes}
        last_use = _last_uses(reads)
        alive = most = 0
        for name, size in sizes.items():
            alive += size
            most = max(most, alive)
            alive -= sum(sizes[used] for used in {name, *reads[name]} if last_use[used] == name)
        return most

    def largest_output(self) -> int:
        """Numbers of one sample in the largest output of a node."""
        sizes = (node.meta["shape"] for name, node in self.nodes.items() if name not in self.capture.names)
        return max((math.prod(shape) for shape in sizes if shape is not None), default=1)

    def alive_before(self, name: str) -> frozenset[str]:
        """The nodes before one node, in graph order, whose outputs it or a later one reads."""
        place = self.order[name]
        readers = (reader for reader, position in self.order.items() if position >= place)
        return frozenset(used for reader in readers for used in self.reads[reader] if self.order[used] < place)

    def _steps(self, held: Collection[str], names: Collection[str]) -> list[str]:
        """The nodes that it takes to get from what is held to the nodes in `names`, in graph order."""
        needed: set[str] = set()
        missing = list(names)
        while missing:
            name = missing.pop()
            if name not in needed:
                needed.add(name)
                missing += () if name in held else self.reads[name]
        return sorted(needed, key=self.order.__getitem__)

    def _output(self, name: str, outputs: Mapping[str, Any]) -> Any:
        node, names = self.nodes[name], self.capture.names
        if name in names:
            return self.fetch(names[name])

        def value(used: fx.Node) -> Any:
            return self.fetch(names[used.name]) if used.name in names else outputs[used.name]

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
        return node.target(*args, **kwargs)  # type: ignore[operator]


class Cursor:
    """A network halted somewhere, with the activations of all samples that the rest is computed from.

    Args:
        runner: runs the network.
        batches: the samples in chunks.
    """

    def __init__(self, runner: GraphRunner, batches: Sequence[Tensor]) -> None:
        self.runner = runner
        self.place = runner.capture.entry
        self.states: list[dict[str, Any]] = [{self.place: as_input(batch, runner.capture)} for batch in batches]
        self.sizes = [len(batch) for batch in batches]

    def look_ahead(self, names: Collection[str], given: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """The outputs of nodes, chunk by chunk; nothing of it is kept.

        Args:
            names: of the nodes.
            given: outputs to take for granted instead of computing them, in every chunk.
        """
        for state in self.states:
            yield dict(self.runner.resume({**state, **(given or {})}, names))

    def advance(self, name: str) -> None:
        """Move on to just before a node: all is held that it and the nodes after it read. Never back."""
        if self.runner.order[name] <= self.runner.order[self.place]:
            return
        alive = self.runner.alive_before(name)
        for number, state in enumerate(self.states):
            self.states[number] = dict(self.runner.resume(state, alive))
        self.place = name


class Ahead:
    """A network that runs no further than it is asked to, side by side with others, on one batch.

    Args:
        runner: of the network.
        batch: the samples.
        names: of the nodes that will be taken, each as often as it is named; an output is kept until then.
    """

    def __init__(self, runner: GraphRunner, batch: Tensor, names: Sequence[str]) -> None:
        self.run = runner.observe(as_input(batch, runner.capture), frozenset(names))
        self.left = {name: names.count(name) for name in names}
        self.kept: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """The output of a node."""
        while name not in self.kept:
            reached, value = next(self.run)
            self.kept[reached] = value
        self.left[name] -= 1
        return self.kept[name] if self.left[name] else self.kept.pop(name)


def _last_uses(reads: Mapping[str, Collection[str]]) -> dict[str, str]:
    """After which of the steps each output is not needed any more; what no later one reads, after its own."""
    return {used: name for name, inputs in reads.items() for used in (name, *inputs)}


def is_tensor(node: fx.Node) -> bool:
    """Whether the output of a node is one tensor."""
    return isinstance(node.meta.get("val"), Tensor)


def working_precision(*tensors: Tensor) -> torch.dtype:
    """The precision to compute in: at least single; on an accelerator double, where single may mean much less."""
    wider = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    return wider if tensors[0].device.type == "cpu" else torch.float64


def as_input(batch: Tensor, capture: Capture) -> Tensor:
    """The batch on the device and in the floating dtype of a network."""
    return batch.to(capture.reference)
