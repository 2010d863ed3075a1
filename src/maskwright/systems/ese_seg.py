"""ESE-Seg (Xu, Wang, Qi, Lu: Explicit Shape Encoding for Real-Time Instance Segmentation, ICCV 2019, arXiv 1908.04067).

A mask is the distance to its outline as a function of the direction, seen from a point inside it: 360 radii. That
function is written as a Chebyshev polynomial of degree 17, so that a shape is twenty numbers: the inner centre and 18
coefficients. YOLOv3 predicts them beside each box, as further channels of its output; one matrix product turns the
coefficients of all objects into outlines. Masks cost next to nothing on top of detection.

Where the published code has mistakes that no published weights depend on, the right thing is done here: shapes are
encoded after augmentation, in the frame the network sees (theirs are encoded once, and stay as they were when the
image is mirrored or stretched); a radius ends where the ray leaves the mask, not at the upper left corner of the last
pixel; an outline is not turned by a degree when it is decoded; a degree that no pixel covers takes its neighbour's
radius; thin objects without an inner pixel are kept.

The same code can be predicted by another detector: with `detector="fcos"` it stands in PolarMask's head, where every
place says the rays that leave it, so that codes can be compared with all else equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.darknet import Darknet, DarknetTiny
from maskwright.blocks.fcos import locations
from maskwright.blocks.fpn import FPN
from maskwright.blocks.layers import ConvNorm, Norm
from maskwright.blocks.polar import (
    LONGEST,
    PolarHead,
    PolarRaw,
    PolarRules,
    Thresholds,
    polar_decode,
    polar_losses,
    polar_targets,
)
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.contours import chebyshev_fit, chebyshev_radii, decode_chebyshev, encode_chebyshev
from maskwright.ops.distributed import global_mean_count
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.systems.base import Card, ClassRows, Preset, Score, System

# Width and height of the boxes that YOLOv3 starts from, found by clustering COCO's at 416 x 416; finest level first.
ANCHORS = (
    (10, 13), (16, 30), (33, 23), (30, 61), (62, 45), (59, 119), (116, 90), (156, 198), (373, 326),
)  # fmt: skip
TINY_ANCHORS = ANCHORS[3:]
SHIFT = 0.263289  # the first coefficient's middle on SBD
# Sides are at most so many times the anchor's (as a logarithm): beyond any image, and far from overflow.
LARGEST_LOG = 20.0


@dataclass(frozen=True)
class Raw:
    """What the network says at every cell, levels from the coarsest on, as they are computed.

    `shapes`, anchor by anchor: place of the box's middle in the cell (2, before the sigmoid), size (2, logarithm over
    the anchor's), centre of the shape (2, the same, from the box's upper left corner), coefficients, objectness
    (logit).
    """

    shapes: tuple[Float[Tensor, "b c _h _w"], ...]
    classes: tuple[Float[Tensor, "b d _h _w"], ...]  # logits
    size: tuple[int, int]  # H, W of the input, padding included


@dataclass(frozen=True)
class Shapes:
    """What is to be learnt of one image's objects, in the network's input."""

    boxes: Float[Tensor, "g 4"]
    labels: Int[Tensor, " g"]
    centres: Float[Tensor, "g 2"]
    coefficients: Float[Tensor, "g n"]  # of radii over the box's diagonal
    known: Bool[Tensor, " g"]  # whether there was a mask to take a shape from


@dataclass(frozen=True)
class ChebyshevCode:
    """For PolarMask's head: the coefficients of the logarithm of the rays' lengths in pixels."""

    channels: int = 18
    rays: int = 36

    def decode(self, values: Float[Tensor, "*n c"]) -> Float[Tensor, "*n r"]:
        return chebyshev_radii(values.float(), self.rays).clamp(max=LONGEST).exp()

    def encode(self, rays: Float[Tensor, "*n r"]) -> Float[Tensor, "*n c"]:
        return chebyshev_fit(rays.log(), self.channels)


@dataclass(frozen=True)
class Goals:
    """Objects at the rows that answer for them, and which rows are not blamed for saying "object"."""

    rows: Int[Tensor, " g"]
    place: Float[Tensor, "g 2"]
    size: Float[Tensor, "g 2"]
    centre: Float[Tensor, "g 2"]
    coefficients: Float[Tensor, "g n"]
    weights: Float[Tensor, " g"]
    labels: Int[Tensor, " g"]
    known: Bool[Tensor, " g"]
    ignored: Bool[Tensor, " r"]


class YoloBlock(nn.Module):
    """Five convolutions whose output goes on to the next finer level, and a sixth for this level's output."""

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
    """One 1 x 1 convolution in two parts, so that the classes' rows are by themselves."""

    def __init__(self, channels: int, anchors: int, values: int, classes: int):
        super().__init__()
        self.shapes = nn.Conv2d(channels, anchors * values, 1)
        self.classes = nn.Conv2d(channels, anchors * classes, 1)
        for layer in (self.shapes, self.classes):
            nn.init.uniform_(layer.weight, -0.07, 0.07)  # MXNet's default
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        assert self.shapes.bias is not None
        with torch.no_grad():  # nothing is an object, to begin with: else that is all there is to learn at first
            self.shapes.bias.view(anchors, values)[:, -1] = -4.6

    def forward(self, x: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor]:
        return self.shapes(x), self.classes(x)


