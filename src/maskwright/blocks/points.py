"""Refinement of coarse masks at single points (PointRend, arXiv 1912.08193).

A small network predicts the mask at a point from a fine feature of the image and the coarse prediction there. In
training the points are drawn where the coarse prediction is uncertain. At test time a mask is upsampled repeatedly, and
only its most uncertain cells are predicted anew. `BoxRefinement` does this for masks inside boxes, `PlaneRefinement`
for masks of whole images; both are arithmetic around the network, a `PointHead`, that is passed to them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

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
from maskwright.options import OptionGroup
from maskwright.structures import Instances

ClassAxes = tuple[tuple[int, int], ...]  # of a parameter: (axis with rows per class, number of entries before them)


@dataclass(frozen=True)
class PointOptions(OptionGroup):
    """Width of the point network, and how points are chosen, as options of a system.

    Attributes:
        width: Channels of the layers of the point network.
        count: Points per mask in training.
        candidates: Uniform points that are drawn for each point that is kept (section 3.2: 3).
        important: Share of the points that are the most uncertain candidates; the others are uniform. 0.75 is "mildly
            biased"; `candidates` 1 and `important` 0 give uniform points.
        steps: Number of upsampling steps at test time; 0 leaves the coarse mask as it is.
        per_step: Cells that are predicted anew after each step.
    """

    label: ClassVar[str] = "points"

    width: int = 256
    count: int = 196
    candidates: float = 3.0
    important: float = 0.75
    steps: int = 5
    per_step: int = 784

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.important <= 1:
            raise UsageError(f"points.important must be between 0 and 1, got {self.important}")
        if not 1 <= self.candidates < math.inf:
            raise UsageError(f"points.candidates must be at least 1, got {self.candidates}")
        for name, least in (("width", 1), ("count", 1), ("steps", 0), ("per_step", 1)):
            if getattr(self, name) < least:
                hint = "; points.steps=0 disables refinement" if name == "per_step" else ""
                raise UsageError(f"points.{name} must be at least {least}, got {getattr(self, name)}{hint}")


PointsLike = Mapping[str, Any] | PointOptions


class PointHead(nn.Module):
    """The same layers at every point: fine features and coarse logits to logits (section 3.3).

    Args:
        channels: Channels of the fine features.
        coarse: Number of coarse logits.
        outputs: Number of output logits.
        width: Channels of the hidden layers.
        layers: Number of hidden layers.
        each: Whether the coarse logits are concatenated again before every layer (detectron2's instance head).
    """

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

    def forward(
        self, fine: Float[Tensor, "n c p"], coarse: Float[Tensor, "n k p"], labels: Int[Tensor, " n"] | None = None
    ) -> Float[Tensor, "n o p"]:
        """Computes logits at points.

        Args:
            fine: Fine features at the points.
            coarse: Coarse logits at the points.
            labels: Compute the logits of one output per row only, which saves the other outputs.

        Returns:
            Logits (n, outputs, p); (n, 1, p) with `labels`.
        """
        coarse = coarse.to(fine.dtype)
        x = torch.cat([fine, coarse], 1)
        for layer in self.fcs:
            x = functional.relu(layer(x), inplace=True)
            x = torch.cat([x, coarse], 1) if self.each else x
        if labels is None:
            return self.logits(x)
        bias = self.logits.bias
        assert bias is not None
        return self.logits.weight[labels].mT @ x + bias[labels, None, None]

    def class_rows(self) -> dict[str, ClassAxes]:
        """Where parameters hold rows per class, if there is a coarse logit and an output for each class."""
        rows: dict[str, ClassAxes] = {"logits.bias": ((0, 0),), "logits.weight": ((0, 0),)}
        for number, layer in enumerate([*self.fcs, self.logits]):
            name = f"fcs.{number}.weight" if number < len(self.fcs) else "logits.weight"
            if number == 0 or self.each:
                own = layer.weight.shape[1] - self.coarse  # pyright: ignore[reportIndexIssue]
                rows[name] = (*rows.get(name, ()), (1, own))  # pyright: ignore[reportArgumentType]
        return rows


@dataclass(frozen=True)
class BoxRefinement:
    """Refines masks inside boxes. The fine feature is the finest pyramid level, whatever the size of the box.

    Attributes:
        options: How points are chosen.
        stride: Stride of the fine feature.
        start: The first mask at test time. "coarse": the coarse mask itself. "grid": every cell of a regular grid is
            predicted, and the coarse mask is only an input (detectron2, whose coarse mask has 7 x 7 cells).
        side: Side of the grid from which upsampling steps are counted, if there is no coarse mask.
    """

    options: PointOptions = PointOptions()
    stride: int = 4
    start: Literal["grid", "coarse"] = "coarse"
    side: int = 7

    def predict(
        self, network: nn.Module, feature: Tensor, coarse: Tensor, boxes: Sequence[Tensor], labels: Tensor,
        points: Float[Tensor, "r p 2"],
    ) -> Float[Tensor, "r 1 p"]:  # fmt: skip
        """Logits of each box's label at points inside the box."""
        fine = sample_in_boxes(feature, boxes, points, self.stride)
        return network(fine, point_sample(coarse, points), labels)

    def training_points(self, coarse: Tensor, labels: Tensor) -> Float[Tensor, "r p 2"]:
        """Draws the points of each box for training."""
        own = coarse.detach()[torch.arange(len(labels), device=labels.device), labels]
        return uncertain_points(
            own[:, None].float(), self.options.count, mask_uncertainty,
            candidates=self.options.candidates, important=self.options.important,
        )  # fmt: skip

    def loss(
        self,
        network: nn.Module,
        feature: Float[Tensor, "b c h w"],
        coarse: Float[Tensor, "r k *s"],
        boxes: Sequence[Float[Tensor, "_n 4"]],
        labels: Int[Tensor, " r"],
        targets: Sequence[Instances],
        owners: Sequence[Int[Tensor, " _n"]],
        points: Float[Tensor, "r p 2"] | None = None,
    ) -> Float[Tensor, ""]:
        """Computes the binary cross entropy at points, averaged over all points.

        The target of a point is the object's mask interpolated bilinearly, a value between 0 and 1.

        Args:
            network: The point network.
            feature: The fine feature.
            coarse: Coarse logits of each box.
            boxes: Boxes of each image, in pixels of the input.
            labels: The output of the network that each box uses.
            targets: Objects of each image, with masks.
            owners: The object that each box is matched to.
            points: Points to use; default: drawn by `training_points`.
        """
        points = self.training_points(coarse, labels) if points is None else points
        logits = self.predict(network, feature, coarse, boxes, labels, points)[:, 0].float()
        truth = [
            mask_sample(target.masks, box_points(own, inside), row)  # pyright: ignore[reportArgumentType]
            for target, own, inside, row in zip(
                targets, boxes, points.split([len(b) for b in boxes]), owners, strict=True
            )
            if len(row)
        ]
        count = global_mean_count(logits.new_tensor(float(logits.numel())))
        known = torch.cat(truth) if truth else torch.zeros_like(logits)
        return functional.binary_cross_entropy_with_logits(logits, known, reduction="sum") / count

    @torch.no_grad()
    def refine(
        self,
        network: nn.Module,
        feature: Float[Tensor, "b c h w"],
        coarse: Float[Tensor, "r k *s"],
        boxes: Sequence[Float[Tensor, "_n 4"]],
        labels: Int[Tensor, " r"],
        budget: int = 64 << 20,
    ) -> Float[Tensor, "r s s"]:
        """Computes fine masks as logits.

        Args:
            network: The point network.
            feature: The fine feature.
            coarse: Coarse logits of each box.
            boxes: Boxes of each image, in pixels of the input.
            labels: The output of the network that each box uses.
            budget: Upper bound of the scratch memory in bytes; boxes are processed in chunks that fit.
        """
        # A step that would predict every cell anew need not upsample first.
        side = coarse.shape[-1] if coarse.dim() == 4 else self.side
        steps, most = self.options.steps, self.options.per_step
        while self.start == "grid" and steps and 4 * side * side <= most:
            side, steps = 2 * side, steps - 1
        last = side << steps
        per_box = max(most, side * side) * 4 * (2 * feature.shape[1] + sum(coarse.shape[1:2])) + 16 * last * last
        at_once, parts, counts = max(1, budget // per_box), [], [len(b) for b in boxes]
        rows = zip(boxes, coarse.split(counts), labels.split(counts), strict=True)
        for image, image_rows in enumerate(rows):
            for own, own_coarse, own_labels in zip(*(v.split(at_once) for v in image_rows), strict=True):
                if not len(own):
                    continue

                def predict(
                    points: Tensor, feature: Tensor = feature[image : image + 1], coarse: Tensor = own_coarse,
                    own: Tensor = own, labels: Tensor = own_labels,
                ) -> Tensor:  # fmt: skip
                    return self.predict(network, feature, coarse, [own], labels, points).float()

                if self.start == "grid":
                    first = predict(grid_points(len(own), side, side, own.device)).unflatten(2, (side, side))
                else:
                    rows_of = torch.arange(len(own_labels), device=own_labels.device)
                    first = own_coarse[rows_of, own_labels][:, None].float()
                parts.append(subdivide(first, predict, mask_uncertainty, steps=steps, points=most)[:, 0])
        return torch.cat(parts) if parts else feature.new_zeros(0, last, last, dtype=torch.float32)


def sample_in_boxes(
    feature: Float[Tensor, "b c h w"], boxes: Sequence[Float[Tensor, "_n 4"]], points: Float[Tensor, "r p 2"],
    stride: int,
) -> Float[Tensor, "r c p"]:  # fmt: skip
    """Samples a feature map at points inside boxes.

    Args:
        feature: Feature maps of the images.
        boxes: Boxes of each image, in pixels of the input.
        points: Points of each box, as fractions of its width and height.
        stride: Stride of the feature map.
    """
    extent = points.new_tensor([feature.shape[3] * stride, feature.shape[2] * stride])
    parts = []
    for level, own, inside in zip(feature.split(1), boxes, points.split([len(b) for b in boxes]), strict=True):
        places = (box_points(own.float(), inside) / extent).flatten(0, 1)[None]
        parts.append(point_sample(level, places)[0].unflatten(1, inside.shape[:2]).transpose(0, 1))
    return torch.cat(parts)


@dataclass(frozen=True)
class PlaneRefinement:
    """Refines masks of whole images: one logit map per object, whatever its class.

    The fine feature is the same for all objects of an image; only the coarse logit identifies the object. The
    network is `PointHead(channels, 1, 1)`.

    Attributes:
        options: How points are chosen.
    """

    options: PointOptions = field(default_factory=lambda: PointOptions(count=1024, steps=2, per_step=8192))

    def predict(
        self, network: nn.Module, feature: Float[Tensor, "1 c h w"], coarse: Float[Tensor, "n _h _w"],
        points: Float[Tensor, "n p 2"],
    ) -> Float[Tensor, "n 1 p"]:  # fmt: skip
        """Logits of each mask of one image at points of the image."""
        fine = point_sample(feature, points.flatten(0, 1)[None])[0].unflatten(1, points.shape[:2]).transpose(0, 1)
        return network(fine, point_sample(coarse[:, None], points))

    def loss_sum(
        self,
        network: nn.Module,
        feature: Float[Tensor, "1 c h w"],
        coarse: Float[Tensor, "n _h _w"],
        truth: Callable[[Float[Tensor, "n p 2"]], Float[Tensor, "n p"]],
        budget: int = 64 << 20,
    ) -> Float[Tensor, ""]:
        """Sums the mean binary cross entropy of each mask's points over the masks of one image.

        Args:
            network: The point network.
            feature: The fine feature of the image.
            coarse: Coarse logits of each mask.
            truth: Gives the values of the objects' masks at points.
            budget: Bytes of what the points read. With more masks than fit, each chunk is computed again in the
                backward pass instead of being kept.
        """
        points = uncertain_points(
            coarse.detach()[:, None].float(), self.options.count, mask_uncertainty,
            candidates=self.options.candidates, important=self.options.important,
        )  # fmt: skip
        known = truth(points)

        def part(coarse: Tensor, points: Tensor, known: Tensor) -> Tensor:
            logits = self.predict(network, feature, coarse, points)[:, 0].float()
            return functional.binary_cross_entropy_with_logits(logits, known, reduction="sum")

        step = max(1, budget // (4 * self.options.count * (feature.shape[1] + 1)))
        if len(coarse) <= step:
            return part(coarse, points, known) / self.options.count
        parts = zip(coarse.split(step), points.split(step), known.split(step), strict=True)
        sums: list[Any] = [checkpoint(part, *own, use_reentrant=False) for own in parts]
        return torch.stack(sums).sum() / self.options.count

    @torch.no_grad()
    def refine(
        self,
        network: nn.Module,
        feature: Float[Tensor, "1 c h w"],
        coarse: Float[Tensor, "n _h _w"],
        budget: int = 256 << 20,
    ) -> Float[Tensor, "n _p _q"]:
        """Computes fine masks of one image as logits; `budget` bounds the scratch memory in bytes."""
        cells = coarse.shape[1] * coarse.shape[2] << (2 * self.options.steps)
        per_mask = min(self.options.per_step, cells) * 4 * 2 * (feature.shape[1] + 256) + 16 * cells
        parts = [
            subdivide(
                some[:, None].float(), lambda points, some=some: self.predict(network, feature, some, points).float(),
                mask_uncertainty, steps=self.options.steps, points=self.options.per_step,
            )[:, 0]
            for some in coarse.split(max(1, budget // per_mask))
            if len(some)
        ]  # fmt: skip
        empty = coarse.new_zeros(0, *(n << self.options.steps for n in coarse.shape[1:]), dtype=torch.float32)
        return torch.cat(parts) if parts else empty
