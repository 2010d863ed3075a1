"""Point refinement of coarse masks (PointRend, arXiv 1912.08193): a small network that is asked of single points.

It reads a fine feature of the image and the coarse prediction at a point, and says what is there. In training it is
asked where the coarse prediction is unsure; at test a mask is doubled again and again, and only the cells that are
unsure are asked for. It works for masks of boxes (`BoxPoints`) and for masks of whole images (`PlanePoints`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from maskwright.errors import UsageError
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.points import (
    box_points,
    grid_points,
    mask_sample,
    mask_uncertainty,
    point_sample,
    subdivide,
    uncertain_points,
)
from maskwright.structures import Instances

ClassAxes = tuple[
    tuple[int, int], ...
]  # of a parameter: axes with rows per class, and how many entries come before them


@dataclass(frozen=True)
class PointRules:
    """How points are chosen; UsageError where that cannot be, in the words of systems' options.

    count, candidates, important  in training, of each mask: see `ops.points.uncertain_points`
    steps, points                 at test: doublings, and cells asked for after each
    """

    count: int = 196
    candidates: float = 3.0
    important: float = 0.75
    steps: int = 5
    points: int = 784

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1 or not 1 <= self.candidates < math.inf:
            raise UsageError(
                f"candidates is {self.candidates}, important {self.important}; at least 1 and a share are needed"
            )
        if self.count < 1:
            raise UsageError(f"point_count is {self.count}; expected at least 1")
        if self.steps < 0:
            raise UsageError(f"refine_steps is {self.steps}; expected 0, which refines nothing, or more")
        if self.points < 1:
            raise UsageError(f"refine_points is {self.points}; expected at least 1; refine_steps=0 refines nothing")


class PointHead(nn.Module):
    """The same few layers at each point: fine features and coarse logits in, logits out (section 3.3). With `each` the
    coarse logits are put in again before every layer."""

    def __init__(
        self, channels: int, coarse: int, outputs: int, *, width: int = 256, layers: int = 3, each: bool = True
    ):
        super().__init__()
        self.each, self.coarse = each, coarse
        self.fcs = nn.ModuleList()
        inputs = channels + coarse
        for _ in range(layers):
            self.fcs.append(nn.Conv1d(inputs, width, 1))
            inputs = width + coarse * each
        self.logits = nn.Conv1d(inputs, outputs, 1)
        for layer in self.fcs:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")  # pyright: ignore[reportArgumentType]
            nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]
        nn.init.normal_(self.logits.weight, std=0.001)
        nn.init.zeros_(self.logits.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, fine: Float[Tensor, "n c p"], coarse: Float[Tensor, "n k p"]) -> Float[Tensor, "n o p"]:
        return self.logits(self._read(fine, coarse))

    def of(
        self, fine: Float[Tensor, "n c p"], coarse: Float[Tensor, "n k p"], labels: Int[Tensor, " n"]
    ) -> Float[Tensor, "n 1 p"]:
        """Each row's logits of its own label alone: the others decide nothing."""
        bias = self.logits.bias
        assert bias is not None
        return self.logits.weight[labels].mT @ self._read(fine, coarse) + bias[labels, None, None]

    def class_rows(self) -> dict[str, ClassAxes]:
        """Where the classes' rows are, if there is a coarse logit and an output for each."""
        rows: dict[str, ClassAxes] = {"logits.bias": ((0, 0),), "logits.weight": ((0, 0),)}
        for number, layer in enumerate([*self.fcs, self.logits]):
            name = f"fcs.{number}.weight" if number < len(self.fcs) else "logits.weight"
            if number == 0 or self.each:
                own = layer.weight.shape[1] - self.coarse  # pyright: ignore[reportIndexIssue]
                rows[name] = (*rows.get(name, ()), (1, own))  # pyright: ignore[reportArgumentType]
        return rows

    def _read(self, fine: Tensor, coarse: Tensor) -> Tensor:
        coarse = coarse.to(fine.dtype)
        x = torch.cat([fine, coarse], 1)
        for layer in self.fcs:
            x = functional.relu(layer(x), inplace=True)
            x = torch.cat([x, coarse], 1) if self.each else x
        return x


