"""Backbones by name: the option group, and the registry.

A backbone is one file with a `FAMILY` and one line in `FAMILIES`. Its module maps images (B, C, H, W) to a list of
feature maps, finest first, and has their channels and strides as the attributes `channels` and `strides`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from importlib import import_module
from typing import Any, ClassVar, Literal, NamedTuple, Self, cast

from torch import nn

from maskwright.blocks.layers import Norm
from maskwright.errors import UsageError
from maskwright.options import OptionGroup

# Modules of this package with a `FAMILY`, in the order in which error messages list them.
FAMILIES = ("resnet", "swin", "hiera", "vgg", "darknet", "dla", "vovnet", "mobilenet", "timm_backbone", "vit")

StrideIn = Literal["1x1", "3x3"]


# ---- options ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Backbone(OptionGroup):
    """The network that computes features of an image, as options of a system.

    A backbone uses some of these fields (`options_of`); setting another one is an error. A change of the name resets
    the fields that the new backbone does not have, and between families also those that describe an architecture, such
    as `width`.

    Attributes:
        name: "resnet18" ... "resnet152", "swin-tiny" ... "swin-large", "hiera-tiny" ... "hiera-large",
            "vgg11" ... "vgg19", "darknet53", "darknet-tiny", "dla34", "timm:NAME" for any model of timm with strides 4
            to 32, or the name of one of timm's plain vision transformers where a system is built on one.
        pretrained: Download timm's published weights. Other backbones start from random weights.
        width: Channels after the stem, with which all stages scale; None is the published number.
        depth: Number of blocks, of a plain vision transformer.
        depths: Number of blocks of each stage, of a Swin Transformer or Hiera.
        heads: Attention heads: of each stage, of the first stage of Hiera, or of each block of a plain vision
            transformer.
        window: Side of the attention window of a Swin Transformer, in patches.
        drop_path: Stochastic depth of the last block of a Swin Transformer or Hiera (arXiv 1603.09382).
        norm: Normalisation layers: "group" trains from random weights and with small batches; "frozen" (statistics and
            affine fixed) and "still" (statistics fixed) are what most published weights have; "batch"; "none".
        norm_eps: Epsilon of the normalisation; None is 1e-5, or timm's own.
        frozen: Number of parts that are not trained, counted from the stem; the statistics of their batch norms are
            fixed too.
        groups: Groups of the 3 x 3 convolutions (ResNeXt, arXiv 1611.05431).
        group_width: Channels of each group in the first stage.
        stride_in: The convolution of a bottleneck that strides: "1x1" (Caffe's models) or "3x3" (torchvision's).
        deform_stages: Stages (0 ... 3) whose 3 x 3 convolutions are deformable (arXiv 1703.06211). The three fields
            below have an effect on these only.
        deform_modulated: Whether these are modulated (arXiv 1811.11168).
        deform_every: They are every `deform_every`-th block of a stage, from the first on.
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

    def __post_init__(self) -> None:
        super().__post_init__()
        used = options_of(self.name)
        for field, default in _DEFAULTS.items():
            if field not in used and getattr(self, field) != default:
                known = ", ".join(name for name in _DEFAULTS if name in used)
                raise UsageError(f"backbone {self.name!r} has no option {field!r}; its options are {known}")
        for field in ("width", "depth", "depths", "heads", "window", "groups", "group_width", "deform_every",
                      "deform_groups"):  # fmt: skip
            self._check_range(field, 1)
        self._check_range("frozen", 0)
        self._check_range("deform_stages", 0, 3)
        if not 0 <= self.drop_path < 1:
            raise UsageError(f"backbone.drop_path must be at least 0 and below 1, got {self.drop_path}")
        if self.norm_eps is not None and not self.norm_eps >= 0:
            raise UsageError(f"backbone.norm_eps must be at least 0, got {self.norm_eps}")

    def _check_range(self, field: str, least: int, most: int | None = None) -> None:
        """Raises a UsageError if an integer, or one of a list of integers, is out of range; None is not."""
        value = getattr(self, field)
        for entry in value if isinstance(value, tuple) else () if value is None else (value,):
            if entry < least or (most is not None and entry > most):
                bounds = f"at least {least}" if most is None else f"between {least} and {most}"
                raise UsageError(f"backbone.{field} must be {bounds}, got {entry}")

    def changed(self, values: Mapping[str, Any]) -> Self:
        """A copy with other values; a new name resets the fields that do not apply to it."""
        name = values.get("name", self.name)
        if isinstance(name, str) and name != self.name:
            reset = _reset_fields(self.name, name)
            values = {**{field: default for field, default in _DEFAULTS.items() if field in reset}, **values}
        return super().changed(values)

    @classmethod
    def merged(cls, before: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
        """Merge options; a new name resets the fields that do not apply to it."""
        new = changes.get("name")
        if isinstance(new, str):
            old = before.get("name")
            reset = _reset_fields(old if isinstance(old, str) else None, new)
            before = {field: value for field, value in before.items() if field not in reset}
        return {**before, **changes}

    def to_options(self) -> dict[str, Any]:
        """The fields that the backbone has, as plain values."""
        used = options_of(self.name)
        return {name: value for name, value in super().to_options().items() if name == "name" or name in used}

    @property
    def eps(self) -> float:
        """Epsilon of the normalisation; 1e-5 unless set."""
        return 1e-5 if self.norm_eps is None else self.norm_eps

    def levels(self, use: Use | None = None) -> Levels:
        """Channels and strides of the feature maps, without constructing the network where they are known as data.

        Args:
            use: What the system needs beyond the options.

        Raises:
            UsageError: As `build`.
        """
        use = use or Use()
        return self._family_for(use).levels(self, use)

    def build(self, in_channels: int = 3, use: Use | None = None) -> nn.Module:
        """Constructs the network.

        Args:
            in_channels: Channels of the image.
            use: What the system needs beyond the options.

        Returns:
            A module from images (B, C, H, W) to a list of feature maps, finest first; `levels_of` reads its channels
            and strides.

        Raises:
            UsageError: If the options contradict each other, or the backbone cannot be used in this way.
        """
        if in_channels < 1:
            raise UsageError(f"in_channels must be at least 1, got {in_channels}")
        use = use or Use()
        try:
            return self._family_for(use).build(self, in_channels, use)
        except ValueError as error:
            raise UsageError(str(error)) from None

    def _family_for(self, use: Use) -> Family:
        """The family, if it can be used in this way."""
        family = family_of(self.name)
        if use.deepest not in family.deepest:
            strides = " or ".join(map(str, family.deepest))
            raise UsageError(
                f"backbone {self.name!r} ends at stride {strides}; one that ends at stride {use.deepest} is needed"
            )
        if use.dilated and not family.dilates:
            raise UsageError(f"backbone {self.name!r} has no dilated stages; a dilated backbone is needed")
        return family


BackboneLike = str | Mapping[str, Any] | Backbone

_DEFAULTS = {field.name: field.default for field in fields(Backbone) if field.name != "name"}
_COMMON = frozenset(("pretrained", "norm", "norm_eps", "frozen"))  # fields with the same meaning in every family


def _reset_fields(old: str | None, new: str) -> set[str]:
    """The fields that a change of the name resets; `old` is None if it is not known."""
    kept = options_of(new)
    if old is not None and family_of(old) is not family_of(new):
        kept = kept & _COMMON
    return {field for field in _DEFAULTS if field not in kept}


# ---- what a system needs, and what a backbone gives ------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """How a system uses a backbone, beyond what is an option.

    Attributes:
        deepest: Stride of the last level that is needed (before dilation); later levels are left out.
        dilated: Whether the last stage is dilated instead of strided.
        dilate_first: Whether the first block of a dilated stage is dilated too (detectron2) or not (torchvision).
        deform_bias: Whether deformable convolutions have a bias.
        caffe_pool: Whether the max pooling of a ResNet rounds sizes up and has no padding, as in Caffe and MXNet.
        size: Side of the input that tables of positions are made for, of a vision transformer, in pixels.
        patch: Side of a patch of a plain vision transformer, in pixels.
    """

    deepest: int = 32
    dilated: bool = False
    dilate_first: bool = True
    deform_bias: bool = False
    caffe_pool: bool = False
    size: int | None = None
    patch: int | None = None


class Levels(NamedTuple):
    """Feature maps of a backbone, finest first."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]

    def indices(self, strides: Sequence[int]) -> list[int]:
        """The positions of the levels with these strides.

        Raises:
            UsageError: If there is no level of one of them.
        """
        missing = [stride for stride in strides if stride not in self.strides]
        if missing:
            needed, present = (", ".join(map(str, own)) for own in (strides, self.strides))
            raise UsageError(f"a backbone with levels of strides {needed} is needed; this one has {present}")
        return [self.strides.index(stride) for stride in strides]


def levels_of(backbone: nn.Module) -> Levels:
    """Channels and strides of the feature maps of a constructed backbone."""
    module = cast(Any, backbone)
    return Levels(tuple(module.channels), tuple(module.strides))


def first_weight(backbone: nn.Module) -> str | None:
    """The name, inside the backbone, of the weight that reads the image: its first convolution's."""
    return next((name for name, value in backbone.named_parameters() if value.ndim == 4), None)


def freeze(parts: Sequence[nn.Module], count: int | None = None) -> None:
    """Excludes the parameters of the first `count` parts (default all) from training.

    Raises:
        UsageError: If there are fewer parts.
    """
    if count is not None and count > len(parts):
        raise UsageError(f"backbone.frozen must be at most {len(parts)}, the number of its parts, got {count}")
    for part in parts[:count]:
        for parameter in part.parameters():
            parameter.requires_grad_(False)


# ---- the registry ----------------------------------------------------------------------------------------------------


class Family(NamedTuple):
    """Backbones of one file.

    Attributes:
        names: The names, for messages; a name that ends in ":" is a prefix.
        options: The fields of `Backbone` that apply.
        levels: From options and use to channels and strides.
        build: From options, channels of the image and use to the network; a ValueError states what does not fit.
        matches: Whether a name belongs to the family; default: it is one of `names`.
        without: Fields among `options` that some of the names do not have.
        deepest: Strides (`Use.deepest`) at which the backbone can end.
        dilates: Whether its last stage can be dilated (`Use.dilated`).
    """

    names: tuple[str, ...]
    options: frozenset[str]
    levels: Callable[[Backbone, Use], Levels]
    build: Callable[[Backbone, int, Use], nn.Module]
    matches: Callable[[str], bool] | None = None
    without: Mapping[str, frozenset[str]] = {}
    deepest: tuple[int, ...] = (32,)
    dilates: bool = False

    def has(self, name: str) -> bool:
        """Whether a backbone of this name belongs to the family."""
        if self.matches is not None:
            return self.matches(name)
        return any(name.startswith(n) and name != n if n.endswith(":") else name == n for n in self.names)


def families() -> Iterator[Family]:
    """All families; each module is imported when the iteration reaches it."""
    for module in FAMILIES:
        yield import_module(f"maskwright.blocks.{module}").FAMILY


def family_of(name: str) -> Family:
    """The family of a backbone.

    Raises:
        UsageError: If there is no backbone of this name.
    """
    for family in families():
        if family.has(name):
            return family
    known = [n + "NAME" * n.endswith(":") for n in names()]
    close = get_close_matches(name, known, 1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"there is no backbone {name!r}{hint}; known are {', '.join(known)}")


def options_of(name: str) -> frozenset[str]:
    """The fields of `Backbone` that a backbone uses, besides the name; UsageError if there is no such backbone."""
    family = family_of(name)
    return family.options - family.without.get(name, frozenset())


def names() -> list[str]:
    """The names of all backbones; one that ends in ":" is a prefix."""
    return [name for family in families() for name in family.names]
