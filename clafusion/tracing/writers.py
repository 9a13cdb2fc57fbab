"""The layers that write what an axis indexes, for the published method, in which every layer has a map of its own."""

from collections.abc import Mapping

from clafusion.tracing.exporting import operation_of
from clafusion.tracing.signatures import source_of
from clafusion.tracing.structure import Structure
from clafusion.tracing.units import ADDITIONS, NORMS

#: By parameter and dimension the names of layers.
Writers = Mapping[tuple[str, int], tuple[str, ...]]


def writers_of(structure: Structure) -> Writers:
    """For every axis of every parameter the layers whose own maps, averaged, would move it.

    A sum is written by the branch, and by the projection shortcut if there is one; everything else passes on what it
    reads.
    """
    layers = {layer.node: layer for layer in structure.layers}
    names = structure.capture.names
    written: dict[object, tuple[str, ...]] = {}
    result: dict[tuple[str, int], tuple[str, ...]] = {}
    for node in structure.capture.graph.nodes:
        if node.op != "call_function":
            continue
        before = [written.get(source_of(used), ()) for used in node.all_input_nodes if used.name not in names]
        read = next((one for one in before if one), ())
        layer = layers.get(node.name)
        if layer is not None and layer.kind != "depthwise":
            written[node] = (layer.name,)
        elif operation_of(node) in ADDITIONS and len(before) == 2:
            written[node] = _of_sum(structure, node.name, before)
        else:
            written[node] = read
        if layer is not None or operation_of(node) in NORMS:
            own = (layer.name,) if layer is not None and layer.kind != "depthwise" else read
            for used in node.all_input_nodes:
                if used.name in names:
                    result[names[used.name], 0] = own
                    result[names[used.name], 1] = read
    return result


def _of_sum(structure: Structure, node: str, before: list[tuple[str, ...]]) -> tuple[str, ...]:
    """The layers that write a sum: those inside its unit, the branch before the shortcut."""
    unit = next((unit for unit in structure.units if node in unit.nodes), None)
    inside = {} if unit is None else {layer.name: layer for layer in unit.layers}
    found = [name for one in before for name in one if name in inside]
    ordered = sorted(dict.fromkeys(found), key=lambda name: inside[name].shortcut)
    return tuple(ordered) or before[0]
