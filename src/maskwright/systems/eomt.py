"""EoMT: the vision transformer is the segmenter.

Tommie Kerssies, Niccolo Cavagnero, Alexander Hermans, Narges Norouzi, Giuseppe Averta, Bastian Leibe, Gijs Dubbelman,
Daan de Geus: "Your ViT is Secretly an Image Segmentation Model", CVPR 2025, arXiv 2503.19108. The original code is
tue-mps/eomt.

Learned queries are put before the tokens of a plain, pre-trained ViT ahead of its last few blocks, and these blocks do
what a pixel decoder and a transformer decoder did before: what comes out of a query is a class and, multiplied with the
upscaled patches, a mask. While training, a query looks only where its mask of the moment is; that restriction is
annealed away block by block, so that what remains in the end is a ViT and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.trunk import normalization_for
from maskwright.blocks.vit import ViT
from maskwright.errors import UsageError
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import Pairs, assign
from maskwright.structures import Instances, Preprocess
from maskwright.systems.base import Card, ClassRows, Preset, QuerySystem, Score, at_least

WEIGHTS = (2.0, 5.0, 5.0)  # class, binary cross entropy, dice: of the losses and of the costs of matching
LAST_BLOCKS = {12: 3, 24: 4, 40: 5}  # depth -> blocks that the queries pass, as published


@dataclass(frozen=True)
class Raw:
    """What the queries say before each of the last blocks and after them; outside training only the latter."""

    classes: Float[Tensor, "l b n k1"]  # logits, "no object" last
    embeddings: Float[Tensor, "l b n c"]
    features: Float[Tensor, "l b c h w"]  # stride 4; other ones for each prediction
    size: tuple[int, int]  # H, W of the input, padding included

    def masks(self, layer: int = -1) -> Float[Tensor, "b n h w"]:
        """Logits of all masks of one prediction."""
        return torch.einsum("bnc,bchw->bnhw", self.embeddings[layer], self.features[layer])

    def masks_of(self, image: int) -> Callable[[Tensor], Tensor]:
        """What gives the logits (R, h, w) of the last masks of some queries of an image."""
        embeddings, features = self.embeddings[-1, image], self.features[-1, image]
        return lambda rows: torch.einsum("nc,chw->nhw", embeddings[rows].float(), features.float())


class LayerNorm2d(nn.LayerNorm):
    """Over the channels of a map."""

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ScaleBlock(nn.Module):
    """Twice the resolution: a transposed 2 x 2 convolution, GELU, a depthwise 3 x 3, and a norm."""

    def __init__(self, width: int):
        super().__init__()
        self.up = nn.ConvTranspose2d(width, width, 2, stride=2)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.norm = LayerNorm2d(width, eps=1e-6)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h2 w2"]:
        return self.norm(self.depthwise(functional.gelu(self.up(x))))


class EoMT(QuerySystem):
    """Queries inside a plain ViT; see the module."""

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
        backbone: str = "vit_small_patch14_reg4_dinov2",
        pretrained: bool = False,
        width: int | None = None,
        depth: int | None = None,
        heads: int | None = None,
        norm_eps: float | None = None,
        in_channels: int = 3,
        patch: int = 16,
        size: int = 640,
        table: int | None = None,
        queries: int = 200,
        last_blocks: int | None = None,
        masked: bool = True,
        points: int = 12_544,
        no_object: float = 0.1,
    ):
        """
        classes       names; label k is `classes[k]`
        stuff         those of `classes` that are regions, not countable objects
        backbone      a plain ViT of timm's: DINOv2 with registers, or DINOv3 ("vit_base_patch16_dinov3_qkvb")
        pretrained    timm's published weights in it (a download), resampled to `patch` and `size`; else random
        width, depth, heads  replace the backbone's own: a small transformer to train from random weights
        norm_eps      of the transformer's norms, in files of transformers that say another than the backbone's own
        patch         side of a patch, in pixels
        size          side of the square input; images are fitted into it
        table         patches along a side in the table of positions; None: size / patch
        last_blocks   how many blocks the queries pass; None: as published for the depth (12: 3, 24: 4, 40: 5)
        masked        in training queries look only into their own mask, annealed away (paper, section 3.3)
        points        at which masks are compared, for matching and for learning
        no_object     weight of the class "no object"
        """
        super().__init__()
        own = {"embed_dim": width, "depth": depth, "num_heads": heads}
        given = {"width": width, "depth": depth, "heads": heads, "table": table}
        at_least("eomt", 1, **{name: value for name, value in given.items() if value is not None})
        at_least("eomt", 1, patch=patch, queries=queries, points=points)
        at_least("eomt", 0, no_object=no_object)
        if size < patch:
            raise UsageError(f"eomt: size is {size} and patch {patch}; the input holds at least one patch, give more")
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.preprocess = normalization_for(
            Preprocess(resample="pillow", fit="letterbox", corner=True, canvas=(size, size), multiple=patch),
            in_channels,
        )
        self.backbone = ViT(
            backbone, patch=patch, size=patch * (table or size // patch), in_channels=in_channels,
            pretrained=pretrained, own={k: v for k, v in own.items() if v is not None}, eps=norm_eps,
        )  # fmt: skip
        count = LAST_BLOCKS.get(len(self.backbone), 3) if last_blocks is None else last_blocks
        if not 1 <= count <= len(self.backbone):
            raise UsageError(f"last_blocks is {count}; {backbone} has {len(self.backbone)} blocks, give 1 to that many")
        self.first = len(self.backbone) - count
        self.backbone.more_prefix(self.first, queries)
        channels = self.backbone.width
        self.queries = nn.Parameter(torch.randn(queries, channels))
        self.class_head = nn.Linear(channels, len(self.classes) + 1)
        self.mask_head = nn.Sequential(
            nn.Linear(channels, channels), nn.GELU(), nn.Linear(channels, channels), nn.GELU(),
            nn.Linear(channels, channels),
        )  # fmt: skip
        self.upscale = nn.Sequential(*(ScaleBlock(channels) for _ in range(max(1, int(math.log2(patch)) - 2))))
        self.masked, self.no_object, self.rules = masked, no_object, learning.Points(points)
        # Probability that a query is held to its mask, for each block that queries pass: 1 at first, 0 in the end.
        self.register_buffer("mask_probability", torch.ones(count))
        self.mask_probability: Tensor

    # ---- network -----------------------------------------------------------------------------------------------------

    def forward(self, images: Float[Tensor, "b c h w"]) -> Raw:
        vit, found = self.backbone, []
        tokens, grid, rotation = vit.begin(images)
        for number in range(self.first):
            tokens = vit.block(number, tokens, rotation)
        tokens = torch.cat([self.queries.expand(len(tokens), -1, -1), tokens], 1)  # (B, N + prefix + patches, D)
        for number in range(self.first, len(vit)):
            allowed = None
            if self.training and self.masked:
                found.append(self.answer(tokens, grid))
                _, embeddings, features = found[-1]
                allowed = self.allowed(embeddings, features, grid, self.mask_probability[number - self.first])
            tokens = vit.block(number, tokens, rotation, allowed)
        found.append(self.answer(tokens, grid))
        classes, embeddings, features = (torch.stack(parts) for parts in zip(*found, strict=True))
        return Raw(classes, embeddings, features, (images.shape[2], images.shape[3]))

    def answer(self, tokens: Float[Tensor, "b n d"], grid: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Class logits and embeddings of the queries, and the features of pixels, as the tokens stand."""
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
        """True where a token may look: a query only at patches in its mask, with `probability`; all else everywhere.

        A query with an empty mask still sees queries and prefix, so that no row is without a key.
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

    def on_progress(self, done: float) -> None:
        """Annealing: each block's probability falls from 1 to 0 over its own stretch of the run, the first block first
        (in the published runs blocks take turns from 1/6 to 5/6 of it where there are four)."""
        count = len(self.mask_probability)
        starts = torch.arange(1, count + 1, dtype=torch.float64) / (count + 2)
        part = ((done - starts) * (count + 2)).clamp(0, 1)
        self.mask_probability.copy_((1 - part) ** 0.9)

    # ---- learning ----------------------------------------------------------------------------------------------------

    def losses(self, raw: Raw, targets: Sequence[Instances]) -> dict[str, Tensor]:
        """`class`, `mask` and `dice` of the last prediction, and `class_0` ... of those before it: Mask2Former's, each
        prediction being matched by itself. Crowd regions are not learnt from. Random points come from torch's generator
        in the order of the published code, prediction by prediction.
        """
        device = raw.features.device
        with torch.autocast(device.type, enabled=False):
            objects = [learning.Objects.of(t, device) for t in targets]
            count = learning.object_count(objects, device)
            found = [self.prediction_losses(raw, layer, objects, count)[0] for layer in range(len(raw.classes))]
            idle = (raw.features.float().sum() + raw.embeddings.float().sum()) * 0
            terms = torch.stack(found, 1)  # (3, L)
            return learning.named(dict(zip(("class", "mask", "dice"), terms, strict=True)), idle)

    def prediction_losses(
        self, raw: Raw, layer: int, objects: Sequence[learning.Objects], count: Float[Tensor, ""]
    ) -> tuple[Float[Tensor, " terms"], list[Pairs]]:
        """Weighted losses of one prediction, and who answered for what."""
        classes, queries, features = raw.classes[layer, None], raw.embeddings[layer, None], raw.features[layer]
        matched = sum(min(len(self.queries), len(own)) for own in objects)
        places = learning.draw_places(1, len(objects), matched, self.rules, features.device)
        chances = classes.float().softmax(-1)
        costs = learning.point_costs(chances, queries, features, objects, places, raw.size, WEIGHTS)
        pairs = assign(costs)
        mask, dice = learning.point_losses(queries, features, objects, pairs, raw.size, self.rules)
        kinds = learning.class_losses(classes, objects, pairs, self.no_object)
        terms = torch.cat([kinds, mask / count, dice / count])
        return terms * terms.new_tensor(WEIGHTS), pairs

    # ---- for loading and training ------------------------------------------------------------------------------------

    def groups(self) -> dict[str, list[nn.Module]]:
        heads = [self.class_head, self.mask_head, self.upscale, nn.ParameterDict({"queries": self.queries})]
        return {"backbone": [self.backbone], "heads": heads}

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"class_head.{kind}": ClassRows(background_last=True) for kind in ("weight", "bias")}

    _ZOO = "model zoo of tue-mps/eomt"
    presets: ClassVar[Mapping[str, Preset]] = {
        **{
            f"eomt-{letter}-{task}-{size}": Preset(
                {"backbone": f"vit_{name}_patch14_reg4_dinov2", "size": size},
                (Score(value, measure, f"COCO val2017, fitted into {size} x {size}", _zoo),),
                "classes and stuff are the data's" if task == "panoptic" else "",
            )
            for _zoo in (_ZOO,)
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
                {"backbone": f"vit_{name}_patch16_dinov3_qkvb", "size": size},
                (Score(value, measure, f"COCO val2017, fitted into {size} x {size}", _zoo),),
            )
            for _zoo in (_ZOO,)
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
            {"width": 192, "depth": 6, "heads": 3, "queries": 50, "last_blocks": 2, "patch": 16, "size": 320,
             "points": 2048},
            note="for a few hundred images and no GPU; trains from random weights, slowly as transformers do: with "
            "pretrained=True a published trunk (no width, depth, heads) learns far sooner",
        ),
    }  # fmt: skip
    # Published besides: the queries and heads warm up for 500 steps before the trunk does for 1000 more, and each block
    # of the trunk learns 0.8 times as fast as the one after it.
    recipes: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"eomt-{letter}-{size}": {
            "epochs": epochs, "optimizer": "adamw", "lr": 1e-4, "weight_decay": 0.05, "decay_norms": True,
            "decay_biases": True, "clip": 0.01, "schedule": "poly", "power": 0.9, "warmup": 500, "amp": "bf16",
            "rates": {
                "backbone.body.patch_embed.*": 0.8**depth, "backbone.body.*_*": 0.8**depth,
                **{f"backbone.body.blocks.{i}.*": 0.8 ** (depth - 1 - i) for i in range(depth)},
            },
            "augment": {"flip": 0.5, "jitter": (0.1, 2.0), "size": (size, size)},
        }
        for letter, depth, epochs in (("s", 12, 24), ("b", 12, 24), ("l", 24, 12), ("g", 40, 12))
        for size in ((640,) if letter in "sb" else (640, 1280))
    }  # fmt: skip
