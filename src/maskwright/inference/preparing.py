"""A system made ready to be used: norms folded into convolutions, memory laid out for the device, precision chosen."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor, nn

from maskwright.blocks.layers import DeformConvNorm, FrozenBatchNorm, StillBatchNorm
from maskwright.errors import UsageError
from maskwright.structures import Batch
from maskwright.systems import System

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prepare(
    system: System, device: torch.device | str | None = None, dtype: str = "float32", compile: bool = False
) -> System:
    """A copy of `system` for inference; the original stays as it is. Call it once, then `predict` many times.

    device   where to compute; None: a GPU where there is one, else the CPU
    dtype    of the network's weights and activations: "float32", "bfloat16", "float16". Boxes, scores and masks are
             always made in float32
    compile  `torch.compile` the network: the first image of each size takes long, the next ones less

    Batch norms that follow their convolution are folded into it (in float64, so that nothing is lost), weights are
    laid out channels last, nothing needs a gradient. `predict` and `evaluate` do this by themselves; a system that was
    prepared already is taken as it is.
    """
    place, kind = chosen_device(device), precision(dtype)
    if is_prepared(system, place, dtype, compile):
        return system
    ready = copy.deepcopy(system).eval().requires_grad_(False)
    fold(ready)
    # Tables that are no part of the checkpoint (anchors, positions) count pixels: bfloat16 has no digits for them.
    for module in ready.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(_converted(value.detach(), kind), requires_grad=False)
        for name, value in module._buffers.items():
            if value is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = _converted(value, kind)
    ready.to(place)
    ready.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if compile:
        ready.compile()
    ready.__dict__["_prepared"] = (str(place), dtype, compile)
    return ready


def fold(module: nn.Module) -> int:
    """Folds, in place, every batch norm into the convolution before it, and says how many.

    Known are blocks with a `conv` and then a `norm`, our deformable ones, and neighbours in a `Sequential`. Group norm
    and the like depend on the image and stay. The module must be in eval mode.
    """
    count = 0
    for child in module.modules():
        if isinstance(child, nn.Sequential):
            names = list(child._modules)
            for first, second in itertools.pairwise(names):
                conv, norm = child._modules[first], child._modules[second]
                if _follows(norm, conv):
                    _fold_into(conv, norm)
                    child._modules[second] = nn.Identity()
                    count += 1
            continue
        order = [name for name in child._modules if name in ("conv", "norm")]
        if order == ["conv", "norm"] and _follows(child.norm, child.conv):
            _fold_into(child.conv, child.norm)
            child.norm = nn.Identity()
            count += 1
        elif isinstance(child, DeformConvNorm) and isinstance(child.norm, (nn.BatchNorm2d, FrozenBatchNorm)):
            scale, shift = _affine(child.norm)
            weight = child.weight
            if child.bias is not None:
                shift = shift + child.bias.double() * scale
            weight.data = (weight.double() * scale[:, None, None, None]).to(weight.dtype)
            child.bias = nn.Parameter(shift.to(weight.dtype), requires_grad=False)
            child.norm = nn.Identity()
            count += 1
    return count


def chosen_device(device: torch.device | str | None) -> torch.device:
    """The device of this name; None: a GPU where there is one, else the CPU. UsageError where it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageError(f"there is no device {device!r}; expected cpu, cuda, cuda:1, mps, ...") from None
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(place.type, lambda: True)()
    if not there or (place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"the device {str(place)!r} is not there (or torch was built without it); use cpu")
    return place


def precision(dtype: str) -> torch.dtype:
    """The torch type of this name."""
    if dtype not in PRECISIONS:
        raise UsageError(f"dtype is {dtype!r}; expected {', '.join(PRECISIONS)}")
    return PRECISIONS[dtype]


def is_prepared(system: System, device: torch.device, dtype: str, compile: bool) -> bool:
    """Whether `system` came out of `prepare` with these very choices."""
    return system.__dict__.get("_prepared") == (str(device), dtype, compile)


def run_network(system: System, batch: Batch, device: torch.device, dtype: torch.dtype) -> Any:
    """The raw output for a batch that lies on the host in float32."""
    images = batch.images.to(device, non_blocking=True).to(dtype=dtype, memory_format=torch.channels_last)
    return system(*system.inputs(images, [placement.size for placement in batch.placements]))


def _converted(value: Tensor, kind: torch.dtype) -> Tensor:
    return value.to(kind) if value.is_floating_point() else value


def _follows(norm: Any, conv: Any) -> bool:
    """Whether `norm` is a batch norm for what `conv` gives. Subclasses may do more than normalise, and are left."""
    if not isinstance(conv, nn.Conv2d) or type(norm) not in (
        nn.BatchNorm2d,
        nn.SyncBatchNorm,
        FrozenBatchNorm,
        StillBatchNorm,
    ):
        return False
    return norm.running_mean is not None and len(norm.running_mean) == conv.out_channels


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale.detach(), (shift if norm.bias is None else shift + norm.bias.double()).detach()


def _fold_into(conv: Any, norm: Any) -> None:
    scale, shift = _affine(norm)
    weight = conv.weight
    if conv.bias is not None:
        shift = shift + conv.bias.double() * scale
    conv.weight = nn.Parameter((weight.double() * scale[:, None, None, None]).to(weight.dtype), requires_grad=False)
    conv.bias = nn.Parameter(shift.to(weight.dtype).detach(), requires_grad=False)
