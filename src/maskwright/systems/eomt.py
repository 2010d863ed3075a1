"""EoMT: the vision transformer is the segmenter.

Tommie Kerssies, Niccolo Cavagnero, Alexander Hermans, Narges Norouzi, Giuseppe Averta, Bastian Leibe, Gijs Dubbelman,
Daan de Geus: "Your ViT is Secretly an Image Segmentation Model", CVPR 2025, arXiv 2503.19108. The original code is
tue-mps/eomt.

Learned queries are prepended to the tokens of a plain, pre-trained ViT before its last few blocks. These blocks replace
the pixel decoder and the transformer decoder of earlier systems: a query's output token gives a class and, multiplied
with the upscaled patch tokens, a mask. During training a query attends only to the inside of the mask that it predicts
at that point; this restriction is annealed away block by block, so that the final network is a plain ViT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.backbones import Backbone, BackboneLike, Use
from maskwright.blocks.layers import LayerNorm2d
from maskwright.blocks.vit import ViT
from maskwright.errors import UsageError
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import Pairs, assign
from maskwright.structures import Instances, Preprocess
from maskwright.structures.resize import Resize, ResizeLike
from maskwright.systems.card import Card, Preset, Score
from maskwright.systems.kinds.queries import PointLoss, QuerySystem
from maskwright.systems.system import ClassRows, at_least

LAST_BLOCKS = {12: 3, 24: 4, 40: 5}  # depth -> number of blocks that the queries pass through, as published
PUBLISHED = Preprocess(resample="pillow", fit="letterbox", corner=True, canvas=(640, 640))

BACKBONE = Backbone("vit_small_patch14_reg4_dinov2")
RESIZE = Resize()
LOSS = PointLoss()


@dataclass(frozen=True)
class Raw:
    """Predictions before each of the last blocks and after them; in evaluation only those after them.

    Attributes:
        classes: Class logits of each prediction, "no object" last.
        embeddings: Mask embeddings of each prediction.
        features: Features of the pixels of each prediction, at stride 4 for patches of 16 pixels.
        size: Height and width of the network's input, padding included.
    """

    classes: Float[Tensor, "l b n k1"]
    embeddings: Float[Tensor, "l b n c"]
    features: Float[Tensor, "l b c h w"]
    size: tuple[int, int]

    def masks(self, layer: int = -1) -> Float[Tensor, "b n h w"]:
        """Mask logits of all queries in one prediction."""
        return torch.einsum("bnc,bchw->bnhw", self.embeddings[layer], self.features[layer])

    def masks_of(self, image: int, queries: Int[Tensor, " r"]) -> Float[Tensor, "r h w"]:
        """Mask logits of some queries of one image in the last prediction, in float32."""
        return learning.mask_logits(self.embeddings[-1, image][queries], self.features[-1, image])


# ---- network ---------------------------------------------------------------------------------------------------------


class ScaleBlock(nn.Module):
    """Doubles the resolution: transposed 2 x 2 convolution, GELU, depthwise 3 x 3 convolution, norm."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = LayerNorm2d(width)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.norm(self.depthwise(functional.gelu(self.up(x))))


