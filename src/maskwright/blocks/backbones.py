"""Backbones by name: the option group, and the registry.

A backbone is one file with a `FAMILY` and one line in `FAMILIES`. Its module gives a list of feature maps, finest
first, and has their channels and strides as the attributes `channels` and `strides`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, Self

from torch import nn

from maskwright.blocks.layers import Norm
from maskwright.errors import UsageError
from maskwright.options import OptionGroup

# Modules of this package with a `FAMILY`, in the order in which error messages name them.
FAMILIES = ("resnet", "swin", "vgg", "darknet", "dla", "timm_backbone", "vit")

StrideIn = Literal["1x1", "3x3"]


@dataclass(frozen=True)
class Backbone(OptionGroup):
    """The network that computes features of an image, as options of a system.

    A family uses some of these fields (`Family.options`); setting another one is an error.

    Attributes:
        name: "resnet18" ... "resnet152", "swin-tiny" ... "swin-large", "vgg11" ... "vgg19", "darknet53",
            "darknet-tiny", "dla34", "timm:NAME" for any model of timm with strides 4 to 32, or the name of one of
            timm's plain vision transformers where a system is built on one.
        pretrained: Download timm's published weights. Other backbones start from random weights.
        width: Channels after the stem, with which all stages scale; None is the published number.
        depth: Number of blocks, of a plain vision transformer.
        depths: Number of blocks of each stage, of a Swin Transformer.
        heads: Attention heads: of each stage, or of each block of a plain vision transformer.
        window: Side of the attention window of a Swin Transformer, in patches.
        drop_path: Stochastic depth of the last block of a Swin Transformer (arXiv 1603.09382).
        norm: Normalisation layers: "group" trains from random weights and with small batches; "frozen" (statistics and
            affine fixed) and "still" (statistics fixed) are what most published weights have; "batch"; "none".
        norm_eps: Epsilon of the normalisation.
        frozen: Number of parts that are not trained, counted from the stem.
        groups: Groups of the 3 x 3 convolutions (ResNeXt, arXiv 1611.05431).
        group_width: Channels of each group in the first stage.
        stride_in: The convolution of a bottleneck that strides: "1x1" (Caffe's models) or "3x3" (torchvision's).
        deform_stages: Stages (0 ... 3) whose 3 x 3 convolutions are deformable (arXiv 1703.06211).
        deform_modulated: Whether these are modulated (arXiv 1811.11168).
        deform_every: They are every `deform_every`-th block of a stage.
        deform_groups: Offset groups of each deformable convolution.
    """

    label: ClassVar[str] = "backbone"
    shorthand: ClassVar[str | None] = "name"

    name: str = "resnet50"
    pretrained: bool = False
    width: int | None = None
    depth: int | None = None
    depths: Sequence[int] | None = None
    heads: int | Sequence[int] | None = None
    window: int | None = None
    drop_path: float = 0.0
    norm: Norm = "group"
    norm_eps: float | None = None
    frozen: int = 0
    groups: int = 1
    group_width: int = 64
    stride_in: StrideIn = "3x3"
    deform_stages: Sequence[int] = ()
    deform_modulated: bool = False
    deform_every: int = 1
    deform_groups: int = 1

    def changed(self, values: Mapping[str, Any]) -> Self:
        name = values.get("name", self.name)
        if isinstance(name, str):
            used = family_of(name).options
            for field, value in values.items():
                if field != "name" and field not in used and value != _DEFAULTS.get(field):
                    known = ", ".join(sorted(used))
                    raise UsageError(f"backbone {name!r} has no option {field!r}; its options are {known}")
            values = {**_dropped(self.name, name), **values}
        return super().changed(values)

    @classmethod
    def merged(cls, before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        old, new = before.get("name"), changes.get("name")
        if isinstance(old, str) and isinstance(new, str):
            dropped = _dropped(old, new)
            before = {field: value for field, value in before.items() if field not in dropped}
        return {**before, **changes}

    def to_options(self) -> dict[str, Any]:
        used = family_of(self.name).options
        return {name: value for name, value in super().to_options().items() if name == "name" or name in used}

    @property
    def eps(self) -> float:
        """Epsilon of the normalisation; 1e-5 unless set."""
        return 1e-5 if self.norm_eps is None else self.norm_eps

    def levels(self, use: Use | None = None) -> Levels:
        """Channels and strides of the feature maps, without constructing the network where they are known as data."""
        return family_of(self.name).levels(self, use or Use())

    def build(self, in_channels: int = 3, use: Use | None = None) -> nn.Module:
        """Constructs the network.

        Args:
            in_channels: Channels of the image.
            use: What the system needs beyond the options.

        Returns:
            A module from images (B, C, H, W) to a list of feature maps, finest first; it has `channels` and `strides`.

        Raises:
            UsageError: If the options contradict each other, or the backbone cannot be used in this way.
        """
        if in_channels < 1:
            raise UsageError(f"in_channels must be at least 1, got {in_channels}")
        if self.frozen < 0:
            raise UsageError(f"backbone.frozen must be at least 0, got {self.frozen}")
        if self.width is not None and self.width < 1:
            raise UsageError(f"backbone.width must be at least 1, got {self.width}")
        try:
            return family_of(self.name).build(self, in_channels, use or Use())
        except ValueError as error:
            raise UsageError(str(error)) from None


_DEFAULTS = {field.name: field.default for field in fields(Backbone)}
_COMMON = ("name", "pretrained", "norm", "norm_eps", "frozen")  # what means the same in every family


def _dropped(before: str, after: str) -> dict[str, Any]:
    """The fields, with their defaults, that a change of the name resets: those set for an architecture that is gone."""
    old, new = family_of(before), family_of(after)
    return {
        field: value for field, value in _DEFAULTS.items()
        if field != "name" and (field not in new.options or (old is not new and field not in _COMMON))
    }  # fmt: skip


BackboneLike = str | Mapping[str, Any] | Backbone


@dataclass(frozen=True)
class Use:
    """How a system uses a backbone, beyond what is an option.

    Attributes:
        deepest: Stride of the last level that is needed; what comes after it is left out.
        dilated: The last stage is dilated instead of strided.
        dilate_first: Whether the first block of a dilated stage is dilated too (detectron2) or not (torchvision).
        deform_bias: Whether deformable convolutions have a bias.
        size: Side of the input that tables of positions are made for, of a vision transformer, in pixels.
        patch: Side of a patch of a plain vision transformer, in pixels.
    """

    deepest: int = 32
    dilated: bool = False
    dilate_first: bool = True
    deform_bias: bool = False
    size: int | None = None
    patch: int | None = None


class Levels(NamedTuple):
    """Feature maps of a backbone, finest first."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]


