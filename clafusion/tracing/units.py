"""The units of a captured network, and the stages that they form."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from clafusion.errors import FusionError
from clafusion.tracing.exporting import Capture, module_path, operation_of
from clafusion.tracing.signatures import TRANSPARENT, signature_of, source_of
from clafusion.tracing.spaces import Spaces
from clafusion.tracing.structure import Layer, Transition, Unit

LAYERS = frozenset(("linear", "conv1d", "conv2d", "conv3d"))
NORMS = frozenset(("batch_norm", "layer_norm", "group_norm", "rms_norm", "instance_norm"))
ADDITIONS = frozenset(("add",))
ACTIVATIONS = frozenset(
    ("relu", "relu6", "leaky_relu", "gelu", "silu", "elu", "celu", "selu", "hardswish", "hardtanh", "hardsigmoid")
    + ("mish", "tanh", "sigmoid", "softplus", "clamp", "clamp_min", "prelu")
)
#: What they let through they leave as it is: applied twice, they are applied once.
IDEMPOTENT = frozenset(("relu", "relu6", "hardtanh", "clamp", "clamp_min"))
#: Operations that only move entries about.
_MOVES = frozenset(
    ("reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "flatten", "unflatten", "select", "slice", "roll")
    + ("split", "chunk", "unbind", "split_with_sizes", "expand", "getitem", "movedim", "to", "_to_copy", "type_as")
)
#: Operations that give zero for zero, one operand given.
_ZERO_FOR_ZERO = (
    _MOVES
    | TRANSPARENT
    | frozenset(
        ("relu", "relu6", "gelu", "silu", "tanh", "hardswish", "leaky_relu", "elu", "mish", "neg", "mean", "sum", "pad")
        + ("constant_pad_nd", "avg_pool2d", "max_pool2d", "adaptive_avg_pool2d")
        + ("upsample_nearest2d", "upsample_bilinear2d")
    )
)
#: By operation the positions of weight and bias.
_AFFINE: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(("linear", "conv1d", "conv2d", "conv3d", "batch_norm"), (1, 2)),
    **dict.fromkeys(("layer_norm", "group_norm", "rms_norm"), (2, 3)),
}


def find_units(capture: Capture, spaces: Spaces) -> tuple[tuple[tuple[Unit, ...], ...], dict[str, Transition]]:
    """Cut a captured network into units and transitions, and group the units into stages.

    Args:
        capture: the network.
        spaces: its neurons.

    Returns:
        The stages, and by the name of a unit what lies between the unit before it and it.

    Raises:
        FusionError: if there is no layer at all.
    """
    graph = _Graph.of(capture, spaces)
    drafts, transitions = _drafts(graph)
    units = [_unit(graph, draft) for draft in drafts]
    if not any(unit.layers for unit in units):
        raise FusionError("Expected a network with a Linear or a convolution, got none")
    named = {unit.name: graph.transition(nodes) for unit, nodes in zip(units, transitions, strict=True)}
    output = graph.neurons(capture.logits)

    def key(unit: Unit) -> tuple[object, ...]:
        is_head = bool(output) and output == graph.neurons(unit.output)
        return unit.kind, unit.resolution, is_head

    stages: list[list[Unit]] = []
    for unit in units:
        if not stages or named[unit.name].nodes or key(stages[-1][-1]) != key(unit):
            stages.append([])
        stages[-1].append(unit)
    return tuple(map(tuple, stages)), named


def unwritten(capture: Capture, spaces: Spaces) -> frozenset[str]:
    """The spaces that no layer writes, such as that of register tokens: nothing is known by which to compare them."""
    written: set[str | None] = set()
    for node in capture.graph.nodes:
        if operation_of(node) in LAYERS:
            weight = str(node.args[1])
            axes = spaces.axes.get(capture.names.get(weight, "")) or spaces.of_node(weight) or (None,)
            written.update(() if axes[0] is None else axes[0].spaces)
    for name in list(written):
        while name is not None:
            name = spaces.spaces[name].parent
            written.add(name)
    return frozenset(name for name in spaces.spaces if name not in written)


@dataclass
class _Draft:
    """A unit under construction: the nodes between two cut points, and those behind that go with it."""

    source: fx.Node
    nodes: list[fx.Node]
    tail: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class _Graph:
    """A captured graph with what its nodes are.

    Attributes:
        capture: the network.
        spaces: its neurons.
        data: the nodes that depend on the input, in graph order.
    """

    capture: Capture
    spaces: Spaces
    data: Mapping[fx.Node, None]

    @classmethod
    def of(cls, capture: Capture, spaces: Spaces) -> "_Graph":
        found: dict[fx.Node, None] = {}
        for node in capture.graph.nodes:
            value = node.meta.get("val")
            is_data = isinstance(value, Tensor | list | tuple) and any(used in found for used in node.all_input_nodes)
            if node.name == capture.entry or (node.op == "call_function" and is_data):
                found[node] = None
        return cls(capture, spaces, found)

    def parameters(self, nodes: Sequence[fx.Node]) -> tuple[str, ...]:
        """The parameters and running statistics that nodes use, also by way of what is computed from these alone."""
        found: dict[str, None] = {}

        def visit(node: fx.Node) -> None:
            for used in node.all_input_nodes:
                name = self.capture.names.get(used.name)
                if name is not None and (name in self.capture.parameters or name in self.spaces.axes):
                    found[name] = None
                elif used not in self.data and used.op == "call_function":
                    visit(used)

        for node in nodes:
            visit(node)
        return tuple(found)

    def computed(self, nodes: Sequence[fx.Node]) -> list[fx.Node]:
        """The nodes, in graph order, that compute something for others from parameters and constants alone."""
        found: set[fx.Node] = set()
        waiting = [used for node in nodes for used in node.all_input_nodes]
        while waiting:
            node = waiting.pop()
            is_tensor = isinstance(node.meta.get("val"), Tensor | list | tuple)
            if node not in self.data and node not in found and node.op == "call_function" and is_tensor:
                found.add(node)
                waiting.extend(node.all_input_nodes)
        return [node for node in self.capture.graph.nodes if node in found and operation_of(node) not in TRANSPARENT]

    def neurons(self, node: str) -> tuple[object, ...]:
        """The spaces and the dimensions of the neurons of a node's output."""
        axes = self.spaces.of_node(node) or ()
        return tuple((dim, axis.spaces) for dim, axis in enumerate(axes) if axis is not None)

    def transition(self, nodes: Sequence[fx.Node]) -> Transition:
        return Transition(tuple(node.name for node in nodes), signature_of(nodes, self.capture))

    def segments(self) -> Iterator[list[fx.Node]]:
        """Split the nodes at the cut points: after the last node of each segment its tensor alone is alive."""
        position = {node: place for place, node in enumerate(self.data)}
        end = len(self.data)
        segment: list[fx.Node] = []
        furthest = 0  # the last position at which anything before the current node is still needed
        for place, node in enumerate(self.data):
            segment.append(node)
            users = [position.get(user, end if user.op == "output" else -1) for user in node.users]
            if furthest <= place and isinstance(node.meta["val"], Tensor):
                yield segment
                segment = []
            furthest = max(furthest, max(users, default=place))
        if segment:
            yield segment


