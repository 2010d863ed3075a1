"""Preparing a system for inference: normalisation folded into convolutions, memory format, precision, compilation."""

from __future__ import annotations

import copy
import itertools
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from maskwright.blocks.layers import DeformConvNorm, FrozenBatchNorm, StillBatchNorm
from maskwright.checkpoints.exported import parts_of, runtime_of
from maskwright.errors import UsageError
from maskwright.ops.precision import has_bfloat16
from maskwright.systems import System
from maskwright.systems.kinds.promptable import PromptableSystem

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prepare(
    system: System,
    device: torch.device | str | None = None,
    dtype: str = "float32",
    compile: bool | Literal["frozen"] = False,
) -> System:
    """Prepares a copy of `system` for inference; the original is not changed. Call it once, then `predict` many times.

    Batch norms that follow a convolution are folded into it (computed in float64), weights are laid out channels-last,
    and nothing requires a gradient. `predict` and `evaluate` call this themselves; a prepared system is returned as it
    is.

    Args:
        system: The system.
        device: Where to compute; None: a GPU if there is one, otherwise the CPU.
        dtype: Type of weights and activations: "float32", "bfloat16", "float16", or "auto": bfloat16 where the
            processor has instructions for it, otherwise float32. Boxes, scores and masks are always computed in
            float32.
        compile: Compile each of `system.networks()` with `torch.compile`: the first image of each size takes long, the
            following ones less. "frozen": with the weights as constants, which are laid out for the processor: a
            quarter faster on CPUs, and several times slower at the first image of each size.

    Returns:
        The prepared copy.

    Raises:
        UsageError: If the device is not available or the dtype is not one of the three.
    """
    place = chosen_device(device, system)
    dtype = chosen_dtype(dtype, place, system)
    kind = precision(dtype)
    if compile not in (True, False, "frozen"):
        raise UsageError(f"compile must be True, False or 'frozen', got {compile!r}")
    if is_prepared(system, place, dtype, compile):
        return system
    if (runtime := runtime_of(system)) is not None:
        if compile:
            raise UsageError(f"compile does not apply to an exported system, which {runtime.name} has compiled")
        runtime.prepare([part.name for part in parts_of(system)], dtype)
        return system
    ready = copy.deepcopy(system).eval().requires_grad_(False)
    if isinstance(system, PromptableSystem) and isinstance(ready, PromptableSystem):
        ready.pin_fingerprint(system.fingerprint)  # embeddings of the two are interchangeable
    fold(ready)
    # Tables that are not part of the checkpoint (anchors, positions) hold pixels, which bfloat16 cannot represent.
    for module in ready.modules():
        for name, value in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            setattr(module, name, nn.Parameter(_converted(value.detach(), kind), requires_grad=False))
        tables = module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage] - nothing public lists them
        for name, value in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            if name not in tables:
                setattr(module, name, _converted(value, kind))
    ready.to(place)
    ready.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if compile:
        for network in ready.networks().values():
            # The bound method rather than the module, so that hooks (measuring time) stay outside of what is compiled.
            options: dict[str, Any] | None = {"freezing": True} if compile == "frozen" else None
            network.forward = cast(Any, torch.compile)(network.forward, options=options)
    ready.__dict__["_prepared"] = (str(place), dtype, compile)
    return ready


def fold(module: nn.Module) -> int:
    """Folds every batch norm into the convolution before it, in place.

    Covers blocks with a `conv` followed by a `norm`, deformable blocks, and neighbours in a `Sequential`. Norms whose
    statistics depend on the image, such as group norm, are not changed. The module must be in eval mode.

    Returns:
        The number of norms folded.
    """
    count = 0
    for child in module.modules():
        if isinstance(child, nn.Sequential):
            for first, second in itertools.pairwise(range(len(child))):
                conv, norm = child[first], child[second]
                if _follows(norm, conv):
                    _fold_into(conv, norm)
                    child[second] = nn.Identity()
                    count += 1
            continue
        names = list(child._modules)  # pyright: ignore[reportPrivateUsage] - named_children omits second names
        order = [name for name in names if name in ("conv", "norm")]
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


def chosen_device(device: torch.device | str | None, system: System | None = None) -> torch.device:
    """The device of this name; None or "auto": a GPU if there is one, otherwise the CPU.

    Args:
        device: Its name.
        system: What it will compute. An exported system, whose runtime computes on the CPU, takes no other device.

    Raises:
        UsageError: If there is no such device, or `system` cannot be computed on it.
    """
    if system is not None and runtime_of(system) is not None:
        if device not in (None, "auto") and str(device).partition(":")[0] != "cpu":
            raise UsageError(f"an exported system computes on the CPU, not on {str(device)!r}; use 'cpu'")
        return torch.device("cpu")
    if device is None or device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise UsageError(f"there is no device {device!r}; expected auto, cpu, cuda, cuda:1, mps, ...") from None
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}.get(place.type, lambda: True)()
    if not there or (place.type == "cuda" and (place.index or 0) >= torch.cuda.device_count()):
        raise UsageError(f"device {str(place)!r} is not available (or torch was built without it); use cpu")
    return place


def precision(dtype: str) -> torch.dtype:
    """The torch type of this name; UsageError if there is none."""
    if dtype not in PRECISIONS:
        raise UsageError(f"dtype must be one of {', '.join(map(repr, PRECISIONS))}, got {dtype!r}")
    return PRECISIONS[dtype]


def chosen_dtype(dtype: str, device: torch.device, system: System | None = None) -> str:
    """The dtype of this name; for "auto" bfloat16 where `device` computes it faster than float32.

    Args:
        dtype: Its name.
        device: Where to compute.
        system: What it will compute. "auto" is float32 for an exported system whose runtime has nothing else.

    Raises:
        UsageError: If there is no such dtype.
    """
    runtime = None if system is None else runtime_of(system)
    if dtype == "auto" and runtime is not None and "bfloat16" not in runtime.precisions:
        return "float32"
    if dtype == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    precision(dtype)
    return dtype


def is_prepared(system: System, device: torch.device, dtype: str, compile: bool | Literal["frozen"]) -> bool:
    """Whether `system` was returned by `prepare` with the same choices."""
    return system.__dict__.get("_prepared") == (str(device), dtype, compile)


def _converted(value: Tensor, kind: torch.dtype) -> Tensor:
    return value.to(kind) if value.is_floating_point() else value


def _follows(norm: Any, conv: Any) -> bool:
    """Whether `norm` is a batch norm over the output of `conv`. Subclasses are kept: they may do more."""
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
