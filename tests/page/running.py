"""The annotation server with an assistant that knows the shapes of generated images, in a thread."""

from __future__ import annotations

import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from PIL import Image, ImageDraw
from scipy import ndimage

from maskwright.structures import Masks
from maskwright.web.annotating import AnnotationServer
from maskwright.web.assistant import Answer, Prompt
from maskwright.web.datasets import open_source
from maskwright.web.project import Project, default_folder
from maskwright.web.sources import Source

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def chromium() -> str | None:
    """Return the system's Chromium."""
    return next((path for name in ("chromium", "chromium-browser") if (path := shutil.which(name))), None)


def draw_image(path: Path, size: tuple[int, int], discs: list[tuple[int, int, int]], holes: bool = False) -> None:
    """Write an image with discs (x, y, radius) of different colours; with `holes` they are rings."""
    image = Image.new("RGB", size, (38, 44, 52))
    pen = ImageDraw.Draw(image)
    for number, (x, y, r) in enumerate(discs):
        colour = (90 + number * 37 % 150, 120 + number * 61 % 120, 100 + number * 89 % 140)
        pen.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if holes:
            pen.ellipse((x - r // 3, y - r // 3, x + r // 3, y + r // 3), fill=(38, 44, 52))
    image.save(path)


class Connected:
    """An assistant whose masks are the regions of one colour under the points of a prompt.

    Attributes:
        asked: Prompts that were answered.
        delay: Seconds that an answer takes.
    """

    name = "regions of one colour"
    device = "cpu"
    dtype = "float32"
    system = None
    page_decoder = None

    def __init__(self, source: Source, delay: float = 0.0):
        self.source, self.delay = source, delay
        self.asked: list[Prompt] = []
        self._colours: dict[int, np.ndarray[Any, Any]] = {}

    def is_ready(self, index: int) -> bool:
        return index in self._colours

    def embedding(self, index: int) -> None:
        pixels = self.source.read(index).numpy().astype(np.int64)
        self._colours[index] = (pixels[0] << 16) + (pixels[1] << 8) + pixels[2]

    def answer(self, index: int, prompt: Prompt) -> Answer:
        self.asked.append(prompt)
        if not self.is_ready(index):
            self.embedding(index)
        time.sleep(self.delay)
        colours = self._colours[index]
        mask = np.zeros(colours.shape, bool)
        points = list(prompt.points)
        if prompt.box is not None:
            x0, y0, x1, y1 = prompt.box
            points.append(((x0 + x1) / 2, (y0 + y1) / 2, 1))
        for x, y, positive in points:
            row, column = min(int(y), len(colours) - 1), min(int(x), colours.shape[1] - 1)
            equal = colours == colours[row, column]
            rows, columns = np.flatnonzero(equal.any(1)), np.flatnonzero(equal.any(0))
            box = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            parts, _ = ndimage.label(equal[box])
            mask[box][parts == parts[row - rows[0], column - columns[0]]] = bool(positive)
        counts = Masks.from_dense(torch.from_numpy(mask[None])).rle()[0]["counts"].decode("ascii")
        return Answer(counts, 0.9)


class Running:
    """A server that runs in a thread of this process.

    Attributes:
        address: Where the page is.
        project: What is annotated.
        assistant: What answers clicks.
    """

    def __init__(
        self,
        folder: Path,
        classes: tuple[str, ...],
        port: int = 0,
        delay: float = 0.0,
        make: Callable[[Source], Any] | None = None,
        **options: Any,
    ):
        source = open_source(folder, **options)
        self.project = Project(source, default_folder(folder), classes, "ann")
        self.assistant: Any = Connected(source, delay) if make is None else make(source)
        assistant: Any = self.assistant
        self.server = AnnotationServer(self.project, assistant)
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen(64)
        self.port = int(self._socket.getsockname()[1])
        self.address = f"http://127.0.0.1:{self.port}/"
        config = uvicorn.Config(
            self.server.app, log_level="error", ws="websockets-sansio", lifespan="on", timeout_graceful_shutdown=1
        )
        self._runner = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._runner.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        until = time.monotonic() + 20
        while not self._runner.started and time.monotonic() < until:
            time.sleep(0.01)

    def stop(self) -> None:
        self._runner.should_exit = True
        self._thread.join(20)
        self._socket.close()

    def masks(self, image: int = 0) -> list[np.ndarray[Any, Any]]:
        """Return what is saved of an image, one (H, W) array for each object."""
        state = self.project.state(image)
        counts = [one.counts.encode("ascii") for one in state.objects.values()]
        return list(Masks("rle", counts, state.size).dense().numpy()) if counts else []


@contextmanager
def running(folder: Path, classes: tuple[str, ...] = ("cell",), **options: Any) -> Iterator[Running]:
    """Run a server on a folder."""
    server = Running(folder, classes, **options)
    try:
        yield server
    finally:
        server.stop()