def _drafts(graph: _Graph) -> tuple[list[_Draft], list[list[fx.Node]]]:
    """The units, and before each of them the nodes of the transition that leads to it."""
    drafts: list[_Draft] = []
    transitions: list[list[fx.Node]] = []
    waiting: list[fx.Node] = []
    source = next(iter(graph.data))
    for segment in list(graph.segments())[1:]:
        nodes = [node for node in segment if operation_of(node) not in TRANSPARENT]
        names = {operation_of(node) for node in nodes}
        joins = drafts and not waiting and _goes_along(graph, drafts[-1], nodes)
        if names & LAYERS or (graph.parameters(nodes) and not joins):
            drafts.append(_Draft(source, nodes))
            transitions.append(waiting)
            waiting = []
        elif joins:
            drafts[-1].tail.extend(nodes)
        else:
            waiting.extend(nodes)
        source = segment[-1]
    return drafts, transitions


def _goes_along(graph: _Graph, before: _Draft, nodes: Sequence[fx.Node]) -> bool:
    """Whether nodes belong to the unit before them: an activation, or a BatchNorm behind layers in a row."""
    if any(operation_of(node) in LAYERS for node in nodes):
        return False
    for node in nodes:
        name = operation_of(node)
        same = node.meta["shape"] == node.all_input_nodes[0].meta["shape"]
        if not same or "pool" in name or "pad" in name or name in _MOVES or (name in NORMS and name != "batch_norm"):
            return False
    residual = any(operation_of(node) in ADDITIONS for node in before.nodes)
    return not (residual and graph.parameters(nodes))


