"""Dynamic batching: grouping, waiting, dropping and failing of requests."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Hashable, Sequence

import pytest

from maskwright.web.batching import Batcher, StoppedError

pytestmark = pytest.mark.fast


class Recorder:
    """Doubles its inputs and records the batches; holds the first one until `release` is set."""

    def __init__(self, hold: bool = False):
        self.batches: list[tuple[list[int], Hashable]] = []
        self.begun, self.release = threading.Event(), threading.Event()
        if not hold:
            self.release.set()

    def __call__(self, values: Sequence[int], options: Hashable) -> list[int]:
        self.batches.append((list(values), options))
        self.begun.set()
        assert self.release.wait(5)
        if options == "fail":
            raise ValueError("of the model")
        return [2 * value for value in values]


async def _begun(recorder: Recorder) -> None:
    await asyncio.get_running_loop().run_in_executor(None, recorder.begun.wait, 5)


def test_requests_with_equal_options_share_a_batch_up_to_its_size():
    recorder = Recorder(hold=True)
    batcher: Batcher[int, int] = Batcher(recorder, batch=3, wait=0.0)

    async def run() -> list[int]:
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(0, "a"))
        await _begun(recorder)
        others = [asyncio.ensure_future(batcher.submit(n, "b" if n == 3 else "a")) for n in range(1, 7)]
        await asyncio.sleep(0.02)
        assert batcher.waiting == 6
        recorder.release.set()
        return list(await asyncio.gather(first, *others))

    assert asyncio.run(run()) == [0, 2, 4, 6, 8, 10, 12]
    batcher.stop()
    assert recorder.batches == [([0], "a"), ([1, 2, 4], "a"), ([3], "b"), ([5, 6], "a")]


def test_the_first_request_waits_for_others():
    recorder = Recorder()
    batcher: Batcher[int, int] = Batcher(recorder, batch=2, wait=5.0)

    async def run() -> list[int]:
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(1, None))
        await asyncio.sleep(0.05)
        assert recorder.batches == []
        return [await batcher.submit(2, None), await first]

    assert asyncio.run(run()) == [4, 2]
    batcher.stop()
    assert recorder.batches == [([1, 2], None)]


def test_cancelled_requests_are_not_computed_and_failures_reach_their_batch_alone():
    recorder = Recorder(hold=True)
    batcher: Batcher[int, int] = Batcher(recorder, batch=4, wait=0.0)

    async def run() -> None:
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(0, "a"))
        await _begun(recorder)
        dropped = asyncio.ensure_future(batcher.submit(1, "a"))
        kept = asyncio.ensure_future(batcher.submit(2, "a"))
        failing = asyncio.ensure_future(batcher.submit(3, "fail"))
        await asyncio.sleep(0.02)
        dropped.cancel()
        await asyncio.sleep(0.02)
        recorder.release.set()
        assert [await first, await kept] == [0, 4]
        with pytest.raises(ValueError, match="of the model"):
            await failing
        assert await batcher.submit(5, "a") == 10

    asyncio.run(run())
    batcher.stop()
    assert recorder.batches == [([0], "a"), ([2], "a"), ([3], "fail"), ([5], "a")]


def test_a_value_that_fails_does_not_fail_those_that_share_its_batch():
    recorder = Recorder(hold=True)

    def compute(values: Sequence[int], options: Hashable) -> list[int]:
        found = recorder(values, options)
        if 3 in values:
            raise ZeroDivisionError("of one value")
        return found

    batcher: Batcher[int, int] = Batcher(compute, batch=4, wait=0.0)

    async def run() -> list[object]:
        batcher.start()
        first = asyncio.ensure_future(batcher.submit(0, None))
        await _begun(recorder)
        others = [asyncio.ensure_future(batcher.submit(n, None)) for n in (2, 3, 4)]
        await asyncio.sleep(0.02)
        recorder.release.set()
        return list(await asyncio.gather(first, *others, return_exceptions=True))

    found = asyncio.run(run())
    batcher.stop()
    assert [found[0], found[1], found[3]] == [0, 4, 8]
    assert isinstance(found[2], ZeroDivisionError)
    assert [values for values, _ in recorder.batches] == [[0], [2, 3, 4], [2], [3], [4]]


def test_stopping_computes_what_waits_and_refuses_what_comes_later():
    recorder = Recorder(hold=True)
    batcher: Batcher[int, int] = Batcher(recorder, batch=1, wait=0.0)

    async def run() -> list[int]:
        batcher.start()
        waiting = [asyncio.ensure_future(batcher.submit(n, None)) for n in range(3)]
        await _begun(recorder)
        stopping = asyncio.get_running_loop().run_in_executor(None, batcher.stop)
        await asyncio.sleep(0.02)
        with pytest.raises(StoppedError):
            await batcher.submit(9, None)
        recorder.release.set()
        await stopping
        return list(await asyncio.gather(*waiting))

    assert asyncio.run(run()) == [0, 2, 4]
