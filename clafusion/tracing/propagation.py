"""One pass over a captured graph, node by node: what every tensor's channels mean, and where units begin and end."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx, nn

from clafusion.errors import FusionError
from clafusion.tracing import operations as ops
from clafusion.tracing.capture import segments


@dataclass(frozen=True)
class Signal:
    """What the channels of a tensor index.

    Attributes:
        space: a neuron space, before the spaces that additions tie are united.
        repeat: consecutive channels per neuron (more than one after a flatten).
        layers: the layers whose own maps, averaged, would move these channels.
        path: the layers passed since the last cut point.
    """

    space: str
    repeat: int = 1
    layers: tuple[str, ...] = ()
    path: tuple[str, ...] = ()


@dataclass
class Propagation:
    """What the pass knows so far; `trace` turns it into frozen values."""

    module: fx.GraphModule
    modules: dict[str, nn.Module]
    nodes: dict[str, fx.Node] = field(default_factory=dict)  # layer -> its node
    signals: dict[fx.Node, Signal] = field(default_factory=dict)
    parents: dict[str, str] = field(default_factory=dict)  # union-find over spaces
    sizes: dict[str, int] = field(default_factory=dict)
    axes: dict[str, tuple[Signal | None, ...]] = field(default_factory=dict)
    tensors: set[int] = field(default_factory=set)  # the identities of the parameters met so far
    kinds: dict[str, str] = field(default_factory=dict)
    spaces: dict[str, str] = field(default_factory=dict)
    shortcuts: set[str] = field(default_factory=set)
    inputs: dict[str, str] = field(default_factory=dict)  # first layer of a unit -> the node that the unit reads
    closing: dict[str, str] = field(default_factory=dict)  # first layer of a residual unit -> its closing layer
    insertable: set[str] = field(default_factory=set)  # first layers of the units that an identity can replace
    units: list[list[str]] = field(default_factory=list)
    output: Signal = field(default_factory=lambda: Signal("input"))

    def root(self, space: str) -> str:
        """The representative of a space after all unions."""
        while self.parents[space] != space:
            space = self.parents[space]
        return space

    def open_space(self, name: str, size: int) -> None:
        """A new space of `size` neurons."""
        self.parents[name], self.sizes[name] = name, size

    def tie(self, one: str, other: str) -> None:
        """Unite two spaces; the one that was opened first represents both."""
        order = list(self.parents)
        first, second = sorted((self.root(one), self.root(other)), key=order.index)
        self.parents[second] = first

    def observation_nodes(self, layer: str, shortcut: bool) -> tuple[fx.Node, fx.Node, str | None]:
        """The nodes of a layer's features before and after the activation, and the activation's name."""
        pre = self.nodes[layer]
        while (user := _only_user(pre)) is not None:
            joins = user.target in ops.ADD_CALLS and not shortcut
            if not (ops.is_norm(user, self.modules) or joins):
                break
            pre = user
            if joins:
                break
        follower = _only_user(pre)
        activation = ops.activation_name(follower, self.modules) if follower is not None and not shortcut else None
        post = pre if activation is None or follower is None else follower
        return pre, post, activation


def propagate(module: fx.GraphModule) -> Propagation:
    """Follow the neurons through a captured graph.

    Raises:
        FusionError: for the first operation or parameter that is not understood, by name.
    """
    found = Propagation(module, dict(module.named_modules()))
    entry = next(node for node in module.graph.nodes if node.op == "placeholder")
    found.open_space("input", entry.meta["shape"][1] if len(entry.meta["shape"]) > 1 else 1)
    for segment in segments(module):
        _pass_segment(found, segment)
    _finish(found)
    return found


def _pass_segment(found: Propagation, segment: Sequence[fx.Node]) -> None:
    """Pass the nodes between two cut points and decide whether they open a unit or continue the last one."""
    before = len(found.nodes)
    source = segment[0].all_input_nodes[0] if segment[0].all_input_nodes else None
    if source in found.signals:
        found.signals[source] = replace(found.signals[source], path=())
    for node in segment:
        found.signals[node] = _signal(found, node)
    names = list(found.nodes)[before:]
    if not any(found.kinds[name] != "norm" for name in names):
        # A norm, an activation or a pooling alone belongs to the unit before it; before the first unit, to the first.
        if names and found.units:
            found.units[-1].extend(names)
        elif names:
            raise FusionError(f"Expected a Linear or Conv2d before {names[0]!r}, got a norm of the network's input")
        return
    additions = [node for node in segment if node.target in ops.ADD_CALLS]
    if additions:
        branch = [name for name in found.signals[segment[-1]].path if name not in found.shortcuts]
        found.closing[names[0]] = branch[-1]
    found.inputs[names[0]] = segment[0].name if source is None else source.name
    if source is not None and _can_be_identity(found, source, segment, names, len(additions)):
        found.insertable.add(names[0])
    found.units.append(names)


def _can_be_identity(
    found: Propagation, source: fx.Node, segment: Sequence[fx.Node], names: list[str], additions: int
) -> bool:
    signal = found.signals[source]
    keeps_resolution = source.meta["shape"][2:] == segment[-1].meta["shape"][2:]
    projected = any(name in found.shortcuts for name in names)
    return signal.space != "input" and signal.repeat == 1 and keeps_resolution and not projected and additions <= 1


def _signal(found: Propagation, node: fx.Node) -> Signal:
    """Return what the channels of a node's output index, given those of its inputs."""
    if node.op == "placeholder":
        return Signal("input")
    inputs = [found.signals[source] for source in node.all_input_nodes if source in found.signals]
    if node.op == "call_module" and ops.is_weighted(node, found.modules):
        return _weighted(found, node, inputs[0])
    if ops.is_norm(node, found.modules):
        return _norm(found, node, inputs[0])
    if node.target in ops.ADD_CALLS and node.op != "get_attr":
        return _add(found, node, inputs)
    if _is_channelwise(found, node):
        return inputs[0]
    if _is_flatten(found, node):
        return _flatten(found, node, inputs[0])
    raise FusionError(
        "Expected layers, activations, pooling, flattening and additions, got "
        f"{ops.operation_name(node, found.modules)} (node {node.name!r}); networks that use it cannot be fused"
    )


