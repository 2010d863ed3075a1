"""The weights inside the containers that training programs save, and names without what wrappers add to them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, cast

from torch import Tensor

from maskwright.checkpoints.budget import Budget, shown
from maskwright.errors import CheckpointError

# Keys under which code bases store the weights, in order of preference: averaged weights first.
AVERAGED = (
    "state_dict_ema",
    "model_ema_state_dict",
    "model_ema",
    "ema_model",
    "ema_state",
    "ema_state_dict",
    "ema",
    "swa_model",
    "averaged_model",
    "teacher",
)
WRAPPERS = (
    *AVERAGED,
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "module",
    "shadow",
    "net",
    "network",
    "params",
    "weights",
)
PREFIXES = ("module.", "_orig_mod.")  # prefixes that DataParallel and torch.compile add to every key
PLAIN_NODES = 100_000  # values beside the weights that are kept
MOST_TENSORS, LONGEST_NAME = 20_000, 1000
OWN_DEEPEST = 32  # nesting of the values in our own files
RUN, BATCH = "maskwright-run", "maskwright-batch"  # states that training writes


def weights_in(content: Any, about: dict[str, Any], budget: Budget) -> dict[Any, Tensor]:
    """The state dict inside nested containers; plain values beside it are stored in about["container"].

    Args:
        content: The content of a file.
        about: Description of the file; "layout", "wrapper", "container" and "metadata" are changed.
        budget: What reading the file may still cost.

    Raises:
        CheckpointError: If the content is not a container of tensors.
    """
    name = about["path"]
    if isinstance(content, Tensor):
        raise CheckpointError(
            f"{name}: contains a single tensor of shape {tuple(content.shape)}; expected a state dict"
        )
    if not isinstance(content, dict):
        raise CheckpointError(f"{name}: contains a {type(content).__name__}; expected a state dict")
    inside = cast(dict[Any, Any], content)
    if inside.get("format") in (RUN, BATCH):
        return _of_training(inside, about, budget)
    if about["format"] == "pickle" and (isinstance(inside.get("blobs"), dict) or _looks_like_blobs(inside)):
        about["layout"] = "caffe2"
        blobs = cast(dict[Any, Any], inside.get("blobs", inside))
        return {k: v for k, v in blobs.items() if isinstance(v, Tensor) and not str(k).endswith("_momentum")}
    kept = [PLAIN_NODES]
    for _ in range(6):
        key = _wrapper(inside, budget)
        if key is None:
            break
        beside = {k: v for k, v in inside.items() if k != key}
        about["container"].update(_plain_values(beside, kept))
        about["wrapper"].append(key)
        inside = cast(dict[Any, Any], inside[key])
    found: dict[Any, Tensor] = {}
    _flatten(inside, "", 0, found, budget)
    return found


def named(state: Mapping[Any, Tensor], about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors without what wrappers of modules add, and `about`.

    Removed are a prefix that all keys have ("module."), the counter `n_averaged` of torch's AveragedModel, and
    the buffers `ema_...` of MMDetection, which hold the other copy of weights that its hook has swapped before saving.
    """
    tensors = {str(k): v for k, v in state.items()}
    if len(tensors) > MOST_TENSORS or any(len(k) > LONGEST_NAME for k in tensors):
        raise CheckpointError(
            f"{about['path']}: more than {MOST_TENSORS} tensors, or names of more than {LONGEST_NAME} characters; this "
            "is not a checkpoint of a network"
        )
    if len(tensors) > 1:
        tensors.pop("n_averaged", None)
    if not tensors:
        raise CheckpointError(f"{about['path']}: contains no tensors; pass the file with the weights")
    copies = {f"ema_{k.replace('.', '_')}" for k in tensors if not k.startswith("ema_")}
    tensors = {k: v for k, v in tensors.items() if k not in copies}
    for prefix in PREFIXES * 2:
        if all(k.startswith(prefix) for k in tensors):
            tensors = {k.removeprefix(prefix): v for k, v in tensors.items()}
    return tensors, about


