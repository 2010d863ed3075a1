"""Prompt encoder and mask decoder of Segment Anything (arXiv 2304.02643, section 3 and appendix A) and its successors.

Prompts are given in slots, each a point with a label: `BACKGROUND`, `FOREGROUND`, the two corners of a box, `NOTHING`
(a token of its own, "not a point"), or `ABSENT`, a slot that no token attends to. Objects with different numbers of
points thereby share one call, and each has the same result as alone.

Image tokens that are equal for all prompts are projected once and expanded without a copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from maskwright.blocks.layers import LayerNorm2d
from maskwright.blocks.transformer import MLP

ABSENT, NOTHING, BACKGROUND, FOREGROUND, FIRST_CORNER, LAST_CORNER = -2, -1, 0, 1, 2, 3
Activation = Literal["relu", "gelu"]
UpscaleNorm = Literal["layer", "group"]


@dataclass(frozen=True)
class PromptTokens:
    """Encoded prompts.

    Attributes:
        sparse: Tokens of the slots.
        dense: Added to the image: of masks, or constant; with batch size 1 if it is the same for all prompts.
        positions: Position encoding of the image's cells.
        drawn: The mask logits of the prompts themselves, at four times the resolution; None if no prompt has a mask.
    """

    sparse: Float[Tensor, "n t c"]
    dense: Float[Tensor, "_n c h w"]
    positions: Float[Tensor, "1 c h w"]
    drawn: Float[Tensor, "n 1 _h _w"] | None = None


@dataclass(frozen=True)
class Decoded:
    """The decoder's answers to n prompts; answer 0 is the one for prompts without ambiguity.

    Attributes:
        logits: Mask logits, on a grid four times as fine as the image embedding.
        scores: Predicted IoU of each mask.
        tokens: Output token of each mask.
        present: Logit of the prediction that there is an object; None for decoders without this token.
    """

    logits: Float[Tensor, "n k h w"]
    scores: Float[Tensor, "n k"]
    tokens: Float[Tensor, "n k c"]
    present: Float[Tensor, " n"] | None = None


# ---- prompt encoder --------------------------------------------------------------------------------------------------


class FourierPositions(nn.Module):
    """Position encoding by random Fourier features (arXiv 2006.10739).

    Args:
        width: Channels of the encoding, half of them sines, then cosines.
        scale: Standard deviation of the random frequencies.

    Attributes:
        frequencies: (2, width / 2), fixed and part of the checkpoint.
    """

    frequencies: Tensor

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.register_buffer("frequencies", scale * torch.randn(2, width // 2))
        self._last: tuple[Tensor, int, tuple[int, int], Tensor] | None = None

    def forward(self, points: Float[Tensor, "*n 2"]) -> Float[Tensor, "*n c"]:
        """Encodes points x, y in units of the input's width and height, 0 ... 1."""
        with torch.autocast(points.device.type, enabled=False):  # angles of low precision are meaningless
            angles = ((2 * points.float() - 1) @ self.frequencies.float()) * (2 * math.pi)
            return torch.cat([angles.sin(), angles.cos()], -1)

    def grid(self, size: tuple[int, int]) -> Float[Tensor, "1 c h w"]:
        """Encodes the centres of the cells of a map of `size` (h, w).

        The last result is kept, since it is the same for all prompts of an image; it must not be changed in place.
        """
        own = self.frequencies
        kept = type(own) is Tensor and not (own.requires_grad or own.is_inference() or _is_traced())
        if not kept:
            return self._grid(size)
        last, version = self._last, own._version  # pyright: ignore[reportPrivateUsage] - no public counter
        if last is not None and last[0] is own and last[1:3] == (version, size):
            return last[3]
        with torch.inference_mode(False):  # what is kept may be used in training later
            found = self._grid(size)
        if type(found) is Tensor:  # no stand-in of a tracer
            self._last = own, version, size, found
        return found

    def _grid(self, size: tuple[int, int]) -> Float[Tensor, "1 c h w"]:
        """Computes the encoding of the centres of cells."""
        device = self.frequencies.device
        rows = (torch.arange(size[0], device=device, dtype=torch.float32) + 0.5) / size[0]
        columns = (torch.arange(size[1], device=device, dtype=torch.float32) + 0.5) / size[1]
        points = torch.stack([columns.expand(size[0], -1), rows[:, None].expand(-1, size[1])], -1)
        return self(points).permute(2, 0, 1)[None]


