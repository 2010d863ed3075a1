"""The WebSocket of the page: edits, prompts, and what others do."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, cast

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from maskwright.errors import MaskwrightError, UsageError
from maskwright.web.assistant import Answer, Assistant, Prompt, read_prompt, timed
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


class Desk:
    """Answers prompts one at a time: clicks in their order, then the newest position of each pointer.

    Args:
        assistant: The promptable system.
        thread: Where answers are computed.
        encoder: Where images are encoded that a click needs; meanwhile clicks on others are answered.
    """

    def __init__(self, assistant: Assistant, thread: Executor, encoder: Executor):
        self.assistant, self._thread, self._encoder = assistant, thread, encoder
        self._encoding = set[asyncio.Task[None]]()
        self._clicks = deque[Asked]()
        self._hovers = dict[Client, Asked]()
        self._wake = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to answer."""
        self._worker = asyncio.create_task(self._work())

    async def stop(self) -> None:
        """Answer nothing more."""
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

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
        self._clicks.append(asked)
        self._wake.set()

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
        self._wake.set()

    def forget(self, client: Client) -> None:
        """Drop what a page has asked that has gone."""
        self._hovers.pop(client, None)
        self._clicks = deque(asked for asked in self._clicks if asked.client is not client)

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            if not self._clicks and not self._hovers:
                self._wake.clear()
                continue
            click = bool(self._clicks)
            asked = self._clicks.popleft() if click else self._hovers.pop(next(iter(self._hovers)))
            try:
                answer = await loop.run_in_executor(self._thread, self.assistant.answer, asked.image, asked.prompt)
                asked.client.send(mask_event(asked, answer, self.assistant.source.size(asked.image)))
            except MaskwrightError as error:
                asked.client.send({"event": "error", "request": asked.request, "error": str(error)})
            except Exception as error:  # of a network, such as one out of memory; the page must not wait for ever
                asked.client.send({"event": "error", "request": asked.request, "error": f"the system failed: {error}"})
            finally:
                asked.client.waiting -= click


def mask_event(asked: Asked, answer: Answer, size: tuple[int, int]) -> dict[str, Any]:
    """Return the message with the answer to a prompt."""
    return {
        "event": "mask",
        "request": asked.request,
        "image": asked.image,
        "rle": {"size": list(size), "counts": answer.counts},
        "score": round(answer.score, 4),
        "ms": timed(asked.begin),
    }


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
    """Return what other pages are told of an edit."""
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
