"""From a picture to the network's input: data, not code, so that it travels inside a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from maskwright.structures.batch import Batch
from maskwright.structures.placement import Placement


@dataclass(frozen=True)
class Preprocess:
    """The resize rule, normalisation and padding that a system was published with.

    short, long   the short side becomes `short` unless the long side would then exceed `long`
    resample      "pillow": 8-bit bilinear with anti-aliasing, sizes rounded half up, before normalising (detectron2);
                  "tensor": float bilinear without anti-aliasing, sizes floored, after normalising (torchvision)
    mean, std     per channel in the order of `channels`, of values divided by `divide`
    multiple      the padded batch is a multiple of this; padding is 0 after normalising, that is the mean colour
    """

    short: int = 800
    long: int = 1333
    resample: Literal["pillow", "tensor"] = "pillow"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    divide: float = 255.0
    channels: Literal["RGB", "BGR"] = "RGB"
    multiple: int = 32

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size (h, w) that a picture of this size is resized to; never less than one pixel."""
        if self.resample == "tensor":
            scale = min(self.short / min(height, width), self.long / max(height, width))
            return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        scale = self.short / min(height, width)
        new = (self.short, scale * width) if height < width else (scale * height, self.short)
        if max(new) > self.long:
            shrink = self.long / max(new)
            new = (new[0] * shrink, new[1] * shrink)
        return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))

    def lay(self, picture: UInt8[Tensor, "c h w"]) -> tuple[Float[Tensor, "c _h _w"], Placement]:
        """One picture, RGB, 0 ... 255 -> its place in the network's input and how it got there."""
        size = (picture.shape[1], picture.shape[2])
        target = self.size(*size)
        if self.resample == "tensor":
            values = _interpolate(self.normalise(picture), target)
        else:
            values = self.normalise(_pillow(picture, target))
        return values, Placement.resize(size, target)

    def normalise(self, picture: Tensor) -> Float[Tensor, "c h w"]:
        """RGB 0 ... 255 of any dtype -> the network's channels and scale, float32. Further channels follow."""
        values = picture.float()
        if self.channels == "BGR" and len(values) >= 3:
            values = torch.cat([values[:3].flip(0), values[3:]])
        if self.divide != 1:
            values = values / self.divide
        mean, std = (values.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (values - mean) / std

    def collate(self, pictures: Sequence[UInt8[Tensor, "c _h _w"]], names: Sequence[str] | None = None) -> Batch:
        """Pictures as they are -> a batch without targets."""
        laid = [self.lay(p) for p in pictures]
        return Batch.collate([v for v, _ in laid], [p for _, p in laid], names=names, multiple=self.multiple)


def _pillow(picture: Tensor, size: tuple[int, int]) -> Tensor:
    from PIL import Image

    if tuple(picture.shape[1:]) == size:
        return picture
    if len(picture) == 3:
        image = Image.fromarray(picture.permute(1, 2, 0).contiguous().cpu().numpy())
        resized = np.asarray(image.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        return torch.from_numpy(resized.copy()).permute(2, 0, 1)
    planes = [Image.fromarray(p.cpu().numpy()).resize((size[1], size[0]), Image.Resampling.BILINEAR) for p in picture]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes]))


def _interpolate(values: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(values.shape[1:]) == size:
        return values
    return torch.nn.functional.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]
