"""Random networks in the manner of their users: every block, norm, activation, shortcut and head that people write.

Each of them fused with itself must be itself, and fused with a copy whose neurons are permuted as well, under every
correction; or it is refused by name. `python -m tests.generated --count 1000` tries many and tells what came of them.
"""

import argparse
import collections
import copy
import random
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clafusion import FusionError, FusionOptions, fuse
from clafusion.balancing.balance import balance
from clafusion.correction.correct import correct
from clafusion.correction.targets import Targets
from clafusion.fusion.averaging import moved_average
from clafusion.tracing.reading import structure_of
from tests.invariance import permuted_copy

CLASSES = 4
TOLERANCE = 1e-4
#: Of `targets=union`: neurons stand for others as far as a ridge regression on 40 samples tells.
POOLED_TOLERANCE = 1e-2


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Residual(nn.Module):
    """`after(branch(x) + shortcut(x))`, written in one of the ways that people write it."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module, after: nn.Module, way: int) -> None:
        super().__init__()
        self.branch, self.shortcut, self.after, self.way = branch, shortcut, after, way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return self.after(self.shortcut(x) + self.branch(x))
        out = self.branch(x)
        if self.way == 1:
            out += self.shortcut(x)
            return self.after(out)
        if self.way == 2:
            return self.after(torch.add(out, self.shortcut(x)))
        return self.after(x.add(out) if isinstance(self.shortcut, nn.Identity) else out + self.shortcut(x))


class Sum(nn.Module):
    """Branches side by side, added up (RepVGG), or joined along the channels (Inception)."""

    def __init__(self, branches: list[nn.Module], join: str) -> None:
        super().__init__()
        self.branches, self.join = nn.ModuleList(branches), join

    def forward(self, x: Tensor) -> Tensor:
        outputs = [branch(x) for branch in self.branches]
        return torch.cat(outputs, 1) if self.join == "cat" else sum(outputs[1:], outputs[0])


class Dense(nn.Module):
    """Every layer reads what all before it gave (DenseNet)."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, 1)))
        return torch.cat(features, 1)


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, width: int, inner: int, act: nn.Module, gate: nn.Module, convs: bool) -> None:
        super().__init__()
        make = (lambda i, o: nn.Conv2d(i, o, 1)) if convs else nn.Linear
        self.down, self.up, self.act, self.gate, self.convs = make(width, inner), make(inner, width), act, gate, convs

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3), keepdim=self.convs)
        scale = self.gate(self.up(self.act(self.down(pooled))))
        return x * (scale if self.convs else scale[:, :, None, None])