def _is_traced() -> bool:
    """Whether operations are recorded instead of, or beside, being computed."""
    return torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()


class MaskEncoder(nn.Sequential):
    """Encodes mask logits (n, 1, 4h, 4w) on the grid (h, w) of the image embedding."""

    def __init__(self, width: int, hidden: int = 16):
        super().__init__(
            nn.Conv2d(1, hidden // 4, 2, stride=2), LayerNorm2d(hidden // 4, eps=1e-6), nn.GELU(),
            nn.Conv2d(hidden // 4, hidden, 2, stride=2), LayerNorm2d(hidden, eps=1e-6), nn.GELU(),
            nn.Conv2d(hidden, width, 1),
        )  # fmt: skip


class PromptEncoder(nn.Module):
    """Encodes points, boxes and masks.

    Args:
        width: Channels of tokens.
        hidden: Channels inside of the encoder of masks; 0 for systems without mask prompts.
        background: Whether points outside of the object have a vector of their own (not in EfficientSAM).
        placed: Whether the token "not a point" has the encoding of its position too (EfficientSAM).
    """

    def __init__(self, width: int = 256, hidden: int = 16, *, background: bool = True, placed: bool = False):
        super().__init__()
        self.width, self.has_background, self.placed = width, background, placed
        self.positions = FourierPositions(width)
        # One vector for each label, `BACKGROUND` ... `LAST_CORNER`.
        self.labels = nn.ParameterList(nn.Parameter(torch.randn(1, width)) for _ in range(4 if background else 3))
        self.nothing = nn.Parameter(torch.randn(1, width))
        self.masks = MaskEncoder(width, hidden) if hidden else None
        self.no_mask = nn.Parameter(torch.randn(1, width)) if hidden else None

    def forward(
        self,
        points: Float[Tensor, "n t 2"],
        labels: Int[Tensor, "n t"],
        size: tuple[int, int],
        logits: Float[Tensor, "n 1 h w"] | None = None,
        has_mask: Bool[Tensor, " n"] | None = None,
    ) -> PromptTokens:
        """Encodes prompts.

        Args:
            points: x, y in units of the input's width and height, 0 ... 1.
            labels: What each slot holds, see the module.
            size: Height and width of the image embedding.
            logits: Masks of all prompts; None if none has one.
            has_mask: Which prompts have a mask; None: all, if there are `logits`.
        """
        own = [*self.labels] if self.has_background else [torch.zeros_like(self.nothing), *self.labels]
        table = torch.cat([self.nothing, *own])  # row 0 belongs to NOTHING, and to ABSENT, which does not matter
        place = self.positions(points).to(table.dtype)
        if not self.placed:
            place = place * (labels >= 0)[..., None]
        sparse = place + table[(labels + 1).clamp(min=0)]
        grid = self.positions.grid(size).to(table.dtype)
        if self.no_mask is None or self.masks is None:
            return PromptTokens(sparse, grid.new_zeros(1, self.width, 1, 1).expand(1, -1, *size), grid)
        dense, given = self.no_mask[..., None, None].expand(1, -1, *size), None
        if logits is not None:
            given = logits if has_mask is None else torch.where(has_mask[:, None, None, None], logits, 0)
            encoded = self.masks(given.to(table.dtype))
            dense = encoded if has_mask is None else torch.where(has_mask[:, None, None, None], encoded, dense)
        return PromptTokens(sparse, dense, grid, given)


def draw_prompts(
    points: Float[Tensor, "n t 2"],
    labels: Int[Tensor, "n t"],
    size: tuple[int, int],
    logits: Float[Tensor, "n 1 h w"] | None = None,
    has_mask: Bool[Tensor, " n"] | None = None,
) -> Float[Tensor, "n 1 {size[0]} {size[1]}"]:
    """Draws prompts as mask logits: a box as the ellipse in it, and a point as certain around itself.

    In a box, the logit is 3 (1 - u^2 - v^2) for coordinates u, v from -1 to 1, at least -6. Its contour of 0 is the
    ellipse, the mean shape of an object, and cells of any size hold the box exactly.

    Tokens alone leave it to the decoder to find the place of a prompt in the image, which it learns slowly. Clicks are
    often drawn as disks in interactive segmentation (arXiv 2102.06583).

    Args:
        points: x, y in units of the input's width and height, 0 ... 1.
        labels: What each slot holds.
        size: Height and width of the grid of mask logits.
        logits: Masks of all prompts; None if none has one. Boxes are drawn where there is none.
        has_mask: Which prompts have a mask; None: all, if there are `logits`.
    """
    height, width = size
    cells = points.new_tensor([width, height])
    columns = torch.arange(width, device=points.device) + 0.5
    rows = (torch.arange(height, device=points.device) + 0.5)[:, None]
    places = points * cells  # in cells
    corners = [((labels == kind)[..., None] * places).sum(1) for kind in (FIRST_CORNER, LAST_CORNER)]
    (x0, y0), (x1, y1) = ([v[:, None, None] for v in corner.unbind(1)] for corner in corners)
    across, down = (
        (2 * v - low - high) / (high - low).clamp(min=0.1) for v, low, high in ((columns, x0, x1), (rows, y0, y1))
    )
    ellipse = (3 * (1 - across.square() - down.square())).clamp(min=-6)  # (n, h, w)
    boxed = (labels == FIRST_CORNER).any(1)[:, None, None]
    drawn = torch.where(boxed, ellipse, 0.0)
    if logits is not None:
        given = torch.ones_like(boxed) if has_mask is None else has_mask[:, None, None]
        drawn = torch.where(given, logits[:, 0].float(), drawn)
    x, y = places[..., 0, None, None], places[..., 1, None, None]
    near = (columns - x).square() + (rows - y).square() <= 2.5**2  # (n, t, h, w)
    on, off = ((near & (labels == kind)[..., None, None]).any(1) for kind in (FOREGROUND, BACKGROUND))
    return torch.where(on, 8.0, torch.where(off, -8.0, drawn))[:, None].to(points.dtype)


# ---- mask decoder ----------------------------------------------------------------------------------------------------

MANY_PROMPTS = 4  # from which on attention avoids projections of all cells, which changes results by rounding


class NarrowAttention(nn.Module):
    """Multi-head attention in `inner` channels between tokens of `width` channels."""

    def __init__(self, width: int, inner: int, heads: int):
        super().__init__()
        if inner % heads:
            raise ValueError(f"the inner width must be a multiple of the number of heads, got {inner} and {heads}")
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, inner) for _ in range(3))
        self.output = nn.Linear(inner, width)

    def forward(
        self,
        query: Float[Tensor, "_a q c"],
        key: Float[Tensor, "_b k c"],
        value: Float[Tensor, "_b k c"],
        allowed: Bool[Tensor, "n k"] | None = None,
    ) -> Float[Tensor, "_n q c"]:
        """Attends from `query` to `key`; tokens that are the same for all prompts have batch size 1.

        Args:
            query: Tokens that attend.
            key: Tokens that are attended to.
            value: What is read from them.
            allowed: The keys of each prompt that may be attended to; None: all.
        """
        # Time matters for many prompts only, and the number of tokens is not known while exporting.
        if max(query.shape[0], key.shape[0]) >= MANY_PROMPTS and not torch.compiler.is_exporting():
            few = 3 * self.query.out_features // 4  # the products of tokens and heads that pay
            own = key.shape[0] == query.shape[0]  # otherwise one projection serves all prompts
            if own and key.shape[1] > query.shape[1] and query.shape[1] * self.heads <= few:
                return self._few_queries(query, key, value, allowed)
            if query.shape[1] > key.shape[1] and key.shape[1] * self.heads <= few:
                return self._few_keys(query, key, value, allowed)
        q, k, v = (self._parted(layer, x) for layer, x in ((self.query, query), (self.key, key), (self.value, value)))
        count = k.shape[0] if q.shape[0] == 1 else q.shape[0]
        q, k, v = (x.expand(count, -1, -1, -1) for x in (q, k, v))
        mask = None if allowed is None else allowed[:, None, None]
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.output(found.transpose(1, 2).flatten(2))

    # If one side has few tokens, projecting the cells of the other side (cells x width x inner products) costs more
    # than multiplying them with tokens to which these matrices have been applied (cells x width x heads x tokens).

    def _parted(self, layer: nn.Linear, x: Float[Tensor, "b t c"]) -> Float[Tensor, "b h t d"]:
        return layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _scores(
        self, few: Float[Tensor, "n h t d"], layer: nn.Linear, many: Float[Tensor, "_b k c"]
    ) -> Float[Tensor, "n h t k"]:
        """Scaled products of few projected tokens with many tokens, projected by `layer`."""
        few = few / math.sqrt(few.shape[3])
        applied = (few @ layer.weight.unflatten(0, (self.heads, -1))).flatten(1, 2)  # (n, h x t, c)
        offsets = few @ layer.bias.unflatten(0, (self.heads, -1))[..., None]  # (n, h, t, 1)
        return (applied @ many.transpose(1, 2)).unflatten(1, (self.heads, -1)) + offsets

    def _few_queries(
        self, query: Float[Tensor, "n q c"], key: Float[Tensor, "n k c"], value: Float[Tensor, "n k c"],
        allowed: Bool[Tensor, "n k"] | None,
    ) -> Float[Tensor, "n q c"]:  # fmt: skip
        """Attention of few tokens to many."""
        scores = self._scores(self._parted(self.query, query), self.key, key)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None, None], -torch.inf)
        read = (scores.softmax(3).flatten(1, 2) @ value).unflatten(1, (self.heads, -1))  # (n, h, q, c)
        found = read @ self.value.weight.unflatten(0, (self.heads, -1)).transpose(1, 2)
        return self.output(found.transpose(1, 2).flatten(2) + self.value.bias)

    def _few_keys(
        self, query: Float[Tensor, "_b q c"], key: Float[Tensor, "n k c"], value: Float[Tensor, "n k c"],
        allowed: Bool[Tensor, "n k"] | None,
    ) -> Float[Tensor, "n q c"]:  # fmt: skip
        """Attention of many tokens to few. Queries come last in the scores, since softmax is slow over few columns."""
        scores = self._scores(self._parted(self.key, key), self.query, query)  # (n, h, k, q)
        if allowed is not None:
            scores = scores.masked_fill(~allowed[:, None, :, None], -torch.inf)
        output = self.output.weight.unflatten(1, (self.heads, -1)).permute(1, 2, 0)  # (h, d, c)
        read = (self._parted(self.value, value) @ output).flatten(1, 2)  # (n, h x k, c)
        return scores.softmax(2).flatten(1, 2).transpose(1, 2) @ read + self.output.bias


