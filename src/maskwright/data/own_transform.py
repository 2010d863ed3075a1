"""A transform of the user in training augmentation: a function of an image and its objects."""

# pyright: reportUnknownMemberType=false
from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import inspect
import random
from collections.abc import Callable, Generator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from maskwright.data.dataset import Sample
from maskwright.errors import UsageError
from maskwright.structures import Instances

Transform = Callable[..., tuple[Tensor, Instances]]


def name_of(transform: Transform | str) -> str:
    """Return the name "module:function" by which a transform can be imported; for recipes and messages."""
    if isinstance(transform, str):
        return transform
    owner: Any = transform if hasattr(transform, "__qualname__") else type(transform)
    return f"{owner.__module__}:{owner.__qualname__}"


@functools.cache
def named_transform(name: str) -> Transform:
    """Return the function called "package.module:function" or "path/to/file.py:function".

    Raises:
        UsageError: If it cannot be imported.
    """
    source, colon, attribute = name.rpartition(":")
    if not colon or not source or not attribute:
        raise UsageError(
            f"augmentation `transform` must be a function, or its name as 'module:function' or 'file.py:function'; got "
            f"{name!r}"
        )
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            if spec is None or spec.loader is None:
                raise ImportError("it is not a Python file")
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        value: Any = functools.reduce(getattr, attribute.split("."), module)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise UsageError(
            f"augmentation `transform` {name!r} cannot be imported ({error}); give the function itself in Python, or "
            "'module:function' or 'file.py:function'"
        ) from None
    if not callable(value):
        raise UsageError(f"augmentation `transform` {name!r} is not a function")
    return cast(Transform, value)


def apply_transform(transform: Transform | str, sample: Sample, rng: np.random.Generator) -> Sample:
    """Apply a transform of the user to an image and its objects.

    Args:
        transform: The function, or its name. It is called with the image (C, H, W), uint8, and the objects, and with
            a `numpy.random.Generator` if it has a third parameter, and returns both. The global generators of Python,
            NumPy and torch are seeded for the call, so that training stays reproducible.
        sample: The image; it is copied before.
        rng: Source of random numbers.

    Returns:
        The transformed image.

    Raises:
        UsageError: If the function returns something else.
    """
    function = named_transform(transform) if isinstance(transform, str) else transform
    with _seeded(int(rng.integers(2**32))):
        arguments: tuple[Any, ...] = (sample.image.clone(), sample.target)
        result: Any = function(*arguments, rng) if _takes_generator(function) else function(*arguments)
    return _checked(result, sample, name_of(transform))


def _checked(result: Any, sample: Sample, name: str) -> Sample:
    if not isinstance(result, tuple) or len(cast(tuple[Any, ...], result)) != 2:
        raise UsageError(
            f"{name}: a transform must return an image and its objects, got {type(cast(object, result)).__name__}"
        )
    image, target = cast(tuple[Any, Any], result)
    if not isinstance(image, Tensor) or image.dtype != torch.uint8 or image.ndim != 3:
        what = f"{image.dtype} {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise UsageError(f"{name}: a transform must return the image as a uint8 tensor (C, H, W), got {what}")
    if len(image) != len(sample.image):
        raise UsageError(f"{name}: a transform must keep the {len(sample.image)} channels, got {len(image)}")
    if not isinstance(target, Instances):
        raise UsageError(f"{name}: a transform must return the objects as Instances, got {type(target).__name__}")
    size = (image.shape[1], image.shape[2])
    if tuple(target.image_size) != size:
        raise UsageError(
            f"{name}: the transformed image is {size[0]} x {size[1]}, but the image_size of its objects is "
            f"{target.image_size[0]} x {target.image_size[1]}"
        )
    return replace(sample, image=image, target=target)


def _takes_generator(function: Callable[..., Any]) -> bool:
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) >= 3 and positional[2].default is inspect.Parameter.empty


@contextlib.contextmanager
def _seeded(seed: int) -> Generator[None, None, None]:
    """Seeds the global generators of the CPU and restores them afterwards."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the user's function may use it
    with torch.random.fork_rng(devices=[]):
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        torch.default_generator.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
