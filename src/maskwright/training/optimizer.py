"""Which parameters are trained, at which learning rate, and their running mean."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - no public base class
from torch.nn.modules.instancenorm import _InstanceNorm  # pyright: ignore[reportPrivateUsage] - likewise

from maskwright.errors import UsageError
from maskwright.systems import System
from maskwright.training.recipe import Recipe

_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _InstanceNorm)


def freeze(system: System, names: tuple[str, ...]) -> list[nn.Module]:
    """Excludes parts from training.

    Args:
        system: The system; changed in place.
        names: Parts (see `System.groups`) or globs of parameter names.

    Returns:
        The modules that must stay in evaluation mode: the running statistics of a batch normalisation that is not
        trained, whether named here or constructed frozen, must not change, or they drift away from its weights.

    Raises:
        UsageError: If a name matches nothing, or nothing is left to train.
    """
    for name in names:
        for parameter in _named(system, name, "freeze").values():
            parameter.requires_grad_(False)
    still: list[nn.Module] = []
    for module in system.modules():
        own = list(module.parameters(recurse=False))
        if isinstance(module, _BatchNorm) and own and not any(p.requires_grad for p in own):
            still.append(module)
    if not any(p.requires_grad for p in system.parameters()):
        raise UsageError(f"freeze={', '.join(names)} leaves nothing to train")
    return still


def build_optimizer(system: System, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD or AdamW over the trainable parameters.

    Each parameter group has `names` and `scale`, its factor on the learning rate.
    """
    scales: dict[str, float] = {}
    for part, scale in recipe.rates.items():
        scales.update(dict.fromkeys(_named(system, part, "rates"), scale))
    decays = _decays(system, recipe)
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in system.named_parameters():
        if parameter.requires_grad:
            key = (scales.get(name, 1.0), recipe.weight_decay if decays[name] else 0.0)
            group = groups.setdefault(key, {"params": [], "names": [], "scale": key[0], "weight_decay": key[1]})
            group["params"].append(parameter)
            group["names"].append(name)
    ordered = list(groups.values())
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(ordered, lr=recipe.learning_rate, momentum=recipe.momentum)
    return torch.optim.AdamW(ordered, lr=recipe.learning_rate, betas=recipe.betas)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group, times its scale."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    """The optimizer's state by parameter name."""
    return {
        name: dict(optimizer.state[parameter])
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
    }


def load_optimizer_state(optimizer: torch.optim.Optimizer, saved: dict[str, dict[str, Any]]) -> None:
    """Restores a state by parameter name; newly trained parameters start without state.

    Args:
        optimizer: The optimizer.
        saved: What `optimizer_state` returned.

    Raises:
        UsageError: If an entry is neither a scalar nor a tensor in the shape of its parameter.
    """
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if name in saved:
                for key, value in saved[name].items():
                    _check_state(f"{key} of {name}", value, parameter)
                optimizer.state[parameter] = {k: _beside(v, parameter) for k, v in saved[name].items()}


def _check_state(name: str, value: Any, parameter: Tensor) -> None:
    if isinstance(value, Tensor):
        if value.ndim and value.shape != parameter.shape:
            raise UsageError(f"{name} has the shape {tuple(value.shape)}, the parameter {tuple(parameter.shape)}")
    elif value is not None:  # of SGD before its first step
        raise UsageError(f"{name} must be a tensor, got {type(value).__name__}")


class Average:
    """The running mean of a system's weights: `mean += (1 - decay) * (weights - mean)` after every step.

    The decay is warmed up, min(decay, (1 + n) / (10 + n)), so that the mean of a short run does not include its random
    start. Buffers are copied.

    Attributes:
        system: The averaged system, which can be evaluated and saved.
        updates: Number of updates so far.
    """

    def __init__(self, system: System, decay: float):
        self.system = copy.deepcopy(system).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    @torch.no_grad()
    def update(self, system: System) -> None:
        """Includes the weights after one more step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        mean, now = self.system.state_dict(), system.state_dict()
        learnt = [n for n, p in system.named_parameters() if p.requires_grad]
        means, weights = [mean[n] for n in learnt], [now[n].detach() for n in learnt]
        # There is no public name for this function.
        torch._foreach_lerp_(means, weights, 1 - decay)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        for name in mean.keys() - set(learnt):
            mean[name].copy_(now[name])


def _named(system: System, name: str, option: str) -> dict[str, nn.Parameter]:
    """The parameters of a part, or those whose names match a glob; UsageError if there are none."""
    found = _matching(system, name)
    if not found:
        parts = ", ".join(system.groups())
        raise UsageError(
            f"{option}: {name!r} is neither a part of {system.name} ({parts}) nor does it match a parameter name"
        )
    return found


def _matching(system: System, name: str) -> dict[str, nn.Parameter]:
    parts = system.groups()
    everything = dict(system.named_parameters())
    if name in parts:
        wanted = {id(p) for module in parts[name] for p in module.parameters()}
        return {n: p for n, p in everything.items() if id(p) in wanted}
    return {n: p for n, p in everything.items() if fnmatchcase(n, name)}


def _decays(system: System, recipe: Recipe) -> dict[str, bool]:
    """Whether weight decay applies to each parameter."""
    decays: dict[str, bool] = {}
    modules = cast("Iterator[tuple[str, nn.Module]]", system.named_modules())  # not annotated in torch
    for prefix, module in modules:
        for name, _ in module.named_parameters(recurse=False):
            if isinstance(module, _NORMS):
                decays[f"{prefix}.{name}" if prefix else name] = recipe.decay_norms
            else:
                bias = name == "bias" or name.endswith("_bias")
                decays[f"{prefix}.{name}" if prefix else name] = recipe.decay_biases if bias else True
    for part in recipe.no_decay:
        decays.update(dict.fromkeys(_matching(system, part), False))
    return decays


def _beside(value: Any, parameter: Tensor) -> Any:
    # AdamW counts its steps in a scalar on the host, whatever the device of the weights.
    return value.to(parameter.device) if isinstance(value, Tensor) and value.ndim else value
