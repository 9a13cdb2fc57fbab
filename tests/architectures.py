"""Random architectures, drawn by hypothesis: what the properties of fusion are tried on."""

from dataclasses import dataclass, field

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.helpers import randomised

#: Activations that an identity passes, and such that it does not.
RECTIFIERS = (nn.ReLU, nn.ReLU6)
ACTIVATIONS = (*RECTIFIERS, nn.LeakyReLU, nn.GELU, nn.Tanh)
CLASSES = 4
FEATURES = 6
IMAGE = (2, 8, 8)


@dataclass(frozen=True)
class Drawn:
    """A network to be, and the samples that it reads.

    Attributes:
        layers: a recipe: constructors with their arguments, nested for residual blocks.
        shape: of one sample.
    """

    layers: tuple
    shape: tuple[int, ...]

    def build(self, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
        """The network with live neurons, in eval mode."""
        return randomised(nn.Sequential(*map(_layer, self.layers)), seed, dtype)

    def samples(self, count: int, seed: int = 0) -> Tensor:
        """Inputs in float64."""
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Residual(nn.Module):
    """`act(branch(x) + shortcut(x))`."""

    def __init__(self, branch: tuple, shortcut: tuple, act: tuple) -> None:
        super().__init__()
        self.branch, self.shortcut, self.act = (nn.Sequential(*map(_layer, part)) for part in (branch, shortcut, act))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.branch(x) + self.shortcut(x))


def _layer(recipe: tuple) -> nn.Module:
    make, arguments, options = recipe
    return make(*arguments, **dict(options))


def _of(make: type, *arguments, **options) -> tuple:
    return make, arguments, tuple(options.items())


def _padded(size: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass
class _Recipe:
    """A chain under construction: its layers, and what the last of them gives."""

    width: int
    size: int = 0
    layers: list[tuple] = field(default_factory=list)

    def conv(self, width: int, kernel: int, bias: bool, norm: bool, act: type | None, **geometry) -> None:
        self.layers.append(_of(nn.Conv2d, self.width, width, kernel, bias=bias, **geometry))
        geometry.pop("padding_mode", None)
        geometry.pop("groups", None)
        self.size = _padded(self.size, kernel, **{"stride": 1, "padding": 0, **geometry})
        self.width = width
        self.layers += [_of(nn.BatchNorm2d, width)] if norm else []
        self.layers += [_of(act)] if act else []

    def dense(self, width: int, bias: bool, norm: bool, act: type | None) -> None:
        self.layers.append(_of(nn.Linear, self.width, width, bias=bias))
        self.width = width
        self.layers += [_of(nn.BatchNorm1d, width)] if norm else []
        self.layers += [_of(act)] if act else []

    def flatten(self, whole: bool) -> None:
        self.layers += [] if whole else [_of(nn.AdaptiveAvgPool2d, 1)]
        self.layers.append(_of(nn.Flatten))
        self.width *= self.size**2 if whole else 1

    def pool(self, kind: type) -> None:
        if self.size >= 2:
            self.layers.append(_of(kind, 2))
            self.size //= 2


flags = st.booleans()
widths = st.integers(2, 6)
activations = st.sampled_from(ACTIVATIONS)


@st.composite
def perceptrons(draw) -> Drawn:
    """A chain of Linear layers, each with or without bias, norm and activation of its own."""
    recipe = _Recipe(FEATURES)
    for _ in range(draw(st.integers(1, 4))):
        recipe.dense(draw(widths), draw(flags), draw(flags), draw(activations))
    recipe.dense(CLASSES, draw(flags), False, None)
    return Drawn(tuple(recipe.layers), (FEATURES,))


@st.composite
def convolutions(draw) -> Drawn:
    """A chain of convolutions of any geometry, depth-wise ones and pooling between them, flattened or averaged."""
    recipe = _Recipe(IMAGE[0], IMAGE[1])
    for number in range(draw(st.integers(1, 3))):
        kernel, dilation, padding = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(0, 2))
        reach = dilation * (kernel - 1)
        padding = max(padding, -((recipe.size - reach - 1) // 2), 0)
        mode = draw(st.sampled_from(["zeros", "reflect", "circular"])) if padding < recipe.size else "zeros"
        geometry = {"stride": draw(st.integers(1, 2)), "padding": padding, "dilation": dilation}
        depthwise = number > 0 and draw(flags)
        width = recipe.width if depthwise else draw(widths)
        recipe.conv(
            width, kernel, draw(flags), draw(flags), draw(activations), padding_mode=mode,
            groups=width if depthwise else 1, **geometry,
        )  # fmt: skip
        if draw(flags):
            recipe.pool(draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d])))
    recipe.flatten(draw(flags))
    if draw(flags):
        recipe.dense(draw(widths), draw(flags), draw(flags), draw(activations))
    recipe.dense(CLASSES, draw(flags), False, None)
    return Drawn(tuple(recipe.layers), IMAGE)


