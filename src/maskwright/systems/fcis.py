"""FCIS, Fully Convolutional Instance-aware Semantic Segmentation (Li, Qi, Dai, Ji, Wei, CVPR 2017, arXiv 1611.07709),
and R-FCN, on which it is based (Dai, Li, He, Sun, NeurIPS 2016, arXiv 1605.06409).

No layer is applied to a box: the whole network is convolutional. For every part of an object on a 7 x 7 grid it
predicts maps of their own; those of a box are assembled by pooling, each bin from the maps of its part. A pixel
therefore has different scores in different boxes, although the maps are computed once.

    image -> ResNet, stride 16 -> conv4: objectness, deltas -> proposals
                               -> conv5, dilated -> 1 x 1 -> maps, boxes

R-FCN has one map for each class and part; the score of a class is the mean over the bins of a box. FCIS has two, for
pixels of the box inside and outside of the object, pooled to 21 x 21 bins. Both answers come from the same two:

    class: mean over bins of max(inside, outside), softmax over the classes
    mask:  softmax over (inside, outside) of each bin

At test time the boxes are refined once and pooled again; the results of both rounds vote on the masks. The published
FCIS code is followed, whose boxes include their last pixel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, Use, levels_of
from maskwright.blocks.box_stage import Assigned, BoxRules, detect
from maskwright.blocks.layers import ConvNorm
from maskwright.blocks.rpn import Anchors, ProposalRules, RPNHead, proposal_losses, propose
from maskwright.errors import UsageError
from maskwright.ops import boxes as box_ops
from maskwright.ops.distributed import global_mean_count
from maskwright.ops.interpolation import weights
from maskwright.ops.matching import match, sample
from maskwright.ops.pooling import as_rois, position_sensitive_pool
from maskwright.structures import Instances, Masks, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.two_stage import Proposals, ProposalsLike
from maskwright.systems.system import ClassRows, Output, System, at_least

BACKBONE = Backbone("resnet101", norm="frozen", frozen=2, stride_in="1x1")
RESIZE = Resize()
PROPOSALS = Proposals(anchor_sizes=(64, 128, 256, 512), before=(6000, 6000), after=(300, 300))
PREPROCESS = Preprocess(
    short=600, long=1000, resample="opencv", mean=(123.15, 115.90, 103.06), std=(1.0, 1.0, 1.0), divide=1.0, multiple=1
)
STRIDE = 16
RULES = ProposalRules(
    anchors="maskrcnn-benchmark", beta=1 / 9, inclusive=True, rank_by="probability", plus_one=True, straddle=0.0
)
BOX_RULES = BoxRules(beta=1.0, sample=128, weights=(5.0, 5.0, 2.0, 2.0), plus_one=True)
MASK_WEIGHT = 10.0  # of the mask loss


# ---- network ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Raw:
    """The output of the network.

    Attributes:
        scores: Maps of each class (the last one is background), kind (outside, inside; FCIS only) and part.
        boxes: Maps of the four deltas and of each part.
        objectness: Logits of the anchors.
        deltas: Box deltas of the anchors, anchor by anchor.
        size: Height and width of the input, padding included.
    """

    scores: Float[Tensor, "b m h w"]
    boxes: Float[Tensor, "b d h w"]
    objectness: Float[Tensor, "b a _h _w"]
    deltas: Float[Tensor, "b e _h _w"]
    size: tuple[int, int]


class Dense(nn.Module):
    """The convolutional network.

    Args:
        backbone: Gives feature maps, the last two of stride 16.
        anchors: Anchors per location.
        convs: Number of 3 x 3 convolutions of the proposal network.
        rpn_width: Their channels.
        width: Channels of the features that the maps are predicted from.
        maps: Number of maps of scores.
        box_maps: Number of maps of deltas.
    """

    def __init__(
        self, backbone: nn.Module, *, anchors: int, convs: int, rpn_width: int, width: int, maps: int, box_maps: int
    ):
        super().__init__()
        channels = levels_of(backbone).channels
        self.backbone = backbone
        # Two logits for each anchor, background and object, as published.
        self.rpn = RPNHead(channels[-2], anchors, convs, rpn_width)
        self.rpn.objectness = nn.Conv2d(self.rpn.objectness.in_channels, 2 * anchors, 1)
        self.reduce = ConvNorm(channels[-1], width, 1, relu=True)
        self.scores = nn.Conv2d(width, maps, 1)
        self.boxes = nn.Conv2d(width, box_maps, 1)
        for module in (self.rpn.objectness, self.reduce, self.scores, self.boxes):
            for layer in module.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.normal_(layer.weight, std=0.01)
                    if layer.bias is not None:
                        nn.init.zeros_(layer.bias)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        size = (images.shape[-2], images.shape[-1])
        *_, before, last = self.backbone(images)
        logits, deltas = (maps[0] for maps in self.rpn([before]))
        background, objects = logits.chunk(2, 1)
        rows, columns = (torch.sym_max(1, side // STRIDE) for side in size)  # the published code has no anchors beyond
        features = self.reduce(last)
        return Raw(
            self.scores(features), self.boxes(features), (objects - background)[..., :rows, :columns],
            deltas[..., :rows, :columns], size,
        )  # fmt: skip


class Read(NamedTuple):
    """What the maps say about boxes.

    Attributes:
        logits: Class logits; the last class is background.
        deltas: Box deltas.
        pairs: Logits that a bin is outside and inside of an object of each class; None in R-FCN.
    """

    logits: Float[Tensor, "r k"]
    deltas: Float[Tensor, "r 4"]
    pairs: Float[Tensor, "r k 2 s s"] | None


# ---- R-FCN -----------------------------------------------------------------------------------------------------------


class RFCN(System):
    """R-FCN: boxes alone."""

    dense: Dense

    name = "rfcn"
    card = Card(
        title="R-FCN",
        paper="Dai, Li, He, Sun: R-FCN: Object Detection via Region-based Fully Convolutional Networks. NeurIPS 2016",
        arxiv="1605.06409",
        code="daijifeng001/R-FCN",
        code_licence="MIT",
    )
    kinds: ClassVar[int] = 1  # of maps for each class and part

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        proposals: ProposalsLike = PROPOSALS,
        rpn_width: int = 512,
        head_width: int = 1024,
        parts: int = 7,
        side: int = 7,
        smallest_side: float = 2.0,
        mining: bool = True,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, a ResNet whose last stage is dilated.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            proposals: The proposal network, see `Proposals`; all anchors are on one level of stride 16.
            rpn_width: Channels of its 3 x 3 convolutions.
            head_width: Channels of the features that the maps are predicted from.
            parts: Parts of a box along each axis.
            side: Bins of a box along each axis.
            smallest_side: Proposals with a shorter side are dropped, in pixels of the input.
            mining: Train on the 128 boxes of largest loss of each image (online hard example mining, arXiv
                1604.03540), instead of on a sample of 128, a quarter of them objects.
        """
        super().__init__()
        at_least(self.name, 1, rpn_width=rpn_width, head_width=head_width, parts=parts)
        if side < parts:
            raise UsageError(f"{self.name}: side must be at least parts = {parts}, got {side}")
        spec, own = Backbone.read(backbone, BACKBONE), Proposals.read(proposals, PROPOSALS)
        self.classes = tuple(classes)
        self.parts, self.side, self.mining = parts, side, mining
        self.proposal_rules = replace(
            RULES, smallest_side=smallest_side, before=tuple(own.before or (6000, 6000)),
            after=tuple(own.after or (300, 300)),
        )  # fmt: skip
        self.box_rules = BOX_RULES
        body = spec.build(in_channels, Use(dilated=True, caffe_pool=True))
        if levels_of(body).strides[-2:] != (STRIDE, STRIDE):
            raise UsageError(f"{self.name} requires a backbone with a dilated stage of stride 16, such as a ResNet")
        self.anchors = Anchors([own.anchor_sizes], [STRIDE], rule=RULES.anchors)
        self.dense = Dense(
            body, anchors=self.anchors.count, convs=own.convs, rpn_width=rpn_width, width=head_width,
            maps=(len(self.classes) + 1) * self.kinds * parts**2, box_maps=4 * parts**2,
        )  # fmt: skip
        self.preprocess = Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels)

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes"})

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    def propose(
        self, raw: Raw, sizes: Sequence[tuple[int, int]], training: bool = False
    ) -> list[Float[Tensor, "_n 4"]]:
        """Proposals of each image of valid size (height, width), in pixels of the input, best first."""
        anchors = self.anchors([raw.objectness], raw.size)
        found = propose([raw.objectness], [raw.deltas], anchors, sizes, self.proposal_rules, training)
        return [boxes for boxes, _ in found]

    def read(self, raw: Raw, rois: Float[Tensor, "r 5"]) -> Read:
        """Assembles the maps of boxes, and computes what they say.

        Args:
            raw: Output of the network.
            rois: Batch index and box in pixels of the input.
        """
        maps = position_sensitive_pool(raw.scores.float(), rois, self.parts, self.side, 1 / STRIDE)
        deltas = position_sensitive_pool(raw.boxes.float(), rois, self.parts, self.side, 1 / STRIDE).mean((2, 3))
        if self.kinds == 1:
            return Read(maps.mean((2, 3)), deltas, None)
        pairs = maps.unflatten(1, (-1, self.kinds))
        return Read(pairs.amax(2).mean((2, 3)), deltas, pairs)

    # ---- training ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes `rpn_objectness`, `rpn_box`, `class`, `box` and, in FCIS, `mask`. Crowd regions are ignored."""
        device = raw.objectness.device
        targets = [(t if t.crowd is None else t[~t.crowd]).to(device) for t in targets]
        # From here on x1 and y1 are the last pixel of a box.
        targets = [replace(t, boxes=t.boxes - t.boxes.new_tensor([0, 0, 1, 1])) for t in targets]
        anchors = self.anchors([raw.objectness], raw.size)
        terms = proposal_losses([raw.objectness], [raw.deltas], anchors, targets, self.proposal_rules)
        proposals = self.propose(raw, [t.image_size for t in targets], training=True)
        assigned = [self.assign(*pair) for pair in zip(proposals, targets, strict=True)]
        return terms | self.roi_losses(raw, assigned, targets)

    @torch.no_grad()
    def assign(self, proposals: Float[Tensor, "n 4"], target: Instances) -> Assigned:
        """Assigns proposals and the objects' own boxes to objects or background: foreground first, all or a sample."""
        boxes = torch.cat([proposals, target.boxes.to(proposals)])
        overlap = box_ops.pairwise_iou(target.boxes.to(boxes), boxes, plus_one=True)
        nearest, matched = match(overlap, self.box_rules.overlap, self.box_rules.overlap)
        positive, negative = matched >= 0, matched < 0
        if self.mining:
            foreground, background = positive.nonzero().flatten(), negative.nonzero().flatten()
        else:
            if len(target):
                negative = negative & (overlap.amax(0) >= 0.1)
            foreground, background = sample(positive, negative, self.box_rules.sample, self.box_rules.positives)
        index = torch.cat([foreground, background])
        owners, labels = nearest[foreground], torch.full_like(index, len(self.classes))
        labels[: len(foreground)] = target.labels.to(labels)[owners]
        return Assigned(boxes[index], labels, torch.arange(len(foreground), device=boxes.device), owners)

    def roi_losses(self, raw: Raw, assigned: Sequence[Assigned], targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes the losses of boxes.

        As in the published code `class` is the mean over the boxes that are trained on, while `box` and `mask`, sums
        over those that are assigned to an object, are divided by their intended number, 128 for each image.
        """
        read = self.read(raw, as_rois([own.boxes for own in assigned]))
        count, zero = len(read.logits), raw.scores.sum() * 0 + raw.boxes.sum() * 0
        labels = torch.cat([own.labels for own in assigned])
        rows = (labels < len(self.classes)).nonzero().flatten()
        pairs = [(own, target) for own, target in zip(assigned, targets, strict=True) if len(own.foreground)]
        terms = {"class": functional.cross_entropy(read.logits, labels, reduction="none")}
        terms["box"] = read.logits.new_zeros(count)
        if read.pairs is not None:
            terms["mask"] = read.logits.new_zeros(count)
        if pairs:
            goals = [
                box_ops.encode(own.boxes[own.foreground], target.boxes[own.owners], self.box_rules.weights, True)
                for own, target in pairs
            ]
            box = functional.smooth_l1_loss(
                read.deltas[rows], torch.cat(goals), beta=self.box_rules.beta, reduction="none"
            )
            terms["box"] = terms["box"].index_put((rows,), box.sum(1))
            if read.pairs is not None:
                truth = torch.cat([self.mask_targets(own, target) for own, target in pairs])
                mask = functional.cross_entropy(read.pairs[rows, labels[rows]], truth.long(), reduction="none")
                terms["mask"] = terms["mask"].index_put((rows,), MASK_WEIGHT * mask.mean((1, 2)))
        total = torch.stack(list(terms.values())).sum(0).detach()
        most = self.box_rules.sample
        kept = [own.topk(min(most, len(own))).indices for own in total.split([len(own.labels) for own in assigned])]
        offsets = [sum(len(own.labels) for own in assigned[:n]) for n in range(len(assigned))]
        chosen = torch.cat([own + offset for own, offset in zip(kept, offsets, strict=True)])
        mean, fixed = global_mean_count(zero.new_tensor([float(len(chosen)), float(most * len(targets))]))
        return {name: term[chosen].sum() / (mean if name == "class" else fixed) + zero for name, term in terms.items()}

    def mask_targets(self, assigned: Assigned, target: Instances) -> Float[Tensor, "p s s"]:
        """Targets of the masks of one image's foreground boxes, see `mask_targets`."""
        assert target.masks is not None  # `System.needs`
        boxes = assigned.boxes[assigned.foreground]
        return mask_targets(target.masks, target.boxes, assigned.owners, boxes, self.side)

    # ---- detection ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 1e-3,
        nms_threshold: float = 0.3,
        detections: int = 100,
    ) -> list[Instances]:
        """Detects boxes.

        Args:
            raw: Output of the network.
            placements: How each image was placed in the input.
            score_threshold: Detections must score more than this.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
        """
        sizes = [p.size for p in placements]
        proposals = self.propose(raw, sizes)
        read = self.read(raw, as_rois(proposals))
        boxes = box_ops.decode(torch.cat(proposals), read.deltas, self.box_rules.weights, plus_one=True)
        found = detect(
            read.logits.softmax(1)[:, :-1], boxes[:, None], [len(own) for own in proposals], sizes, self.box_rules,
            score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
        )  # fmt: skip
        return [
            Instances(place.image_size, to_image(own.boxes, place) + own.boxes.new_tensor([0, 0, 1, 1]), own.labels,
                      scores=own.scores)
            for own, place in zip(found, placements, strict=True)
        ]  # fmt: skip

    # ---- for loading and training ------------------------------------------------------------------------------------

    def class_rows(self) -> Mapping[str, ClassRows | tuple[ClassRows, ...]]:
        rows = ClassRows(per_class=self.kinds * self.parts**2, background_last=True)
        return {f"dense.scores.{kind}": rows for kind in ("weight", "bias")}

    _SMALL: ClassVar[dict[str, Any]] = {
        "backbone": {"name": "resnet18", "norm": "group", "frozen": 0}, "resize": {"short": 320, "long": 512},
        "proposals": {"anchor_sizes": (32, 64, 128, 256), "before": (1000, 600), "after": (200, 150)},
        "rpn_width": 256, "head_width": 256,
    }  # fmt: skip
    presets: ClassVar[Mapping[str, Preset]] = {
        "rfcn-r101-coco": Preset({}, note="the networks of the authors' R-101; no score is stated here"),
        "rfcn-small": Preset(_SMALL, note="for a few hundred images and no GPU; trains from random weights"),
    }
    # Published for FCIS: 8 epochs with the rate 5e-4 for the sum over 8 images, here for their mean.
    _RECIPE: ClassVar[dict[str, Any]] = {
        "steps": 118_000, "batch": 8, "lr": 4e-3, "milestones": (2 / 3,), "weight_decay": 5e-4, "warmup": 250,
        "augment": {"flip": 0.5},
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"rfcn": _RECIPE}


