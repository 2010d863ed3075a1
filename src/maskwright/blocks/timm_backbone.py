"""Backbones of timm: convolutional networks and hierarchical transformers with strides 4 to 32."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.errors import MissingExtraError, UsageError


class TimmBackbone(nn.Module):
    """A trunk of timm's, random or with its published weights, giving the levels of strides 4, 8, 16 and 32, or those
    up to `deepest`, and nothing after that."""

    def __init__(
        self, name: str, *, in_channels: int = 3, pretrained: bool = False, frozen: int = 0, deepest: int = 32
    ):
        super().__init__()
        try:
            import timm
        except ImportError:
            raise MissingExtraError("timm", "timm") from None
        try:
            self.body = timm.create_model(name, pretrained=pretrained, features_only=True, in_chans=in_channels)
        except (RuntimeError, AttributeError, ValueError) as error:
            raise UsageError(f"timm cannot give {name!r} as a pyramid of features: {error}") from None
        info: Any = self.body.feature_info
        wanted = [i for i, stride in enumerate(info.reduction()) if stride in (4, 8, 16, 32)]
        if [info.reduction()[i] for i in wanted] != [4, 8, 16, 32]:
            raise UsageError(f"timm's {name!r} has strides {info.reduction()}; strides 4, 8, 16 and 32 are needed")
        if deepest < 32:
            wanted = [i for i in wanted if info.reduction()[i] <= deepest]
            self.body = timm.create_model(
                name, pretrained=pretrained, features_only=True, in_chans=in_channels, out_indices=wanted
            )
            info, wanted = self.body.feature_info, list(range(len(wanted)))
        self.wanted = wanted
        self.channels = [info.channels()[i] for i in wanted]
        self.strides = [s for s in (4, 8, 16, 32) if s <= deepest]
        self.channels_last = info.channels()[-1] != _channels_at_end(self.body, in_channels)
        freeze(list(self.body.children())[: 2 * frozen])

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        outputs = self.body(x)
        chosen = [outputs[i] for i in self.wanted]
        return [y.permute(0, 3, 1, 2) for y in chosen] if self.channels_last else chosen


def _channels_at_end(body: nn.Module, in_channels: int) -> int:
    """Channels found on axis 1 of the deepest level; Swin and its kin have them on the last axis instead."""
    training = body.training
    with torch.no_grad():
        found = body.eval()(torch.zeros(1, in_channels, 224, 224))[-1].shape[1]
    body.train(training)
    return found


def _build(spec: Backbone, in_channels: int, use: Use) -> TimmBackbone:
    if use.dilated:
        raise UsageError("a timm backbone has no dilated stages; use a ResNet or leave the dilation out")
    return TimmBackbone(
        spec.name.removeprefix("timm:"), in_channels=in_channels, pretrained=spec.pretrained, frozen=spec.frozen,
        deepest=use.deepest,
    )  # fmt: skip


def _levels(spec: Backbone, use: Use) -> Levels:
    with torch.device("meta"):
        body = TimmBackbone(spec.name.removeprefix("timm:"), deepest=use.deepest)
    return Levels(tuple(body.channels), tuple(body.strides))


FAMILY = Family(names=("timm:",), options=frozenset(("pretrained", "frozen")), levels=_levels, build=_build)