class TwoWayLayer(nn.Module):
    """Tokens attend to each other, then to the image, pass an MLP, and then the image attends to the tokens.

    Args:
        width: Channels of tokens and image.
        heads: Attention heads.
        hidden: Channels inside of the MLP.
        reduction: Cross-attention has width / reduction channels.
        activation: Activation of the MLP.
        first: The tokens have no positions added in self-attention, whose result replaces them.
        keeps: Positions are added to the tokens for good before self-attention, except in the first layer, whose result
            is added to the tokens too (EfficientSAM).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        reduction: int,
        activation: Activation = "relu",
        *,
        first: bool,
        keeps: bool = False,
    ):
        super().__init__()
        self.first, self.keeps = first, keeps
        self.activation = functional.relu if activation == "relu" else functional.gelu
        self.among_tokens = NarrowAttention(width, width, heads)
        self.norm1 = nn.LayerNorm(width)
        self.to_image = NarrowAttention(width, width // reduction, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP((width, hidden, width))
        self.norm3 = nn.LayerNorm(width)
        self.to_tokens = NarrowAttention(width, width // reduction, heads)
        self.norm4 = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Float[Tensor, "n t c"],
        image: Float[Tensor, "_b k c"],
        places: Float[Tensor, "n t c"],
        grid: Float[Tensor, "1 k c"],
        allowed: Bool[Tensor, "n t"] | None = None,
    ) -> tuple[Float[Tensor, "n t c"], Float[Tensor, "n k c"]]:
        """Runs the layer.

        Args:
            tokens: Output tokens and prompts.
            image: Cells of the image embedding.
            places: Added to queries and keys of tokens.
            grid: Position encoding of the cells.
            allowed: Tokens of each prompt that may be attended to; None: all.
        """
        if self.keeps:
            tokens = tokens if self.first else tokens + places
            tokens = self.norm1(tokens + self.among_tokens(tokens, tokens, tokens, allowed))
        elif self.first:
            tokens = self.norm1(self.among_tokens(tokens, tokens, tokens, allowed))
        else:
            placed = tokens + places
            tokens = self.norm1(tokens + self.among_tokens(placed, placed, tokens, allowed))
        keys = image + grid
        tokens = self.norm2(tokens + self.to_image(tokens + places, keys, image))
        hidden = self.activation(self.mlp.layers[0](tokens))
        tokens = self.norm3(tokens + self.mlp.layers[1](hidden))
        return tokens, self.norm4(image + self.to_tokens(keys, tokens + places, tokens, allowed))


class TwoWayTransformer(nn.Module):
    """Layers in which tokens and image attend to each other, and a last attention of the tokens to the image."""

    def __init__(
        self, width: int = 256, depth: int = 2, heads: int = 8, hidden: int = 2048, reduction: int = 2,
        activation: Activation = "relu", keeps: bool = False,
    ):  # fmt: skip
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayLayer(width, heads, hidden, reduction, activation, first=number == 0, keeps=keeps)
            for number in range(depth)
        )
        self.to_image = NarrowAttention(width, width // reduction, heads)
        self.norm = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Float[Tensor, "n t c"],
        image: Float[Tensor, "_b k c"],
        grid: Float[Tensor, "1 k c"],
        allowed: Bool[Tensor, "n t"] | None = None,
    ) -> tuple[Float[Tensor, "n t c"], Float[Tensor, "n k c"]]:
        """Returns the refined tokens and image; see `TwoWayLayer`."""
        places = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, places, grid, allowed)
        tokens = self.norm(tokens + self.to_image(tokens + places, image + grid, image))
        return tokens, image


class Refinement(nn.Module):
    """A residual block of 3 x 3 convolutions, which reads the mask logits of prompts beside the map."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels + 1, channels, 3, padding=1)
        self.norm = LayerNorm2d(channels, eps=1e-6)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "n c h w"], drawn: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n c h w"]:
        """Returns the refined map."""
        inner = self.first(torch.cat([x, drawn / 4], 1))
        return x + self.second(functional.gelu(self.norm(inner)))


