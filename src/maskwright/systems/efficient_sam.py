"""EfficientSAM: Leveraged Masked Image Pretraining for Efficient Segment Anything (Xiong et al., CVPR 2024, arXiv
2312.00863).

SAM with a plain, small vision transformer, pretrained to reconstruct the features of SAM's encoder from masked images.
Unlike in SAM, images are resized to a square, a prompt always has six slots, masks cannot be prompts, points outside
of an object have no vector of their own, and mask logits are resized to the image at once, by cubic interpolation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Int
from torch import Tensor

from maskwright.blocks.lora import adapt
from maskwright.blocks.prompting import PromptEncoder
from maskwright.blocks.vitdet import ViTDet
from maskwright.errors import UsageError
from maskwright.options import OptionGroup
from maskwright.structures import Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset
from maskwright.systems.kinds.prompt_training import Simulation
from maskwright.systems.kinds.promptable import PromptableSystem, PromptDecoder

RESIZE = Resize()
SIMULATION = Simulation()
DECODER = PromptDecoder()
PREPROCESS = Preprocess(resample="tensor", fit="stretch", canvas=(1024, 1024), multiple=16)
SLOTS = 6  # of points and corners of each prompt


@dataclass(frozen=True)
class Encoder(OptionGroup):
    """The image encoder, as options of the system.

    Attributes:
        width: Channels.
        depth: Number of blocks.
        heads: Attention heads.
        patch: Side of a patch in pixels.
        table: Patches along a side of the table of positions, which is resampled.
    """

    label: ClassVar[str] = "encoder"

    width: int = 192
    depth: int = 12
    heads: int = 3
    patch: int = 16
    table: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_at_least(1, "width", "depth", "heads", "patch", "table")
        if self.width % self.heads:
            raise UsageError(f"encoder.width must be a multiple of encoder.heads = {self.heads}, got {self.width}")


ENCODER = Encoder()


class EfficientSAM(PromptableSystem):
    """EfficientSAM; see the docstring of the module."""

    name = "efficient-sam"
    optional_networks = ("image_encoder.lora.",)
    steps: ClassVar[Literal[1, 2]] = 1
    cubic: ClassVar[bool] = True
    most_padding: ClassVar[int] = SLOTS
    reads_masks: ClassVar[bool] = False
    card = Card(
        title="EfficientSAM",
        paper="Xiong, Varadarajan, Wu, Xiang, Xiao, Zhu, Dai, Wang, Sun, Iandola, Krishnamoorthi, Chandra: "
        "EfficientSAM: Leveraged Masked Image Pretraining for Efficient Segment Anything. CVPR 2024",
        arxiv="2312.00863",
        code="https://github.com/yformer/EfficientSAM",
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
            resize: Size and normalisation of the input: images are resized to `canvas`, 1024 x 1024 as published.
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
        preprocess = replace(PREPROCESS, multiple=network.patch)
        self.preprocess = self.checked_canvas(Resize.read(resize, RESIZE).apply(preprocess, in_channels), network.patch)
        self.image_encoder = ViTDet(
            network.width, network.depth, network.heads, everywhere=range(network.depth), patch=network.patch,
            side=network.table, neck_width=heads.width, in_channels=in_channels, relative=False,
        )  # fmt: skip
        if lora:
            adapt(self.image_encoder, lora)
        self.prompt_encoder = PromptEncoder(heads.width, 0, background=False, placed=True)
        self.mask_decoder = heads.build(activation="gelu", keeps=True, norm="group")

    def input_weight(self) -> str:
        return "image_encoder.patches.weight"

    def padding(self, counts: Int[Tensor, " n"], boxed: Bool[Tensor, " n"]) -> Int[Tensor, " n"]:
        """The number of "not a point" tokens of each prompt: those that fill six slots.

        The original cuts longer prompts to six slots; here they are longer.
        """
        return (SLOTS - counts - 2 * boxed).clamp(min=0)

    presets: ClassVar[Mapping[str, Preset]] = {
        "efficient-sam-vit-t": Preset({}),
        "efficient-sam-vit-s": Preset({"encoder": {"width": 384, "heads": 6}}),
        "efficient-sam-small": Preset(
            {
                "encoder": {"width": 192, "depth": 6, "heads": 3, "table": 16},
                "decoder": {"width": 128, "hidden": 512},
                "resize": {"canvas": [256, 256]},
                "points_per_side": 16,
                "simulation": {"points": 3, "repeats": 1, "checkpoint": False},
            },
            note="for trials; a plain transformer learns slowly from random weights",
        ),
    }