def _unit(graph: _Graph, draft: _Draft) -> Unit:
    nodes = [*draft.nodes, *draft.tail]
    layers = _Layers(graph, nodes).found(nodes)
    parameters = graph.parameters(nodes)
    computed = graph.computed(nodes)
    output = nodes[-1]
    addition = _last_addition(graph, draft)
    closing = _closing(graph, draft, addition) if addition is not None else ()
    kind = "residual" if addition is not None else "plain" if layers else "other"
    name = layers[0].name if layers else _owner(parameters[0])
    return Unit(
        name=name,
        kind=kind,
        layers=layers,
        beside=_Layers(graph, computed).found(computed),
        parameters=parameters,
        nodes=tuple(node.name for node in (*computed, *nodes)),
        signature=signature_of([*computed, *nodes], graph.capture),
        input=source_of(draft.source).name,
        output=output.name,
        closing=closing,
        features=_features(nodes, layers, addition),
        resolution=_resolution(graph, output.name),
        insertable=bool(closing) if kind == "residual" else _can_be_identity(graph, draft, layers),
    )


def _features(nodes: Sequence[fx.Node], layers: Sequence[Layer], addition: fx.Node | None) -> str:
    """The node of the features of a unit as a whole, before its last activation."""
    branch = [layer for layer in layers if not layer.shortcut]
    return addition.name if addition is not None else branch[-1].pre if branch else nodes[-1].name


def _owner(parameter: str) -> str:
    """The path of the module of a parameter; a parameter of the network itself is named."""
    return parameter.rpartition(".")[0] or parameter


def _resolution(graph: _Graph, name: str) -> tuple[int, ...]:
    """The sizes of a tensor without samples and neurons."""
    node = next(node for node in graph.data if node.name == name)
    axes = graph.spaces.of_node(name) or (None,) * len(node.meta["shape"])
    sizes = zip(node.meta["shape"], axes, strict=True)
    kept = [size for dim, (size, axis) in enumerate(sizes) if axis is None and dim not in node.meta["batch"]]
    # Logits and vectors whose neurons are fixed have a width and no resolution.
    return () if len(axes) == 2 else tuple(kept)


def _can_be_identity(graph: _Graph, draft: _Draft, layers: Sequence[Layer]) -> bool:
    """Whether a plain unit can pass its input on: one layer that keeps the shape, and nothing that changes it."""
    if len(layers) != 1 or layers[0].kind == "grouped" or layers[0].weight is None:
        return False
    others = [node for node in (*draft.nodes, *draft.tail) if node.name != layers[0].node]
    if any(operation_of(node) not in IDEMPOTENT | {"batch_norm"} for node in others):
        return False
    source, end = draft.source, (*draft.nodes, *draft.tail)[-1]
    before, after = graph.neurons(source.name), graph.neurons(end.name)
    axis = (graph.spaces.axes[layers[0].weight][1:2] or (None,))[0]
    repeated = axis is not None and bool(axis.turn.any())
    depthwise = layers[0].kind == "depthwise"
    return (
        len(before) == len(after) == 1
        and source.meta["shape"][2:] == end.meta["shape"][2:]
        and (depthwise or (axis is not None and len(axis.spaces) == 1 and not repeated and bool((axis.of == 0).all())))
    )


