"""MobileSAM: Faster Segment Anything (Zhang et al., 2023, arXiv 2306.14289).

SAM with a small image encoder, TinyViT, which has learned to reproduce the image embedding of SAM's ViT-H. Prompt
encoder, mask decoder and everything around them are SAM's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from maskwright.blocks.lora import adapt
from maskwright.blocks.prompting import PromptEncoder
from maskwright.blocks.tiny_vit import TinyViT
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
        heads: Attention heads of the last three stages.
        windows: Sides of their windows.
    """

    label: ClassVar[str] = "encoder"

    widths: Sequence[int] = (64, 128, 160, 320)
    depths: Sequence[int] = (2, 2, 6, 2)
    heads: Sequence[int] = (4, 5, 10)
    windows: Sequence[int] = (7, 14, 7)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, count in (("widths", 4), ("depths", 4), ("heads", 3), ("windows", 3)):
            values = getattr(self, name)
            if len(values) != count or min(values) < 1:
                raise UsageError(f"encoder.{name} must be {count} integers of at least 1, got {list(values)}")
        for width, heads in zip(self.widths[1:], self.heads, strict=True):
            if width % heads:
                raise UsageError(f"encoder.widths must be multiples of encoder.heads, got {width} and {heads}")


ENCODER = Encoder()


class MobileSAM(PromptableSystem):
    """MobileSAM; see the docstring of the module."""

    name = "mobile-sam"
    optional_networks = ("image_encoder.lora.",)
    card = Card(
        title="MobileSAM: Faster Segment Anything",
        paper="Zhang, Han, Qiao, Kim, Bae, Lee, Hong: Faster Segment Anything: Towards Lightweight SAM for Mobile "
        "Applications. 2023",
        arxiv="2306.14289",
        code="https://github.com/ChaoningZhang/MobileSAM",
        code_licence="Apache-2.0",
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
        lora: int = 0,
        simulation: Mapping[str, Any] | Simulation = SIMULATION,
    ):
        """
        Args:
            classes: The name of the only class.
            encoder: The image encoder.
            decoder: Prompt encoder and mask decoder.
            in_channels: Channels of the images.
            resize: Size and normalisation of the input, see `SAM`.
            points_per_side: Default of `decode`, see `SAM`.
            lora: Rank of updates of the attention layers of the image encoder, which is otherwise frozen (LoRA); 0:
                none, and the encoder is trained.
            simulation: How prompts are simulated in training.
        """
        super().__init__()
        self.classes = self.checked_classes(classes)
        network, heads = Encoder.read(encoder, ENCODER), PromptDecoder.read(decoder, DECODER)
        self.simulation = Simulation.read(simulation, SIMULATION)
        self.points_per_side = self.checked_points(points_per_side)
        self.preprocess = self.checked_canvas(Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels), 16)
        self.image_encoder = TinyViT(
            network.widths, network.depths, network.heads, network.windows, neck_width=heads.width,
            in_channels=in_channels,
        )  # fmt: skip
        if lora:
            adapt(self.image_encoder, lora)
        self.prompt_encoder = PromptEncoder(heads.width)
        self.mask_decoder = heads.build()

    def input_weight(self) -> str:
        return "image_encoder.stem.0.conv.weight"

    presets: ClassVar[Mapping[str, Preset]] = {
        "mobile-sam-vit-t": Preset(
            {},
            (
                Score(
                    39.4, "mask AP", "COCO val2017, boxes of ViTDet-H (box AP 58.7) as prompts, no refinement",
                    "README of chongzhou96/EdgeSAM",
                ),
            ),
        ),
        "mobile-sam-small": Preset(
            {
                "encoder": {"widths": [32, 48, 64, 96], "depths": [1, 1, 2, 1], "heads": [3, 4, 6]},
                "decoder": {"width": 128, "hidden": 512},
                "resize": {"canvas": [256, 256]},
                "points_per_side": 16,
                "simulation": {"points": 3, "repeats": 1, "checkpoint": False},
            },
            note="for a few hundred images and no GPU",
        ),
    }  # fmt: skip
