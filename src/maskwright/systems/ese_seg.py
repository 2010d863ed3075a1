"""ESE-Seg (Xu, Wang, Qi, Lu: Explicit Shape Encoding for Real-Time Instance Segmentation, ICCV 2019, arXiv 1908.04067).

A mask is represented by the distance to its outline as a function of the direction, from a point inside it: 360 radii.
That function is approximated by a Chebyshev polynomial of degree 17, so that a shape is twenty numbers: the inner
centre and 18 coefficients. YOLOv3 predicts them with each box, as further channels of its output; one matrix product
converts the coefficients of all objects to outlines. Masks add very little to the cost of detection.

Where the published code has mistakes on which no published weights depend, they are corrected here: shapes are encoded
after augmentation, in the frame of the network's input (theirs are encoded once and not changed when the image is
mirrored or stretched); a radius ends where the ray leaves the mask, not at the upper left corner of the last pixel; an
outline is not turned by a degree when it is decoded; a degree that no pixel covers gets its neighbour's radius; thin
objects without an inner pixel are kept.

The same code can be predicted by another detector: with `detector="fcos"` PolarMask's head predicts it as the code of
the rays from every location, so that codes can be compared under equal conditions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.fcos import locations
from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.contours import chebyshev_fit, chebyshev_radii, decode_chebyshev, encode_chebyshev
from maskwright.ops.distributed import global_mean_count
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.polar import (
    HEAD,
    LONGEST,
    RENAMED_PARAMETERS,
    RESIZE,
    RULES,
    PolarDense,
    PolarHead,
    PolarHeadLike,
    PolarRaw,
)
from maskwright.systems.polarmask import Thresholds, polar_decode, polar_losses, polar_targets
from maskwright.systems.system import ClassRows, System

# Widths and heights of YOLOv3's prior boxes, from clustering COCO's boxes at 416 x 416; finest level first.
ANCHORS = (
    (10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326),
)  # fmt: skip
TINY_ANCHORS = ANCHORS[3:]
SHIFT = 0.263289  # mean of the first coefficient on SBD
LARGEST_LOG = 20.0  # upper bound of log(side / anchor): beyond any image, and far from overflow
BACKBONE = Backbone("darknet53")


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """Raw output of every cell. Levels are ordered from the coarsest to the finest, as they are computed.

    Attributes:
        shapes: For each anchor: centre of the box in the cell (2, before the sigmoid), size (2, logarithm relative to
            the anchor), centre of the shape (2, likewise, from the box's upper left corner), coefficients, objectness
            (logit).
        classes: For each anchor: logits.
        size: Height and width of the input, padding included.
    """

    shapes: tuple[Float[Tensor, "b c _h _w"], ...]
    classes: tuple[Float[Tensor, "b d _h _w"], ...]
    size: tuple[int, int]


class YoloDense(nn.Module):
    """Darknet and the head of YOLOv3: per level a block and an output, with the block's features passed on to the next
    finer level."""

    def __init__(
        self, backbone: nn.Module, width: int, anchors: int, values: int, classes: int, *, norm: Norm, eps: float
    ):
        """
        Args:
            backbone: With levels of strides 8, 16 and 32, or of 16 and 32 only.
            width: Channels of the coarsest level's block; halved with each finer level.
            anchors: Number per cell.
            values: Channels per anchor, without classes.
            classes: Number of classes.
            norm: Normalisation of the head.
            eps: Its epsilon.
        """
        super().__init__()
        levels = levels_of(backbone)
        self.backbone = backbone
        self.read = levels.indices(strides_of(levels.strides))  # coarsest first
        self.blocks, self.transitions, self.outputs = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        channels = [levels.channels[i] for i in self.read]
        channels_in = channels[0]
        for level, lateral in enumerate(channels):
            if level:
                above, width = width, max(1, width // 2)
                self.transitions.append(ConvNorm(above, width, 1, norm=norm, eps=eps, leaky=0.1))
                channels_in = width + lateral
            self.blocks.append(YoloBlock(channels_in, width, norm, eps))
            self.outputs.append(YoloOutput(2 * width, anchors, values, classes))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        features = self.backbone(images)
        laterals = [features[i] for i in self.read]
        x, shapes, classes = laterals[0], [], []
        for level, (block, output) in enumerate(zip(self.blocks, self.outputs, strict=True)):
            x, tip = block(x)
            shape, logits = output(tip)
            shapes.append(shape)  # (B, A (7 + n), H/s, W/s)
            classes.append(logits)  # (B, A K, H/s, W/s)
            if level + 1 < len(self.blocks):
                lateral = laterals[level + 1]
                up = functional.interpolate(self.transitions[level](x), scale_factor=2.0, mode="nearest")
                x = torch.cat([up[..., : lateral.shape[-2], : lateral.shape[-1]], lateral], 1)
        return Raw(tuple(shapes), tuple(classes), (images.shape[-2], images.shape[-1]))


def strides_of(strides: Sequence[int]) -> tuple[int, ...]:
    """The strides of YOLO's levels on a backbone with levels of `strides`, coarsest first."""
    return (32, 16) if 8 not in strides else (32, 16, 8)


class YoloBlock(nn.Module):
    """Five convolutions, whose output the next finer level reads, and a sixth for the output of this level."""

    def __init__(self, channels_in: int, channels: int, norm: Norm, eps: float):
        super().__init__()
        layers, width = [], channels_in
        for number in range(5):
            kernel, out = (3, 2 * channels) if number % 2 else (1, channels)
            layers.append(ConvNorm(width, out, kernel, norm=norm, eps=eps, leaky=0.1))
            width = out
        self.body = nn.Sequential(*layers)
        self.tip = ConvNorm(channels, 2 * channels, 3, norm=norm, eps=eps, leaky=0.1)

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        route = self.body(x)
        return route, self.tip(route)


class YoloOutput(nn.Module):
    """A 1 x 1 convolution in two parts, so that the rows of the classes are separate."""

    def __init__(self, channels: int, anchors: int, values: int, classes: int):
        super().__init__()
        self.shapes = nn.Conv2d(channels, anchors * values, 1)
        self.classes = nn.Conv2d(channels, anchors * classes, 1)
        for layer in (self.shapes, self.classes):
            nn.init.uniform_(layer.weight, -0.07, 0.07)  # MXNet's default
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        assert self.shapes.bias is not None
        with torch.no_grad():  # a low objectness at first, which otherwise dominates the loss
            self.shapes.bias.view(anchors, values)[:, -1] = -4.6

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        return self.shapes(x), self.classes(x)


@dataclass(frozen=True)
class ChebyshevCode:
    """For PolarMask's head: the Chebyshev coefficients of the logarithm of the rays' lengths in pixels.

    Attributes:
        channels: Number of coefficients.
        rays: Number of rays.
    """

    channels: int = 18
    rays: int = 36

    def decode(self, values: Float[Tensor, "*n c"]) -> Float[Tensor, "*n r"]:
        return chebyshev_radii(values.float(), self.rays).clamp(max=LONGEST).exp()

    def encode(self, rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n c"]:
        return chebyshev_fit(rays.log(), self.channels)


# ---- targets and detections ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shapes:
    """The objects of one image as targets, in the frame of the network's input.

    Attributes:
        boxes: x0, y0, x1, y1.
        labels: Class indices.
        centres: Inner centres x, y.
        coefficients: Of radii divided by the box's diagonal.
        known: Whether there was a mask to encode.
    """

    boxes: Float[Tensor, "g 4"]
    labels: Int[Tensor, " g"]
    centres: Float[Tensor, "g 2"]
    coefficients: Float[Tensor, "g n"]
    known: Bool[Tensor, " g"]


@dataclass(frozen=True)
class Goals:
    """Targets of one image at the rows that they are assigned to, in the units of the network's output.

    Attributes:
        rows: Index of each object's row.
        place: Centre of the box in its cell.
        size: Logarithm of the sides relative to the anchor.
        centre: Logarithm of the shape's centre, likewise.
        coefficients: Without the shift.
        weights: 2 - area of the box / area of the input.
        labels: Class indices.
        known: Whether there was a mask to encode.
        ignored: Rows whose objectness is not a loss although no object is assigned to them.
    """

    rows: Int[Tensor, " g"]
    place: Float[Tensor, "g 2"]
    size: Float[Tensor, "g 2"]
    centre: Float[Tensor, "g 2"]
    coefficients: Float[Tensor, "g n"]
    weights: Float[Tensor, " g"]
    labels: Int[Tensor, " g"]
    known: Bool[Tensor, " g"]
    ignored: Bool[Tensor, " r"]


@dataclass(frozen=True)
class Detections:
    """Objects of one image, best first, in pixels of the input and not clipped."""

    boxes: Float[Tensor, "d 4"]
    scores: Float[Tensor, " d"]
    labels: Int[Tensor, " d"]
    centres: Float[Tensor, "d 2"]
    coefficients: Float[Tensor, "d n"]


# ---- the system ------------------------------------------------------------------------------------------------------


class ESESeg(System):
    """ESE-Seg with the published options as presets; see the module."""

    name = "ese-seg"
    card = Card(
        title="ESE-Seg",
        paper="Xu, Wang, Qi, Lu: Explicit Shape Encoding for Real-Time Instance Segmentation. ICCV 2019",
        arxiv="1908.04067",
        code="WenqiangX/ese_seg",
        code_licence="none stated (parts from GluonCV, Apache-2.0)",
    )
    renamed_options: ClassVar[Mapping[str, str | None]] = {
        "neck_width": "head.width",
        "head_convs": "head.convs",
        "fit": "resize.fit",
    }
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        **RENAMED_PARAMETERS,
        "blocks.": "dense.blocks.",
        "transitions.": "dense.transitions.",
        "outputs.": "dense.outputs.",
    }

    anchors: Tensor

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        head_width: int = 512,
        head_norm: Norm | None = None,
        anchors: Sequence[Sequence[float]] | None = None,
        coefficients: int = 18,
        shift: float = SHIFT,
        ignore_iou: float = 0.7,
        detector: Literal["yolo", "fcos"] = "yolo",
        rays: int = 36,
        head: PolarHeadLike = HEAD,
        resize: ResizeLike = RESIZE,
    ):
        """
        Args:
            classes: Class names.
            backbone: "darknet53" and "darknet-tiny" (strides 16 and 32) as published, with norm "batch"; or any other
                with levels of strides 8, 16 and 32.
            in_channels: Channels of the image.
            head_width: Channels of the coarsest level's block; halved (and rounded down, to at least 1) with each finer
                level.
            head_norm: Normalisation of YOLO's head; default that of the backbone, "group" for one without this option.
            anchors: Width and height of each, finest level first; default the nine of YOLOv3, six for "darknet-tiny".
            coefficients: Number per shape, 1 to 360 (18 as published, called "deg 8" in the published code).
            shift: Added to the first coefficient: its mean in the data that the weights were trained on.
            ignore_iou: A location whose box overlaps an object by more has no objectness loss.
            detector: "yolo" as published; "fcos": PolarMask's head, for which `head_width`, `anchors`, `shift` and
                `ignore_iou` have no effect.
            rays: With "fcos": number of rays, a divisor of 360.
            head: With "fcos": pyramid and head, see `PolarHead`.
            resize: Published: stretched to 416 x 416. `short` is the side of that square, and with fit="short" the
                short side, with a long side of at most four times that.
        """
        super().__init__()
        if not 1 <= coefficients <= 360:
            raise UsageError(f"coefficients must be between 1 and 360, got {coefficients}")
        self.classes = tuple(classes)
        self.count, self.shift, self.ignore_iou, self.detector = coefficients, shift, ignore_iou, detector
        spec = Backbone.read(backbone, BACKBONE)
        network = spec.build(in_channels)
        self.strides = strides_of(levels_of(network).strides)  # coarsest first, as the levels are computed
        if detector == "fcos":
            if rays < 3 or 360 % rays:
                raise UsageError(f"rays must be a divisor of 360 and at least 3, got {rays}")
            self.code, self.rules = ChebyshevCode(coefficients, rays), RULES
            self.dense = PolarDense(network, PolarHead.read(head, HEAD), len(self.classes), self.code)
        else:
            if head_width < 1:
                raise UsageError(f"head_width must be at least 1, got {head_width}")
            table = _anchor_table(anchors, len(self.strides))
            self.register_buffer("anchors", table, persistent=False)  # (L, A, 2)
            self.dense = YoloDense(
                network,
                head_width,
                table.shape[1],
                7 + coefficients,
                len(self.classes),
                norm=head_norm or spec.norm,
                eps=spec.eps,
            )
        self.preprocess = _preprocess(Resize.read(resize, RESIZE), in_channels)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw | PolarRaw:
        return self.dense(images)

    # ---- the network's output ----------------------------------------------------------------------------------------

    @property
    def anchors_per_cell(self) -> int:
        """Number of anchors at every cell of a level."""
        return self.anchors.shape[1]

    def rows(self, maps: Sequence[Float[Tensor, "b _c _h _w"]]) -> Float[Tensor, "b r d"]:
        """One row per anchor in float32: levels from the coarsest on, cells row by row, then anchors."""
        parts = [m.unflatten(1, (self.anchors_per_cell, -1)).permute(0, 3, 4, 1, 2).flatten(1, 3) for m in maps]
        return torch.cat(parts, 1).float()

    def _grid(self, raw: Raw) -> tuple[Float[Tensor, "r 2"], Float[Tensor, " r"], Float[Tensor, "r 2"]]:
        """Cell, stride and anchor of each row."""
        cells, strides, anchors = [], [], []
        for level, (one, stride) in enumerate(zip(raw.shapes, self.strides, strict=True)):
            height, width = one.shape[-2:]
            y, x = torch.meshgrid(
                torch.arange(height, device=one.device), torch.arange(width, device=one.device), indexing="ij"
            )
            cell = torch.stack([x, y], -1).reshape(-1, 1, 2).expand(-1, self.anchors_per_cell, -1)
            cells.append(cell.reshape(-1, 2).float())
            strides.append(torch.full((len(cells[-1]),), float(stride), device=one.device))
            anchors.append(self.anchors[level].float().repeat(height * width, 1))
        return torch.cat(cells), torch.cat(strides), torch.cat(anchors)

    def boxes(self, raw: Raw, rows: Float[Tensor, "b r d"]) -> tuple[Float[Tensor, "b r 4"], Float[Tensor, "b r 2"]]:
        """Computes the box of each row and the centre of its shape, in pixels of the input and not clipped.

        Args:
            raw: Raw output, for the sizes of its maps.
            rows: `rows(raw.shapes)`.
        """
        cells, strides, anchors = self._grid(raw)
        middle = (rows[..., :2].sigmoid() + cells) * strides[:, None]
        half = rows[..., 2:4].clamp(max=LARGEST_LOG).exp() * anchors / 2
        # From the upper left corner, to the right and down; it may lie outside of the box.
        centres = middle - half + rows[..., 4:6].clamp(max=LARGEST_LOG).exp() * anchors
        return torch.cat([middle - half, middle + half], -1), centres

    def coefficients(self, rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        """The Chebyshev coefficients of rows, with the shift added."""
        first, others = rows[..., 6:7] + self.shift, rows[..., 7 : 6 + self.count]
        return torch.cat([first, others], -1)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw | PolarRaw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `objectness`, `place`, `size`, `centre`, `coefficients` and `class`: sums over an image, averaged
        over images. With "fcos": `class`, `box`, `mask` and `centerness`, see `polarmask.polar_losses`.

        Crowd regions are ignored. Shapes are encoded here, from the masks as they are after augmentation.
        """
        targets = [t if t.crowd is None else t[~t.crowd] for t in targets]
        if isinstance(raw, PolarRaw):
            points = locations(raw.classes)
            goals = [polar_targets(points, t, self.code.rays, self.rules) for t in targets]
            return polar_losses(raw, goals, self.code, self.rules)
        return self.shape_losses(raw, [self.encode(t, raw.shapes[0].device) for t in targets])

    def encode(self, target: Instances, device: torch.device | str = "cpu") -> Shapes:
        """Encodes the objects of an image on the CPU and moves the result to `device`."""
        masks = Masks.empty(target.image_size) if target.masks is None and not len(target) else target.masks
        assert masks is not None
        boxes = target.boxes.cpu()
        coefficients, centres, known = encode_chebyshev(masks, self.count, boxes=boxes)
        values = (v.to(device) for v in (boxes, target.labels, centres, coefficients, known))
        return Shapes(*values)

    def shape_losses(self, raw: Raw, shapes: Sequence[Shapes]) -> dict[str, Tensor]:
        """Computes the losses of YOLO's head from the encoded objects of each image."""
        rows, classes = self.rows(raw.shapes), self.rows(raw.classes)
        boxes, _ = self.boxes(raw, rows.detach())
        goals = [self.goals(raw, s, b) for s, b in zip(shapes, boxes, strict=True)]
        images = global_mean_count(rows.new_tensor(float(len(goals))))
        objectness = rows[..., 6 + self.count]  # (B, R) logits
        truth = torch.zeros_like(objectness)
        counted = torch.stack([~g.ignored for g in goals])
        for number, goal in enumerate(goals):
            truth[number, goal.rows] = 1
            counted[number, goal.rows] = True
        cross = functional.binary_cross_entropy_with_logits(objectness, truth, reduction="none")
        own, logits = (torch.cat([r[g.rows] for r, g in zip(v, goals, strict=True)]) for v in (rows, classes))
        place, size, centre, coefficients, weights, labels, known = (
            torch.cat([getattr(g, name) for g in goals])
            for name in ("place", "size", "centre", "coefficients", "weights", "labels", "known")
        )
        shaped = (weights * known)[:, None]
        place_loss = functional.binary_cross_entropy_with_logits(own[:, :2], place, reduction="none")
        one_hot = functional.one_hot(labels, len(self.classes)).to(own)
        terms = {
            "objectness": (cross * counted).sum(),
            "place": (place_loss * weights[:, None]).sum(),
            "size": ((own[:, 2:4] - size).abs() * weights[:, None]).sum(),
            "centre": ((own[:, 4:6] - centre).abs() * shaped).sum(),
            "coefficients": ((own[:, 6 : 6 + self.count] - coefficients).abs() * shaped).sum(),
            "class": functional.binary_cross_entropy_with_logits(logits, one_hot, reduction="sum"),
        }
        return {name: value / images for name, value in terms.items()}

    @torch.no_grad()
    def goals(self, raw: Raw, shapes: Shapes, boxes: Float[Tensor, "r 4"]) -> Goals:
        """Assigns each object to the anchor whose size overlaps the object's most, at the cell with the centre of its
        box. Of two objects at one row the later one is used.

        Args:
            raw: Raw output, for the sizes of its maps.
            shapes: The encoded objects of one image.
            boxes: Predicted boxes of all rows, which decide which rows are ignored.
        """
        anchors = self.anchors.float().flip(0).flatten(0, 1)  # finest first, which decides between equals
        sides = shapes.boxes[:, 2:] - shapes.boxes[:, :2]
        middle = (shapes.boxes[:, :2] + shapes.boxes[:, 2:]) / 2
        both = torch.minimum(anchors, sides[:, None]).clamp(min=0).prod(-1)
        union = anchors.prod(-1) + sides.prod(-1, keepdim=True) - both
        best = (both / union.clamp(min=1e-9)).argmax(1) if len(sides) else both.new_zeros(0, dtype=torch.int64)
        level = len(self.strides) - 1 - best // self.anchors_per_cell
        grids = torch.tensor([m.shape[-2:] for m in raw.shapes], device=best.device)
        starts = torch.cat([grids.new_zeros(1), (grids.prod(1) * self.anchors_per_cell).cumsum(0)[:-1]])
        stride = torch.tensor(self.strides, device=best.device, dtype=torch.float32)[level][:, None]
        cell = (middle / stride).floor().long().clamp(min=0).minimum(grids.flip(1)[level] - 1)
        row = (cell[:, 1] * grids[level, 1] + cell[:, 0]) * self.anchors_per_cell + best % self.anchors_per_cell
        row = row + starts[level]
        keep = _last_of_each(row, len(boxes))
        chosen = anchors[best]
        offset = (shapes.centres - shapes.boxes[:, :2]).clamp(min=1)
        coefficients = shapes.coefficients.clone()
        coefficients[:, 0] -= self.shift
        area = sides.prod(1) / (raw.size[0] * raw.size[1])
        values = (
            row, middle / stride - cell, (sides.clamp(min=1) / chosen).log(), (offset / chosen).log(), coefficients,
            2 - area, shapes.labels, shapes.known,
        )  # fmt: skip
        return Goals(*(v[keep] for v in values), ignored=self.ignored(boxes, shapes.boxes))

    def ignored(self, boxes: Float[Tensor, "r 4"], objects: Float[Tensor, "g 4"]) -> Bool[Tensor, " r"]:
        """Which predicted boxes overlap an object by more than `ignore_iou`."""
        ignored = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        for some in objects.split(64):  # bounds the memory to 64 IoUs per row
            ignored |= (box_ops.pairwise_iou(boxes, some) > self.ignore_iou).any(1)
        return ignored

    # ---- decoding ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw | PolarRaw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.01,
        nms_threshold: float = 0.45,
        detections: int = 100,
        candidates: int = 400,
    ) -> list[Instances]:
        """Selects the best locations, suppresses overlapping boxes, and converts the coefficients of the rest to masks.

        Args:
            raw: What `forward` returned.
            placements: How each image was placed in the network's input.
            score_threshold: Lower bound of the score.
            nms_threshold: IoU from which a box is suppressed by a better one of its class.
            detections: Maximum number of objects per image.
            candidates: Number of locations and classes that are considered; with "fcos", of locations per level.
        """
        if isinstance(raw, PolarRaw):
            limits = Thresholds.requested(score_threshold, nms_threshold, detections, candidates)
            return polar_decode(raw, placements, self.code, self.rules, limits)
        found = self.find(raw, score_threshold, nms_threshold, detections, candidates)
        return [self._on_image(f, p) for f, p in zip(found, placements, strict=True)]

    @torch.no_grad()
    def find(
        self, raw: Raw, score_threshold: float, nms_threshold: float, detections: int, candidates: int
    ) -> list[Detections]:
        """Selects the objects of each image; every row is a candidate for each class. Arguments as for `decode`."""
        rows = self.rows(raw.shapes)
        boxes, centres = self.boxes(raw, rows)
        codes = self.coefficients(rows)
        every = self.rows(raw.classes).sigmoid() * rows[..., 6 + self.count, None].sigmoid()  # (B, R, K)
        found = []
        for own, box, centre, code in zip(every, boxes, centres, codes, strict=True):
            flat = own.T.flatten()  # class by class
            scores, chosen = flat.topk(min(candidates, len(flat)))
            good = scores > score_threshold
            scores, chosen = scores[good], chosen[good]
            row, labels = chosen % len(own), chosen // len(own)
            kept = box_ops.nms(box[row], scores, labels, nms_threshold, detections)
            row = row[kept]
            found.append(Detections(box[row], scores[kept], labels[kept], centre[row], code[row]))
        return found

    def _on_image(self, found: Detections, placement: Placement) -> Instances:
        """Boxes and masks in pixels of the image; boxes that lie outside of it are dropped."""
        size = placement.image_size
        outlines = placement.points_to_image(decode_chebyshev(found.coefficients, found.centres, found.boxes))
        boxes = box_ops.clip(placement.boxes_to_image(found.boxes), size)
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        limit = outlines.new_tensor([size[1], size[0]])
        outlines = outlines[solid].clamp(min=0).minimum(limit).cpu().numpy()
        masks = Masks.from_polygons([[ring] for ring in outlines], size)
        return Instances(size, boxes[solid], found.labels[solid], masks, found.scores[solid])

    # ---- loading and training ----------------------------------------------------------------------------------------

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        result = super().upgraded(options)
        backbone = result.get("backbone")
        if "norm" in options and isinstance(backbone, Mapping) and "norm" not in backbone:
            result["head_norm"] = options["norm"]  # which was one option for backbone and head
        return result

    def groups(self) -> dict[str, list[nn.Module]]:
        if isinstance(self.dense, PolarDense):
            return {"backbone": [self.dense.backbone], "neck": [self.dense.neck], "heads": [self.dense.head]}
        heads: list[nn.Module] = [self.dense.blocks, self.dense.transitions, self.dense.outputs]
        return {"backbone": [self.dense.backbone], "heads": heads}

    def class_rows(self) -> dict[str, ClassRows]:
        if isinstance(self.dense, PolarDense):
            return {f"dense.head.classes.{kind}": ClassRows() for kind in ("weight", "bias")}
        rows = ClassRows(repeats=self.anchors_per_cell)
        return {
            f"dense.outputs.{level}.classes.{kind}": rows
            for level in range(len(self.dense.outputs))
            for kind in ("weight", "bias")
        }

    # SBD's 8498 images. The published augmentation also expands the canvas by up to 4, half of the time.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"ese-seg{kind}": {
            "epochs": 800, "batch": batch, "lr": 1e-3, "weight_decay": 5e-4, "decay_norms": True, "decay_biases": True,
            "milestones": (160 / 800, 180 / 800), "warmup": 10 * 8498 // batch,
            "augment": {"flip": 0.5, "brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05},
        }
        for kind, batch in (("", 20), ("-tiny", 64))
    }  # fmt: skip

    # The authors measure the overlap of convex hulls, over the area of the hull of both: not comparable with mask AP.
    _VOC, _SBD, _README = "VOC 2012 val, 416 x 416", "SBD val, 416 x 416", "README of WenqiangX/ese_seg"
    presets: ClassVar[Mapping[str, Preset]] = {
        "ese-seg-darknet53": Preset(
            {"backbone": {"name": "darknet53", "norm": "batch"}},
            (Score(69.3, "convex hull AP50", _VOC, _README), Score(64.1, "convex hull AP50", _SBD, _README)),
            "20 classes; the overlap is that of convex hulls",
        ),
        "ese-seg-tiny": Preset(
            {"backbone": {"name": "darknet-tiny", "norm": "batch"}},
            (Score(53.2, "convex hull AP50", _VOC, _README), Score(48.1, "convex hull AP50", _SBD, _README)),
            "20 classes; the overlap is that of convex hulls",
        ),
        "ese-seg-small": Preset(
            {"backbone": "resnet18", "head_width": 256, "resize": {"short": 320}},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip


def _anchor_table(anchors: Sequence[Sequence[float]] | None, levels: int) -> Float[Tensor, "l a 2"]:
    """Widths and heights by level, coarsest first; UsageError if they cannot be shared by the levels."""
    if anchors is None:
        anchors = TINY_ANCHORS if levels == 2 else ANCHORS
    if not anchors or len(anchors) % levels or any(len(a) != 2 for a in anchors):
        raise UsageError(
            f"anchors must be pairs of width and height, equally many for each of {levels} levels, got {len(anchors)} "
            "entries"
        )
    if not all(side > 0 for anchor in anchors for side in anchor):
        raise UsageError(f"anchors must have widths and heights above 0, got {[list(a) for a in anchors]}")
    return torch.tensor([list(map(float, a)) for a in anchors]).reshape(levels, -1, 2).flip(0)


def _preprocess(resize: Resize, in_channels: int) -> Preprocess:
    """The published preprocessing at the side that `resize` gives."""
    side = resize.short or 416
    published = Preprocess(short=side, long=4 * side, resample="opencv", fit="stretch", canvas=(side, side))
    if resize.fit not in (None, "stretch", "letterbox"):
        published = replace(published, canvas=None, fit=resize.fit)
    return resize.apply(published, in_channels)


def _last_of_each(rows: Int[Tensor, " g"], count: int) -> Int[Tensor, " h"]:
    """Positions of the last occurrence of every row."""
    steps = torch.arange(len(rows), device=rows.device)
    last = torch.full((count,), -1, dtype=torch.int64, device=rows.device).scatter_reduce(0, rows, steps, "amax")
    return steps[last[rows] == steps]
