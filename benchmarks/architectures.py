"""Architectures of networks that the benchmarks train, as plain values."""

from collections.abc import Mapping
from typing import Any

import torchvision
from torch import nn

from clafusion import networks


def vit(depth: int, width: int) -> dict[str, Any]:
    """A vision transformer of torchvision's with patches of 8 x 8, 4 heads and a doubled width inside."""
    sizes = {"num_layers": depth, "hidden_dim": width, "mlp_dim": 2 * width}
    return {"name": "torchvision.VisionTransformer", "image_size": 32, "patch_size": 8, "num_heads": 4, **sizes}


def build(architecture: Mapping[str, Any], num_classes: int = 10) -> nn.Module:
    """A network with random weights, one of ours or, by the name `torchvision.NAME`, one of torchvision's."""
    given = {key: value for key, value in architecture.items() if key != "name"}
    if architecture["name"] == "torchvision.VisionTransformer":
        return torchvision.models.VisionTransformer(num_classes=num_classes, **given)
    if architecture["name"] == "torchvision.ConvNeXt":
        blocks = [torchvision.models.convnext.CNBlockConfig(*stage) for stage in given["block_setting"]]
        return torchvision.models.ConvNeXt(blocks, num_classes=num_classes)
    if architecture["name"].startswith("torchvision."):
        name = architecture["name"].removeprefix("torchvision.")
        return torchvision.models.get_model(name, num_classes=num_classes)
    return networks.build({"num_classes": num_classes, **architecture})
