"""What to compare, for each system and for each kind of file without weights.

A module here gives `SYSTEMS` (names of the registry -> function of (system, layout, ledger)) and `OPERATORS`
(function that says from a ledger whether it is its own -> function of the ledger). Where it has them, `FILES` are
what else the names of outputs begin with, and `stated` gives further arguments of `load` from what the outputs
say of themselves.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from maskwright.systems import System
from tests.parity.ledger import Ledger

MODULES = [import_module(f"{__name__}.{m.name}") for m in iter_modules(__path__)]


def with_weights(system: System, layout: Path, ledger: Ledger) -> None:
    for module in MODULES:
        check = getattr(module, "SYSTEMS", {}).get(system.name)
        if check is not None:
            return check(system, layout, ledger)
    raise LookupError(f"nothing here knows how to check {system.name}")


def stated(about: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `load` that outputs state and no file of weights holds: what modules' own `stated` say."""
    parts = [module.stated(about) for module in MODULES if hasattr(module, "stated")]
    return {name: value for part in parts for name, value in part.items()}


def mine(outputs: str) -> bool:
    """Whether recorded outputs of this name are of a system, or of operators, that a module here checks."""
    names = tuple(f"{name}-" for module in MODULES for name in getattr(module, "SYSTEMS", {}))
    files = tuple(name for module in MODULES for name in getattr(module, "FILES", ()))
    return f"{outputs}-".startswith((*names, *(f"{name}-" for name in files)))


def needs_weights(ledger: Ledger) -> bool:
    return not any(mine(ledger) for module in MODULES for mine, _ in getattr(module, "OPERATORS", []))


def without_weights(ledger: Ledger) -> None:
    for module in MODULES:
        for mine, check in getattr(module, "OPERATORS", []):
            if mine(ledger):
                return check(ledger)
    raise LookupError("nothing here knows how to check it without weights")
