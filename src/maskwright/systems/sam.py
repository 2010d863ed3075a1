"""SAM: Segment Anything (Kirillov et al., ICCV 2023, arXiv 2304.02643).

A vision transformer encodes the image once. A prompt (points, a box, a mask) is encoded as a few tokens, and a light
decoder, in which tokens and image attend to each other, answers with masks and a prediction of their quality: one mask,
or three for an ambiguous prompt (whole, part and sub-part). Objects have no class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from maskwright.blocks.layers import Norm
from maskwright.blocks.lora import adapt
from maskwright.blocks.prompting import PromptEncoder
from maskwright.blocks.vitdet import ConvViTDet, ViTDet
from maskwright.errors import UsageError
from maskwright.options import OptionGroup
from maskwright.structures import Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.kinds.prompt_training import Simulation
from maskwright.systems.kinds.promptable import PromptableSystem, PromptDecoder

RESIZE = Resize()
SIMULATION = Simulation()
DECODER = PromptDecoder()
PREPROCESS = Preprocess(
    resample="pillow", fit="inside", canvas=(1024, 1024), multiple=1024, mean=(123.675, 116.28, 103.53),
    std=(58.395, 57.12, 57.375), divide=1.0,
)  # fmt: skip


@dataclass(frozen=True)
class Encoder(OptionGroup):
    """The image encoder, as options of the system.

    Attributes:
        width: Channels.
        depth: Number of blocks.
        heads: Attention heads.
        hidden: Channels inside of an MLP; None: four times `width`.
        window: Side of the windows of attention, in patches.
        everywhere: Numbers of the blocks that attend everywhere.
        patch: Side of a patch in pixels.
        table: Patches along a side of the tables of positions, which are resampled for inputs of other sizes.
        stem: Channels at 1/2, 1/4 and 1/8 of the resolution of convolutions in place of the patch embedding, whose maps
            the decoder receives too (not published); None for none.
        norm: Normalisation of these convolutions.
        checkpoint: Compute the blocks again for the gradients, so that training needs less memory.
    """

    label: ClassVar[str] = "encoder"

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int | None = None
    window: int = 14
    everywhere: Sequence[int] = (2, 5, 8, 11)
    patch: int = 16
    table: int = 64
    stem: Sequence[int] | None = None
    norm: Norm = "batch"
    checkpoint: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "width", "depth", "heads", "window", "patch", "table")
        if self.width % self.heads:
            raise UsageError(f"encoder.width must be a multiple of encoder.heads = {self.heads}, got {self.width}")
        if self.stem is not None and (len(self.stem) != 3 or min(self.stem) < 1 or self.patch != 16):
            raise UsageError(f"encoder.stem must be 3 widths, with patch = 16, got {list(self.stem)}")

    def build(self, in_channels: int, decoder: PromptDecoder) -> nn.Module:
        """Constructs the image encoder."""
        options: dict[str, Any] = {
            "window": self.window, "everywhere": self.everywhere, "patch": self.patch, "side": self.table,
            "neck_width": decoder.width, "hidden": self.hidden, "in_channels": in_channels,
            "checkpointing": self.checkpoint,
        }  # fmt: skip
        if self.stem is None:
            return ViTDet(self.width, self.depth, self.heads, **options)
        return ConvViTDet(
            self.width, self.depth, self.heads, stem=self.stem, finer=decoder.upscaled, norm=self.norm, **options
        )


ENCODER = Encoder()


class SAM(PromptableSystem):
    """Segment Anything; see the docstring of the module."""

    name = "sam"
    optional_networks = ("image_encoder.lora.",)
    card = Card(
        title="Segment Anything",
        paper="Kirillov, Mintun, Ravi, Mao, Rolland, Gustafson, Xiao, Whitehead, Berg, Lo, Dollár, Girshick: Segment "
        "Anything. ICCV 2023",
        arxiv="2304.02643",
        code="https://github.com/facebookresearch/segment-anything",
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
        drawn: bool = False,
        simulation: Mapping[str, Any] | Simulation = SIMULATION,
    ):
        """
        Args:
            classes: The name of the only class.
            encoder: The image encoder.
            decoder: Prompt encoder and mask decoder.
            in_channels: Channels of the images.
            resize: Size and normalisation of the input: images are resized to fit into a square `canvas`, 1024 x 1024
                as published, and padded. With others the tables of positions are resampled, which is not the published
                protocol.
            points_per_side: Default of `decode`: the grid of "segment everything" has the square of this many points.
            lora: Rank of updates of the attention layers of the image encoder, which is otherwise frozen (LoRA); 0:
                none, and the encoder is trained.
            drawn: Whether points and boxes are given to the decoder as masks too, which it learns from much faster when
                it has random weights (not published).
            simulation: How prompts are simulated in training.
        """
        super().__init__()
        self.classes = self.checked_classes(classes)
        network, heads = Encoder.read(encoder, ENCODER), PromptDecoder.read(decoder, DECODER)
        if heads.refine and not drawn:
            raise UsageError("sam: decoder.refine reads prompts that are drawn as masks; give drawn=True too")
        self.simulation = Simulation.read(simulation, SIMULATION)
        self.points_per_side, self.draws = self.checked_points(points_per_side), drawn
        self.preprocess = self.checked_canvas(Resize.read(resize, RESIZE).apply(PREPROCESS, in_channels), network.patch)
        self.image_encoder = network.build(in_channels, heads)
        if lora:
            adapt(self.image_encoder, lora)
        self.prompt_encoder = PromptEncoder(heads.width)
        if self.prompt_encoder.no_mask is not None:
            self.prompt_encoder.no_mask.requires_grad_(not drawn)  # every prompt has a mask if it is drawn
        self.mask_decoder = heads.build(finer=network.stem is not None)

    def input_weight(self) -> str:
        return (
            "image_encoder.quarter.0.conv.weight" if self.options["encoder"]["stem"] else "image_encoder.patches.weight"
        )

    presets: ClassVar[Mapping[str, Preset]] = {
        "sam-vit-b": Preset({}),
        "sam-vit-l": Preset({"encoder": {"width": 1024, "depth": 24, "heads": 16, "everywhere": [5, 11, 17, 23]}}),
        "sam-vit-h": Preset(
            {"encoder": {"width": 1280, "depth": 32, "heads": 16, "everywhere": [7, 15, 23, 31]}},
            (
                Score(46.5, "mask AP", "COCO val2017, boxes of ViTDet-H (mask AP 51.0) as prompts", "arXiv 2304.02643"),
                Score(44.7, "mask AP", "LVIS v1, boxes of ViTDet-H (mask AP 46.6) as prompts", "arXiv 2304.02643"),
            ),
        ),
        "sam-small": Preset(
            {
                "encoder": {
                    "width": 192,
                    "depth": 4,
                    "heads": 6,
                    "window": 8,
                    "everywhere": [1, 3],
                    "table": 24,
                    "stem": [24, 48, 96],
                    "norm": "group",
                },
                "decoder": {"width": 128, "hidden": 512, "refine": 2},
                "resize": {"canvas": [384, 384]},
                "points_per_side": 16,
                "drawn": True,
                "simulation": {
                    "points": 3,
                    "repeats": 1,
                    "noise": 0.05,
                    "weights": [1, 1, 1],
                    "local": True,
                    "checkpoint": False,
                },
            },
            note="3.3 million parameters; convolutions before and behind the transformers, to learn from little",
        ),
    }
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