def _is_data_sum(graph: _Graph, node: fx.Node) -> bool:
    operands = [used for used in node.args[:2] if isinstance(used, fx.Node) and used in graph.data]
    return operation_of(node) in ADDITIONS and len(operands) == 2


def _last_addition(graph: _Graph, draft: _Draft) -> fx.Node | None:
    """The addition that ends a residual unit: behind it there is nothing but activations."""
    for node in reversed(draft.nodes):
        if _is_data_sum(graph, node):
            return node
        if operation_of(node) not in ACTIVATIONS:
            return None
    return None


def _closing(graph: _Graph, draft: _Draft, addition: fx.Node) -> tuple[str, ...]:
    """The parameters that make the branch zero, so that the unit is its input; empty where there are none such."""
    behind = draft.nodes[draft.nodes.index(addition) + 1 :] + draft.tail
    if any(operation_of(node) not in IDEMPOTENT for node in behind):
        return ()
    one, other = addition.args[:2]
    for shortcut, branch in ((one, other), (other, one)):
        assert isinstance(shortcut, fx.Node) and isinstance(branch, fx.Node)
        if source_of(shortcut) is source_of(draft.source) and len(graph.neurons(addition.name)) == 1:
            found = _zeroed(graph, branch)
            if found is not None and not _used_elsewhere(graph, found):
                return found
    return ()


def _used_elsewhere(graph: _Graph, names: Sequence[str]) -> bool:
    """Whether a parameter has a second use, so that zero in its place would silence more than one branch."""
    return any(len(node.users) > 1 for node in graph.capture.graph.nodes if graph.capture.names.get(node.name) in names)


def _zeroed(graph: _Graph, node: fx.Node) -> tuple[str, ...] | None:
    """The parameters to set to zero for a node to give zero; None if no way is known."""
    name, names = operation_of(node), graph.capture.names
    if name in _AFFINE:
        at = _AFFINE[name]
        used = [node.args[place] for place in at if place < len(node.args)]
        tensors = [one for one in used if isinstance(one, fx.Node)]
        known = [names.get(one.name) for one in tensors]
        return tuple(map(str, known)) if known and all(one in graph.capture.parameters for one in known) else None
    operands = node.all_input_nodes
    if name == "mul":
        factors = [names.get(behind.name) for behind in map(_behind_moves, operands)]
        scale = next((one for one in factors if one in graph.capture.parameters), None)
        return (scale,) if scale is not None else next((z for z in (_zeroed(graph, o) for o in operands) if z), None)
    if name == "div":
        return _zeroed(graph, operands[0])
    if name in ADDITIONS or name == "cat":
        parts = [_zeroed(graph, one) for one in operands]
        return None if not parts or any(part is None for part in parts) else sum(map(tuple, parts), ())  # type: ignore
    return _zeroed(graph, operands[0]) if name in _ZERO_FOR_ZERO and operands else None


def _behind_moves(node: fx.Node) -> fx.Node:
    """The node whose entries a node moves about."""
    while operation_of(node) in _MOVES | TRANSPARENT:
        node = node.all_input_nodes[0]
    return node


