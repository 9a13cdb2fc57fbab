"""Affine layers of a captured network, with the norm or the scale behind them folded in, to be read and written."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from clafusion.tracing.structure import Layer, Structure


@dataclass(frozen=True)
class FoldedLayer:
    """`y = W x + b`, computed by a Linear or a convolution, and perhaps a BatchNorm or a scale per neuron behind it.

    Attributes:
        layer: the layer.
        operation: its graph node.
        weight: W before the norm or the scale, as the network has it.
        bias: b likewise, or None.
        norm: weight, bias, running mean and running variance of the BatchNorm, or None.
        eps: of the BatchNorm.
        scale: the factor of every neuron, [neurons], or None.
    """

    layer: Layer
    operation: fx.Node
    weight: Tensor
    bias: Tensor | None
    norm: tuple[Tensor, Tensor, Tensor, Tensor] | None
    eps: float
    scale: Tensor | None

    @property
    def output(self) -> str:
        """The graph node of y, before the scale."""
        return self.layer.norm or self.layer.node

    @property
    def dim(self) -> int:
        """The dimension of its input and of its output along which neurons lie."""
        return self.layer.dim

    @property
    def has_bias(self) -> bool:
        """Whether b can be other than zero."""
        return self.norm is not None or self.bias is not None

    @property
    def groups(self) -> int:
        """The number of groups of a convolution; 1 for a Linear."""
        groups = (*self.operation.args, *[1] * 7)[6] if self.layer.kind != "linear" else 1
        assert isinstance(groups, int)
        return groups

    @property
    def fan_in(self) -> int:
        """Inputs of one neuron."""
        return self.weight[0].numel()

    def read(self) -> tuple[Tensor, Tensor]:
        """W [neurons, fan-in] and b [neurons], float64."""
        weight = self.weight.detach().double().flatten(1)
        bias = weight.new_zeros(len(weight)) if self.bias is None else self.bias.detach().double()
        if self.norm is not None:
            gain, shift, mean, variance = (tensor.detach().double() for tensor in self.norm)
            factor = gain / (variance + self.eps).sqrt()
            weight, bias = factor[:, None] * weight, shift + factor * (bias - mean)
        if self.scale is not None:
            weight, bias = self.scale.double()[:, None] * weight, self.scale.double() * bias
        return weight, bias

    def write(self, weight: Tensor, bias: Tensor, moments: tuple[Tensor, Tensor] | None) -> None:
        """Overwrite the layer in place so that it computes `weight x + bias`.

        Args:
            weight: [neurons, fan-in].
            bias: [neurons]; must be zero where the layer cannot hold one.
            moments: mean and variance of `weight x` over the samples; they become the norm's running statistics, so
                that training goes on smoothly. None where there is no norm.
        """
        with torch.no_grad():
            if self.scale is not None:
                # A neuron that is scaled to nothing cannot be given anything.
                scale = self.scale.double()
                alive = scale.abs() > torch.finfo(self.scale.dtype).eps * scale.abs().max()
                factor = torch.where(alive, 1 / scale, 0.0)
                before, offset = self.weight.double().flatten(1), 0.0 if self.bias is None else self.bias.double()
                weight = torch.where(alive[:, None], factor[:, None] * weight, before)
                bias = torch.where(alive, factor * bias, offset)
            self.weight.copy_(weight.reshape(self.weight.shape))
            if self.norm is None or moments is None:
                if self.bias is not None:
                    self.bias.copy_(bias)
                return
            if self.bias is not None:
                self.bias.zero_()
            gain, shift, mean, variance = self.norm
            mean.copy_(moments[0])
            variance.copy_(moments[1].clamp_min(0))
            # Weight and bias undo the stored mean and variance, their rounding included.
            gain.copy_((variance.double() + self.eps).sqrt())
            shift.copy_(mean.double() + bias)

    def keep(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Its tensors and copies of them, to undo what is written."""
        tensors = (self.weight, self.bias, *(self.norm or ()))
        return tuple((tensor, tensor.detach().clone()) for tensor in tensors if tensor is not None)


