"""Predictions over HTTP: one image in, its objects out as COCO JSON, a label image or a drawing.

    POST /predict    an image as the body, or as the file `image` of a form; query: format, score_threshold, ...
    GET  /health     whether the server accepts requests, and what it serves
    GET  /metrics    counts and latencies for Prometheus

Memory is bounded: by the size of a body, the pixels of an image, the number of requests in progress and the pixels that
wait for the model. Above these limits a request is refused (413, 503) instead of queued.
"""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import math
import signal
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from PIL import Image
from torch import Tensor

from maskwright.checkpoints.budget import shown
from maskwright.data.images import Reading, decode, reading
from maskwright.errors import ImageError, MaskwrightError, MissingExtraError, UsageError
from maskwright.evaluation.tasks import task_called
from maskwright.inference import predict
from maskwright.inference.outputs import coco_document, label_plane
from maskwright.inference.predicting import Prediction
from maskwright.inference.preparing import prepare
from maskwright.inference.selecting import split_names
from maskwright.systems import System
from maskwright.terminal import print_error
from maskwright.web.batching import Batcher, StoppedError
from maskwright.web.guard import LOCAL_HOSTS, Rules, is_loopback
from maskwright.web.listening import timed_protocol

try:
    import uvicorn
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
    from starlette.applications import Starlette
    from starlette.datastructures import UploadFile
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
except ImportError:
    raise MissingExtraError("the server", "web") from None

__all__ = ["LOCAL_HOSTS", "Limits", "PredictionServer", "is_loopback", "run_server"]

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

Format = Literal["json", "png", "overlay"]
_TYPES: dict[str, Format] = {"application/json": "json", "image/png": "png", "image/jpeg": "overlay"}
_ENDPOINTS = "the endpoints are POST /predict, GET /health and GET /metrics"
_ADVICE = {  # words of the advice in messages about image files -> advice for clients
    "remove it": "send an intact image in a format such as PNG, JPEG or TIFF",
    "`tile`": "send a smaller image",
    "resize.bands": "send an image in grey or RGB",
    "give tensors": "send an image with as many",
}
_PIECE = 1 << 16  # bytes of an answer that are handed to the connection at a time
_JPEG = 65_500  # pixels that a side of a JPEG can have
_LATENCIES = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)