class BoxPoints(nn.Module):
    """Refines masks of boxes. `feature` is the pyramid's finest level, for boxes of every size.

    coarse  what the coarse head says of each box: K masks
    start   "grid": the first mask is asked for at every cell of a regular grid, and the coarse one is only read
            (PointRend, whose coarse mask is tiny); "coarse": the coarse mask is the first one
    """

    side = 7  # of the grid that doublings are counted from, where there is no coarse mask

    def __init__(
        self,
        channels: int,
        kinds: int,
        *,
        width: int = 256,
        stride: int = 4,
        rules: PointRules | None = None,
        start: Literal["grid", "coarse"] = "coarse",
    ):
        super().__init__()
        self.rules = rules or PointRules()
        self.stride, self.start = stride, start
        self.head = PointHead(channels, kinds, kinds, width=width)

    def answer(
        self, feature: Tensor, coarse: Tensor, boxes: Sequence[Tensor], labels: Tensor, points: Float[Tensor, "r p 2"]
    ) -> Float[Tensor, "r 1 p"]:
        """Logits of each box's label at points of its inside."""
        fine = read_in_boxes(feature, boxes, points, self.stride)
        return self.head.of(fine, point_sample(coarse, points), labels)

    def choose(self, coarse: Tensor, labels: Tensor) -> Float[Tensor, "r p 2"]:
        """Points to learn from."""
        unsure = coarse.detach()[torch.arange(len(labels), device=labels.device), labels]
        return uncertain_points(
            unsure[:, None].float(), self.rules.count, mask_uncertainty,
            candidates=self.rules.candidates, important=self.rules.important,
        )  # fmt: skip

    def loss(
        self,
        feature: Float[Tensor, "b c h w"],
        coarse: Float[Tensor, "r k *s"],
        boxes: Sequence[Float[Tensor, "_n 4"]],
        labels: Int[Tensor, " r"],
        targets: Sequence[Instances],
        owners: Sequence[Int[Tensor, " _n"]],
        points: Float[Tensor, "r p 2"] | None = None,
    ) -> Float[Tensor, ""]:
        """Cross entropy, mean over all points. What is true of a point is read bilinearly from the object's mask, so it
        may lie between 0 and 1. `points`: these instead of drawn ones."""
        points = self.choose(coarse, labels) if points is None else points
        logits = self.answer(feature, coarse, boxes, labels, points)[:, 0].float()
        truth = []
        for target, own, inside, row in zip(targets, boxes, points.split([len(b) for b in boxes]), owners, strict=True):
            if target.masks is not None:
                truth.append(mask_sample(target.masks, box_points(own, inside), row))
            elif len(row):
                raise UsageError("a target has boxes but no masks; points are learnt from masks, give them")
        truth = torch.cat(truth) if truth else logits.new_zeros(logits.shape)
        count = global_mean_count(logits.new_tensor(float(truth.numel())))
        return functional.binary_cross_entropy_with_logits(logits, truth, reduction="sum") / count

    @torch.no_grad()
    def refine(
        self,
        feature: Float[Tensor, "b c h w"],
        coarse: Float[Tensor, "r k *s"],
        boxes: Sequence[Float[Tensor, "_n 4"]],
        labels: Int[Tensor, " r"],
        budget: int = 64 << 20,
    ) -> Float[Tensor, "r s s"]:
        """Fine masks as logits; so many at a time as need `budget` bytes."""
        # Where every cell would be asked for after a doubling, the doubling itself is not needed.
        side, steps, most = coarse.shape[-1] if coarse.dim() == 4 else self.side, self.rules.steps, self.rules.points
        while self.start == "grid" and steps and 4 * side * side <= most:
            side, steps = 2 * side, steps - 1
        last = side << steps
        asked = max(most, side * side) * 4 * (2 * feature.shape[1] + sum(coarse.shape[1:2]))
        at_once, parts, counts = max(1, budget // (asked + 16 * last * last)), [], [len(b) for b in boxes]
        rows = zip(boxes, coarse.split(counts), labels.split(counts), strict=True)
        for image, (own, said, kinds) in enumerate(rows):
            for some, read, label in zip(own.split(at_once), said.split(at_once), kinds.split(at_once), strict=True):
                if not len(some):
                    continue

                def answer(
                    points: Tensor, feature: Tensor = feature[image : image + 1], read: Tensor = read,
                    some: Tensor = some, label: Tensor = label,
                ) -> Tensor:  # fmt: skip
                    return self.answer(feature, read, [some], label, points).float()

                if self.start == "grid":
                    first = answer(grid_points(len(some), side, side, some.device)).unflatten(2, (side, side))
                else:
                    first = read[torch.arange(len(label), device=label.device), label][:, None].float()
                parts.append(subdivide(first, answer, mask_uncertainty, steps=steps, points=most)[:, 0])
        return torch.cat(parts) if parts else feature.new_zeros(0, last, last, dtype=torch.float32)


def read_in_boxes(
    feature: Float[Tensor, "b c h w"], boxes: Sequence[Float[Tensor, "_n 4"]], points: Float[Tensor, "r p 2"],
    stride: int,
) -> Float[Tensor, "r c p"]:  # fmt: skip
    """A feature of `stride` at points of the insides of boxes, which are in the input's pixels."""
    extent = points.new_tensor([feature.shape[3] * stride, feature.shape[2] * stride])
    parts = []
    for level, own, inside in zip(feature.split(1), boxes, points.split([len(b) for b in boxes]), strict=True):
        places = (box_points(own.float(), inside) / extent).flatten(0, 1)[None]
        parts.append(point_sample(level, places)[0].unflatten(1, inside.shape[:2]).transpose(0, 1))
    return torch.cat(parts)


class PlanePoints(nn.Module):
    """Refines masks of whole images, one logit map per object, whatever its class.

    feature  fine, of the image: the same for all its objects, so that the coarse logit alone says which is meant
    """

    def __init__(self, channels: int, *, width: int = 256, rules: PointRules | None = None):
        super().__init__()
        self.rules = rules or PointRules(count=1024, steps=2, points=8192)
        self.head = PointHead(channels, 1, 1, width=width)

    def answer(
        self, feature: Float[Tensor, "1 c h w"], coarse: Float[Tensor, "n _h _w"], points: Float[Tensor, "n p 2"]
    ) -> Float[Tensor, "n 1 p"]:
        """Logits of each of one image's masks at points of the image."""
        fine = point_sample(feature, points.flatten(0, 1)[None])[0].unflatten(1, points.shape[:2]).transpose(0, 1)
        return self.head(fine, point_sample(coarse[:, None], points))

    def loss_sum(
        self,
        feature: Float[Tensor, "1 c h w"],
        coarse: Float[Tensor, "n _h _w"],
        truth: Callable[[Float[Tensor, "n p 2"]], Float[Tensor, "n p"]],
        budget: int = 64 << 20,
    ) -> Float[Tensor, ""]:
        """Sum over one image's masks of the mean cross entropy over their points; `truth` reads the objects'.

        budget  bytes of what the points read: with more masks than fit, each part is computed once more on the way back
                instead of being kept
        """
        points = uncertain_points(
            coarse.detach()[:, None].float(), self.rules.count, mask_uncertainty,
            candidates=self.rules.candidates, important=self.rules.important,
        )  # fmt: skip
        known = truth(points)

        def part(coarse: Tensor, points: Tensor, known: Tensor) -> Tensor:
            logits = self.answer(feature, coarse, points)[:, 0].float()
            return functional.binary_cross_entropy_with_logits(logits, known, reduction="sum")

        step = max(1, budget // (4 * self.rules.count * (feature.shape[1] + 1)))
        if len(coarse) <= step:
            return part(coarse, points, known) / self.rules.count
        parts = zip(coarse.split(step), points.split(step), known.split(step), strict=True)
        sums: list[Any] = [checkpoint(part, *own, use_reentrant=False) for own in parts]
        return torch.stack(sums).sum() / self.rules.count

    @torch.no_grad()
    def refine(
        self, feature: Float[Tensor, "1 c h w"], coarse: Float[Tensor, "n _h _w"], budget: int = 256 << 20
    ) -> Float[Tensor, "n _p _q"]:
        """Fine masks as logits; so many at a time as need `budget` bytes."""
        cells = coarse.shape[1] * coarse.shape[2] << (2 * self.rules.steps)
        asked = min(self.rules.points, cells) * 4 * 2 * (feature.shape[1] + 256)
        parts = [
            subdivide(
                some[:, None].float(), lambda points, some=some: self.answer(feature, some, points).float(),
                mask_uncertainty, steps=self.rules.steps, points=self.rules.points,
            )[:, 0]
            for some in coarse.split(max(1, budget // (asked + 16 * cells)))
            if len(some)
        ]  # fmt: skip
        empty = coarse.new_zeros(0, *(n << self.rules.steps for n in coarse.shape[1:]), dtype=torch.float32)
        return torch.cat(parts) if parts else empty
