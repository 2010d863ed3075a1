"""Normalisation layers, and convolutions with their normalisation and activation as one block."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from maskwright.errors import UsageError
from maskwright.ops.deformable import deform_conv

Norm = Literal["none", "frozen", "still", "batch", "group"]
Border = Literal["zeros", "symmetric", "reflect"]


# ---- normalisation ---------------------------------------------------------------------------------------------------


class FrozenBatchNorm(nn.Module):
    """Batch normalisation whose statistics and affine part are buffers: x * scale + shift, without parameters.

    Args:
        channels: Number of channels.
        eps: Added to the variance; may be 0.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        # As in detectron2, torch's own batch norm is used where no gradient is needed. It does not accept eps = 0.
        self.fused = eps > 0
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def affine(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """Scale and shift of each channel."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns the normalised map, in the dtype of the input."""
        if self.fused and not x.requires_grad:
            return functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
            )
        scale, shift = self.affine()
        return x * scale.to(x.dtype)[:, None, None] + shift.to(x.dtype)[:, None, None]

    def forward_(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """`forward`, in place where possible."""
        if self.fused and not x.requires_grad:
            return self(x)
        scale, shift = (v.to(x.dtype)[:, None, None] for v in self.affine())
        return x.mul_(scale).add_(shift)


class StillBatchNorm(FrozenBatchNorm):
    """Batch normalisation with fixed statistics and a trained affine part (`norm_eval` in MMDetection)."""

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__(channels, eps)
        for name in ("weight", "bias"):
            value = self._buffers.pop(name)
            assert value is not None
            self.register_parameter(name, nn.Parameter(value))


class GroupNorm(nn.GroupNorm):
    """`torch.nn.GroupNorm` that also accepts groups of a single value (one channel per group, on a map of one cell).

    The result is then the bias. Torch raises an error for a single image, in evaluation mode too, and returns the bias
    up to rounding for a batch.
    """

    def forward(self, input: Float[Tensor, "b c *n"]) -> Float[Tensor, "b c *n"]:
        """Returns the normalised values."""
        if math.prod(input.shape[1:]) != self.num_groups:
            return super().forward(input)
        # A value minus its mean, which is the value itself, is zero, and so are the gradients of value and scale.
        # `torch.group_norm` does not check sizes.
        return torch.group_norm(input - input, self.num_groups, self.weight, self.bias, self.eps)


class LayerNorm2d(nn.LayerNorm):
    """Normalises the channels of each cell of a map (B, C, H, W)."""

    def __init__(self, channels: int, eps: float = 1e-6):
        super().__init__(channels, eps)  # pyright: ignore[reportUnknownMemberType] - not typed by torch

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Returns the normalised map."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def make_norm(kind: Norm, channels: int, eps: float = 1e-5) -> nn.Module:
    """Constructs a normalisation layer.

    Args:
        kind: "batch"; "frozen" (statistics and affine part are fixed); "still" (statistics are fixed); "group" with 32
            groups (Group Normalization, arXiv 1803.08494), or 8 or 1 if 32 does not divide the channels; "none".
        channels: Number of channels.
        eps: Added to the variance; 0 is accepted by "frozen" and "still".

    Raises:
        UsageError: If `eps` or `kind` is invalid.
    """
    if not eps >= 0:
        raise UsageError(f"norm_eps must be at least 0, got {eps}")
    if kind == "none":
        return nn.Identity()
    if kind == "frozen":
        return FrozenBatchNorm(channels, eps)
    if kind == "still":
        return StillBatchNorm(channels, eps)
    if kind == "batch":
        if eps == 0:
            raise UsageError(
                "norm_eps must be above 0 with norm='batch', for example 1e-5; norm='frozen' and 'still' accept 0"
            )
        return nn.BatchNorm2d(channels, eps)
    if kind == "group":
        return GroupNorm(32 if channels % 32 == 0 else 8 if channels % 8 == 0 else 1, channels, eps)
    raise UsageError(f"norm must be one of 'none', 'frozen', 'still', 'batch', 'group', got {kind!r}")


# ---- convolutions ----------------------------------------------------------------------------------------------------


class ConvNorm(nn.Module):
    """A convolution, then normalisation, then optionally an activation.

    Args:
        channels_in: Input channels.
        channels: Output channels.
        kernel: Side of the kernel; the padding keeps the size at stride 1.
        stride: Stride.
        dilation: Dilation.
        groups: Groups of the convolution.
        norm: Normalisation, see `make_norm`.
        eps: Epsilon of the normalisation.
        relu: Whether ReLU follows.
        leaky: Negative slope of LeakyReLU, which then follows instead; 0 for none.
        bias: Whether the convolution has a bias; None: only without normalisation.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        norm: Norm = "none",
        eps: float = 1e-5,
        relu: bool = False,
        leaky: float = 0.0,
        bias: bool | None = None,
    ):
        super().__init__()
        padding = dilation * (kernel // 2)
        biased = norm == "none" if bias is None else bias
        self.conv = nn.Conv2d(channels_in, channels, kernel, stride, padding, dilation, groups, bias=biased)
        self.norm = make_norm(norm, channels, eps)
        self.relu, self.leaky = relu, leaky
        self.border: Border = "zeros"  # see `set_border`
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Applies the convolution, the normalisation and the activation."""
        # A frozen norm is not folded into the weights here: that is no faster, and it rounds differently from the
        # original implementations, which flips decisions deep in a network (a ReLU at 0, a cell at a threshold).
        if self.border == "zeros":
            x = self.conv(x)
        else:
            conv, around = self.conv, self.conv.padding[0]
            x = pad_mirrored(x, int(around), self.border)
            x = functional.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)
        x = self.norm.forward_(x) if type(self.norm) is FrozenBatchNorm else self.norm(x)
        if self.leaky:
            return functional.leaky_relu(x, self.leaky, inplace=True)
        return functional.relu(x, inplace=True) if self.relu else x


