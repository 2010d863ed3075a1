"""Shape and type checks of the test run; they are not active for users.

`install` applies `checked` to every function and dataclass of maskwright on import, so that annotations such as
`Float[Tensor, "n 4"]` are compared with the actual arguments. MASKWRIGHT_CHECK_SHAPES=0 disables the checks.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import types
import typing
from collections.abc import Callable
from functools import wraps
from typing import Any

import jaxtyping
from beartype import BeartypeConf, BeartypeStrategy, beartype
from beartype.roar import BeartypeDecorHintException

ENABLED = os.environ.get("MASKWRIGHT_CHECK_SHAPES", "1") != "0"

# Not the command line, whose signatures are inspected and would be hidden by the checks.
MODULES = [
    f"maskwright.{name}"
    for name in [
        *("files", "structures", "ops", "blocks", "systems", "data"),
        *("checkpoints", "evaluation", "training", "inference"),
    ]
]

# Constant time: one element of a container is checked, and the shape of every tensor.
_check = beartype(
    conf=BeartypeConf(strategy=BeartypeStrategy.O1, is_pep484_tower=True, violation_type=jaxtyping.TypeCheckError)
)
_with_arguments = jaxtyping.jaxtyped(typechecker=None)
_in_two_steps = jaxtyping.jaxtyped(typechecker=_check)
_context = jaxtyping.jaxtyped("context")  # without state: one object serves all calls


def install() -> None:
    """Check what is imported from maskwright from now on.

    jaxtyping's hook applies `jaxtyping.jaxtyped` to every function, which compiles two checks at once, and on every
    call binds the arguments and checks them twice. `checked` takes its place: it compiles one check, on the first
    call, which halves the time of the import and of the quick tests.
    """
    jaxtyping.jaxtyped = lambda typechecker: checked  # pyright: ignore[reportAttributeAccessIssue]
    jaxtyping.install_import_hook(MODULES, "tests.shapes.checked")


def checked(target: Any) -> Any:
    """Return a function, or a dataclass, with its annotations enforced; other classes are returned unchanged."""
    if not isinstance(target, type):
        return _checked_function(target)
    initialize = vars(target).get("__init__")
    if dataclasses.is_dataclass(target) and initialize and not hasattr(initialize, "__wrapped__"):
        target.__init__ = _checked_function(initialize)
    return target


def _checked_function(function: types.FunctionType) -> Callable[..., Any]:
    call: Callable[..., Any] | None = None

    @wraps(function)
    def checked_call(*args: Any, **kwargs: Any) -> Any:
        nonlocal call
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        if call is None:
            call = _compiled(function)
        return call(*args, **kwargs)

    return checked_call


def _compiled(function: types.FunctionType) -> Callable[..., Any]:
    """The function with checks, and with a scope of its own for the names of dimensions if it has any."""
    hints = {name: _evaluated(hint, function) for name, hint in function.__annotations__.items()}
    copy = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__, copy.__qualname__, copy.__module__ = (
        function.__kwdefaults__,
        function.__qualname__,
        function.__module__,
    )
    copy.__annotations__ = hints
    try:
        if inspect.isgeneratorfunction(function):
            return _in_two_steps(copy)  # the arguments are checked by the call, not by the first iteration
        call = _check(copy)
    except BeartypeDecorHintException:
        return function  # `Self` outside of a class, or a protocol without run-time checks
    dimensions = [dimension for hint in hints.values() for dimension in _dimensions(hint)]
    if not dimensions:
        return call
    if any("{" in dimension for dimension in dimensions):
        return _with_arguments(call)

    def scoped(*args: Any, **kwargs: Any) -> Any:
        with _context:
            return call(*args, **kwargs)

    return scoped


def _evaluated(hint: Any, function: types.FunctionType) -> Any:
    """The annotation itself, or `Any` if it has a name that is imported only for the type checker."""
    if not isinstance(hint, str):
        return hint
    try:
        return eval(hint, {**vars(typing), **function.__globals__})
    except Exception:
        return Any


def _dimensions(hint: Any) -> list[str]:
    """The dimensions of all arrays in an annotation."""
    if isinstance(hint, type) and issubclass(hint, jaxtyping.AbstractArray):
        return [hint.dim_str]
    parts = hint if isinstance(hint, list) else typing.get_args(hint)
    return [dimension for part in parts for dimension in _dimensions(part)]