class Shuffle(nn.Module):
    """Channel shuffle between groups."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)


class Attention(nn.Module):
    """Self-attention over tokens, by hand, by the fused operation, or by PyTorch's module."""

    def __init__(self, width: int, heads: int, way: int, bias: bool) -> None:
        super().__init__()
        self.heads, self.way = heads, way
        if way == 2:
            self.attention = nn.MultiheadAttention(width, heads, batch_first=True, bias=bias)
        else:
            self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bias), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 2:
            out: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return out
        n, t, c = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        if self.way == 1:
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = ((q * (c // self.heads) ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.proj(out.transpose(1, 2).reshape(n, t, c))


class Gated(nn.Module):
    """A gated MLP (GLU, SwiGLU)."""

    def __init__(self, width: int, inner: int, act: nn.Module, packed: bool) -> None:
        super().__init__()
        self.packed, self.act = packed, act
        self.up = nn.Linear(width, 2 * inner if packed else inner)
        self.gate = nn.Identity() if packed else nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        if self.packed:
            a, b = self.up(x).chunk(2, -1)
            return self.down(self.act(a) * b)
        return self.down(self.act(self.gate(x)) * self.up(x))


class Scale(nn.Module):
    """Layer scale."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(shape) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Tokens(nn.Module):
    """Patches as tokens, with or without a class token, with positions."""

    def __init__(self, width: int, patch: int, size: int, class_token: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.cls = nn.Parameter(torch.randn(1, 1, width)) if class_token else None
        self.positions = nn.Parameter(torch.randn(1, (size // patch) ** 2 + class_token, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        if self.cls is not None:
            x = torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1)
        return x + self.positions


class ChannelsLast(nn.Module):
    """Layers on the last dimension of images (ConvNeXt)."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Heads(nn.Module):
    """Several heads whose logits are added."""

    def __init__(self, heads: list[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, x: Tensor) -> Tensor:
        return sum((head(x) for head in self.heads[1:]), self.heads[0](x))


class Generator:
    """Draws one network."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        torch.manual_seed(seed)

    def network(self) -> tuple[nn.Module, tuple[int, ...]]:
        """A network in evaluation mode, in float64, and the shape of a sample."""
        draw = self.random.choice((self.images, self.images, self.tokens, self.vectors))
        model, shape = draw()
        self.enliven(model.double(), shape)
        return model.eval(), shape

    def enliven(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        """Let no bias be zero, and let norms have the statistics of some samples."""
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn(parameter.shape).double() * 0.1)
            for module in model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.momentum = None
                    module.reset_running_stats()
            model.train()(torch.randn(32, *shape).double())

    def flag(self) -> bool:
        return self.random.random() < 0.5

    def act(self) -> nn.Module:
        kinds: tuple[Callable[[], nn.Module], ...] = (
            lambda: nn.ReLU(inplace=self.flag()), nn.ReLU, nn.ReLU, lambda: nn.ReLU6(inplace=self.flag()), nn.LeakyReLU,
            nn.GELU, lambda: nn.SiLU(inplace=self.flag()), nn.ELU, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Mish,
            nn.Softplus, lambda: Apply(F.relu), lambda: Apply(torch.relu), lambda: Apply(lambda x: x.clamp(min=0)),
            nn.PReLU, lambda: nn.Hardtanh(), lambda: Apply(lambda x: F.gelu(x, approximate="tanh")), nn.Identity,
        )  # fmt: skip
        return self.random.choice(kinds)()

    def norm(self, width: int) -> nn.Module:
        kinds: tuple[Callable[[], nn.Module], ...] = (
            lambda: nn.BatchNorm2d(width), lambda: nn.BatchNorm2d(width), lambda: nn.BatchNorm2d(width), nn.Identity,
            lambda: nn.GroupNorm(1, width), lambda: nn.GroupNorm(2 if width % 2 == 0 else 1, width),
            lambda: nn.InstanceNorm2d(width, affine=True), lambda: ChannelsLast(nn.LayerNorm(width)),
            lambda: nn.BatchNorm2d(width, affine=False),
        )  # fmt: skip
        return self.random.choice(kinds)()

    def conv(self, inputs: int, outputs: int, **more: object) -> nn.Module:
        kernel = self.random.choice((1, 3, 3, 3, 5))
        return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=self.flag(), **more)  # type: ignore[arg-type]

    def layer(self, inputs: int, outputs: int) -> nn.Module:
        """A convolution with its norm and activation in one of the usual orders."""
        order = self.random.randrange(6)
        conv, act = self.conv(inputs, outputs), self.act()
        if order == 0:
            return nn.Sequential(self.norm(inputs), act, conv)
        if order == 1:
            return nn.Sequential(conv, act, self.norm(outputs))
        if order == 2:
            return nn.Sequential(conv, self.norm(outputs), act, nn.Dropout(0.1))
        if order == 3:
            return nn.Sequential(conv, self.norm(outputs), self.norm(outputs), act)
        return nn.Sequential(conv, self.norm(outputs), act)

    def block(self, width: int) -> nn.Module:
        """A block that keeps the width and the size."""
        kinds = (
            self.basic, self.basic, self.bottleneck, self.repvgg, self.inverted, self.convnext, self.convmixer,
            self.gated, self.grouped, self.shuffled, self.skip, self.inception, self.dense, lambda w: self.layer(w, w),
        )  # fmt: skip
        return self.random.choice(kinds)(width)

    def residual(self, branch: nn.Module, width: int) -> nn.Module:
        shortcut: nn.Module = nn.Identity()
        if self.random.random() < 0.3:
            shortcut = nn.Sequential(nn.Conv2d(width, width, 1), *([nn.ReLU()] if self.random.random() < 0.2 else []))
        after = self.random.choice((nn.Identity, nn.ReLU, self.act))()
        return Residual(branch, shortcut, after, self.random.randrange(4))

    def ending(self, width: int) -> list[nn.Module]:
        """How branches end."""
        kinds: tuple[Callable[[], list[nn.Module]], ...] = (
            list, list, lambda: [nn.BatchNorm2d(width)], lambda: [nn.ReLU()], lambda: [nn.Dropout(0.2)],
            lambda: [nn.AvgPool2d(3, 1, 1)], lambda: [Scale((width, 1, 1))], lambda: [nn.BatchNorm2d(width), nn.ReLU()],
        )  # fmt: skip
        return self.random.choice(kinds)()

    def basic(self, width: int) -> nn.Module:
        inner = self.random.choice((width, width + 2))
        return self.residual(
            nn.Sequential(self.layer(width, inner), self.conv(inner, width), *self.ending(width)), width
        )

    def bottleneck(self, width: int) -> nn.Module:
        inner = max(2, width // 2)
        layers = [nn.Conv2d(width, inner, 1), self.norm(inner), nn.ReLU(), self.conv(inner, inner), self.norm(inner)]
        return self.residual(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(inner, width, 1), *self.ending(width)), width)

    def repvgg(self, width: int) -> nn.Module:
        branches: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)),
            nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)),
        ]
        branches += [nn.BatchNorm2d(width)] if self.flag() else []
        return nn.Sequential(Sum(branches, "add"), self.act())

    def inverted(self, width: int) -> nn.Module:
        inner = 2 * width
        layers = [
            nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), self.act(),
            nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False), nn.BatchNorm2d(inner), self.act(),
            *([Gate(inner, 3, nn.ReLU(), nn.Sigmoid(), self.flag())] if self.flag() else []),
            nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width),
        ]  # fmt: skip
        return Residual(nn.Sequential(*layers), nn.Identity(), nn.Identity(), self.random.randrange(4))

    def convnext(self, width: int) -> nn.Module:
        mlp = [nn.LayerNorm(width), nn.Linear(width, 2 * width), self.act(), nn.Linear(2 * width, width)]
        mlp += [Scale((width,))] if self.flag() else []
        depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        return Residual(nn.Sequential(depthwise, ChannelsLast(nn.Sequential(*mlp))), nn.Identity(), nn.Identity(), 0)

    def convmixer(self, width: int) -> nn.Module:
        spatial = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width), self.act(), nn.BatchNorm2d(width))
        return nn.Sequential(
            Residual(spatial, nn.Identity(), nn.Identity(), 0),
            nn.Conv2d(width, width, 1),
            self.act(),
            nn.BatchNorm2d(width),
        )

    def gated(self, width: int) -> nn.Module:
        gate = self.random.choice((nn.Sigmoid, nn.Hardsigmoid))()
        return nn.Sequential(self.layer(width, width), Gate(width, 3, self.act(), gate, self.flag()))

    def grouped(self, width: int) -> nn.Module:
        groups = 2 if width % 2 == 0 else 1
        layers = [nn.Conv2d(width, width, 3, padding=1, groups=groups, bias=self.flag()), self.norm(width), self.act()]
        branch = nn.Sequential(nn.Conv2d(width, width, 1), nn.ReLU(), *layers, nn.Conv2d(width, width, 1))
        return self.residual(branch, width) if self.flag() else nn.Sequential(*layers)

    def shuffled(self, width: int) -> nn.Module:
        groups = 2 if width % 2 == 0 else 1
        return nn.Sequential(
            nn.Conv2d(width, width, 1, groups=groups),
            nn.ReLU(),
            Shuffle(groups),
            nn.Conv2d(width, width, 1, groups=groups),
        )

    def skip(self, width: int) -> nn.Module:
        """A shortcut around a body of blocks."""
        return Residual(nn.Sequential(self.basic(width), self.layer(width, width)), nn.Identity(), nn.Identity(), 0)

    def inception(self, width: int) -> nn.Module:
        half = width // 2
        branches = [self.layer(width, half), nn.Sequential(nn.MaxPool2d(3, 1, 1), self.layer(width, width - half))]
        return Sum(branches, "cat")

    def dense(self, width: int) -> nn.Module:
        layers = [self.layer(width, 2), self.layer(width + 2, 2)]
        return nn.Sequential(Dense(layers), nn.Conv2d(width + 4, width, 1))

    def pool(self) -> nn.Module:
        return self.random.choice((nn.MaxPool2d(2), nn.AvgPool2d(2), nn.MaxPool2d(3, 2, 1), nn.LPPool2d(2, 2)))

    def images(self) -> tuple[nn.Module, tuple[int, ...]]:
        width, size = self.random.choice((4, 6, 8)), 8
        layers: list[nn.Module] = [self.layer(3, width)]
        for _ in range(self.random.randint(1, 3)):
            layers.append(self.block(width))
            if size > 2 and self.random.random() < 0.4:
                layers.append(self.pool())
                size = (
                    (size + 1) // 2
                    if isinstance(layers[-1], nn.MaxPool2d) and layers[-1].kernel_size == 3
                    else size // 2
                )
            if self.random.random() < 0.3:
                wider = width + 2
                layers.append(self.layer(width, wider))
                width = wider
        return nn.Sequential(*layers, self.image_head(width, size)), (3, 8, 8)

    def image_head(self, width: int, size: int) -> nn.Module:
        pooled: tuple[Callable[[], nn.Module], ...] = (
            lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
            lambda: Apply(lambda x: x.mean((2, 3))),
            lambda: Apply(lambda x: x.mean(-1).mean(-1)),
            lambda: Apply(lambda x: x.amax((2, 3))),
            lambda: Apply(lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0]),
            lambda: Apply(lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)),
        )
        kind = self.random.randrange(9)
        pool = self.random.choice(pooled)()
        if kind == 0:
            return nn.Sequential(nn.Flatten(), nn.Linear(width * size * size, 7), self.act(), nn.Linear(7, CLASSES))
        if kind == 1:
            return nn.Sequential(nn.Conv2d(width, CLASSES, 1), pool)
        if kind == 2:
            return nn.Sequential(nn.Conv2d(width, CLASSES, 1), nn.ReLU(), pool)
        if kind == 3:
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, CLASSES, 1), nn.Flatten())
        if kind == 4:
            deep = nn.Sequential(pool, nn.Linear(width, 5), self.act(), nn.Linear(5, CLASSES))
            wide = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES))
            return Heads([deep, wide])
        if kind == 5:
            return nn.Sequential(pool, nn.Dropout(0.3), nn.Linear(width, CLASSES), nn.LogSoftmax(1))
        if kind == 6:
            both = Apply(lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
            return nn.Sequential(both, nn.Linear(2 * width, CLASSES))
        if kind == 7:
            return nn.Sequential(pool, nn.BatchNorm1d(width), nn.Linear(width, CLASSES, bias=False))
        return nn.Sequential(pool, nn.Linear(width, CLASSES))

    def tokens(self) -> tuple[nn.Module, tuple[int, ...]]:
        heads = self.random.choice((1, 2, 4))
        width, class_token = 8, self.flag()
        layers: list[nn.Module] = [Tokens(width, 4, 8, class_token)]
        post = self.random.random() < 0.2
        for _ in range(self.random.randint(1, 3)):
            branches = [Attention(width, heads, self.random.randrange(3), self.flag()), self.mlp(width)]
            for branch in branches:
                scale = [Scale((width,))] if self.random.random() < 0.2 else []
                if post:
                    layers += [Residual(nn.Sequential(branch, *scale), nn.Identity(), nn.LayerNorm(width), 0)]
                elif self.random.random() < 0.1:
                    layers += [Residual(nn.Sequential(branch, nn.LayerNorm(width)), nn.Identity(), nn.Identity(), 0)]
                else:
                    parts = nn.Sequential(nn.LayerNorm(width), branch, *scale)
                    layers += [Residual(parts, nn.Identity(), nn.Identity(), self.random.randrange(4))]
        pool = Apply(lambda x: x[:, 0]) if class_token and self.flag() else Apply(lambda x: x.mean(1))
        norms = [nn.LayerNorm(width)] if self.flag() else []
        return nn.Sequential(*layers, *norms, pool, nn.Linear(width, CLASSES)), (3, 8, 8)

    def mlp(self, width: int) -> nn.Module:
        if self.random.random() < 0.3:
            return Gated(width, 6, self.random.choice((nn.SiLU, nn.GELU, nn.Sigmoid))(), self.flag())
        return nn.Sequential(nn.Linear(width, 12), self.act(), nn.Dropout(0.1), nn.Linear(12, width))

    def vectors(self) -> tuple[nn.Module, tuple[int, ...]]:
        width = self.random.choice((5, 6, 8))
        layers: list[nn.Module] = [nn.Linear(7, width), self.act()]
        for _ in range(self.random.randint(1, 3)):
            kind = self.random.randrange(5)
            hidden = nn.Sequential(nn.Linear(width, 6), self.act(), nn.Linear(6, width))
            if kind == 0:
                layers += [Residual(hidden, nn.Identity(), nn.Identity(), self.random.randrange(4))]
            elif kind == 1:
                layers += [Residual(nn.Sequential(nn.Linear(width, width), nn.ReLU()), nn.Identity(), nn.Identity(), 0)]
            elif kind == 2:
                layers += [nn.LayerNorm(width), Gated(width, 6, nn.SiLU(), self.flag())]
            elif kind == 3:
                layers += [nn.Linear(width, width), nn.BatchNorm1d(width), self.act()]
            else:
                layers += [nn.Linear(width, width, bias=self.flag()), self.act(), nn.Dropout(0.2)]
        head = [nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, CLASSES)] if self.flag() else [nn.Linear(width, CLASSES)]
        return nn.Sequential(*layers, *head), (7,)


#: The ways to fuse that are tried. The default decides by the parents' agreement; a network agrees with itself.
WAYS = {
    "default": FusionOptions(),
    **{name: FusionOptions(correction=name) for name in ("none", "rescale", "repair")},  # type: ignore[arg-type]
    "matched": FusionOptions(targets="matched"),
    "union": FusionOptions(targets="union"),
}


def tolerance(way: str) -> float:
    """The largest relative error that is allowed."""
    return POOLED_TOLERANCE if way == "union" else TOLERANCE


def fused_if_pooled(models: list[nn.Module], samples: Tensor, options: FusionOptions) -> nn.Module | None:
    """The fused network; None where `targets=union` is refused, which not every network allows."""
    try:
        return fuse(models, [samples], options).model
    except FusionError:
        if options.targets != "union":
            raise
        return None


def relative(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value expected."""
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


@torch.no_grad()
def itself(model: nn.Module, samples: Tensor, seed: int) -> str:
    """Fuse a network with itself under every correction; returns what went wrong."""
    expected = model(samples)
    for name, options in WAYS.items():
        fused = fused_if_pooled([model, model], samples, options)
        if fused is not None and not (error := relative(fused(samples), expected)) <= tolerance(name):
            return f"with itself, {name}: {error:.1e}"
    return ""


@torch.no_grad()
def reordered(model: nn.Module, samples: Tensor, seed: int) -> str:
    """Fuse a network with a copy whose neurons are permuted."""
    other = permuted_copy(model, structure_of(model, samples), seed)
    expected = model(samples)
    if not (error := relative(other(samples), expected)) <= TOLERANCE:
        return f"a permuted copy is another function: {error:.1e}"
    for name in ("none", "matched", "union"):
        fused = fused_if_pooled([model, other], samples, WAYS[name])
        if fused is not None and not (error := relative(fused(samples), expected)) <= tolerance(name):
            return f"with a permuted copy, {name}: {error:.1e}"
    return ""


@torch.no_grad()
def stranger(model: nn.Module, samples: Tensor, seed: int) -> str:
    """Fuse a network with one of other weights: whatever comes out is finite."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].reshape(parameter.shape))
    for name in ("rescale", "repair", "default"):
        if not fuse([model, other], [samples], WAYS[name]).model(samples).isfinite().all():
            return f"with other weights, {name}: not finite"
    return ""


@torch.no_grad()
def restored(model: nn.Module, samples: Tensor, seed: int) -> str:
    """Refit a network whose weights have been disturbed to itself: it comes nearer."""
    options = WAYS["matched"]
    structures = [structure_of(model, samples)] * 2
    maps = [range(len(stage)) for stage in structures[0].stages]
    balanced, network, room = balance([model] * 2, structures, 0, [maps, maps], samples, options)
    moved_average(balanced, room, ({}, {}), (0.5, 0.5), options)
    for layer in room.layers:
        if layer.weight is not None:
            weight = room.capture.tensors[layer.weight]
            weight += (
                0.2 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)).double()
            )
    expected = model(samples)
    before = relative(network(samples), expected)
    correct(network, room, Targets(balanced, ({}, {}), (0.5, 0.5), options), samples)
    after = relative(network(samples), expected)
    return "" if after <= max(before, TOLERANCE) else f"refit after a disturbance of {before:.1e}: {after:.1e}"


CHECKS = (itself, reordered, stranger, restored)


def outcome(seed: int) -> tuple[str, str]:
    """Try one generated network.

    Returns:
        `right`, `refused`, `wrong` or the type of an exception; and a line on it.
    """
    model, shape = Generator(seed).network()
    samples = torch.randn(40, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    name = ""
    try:
        for check in CHECKS:
            name = check.__name__
            if line := check(model, samples, seed):
                return "wrong", line
    except FusionError as error:
        return "refused", f"{name}: {error}"
    except Exception as error:  # the point is that there is none
        place = traceback.extract_tb(error.__traceback__)[-1]
        return type(error).__name__, f"{name}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"
    return "right", ""


def outcomes(seeds: range) -> Iterator[tuple[int, str, str]]:
    """The outcomes of many networks."""
    for seed in seeds:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield seed, *outcome(seed)


def main() -> int:
    """Try many, print what came of them, and fail if one is neither itself nor refused."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: collections.Counter[str] = collections.Counter()
    start = time.monotonic()
    for seed, kind, line in outcomes(range(arguments.first, arguments.first + arguments.count)):
        counts[kind] += 1
        if kind != "right":
            print(f"{seed}: {kind}: {line}", flush=True)
    print(dict(counts), f"{time.monotonic() - start:.0f} s")
    return 0 if counts.keys() <= {"right", "refused"} else 1


if __name__ == "__main__":
    sys.exit(main())
