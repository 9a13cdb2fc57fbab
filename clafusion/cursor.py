"""Run a captured network piece by piece over all samples, from one cut point to the next."""

from collections.abc import Collection, Iterator, Sequence

from torch import Tensor, fx

from clafusion.statistics import as_input
from clafusion.structure import Structure


class Cursor:
    """A network halted at a cut point, with the activations of all samples there.

    It holds one activation per sample and network, whatever the depth: moving on from a cut point costs one pass over
    the layers up to the next one. The tensors of the network may be changed in place between runs.

    Args:
        structure: the network.
        batches: the samples in chunks.
    """

    def __init__(self, structure: Structure, batches: Sequence[Tensor]) -> None:
        self.interpreter = fx.Interpreter(structure.module)
        self.nodes: list[fx.Node] = list(structure.module.graph.nodes)
        self.by_name = {node.name: node for node in self.nodes}
        self.at = next(index for index, node in enumerate(self.nodes) if node.op == "placeholder")
        self.states = [{self.nodes[self.at]: as_input(batch, structure.module)} for batch in batches]

    def look_ahead(self, names: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """Run from the cut point until all named nodes are known; yield their outputs chunk by chunk; stay."""
        stop = max(self.nodes.index(self.by_name[name]) for name in names)
        for state in self.states:
            outputs: dict[str, Tensor] = {}
            for node, value in self._run(dict(state), stop):
                if node.name in names:
                    outputs[node.name] = value
            outputs.update({node.name: value for node, value in state.items() if node.name in names})
            yield outputs

    def advance(self, name: str) -> None:
        """Move on to a later cut point."""
        stop = self.nodes.index(self.by_name[name])
        for state in self.states:
            for _ in self._run(state, stop):
                pass
        self.at = max(self.at, stop)

    def input_of(self, layer: str) -> str:
        """The node that a layer reads."""
        node = next(node for node in self.nodes if node.op == "call_module" and node.target == layer)
        return node.all_input_nodes[0].name

    def _run(self, state: dict[fx.Node, Tensor], stop: int) -> Iterator[tuple[fx.Node, Tensor]]:
        """Run the nodes after the cut point up to `stop`, dropping from `state` what nothing needs any more."""
        self.interpreter.env = state
        for node in self.nodes[self.at + 1 : stop + 1]:
            state[node] = self.interpreter.run_node(node)
            yield node, state[node]
            for used in self.interpreter.user_to_last_uses.get(node, []):
                del state[used]
