"""The checker of shapes and types that the test run switches on; users never pay for it.

jaxtyping puts `checked` on every function of maskwright while it is imported, so that an annotation such as
`Float[Tensor, "n 4"]` is held against what really arrives. MASKWRIGHT_CHECK_SHAPES=0 turns it off.
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

# The rooms. The command line stays as it is: its signatures are read, and a checker would stand before them.
MODULES = [
    f"maskwright.{name}"
    for name in ["structures", "ops", "blocks", "systems", "data", "checkpoints", "evaluation", "training", "inference"]
]

# Constant time: one element of a container is looked at, not all; a tensor's shape is always looked at.
_check = beartype(conf=BeartypeConf(strategy=BeartypeStrategy.O1, is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its annotations enforced; itself where one of them has no meaning at run time.

    Names imported for the type checker alone (numpy in a signature, say) cannot be looked up, and a function is then
    left as it is: the alternative would be imports that cost every user time.
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
        return function  # `Self` outside of its class, a protocol that cannot be asked for at run time