def to_image(boxes: Float[Tensor, "n 4"], placement: Placement) -> Float[Tensor, "n 4"]:
    """Boxes of the input on the image, clipped to it; x1 and y1 are the last pixel in both."""
    boxes = placement.boxes_to_image(boxes)
    if placement.mirrored:
        boxes = boxes - boxes.new_tensor([1, 0, 1, 0])
    return box_ops.clip(boxes, placement.image_size, plus_one=True)


# ---- FCIS ------------------------------------------------------------------------------------------------------------


class FCIS(RFCN):
    """FCIS: boxes and masks from the same maps."""

    name = "fcis"
    card = Card(
        title="FCIS",
        paper="Li, Qi, Dai, Ji, Wei: Fully Convolutional Instance-aware Semantic Segmentation. CVPR 2017",
        arxiv="1611.07709",
        code="msracver/FCIS",
        code_licence="MIT",
    )
    kinds: ClassVar[int] = 2

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        proposals: ProposalsLike = PROPOSALS,
        rpn_width: int = 512,
        head_width: int = 1024,
        parts: int = 7,
        side: int = 21,
        smallest_side: float = 2.0,
        mining: bool = True,
    ):
        """
        Args:
            classes: Names of the classes.
            backbone: The backbone, a ResNet whose last stage is dilated.
            in_channels: Channels of the image.
            resize: Size and normalisation of the input, see `Resize`.
            proposals: The proposal network, see `Proposals`; all anchors are on one level of stride 16.
            rpn_width: Channels of its 3 x 3 convolutions.
            head_width: Channels of the features that the maps are predicted from.
            parts: Parts of a box along each axis.
            side: Bins of a box along each axis, and side of its mask.
            smallest_side: Proposals with a shorter side are dropped, in pixels of the input.
            mining: Train on the 128 boxes of largest loss of each image (online hard example mining, arXiv
                1604.03540), instead of on a sample of 128, a quarter of them objects.
        """
        super().__init__(
            classes, backbone=backbone, in_channels=in_channels, resize=resize, proposals=proposals,
            rpn_width=rpn_width, head_width=head_width, parts=parts, side=side, smallest_side=smallest_side,
            mining=mining,
        )  # fmt: skip

    @property
    def outputs(self) -> frozenset[Output]:
        return frozenset({"boxes", "masks"})

    @torch.no_grad()
    def decode(
        self,
        raw: Raw,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 1e-3,
        nms_threshold: float = 0.3,
        detections: int = 100,
        mask_threshold: float = 0.4,
        merge_threshold: float = 0.5,
    ) -> list[Instances]:
        """Detects objects, see `vote`.

        Args:
            raw: Output of the network.
            placements: How each image was placed in the input.
            score_threshold: Detections must score more than this.
            nms_threshold: IoU threshold of the non-maximum suppression within a class.
            detections: Largest number of detections per image.
            mask_threshold: Probability from which on a pixel belongs to a mask.
            merge_threshold: IoU from which on a box votes on the mask of another one.
        """
        result = []
        for own, placement in zip(self.candidates(raw, [p.size for p in placements]), placements, strict=True):
            masks = own.masks.flip(-1) if placement.mirrored else own.masks
            voted = vote(
                to_image(own.boxes, placement), own.scores, masks, placement.image_size,
                score_threshold=score_threshold, nms_threshold=nms_threshold, detections=detections,
                mask_threshold=mask_threshold, merge_threshold=merge_threshold,
            )  # fmt: skip
            sides = (voted.boxes[:, 2:] - voted.boxes[:, :2] + 1).tolist()
            crops = [
                resized(mask, (int(height), int(width))) >= mask_threshold
                for mask, (width, height) in zip(voted.masks, sides, strict=True)
            ]
            corners, device = voted.boxes[:, :2].long(), raw.scores.device
            boxes = (voted.boxes + voted.boxes.new_tensor([0, 0, 1, 1])).to(device)
            pasted = Masks.from_crops(crops, corners, placement.image_size)
            labels, scores = voted.labels.to(device), voted.scores.to(device)
            result.append(Instances(placement.image_size, boxes, labels, pasted, scores))
        return result

    def candidates(self, raw: Raw, sizes: Sequence[tuple[int, int]]) -> list[Candidates]:
        """What the proposals, and then the boxes refined from them, say: two candidates for each proposal.

        Args:
            raw: Output of the network.
            sizes: Height and width of the valid part of each image in the input.
        """
        boxes = self.propose(raw, sizes)
        rounds: list[list[Candidates]] = []
        for last in (False, True):
            counts = [len(own) for own in boxes]
            read = self.read(raw, as_rois(boxes))
            assert read.pairs is not None
            scores = read.logits.softmax(1)
            own = read.pairs[torch.arange(len(scores), device=scores.device), scores[:, :-1].argmax(1)]
            values = scores.split(counts), own.softmax(1)[:, 1].split(counts)
            rounds.append([Candidates(*row) for row in zip(boxes, *values, strict=True)])
            if not last:  # the deltas of the second round are not used
                boxes = [
                    box_ops.clip(box_ops.decode(b, d, self.box_rules.weights, True), size, True)
                    for b, d, size in zip(boxes, read.deltas.split(counts), sizes, strict=True)
                ]
        least, result = self.proposal_rules.smallest_side, []
        for parts in zip(*rounds, strict=True):
            both = Candidates(*(torch.cat(values) for values in zip(*parts, strict=True)))
            large = (both.boxes[:, 2:] - both.boxes[:, :2] + 1 >= least).all(1)
            good = large & torch.isfinite(both.boxes).all(1) & torch.isfinite(both.scores).all(1)
            result.append(Candidates(*(values[good] for values in both)))
        return result

    _README = "README of msracver/FCIS"
    _VOC = "VOC 2012 val, annotations of SBD"
    presets: ClassVar[Mapping[str, Preset]] = {
        "fcis-r101-coco": Preset(
            {},
            (Score(29.2, "mask AP", "COCO minival 2014, short side 600, pycocotools", _README),
             Score(50.8, "mask AP50", "COCO minival 2014, short side 600, pycocotools", _README),
             Score(29.6, "mask AP", "COCO test-dev", _README)),
            "the authors' R-101 with mining of hard examples",
        ),
        "fcis-r101-voc": Preset(
            {"proposals": {"anchor_sizes": (128, 256, 512)}, "smallest_side": 16.0, "mining": False},
            (Score(66.0, "mask AP50", _VOC, _README), Score(51.9, "mask AP70", _VOC, _README)),
            "the authors' R-101 for the 20 classes of VOC",
        ),
        "fcis-small": Preset(RFCN._SMALL, note="for a few hundred images and no GPU; trains from random weights"),
    }  # fmt: skip
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fcis": RFCN._RECIPE}