class _Layers:
    """Finds the layers of one unit, and where their outputs go."""

    def __init__(self, graph: _Graph, nodes: Sequence[fx.Node]) -> None:
        self.graph = graph
        self.inside = set(nodes)
        self.paths: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self.shortcuts: set[fx.Node] = set()
        for node in nodes:
            self.paths[node] = self._path(node)

    def found(self, nodes: Sequence[fx.Node]) -> tuple[Layer, ...]:
        """The layers, in forward order."""
        return tuple(self._layer(node) for node in nodes if operation_of(node) in LAYERS)

    def _path(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The layers and norms that lie between the unit's input and a node; notes which lie on a shortcut."""
        before = [self.paths.get(source_of(used), ()) for used in node.all_input_nodes]
        if _is_data_sum(self.graph, node):
            shortcut, branch = sorted(before[:2], key=len)
            self.shortcuts.update(set(shortcut) - set(branch))
            return tuple(dict.fromkeys((*shortcut, *branch)))
        own = (node,) if operation_of(node) in LAYERS | NORMS else ()
        return (*max(before, key=len, default=()), *own)

    def _layer(self, node: fx.Node) -> Layer:
        names = self.graph.capture.names
        weight, bias = ((*node.args, None, None)[at] for at in (1, 2))
        name = names.get(weight.name) if isinstance(weight, fx.Node) else None
        if name not in self.graph.capture.parameters:
            name = None
        norm = self._folded_norm(node)
        shortcut = node in self.shortcuts
        total, scale = self._total(norm or node)
        pre = (norm or node) if total is None or shortcut else total
        follower = _only_user(pre)
        activation = operation_of(follower) if follower is not None and not shortcut else ""
        rectifies = follower is not None and activation in ACTIVATIONS
        return Layer(
            name=_owner(name) if name is not None else module_path(node) or node.name,
            kind=_kind(node),
            node=node.name,
            input=node.all_input_nodes[0].name,
            weight=name,
            bias=names.get(bias.name) if isinstance(bias, fx.Node) else None,
            norm=None if norm is None else norm.name,
            shortcut=shortcut,
            total=None if total is None else total.name,
            scale=scale,
            pre=pre.name,
            post=follower.name if rectifies and follower is not None else pre.name,
            activation=_activation(follower) if rectifies and follower is not None else None,
        )

    def _folded_norm(self, node: fx.Node) -> fx.Node | None:
        """The BatchNorm directly behind a layer, with statistics and parameters of its own."""
        user = _only_user(node)
        names = self.graph.capture.names
        if user is None or operation_of(user) != "batch_norm" or source_of(user.all_input_nodes[0]) is not node:
            return None
        own = [one.name in names for one in user.args[1:5] if isinstance(one, fx.Node)]
        return user if len(own) == 4 and all(own) else None

    def _total(self, node: fx.Node) -> tuple[fx.Node | None, str | None]:
        """The sum that a layer ends in, and the name of the parameter that scales its output before."""
        scale: str | None = None
        total: fx.Node | None = None
        while (user := _only_user(node)) is not None and user in self.inside:
            operation = operation_of(user)
            if _is_data_sum(self.graph, user) and len(user.args) == 2 and not user.kwargs:
                total = user
            elif total is not None:
                break
            elif operation == "mul" and scale is None:
                factors = [self.graph.capture.names.get(_behind_moves(one).name) for one in user.all_input_nodes]
                scale = next((one for one in factors if one in self.graph.capture.parameters), None)
                if scale is None:
                    break
            elif operation not in _MOVES | TRANSPARENT or not isinstance(user.meta["val"], Tensor):
                break
            node = user
        return (total, scale) if total is not None else (None, None)


def _only_user(node: fx.Node) -> fx.Node | None:
    """The node that alone reads a node, seen through operations that give their input."""
    while len(node.users) == 1:
        user = next(iter(node.users))
        if operation_of(user) not in TRANSPARENT:
            return user if user.op != "output" else None
        node = user
    return None


def _activation(node: fx.Node) -> str:
    """The name of an activation; what lets nothing negative through has `relu` in it."""
    name = operation_of(node)
    floor = (*node.args, None, None)[1]
    return f"relu ({name})" if name in ("hardtanh", "clamp", "clamp_min") and floor == 0 else name


def _kind(node: fx.Node) -> str:
    if operation_of(node) == "linear":
        return "linear"
    groups = node.args[6] if len(node.args) > 6 else 1
    inputs = node.args[1].meta["shape"][1]  # type: ignore[union-attr]
    return "conv" if groups == 1 else "depthwise" if inputs == 1 else "grouped"
