"""The published networks by name: plain tables of constructor arguments, no layers.

A name is a family, a depth and, where one was published, a ratio: `vgg13_doub`, `resnet34_half`. Every name comes with
and without bias and BatchNorm (`bias=True`, `batch_norm=True`); the published networks have neither.
"""

from collections.abc import Mapping
from typing import Any

Channels = tuple[tuple[int, ...], ...]

_VGG: Mapping[str, Channels] = {
    "vgg8": ((64,), (128,), (256,), (512,), (512,)),
    "vgg11": ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    "vgg13": ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512)),
    "vgg16": ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3),
    "vgg19": ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}
_VGG_STUDENTS: Mapping[str, Channels] = {
    "vgg13_student": ((64, 64), (64, 64), (128, 128), (256, 256), (256, 512)),
}
# Numerator and denominator, so that widths stay whole numbers.
_VGG_RATIOS: Mapping[str, tuple[int, int]] = {"": (1, 1), "_half": (1, 2), "_doub": (2, 1), "_quad": (4, 1)}

_RESNET_BLOCKS: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
_RESNET_WIDTHS: Mapping[str, int] = {"": 64, "_half": 32, "_fourth": 16, "_eighth": 8, "_doub": 128}


def _scaled(channels: Channels, ratio: tuple[int, int]) -> list[list[int]]:
    """Scale every width except those of the first and the last convolution.

    The published lists for VGG11 and VGG13 keep exactly these two (64 and 512) at every ratio; the lists for 8, 16 and
    19 are inferred from that pattern.
    """
    numerator, denominator = ratio
    scaled = [[width * numerator // denominator for width in stage] for stage in channels]
    scaled[0][0], scaled[-1][-1] = channels[0][0], channels[-1][-1]
    return scaled


def _vgg_table() -> dict[str, dict[str, Any]]:
    table = {
        name + suffix: {"name": "VGG", "channels": _scaled(channels, ratio)}
        for name, channels in _VGG.items()
        for suffix, ratio in _VGG_RATIOS.items()
    }
    students = {name: {"name": "VGG", "channels": [list(c) for c in stages]} for name, stages in _VGG_STUDENTS.items()}
    return {**table, **students}


def _resnet_table() -> dict[str, dict[str, Any]]:
    return {
        name + suffix: {"name": "ResNet", "blocks": list(blocks), "width": width, "block": block}
        for name, (block, blocks) in _RESNET_BLOCKS.items()
        for suffix, width in _RESNET_WIDTHS.items()
    }


PUBLISHED: Mapping[str, Mapping[str, Any]] = {**_vgg_table(), **_resnet_table()}
"""Published name to family name and constructor arguments. Read it, never change it."""