@dataclass(frozen=True)
class Limits:
    """What a server accepts.

    Attributes:
        bytes: Largest size of a request's body.
        pixels: Most pixels of an image.
        requests: Most requests in progress, from the first byte of the request to the last of the answer; more are
            refused with 503.
        timeout: Seconds within which the head of a request and its body have to arrive each, the model to answer, and
            the client to take the answer.
        batch: Most images per forward pass.
        wait: Seconds that an image waits for others to share its forward pass.
    """

    bytes: int = 20_000_000
    pixels: int = 50_000_000
    requests: int = 32
    timeout: float = 30.0
    batch: int = 4
    wait: float = 0.005

    def __post_init__(self) -> None:
        for name in ("bytes", "pixels", "requests", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"serve: {name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.timeout < math.inf or not 0 <= self.wait < math.inf:
            raise UsageError(
                f"serve: timeout must be positive and wait not negative, got {self.timeout} and {self.wait}"
            )


class PredictionServer:
    """An ASGI application that predicts with one system.

    Args:
        system: The system; prepared for inference.
        limits: What is accepted.
        token: Value that requests must carry as `Authorization: Bearer TOKEN`; None: none.
        hosts: Allowed values of the Host header without the port, against DNS rebinding; None: any.
        device: See `predict`, as `dtype` and `compile`.
        dtype: See there.
        compile: See there.
        decoders: Threads that decode images and encode answers.

    Attributes:
        app: The application.
    """

    def __init__(
        self,
        system: System,
        limits: Limits | None = None,
        token: str | None = None,
        hosts: frozenset[str] | None = LOCAL_HOSTS,
        device: str | None = None,
        dtype: str = "float32",
        compile: bool = False,
        decoders: int = 2,
    ):
        self.limits, self.token, self.hosts = limits or Limits(), token, hosts
        self._options: dict[str, Any] = {"device": device, "dtype": dtype, "compile": compile}
        decode_options = inspect.signature(task_called("instances").of(system)).parameters
        # The scores of promptable systems are of another kind: these keep their own threshold, as in `predict`.
        shown = "score_threshold" in decode_options and "prompts" not in system.tasks
        self._defaults: dict[str, Any] = {"score_threshold": system.shown_score} if shown else {}
        self.system = prepare(system, device, dtype, compile)
        self._pool = ThreadPoolExecutor(decoders, thread_name_prefix="maskwright-web")
        self._open, self._pixels, self._accepting = 0, 0, False
        self.registry = CollectorRegistry()
        self._answers = Counter("maskwright_requests", "Answered requests", ["path", "status"], registry=self.registry)
        self._latency = Histogram(
            "maskwright_request_seconds", "Time to answer", ["path"], buckets=_LATENCIES, registry=self.registry
        )
        self._sizes = Histogram(
            "maskwright_batch_images", "Images per forward pass", buckets=(1, 2, 4, 8, 16, 32), registry=self.registry
        )
        self._model = Histogram(
            "maskwright_model_seconds", "Time of a forward pass and its decoding", buckets=_LATENCIES,
            registry=self.registry,
        )  # fmt: skip
        gauge = Gauge("maskwright_requests_in_progress", "Requests in progress", registry=self.registry)
        gauge.set_function(lambda: self._open)
        waiting = Gauge("maskwright_images_waiting", "Images that wait for the model", registry=self.registry)
        self._batcher: Batcher[Tensor, Prediction] = Batcher(
            self._compute, self.limits.batch, self.limits.wait, self._observe
        )
        waiting.set_function(lambda: self._batcher.waiting)
        routes = [
            Route("/predict", _Predicting(self), methods=["POST"]),
            Route("/health", self._health),
            Route("/metrics", self._metrics),
        ]
        handlers: Mapping[Any, Any] = {HTTPException: _refusal, MaskwrightError: _fault, Exception: _mistake}
        inner = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)
        inner.router.redirect_slashes = False  # the address would be composed from the header Host
        self.app: ASGIApp = _Guard(self, inner)

    # ---- the model -------------------------------------------------------------------------------------------------

    def _compute(self, images: Sequence[Tensor], options: Hashable) -> list[Prediction]:
        found = predict(self.system, list(images), batch=len(images), **self._options, **dict(cast(Any, options)))
        return list(found)

    def _observe(self, images: int, seconds: float) -> None:
        self._sizes.observe(images)
        self._model.observe(seconds)

    def _decoded(self, data: bytes) -> Tensor:
        rules = self.system.preprocess
        with reading(Reading(rules.white, rules.bands)):
            image = decode(io.BytesIO(data), "the image", self.limits.pixels, warn=False)
        if not image.numel():
            raise ImageError("the image has no pixels")
        return rules.match_channels(image)

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncGenerator[None]:
        self._batcher.start()
        self._accepting = True
        try:
            yield
        finally:
            self._accepting = False
            await asyncio.get_running_loop().run_in_executor(None, self._batcher.stop)
            self._pool.shutdown()

    # ---- the routes ------------------------------------------------------------------------------------------------

    async def _health(self, _: Request) -> Response:
        state = {
            "status": "ok" if self._accepting else "stopping",
            "system": self.system.name,
            "classes": list(self.system.classes),
            "requests_in_progress": self._open,
        }
        return JSONResponse(state, 200 if self._accepting else 503)

    async def _metrics(self, _: Request) -> Response:
        return Response(generate_latest(self.registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def predicting(self, request: Request, send: Send) -> None:
        """Answer a request for a prediction; it counts as in progress until the answer has been sent."""
        if not self._accepting:
            raise _busy("the server is stopping")
        if self._open >= self.limits.requests:
            raise _busy(f"{self.limits.requests} requests are in progress")
        self._open += 1
        try:
            kind, options = _wanted_format(request), self._wanted_options(request)
            if kind == "png" and "masks" not in self.system.outputs:
                raise HTTPException(400, f"{self.system.name} predicts no masks; use format=json or format=overlay")
            name, data = await self._within("the body did not arrive", 408, self._body(request))
            answer = await self._answer(request, kind, options, name, data)
            del data
            try:
                async with asyncio.timeout(self.limits.timeout):
                    await answer(request.scope, request.receive, send)
            except TimeoutError:
                raise ClientDisconnect from None  # the answer has begun, so that no other one can be given
        finally:
            self._open -= 1

    async def _answer(
        self, request: Request, kind: Format, options: tuple[tuple[str, Any], ...], name: str, data: bytes
    ) -> Response:
        loop = asyncio.get_running_loop()
        try:
            image = await loop.run_in_executor(self._pool, self._decoded, data)
        except (ImageError, UsageError) as error:
            raise HTTPException(400, _for_a_client(str(error))) from None
        del data
        if kind == "overlay" and max(image.shape[-2:]) > _JPEG:
            raise HTTPException(400, f"JPEG has at most {_JPEG} pixels a side; use another format than overlay")
        pixels = image.shape[-1] * image.shape[-2]
        if self._pixels and self._pixels + pixels > 2 * self.limits.pixels:
            raise _busy("too many pixels wait for the model")
        self._pixels += pixels
        try:
            found = await self._within("the model did not answer", 504, self._unless_gone(request, image, options))
            body, media = await loop.run_in_executor(self._pool, _encoded, kind, found, image, name)
        except (ImageError, UsageError) as error:  # of an option's value, or what the network cannot take
            raise HTTPException(400, str(error)) from None
        except StoppedError:
            raise _busy("the server is stopping") from None
        finally:
            self._pixels -= pixels
        return _Answer(body, media_type=media)

    async def _unless_gone(self, request: Request, image: Tensor, options: Hashable) -> Prediction:
        """The prediction; its request is dropped as soon as the client has gone."""
        work = asyncio.ensure_future(self._batcher.submit(image, options))
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            return work.result()
        finally:
            work.cancel()
            gone.cancel()

    async def _within(self, what: str, status: int, work: Awaitable[Any]) -> Any:
        try:
            return await asyncio.wait_for(work, self.limits.timeout)
        except TimeoutError:
            raise HTTPException(status, f"{what} within {self.limits.timeout:g} s") from None

    async def _body(self, request: Request) -> tuple[str, bytes]:
        """The name and the content of the image."""
        declared = request.headers.get("content-length", "0")
        if declared.isdecimal() and int(declared) > self.limits.bytes:
            raise _large(self.limits.bytes)
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            return await self._form(request)
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.bytes:
                raise _large(self.limits.bytes)
            parts.append(part)
        if not size:
            raise HTTPException(400, "the body is empty; send the content of an image file")
        return "image", b"".join(parts)

    async def _form(self, request: Request) -> tuple[str, bytes]:
        """The only file of a form, `image` by convention."""
        received, size = request.receive, 0

        async def counted() -> Any:
            nonlocal size
            message = await received()
            size += len(cast(bytes, message.get("body", b"")))
            if size > self.limits.bytes:
                raise _large(self.limits.bytes)
            return message

        limited = Request(request.scope, counted)
        try:
            async with limited.form(max_files=4, max_fields=4, max_part_size=1 << 16) as form:
                fields = form.multi_items()
                other = next((name for name, value in fields if not isinstance(value, UploadFile)), None)
                if other is not None:
                    raise HTTPException(
                        400,
                        f"the form has the field {shown(other, 40)!r}, expected is a file alone, 'image'; options are "
                        "sent in the query",
                    )
                files = [value for _, value in fields if isinstance(value, UploadFile)]
                if len(files) != 1:
                    raise HTTPException(400, f"the form has {len(files) or 'no'} files; send one, named 'image'")
                chosen = files[0]
                data = await chosen.read()
        except ValueError as error:  # of the parser, and of codecs that a form may name
            raise HTTPException(400, f"the form cannot be read: {error}") from None
        if not data:
            raise HTTPException(400, "the file of the form is empty; send the content of an image file")
        return chosen.filename or "image", data

    def _wanted_options(self, request: Request) -> tuple[tuple[str, Any], ...]:
        """The decoding options of the query, in a form that can be compared."""
        options = dict(self._defaults)
        for name, text in request.query_params.items():
            if name == "format":
                continue
            if name == "classes":
                options[name] = tuple(split_names(request.query_params.getlist(name), self.system.classes))
            elif name in ("score_threshold", "nms_threshold", "detections"):
                try:
                    options[name] = int(text) if name == "detections" else float(text)
                except ValueError:
                    raise HTTPException(400, f"{name} must be a number, got {text!r}") from None
            else:
                raise HTTPException(
                    400,
                    f"unknown option {name!r}; the options are format, classes, score_threshold, nms_threshold and "
                    "detections",
                )
        return tuple(sorted(options.items()))

    # ---- counting --------------------------------------------------------------------------------------------------

    def count(self, path: str, status: int, seconds: float) -> None:
        """Record an answer."""
        known = path if path in ("/predict", "/health", "/metrics") else "other"
        self._answers.labels(known, str(status)).inc()
        self._latency.labels(known).observe(seconds)


class _Predicting:
    """The route /predict, as an application: the answer is sent while the request still counts as in progress."""

    def __init__(self, server: PredictionServer):
        self._server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._server.predicting(Request(scope, receive), send)


class _Answer(Response):
    """A response whose body is sent in pieces, so that memory is not filled by what slow clients have not taken."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        body = bytes(self.body)
        for start in range(0, max(1, len(body)), _PIECE):
            piece, more = body[start : start + _PIECE], start + _PIECE < len(body)
            await send({"type": "http.response.body", "body": piece, "more_body": more})


class _Guard:
    """Checks requests before the application sees them, and counts every answer."""

    def __init__(self, server: PredictionServer, inner: ASGIApp):
        self._server, self._inner = server, inner
        self._rules = Rules(server.token, server.hosts, frozenset({"/health"}))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refused = self._rules.refusal(Request(scope))
            if refused is not None:
                await refused(scope, receive, noted)
            else:
                await self._inner(scope, receive, noted)
        except ClientDisconnect:
            status = 499  # the client has gone: nothing can be sent
        finally:
            self._server.count(scope["path"], status, time.perf_counter() - start)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _wanted_format(request: Request) -> Format:
    """The format of the query, or of the first accepted type that is one of ours."""
    named = request.query_params.get("format")
    if named is not None:
        if named not in get_args(Format):
            raise HTTPException(400, f"format must be json, png or overlay, got {named!r}")
        return cast(Format, named)
    accepted = [part.split(";")[0].strip() for part in request.headers.get("accept", "").split(",")]
    for part in accepted:
        if part in _TYPES:
            return _TYPES[part]
    return "json"


def _encoded(kind: Format, found: Prediction, image: Tensor, name: str) -> tuple[bytes, str]:
    """The body of an answer and its media type."""
    if kind == "json":
        document = coco_document(found.found(), found.classes, name)
        return json.dumps(document, separators=(",", ":")).encode(), "application/json"
    data = io.BytesIO()
    if kind == "png":
        Image.fromarray(label_plane(found.found())).save(data, "PNG")
        return data.getvalue(), "image/png"
    found.draw().convert("RGB").save(data, "JPEG", quality=92)
    return data.getvalue(), "image/jpeg"


def _busy(why: str) -> HTTPException:
    return HTTPException(503, f"{why}; try again later", {"Retry-After": "1"})


def _large(limit: int) -> HTTPException:
    return HTTPException(413, f"the body is larger than {limit} bytes")


def _for_a_client(message: str) -> str:
    """What is wrong with an image, with advice for those who sent it; that of the message is for those with files."""
    fact, _, advice = message.rpartition("; ")
    for words, other in _ADVICE.items():
        if fact and words in advice:
            return f"{fact}; {other}"
    return message


def _refusal(_: Request, error: Exception) -> Response:
    refused = cast(HTTPException, error)
    detail = f"{refused.detail}; {_ENDPOINTS}" if refused.status_code in (404, 405) else refused.detail
    return JSONResponse({"error": detail}, refused.status_code, refused.headers)


def _fault(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 500)


def _mistake(_: Request, error: Exception) -> Response:
    """The answer to a request that met a mistake of the library or of an own system; the log has the traceback."""
    return JSONResponse({"error": f"the server could not answer ({type(error).__name__}); its log says more"}, 500)


def run_server(server: PredictionServer, opened: socket.socket, grace: float = 30.0) -> Callable[[], None]:
    """Return the function that serves until SIGINT or SIGTERM; requests in progress are answered before it returns.

    Args:
        server: What to serve.
        opened: A socket with the address to listen on, see `web.listening.bound`.
        grace: Seconds that requests in progress have after the signal.
    """

    class Announcing(uvicorn.Server):
        """The server, which says on the first signal what it waits for."""

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            if not self.should_exit:
                with suppress(RuntimeError):  # the signal has arrived while the same stream was being written
                    print_error(f"{signal.Signals(sig).name}: finishing the open requests")
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        server.app, http=timed_protocol(server.limits.timeout),
        log_level="warning", access_log=False, server_header=False, lifespan="on",
        timeout_graceful_shutdown=max(1, round(grace)), timeout_keep_alive=15, h11_max_incomplete_event_size=1 << 16,
        ws="none",
    )  # fmt: skip
    return partial(Announcing(config).run, sockets=[opened])