def _wrapper(content: dict[Any, Any], budget: Budget) -> str | None:
    """The preferred key under which a container holds weights; None if it holds them itself.

    Averaged weights without most of the tensors are not a whole network: some programs average parameters only.
    """
    counts = {k: _tensors(content.get(k), 4, budget) for k in WRAPPERS}
    # MMEngine swaps the averaged weights into "state_dict" when it saves.
    swapped = "message_hub" in content or (
        isinstance(content.get("meta"), dict) and "mmengine_version" in content["meta"]
    )
    if swapped and counts["state_dict"]:
        counts["ema_state_dict"] = 0
    most = max(counts.values())
    return next((k for k in WRAPPERS if counts[k] and 2 * counts[k] >= most), None)


def _tensors(value: Any, depth: int, budget: Budget) -> int:
    """The number of tensors in nested dicts."""
    if not isinstance(value, dict) or depth == 0:
        return 0
    values = list(cast(dict[Any, Any], value).values())
    budget.spend_nodes(len(values))
    return sum(1 if isinstance(v, Tensor) else _tensors(v, depth - 1, budget) for v in values)


def _flatten(content: dict[Any, Any], prefix: str, depth: int, found: dict[Any, Tensor], budget: Budget) -> None:
    """Collect the tensors of nested dicts under names joined by dots."""
    budget.spend_nodes(len(content))
    for key, value in content.items():
        if isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
        elif isinstance(value, dict) and depth < 4:
            _flatten(cast(dict[Any, Any], value), f"{prefix}{key}.", depth + 1, found, budget)


def _looks_like_blobs(content: Mapping[Any, Any]) -> bool:
    names = [k for k, v in content.items() if isinstance(v, Tensor) and isinstance(k, str)]
    return len(names) > 4 and not any("." in k for k in names) and sum(k.endswith(("_w", "_b")) for k in names) > 2


_DROPPED = object()


def _plain_values(values: Mapping[Any, Any], left: list[int]) -> dict[str, Any]:
    """Short values other than tensors: dates, class names, arguments; without optimizer states.

    Args:
        values: The values beside the weights.
        left: The number of values that may still be kept, as the only element; it is reduced.
    """

    def small(value: Any, depth: int) -> Any:
        left[0] -= 1
        if left[0] < 0:
            return _DROPPED
        if isinstance(value, str):
            return value[:100_000]
        if value is None or isinstance(value, bool | float):
            return value
        if isinstance(value, int):
            return value if abs(value) < 1 << 63 else _DROPPED
        if depth < 4 and isinstance(value, dict) and len(cast(dict[Any, Any], value)) <= 2000:
            items = cast(dict[Any, Any], value).items()
            return {str(k): s for k, v in items if (s := small(v, depth + 1)) is not _DROPPED}
        if depth < 4 and isinstance(value, list | tuple) and len(cast(list[Any], value)) <= 3000:
            return [s for v in cast(list[Any], value) if (s := small(v, depth + 1)) is not _DROPPED]
        return _DROPPED

    skipped = ("optimizer", "optimizer_states", "scheduler")
    found = small({k: v for k, v in values.items() if k not in skipped}, 0)
    return {} if found is _DROPPED else found


# ---- states of our own training --------------------------------------------------------------------------------------