def _block(
    inputs: int, inner: int, outputs: int, stride: int, depth: int, bias: bool, norm: bool, depthwise: bool, act: tuple
) -> tuple:
    """A residual block whose branch has `depth` dense convolutions; a projection where the shapes ask for one."""
    branch, shortcut = _Recipe(inputs, IMAGE[1]), _Recipe(inputs, IMAGE[1])
    for _ in range(depth - 1):
        branch.conv(inner, 3, bias, norm, nn.ReLU, padding=1)
    if depthwise:
        branch.conv(branch.width, 3, bias, norm, nn.ReLU, padding=1, groups=branch.width)
    branch.conv(outputs, 3, bias, norm, None, padding=1, stride=stride)
    if stride > 1 or inputs != outputs:
        shortcut.conv(outputs, 1, bias, norm, None, stride=stride)
    return _of(Residual, tuple(branch.layers), tuple(shortcut.layers), act)


@st.composite
def residuals(draw) -> Drawn:
    """Residual blocks behind a stem, with and without projection, norms, depth-wise layers and a last activation."""
    recipe = _Recipe(IMAGE[0], IMAGE[1])
    recipe.conv(draw(widths), 3, draw(flags), draw(flags), nn.ReLU, padding=1)
    for _ in range(draw(st.integers(1, 3))):
        outputs, stride = draw(st.one_of(st.just(recipe.width), widths)), draw(st.integers(1, 2))
        block = _block(
            recipe.width, draw(widths), outputs, stride, draw(st.integers(1, 3)), draw(flags), draw(flags), draw(flags),
            (_of(nn.ReLU),) if draw(flags) else (),
        )  # fmt: skip
        recipe.layers.append(block)
        recipe.width, recipe.size = outputs, _padded(recipe.size, 3, stride, 1)
    recipe.flatten(draw(flags))
    recipe.dense(CLASSES, draw(flags), False, None)
    return Drawn(tuple(recipe.layers), IMAGE)


def architectures() -> st.SearchStrategy[Drawn]:
    """Any of them."""
    return st.one_of(perceptrons(), convolutions(), residuals())


def _deep_and_shallow(draw, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Widths per stage of a deeper and a shallower network."""
    deep = [draw(st.lists(widths, min_size=1, max_size=4)) for _ in range(count)]
    return deep, [draw(st.lists(widths, min_size=1, max_size=len(stage))) for stage in deep]


@st.composite
def perceptron_pairs(draw) -> tuple[Drawn, Drawn]:
    """A deeper and a shallower chain of Linear layers, of other widths."""
    bias, norm, act = draw(flags), draw(flags), draw(st.sampled_from(RECTIFIERS))
    found = []
    for (hidden,) in _deep_and_shallow(draw, 1):
        recipe = _Recipe(FEATURES)
        for width in hidden:
            recipe.dense(width, bias, norm, act)
        recipe.dense(CLASSES, bias, False, None)
        found.append(Drawn(tuple(recipe.layers), (FEATURES,)))
    return found[0], found[1]


@st.composite
def convolution_pairs(draw) -> tuple[Drawn, Drawn]:
    """A deeper and a shallower chain of convolutions with the same stages, of other widths."""
    bias, norm, act, whole = draw(flags), draw(flags), draw(st.sampled_from(RECTIFIERS)), draw(flags)
    kernels = [(draw(st.sampled_from([1, 3])), draw(st.integers(1, 2))) for _ in range(2)]
    found = []
    for stages in _deep_and_shallow(draw, 2):
        recipe = _Recipe(IMAGE[0], IMAGE[1])
        for stage, (kernel, dilation) in zip(stages, kernels, strict=True):
            for width in stage:
                recipe.conv(width, kernel, bias, norm, act, padding=dilation * (kernel // 2), dilation=dilation)
            recipe.pool(nn.MaxPool2d)
        recipe.flatten(whole)
        recipe.dense(CLASSES, bias, False, None)
        found.append(Drawn(tuple(recipe.layers), IMAGE))
    return found[0], found[1]


@st.composite
def residual_pairs(draw) -> tuple[Drawn, Drawn]:
    """A deeper and a shallower residual network with the same stages, of other widths."""
    bias, norm, depth, depthwise = draw(flags), draw(flags), draw(st.integers(1, 3)), draw(flags)
    found = []
    for stages in _deep_and_shallow(draw, 2):
        recipe = _Recipe(IMAGE[0], IMAGE[1])
        recipe.conv(stages[0][0], 3, bias, norm, nn.ReLU, padding=1)
        for number, inner in enumerate(stages):
            for place, width in enumerate(inner):
                outputs, stride = recipe.width + (number and place == 0), 2 if number and place == 0 else 1
                recipe.layers.append(
                    _block(recipe.width, width, outputs, stride, depth, bias, norm, depthwise, (_of(nn.ReLU),))
                )
                recipe.width, recipe.size = outputs, _padded(recipe.size, 3, stride, 1)
        recipe.flatten(False)
        recipe.dense(CLASSES, bias, False, None)
        found.append(Drawn(tuple(recipe.layers), IMAGE))
    return found[0], found[1]


def pairs() -> st.SearchStrategy[tuple[Drawn, Drawn]]:
    """A deeper and a shallower network that can be balanced."""
    return st.one_of(perceptron_pairs(), convolution_pairs(), residual_pairs())
