"""Deep Snake: an outline that a network moves (Peng, Jiang, Pi, Li, Bao, Zhou, CVPR 2020, arXiv 2001.01629).

A detector of centres (CenterNet) gives boxes. The middles of a box's sides are moved to the object's four extreme
points, these make an octagon, and the octagon's 128 points are moved three times until they lie on the outline. What
moves them is a network over the closed line of points: convolutions whose neighbourhood goes round (circular
convolution), fed with the features under the points and the points' places.

An object of several parts (section 3.3, for Cityscapes) is split first: a second detector, of centres inside the box,
says where its components are, each has an outline of its own, and all together are the mask.

Coordinates of the contours are cells of the map of stride 4: a pixel's coordinate divided by 4, nothing added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.dla import DLA, DLAUp, LightUp
from maskwright.blocks.layers import Norm
from maskwright.blocks.snake import CELLS, ComponentHead, Convolution, LineNorm, Snake
from maskwright.blocks.trunk import make_trunk, normalization_for
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.centres import PRIOR, centre_focal_sum, find_peaks, gaussian_radius, paint_gaussians
from maskwright.ops.contours import resample, resample_from
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.vertices import bounds, diamonds, extreme_points, octagons, outlines_of, read_at, tidy_outlines
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.systems.base import Card, ClassRows, Preset, Score, System

STRIDE = 4
DILATIONS = (1, 1, 1, 2, 2, 4, 4)
SIZE_WEIGHT = 0.1
COLOURS = Preprocess(
    resample="opencv", mean=(0.40789654, 0.44719302, 0.47026115), std=(0.28863828, 0.27408164, 0.27809835),
    channels="BGR",
)  # fmt: skip


@dataclass(frozen=True)
class Raw:
    """What the detector says of every cell, and what the contours' stages read."""

    centres: Float[Tensor, "b k h w"]  # logits
    sizes: Float[Tensor, "b 2 h w"]  # width and height of the box around the cell, in cells
    feature: Float[Tensor, "b c h w"]


class Detections(NamedTuple):
    """Boxes of the batch in cells of the map, those of an image side by side, best first."""

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, " n"]
    labels: Int[Tensor, " n"]
    owners: Int[Tensor, " n"]  # which image


class Truth(NamedTuple):
    """What is to be learnt, in cells of the map: D detections and N contours, which are the same without components."""

    boxes: Float[Tensor, "d 4"]
    labels: Int[Tensor, " d"]
    images: Int[Tensor, " d"]
    contour_boxes: Float[Tensor, "n 4"]
    contour_owners: Int[Tensor, " n"]  # which detection
    extremes: Float[Tensor, "n 4 2"]
    outlines: Float[Tensor, "n p 2"]
    octagons: Float[Tensor, "n p 2"]