def _of_training(content: dict[Any, Any], about: dict[str, Any], budget: Budget) -> dict[Any, Tensor]:
    """The weights in a state that training saved (last.ckpt), with the metadata that `save` would have written.

    The averaged weights are taken if the run averages, as in best.safetensors.
    """
    name = about["path"]
    model, average, progress = content.get("model"), content.get("average"), content.get("progress")
    if isinstance(average, dict) and isinstance(cast(dict[Any, Any], average).get("model"), dict):
        model = cast(dict[Any, Any], average)["model"]
    if not isinstance(model, dict):
        raise CheckpointError(
            f"{name}: the state of a training run without weights; the file is damaged, use best.safetensors beside it"
        )
    options = content.get("options")
    classes: Any = cast(dict[Any, Any], options).get("classes") if isinstance(options, dict) else None
    place: dict[str, Any] = {}
    if isinstance(progress, dict):
        steps = cast(dict[Any, Any], progress)
        place = {key: steps[key] for key in ("step", "epoch") if isinstance(steps.get(key), int)}
    entries: dict[str, Any] = {
        "options": options,
        "classes": [] if classes is None else classes,
        "preprocess": {} if content.get("preprocess") is None else content["preprocess"],
        "source": {} if content.get("source") is None else content["source"],
        "extra": place,
    }
    check_depth(entries, name, budget)
    try:
        text = {key: json.dumps(value) for key, value in entries.items()}
    except (TypeError, ValueError):
        raise CheckpointError(f"{name}: the options of the run are damaged; use best.safetensors beside it") from None
    about["metadata"] = {"format": "maskwright", "system": str(content.get("system", "")), **text}
    about["wrapper"] = ["model" if average is None else "average"]
    about["written_by"] = content["format"]
    return {k: v for k, v in cast(dict[Any, Any], model).items() if isinstance(v, Tensor)}


def check_depth(value: Any, path: str, budget: Budget) -> None:
    """CheckpointError if containers are nested too deeply for the functions that recurse into options."""
    level = [value]
    for _ in range(OWN_DEEPEST):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, dict | list | tuple):
                values = cast(dict[Any, Any], item).values() if isinstance(item, dict) else cast(list[Any], item)
                budget.spend_nodes(len(values))
                inner.extend(values)
        if not inner:
            return
        level = inner
    raise CheckpointError(
        f"{path}: its metadata is nested more than {OWN_DEEPEST} deep ({shown(value, 40)}); the file is damaged"
    )


# ---- prefixes --------------------------------------------------------------------------------------------------------

_DEEPEST_PREFIX = 4
# What training programs keep beside the network: losses, metrics, and further copies of the network.
_BESIDE = re.compile(
    r"(^|[._])(loss\w*|criterion|metrics?|accuracy|confusion\w*|confmat|\w*iou|\w*map|matcher|weight_dict|ema\w*|"
    r"teacher|student|momentum\w*|averaged?\w*|n_averaged|step|epoch)([._]|$)",
    re.IGNORECASE,
)


def views(state: Mapping[str, Tensor]) -> Iterator[tuple[Mapping[str, Tensor], tuple[str, ...]]]:
    """A state dict as it is, and without prefixes that most of its keys have ("model.", "net.", "ema_model.").

    Averaged copies of a network come before others. What does not have a prefix must not be a part of the network.

    Args:
        state: The tensors by name.

    Yields:
        The tensors without the prefix, and the keys that lack it.
    """
    pending: list[tuple[Mapping[str, Tensor], tuple[str, ...]]] = [(state, ())]
    for _ in range(_DEEPEST_PREFIX + 1):
        yield from pending
        pending = [
            (inner, (*ignored, *rest)) for view, ignored in pending for inner, rest in _without_prefix(view)
        ]  # fmt: skip


def _without_prefix(state: Mapping[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], list[str]]]:
    heads = Counter(key.partition(".")[0] for key in state if "." in key)
    often = [head for head, count in heads.items() if 10 * count >= 3 * len(state)]
    often.sort(key=lambda head: (head not in AVERAGED and not head.startswith("ema"), -heads[head]))
    for head in often:
        prefix = f"{head}."
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        rest = [key for key in state if not key.startswith(prefix)]
        # Another copy has the same names below another prefix.
        if all(key.partition(".")[2] in inner or _is_beside(key, state[key]) for key in rest):
            yield inner, rest


def _is_beside(key: str, value: Tensor) -> bool:
    """Whether a tensor is not a layer of a network."""
    return value.ndim < 2 or value.numel() <= 1024 or _BESIDE.search(key) is not None
