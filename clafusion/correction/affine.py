"""A weighted layer with the norm behind it folded in: in eval mode one affine map, to be read and written."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clafusion.tracing.operations import is_norm
from clafusion.tracing.parameters import state_of
from clafusion.tracing.structure import Layer, Structure


@dataclass(frozen=True)
class FoldedLayer:
    """`y = W x + b`, computed by a Linear or Conv2d and perhaps a BatchNorm behind it.

    Attributes:
        module: the Linear or Conv2d.
        norm: the BatchNorm that follows, or None.
        input: the graph node that it reads.
        output: the graph node of y.
    """

    module: nn.Linear | nn.Conv2d
    norm: nn.BatchNorm1d | nn.BatchNorm2d | None
    input: str
    output: str

    @property
    def has_bias(self) -> bool:
        """Whether b can be other than zero."""
        return self.norm is not None or self.module.bias is not None

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for a Linear."""
        return self.module.groups if isinstance(self.module, nn.Conv2d) else 1

    @property
    def fan_in(self) -> int:
        """Inputs of one neuron."""
        return self.module.weight[0].numel()

    def read(self) -> tuple[Tensor, Tensor]:
        """W [neurons, fan-in] and b [neurons], float64."""
        weight = self.module.weight.detach().double().flatten(1)
        bias = weight.new_zeros(len(weight)) if self.module.bias is None else self.module.bias.detach().double()
        if self.norm is None:
            return weight, bias
        state = {name: tensor.double() for name, tensor in state_of(self.norm).items()}
        gain = state["weight"] / (state["running_var"] + self.norm.eps).sqrt()
        return gain[:, None] * weight, state["bias"] + gain * (bias - state["running_mean"])

    def write(self, weight: Tensor, bias: Tensor, moments: tuple[Tensor, Tensor] | None) -> None:
        """Overwrite the layer in place so that it computes `weight x + bias`.

        Args:
            weight: [neurons, fan-in].
            bias: [neurons]; must be zero where the layer cannot hold one.
            moments: mean and variance of `weight x` over the samples; they become the norm's running statistics, so
                that training goes on smoothly. None where there is no norm.
        """
        with torch.no_grad():
            self.module.weight.copy_(weight.reshape(self.module.weight.shape))
            if self.norm is None or moments is None:
                if self.module.bias is not None:
                    self.module.bias.copy_(bias)
                return
            if self.module.bias is not None:
                self.module.bias.zero_()
            state = state_of(self.norm)
            state["running_mean"].copy_(moments[0])
            state["running_var"].copy_(moments[1].clamp_min(0))
            # Weight and bias undo the stored mean and variance, their rounding included.
            state["weight"].copy_((state["running_var"].double() + self.norm.eps).sqrt())
            state["bias"].copy_(state["running_mean"].double() + bias)


def folded_layer(structure: Structure, layer: Layer) -> FoldedLayer:
    """A layer of a structure with the norm that follows it directly; writing to it changes the network."""
    modules = dict(structure.module.named_modules())
    node = next(node for node in structure.module.graph.nodes if node.name == layer.node)
    user = next(iter(node.users))
    followed = len(node.users) == 1 and is_norm(user, modules)
    norm = cast(nn.BatchNorm2d, modules[str(user.target)]) if followed else None
    return FoldedLayer(
        cast(nn.Conv2d, modules[layer.name]), norm, node.all_input_nodes[0].name, user.name if followed else node.name
    )


def design_rows(module: nn.Linear | nn.Conv2d, inputs: Tensor, observations: Tensor) -> Tensor:
    """The inputs of the neurons of a layer at some observations: what each output is a linear function of.

    Args:
        module: a Linear, or a Conv2d of any kernel, stride, padding, dilation and grouping.
        inputs: a batch of its inputs.
        observations: their indices; they are counted sample by sample, then by output row and column.

    Returns:
        [observations, groups, fan-in].
    """
    if isinstance(module, nn.Linear):
        return inputs[observations, None, :]
    left, right, top, bottom = _padding(module)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, (left, right, top, bottom), mode=mode)
    height, width = (
        (extent - dilation * (kernel - 1) - 1) // stride + 1
        for extent, kernel, stride, dilation in zip(
            padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True
        )
    )
    sample, y, x = observations // (height * width), observations // width % height, observations % width
    offsets = [
        torch.arange(kernel, device=inputs.device) * dilation
        for kernel, dilation in zip(module.kernel_size, module.dilation, strict=True)
    ]
    rows = (y * module.stride[0])[:, None, None] + offsets[0][None, :, None]
    columns = (x * module.stride[1])[:, None, None] + offsets[1][None, None, :]
    patches = padded.movedim(1, -1)[sample[:, None, None], rows, columns]  # [observations, kernel, kernel, channels]
    return patches.movedim(-1, 1).reshape(len(observations), module.groups, -1)


def _padding(module: nn.Conv2d) -> tuple[int, int, int, int]:
    """Left, right, top, bottom."""
    if isinstance(module.padding, str):
        return tuple(module._reversed_padding_repeated_twice)  # type: ignore[return-value]
    vertical, horizontal = module.padding
    return horizontal, horizontal, vertical, vertical
