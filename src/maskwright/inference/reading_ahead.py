"""Computing inputs in threads while the consumer works."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")


def ahead(function: Callable[[A], B], inputs: Iterable[A], workers: int, depth: int) -> Iterator[B]:
    """`function` of each input, in order, computed by threads up to `depth` inputs ahead of the consumer."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="maskwright-read")
    waiting: deque[Future[B]] = deque()
    try:
        for value in inputs:
            waiting.append(pool.submit(function, value))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
