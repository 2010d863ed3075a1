"""What an export is doing, for those who wait for it."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar


def _silent(_: str) -> None:
    pass


_say: ContextVar[Callable[[str], None]] = ContextVar("say", default=_silent)


@contextmanager
def reported(say: Callable[[str], None]) -> Generator[None]:
    """The block whose exports report each stage when it begins; without it they report nothing.

    Args:
        say: Takes a line, such as "mask-rcnn: dense: tracing".
    """
    token = _say.set(say)
    try:
        yield
    finally:
        _say.reset(token)


def report(stage: str) -> None:
    """Reports a stage to the block of `reported`, if there is one."""
    _say.get()(stage)
