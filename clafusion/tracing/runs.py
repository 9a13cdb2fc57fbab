"""Run a captured network piece by piece over all samples, computing nothing twice that it is told to keep."""

from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import Tensor, fx

from clafusion.tracing.execution import as_input, last_uses, needed, observe
from clafusion.tracing.structure import Structure


class Cursor:
    """A network halted somewhere, with the activations of all samples that the rest is computed from.

    It holds the nodes that the last `advance` named and nothing else. The tensors of the network may be changed in
    place between runs: what depends on them and is not held is computed anew.

    Args:
        structure: the network.
        batches: the samples in chunks.
    """

    def __init__(self, structure: Structure, batches: Sequence[Tensor]) -> None:
        self.interpreter = fx.Interpreter(structure.module, garbage_collect_values=False)
        self.nodes: list[fx.Node] = list(structure.module.graph.nodes)
        self.by_name = {node.name: node for node in self.nodes}
        start = next(node for node in self.nodes if node.op == "placeholder")
        self.states: list[dict[fx.Node, Tensor]] = [{start: as_input(batch, structure.module)} for batch in batches]
        self.sizes = [len(batch) for batch in batches]

    def look_ahead(
        self, names: Collection[str], given: Mapping[str, Tensor] | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """The outputs of nodes, chunk by chunk; nothing of it is kept.

        Args:
            names: of the nodes.
            given: outputs to take for granted instead of computing them, in every chunk.
        """
        overridden = {self.by_name[name]: value for name, value in (given or {}).items()}
        wanted = [self.by_name[name] for name in names]
        plan = needed(self.nodes, wanted, {*self.states[0], *overridden})
        for state in self.states:
            values = self._run({**state, **overridden}, wanted, plan)
            yield {node.name: values[node] for node in wanted}

    def advance(self, names: Collection[str]) -> None:
        """Move on to where exactly these nodes are held, from which all that is asked for later must follow."""
        wanted = [self.by_name[name] for name in names]
        plan = needed(self.nodes, wanted, self.states[0])
        for number, state in enumerate(self.states):
            self.states[number] = self._run(state, wanted, plan)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a node's output for one sample."""
        return tuple(self.by_name[name].meta["shape"][1:])

    def _run(
        self, known: Mapping[fx.Node, Tensor], wanted: Sequence[fx.Node], plan: Sequence[fx.Node]
    ) -> dict[fx.Node, Tensor]:
        """The outputs of the wanted nodes; what nothing needs any more is dropped on the way."""
        last_use = last_uses(plan)
        self.interpreter.env = dict(known)
        for node in plan:
            self.interpreter.env[node] = self.interpreter.run_node(node)
            for used in node.all_input_nodes:
                if last_use[used] is node and used not in wanted:
                    self.interpreter.env.pop(used, None)
        values, self.interpreter.env = {node: self.interpreter.env[node] for node in wanted}, {}
        return values


def in_step(
    structures: Sequence[Structure], nodes: Sequence[Sequence[str]], batch: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    """Run networks side by side on one batch and yield what they give at matching nodes, node by node.

    Args:
        structures: the networks.
        nodes: for each network the nodes to observe, in graph order; equally many for all.
        batch: the inputs.
    """
    runs = [
        observe(structure.module, as_input(batch, structure.module), frozenset(names))
        for structure, names in zip(structures, nodes, strict=True)
    ]
    for outputs in zip(*runs, strict=True):
        yield tuple(value for _, value in outputs)
