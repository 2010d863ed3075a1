"""Backbones of timm: convolutional networks and hierarchical transformers with strides 4 to 32."""

from __future__ import annotations

from functools import cache
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from maskwright.blocks.backbones import Backbone, Family, Levels, Use, freeze
from maskwright.errors import MissingExtraError, UsageError

STRIDES = (4, 8, 16, 32)


class TimmBackbone(nn.Module):
    """A network of timm's, which returns the levels of strides 4, 8, 16 and 32.

    Args:
        name: Name of a model of timm.
        in_channels: Channels of the image.
        pretrained: Whether to download the published weights.
        frozen: Number of parts (stem, stages) that are not trained; nor do their batch norms' statistics change.
        deepest: Stride of the last level; later layers are removed.

    Attributes:
        body: The network of timm.
        channels: Channels of the levels.
        strides: Strides of the levels.
        removed: Names of the layers after the last level that were removed; files of earlier versions have them.

    Raises:
        UsageError: If timm has no such model, or it has other strides.
        MissingExtraError: If timm is not installed.
    """

    def __init__(
        self, name: str, *, in_channels: int = 3, pretrained: bool = False, frozen: int = 0, deepest: int = 32
    ):
        super().__init__()
        indices, modules, levels = _published(name, deepest)
        self.body = _create(name, pretrained=pretrained, in_chans=in_channels, out_indices=indices)
        self.channels, self.strides = list(levels.channels), list(levels.strides)
        self.channels_last = getattr(self.body, "output_fmt", "NCHW") == "NHWC"
        self._frozen: list[nn.Module] = []
        before = [name for name, _ in self.named_modules()]
        parts = _parts(self.body, modules)
        left = {name for name, _ in self.named_modules()}
        self.removed: tuple[str, ...] = tuple(name for name in before if name not in left)
        if frozen:
            if parts is None:
                raise UsageError(f"timm's {name!r} has no stages that could be frozen; use frozen=0")
            freeze(parts, frozen)
            self._frozen = parts[:frozen]

    def forward(self, x: Float[Tensor, "b c h w"]) -> list[Tensor]:
        """Returns the levels, finest first, as (B, C, H, W)."""
        outputs = list(self.body(x))
        return [y.permute(0, 3, 1, 2) for y in outputs] if self.channels_last else outputs

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for part in self._frozen:
            for module in part.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def _create(name: str, **options: Any) -> Any:
    """A network of timm's that returns its levels."""
    try:
        import timm
    except ImportError:
        raise MissingExtraError("timm", "timm") from None
    if not timm.is_model(name):  # "hf-hub:" and "local-dir:" would read from the network or a folder
        raise UsageError(f"there is no model {name!r} in timm's registry")
    try:
        return timm.create_model(name, features_only=True, **options)
    except (RuntimeError, AttributeError, ValueError) as error:
        raise UsageError(f"timm cannot build {name!r} as a feature pyramid: {error}") from None


@cache
def _published(name: str, deepest: int) -> tuple[list[int], list[str], Levels]:
    """Which of the network's levels are needed, the names of the modules that they come from, and the levels."""
    with torch.device("meta"):
        info: Any = _create(name).feature_info
    strides = tuple(info.reduction())
    indices = [index for index, stride in enumerate(strides) if stride in STRIDES and stride <= deepest]
    if tuple(stride for stride in strides if stride in STRIDES) != STRIDES:
        raise UsageError(f"timm's {name!r} has levels of strides {strides}; strides 4, 8, 16 and 32 are needed")
    channels, modules = info.channels(), info.module_name()
    levels = Levels(tuple(channels[i] for i in indices), tuple(strides[i] for i in indices))
    return indices, [modules[i] for i in indices], levels


def _parts(body: nn.Module, modules: list[str]) -> list[nn.Module] | None:
    """The stem and the stages, without the layers after the last stage. None if their boundaries are unknown.

    Args:
        body: The network.
        modules: The names of the modules that the levels come from.
    """
    inner = getattr(body, "model", None)
    root = inner if isinstance(inner, nn.Module) else body
    units: list[tuple[str, nn.Module, nn.Module]] = []  # name, module, parent
    for name, child in root.named_children():
        if any(module.startswith(f"{name}.") for module in modules):
            units.extend((f"{name}.{key}", own, child) for key, own in child.named_children())
        else:
            units.append((name, child, root))
    names = [name.replace(".", "_") for name, _, _ in units]
    ends = [names.index(module.replace(".", "_")) for module in modules if module.replace(".", "_") in names]
    if len(ends) < len(modules):
        return None
    for name, _, parent in units[ends[-1] + 1 :]:  # timm leaves them in some networks, where they have no gradients
        if isinstance(parent, nn.Sequential):
            delattr(parent, name.rpartition(".")[2])
    borders = [0, ends[0], *(end + 1 for end in ends)]
    return [nn.ModuleList(own for _, own, _ in units[a:b]) for a, b in pairwise(borders)]


def _build(spec: Backbone, in_channels: int, use: Use) -> TimmBackbone:
    return TimmBackbone(
        spec.name.removeprefix("timm:"), in_channels=in_channels, pretrained=spec.pretrained, frozen=spec.frozen,
        deepest=use.deepest,
    )  # fmt: skip


def _levels(spec: Backbone, use: Use) -> Levels:
    return _published(spec.name.removeprefix("timm:"), use.deepest)[2]


FAMILY = Family(
    names=("timm:",),
    options=frozenset(("pretrained", "frozen")),
    levels=_levels,
    build=_build,
    deepest=STRIDES,
)