def _is_channelwise(found: Propagation, node: fx.Node) -> bool:
    if node.op == "call_module":
        module = found.modules[str(node.target)]
        return isinstance(module, (*ops.ACTIVATIONS, *ops.CHANNELWISE))
    if node.target in ops.ACTIVATION_CALLS or node.target in ops.CHANNELWISE_CALLS:
        return True
    if node.target in ops.MEAN_CALLS:
        source = node.all_input_nodes[0].meta["shape"]
        return len(source) == 4 and node.meta["shape"][:2] == source[:2]
    return False


def _is_flatten(found: Propagation, node: fx.Node) -> bool:
    if node.op == "call_module":
        return isinstance(found.modules[str(node.target)], nn.Flatten)
    return node.target in ops.FLATTEN_CALLS


def _flatten(found: Propagation, node: fx.Node, source: Signal) -> Signal:
    """[samples, channels, ...] becomes [samples, channels x ...]: every neuron is repeated."""
    before, after = node.all_input_nodes[0].meta["shape"], node.meta["shape"]
    if before == after:
        return source
    if len(before) < 2 or after != (before[0], math.prod(before[1:])):
        raise FusionError(
            f"Expected a flatten of everything but the samples, got {ops.operation_name(node, found.modules)} from "
            f"{list(before)} to {list(after)} (node {node.name!r})"
        )
    return replace(source, repeat=source.repeat * math.prod(before[2:]))


def _add(found: Propagation, node: fx.Node, operands: list[Signal]) -> Signal:
    """An addition ties its operands; the operand that passed fewer layers is the shortcut."""
    shapes = [source.meta["shape"] for source in node.all_input_nodes]
    if (
        len(operands) != 2
        or shapes[0] != shapes[1]
        or operands[0].repeat != operands[1].repeat
        or "alpha" in node.kwargs
    ):
        raise FusionError(
            f"Expected an addition of two feature maps of one shape, got shapes {[list(s) for s in shapes]} "
            f"(node {node.name!r})"
        )
    shortcut, branch = sorted(operands, key=lambda signal: len(signal.path))
    if not branch.path:
        raise FusionError(
            f"Expected a residual branch with a layer in it, got an addition without (node {node.name!r})"
        )
    found.shortcuts.update(set(shortcut.path) - set(branch.path))
    found.tie(branch.space, shortcut.space)
    layers = branch.layers + shortcut.layers if shortcut.path else branch.layers
    return replace(branch, layers=layers, path=shortcut.path + branch.path)


