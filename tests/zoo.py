"""Small networks of every kind by name, and how many free neuron spaces each has.

The names begin with the package that makes them: `torchvision`, `timm` or `transformers`; the last two are optional.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Sample:
    """A network of the zoo.

    Attributes:
        make: makes it, with random weights and 7 classes.
        size: the side of the images that it takes.
        spaces: how many free neuron spaces it has, those of the logits and of heads included.
        slow: whether exporting and running it takes more than a few seconds; tried with ZOO=1 alone.
    """

    make: Callable[[], nn.Module]
    size: int
    spaces: int
    slow: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of an image."""
        return 3, self.size, self.size


def _torchvision(name: str, **options: Any) -> nn.Module:
    return getattr(import_module("torchvision.models"), name)(num_classes=7, **options)


def _timm(name: str, **options: Any) -> nn.Module:
    return import_module("timm").create_model(name, num_classes=7, **options)


def _transformers(name: str, **options: Any) -> nn.Module:
    package = import_module("transformers")
    config = getattr(package, f"{name}Config")(num_labels=7, **options)
    return getattr(package, f"{name}ForImageClassification")(config)


def _vision_transformer(**options: Any) -> nn.Module:
    """timm's class itself, for the options that no name stands for."""
    return import_module("timm").models.VisionTransformer(num_classes=7, **_VIT, **options)


def _post_norm() -> nn.Module:
    return _vision_transformer(block_fn=import_module("timm").models.vision_transformer.ResPostBlock)


def _swin_v2() -> nn.Module:
    swin = import_module("torchvision.models.swin_transformer")
    return swin.SwinTransformer(
        **_SWIN, num_classes=7, block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2
    )


def _convnext() -> nn.Module:
    convnext = import_module("torchvision.models.convnext")
    block = convnext.CNBlockConfig
    return convnext.ConvNeXt([block(16, 24, 1), block(24, 32, 2), block(32, None, 1)], num_classes=7)


def _mixer() -> nn.Module:
    return import_module("timm").models.MlpMixer(img_size=32, patch_size=8, num_blocks=2, embed_dim=32, num_classes=7)


def _convmixer() -> nn.Module:
    return import_module("timm").models.ConvMixer(dim=32, depth=3, kernel_size=5, patch_size=8, num_classes=7)


def _starnet() -> nn.Module:
    # Twenty products in a row, as in the networks that have names, amplify rounding errors by a factor of 1e7.
    return import_module("timm").models.starnet.StarNet(base_dim=16, depths=(1, 1, 1, 1), num_classes=7)


_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
_SWIN = {"patch_size": [4, 4], "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
_HF = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 8}
_STAGES = {"depths": [1, 1, 2, 1], "hidden_sizes": [16, 24, 32, 40]}

T, M, H = (partial(partial, make) for make in (_torchvision, _timm, _transformers))

