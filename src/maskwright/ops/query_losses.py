"""Losses of queries: costs of matching queries with objects, and losses of classes and masks (MaskFormer, arXiv
2107.06278; Mask2Former, arXiv 2112.01527, which compares masks at random points).

Each of L predictions, those after the last decoder layer and after the earlier ones, is matched and trained separately.
A mask is the product of a query's embedding with the features of each pixel, and is computed only for queries that are
matched with an object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.errors import UsageError
from maskwright.ops.assignment import Pairs
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.points import mask_sample, mask_uncertainty, point_sample, uncertain_points
from maskwright.structures import Instances, Masks

BUDGET = 256 << 20  # bytes of scratch


@dataclass(frozen=True)
class MaskPredictions:
    """Classes and masks that queries predict: the raw output of MaskFormer and Mask2Former.

    Attributes:
        classes: Class logits of each prediction, the last prediction last; "no object" is the last class.
        embeddings: Mask embeddings of each prediction.
        features: Features of the pixels, mostly of stride 4; a mask's logits are their product with its embedding.
        size: Height and width of the network's input, padding included.
    """

    classes: Float[Tensor, "l b n k1"]
    embeddings: Float[Tensor, "l b n c"]
    features: Float[Tensor, "b c h w"]
    size: tuple[int, int]

    def masks(self, layer: int = -1) -> Float[Tensor, "b n h w"]:
        """Mask logits of all queries in one prediction."""
        return torch.einsum("bnc,bchw->bnhw", self.embeddings[layer], self.features)

    def masks_of(self, image: int, queries: Int[Tensor, " r"]) -> Float[Tensor, "r h w"]:
        """Mask logits of some queries of one image in the last prediction, in float32."""
        return mask_logits(self.embeddings[-1, image][queries], self.features[image])


class Labelled(Protocol):
    """The objects of one image, as far as the class losses need them."""

    @property
    def labels(self) -> Int[Tensor, " m"]:
        """Class of each object."""
        ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Objects:
    """The target of one image, without crowd regions.

    Attributes:
        labels: Classes of the objects.
        masks: Their masks, on the image without padding.
    """

    labels: Int[Tensor, " m"]
    masks: Masks

    @classmethod
    def from_instances(cls, target: Instances, device: torch.device) -> Objects:
        """Takes labels and masks of a target.

        Args:
            target: The annotated objects of one image.
            device: Device of the labels. Masks remain where they are.

        Raises:
            UsageError: If there are objects without masks.
        """
        if target.crowd is not None and target.crowd.any():
            target = target[~target.crowd]
        masks = target.masks if target.masks is not None else Masks.empty(target.image_size)
        if len(masks) != len(target):
            raise UsageError("targets have boxes but no masks; this loss compares masks")
        return cls(target.labels.to(device), masks)

    def __len__(self) -> int:
        return len(self.labels)


def mask_logits(embeddings: Float[Tensor, "r c"], features: Float[Tensor, "c h w"]) -> Float[Tensor, "r h w"]:
    """Logits of masks: the product of each embedding with the features of each pixel, in float32."""
    return torch.einsum("rc,chw->rhw", embeddings.float(), features.float())


def class_losses(
    logits: Float[Tensor, "l b n k1"], objects: Sequence[Labelled], pairs: Sequence[Pairs], no_object: float = 0.1
) -> Float[Tensor, " l"]:
    """Weighted mean cross entropy of the classes in each prediction (DETR, arXiv 2005.12872, section 3.1).

    Args:
        logits: Class logits, "no object" last.
        objects: The objects of each image.
        pairs: The matched queries and objects of each image; all other queries have the target "no object".
        no_object: Weight of "no object". The sum is divided by the sum of weights, as in the published code.
    """
    last = logits.shape[-1] - 1
    target = torch.full(logits.shape[:3], last, device=logits.device)
    for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
        target[:, image].scatter_(1, queries, own.labels[which])
    weight = torch.where(target == last, no_object, 1.0)
    losses = functional.cross_entropy(logits.float().flatten(0, 2), target.flatten(), reduction="none")
    total = (losses.view_as(target) * weight).sum((1, 2))
    return total / global_mean_count(weight.sum((1, 2)), minimum=1e-6)


def object_count(objects: Sequence[Labelled], device: torch.device) -> Tensor:
    """The divisor of mask losses: the mean number of objects per device, at least 1 in total."""
    return global_mean_count(torch.tensor(float(sum(len(o) for o in objects)), device=device))


def overlap_cost(first: Float[Tensor, "n p"], second: Float[Tensor, "m p"]) -> Float[Tensor, "n m"]:
    """Dice loss of every row with every other; 1 is added to numerator and denominator."""
    return 1 - (2 * first @ second.T + 1) / (first.sum(1)[:, None] + second.sum(1) + 1)


def overlap_loss(first: Float[Tensor, "n p"], second: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
    """Dice loss of each row with the same row of the other tensor; 1 is added to numerator and denominator."""
    return 1 - (2 * (first * second).sum(1) + 1) / (first.sum(1) + second.sum(1) + 1)


# ---- at points -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PointSampling:
    """How masks are compared at points (PointRend, arXiv 1912.08193, section 3.1).

    Attributes:
        count: Points per mask.
        candidates: For the losses, `candidates * count` points are drawn, of which the most uncertain are kept.
        important: Share of the points chosen in this way; the others are uniform.
    """

    count: int = 12544
    candidates: float = 3.0
    important: float = 0.75


@torch.no_grad()
def point_costs(
    probabilities: Float[Tensor, "l b n k"],
    embeddings: Float[Tensor, "l b n c"],
    features: Float[Tensor, "b c h w"],
    objects: Sequence[Objects],
    points: Float[Tensor, "l b p 2"],
    size: tuple[int, int],
    weights: tuple[float, float, float],
) -> list[Float[Tensor, "l n _m"]]:
    """Costs of matching each query with each object (Mask2Former, section 3.3).

    Args:
        probabilities: Class probabilities.
        embeddings: Mask embeddings.
        features: Features of the pixels.
        objects: The objects of each image.
        points: x, y in [0, 1] of the network's input where masks are compared; shared by all queries and objects of an
            image.
        size: Height and width of the network's input.
        weights: Of the negative class probability, the binary cross entropy and the dice loss.

    Returns:
        For each image the cost of every query with every object, in each prediction.
    """
    layers, _, count, _ = points.shape
    costs = []
    for image, own in enumerate(objects):
        cost = probabilities.new_zeros(layers, probabilities.shape[2], len(own), dtype=torch.float32)
        step = max(1, BUDGET // (100 * layers * count))
        for first in range(0, len(own), step):
            rows = slice(first, min(first + step, len(own)))
            pixels = points[:, image].reshape(1, -1, 2) * points.new_tensor([size[1], size[0]])
            truth = mask_sample(own.masks[rows], pixels.expand(rows.stop - first, -1, -1))
            truth = truth.unflatten(1, (layers, count))  # (m, L, P)
            for layer in range(layers):
                # Sampling is linear: the features at the points give the masks at the points.
                sampled = point_sample(features[image, None], points[layer, image, None])[0]  # (C, P)
                logits = embeddings[layer, image].float() @ sampled.float()
                soft, target = logits.sigmoid(), truth[:, layer]
                # -t log s - (1 - t) log (1 - s) is softplus(x) - t x
                cross = (functional.softplus(logits).sum(1)[:, None] - logits @ target.T) / count
                classes = -probabilities[layer, image][:, own.labels[rows]]
                parts = (classes, cross, overlap_cost(soft, target))
                cost[layer, :, rows] = sum(w * p for w, p in zip(weights, parts, strict=True))
        costs.append(cost)
    return costs


def draw_matching_points(
    layers: int, images: int, pairs: int, sampling: PointSampling, device: torch.device
) -> Float[Tensor, "l b p 2"]:
    """Draws the points at which masks are compared for matching.

    The published code draws, for the last prediction and then for the others, first these points, then those of the
    losses of `pairs` masks. Here all predictions are matched before any loss is computed. So that the same seed gives
    the same points, the numbers that the losses will draw are skipped, and the generator's state is restored.

    Args:
        layers: Number of predictions.
        images: Number of images.
        pairs: Number of matched masks per prediction.
        sampling: How many points there are.
        device: Where they are drawn.
    """
    order = [layers - 1, *range(layers - 1)]
    points = torch.zeros(layers, images, sampling.count, 2, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for layer in order:
            points[layer] = torch.rand(images, sampling.count, 2, device=device)
            _skip_loss_points(pairs, sampling, device)
    return points


def _skip_loss_points(pairs: int, sampling: PointSampling, device: torch.device) -> None:
    """Draws and discards what `uncertain_points` draws, a few masks at a time."""
    kept = int(sampling.important * sampling.count)
    for count in (int(sampling.candidates * sampling.count) if kept else 0, sampling.count - kept):
        for first in range(0, pairs, 64):
            torch.rand(min(64, pairs - first), count, 2, device=device)


def point_losses(
    embeddings: Float[Tensor, "l b n c"],
    features: Float[Tensor, "b c h w"],
    objects: Sequence[Objects],
    pairs: Sequence[Pairs],
    size: tuple[int, int],
    sampling: PointSampling,
) -> tuple[Float[Tensor, " l"], Float[Tensor, " l"]]:
    """Binary cross entropy and dice loss of the matched masks at points (Mask2Former, section 3.3).

    Args:
        embeddings: Mask embeddings.
        features: Features of the pixels.
        objects: The objects of each image.
        pairs: The matched queries and objects of each image.
        size: Height and width of the network's input.
        sampling: Each mask has its own points, most of them where it is uncertain.

    Returns:
        Sums over the matched pairs of each prediction: of the mean cross entropy, and of the dice loss.
    """
    layers, images = embeddings.shape[:2]
    planes = features.unbind(0)
    chosen = [embeddings[:, b].gather(1, _wide(q, embeddings)) for b, (q, _) in enumerate(pairs)]  # (L, P_b, C) each
    points = _uncertain_points(chosen, planes, layers, images, sampling)
    sums = [embeddings.new_zeros(layers, 2, dtype=torch.float32)]
    total = sum(len(c[0]) for c in chosen) * layers
    recompute = total * (planes[0][0].numel() + 8 * sampling.count) * 4 > 2 * BUDGET
    for own, queries, plane, places, (_, which) in zip(objects, chosen, planes, points, pairs, strict=True):
        count = queries.shape[1]
        if not count:
            continue
        flat = (queries.flatten(0, 1), places.flatten(0, 1), which.flatten())  # one row per pair of a prediction
        step = max(1, BUDGET // (4 * plane[0].numel() + 100 * sampling.count))
        terms = []
        for rows, place, owners in zip(*(v.split(step) for v in flat), strict=True):
            truth = mask_sample(own.masks, place * place.new_tensor([size[1], size[0]]), owners)
            arguments = (rows, plane, place, truth)
            # Above the memory bound nothing is kept for the backward pass, which computes the masks again.
            terms.append(
                checkpoint(_pair_terms, *arguments, use_reentrant=False) if recompute else _pair_terms(*arguments)
            )
        sums.append(torch.cat(terms).unflatten(0, (layers, count)).sum(1))
    cross, overlap = torch.stack(sums).sum(0).unbind(1)
    return cross, overlap


@torch.no_grad()
def _uncertain_points(
    chosen: Sequence[Tensor], planes: Sequence[Tensor], layers: int, images: int, sampling: PointSampling
) -> list[Tensor]:
    """Points (L, P_b, count, 2) of each image, drawn prediction by prediction, the last one first."""
    counts = [c.shape[1] for c in chosen]
    found: list[list[Tensor]] = [[] for _ in range(layers)]
    for layer in (layers - 1, *range(layers - 1)):
        torch.rand(images, sampling.count, 2, device=planes[0].device)  # those of the matching
        masks = [mask_logits(c[layer], plane) for c, plane in zip(chosen, planes, strict=True)]
        points = uncertain_points(
            torch.cat(masks)[:, None], sampling.count, mask_uncertainty, candidates=sampling.candidates,
            important=sampling.important,
        )  # fmt: skip
        found[layer] = list(points.split(counts))
    return [torch.stack([found[layer][image] for layer in range(layers)]) for image in range(images)]


def _pair_terms(rows: Tensor, plane: Tensor, points: Tensor, truth: Tensor) -> Float[Tensor, "r 2"]:
    """Cross entropy and dice loss of each mask at its points."""
    logits = point_sample(mask_logits(rows, plane)[:, None], points)[:, 0]
    cross = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    return torch.stack([cross, overlap_loss(logits.sigmoid(), truth)], 1)


def _wide(queries: Tensor, embeddings: Tensor) -> Tensor:
    """Indices of queries as `gather` needs them."""
    return queries[..., None].expand(-1, -1, embeddings.shape[-1])


# ---- names -----------------------------------------------------------------------------------------------------------


def name_terms(terms: dict[str, Float[Tensor, " l"]], idle: Tensor | float = 0.0) -> dict[str, Tensor]:
    """Names the loss terms of each prediction.

    Args:
        terms: Losses of all predictions, the last one last.
        idle: A zero with a gradient for parameters that may have none, added to the terms of the last prediction.

    Returns:
        `NAME` for the last prediction and `NAME_0`, ... for the earlier ones.
    """
    result = {}
    for name, values in terms.items():
        *earlier, last = values.unbind(0)
        result[name] = last + idle
        result |= {f"{name}_{number}": value for number, value in enumerate(earlier)}
    return result