class Contours(nn.Module):
    """The moving outline: box -> extreme points -> octagon -> outline."""

    def __init__(
        self, channels: int, *, width: int, points: int, start_points: int, iterations: int,
        dilations: Sequence[int], kind: Convolution, norm: LineNorm, align_corners: bool,
    ):  # fmt: skip
        super().__init__()
        self.points, self.start_points, self.align_corners = points, start_points, align_corners
        self.fuse = nn.Conv1d(2 * channels, channels, 1)
        self.start = Snake(channels + 2, width, dilations, kind, norm)
        self.steps = nn.ModuleList(Snake(channels + 2, width, dilations, kind, norm) for _ in range(iterations))
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)  # pyright: ignore[reportArgumentType]

    def read(self, feature: Tensor, points: Tensor, owners: Tensor) -> Float[Tensor, "n c p"]:
        return read_at(feature, points, owners, align_corners=self.align_corners).transpose(1, 2)

    def diamonds(self, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n s 2"]:
        """The middles of a box's sides as a closed line of `start_points`, a quarter of them on each of its edges."""
        corners = diamonds(boxes)
        part = torch.arange(self.start_points // 4, device=boxes.device) / (self.start_points // 4)
        edges = (corners.roll(-1, 1) - corners)[:, :, None] * part[:, None]
        return (corners[:, :, None] + edges).flatten(1, 2)

    def extremes(
        self, feature: Float[Tensor, "b c h w"], boxes: Float[Tensor, "n 4"], owners: Int[Tensor, " n"]
    ) -> Float[Tensor, "n 4 2"]:
        """Top, left, bottom and right as the first stage sees them."""
        line = self.diamonds(boxes)
        centres = (line.amin(1, keepdim=True) + line.amax(1, keepdim=True)) / 2
        under = self.read(feature, line, owners)
        middle = self.read(feature, centres, owners).expand_as(under)
        offsets = self._move(self.start, self.fuse(torch.cat([under, middle], 1)), line)
        return (line + offsets)[:, :: self.start_points // 4]

    def octagons(self, extremes: Float[Tensor, "n 4 2"]) -> Float[Tensor, "n p 2"]:
        return resample(octagons(extremes), self.points)

    def outlines(
        self, feature: Float[Tensor, "b c h w"], start: Float[Tensor, "n p 2"], owners: Int[Tensor, " n"]
    ) -> list[Float[Tensor, "n p 2"]]:
        """The outline after each step. The network sees and gives pixels of the input, four to a cell."""
        lines = []
        for step in self.steps:
            offsets = self._move(step, self.read(feature, start, owners), start * STRIDE)
            start = (start * STRIDE + offsets) / STRIDE
            lines.append(start)
        return lines

    @staticmethod
    def _move(snake: nn.Module, features: Tensor, points: Float[Tensor, "n p 2"]) -> Float[Tensor, "n p 2"]:
        places = (points - points.amin(1, keepdim=True)).transpose(1, 2).to(features)
        return snake(torch.cat([features, places], 1)).float()


class DeepSnake(System):
    """See the module's text. `decode` takes `score_threshold`, `nms_threshold`, `detections`, `component_score`."""

    name = "deepsnake"
    card = Card(
        title="Deep Snake",
        paper="Peng, Jiang, Pi, Li, Bao, Zhou: Deep Snake for Real-Time Instance Segmentation. CVPR 2020",
        arxiv="2001.01629",
        code="zju3dv/snake",
        code_licence="non-commercial research and education only",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: str = "dla34",
        pretrained: bool = False,
        in_channels: int = 3,
        stem_width: int | None = None,
        norm: Norm = "group",
        norm_eps: float = 1e-5,
        frozen: int = 0,
        deformable: bool = True,
        neck_width: int = 64,
        head_width: int = 256,
        components: bool = False,
        whole_classes: Sequence[str] = (),
        component_width: int = 256,
        points: int = 128,
        start_points: int = 40,
        iterations: int = 3,
        convolution: Convolution = "circular",
        contour_width: int = 128,
        contour_norm: LineNorm = "group",
        align_corners: bool = True,
        start: Literal["box", "centre"] = "centre",
        supervise: Literal["last", "all"] = "last",
        smallest_area: float = 5.0,
        most_contours: int = 400,
        fit: Literal["letterbox", "pad"] = "letterbox",
        canvas: Sequence[int] = (512, 512),
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ):
        """
        backbone        "dla34" with CenterNet's way up; "resnet18" ... "resnet152" or "timm:NAME" with a light one
        pretrained      timm's published weights in the backbone (a download); ours start random
        stem_width      channels after the stem; all levels scale with it. None: 16 (DLA), 64 (ResNet)
        norm            of trunk and neck: "group" trains from random weights and with small batches; published: "batch"
        frozen          so many parts of the trunk do not train, from the stem on
        deformable      whether the way up of a DLA has deformable convolutions
        neck_width      channels of the feature with a ResNet; with a DLA they are 4 * stem_width
        components      objects may have several outlines, found by a second detector (section 3.3)
        whole_classes   classes that, where they are among `classes`, are one component always, their box (Cityscapes:
                        person and rider)
        points, start_points, iterations, convolution, contour_width, contour_norm
                        of the contours; the paper compares iterations and convolutions
        align_corners   how features under the points are read: see `ops.vertices.read_at`
        start           where a contour starts in training: the annotated "box" (SBD, KINS), or its size around the
                        "centre" rounded to a cell, as a detection has it (COCO)
        supervise       which contours are learnt from: the paper sums over the iterations; the code's trainer keeps
                        the "last" only, through which the others are trained too
        smallest_area   parts that cover no more cells than this are not learnt
        most_contours   so many at most are learnt from in one batch, a random choice of them: bounds the memory
                        (about 8 MB each as published)
        fit, canvas     "letterbox" into the canvas (height, width), or "pad": the image's own size, on a black canvas
                        that is a multiple of 32 and larger
        mean, std       per channel BGR, of values divided by 255; None: as published
        """
        super().__init__()
        _expect("convolution", convolution, ("circular", "graph"))
        _expect("contour_norm", contour_norm, ("batch", "group", "none"))
        _expect("start", start, ("box", "centre"))
        _expect("supervise", supervise, ("last", "all"))
        _expect("fit", fit, ("letterbox", "pad"))
        if iterations < 1:
            raise UsageError(f"iterations is {iterations}; the outline must be moved at least once (published: 3)")
        if len(canvas) != 2 or min(canvas) < 1:
            raise UsageError(f"canvas is {list(canvas)}; expected a height and a width in pixels, both at least 1")
        reach = 4 * max(DILATIONS) if convolution == "circular" else 1
        if start_points % 4 or start_points < max(4, reach) or points < max(12, reach):
            raise UsageError(
                f"start_points is {start_points} and points {points}; a multiple of 4 and at least {max(12, reach)} "
                "are needed, since the widest convolution reaches so far"
            )
        self.classes = tuple(classes)
        self.whole = [k for k, name in enumerate(self.classes) if name in set(whole_classes)]
        self.start, self.supervise = start, supervise
        self.smallest_area, self.most_contours = smallest_area, most_contours

        if backbone.startswith("dla"):
            try:
                depth = int(backbone[3:]) if backbone[3:].isdigit() else 0
                self.backbone: nn.Module = DLA(
                    depth, in_channels=in_channels, base=stem_width or 16, norm=norm, eps=norm_eps, frozen=frozen
                )
            except ValueError as error:
                raise UsageError(str(error)) from None
            self.neck: nn.Module = DLAUp(self.backbone.channels, norm=norm, eps=norm_eps, deformable=deformable)
            channels = self.neck.channels
        else:
            self.backbone, widths = make_trunk(
                backbone, pretrained=pretrained, in_channels=in_channels, stem_width=stem_width or 64, norm=norm,
                norm_eps=norm_eps, frozen=frozen,
            )  # fmt: skip
            self.neck, channels = LightUp(widths, neck_width, norm=norm, eps=norm_eps), neck_width
        self.centre_head = _head(channels, head_width, len(self.classes), PRIOR)
        self.size_head = _head(channels, head_width, 2)
        self.component_head = ComponentHead(channels, component_width) if components else None
        self.contours = Contours(
            channels, width=contour_width, points=points, start_points=start_points, iterations=iterations,
            dilations=DILATIONS, kind=convolution, norm=contour_norm, align_corners=align_corners,
        )  # fmt: skip
        rule = {"fit": "letterbox", "canvas": tuple(canvas)} if fit == "letterbox" else {"fit": "pad"}
        self.preprocess = normalization_for(Preprocess.from_dict({**COLOURS.to_dict(), **rule}), in_channels, mean, std)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        feature = self.neck(self.backbone(images))  # (B, 64, H/4, W/4)
        return Raw(self.centre_head(feature), self.size_head(feature), feature)

    # ---- learning ------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        truth = self.truth(targets, (raw.feature.shape[2], raw.feature.shape[3]), raw.feature.device)
        sides = truth.boxes[:, 2:] - truth.boxes[:, :2]
        centre, size = self._centre_losses(raw.centres, raw.sizes, truth.boxes, sides, truth.images, truth.labels)
        terms = {"centre": centre, "size": size + raw.sizes.sum() * 0}
        if self.component_head is not None:
            terms["component_centre"], terms["component_size"] = self._component_losses(raw, truth)
        return terms | self._contour_losses(raw, truth)

    @torch.no_grad()
    def truth(self, targets: Sequence[Instances], size: tuple[int, int], device: torch.device | str = "cpu") -> Truth:
        """Outlines on the map of `size` (h, w). Every part of every object is a detection of its own, or with
        components a component of it. The original drops triangles too; here they are learnt."""
        rings, objects, labels, images, count = [], [], [], [], 0
        for image, target in enumerate(targets):
            own = target if target.crowd is None else target[~target.crowd]
            if own.masks is None and len(own):
                raise UsageError("a target has boxes but no masks; Deep Snake learns outlines, give masks")
            if own.masks is None or not len(own):
                continue
            found, owners = outlines_of(own.masks)
            rings += [ring / STRIDE for ring in found]
            objects.append(torch.from_numpy(owners) + count)
            labels.append(own.labels.cpu())
            images.append(torch.full((len(own),), image))
            count += len(own)
        limit = (float(size[0] - 1), float(size[1] - 1))
        lines, lengths, kept = tidy_outlines(rings, limit, self.smallest_area)
        objects, labels, images = (
            torch.cat([torch.zeros(0, dtype=torch.int64), *v]) for v in (objects, labels, images)
        )
        boxes, objects = bounds(lines, lengths), objects[kept]
        extremes = extreme_points(lines, lengths)
        starts = self.contours.octagons(extremes)
        outlines = resample_from(lines, self.contours.points, lengths, starts[:, 0])
        if self.component_head is None:
            whole, owner, labels, images = boxes, torch.arange(len(boxes)), labels[objects], images[objects]
        else:
            there, owner = objects.unique(return_inverse=True)
            whole = box_ops.around(boxes, owner, len(there))
            labels, images = labels[there], images[there]
        floats = (v.float().to(device) for v in (whole, boxes, extremes, outlines, starts))
        whole, boxes, extremes, outlines, starts = floats
        labels, images, owner = labels.to(device), images.to(device), owner.to(device)
        return Truth(whole, labels, images, boxes, owner, extremes, outlines, starts)

    def _centre_losses(
        self, logits: Float[Tensor, "b k h w"], sizes: Float[Tensor, "b 2 h w"], boxes: Float[Tensor, "d 4"],
        sides: Float[Tensor, "d 2"], rows: Int[Tensor, " d"], labels: Int[Tensor, " d"],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Focal loss of the centres' maps, over the number of centres; smooth L1 of the sizes, 0.1 of its mean. Boxes
        are in cells of the maps, `sides` what the sizes are to say; `rows` and `labels` say which map is meant."""
        kinds, (height, width) = logits.shape[1], logits.shape[2:]
        cells = self.cells(boxes, (height, width))
        radii = gaussian_radius((boxes[:, 2:] - boxes[:, :2]).ceil())
        heat = paint_gaussians(cells, radii, rows * kinds + labels, (len(logits) * kinds, height, width))
        heat = heat.view(logits.shape)
        found = sizes[rows, :, cells[:, 1], cells[:, 0]].float()  # (D, 2)
        count = global_mean_count(torch.stack([(heat == 1).sum(), labels.new_tensor(len(labels))]))
        size = SIZE_WEIGHT * functional.smooth_l1_loss(found, sides, reduction="sum") / (2 * count[1] + 1e-4)
        return centre_focal_sum(logits, heat) / count[0], size

    @staticmethod
    def cells(boxes: Float[Tensor, "n 4"], size: tuple[int, int]) -> Int[Tensor, "n 2"]:
        """The cell x, y nearest to each box's middle (of two the even one)."""
        middle = ((boxes[:, :2] + boxes[:, 2:]) / 2).round().long()
        return middle.clamp(min=0).minimum(middle.new_tensor([size[1] - 1, size[0] - 1]))

    def _component_losses(self, raw: Raw, truth: Truth) -> tuple[Tensor, Tensor]:
        """The same two inside the annotated boxes, on maps of 14 x 56; sizes stay in cells of the image's map.

        Decoding and the two weights are as published. No recording of this loss exists: which boxes are read, the
        rounding to cells and the radii (of the box in cells of the small map) follow from the decoding.
        """
        assert self.component_head is not None
        split = ~torch.isin(truth.labels, truth.labels.new_tensor(self.whole))
        chosen = _some(split.nonzero().flatten(), self.most_contours)
        boxes, images, weight = truth.boxes[chosen], truth.images[chosen], 1.0
        row = torch.full_like(truth.labels, -1)
        row[chosen] = torch.arange(len(chosen), device=row.device)
        row = row[truth.contour_owners]
        parts, row = truth.contour_boxes[row >= 0], row[row >= 0]
        if not len(chosen):  # a box that counts nothing, so that every parameter has its gradient
            boxes, images, weight = boxes.new_tensor([[0.0, 0.0, 8.0, 8.0]]), images.new_zeros(1), 0.0
        logits, sizes = self.component_head(raw.feature, boxes, images)
        scale = boxes.new_tensor([CELLS[1], CELLS[0]]) / (boxes[:, 2:] - boxes[:, :2])
        inner = ((parts.view(-1, 2, 2) - boxes[row, None, :2]) * scale[row, None]).flatten(1)
        centre, size = self._centre_losses(
            logits, sizes, inner, parts[:, 2:] - parts[:, :2], row, torch.zeros_like(row)
        )
        return weight * centre + logits.sum() * 0, weight * size + sizes.sum() * 0

    def _contour_losses(self, raw: Raw, truth: Truth) -> dict[str, Tensor]:
        """Smooth L1, mean: of the extreme points in cells of the map, of the last outline in pixels of the input."""
        chosen = _some(torch.arange(len(truth.contour_boxes), device=raw.feature.device), self.most_contours)
        count = global_mean_count(truth.boxes.new_tensor(float(len(chosen))))
        boxes, owners = truth.contour_boxes[chosen], truth.images[truth.contour_owners[chosen]]
        extremes, outlines, octagon = (v[chosen] for v in (truth.extremes, truth.outlines, truth.octagons))
        if self.start == "centre":
            half = (boxes[:, 2:] - boxes[:, :2]) / 2
            middle = self.cells(boxes, (raw.feature.shape[2], raw.feature.shape[3]))
            boxes = torch.cat([middle - half, middle + half], 1)
        weight = 1.0
        if not len(chosen):  # a contour that counts nothing, so that every parameter has its gradient
            weight, owners = 0.0, owners.new_zeros(1)
            boxes = boxes.new_tensor([[0.0, 0.0, 4.0, 4.0]])
            extremes = diamonds(boxes)
            outlines = octagon = self.contours.octagons(extremes)
        found = self.contours.extremes(raw.feature, boxes, owners)
        lines = self.contours.outlines(raw.feature, octagon, owners)
        learnt = lines if self.supervise == "all" else lines[-1:]
        extreme_loss = functional.smooth_l1_loss(found, extremes, reduction="sum") / (8 * count)
        outline_loss = torch.stack(
            [functional.smooth_l1_loss(v * STRIDE, outlines * STRIDE, reduction="sum") for v in learnt]
        ).sum() / (2 * self.contours.points * count)
        return {"extreme": weight * extreme_loss, "outline": weight * outline_loss}

    # ---- objects -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.05,
        nms_threshold: float | None = None,
        detections: int = 100,
        component_score: float = 0.25,
        component_nms: float = 0.1,
    ) -> list[Instances]:
        """`nms_threshold` None is as published: 0.7 with components, else no suppression. The originals evaluate with
        scores rounded to two decimals; here they stay whole."""
        found = self.find(raw, score_threshold, nms_threshold, detections)
        boxes, owners = found.boxes, torch.arange(len(found.boxes), device=found.boxes.device)
        if self.component_head is not None:
            boxes, owners = self.split(raw, found, component_score, component_nms)
        lines = self.outlines(raw, boxes, found.owners[owners])
        lines = lines.nan_to_num(0.0, 0.0, 0.0) * STRIDE
        counts = found.owners.bincount(minlength=len(placements)).tolist()
        parts = owners.bincount(minlength=len(found.boxes)).tolist()
        result, first, first_line = [], 0, 0
        for placement, count in zip(placements, counts, strict=True):
            rows = slice(first, first + count)
            own = parts[rows]
            points = lines[first_line : first_line + sum(own)]
            result.append(self._on_image(Detections(*(v[rows] for v in found)), points, own, placement))
            first, first_line = first + count, first_line + sum(own)
        return result

    @torch.no_grad()
    def find(self, raw: Raw, score_threshold: float, nms_threshold: float | None, detections: int) -> Detections:
        """What the detector finds, suppressed and above the threshold."""
        height, width = raw.centres.shape[2:]
        scores, labels, cells = find_peaks(raw.centres, detections)  # (B, D) each
        sides = raw.sizes.float().flatten(2).gather(2, cells[:, None].expand(-1, 2, -1)).transpose(1, 2)
        centres = torch.stack([cells % width, cells.div(width, rounding_mode="floor")], -1).to(sides)
        low = (centres - sides / 2).clamp(min=0)
        high = (centres + sides / 2).minimum(sides.new_tensor([width - 1, height - 1]))
        boxes = torch.cat([low, high], 2).flatten(0, 1)
        scores, labels = scores.flatten(), labels.flatten()
        owners = torch.arange(len(cells), device=cells.device).repeat_interleave(cells.shape[1])
        if nms_threshold is None and self.component_head is not None:
            nms_threshold = 0.7
        good = scores > score_threshold
        if nms_threshold is not None:
            groups = owners * len(self.classes) + labels
            good &= _kept(boxes, scores, groups, nms_threshold)
        return Detections(boxes[good], scores[good], labels[good], owners[good])

    @torch.no_grad()
    def split(
        self, raw: Raw, found: Detections, score: float = 0.25, overlap: float = 0.1, most: int = 50
    ) -> tuple[Float[Tensor, "m 4"], Int[Tensor, " m"]]:
        """Boxes of the components of what was found, and of which each is one; side by side for each detection."""
        assert self.component_head is not None
        whole = torch.isin(found.labels, found.labels.new_tensor(self.whole))
        every = torch.arange(len(found.boxes), device=found.boxes.device)
        rows = every[~whole]
        if not len(rows):
            return found.boxes, every
        logits, sizes = self.component_head(raw.feature, found.boxes[rows], found.owners[rows])
        scores, cells = logits.float().sigmoid().flatten(1).topk(min(most, CELLS[0] * CELLS[1]))
        sides = sizes.float().flatten(2).gather(2, cells[:, None].expand(-1, 2, -1)).transpose(1, 2)
        place = torch.stack([cells % CELLS[1], cells.div(CELLS[1], rounding_mode="floor")], -1).to(sides)
        own = found.boxes[rows, None]
        centres = place / place.new_tensor([CELLS[1], CELLS[0]]) * (own[..., 2:] - own[..., :2]) + own[..., :2]
        boxes = torch.cat([centres - sides / 2, centres + sides / 2], 2).flatten(0, 1)
        owners, scores = rows.repeat_interleave(cells.shape[1]), scores.flatten()
        good = (scores > score) & _kept(boxes, scores, owners, overlap)
        boxes = torch.cat([found.boxes[whole], boxes[good]])
        owners = torch.cat([every[whole], owners[good]])
        order = owners.argsort(stable=True)
        return boxes[order], owners[order]

    @torch.no_grad()
    def outlines(
        self, raw: Raw, boxes: Float[Tensor, "n 4"], images: Int[Tensor, " n"], at_once: int | None = None
    ) -> Float[Tensor, "n p 2"]:
        """The last outline of each box, in cells of the map; `at_once` bounds the memory at about 2 MB each. None: 256,
        on the host 16, which its caches hold."""
        at_once = at_once or (16 if boxes.device.type == "cpu" else 256)
        limit = boxes.new_tensor([raw.feature.shape[3] - 1, raw.feature.shape[2] - 1])
        lines = [boxes.new_zeros(0, self.contours.points, 2)]
        for some, owners in zip(boxes.split(at_once), images.split(at_once), strict=True):
            if len(some):
                extremes = self.contours.extremes(raw.feature, some, owners).clamp(min=0).minimum(limit)
                lines.append(self.contours.outlines(raw.feature, self.contours.octagons(extremes), owners)[-1])
        return torch.cat(lines)

    def _on_image(
        self, found: Detections, lines: Float[Tensor, "n p 2"], parts: Sequence[int], placement: Placement
    ) -> Instances:
        """Outlines of one image, `parts` of them for each of its boxes, as masks. Whoever has none is left out."""
        points = placement.points_to_image(lines).cpu().double().numpy()
        rings, first = [], 0
        for count in parts:
            rings.append(list(points[first : first + count]))
            first += count
        boxes = box_ops.clip(placement.boxes_to_image(found.boxes * STRIDE), placement.image_size)
        there = torch.tensor([count > 0 for count in parts], dtype=torch.bool, device=boxes.device)
        there &= (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        masks = Masks.from_polygons(rings, placement.image_size)
        return Instances(
            placement.image_size, boxes[there], found.labels[there], masks[there.cpu()], found.scores[there]
        )

    # ---- for loading and training --------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        heads = [self.centre_head, self.size_head, *([self.component_head] if self.component_head else [])]
        return {"backbone": [self.backbone], "neck": [self.neck], "heads": heads, "contours": [self.contours]}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"centre_head.2.{kind}": ClassRows() for kind in ("weight", "bias")}

    _PUBLISHED: ClassVar[dict[str, Any]] = {"norm": "batch", "contour_norm": "batch", "start": "box"}
    _SBD, _LISTED = "SBD val, 512 x 512", "as listed for arXiv 2001.01629"
    presets: ClassVar[Mapping[str, Preset]] = {
        "deepsnake-sbd": Preset(
            _PUBLISHED,
            (
                Score(54.4, "mask AP_vol", _SBD, _LISTED), Score(62.1, "mask AP50", _SBD, _LISTED),
                Score(48.3, "mask AP70", _SBD, _LISTED),
            ),
        ),
        "deepsnake-kins": Preset(
            {**_PUBLISHED, "fit": "pad"},
            (Score(31.3, "amodal mask AP", "KINS test", _LISTED), Score(32.8, "box AP", "KINS test", _LISTED)),
            "how large the original has images at test is not stated; here they keep their size",
        ),
        "deepsnake-cityscapes": Preset(
            {
                **_PUBLISHED, "components": True, "canvas": (1216, 2432), "whole_classes": ("person", "rider"),
            },
            (Score(37.4, "mask AP", "Cityscapes val", _LISTED), Score(31.7, "mask AP", "Cityscapes test", _LISTED)),
        ),
        "deepsnake-coco": Preset(
            {**_PUBLISHED, "fit": "pad", "start": "centre"},
            (Score(30.3, "mask AP", "COCO test-dev", "the author, in his repository"),),
            "no weights were published",
        ),
        "deepsnake-small": Preset(
            {"backbone": "resnet18", "canvas": (320, 320), "head_width": 128, "contour_width": 64, "supervise": "all"},
            note="for a few hundred images and no GPU; trains from random weights",
        ),
    }  # fmt: skip

    # Published with Adam, whose weight decay is part of the gradient, and PCA lighting; here AdamW and plain colours.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "optimizer": "adamw", "lr": 1e-4, "weight_decay": 5e-4, "decay_norms": True, "decay_biases": True, "gamma": 0.5,
        "warmup": 0,
    }  # fmt: skip
    _AUGMENT: ClassVar[dict[str, Any]] = {
        "flip": 0.5, "jitter": (0.6, 1.4), "brightness": 0.4, "contrast": 0.4, "saturation": 0.4,
    }  # fmt: skip
    _LONG: ClassVar[tuple[float, ...]] = (80 / 200, 120 / 200, 150 / 200, 170 / 200)
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "deepsnake-sbd": {
            **_RECIPE, "epochs": 150, "batch": 80, "milestones": (80 / 150, 120 / 150),
            "augment": {**_AUGMENT, "size": (512, 512)},
        },
        "deepsnake-kins": {  # its second step is x 0.1, which one gamma cannot say
            **_RECIPE, "epochs": 150, "batch": 72, "milestones": (80 / 150, 120 / 150),
            "augment": {**_AUGMENT, "size": (384, 896)},
        },
        # After 140 epochs of the detector alone.
        "deepsnake-cityscapes": {
            **_RECIPE, "epochs": 200, "batch": 32, "milestones": _LONG, "augment": {**_AUGMENT, "size": (800, 800)},
        },
        "deepsnake-coco": {
            **_RECIPE, "epochs": 200, "batch": 72, "milestones": _LONG, "augment": {**_AUGMENT, "size": (512, 512)},
        },
    }  # fmt: skip


def _head(channels: int, width: int, outputs: int, bias: float = 0.0) -> nn.Sequential:
    last = nn.Conv2d(width, outputs, 1)
    nn.init.constant_(last.bias, bias)  # pyright: ignore[reportArgumentType]
    return nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True), last)


def _kept(
    boxes: Float[Tensor, "n 4"], scores: Float[Tensor, " n"], groups: Int[Tensor, " n"], threshold: float
) -> Tensor:
    """Which boxes survive suppression; their sides count as x1 - x0 + 1, as the original has it."""
    grown = boxes + boxes.new_tensor([0.0, 0.0, 1.0, 1.0])
    flags = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    flags[box_ops.nms(grown, scores, groups, threshold)] = True
    return flags


def _some(rows: Int[Tensor, " n"], most: int) -> Int[Tensor, " m"]:
    """All rows, or `most` of them by chance."""
    return rows if len(rows) <= most else rows[torch.randperm(len(rows), device=rows.device)[:most]]


def _expect(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UsageError(f"{name} is {value!r}; expected {', '.join(known[:-1])} or {known[-1]}")
