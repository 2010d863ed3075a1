"""The WebSocket of the page: edits, prompts, and what others do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from maskwright.errors import MaskwrightError, UsageError
from maskwright.web.assistant import Assistant, Prompt, read_prompt, timed
from maskwright.web.objects import is_number, shown
from maskwright.web.project import Project
from maskwright.web.states import Conflict, Saved

WAITING = 16  # clicks of one page that wait for their answers
OUTBOX = 2_000  # messages that wait to be sent to one page; a page that reads so slowly is disconnected


class BusyError(UsageError):
    """Too much is waiting already."""


@dataclass(eq=False)
class Client:
    """One page that is connected.

    Attributes:
        socket: Its connection.
        outbox: Messages that wait to be sent; None ends the connection.
        tasks: What is computed for it, by request.
        waiting: Number of clicks that wait for their answers.
        image: The image that it shows.
        lost: Whether it reads too slowly to be served.
    """

    socket: WebSocket
    outbox: asyncio.Queue[str | None] = field(default_factory=lambda: asyncio.Queue(OUTBOX))
    tasks: dict[Any, asyncio.Task[None]] = field(default_factory=dict[Any, "asyncio.Task[None]"])
    waiting: int = 0
    image: int | None = None
    lost: bool = False

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message as soon as the connection takes it."""
        self.send_text(json.dumps(message, separators=(",", ":"), allow_nan=False))

    def send_text(self, text: str) -> None:
        """Send a message that is JSON already."""
        if self.lost:
            return
        try:
            self.outbox.put_nowait(text)
        except asyncio.QueueFull:
            self.lost = True
            while not self.outbox.empty():
                self.outbox.get_nowait()
            self.outbox.put_nowait(None)


class Hub:
    """The pages that are connected.

    Args:
        most: Most pages at a time.
    """

    def __init__(self, most: int = 64):
        self.clients: list[Client] = []
        self.most = most

    def tell(self, message: Mapping[str, Any], *, but: Client | None = None) -> None:
        """Send a message to all pages, or to all but one."""
        text = json.dumps(message, separators=(",", ":"), allow_nan=False)
        for client in self.clients:
            if client is not but:
                client.send_text(text)

    def add(self, client: Client) -> None:
        """Add a page, and tell all how many there are."""
        self.clients.append(client)
        self.tell({"event": "here", "users": len(self.clients)})

    def remove(self, client: Client) -> None:
        """Remove a page."""
        self.clients.remove(client)
        self.tell({"event": "here", "users": len(self.clients)})


# ---- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Asked:
    """A prompt that waits for its answer."""

    client: Client
    request: Any
    image: int
    prompt: Prompt
    begin: float

    def is_like(self, other: Asked) -> bool:
        """Return whether both have the same answer."""
        return (self.image, self.prompt) == (other.image, other.prompt)


