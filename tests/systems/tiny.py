"""Every system of the registry, small enough to train for a moment, and objects to train it on.

A system is derived from its preset `NAME-small`: a new one needs no entry here. Tests of a single system that depend on
sizes have their own `build`, made by `sized`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
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
    """The options of the preset `NAME-small` with smaller widths, fewer layers, queries and samples, and no dropout.

    What is made smaller follows from the names of options and groups, which are the same in all systems.
    """
    return {key: _shrunk(key, value) for key, value in _described(name).options.items() if key != "classes"}


def _shrunk(key: str, value: Any) -> Any:
    if isinstance(value, Mapping):
        smaller = {k: _shrunk(k, v) for k, v in value.items()}
        if key == "backbone":  # narrower still: most of the time is spent there
            smaller |= {"width": 48, "depth": 3} if "depth" in value else {"width": 16}
        elif "heads" in value and "width" in value:  # attention needs some channels for each head
            smaller["width"] = max(8 * value["heads"], value["width"] // 4)
        return smaller
    if key == "dropout":
        return 0.0  # tests compare two runs in training mode
    if isinstance(value, (list, tuple)) and value and key in LISTS:
        return [LISTS[key](v) for v in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    for ends, smaller in NUMBERS.items():
        if key.endswith(ends):
            return min(value, smaller(value))
    return value


# Endings of names of options, and the smaller value; the first that fits applies.
NUMBERS: dict[tuple[str, ...], Callable[[int], int]] = {
    ("width", "hidden", "_channels"): lambda value: max(32, value // 4),
    ("convs", "layers"): lambda value: 2,
    ("many_queries",): lambda value: 24,
    ("queries",): lambda value: 12,
    ("points", "per_step", "sampled"): lambda value: max(32, value // 8),
    ("prototypes",): lambda value: 8,
    ("short",): lambda value: 96,
    ("long",): lambda value: 160,
}
LISTS: dict[str, Callable[[int], int]] = {
    "before": lambda value: max(50, value // 3),
    "after": lambda value: max(50, value // 3),
    "canvas": lambda value: 128,
    "grids": lambda value: max(4, value * 2 // 3),
}


def build(name: str, **options: Any) -> System:
    """The tiny system called `name` with random weights (always the same) and the classes "a" and "b"."""
    return _create(name, tiny_options(name), options)


def sized(sizes: Mapping[str, Mapping[str, Any]]) -> Callable[..., System]:
    """`build` for tests that depend on sizes: these options by system, in place of those derived from its preset."""

    def build_sized(name: str, **options: Any) -> System:
        return _create(name, sizes[name] if name in sizes else tiny_options(name), options)

    return build_sized


def _create(name: str, sizes: Mapping[str, Any], options: Mapping[str, Any]) -> System:
    torch.manual_seed(0)
    described = _described(name)
    classes = {} if "proposals" in described.tasks else {"classes": ("a", "b")}
    return create(name, **described.with_options({**classes, **sizes}, options))


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
