"""A start for query systems on vision transformers: pixels learn which object they belong to before queries do.

Queries that are trained from random weights have to find objects in tokens that do not tell objects apart yet. `Dense`
trains the transformer of `EoMT` without queries. For every cell of 4 x 4 pixels it predicts whether there is an object
and whether there is an edge, and within objects the area of the object and a code of its centre: sines and cosines of
the centre's coordinates. All cells of an object have the same code, so that a mask is a linear function of the code, as
it is of the pixel features in a query system. The targets need no matching. `Guided` then
trains the queries.

`prepared` sets values that random ones take many steps to reach: patch embeddings that decorrelate patches (principal
components of generated images), a table of positions made of waves, and LayerScale of 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.data import Dataset, Sample
from maskwright.data.views import View
from maskwright.ops import query_losses as learning
from maskwright.ops.assignment import Pairs, assign
from maskwright.structures import Instances
from maskwright.systems.eomt import EoMT

CELL = 4  # pixels along a side
FREQUENCIES = (1, 2, 4, 8)  # half periods along a side of the image
CHANNELS = 3 + 4 * len(FREQUENCIES)  # object, edge, area; sine and cosine of each coordinate


class Kept(View):
    """A view that generates each image once and keeps it in memory.

    Args:
        inner: The data set.
    """

    def __init__(self, inner: Dataset):
        super().__init__(inner)
        self.kept: dict[int, Sample] = {}

    def __getitem__(self, index: int) -> Sample:
        if index not in self.kept:
            self.kept[index] = super().__getitem__(index)
        return self.kept[index]


@dataclass(frozen=True)
class Maps:
    """Predictions of `Dense`.

    Attributes:
        coarse: Of each token, after the blocks without queries and after all.
        fine: Of the upscaled features, of the first quarter of the batch: upscaling takes as long as the transformer.
    """

    coarse: Float[Tensor, "l b c h w"]
    fine: Float[Tensor, "few c h w"]


class Dense(EoMT):
    """EoMT without queries, with dense predictions; see the module. Options are those of EoMT."""

    coarse: nn.Linear
    fine: nn.Conv2d

    @classmethod
    def made(cls, options: Mapping[str, Any]) -> Dense:
        """Creates one; the layers of the dense predictions are added to those of EoMT."""
        system = cls(**options)
        vit = system.dense.backbone
        system.coarse = nn.Linear(vit.width, CHANNELS * (vit.patch // CELL) ** 2)
        system.fine = nn.Conv2d(vit.width, CHANNELS, 1)
        return system

    def groups(self) -> dict[str, list[nn.Module]]:
        return {**super().groups(), "maps": [self.coarse, self.fine]}

    def forward(self, images: Float[Tensor, "b c h w"]) -> Any:
        net, vit = self.dense, self.dense.backbone
        tokens, grid, rotation = vit.begin(images)
        stages: list[Tensor] = []
        for number in range(len(vit)):
            if number == net.first:
                stages.append(tokens)
            tokens = vit.block(number, tokens, rotation)
        stages = [vit.norm(stage)[:, vit.prefix :] for stage in (*stages, tokens)]
        coarse = [
            functional.pixel_shuffle(self.coarse(stage).mT.unflatten(2, grid), vit.patch // CELL) for stage in stages
        ]
        few = stages[-1][: max(1, len(images) // 4)]
        return Maps(torch.stack(coarse), self.fine(net.upscale(few.mT.unflatten(2, grid))))

    def losses(self, raw: Any, targets: Sequence[Instances]) -> dict[str, Tensor]:
        expected = torch.stack([dense_targets(target) for target in targets]).to(raw.coarse.device)
        named = {"early": raw.coarse[0], "late": raw.coarse[1], "fine": raw.fine}
        return {
            f"{kind}_{name}": term
            for name, maps in named.items()
            for kind, term in dense_losses(maps.float(), expected[: len(maps)]).items()
        }


class Guided(EoMT):
    """EoMT with a fixed matching of queries and objects, the stage between `Dense` and the ordinary training.

    Each query has a fixed anchor, a position and a size, and is matched with the object nearest to it instead of the
    one that it predicts best. In the first of the last blocks, half of the matched queries, drawn at random, attend to
    a rectangle around their object instead of their own mask (MP-Former, arXiv 2303.07336, uses masks of objects). So
    queries become specialised in positions and sizes, and the last blocks learn to find the object of a region, before
    the matching depends on what they have learnt.
    """

    def forward(self, images: Float[Tensor, "b c h w"]) -> Any:
        tokens, grid, rotation = self.dense.backbone.begin(images)
        for number in range(self.dense.first):
            tokens = self.dense.backbone.block(number, tokens, rotation)
        return tokens, grid, rotation, (images.shape[2], images.shape[3])

    def losses(self, raw: Any, targets: Sequence[Instances]) -> dict[str, Tensor]:
        tokens, grid, rotation, size = raw
        net, vit = self.dense, self.dense.backbone
        count, always = len(net.queries), tokens.new_ones(())
        objects = [learning.Objects.from_instances(target, tokens.device) for target in targets]
        pairs = [anchored(own, count) for own in objects]
        tokens = torch.cat([net.queries.expand(len(tokens), -1, -1), tokens], 1)
        predictions = [net._predict(tokens, grid)]
        for number in range(net.first, len(vit)):
            _, embeddings, features = predictions[-1]
            allowed = net.allowed(embeddings, features, grid, always)
            if number == net.first:
                for image, (own, (queries, which)) in enumerate(zip(objects, pairs, strict=True)):
                    given = torch.rand(queries.shape[1]) < 0.5
                    inside = regions(own, which[0][given], grid, vit.patch)
                    allowed[image, 0, queries[0][given], count + vit.prefix :] = inside.to(tokens.device)
            tokens = vit.block(number, tokens, rotation, allowed)
            predictions.append(net._predict(tokens, grid))
        divisor = learning.object_count(objects, tokens.device)
        terms: dict[str, Tensor] = {}
        for layer, (classes, embeddings, features) in enumerate(predictions):
            mask, dice = learning.point_losses(
                embeddings[None].float(), features.float(), objects, pairs, size, self.loss.sampling
            )
            kinds = learning.class_losses(classes[None], objects, pairs, self.loss.no_object)
            values = torch.cat([kinds, mask / divisor, dice / divisor]) * kinds.new_tensor(self.loss.weights)
            terms |= {f"{name}_{layer}": value for name, value in zip(("class", "mask", "dice"), values, strict=True)}
        return terms


def anchors(count: int) -> Float[Tensor, "n 3"]:
    """Anchors of queries: x and y of the centre and the logarithm of the side, as shares of the image's sides.

    They are a Halton sequence, with sides from 0.05 to 0.9.
    """

    def radical(number: int, base: int) -> float:
        value, share = 0.0, 1.0
        while number:
            number, digit = divmod(number, base)
            share /= base
            value += share * digit
        return value

    points = torch.tensor([[radical(number, base) for base in (2, 3, 5)] for number in range(1, count + 1)])
    points[:, 2] = math.log(0.05) + points[:, 2] * math.log(0.9 / 0.05)
    return points


def anchored(objects: learning.Objects, count: int) -> Pairs:
    """Matches objects with queries by their anchors."""
    height, width = objects.masks.size
    boxes = objects.masks.boxes().float()
    corners = boxes / boxes.new_tensor([width, height, width, height])
    sides = (corners[:, 2:] - corners[:, :2]).clamp(min=1e-3)
    own = torch.cat([(corners[:, 2:] + corners[:, :2]) / 2, sides.prod(1, keepdim=True).sqrt().log()], 1)
    differences = (anchors(count)[:, None] - own[None]).square() * own.new_tensor([16.0, 16.0, 1.0])
    return assign([differences.sum(2)[None]])[0]


def regions(
    objects: learning.Objects, which: Int[Tensor, " r"], grid: tuple[int, int], patch: int
) -> Bool[Tensor, "r t"]:
    """Rectangles of patches around objects, of random position and size, at least of one patch."""
    boxes = objects.masks[which].boxes().float() / patch
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    centres = centres + sides * (torch.rand(len(boxes), 2) - 0.5) * 0.4
    sides = sides * (0.7 + torch.rand(len(boxes), 2))
    inside: list[Tensor] = []
    for axis, cells in ((1, grid[0]), (0, grid[1])):
        middle = torch.arange(cells) + 0.5
        nearest = centres[:, axis, None].clamp(0.5, cells - 0.5)
        inside.append((middle - nearest).abs() <= (sides[:, axis, None] / 2).clamp(min=0.5))
    return (inside[0][:, :, None] & inside[1][:, None]).flatten(1)


def taken(kind: type[EoMT], options: Mapping[str, Any], state: Mapping[str, Tensor]) -> EoMT:
    """A system of a kind with the weights of another, without those that it has no parameters for."""
    system = kind(**options)
    own = system.state_dict().keys()
    system.load_state_dict({name: value for name, value in state.items() if name in own})
    return system


def dense_targets(target: Instances) -> Float[Tensor, "c h w"]:
    """What `Dense` has to predict for an image: the channels of `CHANNELS`, at the centres of cells.

    Where masks overlap, a cell belongs to the smallest object. Coordinates of centres are shares of the image's sides.
    """
    height, width = target.image_size
    masks = target.masks
    assert masks is not None
    rows = torch.arange(CELL // 2, height, CELL)
    columns = torch.arange(CELL // 2, width, CELL)
    found = torch.zeros(CHANNELS, len(rows), len(columns))
    if not len(target):
        return found
    pixels = masks.dense().float()
    areas = pixels.sum((1, 2)).clamp(min=1)
    y = torch.einsum("nhw,h->n", pixels, (torch.arange(height) + 0.5) / height) / areas
    x = torch.einsum("nhw,w->n", pixels, (torch.arange(width) + 0.5) / width) / areas
    waves = [wave(math.pi * f * c) for f in FREQUENCIES for c in (x, y) for wave in (torch.sin, torch.cos)]
    codes = torch.stack([(areas.log() - 5) / 3, *waves])  # (C - 2, N)
    order = areas.argsort(descending=True, stable=True)
    cells = pixels[order][:, rows][:, :, columns] > 0
    owner = torch.zeros(cells.shape[1:], dtype=torch.int64)
    for number, cell in enumerate(cells):
        owner[cell] = number + 1
    found[0] = owner > 0
    around = functional.pad(owner[None].float(), (1, 1, 1, 1), mode="replicate")
    most, least = functional.max_pool2d(around, 3, 1), -functional.max_pool2d(-around, 3, 1)
    found[1] = (most != least)[0]
    found[2:] = functional.pad(codes[:, order], (1, 0))[:, owner]
    return found


def dense_losses(maps: Float[Tensor, "b c h w"], expected: Float[Tensor, "b c h w"]) -> dict[str, Float[Tensor, ""]]:
    """Binary cross entropy of objects and edges; mean squared error of area and codes within objects."""
    maps = maps[:, :, : expected.shape[2], : expected.shape[3]]
    inside = expected[:, :1]
    errors = ((maps[:, 2:] - expected[:, 2:]).square() * inside).sum((0, 2, 3)) / inside.sum().clamp(min=1)
    kinds = functional.binary_cross_entropy_with_logits(maps[:, :2], expected[:, :2], reduction="none")
    object_, edge = kinds.mean((0, 2, 3)).unbind()
    return {"object": object_, "edge": edge, "code": errors[0] + errors[1:].sum() / 4}


@torch.no_grad()
def prepared(system: EoMT, images: Dataset, count: int = 400, patches: int = 60_000) -> None:
    """Sets what need not be learnt; see the module.

    Args:
        system: Is changed. Its table of positions must be square.
        images: Whose first images give the principal components of patches.
        count: Number of these images.
        patches: Number of patches, drawn by torch's generator.
    """
    body = system.dense.backbone.body
    weight: Tensor = body.patch_embed.proj.weight
    width, side = weight.shape[0], weight.shape[2]
    planes = (system.preprocess.apply(images[number].image)[0] for number in range(min(count, len(images))))
    cut = torch.cat([functional.unfold(plane[None], side, stride=side // 2)[0].mT for plane in planes])
    cut = cut[torch.randperm(len(cut))[:patches]]
    mean = cut.mean(0)
    values, vectors = torch.linalg.eigh((cut - mean).mT @ (cut - mean) / len(cut))
    values, vectors = values.flip(0)[:width], vectors.flip(1)[:, :width]
    rows = (vectors / (values + 0.01 * values.mean()).sqrt()).mT  # small components are noise, which must not grow
    weight.copy_(rows.view_as(weight))
    body.patch_embed.proj.bias.copy_(-(rows @ mean))
    table: Tensor = body.pos_embed
    count = math.isqrt(table.shape[1])
    rates = torch.exp(torch.linspace(math.log(math.pi / 2 / count), math.log(math.pi / 1.5), width // 4))
    y, x = torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij")
    waves = [wave(place.flatten()[:, None] * rates) for place in (x, y) for wave in (torch.sin, torch.cos)]
    table.copy_(0.5 * torch.cat(waves, 1))  # patches have a standard deviation of about 1
    for block in body.blocks:
        block.ls1.gamma.fill_(1.0)
        block.ls2.gamma.fill_(1.0)