class Candidates(NamedTuple):
    """Boxes of one image that vote on the result: x1 and y1 are the last pixel.

    Attributes:
        boxes: Boxes in pixels of the input.
        scores: Probability of each class; the last one is background.
        masks: Probability of the class of highest probability that a bin is inside of the object.
    """

    boxes: Float[Tensor, "n 4"]
    scores: Float[Tensor, "n k"]
    masks: Float[Tensor, "n s s"]


class Voted(NamedTuple):
    """Objects of one image, best first, on the host: boxes of whole pixels, and masks inside of them."""

    boxes: Float[Tensor, "d 4"]
    scores: Float[Tensor, " d"]
    labels: Int[Tensor, " d"]
    masks: Float[Tensor, "d s s"]


def vote(
    boxes: Float[Tensor, "n 4"],
    scores: Float[Tensor, "n k"],
    masks: Float[Tensor, "n s s"],
    size: tuple[int, int],
    *,
    score_threshold: float,
    nms_threshold: float,
    detections: int,
    mask_threshold: float,
    merge_threshold: float,
) -> Voted:
    """Selects boxes and computes their masks from all boxes nearby (section 3.3).

    The mask of a selected box is the mean of the masks of all candidates that overlap it, each binary, weighted by
    their scores for the selected class, whatever class their own mask is of. The box becomes the one around its pixels.
    Objects that are one pixel wide or high, or without pixels, are dropped, as by the published code on a GPU.

    Args:
        boxes: Candidates in pixels of the image; x1 and y1 are the last pixel.
        scores: Probability of each class; the last one is background.
        masks: Probability that a bin is inside of the object.
        size: Height and width of the image.
        score_threshold: Objects must score more than this.
        nms_threshold: IoU threshold of the non-maximum suppression within a class.
        detections: Largest number of objects.
        mask_threshold: Threshold of the masks that vote, and of their mean.
        merge_threshold: IoU from which on a candidate votes.
    """
    boxes, scores, masks = boxes.cpu(), scores[:, :-1].cpu(), masks.cpu()
    row, label = (scores > score_threshold).nonzero().unbind(1)
    kept = box_ops.nms(boxes[row], scores[row, label], label, nms_threshold, detections, plus_one=True)
    row, label = row[kept], label[kept]
    overlap = box_ops.pairwise_iou(boxes[row].double(), boxes.double(), plus_one=True)
    places = boxes.round().long()
    pasted: dict[int, Tensor] = {}
    found, grids, used = list[list[int]](), list[Tensor](), list[int]()
    for index, (own, kind) in enumerate(zip(overlap, label.tolist(), strict=True)):
        voters = (own >= merge_threshold).nonzero().flatten()
        if not len(voters):
            continue
        share = scores[voters, kind]
        share = (share / share.sum()).tolist()
        left, top = places[voters, :2].amin(0).tolist()
        right, bottom = places[voters, 2:].amax(0).tolist()
        plane = torch.zeros(bottom - top + 1, right - left + 1, dtype=torch.float64)
        for voter, weight in zip(voters.tolist(), share, strict=True):
            x0, y0, x1, y1 = places[voter].tolist()
            if voter not in pasted:
                pasted[voter] = resized(masks[voter], (y1 - y0 + 1, x1 - x0 + 1)) >= mask_threshold
            plane[y0 - top : y1 - top + 1, x0 - left : x1 - left + 1] += pasted[voter] * weight
        y, x = (plane >= mask_threshold).nonzero().unbind(1)
        if not len(x):
            continue
        (x0, x1), (y0, y1) = ((int(v.min()), int(v.max())) for v in (x, y))
        if x1 > x0 and y1 > y0:
            found.append([x0 + left, y0 + top, x1 + left, y1 + top])
            grids.append(resized(plane[y0 : y1 + 1, x0 : x1 + 1].float(), (masks.shape[1], masks.shape[2])))
            used.append(index)
    return Voted(
        torch.tensor(found, dtype=torch.float32).reshape(-1, 4), scores[row[used], label[used]], label[used],
        torch.stack(grids) if grids else masks[:0],
    )  # fmt: skip


