"""Learning with queries: which query answers for which object, and the losses of classes and masks (MaskFormer,
arXiv 2107.06278; Mask2Former, 2112.01527, which looks at masks at random points alone).

Every prediction, of the last decoder layer and of those before, is matched and learns by itself. A mask is the product
of a query's embedding with the features of each pixel, and is only made of those queries that have an object.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
class MaskAnswers:
    """What queries say in each prediction, the last one last, and what their masks are made with."""

    classes: Float[Tensor, "l b n k1"]  # logits, "no object" last
    embeddings: Float[Tensor, "l b n c"]
    features: Float[Tensor, "b c h w"]  # of each pixel, stride 4 mostly
    size: tuple[int, int]  # H, W of the input, padding included

    def masks(self, layer: int = -1) -> Float[Tensor, "b n h w"]:
        """Logits of all masks of one prediction."""
        return torch.einsum("bnc,bchw->bnhw", self.embeddings[layer], self.features)

    def masks_of(self, image: int) -> Callable[[Tensor], Tensor]:
        """What gives the logits (R, h, w) of the last masks of some queries of an image."""
        return lambda rows: torch.einsum(
            "nc,chw->nhw", self.embeddings[-1, image][rows].float(), self.features[image].float()
        )


class Labelled(Protocol):
    """The objects of one image, as far as losses of classes need them."""

    @property
    def labels(self) -> Int[Tensor, " m"]: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Objects:
    """What is to be learnt in one image: no crowd."""

    labels: Int[Tensor, " m"]
    masks: Masks

    @classmethod
    def of(cls, target: Instances, device: torch.device) -> Objects:
        if target.crowd is not None and target.crowd.any():
            target = target[~target.crowd]
        masks = target.masks if target.masks is not None else Masks.empty(target.image_size)
        if len(masks) != len(target):
            raise UsageError("a target has boxes but no masks, from which queries could learn; give masks")
        return cls(target.labels.to(device), masks)

    def __len__(self) -> int:
        return len(self.labels)


def class_losses(
    logits: Float[Tensor, "l b n k1"], objects: Sequence[Labelled], pairs: Sequence[Pairs], no_object: float = 0.1
) -> Float[Tensor, " l"]:
    """Cross entropy of all queries, of each prediction; those without an object learn the last class, "no object", and
    weigh `no_object`. Divided by the sum of weights, as published."""
    none = logits.shape[-1] - 1
    goal = torch.full(logits.shape[:3], none, device=logits.device)
    for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
        goal[:, image].scatter_(1, queries, own.labels[which])
    weight = torch.where(goal == none, no_object, 1.0)
    losses = functional.cross_entropy(logits.float().flatten(0, 2), goal.flatten(), reduction="none")
    total = (losses.view_as(goal) * weight).sum((1, 2))
    return total / global_mean_count(weight.sum((1, 2)), minimum=1e-6)


def object_count(objects: Sequence[Labelled], device: torch.device) -> Tensor:
    """What mask losses divide by: the mean over all devices of how many objects there are, at least 1."""
    return global_mean_count(torch.tensor(float(sum(len(o) for o in objects)), device=device))


def overlap_cost(first: Float[Tensor, "n p"], second: Float[Tensor, "m p"]) -> Float[Tensor, "n m"]:
    """Dice loss of every row with every other, 1 added above and below."""
    return 1 - (2 * first @ second.T + 1) / (first.sum(1)[:, None] + second.sum(1) + 1)


def overlap_loss(first: Float[Tensor, "n p"], second: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
    """The same of each row with its own."""
    return 1 - (2 * (first * second).sum(1) + 1) / (first.sum(1) + second.sum(1) + 1)


# ---- at points -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Points:
    """How masks are compared at points.

    count       points of a mask
    candidates  times as many are drawn for the losses, of which the least sure are kept for a share `important`
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
    places: Float[Tensor, "l b p 2"],
    size: tuple[int, int],
    weights: tuple[float, float, float],
) -> list[Float[Tensor, "l n _m"]]:
    """What it costs each query to answer for each object: of class, binary cross entropy and dice, times `weights`,
    masks being compared at `places`, which all queries and objects of an image share."""
    layers, _, count, _ = places.shape
    costs = []
    for image, own in enumerate(objects):
        cost = probabilities.new_zeros(layers, probabilities.shape[2], len(own), dtype=torch.float32)
        step = max(1, BUDGET // (100 * layers * count))
        for first in range(0, len(own), step):
            rows = slice(first, min(first + step, len(own)))
            pixels = places[:, image].reshape(1, -1, 2) * places.new_tensor([size[1], size[0]])
            truth = mask_sample(own.masks[rows], pixels.expand(rows.stop - first, -1, -1))
            truth = truth.unflatten(1, (layers, count))  # (m, L, P)
            for layer in range(layers):
                # Reading is linear: features at the points make the masks at the points.
                read = point_sample(features[image, None], places[layer, image, None])[0]  # (C, P)
                logits = embeddings[layer, image].float() @ read.float()
                soft, wanted = logits.sigmoid(), truth[:, layer]
                # -t log s - (1 - t) log (1 - s) is softplus(x) - t x
                cross = (functional.softplus(logits).sum(1)[:, None] - logits @ wanted.T) / count
                classes = -probabilities[layer, image][:, own.labels[rows]]
                parts = (classes, cross, overlap_cost(soft, wanted))
                cost[layer, :, rows] = sum(w * p for w, p in zip(weights, parts, strict=True))
        costs.append(cost)
    return costs


def draw_places(layers: int, images: int, pairs: int, rules: Points, device: torch.device) -> Tensor:
    """(L, B, P, 2): where masks are compared for matching.

    The published code draws, for the last prediction and then for the others, first these points, then those of the
    losses, of `pairs` masks. Here all are matched before one learns; so the generator looks ahead, passing by what the
    losses will draw, and is put back.
    """
    order = [layers - 1, *range(layers - 1)]
    places = torch.zeros(layers, images, rules.count, 2, device=device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for layer in order:
            places[layer] = torch.rand(images, rules.count, 2, device=device)
            _drawn(pairs, rules, device)
    return places


def _drawn(pairs: int, rules: Points, device: torch.device) -> None:
    """Draws what `uncertain_points` does, a few masks at a time, and forgets it."""
    kept = int(rules.important * rules.count)
    for count in (int(rules.candidates * rules.count) if kept else 0, rules.count - kept):
        for first in range(0, pairs, 64):
            torch.rand(min(64, pairs - first), count, 2, device=device)


def point_losses(
    embeddings: Float[Tensor, "l b n c"],
    features: Float[Tensor, "b c h w"],
    objects: Sequence[Objects],
    pairs: Sequence[Pairs],
    size: tuple[int, int],
    rules: Points,
) -> tuple[Float[Tensor, " l"], Float[Tensor, " l"]]:
    """Sums over the matched pairs of each prediction of the mean binary cross entropy at points, and of dice: at points
    of each mask's own, most of them where it is unsure."""
    layers, images = embeddings.shape[:2]
    planes = features.unbind(0)
    chosen = [embeddings[:, b].gather(1, _wide(q, embeddings)) for b, (q, _) in enumerate(pairs)]  # (L, P_b, C) each
    places = _unsure_places(chosen, planes, layers, images, rules)
    sums = [embeddings.new_zeros(layers, 2, dtype=torch.float32)]
    total = sum(len(c[0]) for c in chosen) * layers
    frugal = total * (planes[0][0].numel() + 8 * rules.count) * 4 > 2 * BUDGET
    for own, queries, plane, at, (_, which) in zip(objects, chosen, planes, places, pairs, strict=True):
        count = queries.shape[1]
        if not count:
            continue
        flat = (queries.flatten(0, 1), at.flatten(0, 1), which.flatten())  # row: a prediction's pair
        step = max(1, BUDGET // (4 * plane[0].numel() + 100 * rules.count))
        terms = []
        for rows, points, owners in zip(*(v.split(step) for v in flat), strict=True):
            truth = mask_sample(own.masks, points * points.new_tensor([size[1], size[0]]), owners)
            arguments = (rows, plane, points, truth)
            # Where it is much, nothing is kept for the backward pass: it makes the masks again.
            terms.append(
                checkpoint(_pair_terms, *arguments, use_reentrant=False) if frugal else _pair_terms(*arguments)
            )
        sums.append(torch.cat(terms).unflatten(0, (layers, count)).sum(1))
    cross, overlap = torch.stack(sums).sum(0).unbind(1)
    return cross, overlap


@torch.no_grad()
def _unsure_places(
    chosen: Sequence[Tensor], planes: Sequence[Tensor], layers: int, images: int, rules: Points
) -> list[Tensor]:
    """For each image (L, P_b, points, 2): drawn prediction by prediction, the last one first."""
    counts = [c.shape[1] for c in chosen]
    found: list[list[Tensor]] = [[] for _ in range(layers)]
    for layer in (layers - 1, *range(layers - 1)):
        torch.rand(images, rules.count, 2, device=planes[0].device)  # those of the matching
        masks = [
            torch.einsum("pc,chw->phw", c[layer].float(), plane.float())
            for c, plane in zip(chosen, planes, strict=True)
        ]
        every = uncertain_points(
            torch.cat(masks)[:, None], rules.count, mask_uncertainty, candidates=rules.candidates,
            important=rules.important,
        )  # fmt: skip
        found[layer] = list(every.split(counts))
    return [torch.stack([found[layer][image] for layer in range(layers)]) for image in range(images)]


def _pair_terms(rows: Tensor, plane: Tensor, points: Tensor, truth: Tensor) -> Float[Tensor, "r 2"]:
    masks = torch.einsum("rc,chw->rhw", rows.float(), plane.float())
    logits = point_sample(masks[:, None], points)[:, 0]
    cross = functional.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(1)
    return torch.stack([cross, overlap_loss(logits.sigmoid(), truth)], 1)


def _wide(queries: Tensor, embeddings: Tensor) -> Tensor:
    return queries[..., None].expand(-1, -1, embeddings.shape[-1])


# ---- names -----------------------------------------------------------------------------------------------------------


def named(terms: dict[str, Float[Tensor, " l"]], idle: Any = 0.0) -> dict[str, Tensor]:
    """`NAME` for the last prediction and `NAME_0` ... for the earlier ones; `idle`, a zero with a gradient, is added
    to all of the first kind."""
    result = {}
    for name, values in terms.items():
        *earlier, last = values.unbind(0)
        result[name] = last + idle
        result |= {f"{name}_{number}": value for number, value in enumerate(earlier)}
    return result
