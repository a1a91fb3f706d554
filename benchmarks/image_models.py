"""torchvision's and timm's models for `coverage.py`: one of each family, small ones, random weights, tiny images.

Detectors are left out, whose outputs have no fixed shape, and three of timm's families whose smallest model has 80
million parameters (mobilenetv5, nasnet, pnasnet).

Neither package is needed by dwindle, and torchvision from PyPI does not import beside a CPU build of torch: it gives
kernels to operators that only its own build for that torch declares. None of these models calls them, so they are
declared here in its place: right in a benchmark's process, and nowhere else.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from architectures import BATCH, LABELS, Architecture, Inputs, Settings, random, shake
from torch import nn

Maker = Callable[[Any], nn.Module]

_DECLARED: list[torch.library.Library] = []  # operators live as long as what declared them


@cache
def importable(package: str) -> bool:
    """Whether torchvision or timm is there; then torchvision has been imported, operators or not."""
    if importlib.util.find_spec("torchvision") is None:
        return False
    try:
        import torchvision
    except RuntimeError:
        _DECLARED.append(torch.library.Library("torchvision", "DEF"))
        for name in ("nms", "qnms"):
            _DECLARED[0].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision  # noqa: F401  # whether it is there
    return importlib.util.find_spec(package) is not None


def _prepared(make: Callable[[], nn.Module], *shapes: tuple[int, ...]) -> tuple[nn.Module, Inputs]:
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = make().eval()
        example = {
            name: random(BATCH, *shape, seed=1 + i)
            for i, (name, shape) in enumerate(zip(inspect.signature(model.forward).parameters, shapes, strict=False))
        }
        shake(model, example)
    return model, example


def _torchvision(make: Maker) -> nn.Module:
    from torchvision import models

    return make(models)


def _timm(name: str, settings: Settings) -> nn.Module:
    import timm

    model: nn.Module = timm.create_model(name, num_classes=LABELS, **settings)
    return model


def _row(name: str, make: Maker, side: int = 64, *, frames: int = 0, images: int = 1) -> Architecture:
    """A model that sees one image or several, or a video."""
    shape = (3, frames, side, side) if frames else (3, side, side)
    return Architecture(
        f"torchvision/{name}", "vision", partial(_prepared, partial(_torchvision, make), *[shape] * images)
    )


def _named(name: str, side: int = 64, *, frames: int = 0, **settings: Any) -> Architecture:
    """A model that torchvision makes by name."""
    settings = {"num_classes": LABELS} | settings
    return _row(name, lambda m: m.get_model(name, weights=None, **settings), side, frames=frames)


def _timm_row(name: str, side: int = 64, *, sized: bool = False, **settings: Any) -> Architecture:
    settings = settings | ({"img_size": side} if sized else {})
    return Architecture(f"timm/{name}", "vision", partial(_prepared, partial(_timm, name, settings), (3, side, side)))


# fmt: off
_ALONE = {"weights_backbone": None}
_FEW: Settings = {"num_classes": LABELS}


def _residual(m: Any, **settings: Any) -> nn.Module:
    return m.ResNet(m.resnet.Bottleneck, [1, 1, 1, 1], **_FEW, **settings)


def _dense(m: Any, depths: tuple[int, ...]) -> nn.Module:
    return m.DenseNet(8, depths, 16, **_FEW)


def _convnext(m: Any) -> nn.Module:
    stages = [m.convnext.CNBlockConfig(16, 32, 2), m.convnext.CNBlockConfig(32, None, 2)]
    return m.ConvNeXt(stages, **_FEW)


def _windows(m: Any, **settings: Any) -> nn.Module:
    return m.SwinTransformer([4, 4], 16, [2, 2], [2, 4], [4, 4], **_FEW, **settings)


def _film_windows(m: Any) -> nn.Module:
    return m.video.SwinTransformer3d([2, 4, 4], 16, [2, 2], [2, 4], [2, 4, 4], **_FEW)


def _multiscale(m: Any, **settings: Any) -> nn.Module:
    stage = m.video.mvit.MSBlockConfig
    stages = [
        stage(1, 16, 16, [], [3, 3, 3], [], [1, 2, 2]),
        stage(2, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
    ]
    return m.video.MViT((32, 32), 4, stages, residual_pool=False, residual_with_cls_embed=True, rel_pos_embed=False,
                        proj_after_attn=False, **_FEW, **settings)


def _pyramid(m: Any, name: str) -> nn.Module:
    from torchvision.models.detection import backbone_utils

    make = backbone_utils.mobilenet_backbone if "mobile" in name else backbone_utils.resnet_fpn_backbone
    settings = {"fpn": True} if "mobile" in name else {}
    return make(backbone_name=name, weights=None, norm_layer=nn.BatchNorm2d, **settings)


TORCHVISION: tuple[Architecture, ...] = (
    *(_named(name) for name in (
        "alexnet", "squeezenet1_0", "squeezenet1_1", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large",
        "mnasnet0_5", "mnasnet1_3", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "shufflenet_v2_x1_5",
        "shufflenet_v2_x2_0", "efficientnet_b0", "efficientnet_b1", "efficientnet_v2_s", "regnet_x_400mf",
        "regnet_x_800mf", "regnet_y_400mf", "regnet_y_800mf", "resnet18", "resnet34", "resnet50", "resnext50_32x4d",
        "densenet121",
    )),
    _named("vgg11", 32), _named("vgg11_bn", 32),
    _named("googlenet", aux_logits=False, init_weights=False),
    _named("inception_v3", 96, aux_logits=False, init_weights=False),
    *(_named(name, **_ALONE) for name in (
        "fcn_resnet50", "deeplabv3_mobilenet_v3_large", "deeplabv3_resnet50", "lraspp_mobilenet_v3_large",
    )),
    *(_named(name, 32, frames=4) for name in ("r3d_18", "mc3_18", "r2plus1d_18")),
    _named("s3d", 224, frames=16),
    _row("wide_resnet", lambda m: _residual(m, width_per_group=128)),
    _row("densenet161", lambda m: _dense(m, (2, 4, 3, 2))),
    _row("convnext", _convnext),
    _row("vit", lambda m: m.VisionTransformer(32, 8, 2, 4, 32, 64, **_FEW), 32),
    _row("swin", _windows, 32),
    _row("swin_v2", lambda m: _windows(m, block=m.swin_transformer.SwinTransformerBlockV2,
                                       downsample_layer=m.swin_transformer.PatchMergingV2), 32),
    _row("maxvit", lambda m: m.MaxVit((64, 64), 16, 4, [16, 32], [1, 1], 8, 0.0, **_FEW)),
    _row("swin3d", _film_windows, 32, frames=4),
    _row("mvit", _multiscale, 32, frames=4),
    _row("raft_small", lambda m: m.optical_flow.raft_small(weights=None), 128, images=2),
    _row("resnet18_fpn", lambda m: _pyramid(m, "resnet18")),
    _row("mobilenet_v3_fpn", lambda m: _pyramid(m, "mobilenet_v3_large")),
)

_SHORT: Settings = {"embed_dim": 64, "depth": 2, "num_heads": 4}
TIMM: tuple[Architecture, ...] = (
    *(_timm_row(name, sized=True) for name in (
        "eca_botnext26ts_256", "test_byobnet", "cait_xxs24_224", "coat_tiny", "convit_tiny", "deit_tiny_patch16_224",
        "efficientformerv2_s0", "efficientvit_m0", "vit_tiny_patch16_dinov3_qkvb", "gcvit_xxtiny", "hiera_tiny_224",
        "levit_128s", "test_coatnet", "gmlp_ti16_224", "mobilevit_xxs", "mvitv2_tiny", "nest_tiny", "pit_ti_224",
        "repvit_m1", "sequencer2d_s", "swiftformer_xs", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
        "swinv2_cr_tiny_224", "tnt_s_legacy_patch16_224", "twins_svt_small", "visformer_tiny", "test_vit",
        "vit_tiny_r_s16_p8_224", "test_vit_relpos", "vitamin_small_224", "volo_d1_224", "xcit_nano_12_p8_224",
    )),
    *(_timm_row(name) for name in (
        "convmixer_768_32", "test_convnext", "cpubone_nano", "crossvit_tiny_240", "csatv2", "cs3darknet_focus_s",
        "cspnext_tiny", "davit_tiny", "densenet121", "dla46x_c", "dpn48b", "edgenext_xx_small", "test_efficientnet",
        "efficientvim_m1", "efficientvit_b0", "fasternet_t0", "fastvit_t8", "focalnet_tiny_srf", "ghostnet_050",
        "hardcorenas_b", "hgnetv2_b0", "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t", "inception_next_atto",
        "lcnetv2_small", "lowformer_b0", "test_mambaout", "poolformerv2_s12", "lcnet_035", "nextvit_small",
        "test_nfnet", "pvt_v2_b0", "rdnet_tiny", "regnetx_004_tv", "repghostnet_050", "res2net50_26w_4s",
        "resnest26d", "test_resnet", "resnetv2_18", "rexnet_100", "selecsls42", "legacy_seresnet18", "shvit_s1",
        "skresnet18", "starnet_s050", "tiny_vit_5m_224", "tresnet_m", "ese_vovnet19b_slim_dw", "legacy_xception",
        "xception41p",
    )),
    *(_timm_row(name, sized=True, **_SHORT) for name in (
        "beit_base_patch16_224", "samvit_base_patch16_224", "naflexvit_base_patch16_siglip", "qwen3_vit_88m",
    )),
    _timm_row("gemma4_vit_167m_enc", 96, sized=True, **_SHORT),
    _timm_row("deepseek_vit_412m", 224, sized=True, **_SHORT),
    _timm_row("efficientformer_l1", 224, sized=True),
    *(_timm_row(name, 96) for name in ("inception_v3", "inception_v4", "inception_resnet_v2")),
    _timm_row("vgg11", 32),
)
# fmt: on