def resized(values: Float[Tensor, "h w"], size: tuple[int, int]) -> Float[Tensor, "_h _w"]:
    """Bilinear resizing by pixel centres, without anti-aliasing."""
    return functional.interpolate(values[None, None].float(), size, mode="bilinear", align_corners=False)[0, 0]


@torch.no_grad()
def mask_targets(
    masks: Masks, around: Float[Tensor, "n 4"], owners: Int[Tensor, " p"], boxes: Float[Tensor, "p 4"], side: int
) -> Float[Tensor, "p side side"]:
    """Targets of masks: the mask inside the rounded box, and inside its own rounded box, resized and binary at 0.4.

    Args:
        masks: Masks of the objects.
        around: Boxes of the objects; x1 and y1 are the last pixel.
        owners: The object of each box.
        boxes: Boxes, likewise.
        side: Side of the grid.
    """
    result = boxes.new_zeros(len(boxes), side, side)
    if not len(boxes):
        return result
    chosen, group = owners.unique(return_inverse=True)
    frames, crops = masks[chosen.cpu()].crops()
    places, limits = boxes.round(), around.round()[chosen].tolist()
    bins = (torch.arange(side, device=boxes.device) + 0.5) / side
    for number, (frame, crop, limit) in enumerate(zip(frames.tolist(), crops, limits, strict=True)):
        rows = (group == number).nonzero().flatten()
        x0, y0, x1, y1 = (int(v) for v in limit)
        left, top, right, bottom = max(frame[0], x0), max(frame[1], y0), min(frame[2], x1 + 1), min(frame[3], y1 + 1)
        if right <= left or bottom <= top:
            continue
        plane = crop[top - frame[1] : bottom - frame[1], left - frame[0] : right - frame[0]].to(result)
        axes = []
        for axis, start, length in ((1, top, bottom - top), (0, left, right - left)):
            low, high = places[rows, axis, None], places[rows, axis + 2, None]
            cells = (bins * (high - low + 1) - 0.5).clamp(min=0).minimum(high - low)
            axes.append(weights(cells + low - start, length))
        with torch.autocast(boxes.device.type, enabled=False):  # half precision would move the threshold
            result[rows] = axes[0] @ plane @ axes[1].transpose(1, 2)
    return (result >= 0.4).to(result)
