"""A folder of photos, masks on them, and an annotation server that is asked over real connections."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from maskwright.structures import Masks

SIZE = (60, 80)


def photos(folder: Path, count: int = 3, size: tuple[int, int] = SIZE) -> Path:
    """Write `photo-N.png`, a bright disc on a dark ground each."""
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(1, count + 1):
        Image.fromarray(disc(size, 20 + n, 25, 12)[..., None] * np.uint8([200, 180, 90]) + np.uint8(20)).save(
            folder / f"photo-{n}.png"
        )
    return folder


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> Any:
    """A plane of 0 and 1."""
    rows, columns = np.mgrid[: size[0], : size[1]] + 0.5
    return ((columns - x) ** 2 + (rows - y) ** 2 < radius**2).astype(np.uint8)


def rle(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    """The run-length code of a rectangle."""
    import torch

    crop = torch.ones(y1 - y0, x1 - x0, dtype=torch.bool)
    code = Masks.from_crops([crop], torch.tensor([[x0, y0]]), size).rle()[0]
    return {"size": list(size), "counts": code["counts"].decode()}


def drawn(id: str = "a", x0: int = 5, label: int | None = 0, how: str = "brush", **more: Any) -> dict[str, Any]:
    """An object as the page sends it: a square of 10 pixels."""
    made = [{"by": "ann", "how": how, "clicks": 1}]
    return {"id": id, "label": label, "rle": rle(x0, 5, x0 + 10, 15), "made": made, **more}


def add(id: str = "a", x0: int = 5, **more: Any) -> dict[str, Any]:
    """The edit that adds a square."""
    return {"do": "add", "object": drawn(id, x0, **more)}


class Page:
    """What talks to a server."""

    def __init__(self, port: int):
        self.port = port

    def ask(self, method: str, path: str, value: Any = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send a request; returns status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            body = value if value is None or isinstance(value, bytes) else json.dumps(value).encode()
            connection.request(method, path, body, {name.replace("_", "-"): text for name, text in headers.items()})
            answer = connection.getresponse()
            return answer.status, {name.lower(): text for name, text in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        status, _, body = self.ask("GET", path)
        assert status == 200, body
        return json.loads(body)

    @contextmanager
    def live(self, **options: Any) -> Iterator[Live]:
        """A connection for edits and prompts."""
        with connect(
            f"ws://127.0.0.1:{self.port}/api/live", max_size=1 << 24, open_timeout=30, close_timeout=1, **options
        ) as socket:
            yield Live(socket)


class Live:
    """One connected page."""

    def __init__(self, socket: ClientConnection):
        self.socket = socket
        self.seen: list[dict[str, Any]] = []
        self._number = 0

    def send(self, op: str, **fields: Any) -> int:
        """Send a message; returns its request."""
        self._number += 1
        self.socket.send(json.dumps({"op": op, "request": self._number, **fields}))
        return self._number

    def until(self, wanted: Callable[[dict[str, Any]], bool], timeout: float = 60) -> dict[str, Any]:
        """The next message that is wanted; those before it are in `seen`."""
        end = time.monotonic() + timeout
        while True:
            message = json.loads(self.socket.recv(timeout=max(0.01, end - time.monotonic())))
            self.seen.append(message)
            if wanted(message):
                return message

    def event(self, name: str, timeout: float = 60) -> dict[str, Any]:
        """The next event of a name."""
        return self.until(lambda message: message["event"] == name, timeout)

    def ask(self, op: str, **fields: Any) -> dict[str, Any]:
        """Send a message; returns the last answer to it."""
        request = self.send(op, **fields)
        final = ("saved", "conflict", "mask", "dropped", "error", "suggestions", "finished")
        return self.until(lambda message: message.get("request") == request and message["event"] in final)

    def edit(self, image: int, *edits: dict[str, Any], base: int = 0, what: str = "test") -> dict[str, Any]:
        """Send edits."""
        return self.ask("edit", image=image, base=base, edits=list(edits), what=what)


@contextmanager
def serving(server: Any, **config: Any) -> Iterator[Page]:
    """A server on a free port."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    options = {"log_level": "error", "ws": "websockets-sansio", "lifespan": "on", "server_header": False}
    options["timeout_graceful_shutdown"] = 5
    runner = uvicorn.Server(uvicorn.Config(server.app, **(options | {"ws_max_size": 1 << 20} | config)))
    thread = threading.Thread(target=runner.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    until = time.monotonic() + 30
    while not runner.started and time.monotonic() < until:
        time.sleep(0.01)
    assert runner.started
    try:
        yield Page(port)
    finally:
        runner.should_exit = True
        thread.join(60)
        listening.close()
        assert not thread.is_alive()
