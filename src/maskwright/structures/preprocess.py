"""From an image to the network's input: data, not code, so that it travels inside a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from maskwright.errors import UsageError
from maskwright.structures.batch import Batch
from maskwright.structures.placement import Placement


@dataclass(frozen=True)
class Preprocess:
    """The resize rule, normalisation and padding that a system was published with.

    fit           "short": the short side becomes `short` unless the long side would then exceed `long`;
                  "stretch": every image becomes `canvas`, its shape not kept (YOLACT, PolarMask);
                  "letterbox": the largest that fits into `canvas`, in its middle, black around it (CenterNet's heirs);
                  with `corner` at its upper left instead (EoMT);
                  "own": as it is;
                  "pad": as it is, in the middle of a black canvas that is a multiple of `multiple` and always larger
    canvas        height and width; used by "stretch" and "letterbox" alone
    resample      "pillow": 8-bit bilinear with anti-aliasing, before normalising (detectron2);
                  "tensor": float bilinear without anti-aliasing, after normalising (torchvision);
                  "opencv": 8-bit bilinear without anti-aliasing, before normalising (MMDetection's first versions)
    sizes         how "short" makes whole numbers: "rounded" half up; "floored"; "benchmark": the long side cut to a
                  whole number (maskrcnn-benchmark). None: floored with "tensor", else rounded
    mean, std     per channel in the order of `channels`, of values divided by `divide`
    multiple      the padded batch is a multiple of this; padding is 0 after normalising, that is the mean colour
    """

    short: int = 800
    long: int = 1333
    resample: Literal["pillow", "tensor", "opencv"] = "pillow"
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    divide: float = 255.0
    channels: Literal["RGB", "BGR"] = "RGB"
    multiple: int = 32
    fit: Literal["short", "stretch", "letterbox", "pad", "own"] = "short"
    canvas: tuple[int, int] | None = None
    sizes: Literal["rounded", "floored", "benchmark"] | None = None
    corner: bool = False

    def __post_init__(self) -> None:
        if self.fit in ("stretch", "letterbox") and self.canvas is None:
            raise ValueError(f"fit={self.fit!r} needs a canvas (height, width)")

    @property
    def words(self) -> str:
        """The size rule in words, for protocols: what a number measured with it means."""
        if self.fit == "short":
            return f"short side {self.short}, long side at most {self.long}"
        if self.fit == "own":
            return "its own size"
        if self.fit == "pad":
            return f"its own size, padded to a larger multiple of {self.multiple}"
        height, width = self.canvas or (0, 0)
        return f"{self.fit} to {height} x {width}"

    def at(self, short: int | None = None, long: int | None = None) -> Preprocess:
        """The same rule at another size. A canvas keeps its shape and gets this short side; images of their own size
        get one."""
        if self.canvas is not None and short:
            ratio = short / min(self.canvas)
            return replace(self, canvas=(round(self.canvas[0] * ratio), round(self.canvas[1] * ratio)))
        fit = "short" if self.fit == "own" and short else self.fit
        return replace(self, short=short or self.short, long=long or self.long, fit=fit)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocess:
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The size (h, w) that an image of this size is resized to; never less than one pixel."""
        if self.fit == "stretch":
            return cast(tuple[int, int], self.canvas)
        if self.fit in ("pad", "own"):
            return height, width
        if self.fit == "letterbox":
            canvas = cast(tuple[int, int], self.canvas)
            scale = min(canvas[0] / height, canvas[1] / width)
            return max(1, int(height * scale + 0.5)), max(1, int(width * scale + 0.5))
        rule = self.sizes or ("floored" if self.resample == "tensor" else "rounded")
        if rule == "floored":
            scale = min(self.short / min(height, width), self.long / max(height, width))
            return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
        if rule == "benchmark":
            low, high = min(height, width), max(height, width)
            short = self.short if high / low * self.short <= self.long else max(1, round(self.long * low / high))
            other = max(1, int(short * high / low))
            return (short, other) if height <= width else (other, short)
        scale = self.short / min(height, width)
        new = (self.short, scale * width) if height < width else (scale * height, self.short)
        if max(new) > self.long:
            shrink = self.long / max(new)
            new = (new[0] * shrink, new[1] * shrink)
        return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))

    def lay(self, image: UInt8[Tensor, "_c h w"]) -> tuple[Float[Tensor, "c _h _w"], Placement]:
        """One image, RGB, 0 ... 255 -> its place in the network's input and how it got there."""
        image = self.fitted(image)
        size = (image.shape[1], image.shape[2])
        target = self.size(*size)
        if self.resample == "tensor":
            values = _interpolate(self.normalise(image), target)
        elif self.resample == "opencv":
            values = self.normalise(_interpolate(image.float(), target).round())
        else:
            values = self.normalise(_pillow(image, target))
        placement = Placement.resize(size, target)
        if self.fit not in ("letterbox", "pad"):
            return values, placement
        larger = cast(tuple[int, int], tuple((side // self.multiple + 1) * self.multiple for side in size))
        canvas = larger if self.fit == "pad" else cast(tuple[int, int], self.canvas)
        top, left = (0, 0) if self.corner else ((canvas[0] - target[0]) // 2, (canvas[1] - target[1]) // 2)
        black = self.normalise(torch.zeros(len(image), 1, 1))
        plane = black.expand(len(image), *canvas).clone()
        plane[:, top : top + target[0], left : left + target[1]] = values
        return plane, placement.then_crop(-left, -top, canvas)

    def fitted(self, image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "d h w"]:
        """The image with as many channels as the network takes: RGB becomes grey (its luminance, ITU-R BT.601, as
        Pillow has it) or grey RGB, and alpha is dropped. UsageError where nobody can know what is meant."""
        have, want = len(image), len(self.mean)
        if have == want:
            return image
        if want == 1 and have in (3, 4):
            shares = torch.tensor([19595, 38470, 7471]).view(3, 1, 1)  # of 65536
            return ((image[:3] * shares).sum(0, keepdim=True) + 32768 >> 16).to(torch.uint8)
        if want == 3 and have == 1:
            return image.expand(3, -1, -1)
        if want == 3 and have == 4:
            return image[:3]
        raise UsageError(
            f"the image has {have} channels, the system was made for {want} (in_channels); images from files have "
            f"three, RGB: give tensors or arrays of {want}, or a system made for {have}"
        )

    def normalise(self, image: Tensor) -> Float[Tensor, "c h w"]:
        """RGB 0 ... 255 of any dtype -> the network's channels and scale, float32. Further channels follow."""
        values = image.float()
        if self.channels == "BGR" and len(values) >= 3:
            values = torch.cat([values[:3].flip(0), values[3:]])
        if self.divide != 1:
            values = values / self.divide
        mean, std = (values.new_tensor(v)[:, None, None] for v in (self.mean, self.std))
        return (values - mean) / std

    def collate(self, images: Sequence[UInt8[Tensor, "_c _h _w"]], names: Sequence[str] | None = None) -> Batch:
        """Images as they are -> a batch without targets."""
        laid = [self.lay(p) for p in images]
        return Batch.collate([v for v, _ in laid], [p for _, p in laid], names=names, multiple=self.multiple)


def _pillow(image: Tensor, size: tuple[int, int]) -> Tensor:
    from PIL import Image

    if tuple(image.shape[1:]) == size:
        return image
    if len(image) == 3:
        whole = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
        resized = np.asarray(whole.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        return torch.from_numpy(resized.copy()).permute(2, 0, 1)
    planes = [Image.fromarray(p.cpu().numpy()).resize((size[1], size[0]), Image.Resampling.BILINEAR) for p in image]
    return torch.from_numpy(np.stack([np.asarray(p) for p in planes]))


def _interpolate(values: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(values.shape[1:]) == size:
        return values
    return torch.nn.functional.interpolate(values[None], size=size, mode="bilinear", align_corners=False)[0]