def folded_layer(structure: Structure, layer: Layer, with_scale: bool = False) -> FoldedLayer:
    """A layer of a structure with what follows it directly; writing to it changes the network.

    Args:
        structure: of the network.
        layer: one that has a weight of its own.
        with_scale: whether y is meant behind the scale.
    """
    tensors, names = structure.capture.tensors, structure.capture.names
    nodes = structure.nodes
    assert layer.weight is not None
    norm, eps = None, 0.0
    if layer.norm is not None:
        node = nodes[layer.norm]
        found = [tensors[names[one.name]] for one in node.args[1:5] if isinstance(one, fx.Node)]
        norm, eps = (found[0], found[1], found[2], found[3]), float(node.args[7])  # type: ignore[arg-type]
    scale = tensors[layer.scale].detach().flatten() if with_scale and layer.scale is not None else None
    bias = tensors[layer.bias] if layer.bias is not None else None
    if scale is not None:
        scale = scale.expand(len(tensors[layer.weight]))
    return FoldedLayer(layer, nodes[layer.node], tensors[layer.weight], bias, norm, eps, scale)


def design_rows(part: FoldedLayer, inputs: Tensor, observations: Tensor) -> Tensor:
    """The inputs of the neurons of a layer at some observations: what each output is a linear function of.

    Args:
        part: a Linear, or a convolution of any kernel, stride, padding, dilation and grouping.
        inputs: a batch of its inputs.
        observations: their indices; they are counted in the order of the output without its neurons.

    Returns:
        [observations, groups, fan-in].
    """
    if part.layer.kind == "linear":
        return inputs.flatten(0, -2)[observations, None, :] if inputs.ndim > 2 else inputs[observations, None, :]
    kernel = part.weight.shape[2:]
    stride, padding, dilation = _geometry(part, len(kernel))
    padded = F.pad(inputs, [side for pair in reversed(padding) for side in pair])
    extents = [
        (extent - one_dilation * (one_kernel - 1) - 1) // one_stride + 1
        for extent, one_dilation, one_kernel, one_stride in zip(padded.shape[2:], dilation, kernel, stride, strict=True)
    ]
    rest: Tensor = observations
    places: list[Tensor] = []
    for extent in reversed(extents):
        places.insert(0, rest % extent)
        rest = rest // extent
    index: list[Tensor] = [rest.reshape(-1, *[1] * len(kernel))]
    for dim, (place, one_kernel) in enumerate(zip(places, kernel, strict=True)):
        offsets = torch.arange(one_kernel, device=inputs.device) * dilation[dim]
        shape = [1] * (len(kernel) + 1)
        shape[dim + 1] = one_kernel
        index.append((place * stride[dim]).reshape(-1, *[1] * len(kernel)) + offsets.reshape(shape))
    patches = padded.movedim(1, -1)[tuple(index)]  # [observations, *kernel, channels]
    return patches.movedim(-1, 1).reshape(len(observations), part.groups, -1)


def _geometry(part: FoldedLayer, dims: int) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Stride, padding on both sides, and dilation of a convolution, per dimension."""
    defaults = [[1] * dims, [0] * dims, [1] * dims]
    given = [*part.operation.args[3:6], *defaults[len(part.operation.args[3:6]) :]]
    stride, dilation = (list(one) * (dims if len(one) == 1 else 1) for one in (given[0], given[2]))  # type: ignore[arg-type]
    if isinstance(given[1], str):
        reach = [one * (size - 1) for one, size in zip(dilation, part.weight.shape[2:], strict=True)]
        total = reach if given[1] == "same" else [0] * dims
        return stride, [(one // 2, one - one // 2) for one in total], dilation
    padding = list(given[1]) * (dims if len(given[1]) == 1 else 1)  # type: ignore[arg-type]
    return stride, [(one, one) for one in padding], dilation
