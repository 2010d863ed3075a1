"""A cache for the features of a frozen detector, which are the same each time an image is seen."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from maskwright.systems.kinds.detectors import FrozenFeatures


class FeatureCache:
    """Frozen features of images in host memory, by a hash of the images.

    A full cache keeps its entries and accepts no more: an epoch reads all images before it reads the first one again.
    Copies and pickles of a cache are empty.

    Args:
        budget: Capacity in bytes.
    """

    def __init__(self, budget: int):
        self.budget, self.used = budget, 0
        self.entries: dict[bytes, FrozenFeatures] = {}
        self.hits = self.misses = 0
        self.state: object = None  # of the network that computed the entries

    def __deepcopy__(self, memo: Any) -> FeatureCache:
        return FeatureCache(self.budget)

    def __getstate__(self) -> dict[str, Any]:
        return vars(FeatureCache(self.budget))

    def clear(self) -> None:
        """Removes all entries."""
        self.__init__(self.budget)

    def validate(self, state: object) -> None:
        """Removes all entries if they were computed in another state of the network."""
        if state != self.state:
            self.clear()
            self.state = state

    @staticmethod
    def key(image: Float[Tensor, "c h w"]) -> bytes:
        """Hash of an image's values and shape."""
        raw = image.detach().cpu().contiguous()
        return hashlib.blake2b(raw.view(torch.uint8).numpy().data, key=str(tuple(raw.shape)).encode()).digest()

    def get(self, key: bytes, device: torch.device) -> FrozenFeatures | None:
        """The entry of a key on `device`; None if there is none."""
        entry = self.entries.get(key)
        self.hits, self.misses = self.hits + (entry is not None), self.misses + (entry is None)
        return None if entry is None else _moved(entry, device)

    def put(self, key: bytes, features: FrozenFeatures) -> None:
        """Adds an entry if it fits into the budget."""
        size = sum(t.numel() * t.element_size() for t in _tensors(features))
        if self.used + size <= self.budget:
            self.entries[key] = _moved(features, torch.device("cpu"))
            self.used += size


def _tensors(features: FrozenFeatures) -> list[Tensor]:
    """All tensors, in the order of the fields."""
    return [features.boxes, features.scores, features.queries, *features.memory, features.fine]


def _moved(features: FrozenFeatures, device: torch.device) -> FrozenFeatures:
    """The features on `device`, without gradients."""
    boxes, scores, queries, *memory, fine = (t.detach().to(device) for t in _tensors(features))
    return FrozenFeatures(boxes, scores, queries, tuple(memory), fine)
