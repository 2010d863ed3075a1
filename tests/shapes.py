"""Shape and type checks of the test run; they are not active for users.

jaxtyping applies `checked` to every function of maskwright on import, so that annotations such as
`Float[Tensor, "n 4"]` are compared with the actual arguments. MASKWRIGHT_CHECK_SHAPES=0 disables the checks.
"""

from __future__ import annotations

import os
import sys
import typing
from collections.abc import Callable
from typing import Any

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
_check = beartype(conf=BeartypeConf(strategy=BeartypeStrategy.O1, is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with its annotations enforced, or unchanged if one of them cannot be evaluated.

    Names that are imported only for the type checker do not exist at run time; importing them would cost every user
    time.
    """
    names = vars(sys.modules[function.__module__])
    for annotation in getattr(function, "__annotations__", {}).values():
        if isinstance(annotation, str):
            try:
                eval(annotation, dict(names), vars(typing))
            except Exception:
                return function
    try:
        return _check(function)
    except BeartypeDecorHintException:
        return function  # `Self` outside of a class, or a protocol without run-time checks
