"""Every system of the registry, small enough to train for a moment, and objects to train it on.

The small systems are derived from the presets called `NAME-small`: nothing here knows a system by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from maskwright.structures import Instances, Masks
from maskwright.systems import System, create, describe

SIZE = (96, 128)


@cache
def _described(name: str) -> System:
    return describe(f"{name}-small")


def tiny_options(name: str) -> dict[str, Any]:
    """The options of the preset `NAME-small`, with smaller widths, fewer layers and fewer queries."""
    return {key: _shrunk(key, value) for key, value in _described(name).options.items() if key != "classes"}


def _shrunk(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        if key == "backbone":
            return {**{k: _shrunk(k, v) for k, v in value.items()}, **_small_backbone(value)}
        if key in ("transformer", "decoder"):  # attention needs some channels for each head
            return {k: max(64, v // 2) if k == "width" else _shrunk(k, v) for k, v in value.items()}
        return {k: _shrunk(k, v) for k, v in value.items()}
    if key == "dropout":
        return 0.0  # comparisons of two runs in training mode
    if key in ("before", "after") and value:
        return [max(50, v // 3) for v in value]
    if key == "canvas" and value:
        return [128, 128]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if key.endswith(("width", "hidden", "_channels")):
        return min(value, max(32, value // 4))
    if key.endswith(("convs", "layers")):
        return min(value, 2)
    if key.endswith("queries"):
        return min(value, 12 if key == "queries" else 24)
    if key in ("points", "count", "per_step") and value > 64:
        return max(32, value // 8)
    return min(value, 96) if key == "short" else min(value, 160) if key == "long" else value


def _small_backbone(options: Mapping[str, Any]) -> dict[str, Any]:
    if "depth" in options:  # a plain vision transformer
        return {"width": 48, "depth": 3}
    return {"width": 16}


def build(name: str, **options: Any) -> System:
    """The tiny system called `name` with random weights (always the same) and the classes "a" and "b"."""
    torch.manual_seed(0)
    described = _described(name)
    classes = {} if "proposals" in described.tasks else {"classes": ("a", "b")}
    return create(f"{name}-small", **described.with_options({**classes, **tiny_options(name)}, options))


def objects(
    count: int, size: tuple[int, int] = SIZE, side: tuple[int, int] = (40, 30), count_keypoints: int = 17
) -> Instances:
    """`count` upright boxes of `side` (h, w), placed one after the other, with keypoints inside them."""
    generator = torch.Generator().manual_seed(count)
    room = torch.tensor([size[1] - side[1], size[0] - side[0]])
    corners = (torch.rand(count, 2, generator=generator) * room).floor()
    boxes = torch.cat([corners, corners + torch.tensor([side[1], side[0]])], 1)
    crops = [torch.ones(side, dtype=torch.bool)] * count
    points = (
        torch.rand(count, count_keypoints, 2, generator=generator) * torch.tensor([side[1], side[0]]) + corners[:, None]
    )
    keypoints = torch.cat([points, torch.full((count, count_keypoints, 1), 2.0)], 2)
    masks = Masks.from_crops(crops, corners.long(), size)
    return Instances(size, boxes, torch.arange(count) % 2, masks, keypoints=keypoints)


@contextmanager
def first_in_order() -> Iterator[None]:
    """Samples are the first in order, and random points those of one row for all: drawn ones would differ between one
    process and two, and between devices."""
    permuted, drawn = torch.randperm, torch.rand

    def one_row(rows: int, *shape: int, device: torch.device | None = None) -> Tensor:
        return drawn(1, *shape, generator=torch.Generator().manual_seed(0)).to(device or "cpu").expand(rows, *shape)

    torch.randperm = lambda n, **keywords: torch.arange(n, device=keywords.get("device"))
    torch.rand = one_row
    try:
        yield
    finally:
        torch.randperm, torch.rand = permuted, drawn
