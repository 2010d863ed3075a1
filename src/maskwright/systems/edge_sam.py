"""EdgeSAM: Prompt-In-the-Loop Distillation for On-Device Deployment of SAM (Zhou et al., 2023, arXiv 2312.06660).

SAM with a convolutional image encoder, RepViT, distilled from SAM together with simulated prompts. Prompt encoder, mask
decoder and almost everything around them are SAM's. Because the predicted IoU is distilled too, the stability of the
mask logits can take its place as the score; in "segment everything" it always does. The licence of the authors' code
and weights is non-commercial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor

from maskwright.blocks.prompting import Decoded, PromptEncoder
from maskwright.blocks.repvit import RepViT
from maskwright.errors import UsageError
from maskwright.options import OptionGroup
from maskwright.structures import Placement
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.kinds.everything import Grid
from maskwright.systems.kinds.prompt_training import Simulation
from maskwright.systems.kinds.promptable import Answers, Features, PromptableSystem, PromptDecoder
from maskwright.systems.sam import PREPROCESS

RESIZE = Resize()
SIMULATION = Simulation()
DECODER = PromptDecoder()
MARGIN = 1.0  # of the logits, in the stability of a mask


@dataclass(frozen=True)
class Encoder(OptionGroup):
    """The image encoder, as options of the system.

    Attributes:
        widths: Channels of the four stages.
        depths: Blocks of the stages.
    """

    label: ClassVar[str] = "encoder"

    widths: Sequence[int] = (48, 96, 192, 384)
    depths: Sequence[int] = (3, 4, 16, 3)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("widths", "depths"):
            values = getattr(self, name)
            if len(values) != 4 or min(values) < 2:
                raise UsageError(f"encoder.{name} must be 4 integers of at least 2, got {list(values)}")


ENCODER = Encoder()


class EdgeSAM(PromptableSystem):
    """EdgeSAM; see the docstring of the module."""

    name = "edge-sam"
    card = Card(
        title="EdgeSAM",
        paper="Zhou, Li, Loy, Dai: EdgeSAM: Prompt-In-the-Loop Distillation for On-Device Deployment of SAM. 2023",
        arxiv="2312.06660",
        code="https://github.com/chongzhou96/EdgeSAM",
        code_licence="S-Lab License 1.0 (non-commercial)",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        encoder: Mapping[str, Any] | Encoder = ENCODER,
        decoder: Mapping[str, Any] | PromptDecoder = DECODER,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        points_per_side: int = 32,
        ranking: Literal["iou", "stability"] = "iou",
        simulation: Mapping[str, Any] | Simulation = SIMULATION,
    ):
        """
        Args:
            classes: The name of the only class.
            encoder: The image encoder.
            decoder: Prompt encoder and mask decoder.
            in_channels: Channels of the images.
            resize: Size and normalisation of the input, see `SAM`; its sides must be multiples of 32.
            points_per_side: Default of `decode`, see `SAM`.
            ranking: The score of the answers to prompts: "iou" as predicted, or "stability" of the mask logits (the
                option `use_stability_score` of the original).
            simulation: How prompts are simulated in training.
        """
        super().__init__()
        self.classes = self.checked_classes(classes)
        network, heads = Encoder.read(encoder, ENCODER), PromptDecoder.read(decoder, DECODER)
        self.simulation = Simulation.read(simulation, SIMULATION)
        self.points_per_side, self.ranking = self.checked_points(points_per_side), ranking
        self.preprocess = self.checked_canvas(Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels), 32)
        self.image_encoder = RepViT(network.widths, network.depths, neck_width=heads.width, in_channels=in_channels)
        self.prompt_encoder = PromptEncoder(heads.width)
        self.mask_decoder = heads.build()

    def input_weight(self) -> str:
        return "image_encoder.stem.0.conv.weight"

    def choose(self, decoded: Decoded, ambiguous: Bool[Tensor, " n"], answers: Answers | None) -> Decoded:
        if self.ranking == "stability":
            decoded = replace(decoded, scores=stability(decoded.logits))
        return super().choose(decoded, ambiguous, answers)

    def answers_to_points(
        self, features: Features, placement: Placement, points: Float[Tensor, "n 2"], options: Grid
    ) -> tuple[Float[Tensor, "k h w"], Float[Tensor, " k"], Int[Tensor, " k"]]:
        logits, _, owner = super().answers_to_points(features, placement, points, options)
        return logits, stability(logits), owner  # the original's generator ranks by stability whatever is chosen

    presets: ClassVar[Mapping[str, Preset]] = {
        "edge-sam-m1": Preset(
            {},
            (
                Score(
                    42.2, "mask AP", "COCO val2017, boxes of ViTDet-H (box AP 58.7) as prompts, no refinement",
                    "README of chongzhou96/EdgeSAM",
                ),
            ),
            note="42.7 with three times the data (EdgeSAM-3x), 43.0 with ten times",
        ),
        "edge-sam-small": Preset(
            {
                "encoder": {"widths": [24, 48, 96, 128], "depths": [2, 2, 4, 2]},
                "decoder": {"width": 128, "hidden": 512},
                "resize": {"canvas": [256, 256]},
                "points_per_side": 16,
                "simulation": {"points": 3, "repeats": 1, "checkpoint": False},
            },
            note="for a few hundred images and no GPU",
        ),
    }  # fmt: skip


def stability(logits: Float[Tensor, "*n h w"]) -> Float[Tensor, "*n"]:
    """The ratio of the areas of masks at the thresholds 1 and -1, on the low-resolution grid; 0 for empty masks."""
    inner, outer = ((logits > cut).flatten(-2).sum(-1).float() for cut in (MARGIN, -MARGIN))
    return inner / outer.clamp(min=1)