class Desk:
    """Answers clicks one at a time in their order and, while none waits, the newest position of each pointer.

    The two have a thread each, so that a click never waits for a position that is being computed. A click for which
    just this is being computed takes that answer.

    Args:
        assistant: The promptable system.
        thread: Where clicks are answered.
        hovers: Where positions of pointers are answered.
        encoder: Where images are encoded that a click needs; meanwhile clicks on others are answered.
    """

    def __init__(self, assistant: Assistant, thread: Executor, hovers: Executor, encoder: Executor):
        self.assistant, self._encoder = assistant, encoder
        self._threads = (thread, hovers)
        self._encoding = set[asyncio.Task[None]]()
        self._clicks = deque[Asked]()
        self._hovers = dict[Client, Asked]()
        self._hovered: Asked | None = None  # what is being computed, and the clicks that take its answer
        self._alike = list[Asked]()
        self._clicked, self._wake_clicks, self._wake_hovers = False, asyncio.Event(), asyncio.Event()
        self._workers = list[asyncio.Task[None]]()

    def start(self) -> None:
        """Begin to answer."""
        self._workers = [asyncio.create_task(self._answer_clicks()), asyncio.create_task(self._answer_hovers())]

    async def stop(self) -> None:
        """Answer nothing more."""
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)

    def click(self, asked: Asked) -> None:
        """Answer a prompt after those before it.

        Raises:
            BusyError: If many prompts of the same page are waiting.
        """
        if asked.client.waiting >= WAITING:
            raise BusyError(f"{WAITING} prompts are waiting already; try again later")
        asked.client.waiting += 1
        if self.assistant.is_ready(asked.image):
            self._queue(asked)
            return
        task = asyncio.create_task(self._encode(asked))
        self._encoding.add(task)
        task.add_done_callback(self._encoding.discard)

    def _queue(self, asked: Asked) -> None:
        if self._hovered is not None and asked.is_like(self._hovered):
            self._alike.append(asked)
            return
        self._clicks.append(asked)
        self._wake_clicks.set()

    async def _encode(self, asked: Asked) -> None:
        """Encode the image of a click, then answer it; what is wrong with the image is found again there."""
        with contextlib.suppress(Exception):
            await asyncio.get_running_loop().run_in_executor(self._encoder, self.assistant.embedding, asked.image)
        self._queue(asked)

    def hover(self, asked: Asked) -> None:
        """Answer a prompt when no click waits, unless a newer one of the same page comes before."""
        before = self._hovers.pop(asked.client, None)
        if before is not None:
            before.client.send({"event": "dropped", "request": before.request})
        if not self.assistant.is_ready(asked.image):
            asked.client.send({"event": "dropped", "request": asked.request})
            return
        self._hovers[asked.client] = asked
        self._wake_hovers.set()

    def forget(self, client: Client) -> None:
        """Drop what a page has asked that has gone."""
        self._hovers.pop(client, None)
        self._clicks = deque(asked for asked in self._clicks if asked.client is not client)

    async def _answer_clicks(self) -> None:
        while True:
            while self._clicks:
                self._clicked = True
                asked = self._clicks.popleft()
                answer_click(asked, await self._answered(asked, self._threads[0]))
            self._clicked = False
            self._wake_hovers.set()
            self._wake_clicks.clear()
            await self._wake_clicks.wait()

    async def _answer_hovers(self) -> None:
        while True:
            while self._hovers and not self._clicks and not self._clicked:
                asked = self._hovered = self._hovers.pop(next(iter(self._hovers)))
                message = await self._answered(asked, self._threads[1])
                clicks, self._alike, self._hovered = self._alike, [], None
                for click in clicks:
                    answer_click(click, message)
                asked.client.send(addressed(message, asked))
            self._wake_hovers.clear()
            await self._wake_hovers.wait()

    async def _answered(self, asked: Asked, thread: Executor) -> dict[str, Any]:
        """The message with the answer, for whoever has asked for it."""
        waited, loop = timed(asked.begin), asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(thread, self.assistant.answer, asked.image, asked.prompt)
            size = self.assistant.source.size(asked.image)
        except MaskwrightError as error:
            return {"event": "error", "error": str(error)}
        except Exception as error:  # of a network, such as one out of memory; the page must not wait for ever
            return {"event": "error", "error": f"the system failed: {error}"}
        return {
            "event": "mask",
            "image": asked.image,
            "rle": {"size": list(size), "counts": answer.counts},
            "score": round(answer.score, 4),
            "stages": [waited, *answer.stages],
        }


def answer_click(asked: Asked, message: Mapping[str, Any]) -> None:
    """Send the answer to a click."""
    asked.client.waiting -= 1
    asked.client.send(addressed(message, asked))


def addressed(message: Mapping[str, Any], asked: Asked) -> dict[str, Any]:
    """Return an answer with the number of the request and the milliseconds that it took."""
    return {**message, "request": asked.request, "ms": timed(asked.begin)}


# ---- messages --------------------------------------------------------------------------------------------------------


@dataclass
class Services:
    """What messages are about.

    Attributes:
        project: The annotations.
        hub: The pages.
        writer: The thread that writes.
        shown: Called with the number of an image that a page shows.
        desk: Answers prompts; None without a promptable system.
        further: Handlers of other operations by their names.
    """

    project: Project
    hub: Hub
    writer: Executor
    shown: Callable[[Client, int], Awaitable[None]]
    desk: Desk | None = None
    further: dict[str, Callable[[Client, dict[str, Any]], Awaitable[None]]] = field(
        default_factory=dict[str, Callable[[Client, "dict[str, Any]"], Awaitable[None]]]
    )


async def serve_client(socket: WebSocket, services: Services) -> None:
    """Talk with one page until it goes."""
    await socket.accept()
    hub = services.hub
    if len(hub.clients) >= hub.most:
        await socket.close(1013, f"{hub.most} pages are connected already")
        return
    client = Client(socket)
    sender = asyncio.create_task(_send(client))
    hub.add(client)
    try:
        while (text := await _received(socket)) is not None:
            await _handle(client, text, services)
    finally:
        hub.remove(client)
        if services.desk is not None:
            services.desk.forget(client)
        for task in [*client.tasks.values(), sender]:
            task.cancel()
        await asyncio.gather(*client.tasks.values(), sender, return_exceptions=True)


