"""Plain vision transformers of timm, block by block, so that a system can insert tokens between blocks."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from maskwright.blocks.backbones import Backbone, Family, Levels, Use
from maskwright.errors import MissingExtraError, UsageError


class ViT(nn.Module):
    """A plain ViT (arXiv 2010.11929): tokens of patches, prefix tokens (class, registers), equal blocks, a final norm.

    `begin` computes tokens (B, prefix + patches, D), `block` runs one block, `norm` is applied after the last one. The
    system that calls them may change the tokens in between.

    Attributes:
        body: The model of timm.
        patch: Side of a patch in pixels.
        width: Channels of the tokens.
        prefix: Number of prefix tokens.
        channels: Channels of the features, as for every backbone: one entry, `width`.
        strides: Their strides: one entry, `patch`.
    """

    def __init__(
        self,
        name: str,
        *,
        patch: int = 16,
        size: int = 640,
        in_channels: int = 3,
        pretrained: bool = False,
        own: dict[str, Any] | None = None,
        eps: float | None = None,
    ):
        """
        Args:
            name: Any model of timm with `blocks` and `norm`: "vit_base_patch14_reg4_dinov2",
                "vit_base_patch16_dinov3_qkvb".
            patch: Side of a patch in pixels. If it differs from the published one, timm resamples the weights.
            size: Side of the square input that the table of positions is made for, in pixels. It is interpolated for
                other sizes.
            in_channels: Channels of the images.
            pretrained: Download timm's published weights.
            own: Arguments that replace timm's: embed_dim, depth, num_heads.
            eps: Epsilon of all norms; None: that of timm.

        Raises:
            UsageError: If timm has no such model, or it is not a plain ViT.
        """
        super().__init__()
        try:
            import timm
        except ImportError:
            raise MissingExtraError("timm", "timm") from None
        if not timm.is_model(name):
            raise UsageError(f"there is no model {name!r} in timm's registry")
        try:
            body: Any = timm.create_model(
                name, pretrained=pretrained, num_classes=0, patch_size=patch, img_size=size, in_chans=in_channels,
                **(own or {}),
            )  # fmt: skip
        except (RuntimeError, AttributeError, ValueError, TypeError, AssertionError) as error:
            raise UsageError(f"timm cannot build {name!r} for inputs of {size} pixels: {error}") from None
        lacking = [part for part in ("patch_embed", "cls_token", "blocks", "norm") if getattr(body, part, None) is None]
        if lacking:
            raise UsageError(f"{name!r} of timm is not a plain ViT: it has no {', '.join(lacking)}")
        if eps is not None:
            for module in body.modules():
                if isinstance(module, nn.LayerNorm):
                    module.eps = eps
        self.body, self.patch, self.width, self.prefix = body, patch, body.embed_dim, body.num_prefix_tokens
        self.channels, self.strides = [self.width], [patch]
        self.rotary = getattr(body, "rope", None)
        body.requires_grad_(True)

    def __len__(self) -> int:
        return len(self.body.blocks)

    def begin(self, images: Float[Tensor, "b c h w"]) -> tuple[Float[Tensor, "b n d"], tuple[int, int], Tensor | None]:
        """Computes the tokens before the first block.

        Returns:
            The tokens with their positions, rows and columns of patches, and the rotation that `block` needs if
            positions are rotary.
        """
        from timm.layers.pos_embed import resample_abs_pos_embed

        body = self.body
        patches = body.patch_embed.proj(images)  # (B, D, h, w)
        grid = (int(patches.shape[2]), int(patches.shape[3]))
        tokens = body.patch_embed.norm(patches.flatten(2).transpose(1, 2))
        prefix = [
            t.expand(tokens.shape[0], -1, -1)
            for t in (body.cls_token, getattr(body, "reg_token", None))
            if t is not None
        ]
        table = body.pos_embed
        if table is None:
            tokens = torch.cat([*prefix, tokens], 1)
        else:
            whole = table.shape[1] - (0 if getattr(body, "no_embed_class", False) else self.prefix)
            side = math.isqrt(
                whole
            )  # the table is square; a grid of another shape needs interpolation even if as large
            if grid != (side, side):
                table = resample_abs_pos_embed(table, list(grid), num_prefix_tokens=table.shape[1] - whole)
            if table.shape[1] == tokens.shape[1]:  # no positions for the prefix
                tokens = torch.cat([*prefix, tokens + table], 1)
            else:
                tokens = torch.cat([*prefix, tokens], 1) + table
        tokens = getattr(body, "norm_pre", nn.Identity())(tokens)
        rotation = None if self.rotary is None else self.rotary.get_embed(shape=list(grid))
        return tokens, grid, rotation

    def block(
        self,
        number: int,
        tokens: Float[Tensor, "b n d"],
        rotation: Tensor | None = None,
        allowed: Bool[Tensor, "b 1 n n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Runs one block.

        Args:
            number: Which block.
            tokens: Its input.
            rotation: What `begin` returned.
            allowed: True where a token (row) may attend to a token (column); None: everywhere.
        """
        layer = self.body.blocks[number]
        if self.rotary is None:
            return layer(tokens, attn_mask=allowed)
        return layer(tokens, rope=rotation, attn_mask=allowed)

    def norm(self, tokens: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        """Applies the final norm."""
        return self.body.norm(tokens)

    def add_prefix(self, first: int, count: int) -> None:
        """Declares `count` further tokens before the patches in all blocks from `first` on; they are not rotated."""
        if self.rotary is not None:
            for layer in list(self.body.blocks)[first:]:
                layer.attn.num_prefix_tokens += count


def _build(spec: Backbone, in_channels: int, use: Use) -> ViT:
    if isinstance(spec.heads, (list, tuple)):
        raise UsageError("backbone.heads of a plain vision transformer must be an integer")
    own = {"embed_dim": spec.width, "depth": spec.depth, "num_heads": spec.heads}
    return ViT(
        spec.name, patch=use.patch or 16, size=use.size or 640, in_channels=in_channels, pretrained=spec.pretrained,
        own={name: value for name, value in own.items() if value is not None}, eps=spec.norm_eps,
    )  # fmt: skip


def _levels(spec: Backbone, use: Use) -> Levels:
    width = spec.width
    if width is None:
        with torch.device("meta"):
            width = ViT(spec.name, patch=use.patch or 16, size=use.size or 640).width
    return Levels((width,), (use.patch or 16,))


FAMILY = Family(
    names=("vit_NAME",),
    options=frozenset(("pretrained", "width", "depth", "heads", "norm_eps")),
    levels=_levels,
    build=_build,
    matches=lambda name: name.startswith("vit_"),
)
