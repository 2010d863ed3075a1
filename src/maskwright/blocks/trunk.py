"""A trunk by its name, and the colours it wants, as the constructors of systems take them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from maskwright.blocks.layers import Norm
from maskwright.blocks.resnet import ResNet, StrideIn, TimmBackbone
from maskwright.errors import UsageError
from maskwright.structures import Preprocess


def make_trunk(
    backbone: str,
    *,
    pretrained: bool = False,
    in_channels: int = 3,
    stem_width: int = 64,
    groups: int = 1,
    group_width: int = 64,
    stride_in: StrideIn = "3x3",
    deform_stages: Sequence[int] = (),
    deform_modulated: bool = False,
    deform_every: int = 1,
    deform_bias: bool = False,
    norm: Norm = "group",
    norm_eps: float = 1e-5,
    frozen: int = 0,
) -> tuple[nn.Module, list[int]]:
    """A network that gives levels of strides 4, 8, 16 and 32, and their channels; UsageError for an unknown name.

    backbone    "resnet18" ... "resnet152", or "timm:NAME"
    pretrained  timm's published weights; ours start random
    the others  see `ResNet`; a trunk of timm's has its own
    """
    if backbone.startswith("timm:"):
        trunk = TimmBackbone(backbone[5:], in_channels=in_channels, pretrained=pretrained, frozen=frozen)
        return trunk, trunk.channels
    if not backbone.startswith("resnet") or not backbone[6:].isdigit():
        raise UsageError(f"backbone is {backbone!r}; expected resnet18 ... resnet152 or timm:NAME")
    try:
        trunk = ResNet(
            int(backbone[6:]), in_channels=in_channels, base=stem_width, groups=groups, group_width=group_width,
            stride_in=stride_in, deform_stages=deform_stages, deform_modulated=deform_modulated,
            deform_every=deform_every, deform_bias=deform_bias, norm=norm, eps=norm_eps, frozen=frozen,
        )  # fmt: skip
    except ValueError as error:
        raise UsageError(str(error)) from None
    return trunk, trunk.channels


def coloured(
    preprocess: Preprocess, in_channels: int, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Preprocess:
    """`preprocess` with another mean or std where given, for pictures of `in_channels`: further channels are centred
    on the middle grey."""
    preprocess = replace(preprocess, mean=tuple(mean or preprocess.mean), std=tuple(std or preprocess.std))
    extra = max(0, in_channels - len(preprocess.mean))
    middle = (sum(preprocess.mean) / len(preprocess.mean),) * extra
    return replace(preprocess, mean=preprocess.mean + middle, std=preprocess.std + preprocess.std[:1] * extra)
