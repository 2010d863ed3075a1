"""Connected components of masks."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor


def component_areas(planes: Bool[Tensor, "n h w"]) -> Int[Tensor, "n h w"]:
    """For each pixel of a mask the number of pixels of its component; 0 outside of the mask.

    Pixels that touch at an edge or at a corner belong to the same component. The components are labelled on the host.
    """
    from scipy import ndimage  # pyright: ignore[reportMissingTypeStubs] - untyped

    if not planes.numel():
        return torch.zeros(planes.shape, dtype=torch.int64, device=planes.device)
    touching = np.zeros((3, 3, 3), bool)
    touching[1] = True  # planes are not connected with each other
    labels: Any = cast(Any, ndimage).label(planes.cpu().numpy(), touching)[0]
    counts = np.bincount(labels.reshape(-1))
    counts[0] = 0
    return torch.from_numpy(counts[labels]).to(planes.device)  # pyright: ignore[reportUnknownMemberType] - untyped in torch


def small_components(planes: Bool[Tensor, "n h w"], most: int) -> Bool[Tensor, "n h w"]:
    """The components of at most `most` pixels; see `component_areas`."""
    areas = component_areas(planes)
    return (areas > 0) & (areas <= most)