class Family(NamedTuple):
    """Backbones of one file.

    Attributes:
        names: The names, for messages; a name that ends in ":" is a prefix.
        options: The fields of `Backbone` that apply.
        levels: From options and use to channels and strides.
        build: From options, channels of the image and use to the network; a ValueError says what does not fit.
        matches: Whether a name belongs to the family; default: it is one of `names`.
    """

    names: tuple[str, ...]
    options: frozenset[str]
    levels: Callable[[Backbone, Use], Levels]
    build: Callable[[Backbone, int, Use], nn.Module]
    matches: Callable[[str], bool] | None = None

    def has(self, name: str) -> bool:
        """Whether a backbone of this name belongs to the family."""
        if self.matches is not None:
            return self.matches(name)
        return name in self.names or any(
            n.endswith(":") and name.startswith(n) and len(name) > len(n) for n in self.names
        )


def family_of(name: str) -> Family:
    """The family of the backbone called `name`; UsageError if there is none."""
    every = [import_module(f"maskwright.blocks.{module}").FAMILY for module in FAMILIES]
    for family in every:
        if family.has(name):
            return family
    known = [n + ("NAME" if n.endswith(":") else "") for family in every for n in family.names]
    from difflib import get_close_matches

    close = get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"there is no backbone {name!r}{hint}; known are {', '.join(known)}")


def names() -> list[str]:
    """The names of all backbones; one that ends in ":" is a prefix."""
    return [n for module in FAMILIES for n in import_module(f"maskwright.blocks.{module}").FAMILY.names]


def first_weight(backbone: nn.Module) -> str | None:
    """The name, inside the backbone, of the weight that reads the image: its first convolution's."""
    return next((name for name, value in backbone.named_parameters() if value.ndim == 4), None)


def freeze(parts: Sequence[nn.Module]) -> None:
    """Excludes the parameters of `parts` from training."""
    for part in parts:
        for parameter in part.parameters():
            parameter.requires_grad_(False)
