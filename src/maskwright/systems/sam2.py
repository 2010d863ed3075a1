"""SAM 2 and 2.1: segmenting anything in images and videos (Ravi et al., 2025, arXiv 2408.00714).

A hierarchical vision transformer encodes a frame. Its features attend to memories of the object in other frames: maps
made of features and masks, and vectors ("object pointers") that the mask decoder gave. A prompt encoder and mask
decoder as in Segment Anything then predict masks, their IoU, and whether the object is in the frame at all. An image is
a video of one frame, which attends to nothing.

The rules of the official predictor are followed: which frames are read (`kinds.video.MemoryBank`), which of several
masks is taken, and what is remembered of a frame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint  # pyright: ignore[reportUnknownVariableType] - not typed

from maskwright.blocks.backbones import Backbone, BackboneLike, levels_of
from maskwright.blocks.hiera import HieraNeck
from maskwright.blocks.lora import adapt
from maskwright.blocks.memory_attention import MemoryAttention, MemoryEncoder
from maskwright.blocks.prompting import Decoded, PromptEncoder, stable_answer
from maskwright.blocks.transformer import MLP
from maskwright.errors import UsageError
from maskwright.ops.components import small_components
from maskwright.ops.distributed import global_mean_count
from maskwright.options import OptionGroup
from maskwright.structures import Instances, Placement, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.families.memory_tracking import EARLIER_LOGIT, MemoryTracker
from maskwright.systems.kinds import prompt_training
from maskwright.systems.kinds.everything import Grid
from maskwright.systems.kinds.prompt_training import Simulation
from maskwright.systems.kinds.promptable import Features, PromptDecoder
from maskwright.systems.kinds.video import MemoryBank

BACKBONE, DECODER, MEMORY, RESIZE = Backbone("hiera-base-plus"), PromptDecoder(), MemoryBank(), Resize()
SIMULATION = Simulation(points=7, repeats=0)
PREPROCESS = Preprocess(resample="antialias", fit="stretch", canvas=(1024, 1024))

CARD = Card(
    title="SAM 2",
    paper="SAM 2: Segment Anything in Images and Videos. Ravi, Gabeur, Hu, Hu, Ryali, Ma, Khedr, Rädle, Rolland, "
    "Gustafson, Mintun, Pan, Alwala, Carion, Wu, Girshick, Dollár, Feichtenhofer. ICLR 2025",
    arxiv="2408.00714",
    code="https://github.com/facebookresearch/sam2",
    code_licence="Apache-2.0",
)


@dataclass(frozen=True)
class PresenceLoss(OptionGroup):
    """The loss, as options of the system.

    Attributes:
        mask: Weight of the focal loss of the masks.
        dice: Weight of their dice loss.
        iou: Weight of the error of the predicted IoU.
        present: Weight of the focal loss of the presence of the object.
        iou_error: "l1" or, as in Segment Anything, "l2".
        every_iou: Whether the IoU of all masks is trained, or only that of the best one.
        gamma: Exponent of the focal loss of the presence; 0 is cross entropy.
        alpha: Weight of objects that are present in it, against 1 - `alpha`; None: none.
    """

    label: ClassVar[str] = "loss"

    mask: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    present: float = 1.0
    iou_error: Literal["l1", "l2"] = "l1"
    every_iou: bool = True
    gamma: float = 0.0
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(0, "mask", "dice", "iou", "present", "gamma")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise UsageError(f"loss.alpha must be between 0 and 1 or null, got {self.alpha}")


LOSS = PresenceLoss()

# J&F on SA-V test, MOSE val and LVOS v2, by version and size.
PUBLISHED = {
    "2.1": {
        "tiny": (76.5, 71.8, 77.3), "small": (76.6, 73.5, 78.3), "base-plus": (78.2, 73.7, 78.2),
        "large": (79.5, 74.6, 80.6),
    },
    "2": {
        "tiny": (75.0, 70.9, 75.3), "small": (74.9, 71.5, 76.4), "base-plus": (74.7, 72.8, 75.8),
        "large": (76.0, 74.6, 79.8),
    },
}  # fmt: skip


# ---- networks --------------------------------------------------------------------------------------------------------


class ImageEncoder(nn.Module):
    """Backbone, neck, and the projections of the finer levels that the mask decoder adds while upscaling."""

    def __init__(self, backbone: Backbone, width: int, in_channels: int):
        super().__init__()
        self.backbone = backbone.build(in_channels)
        self.neck = HieraNeck(levels_of(self.backbone).channels, width)
        self.finer = nn.ModuleList([nn.Conv2d(width, width // 8, 1), nn.Conv2d(width, width // 4, 1)])
        self.no_memory = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.no_memory, std=0.02)

    def forward(self, images: Float[Tensor, "b c h w"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Returns `image`, the two levels of `finer`, and `frame` of `FrameFeatures`."""
        fine, middle, frame, _ = self.neck(self.backbone(images))  # the level of stride 32 has been added to `frame`
        return frame + self.no_memory[:, None, None], self.finer[0](fine), self.finer[1](middle), frame


