"""How prompts are answered: clicks first, whatever positions of pointers are being computed."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("starlette", reason="needs the extra web")

from maskwright.web.assistant import Answer, Prompt, at_most
from maskwright.web.live import Asked, Client, Desk

pytestmark = pytest.mark.fast


class Slow:
    """An assistant whose answers wait until they are let go.

    Attributes:
        begun: The x of every prompt that was begun.
        let_go: The x of those that may end.
    """

    source = SimpleNamespace(size=lambda _: (60, 80))

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.let_go = set[float]()
        self.fails = False

    def is_ready(self, _: int) -> bool:
        return True

    def answer(self, _: int, prompt: Prompt) -> Answer:
        x = prompt.points[0][0]
        self.begun.append(x)
        until = time.monotonic() + 10
        while x not in self.let_go and time.monotonic() < until:
            time.sleep(0.001)
        if self.fails:
            raise RuntimeError("out of memory")
        return Answer(f"mask {x:g}", 0.5)


class Room:
    """A desk and a page."""

    def __init__(self) -> None:
        self.assistant: Any = Slow()
        self.threads = [ThreadPoolExecutor(1) for _ in range(3)]
        self.desk = Desk(self.assistant, *self.threads)
        self.client = Client(None)  # pyright: ignore[reportArgumentType] - nothing is sent
        self.desk.start()

    def ask(self, request: int, x: float, hover: bool) -> None:
        asked = Asked(self.client, request, 0, Prompt(((x, 5.0, 1),)), time.perf_counter())
        (self.desk.hover if hover else self.desk.click)(asked)

    async def begins(self, x: float) -> None:
        async with asyncio.timeout(10):
            while x not in self.assistant.begun:
                await asyncio.sleep(0.001)

    async def told(self) -> tuple[str, int, Any]:
        """The next message: event, request, and its mask or error."""
        async with asyncio.timeout(10):
            text = await self.client.outbox.get()
        assert text is not None
        message = json.loads(text)
        return message["event"], message["request"], message["rle"]["counts"] if "rle" in message else message["error"]

    async def close(self) -> None:
        await self.desk.stop()
        for thread in self.threads:
            thread.shutdown(cancel_futures=True)


def test_click_does_not_wait_for_a_position_of_the_pointer() -> None:
    async def work() -> None:
        room = Room()
        room.ask(1, 10, hover=True)
        await room.begins(10)
        room.ask(2, 11, hover=True)  # waits
        room.assistant.let_go |= {20.0}
        room.ask(3, 20, hover=False)
        assert await room.told() == ("mask", 3, "mask 20"), "while the first position is computed"
        assert room.client.waiting == 0
        room.assistant.let_go |= {10.0, 11.0}
        assert await room.told() == ("mask", 1, "mask 10")
        assert await room.told() == ("mask", 2, "mask 11")
        await room.close()

    asyncio.run(work())


def test_no_position_is_begun_while_a_click_is_computed() -> None:
    async def work() -> None:
        room = Room()
        room.ask(1, 20, hover=False)
        await room.begins(20)
        room.ask(2, 10, hover=True)
        await asyncio.sleep(0.05)
        assert room.assistant.begun == [20.0]
        room.assistant.let_go |= {10.0, 20.0}
        assert [(await room.told())[1] for _ in range(2)] == [1, 2]
        await room.close()

    asyncio.run(work())


@pytest.mark.parametrize("fails", [False, True])
def test_click_takes_the_answer_that_is_being_computed_for_its_place(fails: bool) -> None:
    async def work() -> None:
        room = Room()
        room.assistant.fails = fails
        room.ask(1, 10, hover=True)
        await room.begins(10)
        room.ask(2, 10, hover=False)
        room.assistant.let_go |= {10.0}
        found = "the system failed: out of memory" if fails else "mask 10"
        event = "error" if fails else "mask"
        assert await room.told() == (event, 2, found)
        assert await room.told() == (event, 1, found)
        assert room.assistant.begun == [10.0], "it is computed once"
        assert room.client.waiting == 0
        room.ask(3, 10, hover=False)
        assert await room.told() == (event, 3, found)
        await room.close()

    asyncio.run(work())


def test_threads_of_a_click_are_those_of_its_own_thread() -> None:
    before = torch.get_num_threads()
    counts: list[int] = []

    def work() -> None:
        torch.set_num_threads(3)
        with at_most(1):
            counts.append(torch.get_num_threads())
        counts.append(torch.get_num_threads())
        with at_most(8):
            counts.append(torch.get_num_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert counts == [1, 3, 3]