def _register(found: Propagation, node: fx.Node, kind: str, axes: dict[str, tuple[Signal | None, ...]]) -> None:
    """Note a layer and the axes of its parameters and buffers."""
    name = str(node.target)
    if name in found.nodes:
        raise FusionError(f"Expected every layer to be used once, got {name!r} twice; give each use its own weights")
    found.nodes[name], found.kinds[name] = node, kind
    module = found.modules[name]
    for key, tensor in (*module.named_parameters(), *module.named_buffers()):
        if key not in axes:
            raise FusionError(f"Expected the plain parameters of {type(module).__name__}, got {name}.{key}")
        if id(tensor) in found.tensors:
            raise FusionError(
                f"Expected every layer to have parameters of its own, got '{name}.{key}' shared with another layer; "
                "give each its own"
            )
        found.tensors.add(id(tensor))
        found.axes[f"{name}.{key}"] = axes[key]


def _weighted(found: Propagation, node: fx.Node, source: Signal) -> Signal:
    name = str(node.target)
    module = found.modules[name]
    if isinstance(module, nn.Conv2d) and module.groups > 1:
        return _depthwise(found, node, module, source)
    if isinstance(module, nn.Linear) and len(node.meta["shape"]) != 2:
        raise FusionError(
            f"Expected {name!r} to read [samples, features], got {list(node.all_input_nodes[0].meta['shape'])}"
        )
    found.open_space(name, node.meta["shape"][1])
    # The path lives within a unit; as an axis a signal needs only what its channels mean.
    out = Signal(name, 1, (name,), (*source.path, name))
    kernel = (None, None) if isinstance(module, nn.Conv2d) else ()
    kind = "conv" if isinstance(module, nn.Conv2d) else "linear"
    _register(found, node, kind, {"weight": (out, source, *kernel), "bias": (out,)})
    found.spaces[name] = name
    return out


def _depthwise(found: Propagation, node: fx.Node, module: nn.Conv2d, source: Signal) -> Signal:
    """A depth-wise convolution has one filter per channel of its input, and so shares its input's space."""
    name = str(node.target)
    if not module.groups == module.in_channels == module.out_channels:
        raise FusionError(
            f"Expected a dense or depth-wise Conv2d, got {name!r} with groups={module.groups} for "
            f"{module.in_channels} to {module.out_channels} channels; grouped convolutions cannot be fused"
        )
    _register(found, node, "depthwise", {"weight": (source, None, None, None), "bias": (source,)})
    found.spaces[name] = source.space
    return replace(source, path=(*source.path, name))


def _norm(found: Propagation, node: fx.Node, source: Signal) -> Signal:
    name = str(node.target)
    module = found.modules[name]
    if not (module.affine and module.track_running_stats):
        raise FusionError(f"Expected BatchNorm with affine parameters and running statistics, got {name!r} without")
    per_neuron = ("weight", "bias", "running_mean", "running_var")
    _register(found, node, "norm", {**dict.fromkeys(per_neuron, (source,)), "num_batches_tracked": ()})
    found.spaces[name] = source.space
    return replace(source, path=(*source.path, name))


def _finish(found: Propagation) -> None:
    """Check what can only be seen at the end: the output."""
    output = next(node for node in found.module.graph.nodes if node.op == "output")
    result = output.args[0]
    shape = result.meta["shape"] if isinstance(result, fx.Node) else None
    if shape is None or len(shape) != 2 or result not in found.signals or not found.units:
        raise FusionError(
            f"Expected a network that returns logits [samples, classes], got {shape or 'no single tensor'}"
        )
    found.output = found.signals[result]


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
