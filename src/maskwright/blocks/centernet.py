"""CenterNet (Zhou, Wang, Krähenbühl, arXiv 1904.07850): backbone, neck of stride 4, maps of centres and sizes."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from maskwright.blocks.backbones import levels_of
from maskwright.blocks.dla import DLA, DLAUp, LightUp
from maskwright.blocks.layers import Norm
from maskwright.ops.centres import PRIOR


@dataclass(frozen=True)
class CentreRaw:
    """Raw output of every cell of the map of stride 4.

    Attributes:
        centres: Logits of an object's centre, for each class.
        sizes: Width and height of the box around the cell, in cells.
        feature: The feature map that both are computed from.
    """

    centres: Float[Tensor, "b k h w"]
    sizes: Float[Tensor, "b 2 h w"]
    feature: Float[Tensor, "b c h w"]


class CentreDense(nn.Module):
    """Backbone, a neck that merges its levels at stride 4, and the heads of CenterNet (arXiv 1904.07850)."""

    def __init__(
        self, backbone: nn.Module, classes: int, *, neck_width: int, deformable: bool, norm: Norm, eps: float,
        head_width: int,
    ):  # fmt: skip
        """
        Args:
            backbone: With levels of strides 4, 8, 16 and 32. For a DLA the neck is that of CenterNet, for others it is
                `LightUp`.
            classes: Number of classes.
            neck_width: Channels of `LightUp`.
            deformable: Whether the neck of a DLA has deformable convolutions.
            norm: Normalisation of the neck.
            eps: Its epsilon.
            head_width: Channels of the heads.
        """
        super().__init__()
        levels = levels_of(backbone)
        self.backbone = backbone
        self.read = levels.indices((4, 8, 16, 32))
        channels = [levels.channels[i] for i in self.read]
        self.neck: nn.Module
        if isinstance(backbone, DLA):
            self.neck, self.channels = DLAUp(channels, norm=norm, eps=eps, deformable=deformable), channels[0]
        else:
            self.neck, self.channels = LightUp(channels, neck_width, norm=norm, eps=eps), neck_width
        self.centres = _head(self.channels, head_width, classes, PRIOR)
        self.sizes = _head(self.channels, head_width, 2)

    def forward(self, images: Float[Tensor, "b c h w"]) -> CentreRaw:
        """Returns the maps of centres and sizes, and the feature map of stride 4."""
        levels = self.backbone(images)
        feature = self.neck([levels[i] for i in self.read])  # (B, 64, H/4, W/4)
        return CentreRaw(self.centres(feature), self.sizes(feature), feature)


def _head(channels: int, width: int, outputs: int, bias: float = 0.0) -> nn.Sequential:
    last = nn.Conv2d(width, outputs, 1)
    nn.init.constant_(last.bias, bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True), last)
