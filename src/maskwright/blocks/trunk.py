"""A trunk by its name, and the colours it wants, as the constructors of systems take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from maskwright.blocks.backbones import StrideIn, first_weight
from maskwright.blocks.layers import Norm
from maskwright.blocks.resnet import ResNet
from maskwright.blocks.swin import SWINS, Swin
from maskwright.blocks.timm_backbone import TimmBackbone
from maskwright.blocks.vgg import VGG
from maskwright.errors import UsageError
from maskwright.structures.resize import normalization_for

__all__ = ["first_weight", "make_stem", "make_trunk", "normalization_for"]


def make_trunk(
    backbone: str,
    *,
    pretrained: bool = False,
    in_channels: int = 3,
    stem_width: int = 64,
    groups: int = 1,
    group_width: int = 64,
    stride_in: StrideIn = "3x3",
    dilation: int = 1,
    dilate_first: bool = True,
    deform_stages: Sequence[int] = (),
    deform_modulated: bool = False,
    deform_every: int = 1,
    deform_bias: bool = False,
    norm: Norm = "group",
    norm_eps: float = 1e-5,
    frozen: int = 0,
    swin_width: int | None = None,
    swin_depths: Sequence[int] | None = None,
    swin_heads: Sequence[int] | None = None,
    window: int | None = None,
    drop_path: float = 0.0,
) -> tuple[nn.Module, list[int]]:
    """A network that gives levels of strides 4, 8, 16 and 32, and their channels; UsageError for an unknown name.

    backbone    "resnet18" ... "resnet152", "swin-tiny" ... "swin-large", or "timm:NAME"
    pretrained  timm's published weights; ours start random
    swin_width ... window
                of a Swin Transformer; None: those of its name. With `drop_path` see `Swin`
    the others  see `ResNet`; a trunk of timm's has its own
    """
    if backbone.startswith("timm:"):
        trunk = TimmBackbone(backbone[5:], in_channels=in_channels, pretrained=pretrained, frozen=frozen)
        return trunk, trunk.channels
    if backbone.startswith("swin-") and backbone[5:] in SWINS:
        width, depths, heads, side = SWINS[backbone[5:]]
        trunk = Swin(
            swin_width or width, swin_depths or depths, swin_heads or heads, window or side, in_channels=in_channels,
            drop_path=drop_path, frozen=frozen,
        )  # fmt: skip
        return trunk, trunk.channels
    if not backbone.startswith("resnet") or not backbone[6:].isdigit():
        known = ", ".join(f"swin-{size}" for size in SWINS)
        raise UsageError(f"backbone is {backbone!r}; expected resnet18 ... resnet152, {known} or timm:NAME")
    try:
        trunk = ResNet(
            int(backbone[6:]), in_channels=in_channels, base=stem_width, groups=groups, group_width=group_width,
            stride_in=stride_in, dilation=dilation, dilate_first=dilate_first, deform_stages=deform_stages,
            deform_modulated=deform_modulated,
            deform_every=deform_every, deform_bias=deform_bias, norm=norm, eps=norm_eps, frozen=frozen,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None
    return trunk, trunk.channels


def make_stem(
    backbone: str,
    stride: int,
    *,
    pretrained: bool = False,
    in_channels: int = 3,
    stem_width: int = 64,
    norm: Norm = "group",
    norm_eps: float = 1e-5,
    frozen: int = 0,
) -> tuple[nn.Module, int]:
    """The first stages of a network, up to `stride` (4, 8, 16 or 32), whose last output is what is read; its channels.

    backbone  "resnet18" ... "resnet152"; "vgg11" ... "vgg19", which at stride 8 keeps all its stages by dilation; or
              "timm:NAME" (whose further stages are left out)
    """
    if backbone.startswith("timm:"):
        trunk = TimmBackbone(
            backbone[5:], in_channels=in_channels, pretrained=pretrained, frozen=frozen, deepest=stride
        )
        return trunk, trunk.channels[-1]
    kind, depth = backbone.rstrip("0123456789"), backbone.lstrip("abcdefghijklmnopqrstuvwxyz")
    common: dict[str, Any] = {"in_channels": in_channels, "base": stem_width, "norm": norm, "eps": norm_eps}
    if kind == "vgg" and depth and stride in (8, 16):
        trunk = VGG(int(depth), dilated=stride == 8, frozen=frozen, **common)
    elif kind == "resnet" and depth and stride in (4, 8, 16, 32):
        try:
            trunk = ResNet(int(depth), stages=stride.bit_length() - 2, frozen=frozen, **common)
        except ValueError as error:
            raise UsageError(str(error)) from None
    else:
        raise UsageError(
            f"backbone is {backbone!r} at stride {stride}; expected resnet18 ... resnet152 (4, 8, 16, 32), "
            "vgg11 ... vgg19 (8, 16) or timm:NAME"
        )
    return trunk, trunk.channels[-1]