async def _received(socket: WebSocket) -> str | None:
    """The next message; None when the page has gone."""
    try:
        message = await socket.receive()
    except (WebSocketDisconnect, RuntimeError):
        return None
    if message["type"] != "websocket.receive":
        return None
    text: str | None = message.get("text")
    return text if text is not None else ""


async def _send(client: Client) -> None:
    """Send what is in the outbox of a page, in order."""
    socket = client.socket
    while (text := await client.outbox.get()) is not None:
        if socket.client_state != WebSocketState.CONNECTED:
            return
        try:
            await socket.send_text(text)
        except (WebSocketDisconnect, RuntimeError, OSError):
            return
    await socket.close(1013, "the page reads too slowly; it has to load again what it shows")


async def _handle(client: Client, text: str, services: Services) -> None:
    """Answer one message."""
    request: Any = None
    try:
        message = read_message(text)
        request = message.get("request")
        if request is not None and not (is_number(request) or (isinstance(request, str) and len(request) <= 64)):
            request = None
            raise UsageError("request must be a number or a short text")
        await _done(client, message, services)
    except MaskwrightError as error:
        client.send({"event": "error", "request": request, "error": str(error)})
    except OSError as error:
        client.send({"event": "error", "request": request, "error": f"the server failed: {error.strerror}"})
    except Exception as error:  # a mistake of ours; the page must not wait for ever, nor lose its connection
        logging.getLogger(__name__).exception("a message could not be handled")
        client.send({"event": "error", "request": request, "error": f"the server failed: {error}"})


async def _done(client: Client, message: dict[str, Any], services: Services) -> None:
    op, begin = message.get("op"), time.perf_counter()
    if op == "edit":
        await _edit(client, message, services)
    elif op == "open":
        client.image = services.project.check(message.get("image"))
        await services.shown(client, client.image)
    elif op == "prompt":
        await _prompt(client, message, services, begin)
    elif op == "stop":
        task = client.tasks.get(message.get("request"))
        if task is not None:
            task.cancel()
    elif isinstance(op, str) and op in services.further:
        await services.further[op](client, message)
    else:
        raise UsageError(f"unknown op {shown(op)}")


async def _edit(client: Client, message: dict[str, Any], services: Services) -> None:
    project, loop = services.project, asyncio.get_running_loop()
    image, what = project.check(message.get("image")), message.get("what")
    outcome = await loop.run_in_executor(
        services.writer, project.edit, image, message.get("edits"), project.user, what if isinstance(what, str) else ""
    )
    client.send(edit_event(outcome, message.get("request"), image))
    if isinstance(outcome, Saved) and not outcome.again:
        services.hub.tell(changed_event(outcome, image, project.user), but=client)


def edit_event(outcome: Saved | Conflict, request: Any, image: int) -> dict[str, Any]:
    """Return the answer to an edit."""
    state = outcome.state
    there = outcome.changed if isinstance(outcome, Saved) else outcome.objects
    return {
        "event": "saved" if isinstance(outcome, Saved) else "conflict",
        "request": request,
        "image": image,
        "version": state.version,
        "objects": [one.public(state.size) for one in there],
        "removed": outcome.removed,
        "done": state.done,
    }


def changed_event(saved: Saved, image: int, by: str) -> dict[str, Any]:
    """Return the event that announces an edit to other pages."""
    state = saved.state
    return {
        "event": "changed",
        "image": image,
        "version": state.version,
        "objects": [one.public(state.size) for one in saved.changed],
        "removed": saved.removed,
        "done": state.done,
        "by": by,
    }


async def _prompt(client: Client, message: dict[str, Any], services: Services, begin: float) -> None:
    if services.desk is None:
        raise UsageError("there is no promptable system; start the server with --weights")
    image, loop = services.project.check(message.get("image")), asyncio.get_running_loop()
    size = services.project.source.known_size(image)
    if size is None:
        size = await loop.run_in_executor(None, services.project.source.size, image)
    asked = Asked(client, message.get("request"), image, read_prompt(message, size), begin)
    if message.get("hover") is True:
        services.desk.hover(asked)
    else:
        services.desk.click(asked)


def read_message(text: str) -> dict[str, Any]:
    """Return a message as JSON.

    Raises:
        UsageError: If it is not an object.
    """
    try:
        value: Any = json.loads(text, parse_constant=_refused)
    except (ValueError, RecursionError):
        raise UsageError("a message must be a JSON object in a text frame") from None
    if not isinstance(value, dict):
        raise UsageError("a message must be a JSON object in a text frame")
    return cast("dict[str, Any]", value)


def _refused(name: str) -> Any:
    raise ValueError(name)