class ObjectPointer(nn.Module):
    """Makes an object pointer of the decoder's output token; a learned vector if the object is not in the frame."""

    def __init__(self, width: int):
        super().__init__()
        self.project = MLP((width, width, width, width))
        self.absent = nn.Parameter(torch.empty(width))
        nn.init.trunc_normal_(self.absent, std=0.02)

    def forward(self, tokens: Float[Tensor, "n c"], present: Float[Tensor, "n 1"]) -> Float[Tensor, "n c"]:
        """Returns the pointers; `present` is 1 where the object is in the frame, otherwise 0."""
        return present * self.project(tokens) + (1 - present) * self.absent


# ---- system ----------------------------------------------------------------------------------------------------------


class SAM2(MemoryTracker):
    """SAM 2 (`version` "2") and SAM 2.1.

    2.1 adds positions in time to object pointers and marks memories without the object; the networks are equal
    otherwise.

    Args:
        classes: Name of the only class.
        backbone: A Hiera.
        version: "2" or "2.1".
        decoder: Prompt encoder and mask decoder; its width is that of everything after the backbone.
        memory: What a frame attends to.
        resize: Size and normalisation of the input: images are stretched to `canvas`, 1024 x 1024 pixels as published.
        in_channels: Channels of the images.
        points_per_side: Default of `decode`: the grid of "segment everything" has the square of this many points.
        lora: Rank of updates of the attention layers of the image encoder, which is otherwise frozen (LoRA); 0: none,
            and the encoder is trained.
        simulation: How prompts are simulated in training. Its weights are not used; those of `loss` are.
        loss: The loss.
    """

    name = "sam2"
    optional_networks = ("image_encoder.lora.",)
    card = CARD

    def __init__(
        self,
        *,
        classes: Sequence[str] = ("object",),
        backbone: BackboneLike = BACKBONE,
        version: Literal["2", "2.1"] = "2.1",
        decoder: Mapping[str, Any] | PromptDecoder = DECODER,
        memory: Mapping[str, Any] | MemoryBank = MEMORY,
        resize: ResizeLike = RESIZE,
        in_channels: int = 3,
        points_per_side: int = 32,
        lora: int = 0,
        simulation: Mapping[str, Any] | Simulation = SIMULATION,
        loss: Mapping[str, Any] | PresenceLoss = LOSS,
    ):
        super().__init__()
        spec, heads, bank = (
            Backbone.read(backbone, BACKBONE), PromptDecoder.read(decoder, DECODER), MemoryBank.read(memory, MEMORY),
        )  # fmt: skip
        if not spec.name.startswith("hiera-"):
            raise UsageError(f"{self.name}: backbone must be a Hiera, hiera-tiny for instance, got {spec.name!r}")
        width, newer = heads.width, version == "2.1"
        if width % 4 or width % bank.width:
            raise UsageError(
                f"{self.name}: decoder.width must be a multiple of 4 and of memory.width ({bank.width}), got {width}"
            )
        self.classes, self.version, self.width, self.bank = self.checked_classes(classes), version, width, bank
        self.points_per_side = self.checked_points(points_per_side)
        self.simulation, self.loss = Simulation.read(simulation, SIMULATION), PresenceLoss.read(loss, LOSS)
        self.preprocess = self.checked_canvas(Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels), 32)
        self.image_encoder = ImageEncoder(spec, width, in_channels)
        if lora:
            adapt(self.image_encoder, lora)
        self.prompt_encoder = PromptEncoder(width)
        self.mask_decoder = heads.build(sigmoid=True, present=True, finer=True)
        self.pointer = ObjectPointer(width)
        self.memory_attention = MemoryAttention(
            width, bank.width, bank.hidden, bank.layers, steps=bank.frames, placed=newer, dropout=bank.dropout
        )
        self.memory_encoder = MemoryEncoder(width, bank.width, absent=newer)
        self.mask_prompt = nn.Conv2d(1, 1, 4, 4)  # a mask of the input as logits of an earlier answer
        # Training is on images, which these do not serve: weight decay alone would change them.
        for network in (self.pointer, self.memory_attention, self.memory_encoder, self.mask_prompt):
            network.requires_grad_(False)

    # ---- images ------------------------------------------------------------------------------------------------------

    def padding(self, counts: Int[Tensor, " n"], boxed: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
        return ((counts > 0) | boxed).long()

    def single(self, decoded: Decoded) -> Int[Tensor, " n"]:
        return stable_answer(decoded)

    def feedback(self, logits: Float[Tensor, "n h w"]) -> Float[Tensor, "n h w"]:
        return logits.float().clamp(-EARLIER_LOGIT, EARLIER_LOGIT)

    def answers_to_points(
        self, features: Features, placement: Placement, points: Float[Tensor, "n 2"], options: Grid
    ) -> tuple[Float[Tensor, "k h w"], Float[Tensor, " k"], Int[Tensor, " k"]]:
        assert isinstance(options, Everything)
        count = 3 if options.multimask_output else 1
        logits, scores, owner = self.answers(features, placement, points, count, refine=options.use_m2m)
        logits = logits - options.mask_threshold
        if options.small_regions:
            logits = without_small_regions(logits, options.small_regions)
        return logits, scores, owner

    # ---- training ----------------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        return {
            **super().groups(),
            "memory": [self.pointer, self.memory_attention, self.memory_encoder, self.mask_prompt],
        }

    def losses(self, raw: Features, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Simulates clicks and boxes for the objects of images, and corrections of the answers.

        Masks are compared on the grid of the input. Of three masks only the best is trained.

        Args:
            raw: What `forward` returned.
            targets: Objects of each image, in the frame of the network's input. Labels do not count.

        Returns:
            `mask`, `dice`, `iou` and `present`, weighted, per object and summed over the rounds. Prompts are drawn by
            torch's generator.
        """
        rules = self.simulation
        examples = prompt_training.drawn(raw, targets, rules.objects)
        planes = input_planes(targets, examples, raw.size)
        features = raw[examples.owner]
        points, labels, boxed = prompt_training.first_prompts(examples, rules, raw.size)
        logits = torch.zeros_like(examples.masks)
        known = torch.zeros_like(boxed)
        count = global_mean_count(examples.weight.sum()[None], minimum=1.0)[0]
        total = logits.new_zeros(4)
        for number, kind in enumerate(prompt_training.schedule(rules)):
            if kind == "point":
                place, label = prompt_training.correction(logits, examples.masks, raw.size)
                points, labels = torch.cat([points, place[:, None]], 1), torch.cat([labels, label[:, None]], 1)
            ambiguous = ~boxed & (number == 0)
            terms, logits = self._round(features, (points, labels, logits, known), planes, ambiguous, examples.weight)
            total, known = total + terms, torch.ones_like(known)
        idle = sum((level.float().sum() for level in (raw.image, *raw.finer)), total.new_zeros(())) * 0
        mask, dice, iou, present = total / count
        own = self.loss
        return {
            "mask": own.mask * mask + idle, "dice": own.dice * dice, "iou": own.iou * iou,
            "present": own.present * present,
        }  # fmt: skip

    def _round(
        self, features: Features, prompts: tuple[Tensor, ...], planes: Tensor, ambiguous: Tensor, weight: Tensor
    ) -> tuple[Float[Tensor, 4], Float[Tensor, "n h w"]]:
        """The loss of one round, summed over objects, and the logits that the next round corrects."""

        def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            decoded = prompt_training.answer(self, features, *inputs)
            with torch.autocast(planes.device.type, enabled=False):
                wide = functional.interpolate(decoded.logits.float(), size=planes.shape[1:], mode="bilinear")
                terms = answer_losses(wide, decoded.scores, decoded.present, planes, ambiguous, self.loss)
                best = torch.where(ambiguous, 1 + decoded.scores[:, 1:].argmax(1), 0)
                rows = torch.arange(len(best), device=best.device)
                return (terms * weight).sum(1), decoded.logits[rows, best].detach().float()

        if self.simulation.checkpoint and torch.is_grad_enabled():
            return checkpoint(run, *prompts, use_reentrant=False)
        return run(*prompts)

    # ---- everything --------------------------------------------------------------------------------------------------

    def decode(
        self,
        raw: Features,
        placements: Sequence[Placement],
        *,
        score_threshold: float = 0.8,
        nms_threshold: float = 0.7,
        detections: int | None = None,
        points_per_side: int | None = None,
        points_per_batch: int = 64,
        stability_score_thresh: float = 0.95,
        stability_score_offset: float = 1.0,
        crop_n_layers: int = 0,
        crop_nms_thresh: float = 0.7,
        crop_overlap_ratio: float = 512 / 1500,
        crop_n_points_downscale_factor: int = 1,
        min_mask_region_area: int = 0,
        use_m2m: bool = False,
        mask_threshold: float = 0.0,
        multimask_output: bool = True,
    ) -> list[Instances]:
        """Segments everything, see `PromptableSystem.decode`.

        Args:
            raw: See there.
            placements: See there.
            score_threshold: See there.
            nms_threshold: See there.
            detections: See there.
            points_per_side: See there.
            points_per_batch: See there.
            stability_score_thresh: See there.
            stability_score_offset: See there.
            crop_n_layers: See there.
            crop_nms_thresh: See there.
            crop_overlap_ratio: See there.
            crop_n_points_downscale_factor: See there.
            min_mask_region_area: Holes and parts of up to this many cells of the low-resolution grid are filled and
                dropped, as in the official generator of SAM 2.
            use_m2m: See there.
            mask_threshold: Pixels with greater logits belong to a mask.
            multimask_output: Use the three masks of each point; otherwise the one for prompts without ambiguity.

        Returns:
            Objects of label 0, best first.
        """
        if crop_n_layers:
            raise UsageError("crop_n_layers needs the image itself, which only predict has; evaluate without it")
        options = self.everything_options(
            score_threshold=score_threshold, nms_threshold=nms_threshold, points_per_side=points_per_side,
            points_per_batch=points_per_batch, stability_score_thresh=stability_score_thresh,
            stability_score_offset=stability_score_offset, crop_nms_thresh=crop_nms_thresh,
            crop_overlap_ratio=crop_overlap_ratio, crop_n_points_downscale_factor=crop_n_points_downscale_factor,
            min_mask_region_area=min_mask_region_area, use_m2m=use_m2m, mask_threshold=mask_threshold,
            multimask_output=multimask_output,
        )  # fmt: skip
        return self.everything(raw, placements, options, detections)

    def everything_options(self, **options: Any) -> Everything:
        given: dict[str, Any] = {"points_per_side": self.points_per_side}
        given |= {name: value for name, value in options.items() if value is not None}
        return Everything(**given, small_regions=given.pop("min_mask_region_area", 0))

    presets: ClassVar[Mapping[str, Preset]] = {
        **{
            f"sam{version}-hiera-{size}": Preset(
                {"backbone": {"name": f"hiera-{size}"}, "version": version},
                tuple(
                    Score(value, "J&F", f"{data}, one mask as prompt", "README of facebookresearch/sam2")
                    for value, data in zip(values, ("SA-V test", "MOSE val", "LVOS v2"), strict=True)
                ),
            )
            for version, rows in PUBLISHED.items()
            for size, values in rows.items()
        },
        "sam2-small": Preset(
            {
                "backbone": {"name": "hiera-tiny", "width": 32, "depths": [1, 2, 3, 1]},
                "decoder": {"width": 64, "hidden": 256},
                "memory": {"width": 16, "layers": 2, "hidden": 256, "dropout": 0.0},
                "resize": {"canvas": [256, 256]},
                "points_per_side": 16,
                "simulation": {"points": 3, "checkpoint": False},
            },
            note="a small network for training on images from random weights",
        ),
    }


@dataclass(frozen=True)
class Everything(Grid):
    """Options of "segment everything"; see `SAM2.decode`. `small_regions` is its `min_mask_region_area`."""

    score_threshold: float = 0.8
    mask_threshold: float = 0.0
    multimask_output: bool = True
    small_regions: int = 0


def without_small_regions(logits: Float[Tensor, "n h w"], most: int) -> Float[Tensor, "n h w"]:
    """Fills holes of at most `most` cells in masks, and removes parts of at most as many, both of the given masks."""
    filled = torch.where(small_components(logits <= 0, most), 10.0, logits)
    return torch.where(small_components(logits > 0, most), -10.0, filled)


def input_planes(
    targets: Sequence[Instances], examples: prompt_training.Examples, size: tuple[int, int]
) -> Float[Tensor, "n h w"]:
    """The masks of the drawn objects on the grid of the input, from their shares of low-resolution cells."""
    wide = functional.interpolate(examples.masks[:, None], size=size, mode="bilinear", align_corners=False)
    return (wide[:, 0] >= 0.5).float()


def answer_losses(
    logits: Float[Tensor, "n k h w"],
    scores: Float[Tensor, "n k"],
    present: Float[Tensor, " n"] | None,
    planes: Float[Tensor, "n h w"],
    ambiguous: Bool[Tensor, " n"],
    rules: PresenceLoss,
) -> Float[Tensor, "4 n"]:
    """Focal loss, dice loss, error of the predicted IoU, and loss of the presence of each object, without weights.

    Args:
        logits: Answers, of which the first is the one for prompts without ambiguity.
        scores: Predicted IoUs.
        present: Logits of the presence; None: it is not trained, and all objects count as present.
        planes: The objects; an empty one is absent, and only its presence is trained.
        ambiguous: Objects of which the best of the answers after the first counts.
        rules: The loss.
    """
    target = planes[:, None].expand_as(logits)
    focal, dice = prompt_training.soft_focal(logits, target), prompt_training.dice_loss(logits, target)
    solid, found = target > 0, logits.detach() > 0
    both, either = (part.flatten(2).sum(2).float() for part in (solid & found, solid | found))
    error = scores.float() - both / either.clamp(min=1)
    error = error.abs() if rules.iou_error == "l1" else error.square()
    cost = (rules.mask * focal + rules.dice * dice).detach()
    best = 1 + cost[:, 1:].argmin(1) if logits.shape[1] > 1 else torch.zeros_like(ambiguous).long()
    rows, chosen = torch.arange(len(best), device=best.device), torch.where(ambiguous, best, 0)
    judged = error[rows, chosen]
    if rules.every_iou and logits.shape[1] > 1:
        judged = torch.where(ambiguous, error[:, 1:].mean(1), judged)
    there = planes.flatten(1).any(1).float() if present is not None else torch.ones_like(judged)
    known = torch.zeros_like(judged)
    if present is not None:
        known = functional.binary_cross_entropy_with_logits(present.float(), there, reduction="none")
        sure = torch.where(there > 0, present.float().sigmoid(), 1 - present.float().sigmoid())
        known = known * (1 - sure) ** rules.gamma
        if rules.alpha is not None:
            known = known * torch.where(there > 0, rules.alpha, 1 - rules.alpha)
    idle = 0 * (logits.sum((1, 2, 3)) + scores.sum(1))  # every answer has a gradient, zero if it does not count
    return torch.stack([focal[rows, chosen] * there + idle, dice[rows, chosen] * there, judged * there, known])
