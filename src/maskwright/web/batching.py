"""Dynamic batching: one thread owns the model and computes waiting requests together."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

I = TypeVar("I")  # noqa: E741 - inputs
O = TypeVar("O")  # noqa: E741 - outputs


class StoppedError(Exception):
    """The batcher was stopped before the request was computed."""


@dataclass
class _Request(Generic[I, O]):
    """One input that waits for its output."""

    value: I
    options: Hashable
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[O]
    arrived: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)


class Batcher(Generic[I, O]):
    """Computes requests in batches on one thread.

    The first waiting request waits at most `wait` seconds for others with the same options. Requests whose caller has
    given up are dropped before they are computed.

    Args:
        compute: Called on the thread with inputs and their common options; returns one output per input.
        batch: Largest number of inputs per call.
        wait: Seconds that a request waits for others.
        observe: Called on the thread with the number of inputs and the seconds of every call of `compute`.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[I], Hashable], Sequence[O]],
        batch: int,
        wait: float,
        observe: Callable[[int, float], None] | None = None,
    ):
        self._compute, self._batch, self._wait, self._observe = compute, batch, wait, observe
        self._waiting: deque[_Request[I, O]] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._work, name="maskwright-model", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Compute what is waiting, then end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Number of requests that no call of `compute` has taken yet."""
        return len(self._waiting)

    async def submit(self, value: I, options: Hashable) -> O:
        """Return the output for an input. Cancelling the call drops the request if it has not begun.

        Raises:
            StoppedError: If the batcher has been stopped.
            Exception: What `compute` raised for this value alone.
        """
        loop = asyncio.get_running_loop()
        request: _Request[I, O] = _Request(value, options, loop, loop.create_future())
        with self._changed:
            if self._stopping:
                raise StoppedError
            self._waiting.append(request)
            self._changed.notify_all()
        try:
            return await request.future
        finally:
            request.cancelled.set()

    def _work(self) -> None:
        while taken := self._take():
            taken = [request for request in taken if not request.cancelled.is_set()]
            if taken:
                self._answer(taken)

    def _answer(self, taken: Sequence[_Request[I, O]]) -> None:
        """Compute requests and hand over the results; each by itself if they fail together, so that only one fails."""
        start = time.perf_counter()
        try:
            outputs = self._compute([request.value for request in taken], taken[0].options)
        except Exception as error:
            if len(taken) == 1:
                _settle(taken[0], None, error)
                return
            for request in taken:
                if not request.cancelled.is_set():
                    self._answer([request])
            return
        if self._observe is not None:
            self._observe(len(taken), time.perf_counter() - start)
        for request, output in zip(taken, outputs, strict=True):
            _settle(request, output, None)

    def _take(self) -> list[_Request[I, O]]:
        """The next batch; empty once stopped and nothing is waiting."""
        with self._changed:
            while not self._waiting:
                if self._stopping:
                    return []
                self._changed.wait()
            first = self._waiting[0]
            until = first.arrived + self._wait
            while self._alike(first.options) < self._batch and not self._stopping:
                left = until - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
            taken = [request for request in self._waiting if request.options == first.options][: self._batch]
            chosen = set(map(id, taken))
            self._waiting = deque(request for request in self._waiting if id(request) not in chosen)
            return taken

    def _alike(self, options: Hashable) -> int:
        return sum(request.options == options for request in self._waiting)


def _settle(request: _Request[I, O], output: O | None, error: Exception | None) -> None:
    """Hand a result to the event loop that waits for it."""

    def settle() -> None:
        if request.future.done():
            return
        if error is not None:
            request.future.set_exception(error)
        else:
            request.future.set_result(output)  # pyright: ignore[reportArgumentType] - None only with an error

    try:
        request.loop.call_soon_threadsafe(settle)
    except RuntimeError:  # the loop has been closed
        return