def pad_mirrored(x: Float[Tensor, "b c h w"], around: int, border: Border) -> Float[Tensor, "b c _h _w"]:
    """Pads a map by mirroring it.

    Args:
        x: Map.
        around: Rows and columns to add on each side.
        border: "symmetric" repeats the outermost cells (cba|abc), "reflect" does not (dcb|abcd).
    """
    if border == "reflect":
        return functional.pad(x, (around,) * 4, mode="reflect")
    if around == 1:
        return functional.pad(x, (1,) * 4, mode="replicate")
    for axis in (2, 3):
        length = x.shape[axis]
        before, after = x.narrow(axis, 0, around), x.narrow(axis, length - around, around)
        x = torch.cat([before.flip(axis), x, after.flip(axis)], axis)
    return x


def set_border(module: nn.Module, border: Border) -> None:
    """Sets how the 3 x 3 `ConvNorm` blocks inside a module pad: as networks of Torch 7 do, and a port of them.

    Args:
        module: Any module.
        border: See `pad_mirrored`; "zeros" is ordinary padding. Larger kernels pad "symmetric" unless it is "zeros".
    """
    for block in module.modules():
        if isinstance(block, ConvNorm) and block.conv.padding != (0, 0):
            large = block.conv.kernel_size[0] > 3
            block.border = "symmetric" if large and border != "zeros" else border


class DeformConvNorm(nn.Module):
    """A deformable convolution (arXiv 1703.06211; modulated: 1811.11168) with its offset branch and normalisation.

    The offset branch predicts (dy, dx) of each tap, row by row, group by group, then with `modulated` the logits of
    their weights. It starts from zeros.

    Args:
        channels_in: Input channels.
        channels: Output channels.
        kernel: Side of the kernel; the padding keeps the size at stride 1.
        stride: Stride.
        dilation: Dilation.
        groups: Groups of the convolution.
        modulated: Whether taps are weighted.
        norm: Normalisation, see `make_norm`.
        eps: Epsilon of the normalisation.
        relu: Whether ReLU follows.
        bias: Whether the convolution has a bias; the offset branch always has one.
        offset_groups: Groups of input channels with offsets (and weights) of their own.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        modulated: bool = False,
        norm: Norm = "frozen",
        eps: float = 1e-5,
        relu: bool = False,
        bias: bool = False,
        offset_groups: int = 1,
    ):
        super().__init__()
        if offset_groups < 1 or channels_in % offset_groups:
            raise UsageError(f"offset_groups must divide the {channels_in} input channels, got {offset_groups}")
        self.relu, self.taps = relu, offset_groups * kernel * kernel
        self.stride, self.dilation = (stride, stride), (dilation, dilation)
        pad = dilation * (kernel // 2)
        self.padding = (pad, pad)
        values = (3 if modulated else 2) * self.taps
        self.offset = nn.Conv2d(channels_in, values, kernel, stride, pad, dilation)
        self.weight = nn.Parameter(torch.empty(channels, channels_in // groups, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(channels)) if bias else None
        self.norm = make_norm(norm, channels, eps)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d _h _w"]:
        """Predicts offsets (and modulation) and applies the convolution and the normalisation."""
        offset, mask = self.offset(x), None
        if offset.shape[1] == 3 * self.taps:
            offset, mask = offset[:, : 2 * self.taps], offset[:, 2 * self.taps :].sigmoid()
        y = deform_conv(
            x, offset, self.weight, self.bias, mask, stride=self.stride, padding=self.padding, dilation=self.dilation
        )
        y = self.norm(y)
        return functional.relu(y, inplace=True) if self.relu else y
