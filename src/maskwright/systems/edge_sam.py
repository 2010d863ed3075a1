"""EdgeSAM: Prompt-In-the-Loop Distillation for On-Device Deployment of SAM (Zhou et al., 2023, arXiv 2312.06660).

SAM with a convolutional image encoder, RepViT, distilled from SAM together with simulated prompts. Prompt encoder, mask
decoder and everything around them are SAM's. The licence of the authors' code and weights is non-commercial.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from maskwright.blocks.prompting import PromptEncoder
from maskwright.blocks.repvit import RepViT
from maskwright.errors import UsageError
from maskwright.options import OptionGroup
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.kinds.prompt_training import Simulation
from maskwright.systems.kinds.promptable import PromptableSystem, PromptDecoder
from maskwright.systems.sam import PREPROCESS

RESIZE = Resize()
SIMULATION = Simulation()
DECODER = PromptDecoder()


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
            simulation: How prompts are simulated in training.
        """
        super().__init__()
        self.classes = self.checked_classes(classes)
        network, heads = Encoder.read(encoder, ENCODER), PromptDecoder.read(decoder, DECODER)
        self.simulation = Simulation.read(simulation, SIMULATION)
        self.points_per_side = self.checked_points(points_per_side)
        self.preprocess = self.checked_canvas(Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels), 32)
        self.image_encoder = RepViT(network.widths, network.depths, neck_width=heads.width, in_channels=in_channels)
        self.prompt_encoder = PromptEncoder(heads.width)
        self.mask_decoder = heads.build()

    def input_weight(self) -> str:
        return "image_encoder.stem.0.conv.weight"

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
