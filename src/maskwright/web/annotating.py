"""The server of the annotation page: pages, images, objects and exports over HTTP, edits and prompts over a WebSocket.

GET  /, /app.js, /app.css          the page
GET  /api/project                  what is annotated, and what the server can do
GET  /api/images                   the list of images
GET  /api/images/N/pixels          an image
GET  /api/images/N/objects         its objects
GET  /api/images/N/embedding       its embedding, for a page that decodes by itself
GET  /api/decoder                  the decoder, likewise
POST /api/classes, /api/export, /api/train
WS   /api/live                     see `web.live`
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from maskwright._version import __version__
from maskwright.checkpoints import load
from maskwright.data.convert import writable_formats
from maskwright.errors import DataError, ImageError, MaskwrightError, UsageError
from maskwright.systems import System
from maskwright.text import printable
from maskwright.web.assistant import Assistant, timed
from maskwright.web.decoding import PageDecoder
from maskwright.web.exporting import LossyError, export
from maskwright.web.guard import LOCAL_HOSTS, Guard, Rules
from maskwright.web.learning import MOST_STEPS, SYSTEM, Progress, Trainer
from maskwright.web.live import Client, Desk, Hub, Services, serve_client
from maskwright.web.objects import is_integer, shown
from maskwright.web.operations import Operations
from maskwright.web.project import NotFoundError, Project
from maskwright.web.showing import Shower
from maskwright.web.suggesting import Suggester, Suggestions, be_nice

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob:; "
        "connect-src 'self'; worker-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
}
_MEDIA = {
    "html": "text/html; charset=utf-8", "js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8",
    "svg": "image/svg+xml", "png": "image/png", "ico": "image/x-icon", "wasm": "application/wasm",
    "json": "application/json", "onnx": "application/octet-stream", "mjs": "text/javascript; charset=utf-8",
    "txt": "text/plain; charset=utf-8",
}  # fmt: skip
_PACKED = ".gz"  # suffix of files that are stored compressed, and sent so
_OPEN = ("open",)  # among the tasks of a page, whose other keys are requests
NO_PAGE_DECODER = "there is no decoder for the page"
BODY = 30  # seconds within which the body of a request has to arrive
AHEAD = (1, 2, 3, -1)  # images that are encoded after the one that is shown


@dataclass(frozen=True)
class Limits:
    """What the server accepts.

    Attributes:
        bytes: Largest message or body.
        pixels: Most pixels of an image.
        pages: Most pages at a time.
    """

    bytes: int = 16 << 20
    pixels: int = 1 << 27
    pages: int = 64


class AnnotationServer:
    """An ASGI application in which people annotate a project.

    Args:
        project: The annotations.
        assistant: A promptable system; None: masks are drawn by hand only.
        suggest: A trained system whose objects are suggested.
        threshold: Objects of `suggest` with lower scores are not suggested.
        train: What the page trains: a system, a preset, or weights to continue from.
        token: Value that a request must have; None: none.
        hosts: Allowed values of the Host header without the port, against DNS rebinding; None: any.
        limits: What is accepted.
        port: The port, for the name of the cookie, which browsers share between ports.

    Attributes:
        app: The application.
    """

    def __init__(
        self,
        project: Project,
        assistant: Assistant | None = None,
        *,
        suggest: System | None = None,
        threshold: float = 0.5,
        train: str = SYSTEM,
        token: str | None = None,
        hosts: frozenset[str] | None = LOCAL_HOSTS,
        limits: Limits | None = None,
        port: int = 0,
    ):
        self.project, self.assistant, self.limits = project, assistant, limits or Limits()
        self.hub, self.shower = Hub(self.limits.pages), Shower(project.source)
        self._pages = page_files()
        self._readers = ThreadPoolExecutor(4, thread_name_prefix="maskwright-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="maskwright-write")
        self._clicks = ThreadPoolExecutor(1, thread_name_prefix="maskwright-click")
        self._hovers = ThreadPoolExecutor(1, thread_name_prefix="maskwright-hover")
        self._now = ThreadPoolExecutor(1, "maskwright-encode", all_threads, (torch.get_num_threads(),))
        self._ahead = ThreadPoolExecutor(1, "maskwright-ahead", all_threads, (torch.get_num_threads(), True))
        self._long = ThreadPoolExecutor(1, "maskwright-long", all_threads, (torch.get_num_threads(),))
        self._exporter = ThreadPoolExecutor(1, thread_name_prefix="maskwright-decoder", initializer=be_nice)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._exporting = asyncio.Lock()
        self._threshold = threshold
        self.suggestions = Suggestions(None if suggest is None else self._suggester(suggest))
        self.operations = Operations(project, self.suggestions, self.hub, assistant, self._long, self._writer)
        device = None if assistant is None else assistant.device
        self.trainer = Trainer(project, train, device, self._tell_training, self._trained)
        desk = None if assistant is None else Desk(assistant, self._clicks, self._hovers, self._now)
        self.services = Services(project, self.hub, self._writer, self._shown, desk, self.operations.handlers)
        self._rules = Rules(token, hosts, frozenset({"/", "/health"}), f"maskwright-{port}")
        handlers: Mapping[Any, Any] = {HTTPException: _refusal, MaskwrightError: _fault}
        inner = Starlette(routes=self._routes(), exception_handlers=handlers, lifespan=self._lifespan)
        self.app: ASGIApp = Guard(inner, self._rules, HEADERS)

    def _routes(self) -> list[Any]:
        return [
            Route("/", self._index),
            Route("/health", self._health),
            Route("/api/project", self._project),
            Route("/api/classes", self._classes, methods=["POST"]),
            Route("/api/export", self._export, methods=["POST"]),
            Route("/api/train", self._train, methods=["GET", "POST", "DELETE"]),
            Route("/api/images", self._images),
            Route("/api/images/{id:int}/pixels", self._pixels),
            Route("/api/images/{id:int}/objects", self._objects),
            Route("/api/images/{id:int}/embedding", self._embedding),
            Route("/api/decoder", self._decoder),
            WebSocketRoute("/api/live", self._live),
            Route("/{name}", self._file),
        ]

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        loop = self._loop = asyncio.get_running_loop()
        desk, suggester = self.services.desk, self.suggestions.suggester
        if desk is not None:
            desk.start()
        if suggester is not None:
            suggester.start()
        try:
            yield
        finally:
            self._loop = None
            await self.trainer.stop()
            if desk is not None:
                await desk.stop()
            if self.suggestions.suggester is not None:
                await loop.run_in_executor(None, self.suggestions.suggester.stop)
            for pool in (
                self._exporter, self._ahead, self._now, self._long, self._hovers, self._clicks, self._readers,
                self._writer,
            ):  # fmt: skip
                await loop.run_in_executor(None, lambda pool=pool: pool.shutdown(cancel_futures=True))
            self.project.close()
            self.project.source.close()

    # ---- the page ----------------------------------------------------------------------------------------------------

    async def _index(self, request: Request) -> Response:
        given = request.query_params.get("token")
        if given is not None and self._rules.token is not None:
            if not self._rules.matches(given):
                raise HTTPException(403, "the token is wrong; open the address that the server has printed")
            answer: Response = RedirectResponse("/", 303)
            assert self._rules.cookie is not None
            secure = request.url.scheme == "https"
            answer.set_cookie(self._rules.cookie, given, httponly=True, samesite="strict", secure=secure)
            return answer
        if self._rules.token is not None and not self._rules.knows(request):
            return PlainTextResponse("Open the address with the token that the server has printed.\n", 401)
        if "index.html" not in self._pages:
            return PlainTextResponse("The page is not a part of this installation; see page/README.md.\n", 503)
        return self._static("index.html", request)

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._pages and f"{name}{_PACKED}" not in self._pages:
            raise HTTPException(404, "there is no such page")
        return self._static(name, request)

    def _static(self, name: str, request: Request) -> Response:
        media = _MEDIA.get(name.rpartition(".")[2], "application/octet-stream")
        packed = f"{name}{_PACKED}" in self._pages
        body = self._pages[f"{name}{_PACKED}" if packed else name]
        tag = f'"{hashlib.sha256(body).hexdigest()[:32]}"'
        headers = {"Cache-Control": "no-cache", "ETag": tag}
        if packed:
            headers["Vary"] = "Accept-Encoding"
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        if packed and "gzip" in request.headers.get("accept-encoding", ""):
            headers["Content-Encoding"] = "gzip"
        elif packed:
            body = gzip.decompress(body)
        return Response(body, media_type=media, headers=headers)

    async def _health(self, _: Request) -> Response:
        return JSONResponse({"status": "ok"})

    # ---- what is annotated -------------------------------------------------------------------------------------------

    async def _project(self, _: Request) -> Response:
        project, assistant, suggester = self.project, self.assistant, self.suggestions.suggester
        suggest = None if suggester is None else {"system": suggester.name, "done": suggester.progress[0]}
        assist: dict[str, Any] | None = None
        if assistant is not None:
            why = NO_PAGE_DECODER if assistant.page_decoder is None else assistant.page_decoder.missing
            assist = {"system": assistant.name, "ready": True, "where": "server", "page": why is None, "why": why}
        return JSONResponse(
            {
                "name": printable(project.source.path.absolute().name),
                "source": project.source.format or project.source.kind,
                "kind": project.source.kind,
                "count": len(project),
                "classes": project.shown_classes(),
                "assist": assist,
                "suggest": suggest,
                "formats": writable_formats(),
                "user": project.user,
                "can_train": self.trainer.is_possible(),
                "can_propagate": self.operations.can_propagate,
                "can_similar": assistant is not None,
                "train": self.trainer.progress.public(),
                "version": __version__,
                "limits": {"message_bytes": self.limits.bytes, "pixels": self.limits.pixels},
            }
        )

    async def _classes(self, request: Request) -> Response:
        value = await self._json(request)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._writer, self.project.add_class, value.get("name"))
        classes = self.project.shown_classes()
        self.hub.tell({"event": "classes", "classes": classes})
        return JSONResponse(classes)

    async def _images(self, request: Request) -> Response:
        query = request.query_params
        start, count = _count(query.get("start", "0"), "start"), _count(query.get("count", "200"), "count")
        only: Any = query.get("only", "all")
        if only not in ("all", "todo", "done", "uncertain"):
            raise HTTPException(400, f"only must be all, todo, done or uncertain, got {shown(only)}")

        def work() -> dict[str, Any]:
            ranked = self.suggestions.ranked() if only == "uncertain" else ()
            chosen = self.project.listed(only, ranked)
            items = [self.project.about(index) for index in chosen[start : start + min(count, 1000)]]
            return {"total": len(chosen), "items": items}

        return JSONResponse(await self._read(work))

    async def _pixels(self, request: Request) -> Response:
        index = self.project.check(request.path_params["id"])
        text = request.query_params.get("max")
        most = None if text is None else max(16, _count(text, "max"))
        tag = await self._read(lambda: self.shower.tag(index, most))
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        found = await self._read(lambda: self.shower.show(index, most))
        return Response(found.body, media_type=found.media, headers=headers)

    async def _objects(self, request: Request) -> Response:
        index = self.project.check(request.path_params["id"])

        def work() -> bytes:
            state = self.project.state(index)
            if self.suggestions.suggester is not None and not state.done:
                self.suggestions.suggester.ask(index)
            value = {
                "id": index,
                "version": state.version,
                "size": list(state.size),
                "done": state.done,
                "objects": [one.public(state.size) for one in state.objects.values()],
                "suggestions": [one.public(state.size) for one in self.suggestions.of(index, state)],
            }
            return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()

        return Response(await self._read(work), media_type="application/json")

    # ---- for pages that decode by themselves -------------------------------------------------------------------------

    def _page_decoder(self) -> tuple[Assistant, PageDecoder]:
        decoder = None if self.assistant is None else self.assistant.page_decoder
        if self.assistant is None or decoder is None:
            raise HTTPException(404, NO_PAGE_DECODER)
        return self.assistant, decoder

    async def _decoder(self, request: Request) -> Response:
        _, decoder = self._page_decoder()
        try:
            graph = await asyncio.get_running_loop().run_in_executor(self._exporter, decoder.graph)
        except asyncio.CancelledError:  # it takes longer than the server waits when it ends
            raise HTTPException(503, "the server ends") from None
        headers = {"ETag": f'"{decoder.name}"', "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(graph, media_type=_MEDIA["onnx"], headers=headers)

    async def _embedding(self, request: Request) -> Response:
        assistant, decoder = self._page_decoder()
        index, loop = self.project.check(request.path_params["id"]), asyncio.get_running_loop()
        tag = await self._read(lambda: f'"{self.project.source.content(index)}-{assistant.system.fingerprint}"')
        headers = {"ETag": tag, "Cache-Control": "no-cache"}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        embedding = await loop.run_in_executor(self._now, assistant.embedding, index)
        body = await self._read(lambda: decoder.embedding(embedding))
        return Response(body, media_type=_MEDIA["onnx"], headers=headers)

    async def _export(self, request: Request) -> Response:
        value = await self._json(request)
        format, allow = value.get("format"), value.get("allow_loss", False)
        if format not in writable_formats() or not isinstance(allow, bool):
            listed = ", ".join(writable_formats())
            raise HTTPException(400, f"format must be one of {listed}, and allow_loss true or false")
        async with self._exporting:
            try:
                found = await self._read(lambda: export(self.project, format, allow_loss=allow))
            except LossyError as error:
                return JSONResponse({"error": str(error), "losses": error.losses}, 409)
        return JSONResponse(
            {
                "path": printable(str(found.path.absolute())),
                "images": found.images,
                "objects": found.objects,
                "losses": found.losses,
            }
        )

    # ---- training ----------------------------------------------------------------------------------------------------

    async def _train(self, request: Request) -> Response:
        if request.method == "POST":
            steps = (await self._json(request)).get("steps")
            if steps is not None and (not is_integer(steps) or not 1 <= steps <= MOST_STEPS):
                raise HTTPException(400, f"steps must be an integer from 1 to {MOST_STEPS}, got {shown(steps)}")
            self.trainer.start(steps)
        elif request.method == "DELETE":
            await self.trainer.stop()
        return JSONResponse(self.trainer.progress.public())

    def _tell_training(self, progress: Progress) -> None:
        self.hub.tell({"event": "train", **progress.public()})

    def _trained(self, weights: Path) -> None:
        """Suggest what the new weights find."""
        if self._loop is not None:
            self._reloading = asyncio.create_task(self._replace(weights))

    async def _replace(self, weights: Path) -> None:
        loop, before = asyncio.get_running_loop(), self.suggestions.suggester
        try:
            system = await loop.run_in_executor(self._readers, load, weights)
            suggester = await loop.run_in_executor(self._readers, self._suggester, system)
        except (MaskwrightError, RuntimeError, OSError) as error:
            message = f"the new weights cannot be used for suggestions: {error}"
            self._tell_training(replace(self.trainer.progress, message=message))
            return
        self.suggestions.suggester = suggester
        suggester.start()
        for index in {client.image for client in self.hub.clients if client.image is not None}:
            suggester.ask(index)
        if before is not None:
            await loop.run_in_executor(self._readers, before.stop)

    # ---- suggestions -------------------------------------------------------------------------------------------------

    def _suggester(self, system: System) -> Suggester:
        device = None if self.assistant is None else self.assistant.device
        return Suggester(self.project, system, self.assistant, self._threshold, device, self._predicted)

    def _predicted(self, index: int) -> None:
        """Called on the thread of the suggester: there are suggestions for an image."""
        loop = self._loop
        if loop is not None and any(client.image == index for client in list(self.hub.clients)):
            work = self._tell_suggestions(index)
            try:
                asyncio.run_coroutine_threadsafe(work, loop)
            except RuntimeError:  # the loop has been closed
                work.close()

    async def _tell_suggestions(self, index: int) -> None:
        try:
            event = await self._read(lambda: self.operations.suggestions_event(index))
        except MaskwrightError:
            return
        self.operations.tell_showing(index, event)

    async def _read(self, work: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._readers, work)

    async def _json(self, request: Request) -> dict[str, Any]:
        """The body of a request, an object."""
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY):
                async for part in request.stream():
                    size += len(part)
                    if size > 1 << 16:
                        raise HTTPException(413, f"the body is larger than {1 << 16} bytes")
                    parts.append(part)
        except TimeoutError:
            raise HTTPException(408, f"the body did not arrive within {BODY} s") from None
        try:
            value: Any = json.loads(b"".join(parts) or b"{}")
        except (ValueError, RecursionError):
            raise HTTPException(400, "the body must be a JSON object") from None
        if not isinstance(value, dict):
            raise HTTPException(400, "the body must be a JSON object")
        return value  # pyright: ignore[reportUnknownVariableType]

    # ---- live --------------------------------------------------------------------------------------------------------

    async def _live(self, socket: WebSocket) -> None:
        await serve_client(socket, self.services)

    async def _shown(self, client: Client, index: int) -> None:
        """A page shows an image: encode it, then those that follow."""
        if self.assistant is None:
            client.send({"event": "no-assist", "image": index, "why": "no promptable system (--weights)"})
            return
        before = client.tasks.pop(_OPEN, None)
        if before is not None:
            before.cancel()
        client.tasks[_OPEN] = asyncio.create_task(self._encode(client, index, self.assistant))

    async def _encode(self, client: Client, index: int, assistant: Assistant) -> None:
        loop, begin = asyncio.get_running_loop(), time.perf_counter()
        try:
            await loop.run_in_executor(self._now, assistant.embedding, index)
        except (MaskwrightError, RuntimeError, OSError) as error:
            client.send({"event": "no-assist", "image": index, "why": str(error)})
            return
        client.send({"event": "embedded", "image": index, "ms": timed(begin)})
        for step in AHEAD:
            if 0 <= index + step < len(self.project):
                try:
                    await loop.run_in_executor(self._ahead, assistant.embedding, index + step)
                except (MaskwrightError, RuntimeError, OSError):
                    continue


def all_threads(count: int, nice: bool = False) -> None:
    """Let a new thread compute with `count` threads; otherwise it would begin with what clicks use at this moment."""
    torch.set_num_threads(count)
    if nice:
        be_nice()


def page_files() -> dict[str, bytes]:
    """Return the files of the page by their names."""
    folder = resources.files("maskwright.web") / "page"
    if not folder.is_dir():
        return {}
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file() and file.name[0] != "."}


def _count(text: str, name: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise HTTPException(400, f"{name} must be a count, got {shown(text)}")
    return int(text)


def _refusal(_: Request, error: Exception) -> Response:
    refused: Any = error
    return JSONResponse({"error": refused.detail}, refused.status_code, refused.headers)


def _fault(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, status_of(error))


def status_of(error: Exception) -> int:
    """Return the status with which an error is answered."""
    if isinstance(error, NotFoundError):
        return 404
    if isinstance(error, UsageError):
        return 400
    if isinstance(error, ImageError):
        return 409
    return 503 if isinstance(error, DataError) and "cannot be written" in str(error) else 409


__all__ = ["AnnotationServer", "Limits"]
