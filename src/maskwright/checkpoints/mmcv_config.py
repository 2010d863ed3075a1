"""The configuration that MMDetection stores as Python text beside the weights, read as data: nothing is executed."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

DEEPEST = 24  # nesting of values that are read


def read_config(about: Mapping[str, Any]) -> Mapping[str, Any]:
    """The literal values of the configuration; empty if the file has none, or one that is not valid Python.

    Read are top-level assignments of numbers, strings, lists, tuples, dicts and calls `dict(key=value)`. Any other
    expression is None.

    Args:
        about: What `read_state` returned about the file.
    """
    meta = about.get("container", {}).get("meta")
    found: dict[str, Any] = {}
    for key in ("config", "cfg"):
        text = cast(Mapping[str, Any], meta).get(key) if isinstance(meta, Mapping) else None
        if not isinstance(text, str):
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
                target = statement.targets[0]
                if isinstance(target, ast.Name):
                    found[target.id] = _value(statement.value, DEEPEST)
    return found


def _value(node: ast.expr, depth: int) -> Any:
    if depth == 0:
        return None
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(item, depth - 1) for item in node.elts]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand, depth - 1)
        return -value if isinstance(value, int | float) else None
    if isinstance(node, ast.Dict):
        pairs = zip(node.keys, node.values, strict=True)
        return {str(k.value): _value(v, depth - 1) for k, v in pairs if isinstance(k, ast.Constant)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "dict":
        return {k.arg: _value(k.value, depth - 1) for k in node.keywords if k.arg}
    return None


def look(config: Any, *path: str | int) -> Any:
    """The value at a path of keys and positions; None if there is none."""
    for step in path:
        if isinstance(config, Mapping) and isinstance(step, str):
            config = cast(Mapping[str, Any], config).get(step)
        elif isinstance(config, list) and isinstance(step, int) and -len(config) <= step < len(config):
            config = config[step]
        else:
            return None
    return config


def numbers(value: Any, count: int) -> tuple[float, ...] | None:
    """A list of `count` numbers as a tuple of floats; None for anything else."""
    if not isinstance(value, list) or len(cast(list[Any], value)) != count:
        return None
    items = cast(list[Any], value)
    if not all(isinstance(v, int | float) and not isinstance(v, bool) for v in items):
        return None
    return tuple(float(v) for v in items)


def file_names(about: Mapping[str, Any]) -> str:
    """The name of the file and of the configuration that it was trained with, in lower case with dashes."""
    meta = about.get("container", {}).get("meta")
    name = cast(Mapping[str, Any], meta).get("exp_name") if isinstance(meta, Mapping) else None
    names = [Path(about.get("path", "")).name, *([name] if isinstance(name, str) else [])]
    return " ".join(names).lower().replace("_", "-")


def normalisation(config: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...], bool] | None:
    """Mean and standard deviation in the network's order of channels, and whether this is RGB; None if not stated.

    They are those of `data_preprocessor` in version 3, and of `img_norm_cfg` or the pipelines in version 2.
    """
    preprocessor, older = look(config, "model", "data_preprocessor"), config.get("img_norm_cfg")
    own, switch = (preprocessor, "bgr_to_rgb") if isinstance(preprocessor, Mapping) else (older, "to_rgb")
    if not isinstance(own, Mapping):
        own, switch = next(_steps(config, "Normalize"), None), "to_rgb"
    mean, std = (numbers(look(own, key), 3) for key in ("mean", "std"))
    if mean is None or std is None or min(std) <= 0:
        return None
    rgb = look(own, switch)
    return mean, std, rgb if isinstance(rgb, bool) else switch == "to_rgb"


def input_size(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Length of the short side and upper bound of the long side at test time; None if not stated, or another rule."""
    for step in _steps(config, "MultiScaleFlipAug", "Resize"):
        size = numbers(step.get("img_scale", step.get("scale")), 2)
        if step.get("keep_ratio", True) is True and size is not None and 1 <= min(size) <= max(size) <= 10_000:
            return int(min(size)), int(max(size))
    return None


def _steps(config: Mapping[str, Any], *kinds: str) -> Any:
    """The steps of the pipeline of test images that have one of the types, nested ones last."""
    pipelines: list[Any] = [
        config.get("test_pipeline"), look(config, "data", "test", "pipeline"),
        look(config, "test_dataloader", "dataset", "pipeline"),
    ]  # fmt: skip
    pipelines += [look(step, "transforms") for own in pipelines for step in _mappings(own)]
    for pipeline in pipelines:
        for step in _mappings(pipeline):
            if step.get("type") in kinds:
                yield step


def _mappings(values: Any) -> Sequence[Mapping[str, Any]]:
    found = cast(list[Any], values) if isinstance(values, list) else []
    return [cast(Mapping[str, Any], v) for v in found if isinstance(v, Mapping)]


def is_caffe_text(about: Mapping[str, Any]) -> bool | None:
    """Whether the text of a configuration, which may be cut off, states a backbone of Caffe's style."""
    meta = about.get("container", {}).get("meta")
    for key in ("config", "cfg"):
        text = cast(Mapping[str, Any], meta).get(key) if isinstance(meta, Mapping) else None
        style = re.search(r"""style['"]?\s*[=:]\s*['"](caffe|pytorch)""", text) if isinstance(text, str) else None
        if style is not None:
            return style[1] == "caffe"
    return None