class ESESeg(System):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections`, `candidates`."""

    name = "ese-seg"
    card = Card(
        title="ESE-Seg",
        paper="Xu, Wang, Qi, Lu: Explicit Shape Encoding for Real-Time Instance Segmentation. ICCV 2019",
        arxiv="1908.04067",
        code="WenqiangX/ese_seg",
        code_licence="none stated (parts from GluonCV, Apache-2.0)",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: str = "darknet53",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int | None = None,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        head_width: int = 512,
        anchors: Sequence[Sequence[float]] | None = None,
        coefficients: int = 18,
        shift: float = SHIFT,
        detector: Literal["yolo", "fcos"] = "yolo",
        rays: int = 36,
        neck_width: int = 256,
        head_convs: int = 4,
        ignore_iou: float = 0.7,
        short: int = 416,
        fit: Literal["stretch", "short"] = "stretch",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone      "darknet53", "darknet-tiny", "resnet18" ... "resnet152" or "timm:NAME"
        pretrained    timm's published weights in the backbone (a download); ours start random
        stem_width    channels after the stem; all stages scale with it; None: as published (32; tiny 16; ResNet 64)
        norm          "batch" as published; "group" trains with small batches
        frozen        so many parts of the trunk do not train, from the stem on
        head_width    channels of the coarsest level's block, halved (and rounded down, to no less than 1) with each
                      finer level
        anchors       (width, height) of each, finest level first; None: YOLOv3's nine, the tiny variant's six
        coefficients  per shape, 1 ... 360 (18 as published, called "deg 8" there)
        shift         what is added to the first coefficient: its usual value in the data the weights were trained on
        detector      "yolo" as published; "fcos": PolarMask's head, whose `rays` (a divisor of 360) are decoded from
                      the coefficients of their logarithm, above a pyramid of `neck_width` channels with towers of
                      `head_convs` convolutions; head_width, anchors, shift and ignore_iou then mean nothing
        ignore_iou    a place whose box overlaps an object by more is not blamed for calling it one
        short, fit    "stretch": every image becomes short x short, as published; "short": its short side, in shape
        mean, std     of the colours, RGB 0 ... 1; None: ImageNet's
        """
        super().__init__()
        if coefficients < 1 or coefficients > 360:
            raise UsageError(f"coefficients is {coefficients}; expected 1 ... 360")
        if fit not in ("stretch", "short"):
            raise UsageError(f"fit is {fit!r}; expected stretch or short")
        if detector not in ("yolo", "fcos"):
            raise UsageError(f"detector is {detector!r}; expected yolo or fcos")
        if detector == "fcos" and (rays < 3 or 360 % rays):
            raise UsageError(f"rays is {rays}; it must be a divisor of 360, at least 3")
        self.classes = tuple(classes)
        self.count, self.shift, self.ignore_iou, self.detector = coefficients, shift, ignore_iou, detector
        self.backbone: nn.Module
        trunk: dict[str, Any] = {"in_channels": in_channels, "norm": norm, "frozen": frozen}
        strides = [8, 16, 32]
        if backbone == "darknet53":
            self.backbone = Darknet(base=stem_width or 32, eps=norm_eps, **trunk)
            channels = self.backbone.channels
        elif backbone == "darknet-tiny":
            self.backbone = DarknetTiny(base=stem_width or 16, eps=norm_eps, **trunk)
            channels, strides = self.backbone.channels, self.backbone.strides
        elif backbone.startswith("darknet"):
            raise UsageError(f"backbone is {backbone!r}; expected darknet53, darknet-tiny, resnet18 ... or timm:NAME")
        else:
            self.backbone, channels = make_trunk(
                backbone, pretrained=pretrained, stem_width=stem_width or 64, norm_eps=norm_eps, **trunk
            )
        channels = channels[-len(strides) :]
        self.strides = tuple(reversed(strides))  # coarsest first, as the levels are computed
        if detector == "fcos":
            if len(strides) != 3:
                raise UsageError(f"detector='fcos' needs levels of strides 8, 16 and 32; {backbone} has {strides}")
            self.code, self.rules = ChebyshevCode(coefficients, rays), PolarRules(border="outline")
            self.neck = FPN(channels, neck_width, extra="output", relu="between")
            self.head = PolarHead(neck_width, len(self.classes), coefficients, convs=head_convs)
        else:
            self._build_yolo(channels, head_width, anchors, norm, norm_eps)
        canvas = (short, short) if fit == "stretch" else None
        preprocess = Preprocess(short=short, long=4 * short, resample="opencv", fit=fit, canvas=canvas)
        self.preprocess = normalization_for(preprocess, in_channels, mean, std)

    anchors: Tensor

    def _build_yolo(
        self, channels: Sequence[int], width: int, anchors: Sequence[Sequence[float]] | None, norm: Norm, eps: float
    ) -> None:
        levels = len(channels)
        if width < 1:
            raise UsageError(f"head_width is {width}; at least 1 is needed")
        if anchors is None:
            anchors = TINY_ANCHORS if levels == 2 else ANCHORS
        if not anchors or len(anchors) % levels or any(len(a) != 2 for a in anchors):
            raise UsageError(
                f"anchors has {len(anchors)} entries; expected (width, height) pairs, equally many for each of "
                f"{levels} levels"
            )
        if not all(side > 0 for anchor in anchors for side in anchor):
            raise UsageError(f"anchors is {[list(a) for a in anchors]}; widths and heights must be above 0")
        self.anchors_per_cell = len(anchors) // levels
        table = torch.tensor([list(map(float, a)) for a in anchors]).reshape(levels, -1, 2).flip(0)
        self.register_buffer("anchors", table, persistent=False)  # (L, A, 2)
        self.blocks, self.transitions, self.predictions = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        read = channels[-1]
        for level, lateral in enumerate(reversed(channels)):
            if level:
                above, width = width, max(1, width // 2)
                self.transitions.append(ConvNorm(above, width, 1, norm=norm, eps=eps, leaky=0.1))
                read = width + lateral
            self.blocks.append(YoloBlock(read, width, norm, eps))
            self.predictions.append(YoloOutput(2 * width, self.anchors_per_cell, 7 + self.count, len(self.classes)))

    # ---- network -------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw | PolarRaw:
        features = list(self.backbone(images))
        if self.detector == "fcos":
            return self.head(self.neck(features[-3:]))
        laterals = features[::-1]
        x, shapes, classes = laterals[0], [], []
        for level, (block, output) in enumerate(zip(self.blocks, self.predictions, strict=True)):
            x, tip = block(x)
            shape, kind = output(tip)
            shapes.append(shape)  # (B, A (7 + n), H/s, W/s)
            classes.append(kind)  # (B, A K, H/s, W/s)
            if level + 1 < len(self.blocks):
                lateral = laterals[level + 1]
                up = functional.interpolate(self.transitions[level](x), scale_factor=2.0, mode="nearest")
                x = torch.cat([up[..., : lateral.shape[-2], : lateral.shape[-1]], lateral], 1)
        return Raw(tuple(shapes), tuple(classes), (images.shape[-2], images.shape[-1]))

    def rows(self, maps: Sequence[Float[Tensor, "b _c _h _w"]]) -> Float[Tensor, "b r d"]:
        """All anchors of all cells in a row: levels from the coarsest on, cells row by row, then anchors."""
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
        """Each row's box and the centre of its shape, in the input's pixels, not clipped."""
        cells, strides, anchors = self._grid(raw)
        middle = (rows[..., :2].sigmoid() + cells) * strides[:, None]
        half = rows[..., 2:4].clamp(max=LARGEST_LOG).exp() * anchors / 2
        # From the corner on, always to the right and below; it may leave the box.
        centres = middle - half + rows[..., 4:6].clamp(max=LARGEST_LOG).exp() * anchors
        return torch.cat([middle - half, middle + half], -1), centres

    def coefficients(self, rows: Float[Tensor, "*n d"]) -> Float[Tensor, "*n c"]:
        first, others = rows[..., 6:7] + self.shift, rows[..., 7 : 6 + self.count]
        return torch.cat([first, others], -1)

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw | PolarRaw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`objectness`, `place`, `size`, `centre`, `coefficients`, `class`: sums over an image, mean over images.
        With "fcos" PolarMask's: `class`, `box`, `mask`, `centerness`.

        Targets are in the frame of the input; crowd regions are not learnt from. Shapes are encoded here, from the
        masks as they are after augmentation.
        """
        targets = [t if t.crowd is None else t[~t.crowd] for t in targets]
        if isinstance(raw, PolarRaw):
            places = locations(raw.classes)
            found = [polar_targets(places, t, self.code.rays, self.rules) for t in targets]
            return polar_losses(raw, found, self.code, self.rules)
        return self.losses_of(raw, [self.shapes(t, raw.shapes[0].device) for t in targets])

    def shapes(self, target: Instances, device: torch.device) -> Shapes:
        """An image's objects with their codes."""
        if target.masks is None:
            if len(target):
                raise UsageError("a target has boxes but no masks; this system learns shapes, give masks")
            target = Instances.empty(target.image_size)
        assert target.masks is not None
        boxes = target.boxes.cpu()
        coefficients, centres, known = encode_chebyshev(target.masks, self.count, boxes=boxes)
        values = (v.to(device) for v in (boxes, target.labels, centres, coefficients, known))
        return Shapes(*values)

    def losses_of(self, raw: Raw, shapes: Sequence[Shapes]) -> dict[str, Tensor]:
        rows, classes = self.rows(raw.shapes), self.rows(raw.classes)
        boxes, _ = self.boxes(raw, rows.detach())
        goals = [self.goals(raw, s, b) for s, b in zip(shapes, boxes, strict=True)]
        images = global_mean_count(rows.new_tensor(float(len(goals))))
        everywhere = rows[..., 6 + self.count]  # (B, R) logits of objectness
        truth = torch.zeros_like(everywhere)
        blame = torch.stack([~g.ignored for g in goals])
        for number, goal in enumerate(goals):
            truth[number, goal.rows] = 1
            blame[number, goal.rows] = True
        cross = functional.binary_cross_entropy_with_logits(everywhere, truth, reduction="none")
        own, kinds = (torch.cat([r[g.rows] for r, g in zip(v, goals, strict=True)]) for v in (rows, classes))
        place, size, centre, coefficients, weights, labels, known = (
            torch.cat([getattr(g, name) for g in goals])
            for name in ("place", "size", "centre", "coefficients", "weights", "labels", "known")
        )
        shaped = (weights * known)[:, None]
        chances = functional.binary_cross_entropy_with_logits(own[:, :2], place, reduction="none")
        one_hot = functional.one_hot(labels, len(self.classes)).to(own)
        terms = {
            "objectness": (cross * blame).sum(),
            "place": (chances * weights[:, None]).sum(),
            "size": ((own[:, 2:4] - size).abs() * weights[:, None]).sum(),
            "centre": ((own[:, 4:6] - centre).abs() * shaped).sum(),
            "coefficients": ((own[:, 6 : 6 + self.count] - coefficients).abs() * shaped).sum(),
            "class": functional.binary_cross_entropy_with_logits(kinds, one_hot, reduction="sum"),
        }
        return {name: value / images for name, value in terms.items()}

    @torch.no_grad()
    def goals(self, raw: Raw, shapes: Shapes, boxes: Float[Tensor, "r 4"]) -> Goals:
        """Which row answers for each object: of all anchors the one whose shape overlaps the object's most, at the cell
        that the box's middle lies in. Of two objects at one row the later one is learnt."""
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
        return Goals(*(v[keep] for v in values), ignored=self._ignored(boxes, shapes.boxes))

    def _ignored(self, boxes: Float[Tensor, "r 4"], objects: Float[Tensor, "g 4"]) -> Bool[Tensor, " r"]:
        ignored = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
        for some in objects.split(64):  # bounds the memory at 64 overlaps of each row
            ignored |= (box_ops.pairwise_iou(boxes, some) > self.ignore_iou).any(1)
        return ignored

    # ---- objects -------------------------------------------------------------------------------------------------

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
        """`candidates`: so many places, over all classes, are looked at (of each level, with "fcos")."""
        if isinstance(raw, PolarRaw):
            limits = Thresholds.asked(score_threshold, nms_threshold, detections, candidates)
            return polar_decode(raw, placements, self.code, self.rules, limits)
        found = self.find(raw, score_threshold, nms_threshold, detections, candidates)
        return [self._on_image(f, p) for f, p in zip(found, placements, strict=True)]

    @torch.no_grad()
    def find(
        self, raw: Raw, score_threshold: float, nms_threshold: float, detections: int, candidates: int
    ) -> list[Detections]:
        """Of each image, best first, in the input's pixels and not clipped. Every row counts once for each class."""
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
        size = placement.image_size
        outlines = placement.points_to_image(decode_chebyshev(found.coefficients, found.centres, found.boxes))
        boxes = box_ops.clip(placement.boxes_to_image(found.boxes), size)
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        limit = outlines.new_tensor([size[1], size[0]])
        outlines = outlines[solid].clamp(min=0).minimum(limit).cpu().numpy()
        masks = Masks.from_polygons([[ring] for ring in outlines], size)
        return Instances(size, boxes[solid], found.labels[solid], masks, found.scores[solid])

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        if self.detector == "fcos":
            return {"backbone": [self.backbone], "neck": [self.neck], "heads": [self.head]}
        return {"backbone": [self.backbone], "heads": [self.blocks, self.transitions, self.predictions]}

    def class_rows(self) -> dict[str, ClassRows]:
        if self.detector == "fcos":
            return {f"head.classes.{kind}": ClassRows() for kind in ("weight", "bias")}
        rows = ClassRows(repeats=self.anchors_per_cell)
        return {
            f"predictions.{i}.classes.{kind}": rows for i in range(len(self.predictions)) for kind in ("weight", "bias")
        }

    # SBD's 8498 images; expanding the canvas by up to 4 (half of the time) has no counterpart here.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"ese-seg{kind}": {
            "epochs": 800, "batch": batch, "lr": 1e-3, "weight_decay": 5e-4, "decay_norms": True, "decay_biases": True,
            "milestones": (160 / 800, 180 / 800), "warmup": 10 * 8498 // batch,
            "augment": {"flip": 0.5, "brightness": 0.125, "contrast": 0.5, "saturation": 0.5, "hue": 0.05},
        }
        for kind, batch in (("", 20), ("-tiny", 64))
    }  # fmt: skip

    # The authors' overlap is that of convex hulls, over the area of the hull of both: not comparable with mask AP.
    _VOC, _SBD, _README = "VOC 2012 val, 416 x 416", "SBD val, 416 x 416", "README of WenqiangX/ese_seg"
    presets: ClassVar[Mapping[str, Preset]] = {
        "ese-seg-darknet53": Preset(
            {"norm": "batch"},
            (Score(69.3, "convex hull AP50", _VOC, _README), Score(64.1, "convex hull AP50", _SBD, _README)),
            "20 classes; the overlap is that of convex hulls",
        ),
        "ese-seg-tiny": Preset(
            {"backbone": "darknet-tiny", "norm": "batch"},
            (Score(53.2, "convex hull AP50", _VOC, _README), Score(48.1, "convex hull AP50", _SBD, _README)),
            "20 classes; the overlap is that of convex hulls",
        ),
        "ese-seg-small": Preset(
            {"backbone": "resnet18", "head_width": 256, "short": 320},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip


@dataclass(frozen=True)
class Detections:
    """Objects of one image in the input's pixels."""

    boxes: Float[Tensor, "d 4"]
    scores: Float[Tensor, " d"]
    labels: Int[Tensor, " d"]
    centres: Float[Tensor, "d 2"]
    coefficients: Float[Tensor, "d n"]


def _last_of_each(rows: Int[Tensor, " g"], count: int) -> Int[Tensor, " h"]:
    """Positions of the last mention of every row."""
    steps = torch.arange(len(rows), device=rows.device)
    last = torch.full((count,), -1, dtype=torch.int64, device=rows.device).scatter_reduce(0, rows, steps, "amax")
    return steps[last[rows] == steps]
