"""A network applied to every location of a pyramid of resized images (DeepMask, InstanceFCN)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


def resized(images: Float[Tensor, "b c h w"], scale: float, corners: bool) -> Float[Tensor, "b c _h _w"]:
    """Resizes images bilinearly to round(side * scale), without anti-aliasing.

    Args:
        images: The images.
        scale: Pixels of the result per pixel of the images.
        corners: Whether the centres of the corner pixels are aligned, instead of the corners of the images.
    """
    size = [max(1, int(side * scale + 0.5)) for side in images.shape[-2:]]
    if size == list(images.shape[-2:]):
        return images
    return functional.interpolate(images, size=size, mode="bilinear", align_corners=corners)


def pyramid(
    images: Float[Tensor, "b c h w"],
    sizes: Int[Tensor, "b 2"] | None,
    scales: Sequence[float],
    resize: Callable[[Tensor, float], Tensor],
    network: Callable[[Tensor], tuple[Tensor, ...]],
    fills: Sequence[float],
    shared: bool = False,
) -> tuple[list[tuple[Tensor, ...]], tuple[Bool[Tensor, "b 1 _h _w"], ...]]:
    """Applies a network to each level of a pyramid.

    Images of different sizes are processed one after the other, those of one size together: convolutions depend on
    where an image ends, and group norm on all of it, so that any padding would change the result of a smaller image.

    Args:
        images: The images; the padding of smaller ones is not read.
        sizes: Height and width of each image, on the host; None if every image fills the batch.
        scales: Pixels of each level per pixel of the images.
        resize: Computes a level from images and a scale; the level is padded with zeros.
        network: Computes outputs on one grid from a level.
        fills: The value of each output where a smaller image has no location.
        shared: Whether the batch is processed at once all the same, smaller images padded with zeros, see
            `shares_norms`.

    Returns:
        The outputs of each level, and for each level which locations belong to each image; an empty tuple if all do.
    """
    if sizes is None:
        return [network(resize(images, scale)) for scale in scales], ()
    own_sizes = [(height, width) for height, width in sizes.tolist()]
    lots = {size: [n for n, own in enumerate(own_sizes) if own == size] for size in dict.fromkeys(own_sizes)}
    order = torch.tensor([row for rows in lots.values() for row in rows], device=images.device).argsort()
    result, inside = [], []
    for scale in scales:
        levels = [resize(images[rows, :, :height, :width], scale) for (height, width), rows in lots.items()]
        if shared:
            result.append(network(_joined(levels, 0.0)[order]))
            continue
        outputs = [network(level) for level in levels]
        own = [torch.ones_like(first[:, :1], dtype=torch.bool) for first, *_ in outputs]
        parts = zip(zip(*outputs, strict=True), fills, strict=True)
        result.append(tuple(_joined(each, fill)[order] for each, fill in parts))
        inside.append(_joined(own, 0.0)[order])
    return result, tuple(inside)


def shares_norms(module: nn.Module) -> bool:
    """Whether the module has batch norms in training mode.

    Their statistics are those of a whole batch, and processes that synchronise them must execute each equally often.
    """
    return any(isinstance(child, _BatchNorm) and child.training for child in module.modules())


def _joined(parts: Sequence[Tensor], fill: float) -> Tensor:
    """One batch of planes of different sizes, with `fill` to the right of and below the smaller ones."""
    height, width = (max(part.shape[axis] for part in parts) for axis in (-2, -1))
    return torch.cat([functional.pad(p, (0, width - p.shape[-1], 0, height - p.shape[-2]), value=fill) for p in parts])