ZOO: dict[str, Sample] = {
    "torchvision/vit": Sample(
        T("VisionTransformer", image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48),
        32,
        10,
    ),
    "torchvision/swin": Sample(T("SwinTransformer", **_SWIN), 32, 19),
    "torchvision/swin_v2": Sample(_swin_v2, 32, 27),
    "torchvision/convnext": Sample(_convnext, 64, 8),
    "torchvision/maxvit": Sample(
        T(
            "MaxVit",
            input_size=(64, 64),
            stem_channels=16,
            partition_size=2,
            block_channels=[16, 32],
            block_layers=[1, 1],
            head_dim=8,
            stochastic_depth_prob=0.1,
        ),
        64,
        26,
        slow=True,
    ),
    "torchvision/alexnet": Sample(T("alexnet"), 96, 8, slow=True),
    "torchvision/vgg11_bn": Sample(T("vgg11_bn"), 64, 11, slow=True),
    "torchvision/resnet18": Sample(T("resnet18"), 64, 13),
    "torchvision/resnet50": Sample(T("resnet50"), 64, 38, slow=True),
    "torchvision/resnext50_32x4d": Sample(T("resnext50_32x4d"), 64, 54, slow=True),
    "torchvision/regnet_y_400mf": Sample(T("regnet_y_400mf"), 64, 70, slow=True),
    "torchvision/densenet121": Sample(T("densenet121"), 64, 121, slow=True),
    "torchvision/efficientnet_b0": Sample(T("efficientnet_b0"), 64, 41, slow=True),
    "torchvision/mobilenet_v2": Sample(T("mobilenet_v2"), 64, 26, slow=True),
    "torchvision/mobilenet_v3_small": Sample(T("mobilenet_v3_small"), 64, 28),
    "torchvision/mnasnet0_5": Sample(T("mnasnet0_5"), 64, 26, slow=True),
    "torchvision/shufflenet_v2_x0_5": Sample(T("shufflenet_v2_x0_5"), 64, 81, slow=True),
    "torchvision/inception_v3": Sample(T("inception_v3", aux_logits=False, init_weights=False), 96, 95, slow=True),
    "torchvision/googlenet": Sample(T("googlenet", aux_logits=False, init_weights=False), 64, 58, slow=True),
    "torchvision/squeezenet1_1": Sample(T("squeezenet1_1"), 64, 26),
    "timm/vit": Sample(M("vit_tiny_patch16_224", **_VIT), 32, 10),
    "timm/vit_qk_norm": Sample(partial(_vision_transformer, reg_tokens=4, qk_norm=True, init_values=1e-4), 32, 9),
    "timm/vit_post_norm": Sample(_post_norm, 32, 10),
    "timm/deit_distilled": Sample(M("deit_tiny_distilled_patch16_224", **_VIT), 32, 10),
    "timm/deit3": Sample(M("deit3_small_patch16_224", **_VIT), 32, 10),
    "timm/eva02": Sample(
        M("eva02_tiny_patch14_224", img_size=28, patch_size=14, embed_dim=32, depth=2, num_heads=4), 28, 8
    ),
    "timm/beit": Sample(M("beit_base_patch16_224", **_VIT), 32, 10),
    "timm/cait": Sample(M("cait_xxs24_224", **_VIT), 32, 22),
    "timm/mixer": Sample(_mixer, 32, 6),
    "timm/resmlp": Sample(M("resmlp_12_224", img_size=64), 64, 14, slow=True),
    "timm/gmlp": Sample(M("gmlp_ti16_224", img_size=64), 64, 32, slow=True),
    "timm/convmixer": Sample(_convmixer, 64, 5),
    "timm/convnext_atto": Sample(M("convnext_atto"), 64, 17),
    "timm/convnextv2_atto": Sample(M("convnextv2_atto"), 64, 17),
    "timm/poolformer_s12": Sample(M("poolformer_s12"), 64, 17, slow=True),
    "timm/caformer": Sample(M("caformer_s18"), 64, 66, slow=True),
    "timm/fastvit_t8": Sample(M("fastvit_t8"), 64, 17, slow=True),
    "timm/edgenext_xx_small": Sample(M("edgenext_xx_small"), 64, 29, slow=True),
    "timm/xcit": Sample(M("xcit_nano_12_p8_224", img_size=32, embed_dim=32, depth=2, num_heads=4), 32, 20),
    "timm/pvt_v2_b0": Sample(M("pvt_v2_b0", depths=(1, 1, 1, 1)), 64, 23, slow=True),
    "timm/twins_pcpvt": Sample(
        M("twins_pcpvt_small", img_size=64, embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4)),
        64,
        23,
        slow=True,
    ),
    "timm/twins_svt": Sample(
        M(
            "twins_svt_small",
            img_size=64,
            embed_dims=(16, 32, 48, 64),
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 3, 4),
            wss=(4, 4, 4, 2),
        ),
        64,
        25,
        slow=True,
    ),
    "timm/crossvit": Sample(M("crossvit_tiny_240"), 240, 81, slow=True),
    "timm/volo": Sample(M("volo_d1_224", img_size=64), 64, 82, slow=True),
    "timm/visformer_tiny": Sample(M("visformer_tiny", img_size=64), 64, 58),
    "timm/levit_128s": Sample(M("levit_128s"), 224, 51, slow=True),
    "timm/pit": Sample(M("pit_ti_224", img_size=64), 64, 52),
    "timm/coat_lite_tiny": Sample(M("coat_lite_tiny", img_size=64), 64, 37, slow=True),
    "timm/nest_tiny": Sample(M("nest_tiny", img_size=64), 64, 52, slow=True),
    "timm/focalnet": Sample(M("focalnet_tiny_srf"), 64, 41, slow=True),
    "timm/mvitv2": Sample(M("mvitv2_tiny", img_size=64), 64, 27, slow=True),
    "timm/davit": Sample(
        M("davit_tiny", embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(2, 2, 3, 4), window_size=4),
        64,
        37,
        slow=True,
    ),
    "timm/efficientformer_l1": Sample(M("efficientformer_l1"), 224, 24, slow=True),
    "timm/inception_next_atto": Sample(M("inception_next_atto"), 64, 30, slow=True),
    "timm/mambaout": Sample(M("mambaout_femto", depths=(1, 1, 1, 1)), 64, 15),
    "timm/starnet": Sample(_starnet, 64, 10),
    "timm/hiera": Sample(M("hiera_tiny_224", img_size=64, stages=(1, 1, 1, 1), embed_dim=16), 64, 20, slow=True),
    "timm/tiny_vit": Sample(
        M("tiny_vit_5m_224", embed_dims=(16, 32, 48, 64), depths=(1, 1, 1, 1), num_heads=(2, 2, 3, 4)),
        224,
        22,
        slow=True,
    ),
    "timm/efficientvit_b0": Sample(M("efficientvit_b0"), 64, 38, slow=True),
    "timm/swinv2": Sample(
        M(
            "swinv2_tiny_window8_256",
            img_size=32,
            patch_size=4,
            embed_dim=16,
            depths=(2, 2),
            num_heads=(2, 4),
            window_size=4,
        ),
        32,
        23,
        slow=True,
    ),
    "timm/coatnet_nano": Sample(M("coatnet_nano_rw_224", img_size=64), 64, 56, slow=True),
    "timm/mobilevit_xxs": Sample(M("mobilevit_xxs"), 64, 62, slow=True),
    "timm/densenet121": Sample(M("densenet121"), 64, 121, slow=True),
    "timm/efficientnet_b0": Sample(M("efficientnet_b0"), 64, 41, slow=True),
    "timm/seresnet18": Sample(M("seresnet18"), 64, 21),
    "timm/ecaresnet26t": Sample(M("ecaresnet26t"), 64, 20),
    "timm/res2net50": Sample(M("res2net50_26w_4s"), 64, 94, slow=True),
    "timm/resnetv2_50": Sample(M("resnetv2_50x1_bit"), 64, 75, slow=True),
    "timm/nf_resnet26": Sample(M("nf_resnet26"), 64, 22, slow=True),
    "timm/resnetblur18": Sample(M("resnetblur18"), 64, 13),
    "timm/resnest14d": Sample(M("resnest14d"), 64, 20),
    "timm/skresnet18": Sample(M("skresnet18"), 64, 25),
    "timm/regnetx_002": Sample(M("regnetx_002"), 64, 45),
    "timm/repvgg_a0": Sample(M("repvgg_a0"), 64, 6, slow=True),
    "timm/vovnet39a": Sample(M("vovnet39a"), 64, 40),
    "timm/dla34": Sample(M("dla34"), 64, 26),
    "timm/dpn48b": Sample(M("dpn48b"), 64, 74, slow=True),
    "timm/mobileone_s0": Sample(M("mobileone_s0"), 64, 5, slow=True),
    "timm/ghostnet_050": Sample(M("ghostnet_050"), 64, 32, slow=True),
    "timm/hrnet_w18_small": Sample(M("hrnet_w18_small"), 64, 46, slow=True),
    "transformers/ViT": Sample(H("ViT", **_HF, intermediate_size=48), 32, 10),
    "transformers/DeiT": Sample(H("DeiT", **_HF, intermediate_size=48), 32, 10),
    "transformers/ViTMSN": Sample(H("ViTMSN", **_HF, intermediate_size=48), 32, 10),
    "transformers/Dinov2": Sample(H("Dinov2", **_HF), 32, 10),
    "transformers/Beit": Sample(
        H("Beit", **_HF, intermediate_size=48, use_relative_position_bias=True, use_mask_token=False), 32, 10
    ),
    "transformers/Data2VecVision": Sample(
        H("Data2VecVision", **_HF, intermediate_size=48, use_relative_position_bias=True, use_mask_token=False), 32, 10
    ),
    "transformers/Swin": Sample(
        H("Swin", image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4), 32, 19
    ),
    "transformers/ConvNext": Sample(H("ConvNext", **_STAGES, image_size=64), 64, 10),
    "transformers/ResNet": Sample(H("ResNet", **_STAGES, embedding_size=16), 64, 15),
    "transformers/RegNet": Sample(H("RegNet", **_STAGES, embedding_size=16, groups_width=8), 64, 26),
    "transformers/PoolFormer": Sample(H("PoolFormer", **_STAGES), 64, 10),
    "transformers/FocalNet": Sample(H("FocalNet", embed_dim=16, depths=[1, 1, 1, 1], image_size=64), 64, 17, slow=True),
    "transformers/PvtV2": Sample(
        H("PvtV2", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], num_attention_heads=[1, 2, 3, 4], image_size=64),
        64,
        23,
        slow=True,
    ),
    "transformers/Segformer": Sample(
        H("Segformer", depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 48, 64], num_attention_heads=[1, 2, 3, 4]), 64, 23
    ),
    "transformers/Cvt": Sample(
        H("Cvt", depth=[1, 2, 3], embed_dim=[16, 32, 48], num_heads=[1, 2, 3]), 64, 27, slow=True
    ),
    "transformers/MobileViT": Sample(
        H("MobileViT", hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 48], image_size=64),
        64,
        62,
        slow=True,
    ),
    "transformers/SwiftFormer": Sample(
        H("SwiftFormer", depths=[1, 1, 1, 1], embed_dims=[16, 24, 32, 40], image_size=64),
        64,
        18,
        slow=True,
    ),
    "transformers/Levit": Sample(
        H(
            "Levit",
            hidden_sizes=[32, 48, 64],
            num_attention_heads=[2, 3, 4],
            depths=[1, 1, 1],
            key_dim=[8, 8, 8],
            image_size=64,
        ),
        64,
        27,
        slow=True,
    ),
}