class EoMTNetwork(nn.Module):
    """A ViT with queries among the tokens of its last blocks (section 3.2).

    Attributes:
        mask_probability: For each of the last blocks, the probability that a query attends only to the inside of its
            mask in training: 1 at first, 0 in the end. A buffer, so that a checkpoint keeps the state of the annealing.
    """

    mask_probability: Tensor

    def __init__(self, backbone: ViT, classes: int, queries: int, last_blocks: int, *, masked: bool):
        super().__init__()
        width = backbone.width
        self.first, self.masked = len(backbone) - last_blocks, masked
        self.backbone = backbone
        self.backbone.add_prefix(self.first, queries)
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.class_head = nn.Linear(width, classes + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(width, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width)
        )
        doublings = max(1, int(math.log2(backbone.patch)) - 2)  # to stride 4
        self.upscale = nn.Sequential(*(ScaleBlock(width) for _ in range(doublings)))
        self.register_buffer("mask_probability", torch.ones(last_blocks))

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        vit, predictions = self.backbone, []
        tokens, grid, rotation = vit.begin(images)
        for number in range(self.first):
            tokens = vit.block(number, tokens, rotation)
        tokens = torch.cat([self.queries.expand(tokens.shape[0], -1, -1), tokens], 1)  # (B, N + prefix + patches, D)
        for number in range(self.first, len(vit)):
            allowed = None
            if self.training and self.masked:
                predictions.append(self._predict(tokens, grid))
                _, embeddings, features = predictions[-1]
                allowed = self.allowed(embeddings, features, grid, self.mask_probability[number - self.first])
            tokens = vit.block(number, tokens, rotation, allowed)
        predictions.append(self._predict(tokens, grid))
        classes, embeddings, features = (torch.stack(parts) for parts in zip(*predictions, strict=True))
        return Raw(classes, embeddings, features, (images.shape[2], images.shape[3]))

    def _predict(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits (B, N, K + 1), mask embeddings (B, N, D) and pixel features (B, D, H/4, W/4)."""
        tokens = self.backbone.norm(tokens)
        count = len(self.queries)
        queries, patches = tokens[:, :count], tokens[:, count + self.backbone.prefix :]
        return self.class_head(queries), self.mask_head(queries), self.upscale(patches.mT.unflatten(2, grid))

    @torch.no_grad()
    def allowed(
        self,
        embeddings: Float[Tensor, "b n c"],
        features: Float[Tensor, "b c h w"],
        grid: tuple[int, int],
        probability: Float[Tensor, ""],
    ) -> Bool[Tensor, "b 1 t t"]:
        """Masked attention: with `probability` a query attends only to the patches inside its mask.

        A query with an empty mask still attends to the queries and the prefix, so that every row has a key.

        Args:
            embeddings: Mask embeddings of the queries.
            features: Features of the pixels.
            grid: Rows and columns of patches.
            probability: Between 0 and 1.

        Returns:
            True where a token (row) may attend to a token (column); queries come first, then prefix, then patches.
        """
        # Resizing is linear: masks of resized features are resized masks, at a fraction of the work.
        small = functional.interpolate(features, grid, mode="bilinear", align_corners=False).flatten(2)
        inside = embeddings @ small > 0
        batch, count, patches = inside.shape
        free = torch.rand(batch, count, device=inside.device) > probability
        before = count + self.backbone.prefix
        allowed = torch.ones(batch, before + patches, before + patches, dtype=torch.bool, device=inside.device)
        allowed[:, :count, before:] = inside | free[..., None]
        return allowed[:, None]


# ---- system ----------------------------------------------------------------------------------------------------------


class EoMT(QuerySystem):
    """Encoder-only mask transformer; see the module."""

    name = "eomt"
    card = Card(
        title="EoMT: Your ViT is Secretly an Image Segmentation Model",
        paper="Kerssies, Cavagnero, Hermans, Norouzi, Averta, Leibe, Dubbelman, de Geus; CVPR 2025",
        arxiv="2503.19108",
        code="https://github.com/tue-mps/eomt",
        code_licence="MIT",
    )

    def __init__(
        self,
        classes: Sequence[str] = ("object",),
        *,
        stuff: Sequence[str] = (),
        backbone: BackboneLike = BACKBONE,
        in_channels: int = 3,
        resize: ResizeLike = RESIZE,
        patch: int = 16,
        table: int | None = None,
        queries: int = 200,
        last_blocks: int | None = None,
        masked: bool = True,
        loss: Mapping[str, Any] | PointLoss = LOSS,
    ):
        """
        Args:
            classes: Class names; label k is `classes[k]`.
            stuff: Those of `classes` that are regions instead of countable objects; none for instance segmentation.
            backbone: A plain ViT of timm: DINOv2 with registers, or DINOv3 ("vit_base_patch16_dinov3_qkvb"). `width`,
                `depth` and `heads` make a smaller one, to be trained from random weights; `pretrained` weights are
                resampled to the patch size and the input size.
            in_channels: Channels of the images.
            resize: Size and normalisation of the input: images are resized to fit into `canvas`, 640 x 640 as
                published, at its upper left corner.
            patch: Side of a patch in pixels.
            table: Patches along a side of the table of positions; None: as many as fit into the longer side of the
                canvas. The table is interpolated for inputs of another size.
            queries: Number of queries.
            last_blocks: Number of blocks that the queries pass through; None: as published for the depth (12: 3, 24: 4,
                40: 5).
            masked: In training queries attend only to the inside of their masks; annealed away (section 3.3).
            loss: Weights of the terms and of the matching costs, and the points where masks are compared.
        """
        super().__init__()
        at_least("eomt", 1, patch=patch, queries=queries)
        if table is not None:
            at_least("eomt", 1, table=table)
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.loss = PointLoss.read(loss, LOSS)
        self.preprocess = Resize.read(resize, RESIZE).apply(replace(PUBLISHED, multiple=patch), in_channels)
        canvas = self.preprocess.canvas
        assert canvas is not None
        if min(canvas) < patch:
            raise UsageError(f"eomt: resize.canvas must hold at least one patch of {patch} pixels, got {list(canvas)}")
        if self.preprocess.multiple % patch:
            raise UsageError(
                f"eomt: resize.multiple must be a multiple of patch, that is of {patch}, got {self.preprocess.multiple}"
            )
        spec = Backbone.read(backbone, BACKBONE)
        side = patch * (table or max(canvas) // patch)
        vit = spec.build(in_channels, Use(size=side, patch=patch))
        if not isinstance(vit, ViT):
            raise UsageError(f"eomt: backbone must be a plain vision transformer (vit_...), got {spec.name!r}")
        count = LAST_BLOCKS.get(len(vit), 3) if last_blocks is None else last_blocks
        if not 1 <= count <= len(vit):
            raise UsageError(
                f"eomt: last_blocks must be in [1, {len(vit)}], the number of blocks of {spec.name}, got {count}"
            )
        self.dense = EoMTNetwork(vit, len(self.classes), queries, count, masked=masked)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        return self.dense(images)

    def on_progress(self, done: float) -> None:
        """Anneals the masked attention: the probability of each block falls from 1 to 0 over its own interval of the
        run, the first block first (in the published runs, with four blocks, from 1/6 to 5/6 of the run).

        Args:
            done: Completed share of the run, 0 ... 1.
        """
        probability = self.dense.mask_probability
        count = len(probability)
        starts = torch.arange(1, count + 1, dtype=torch.float64) / (count + 2)
        part = ((done - starts) * (count + 2)).clamp(0, 1)
        probability.copy_((1 - part) ** 0.9)

    # ---- losses ------------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """Computes Mask2Former's losses: `class`, `mask` (binary cross entropy) and `dice` of the last prediction, and
        `class_0`, ... of the earlier ones. Each prediction is matched separately.

        Args:
            raw: What `forward` returned.
            targets: Objects in the frame of the input; padding is background. Crowd regions are ignored.

        Returns:
            The weighted terms. Random points are drawn by torch's generator in the order of the published code,
            prediction by prediction.
        """
        device = raw.features.device
        with torch.autocast(device.type, enabled=False):
            objects = [learning.Objects.from_instances(t, device) for t in targets]
            count = learning.object_count(objects, device)
            found = [self.prediction_losses(raw, layer, objects, count)[0] for layer in range(len(raw.classes))]
            idle = (raw.features.float().sum() + raw.embeddings.float().sum()) * 0
            terms = torch.stack(found, 1)  # (3, L)
            return learning.name_terms(dict(zip(("class", "mask", "dice"), terms, strict=True)), idle)

    def prediction_losses(
        self, raw: Raw, layer: int, objects: Sequence[learning.Objects], count: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, " terms"], list[Pairs]]:
        """Computes the losses of one prediction.

        Args:
            raw: What `forward` returned.
            layer: Which prediction.
            objects: The objects of each image.
            count: Divisor of the mask losses.

        Returns:
            The weighted terms class, mask and dice, and the matched queries and objects of each image.
        """
        classes, queries, features = raw.classes[layer, None], raw.embeddings[layer, None], raw.features[layer]
        matched = sum(min(raw.classes.shape[2], len(own)) for own in objects)
        weights, sampling = self.loss.weights, self.loss.sampling
        points = learning.draw_matching_points(1, len(objects), matched, sampling, features.device)
        probabilities = classes.float().softmax(-1)
        costs = learning.point_costs(probabilities, queries, features, objects, points, raw.size, weights)
        pairs = assign(costs)
        mask, dice = learning.point_losses(queries, features, objects, pairs, raw.size, sampling)
        kinds = learning.class_losses(classes, objects, pairs, self.loss.no_object)
        terms = torch.cat([kinds, mask / count, dice / count])
        return terms * terms.new_tensor(weights), pairs

    # ---- for loading and training ------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        net = self.dense
        heads = [net.class_head, net.mask_head, net.upscale, nn.ParameterDict({"queries": net.queries})]
        return {"backbone": [net.backbone], "heads": heads}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"dense.class_head.{kind}": ClassRows(background_last=True) for kind in ("weight", "bias")}

    renamed_options: ClassVar[Mapping[str, str | None]] = {
        **{name: f"backbone.{name}" for name in ("width", "depth", "heads")},
        "size": "resize.canvas",
        "points": "loss.points",
        "no_object": "loss.no_object",
    }
    renamed_parameters: ClassVar[Mapping[str, str]] = {
        part: f"dense.{part}"
        for part in ("backbone.", "queries", "class_head.", "mask_head.", "upscale.", "mask_probability")
    }

    @classmethod
    def upgraded(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        options = dict(options)
        size = options.pop("size", None)  # one side of the square input
        if size is not None:
            options["canvas"] = [size, size]
        return super().upgraded(options)

    presets: ClassVar[Mapping[str, Preset]] = {
        **{
            f"eomt-{letter}-{task}-{size}": Preset(
                {"backbone": f"vit_{name}_patch14_reg4_dinov2", "resize": {"canvas": [size, size]}},
                (Score(value, measure, f"COCO val2017, fitted into {size} x {size}", source),),
                "classes and stuff are those of the data" if task == "panoptic" else "",
                "panoptic" if task == "panoptic" else "instances",
            )
            for source in ("model zoo of tue-mps/eomt",)
            for letter, name, task, size, value, measure in (
                ("l", "large", "instance", 640, 45.2, "mask AP"),
                ("l", "large", "instance", 1280, 48.8, "mask AP"),
                ("s", "small", "panoptic", 640, 46.7, "PQ"),
                ("b", "base", "panoptic", 640, 51.6, "PQ"),
                ("l", "large", "panoptic", 640, 56.0, "PQ"),
                ("l", "large", "panoptic", 1280, 58.3, "PQ"),
                ("g", "giant", "panoptic", 640, 57.0, "PQ"),
                ("g", "giant", "panoptic", 1280, 59.2, "PQ"),
            )
        },
        **{
            f"eomt-{letter}-dinov3-{task}-{size}": Preset(
                {"backbone": f"vit_{name}_patch16_dinov3_qkvb", "resize": {"canvas": [size, size]}},
                (Score(value, measure, f"COCO val2017, fitted into {size} x {size}", source),),
                task="panoptic" if task == "panoptic" else "instances",
            )
            for source in ("model zoo of tue-mps/eomt",)
            for letter, name, task, size, value, measure in (
                ("l", "large", "instance", 640, 45.9, "mask AP"),
                ("l", "large", "instance", 1280, 49.9, "mask AP"),
                ("s", "small", "panoptic", 640, 47.2, "PQ"),
                ("b", "base", "panoptic", 640, 53.1, "PQ"),
                ("l", "large", "panoptic", 640, 56.8, "PQ"),
                ("l", "large", "panoptic", 1280, 58.9, "PQ"),
            )
        },
        "eomt-small": Preset(
            {
                "backbone": {"name": "vit_small_patch14_reg4_dinov2", "width": 192, "depth": 6, "heads": 3},
                "resize": {"canvas": [320, 320]}, "queries": 50, "last_blocks": 2, "loss": {"points": 2048},
            },
            note="for a few hundred images and no GPU; trains from random weights, slowly as transformers do: a "
            "published backbone (pretrained, without width, depth and heads) needs far fewer steps",
        ),
    }  # fmt: skip
    # The published schedule also warms the queries and heads up for 500 steps, then the backbone for 1000 more. The
    # learning rate of each block of the backbone is 0.8 times that of the block after it.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"eomt-{letter}-{size}": {
            "epochs": epochs, "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05, "decay_norms": True,
            "decay_biases": True, "clip": 0.01, "schedule": "poly", "power": 0.9, "warmup": 500, "amp": "bf16",
            "rates": {
                "dense.backbone.body.patch_embed.*": 0.8**depth, "dense.backbone.body.*_*": 0.8**depth,
                **{f"dense.backbone.body.blocks.{i}.*": 0.8 ** (depth - 1 - i) for i in range(depth)},
            },
            "augment": {"flip": 0.5, "jitter": (0.1, 2.0), "size": (size, size)},
        }
        for letter, depth, epochs in (("s", 12, 24), ("b", 12, 24), ("l", 24, 12), ("g", 40, 12))
        for size in ((640,) if letter in "sb" else (640, 1280))
    }  # fmt: skip