class MaskDecoder(nn.Module):
    """Decodes masks from an image embedding and prompts.

    Args:
        width: Channels of tokens and image.
        depth: Layers of the transformer.
        heads: Attention heads.
        hidden: Channels inside of the transformer's MLP.
        answers: Masks of each prompt: one for prompts without ambiguity, then those for ambiguous ones.
        score_hidden: Channels inside of the network that predicts the IoU.
        score_layers: Its linear layers.
        activation: Activation of all MLPs.
        keeps: See `TwoWayLayer`.
        norm: Normalisation between the transposed convolutions: over the channels of each cell, or "group" over
            channels and cells (EfficientSAM).
        upscale: Channels after each transposed convolution; default (width / 4, width / 8).
        sigmoid: Whether predicted IoUs pass a sigmoid (SAM 2).
        present: Whether an additional token predicts that there is an object (SAM 2).
        finer: Whether finer feature maps of the image are added while upscaling (SAM 2).
        refine: Layers of 3 x 3 convolutions of the upscaled map together with the mask logits of the prompts, to which
            answers are then corrections; every prompt must have them. 0: none, as published.
    """

    def __init__(
        self,
        width: int = 256,
        depth: int = 2,
        heads: int = 8,
        hidden: int = 2048,
        *,
        answers: int = 4,
        score_hidden: int = 256,
        score_layers: int = 3,
        activation: Activation = "relu",
        keeps: bool = False,
        norm: UpscaleNorm = "layer",
        upscale: Sequence[int] | None = None,
        sigmoid: bool = False,
        present: bool = False,
        finer: bool = False,
        refine: int = 0,
    ):
        super().__init__()
        first, last = upscale or (width // 4, width // 8)
        self.answers, self.sigmoid, self.finer = answers, sigmoid, finer
        self.transformer = TwoWayTransformer(width, depth, heads, hidden, activation=activation, keeps=keeps)
        self.score_token = nn.Parameter(torch.randn(1, width))
        self.mask_tokens = nn.Parameter(torch.randn(answers, width))
        self.present_token = nn.Parameter(torch.randn(1, width)) if present else None
        self.up1 = nn.ConvTranspose2d(width, first, 2, stride=2)
        self.up_norm = LayerNorm2d(first, eps=1e-6) if norm == "layer" else nn.GroupNorm(1, first)
        self.up2 = nn.ConvTranspose2d(first, last, 2, stride=2)
        self.refine = nn.ModuleList(Refinement(last) for _ in range(refine))
        self.share = nn.Parameter(torch.ones(answers)) if refine else None  # of the logits of prompts
        self.kernels = nn.ModuleList(MLP((width, width, width, last), activation) for _ in range(answers))
        self.score = MLP((width, *[score_hidden] * (score_layers - 1), answers), activation)
        self.present = MLP((width, width, width, 1)) if present else None

    def forward(
        self,
        image: Float[Tensor, "_b c h w"],
        prompts: PromptTokens,
        allowed: Bool[Tensor, "n t"] | None = None,
        finer: Sequence[Tensor] = (),
    ) -> Decoded:
        """Decodes masks.

        Args:
            image: The embedding of the image, with batch size 1 for prompts of one image, or one for each prompt.
            prompts: Encoded prompts.
            allowed: Which slots hold a prompt; None: all.
            finer: Feature maps (_b, C, 4h, 4w) and (_b, C, 2h, 2w), with as many channels as there are while upscaling.
        """
        before: list[Tensor] = [self.score_token, self.mask_tokens]
        if self.present_token is not None:
            before = [self.present_token, *before]
        own = torch.cat(before)
        count = prompts.sparse.shape[0]
        tokens = torch.cat([own.expand(count, -1, -1), prompts.sparse], 1)  # (n, own + t, c)
        if allowed is not None:
            allowed = torch.cat([allowed.new_ones(count, len(own)), allowed], 1)
        cells = (image + prompts.dense).flatten(2).transpose(1, 2)  # (1 or n, k, c)
        grid = prompts.positions.flatten(2).transpose(1, 2)
        tokens, cells = self.transformer(tokens, cells, grid, allowed)
        present = None
        if self.present is not None:
            present, tokens = self.present(tokens[:, 0])[:, 0], tokens[:, 1:]
        answers = tokens[:, 1 : 1 + self.answers]
        scores = self.score(tokens[:, 0])
        kernels = torch.stack([network(answers[:, k]) for k, network in enumerate(self.kernels)], 1)
        maps = self.upscaled(cells.transpose(1, 2).unflatten(2, image.shape[2:]), finer)
        for layer in self.refine:
            assert prompts.drawn is not None, "every prompt has a mask"
            maps = layer(maps, prompts.drawn)
        logits = (kernels @ maps.flatten(2)).unflatten(2, maps.shape[2:])
        if self.share is not None and prompts.drawn is not None:
            logits = logits + self.share[:, None, None] * prompts.drawn
        return Decoded(logits, scores.sigmoid() if self.sigmoid else scores, answers, present)

    def upscaled(self, cells: Float[Tensor, "n c h w"], finer: Sequence[Tensor] = ()) -> Float[Tensor, "n d _h _w"]:
        """Computes feature maps of four times the resolution."""
        maps = self.up1(cells)
        if self.finer:
            maps = maps + finer[1]
        maps = self.up2(functional.gelu(self.up_norm(maps)))
        if self.finer:
            maps = maps + finer[0]
        return functional.gelu(maps)


def stable_answer(decoded: Decoded, margin: float = 0.05, threshold: float = 0.98) -> Int[Tensor, " n"]:
    """The answer to each prompt without ambiguity, where a mask that is not stable is replaced (SAM 2).

    The stability of answer 0 is the ratio of the areas of its logits above `margin` and above -`margin`, 1 if both are
    empty. Where it is less than `threshold`, the best of the other answers by predicted IoU is taken.
    """
    logits = decoded.logits[:, 0].flatten(1)
    inner, outer = ((logits > cut).sum(1).float() for cut in (margin, -margin))
    stable = torch.where(outer > 0, inner / outer, 1.0) >= threshold
    return torch.where(stable, 0, 1 + decoded.scores[:, 1:].argmax(1))
