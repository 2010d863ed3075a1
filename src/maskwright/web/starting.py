"""Starting the annotation server: what it opens, where it listens, and how it ends."""

from __future__ import annotations

import gc
import getpass
import socket
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from maskwright.checkpoints import load
from maskwright.checkpoints.shipping import first_with, resolved
from maskwright.errors import MissingExtraError
from maskwright.inference.prompting import promptable
from maskwright.systems import System
from maskwright.text import printable
from maskwright.web import listening
from maskwright.web.datasets import open_source
from maskwright.web.guard import LOCAL_HOSTS, is_loopback
from maskwright.web.project import Project, default_folder
from maskwright.web.sources import FolderImages, of_unread

try:
    import uvicorn
    import websockets  # noqa: F401  # pyright: ignore[reportUnusedImport] - uvicorn imports it when it starts

    from maskwright.web.annotating import AnnotationServer, Limits
    from maskwright.web.assistant import Assistant, default_weights
    from maskwright.web.learning import SYSTEM
except ImportError:
    raise MissingExtraError("the server", "web") from None

PORT = 8765
NONE = "none"  # as weights: no promptable system


@dataclass(frozen=True)
class Plan:
    """What the server opens and where it listens; see the command `annotate`."""

    source: str
    weights: str | None = None
    suggest: str | None = None
    threshold: float = 0.5
    train: str | None = None
    classes: tuple[str, ...] = ()
    out: Path | None = None
    split: str | None = None
    format: str | None = None
    images: str | None = None
    clip: bool = False
    user: str | None = None
    host: str = "127.0.0.1"
    port: int | None = None
    token: str | None = None
    browser: bool = False
    max_pixels: int = 1 << 27
    cache_bytes: int = 4 << 30
    threads: int | None = None
    device: str | None = None
    dtype: str = "float32"
    commercial_ok: bool = False


def make_server(plan: Plan, port: int = 0) -> AnnotationServer:
    """Open everything that a plan names.

    Args:
        plan: What to open.
        port: The port on which the server will listen.

    Raises:
        UsageError: If something cannot be opened, or another process annotates the same folder.
    """
    import torch

    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    source = open_source(
        plan.source, split=plan.split, format=plan.format, images=plan.images, clip=plan.clip,
        max_pixels=plan.max_pixels,
    )  # fmt: skip
    folder = plan.out or default_folder(plan.source)
    system = promptable_system(plan, source.kind == "clip")
    suggest = None if plan.suggest is None else load(resolved(plan.suggest) or "", commercial_ok=plan.commercial_ok)
    classes = plan.classes or (tuple(suggest.classes) if suggest is not None and not source.classes else ())
    project = Project(source, folder, classes, plan.user or user_name())
    try:
        assistant = None
        if system is not None:
            assistant = Assistant(source, system, folder / "embeddings", plan.device, plan.dtype, plan.cache_bytes)
        return AnnotationServer(
            project,
            assistant,
            suggest=suggest,
            threshold=plan.threshold,
            train=plan.train or plan.suggest or SYSTEM,
            token=plan.token,
            hosts=LOCAL_HOSTS if is_loopback(plan.host) else None,
            limits=Limits(pixels=plan.max_pixels),
            port=port,
        )
    except BaseException:
        project.close()
        raise


def promptable_system(plan: Plan, clip: bool) -> System | None:
    """Return the promptable system of a plan, or the one that is installed; None without.

    Args:
        plan: The plan; "none" as its weights stands for no system.
        clip: Whether a clip is annotated.
    """
    if plan.weights == NONE:
        return None
    weights = resolved(plan.weights, "video" if clip and first_with("video") else "prompts") or default_weights(clip)
    return None if weights is None else promptable(load(weights, commercial_ok=plan.commercial_ok))


def user_name() -> str:
    """Return the name of the person who runs this process."""
    try:
        return printable(getpass.getuser())
    except (OSError, KeyError, ImportError):
        return "annotator"


def bound(host: str, port: int | None) -> socket.socket:
    """Return a socket that listens.

    Args:
        host: The address.
        port: The port; None: `PORT`, or a free one if that is taken.

    Raises:
        UsageError: If the address is not available.
    """
    return listening.bound(host, *([port] if port is not None else [PORT, 0]))


def address_of(plan: Plan, port: int) -> str:
    """Return the address of the page."""
    host = f"[{plan.host}]" if ":" in plan.host else plan.host
    if host in ("0.0.0.0", "[::]"):
        host = socket.gethostname()
    query = "" if plan.token is None else f"?token={plan.token}"
    return f"http://{host}:{port}/{query}"


def run(plan: Plan, say: Callable[[str], Any]) -> None:
    """Serve until the process receives SIGINT or SIGTERM.

    Args:
        plan: What to open and where to listen.
        say: Called with lines for the person who has started the server.
    """
    opened = bound(plan.host, plan.port)
    try:
        port = int(opened.getsockname()[1])
        server = make_server(plan, port)
        project, address = server.project, address_of(plan, port)
        if project.absent:
            say(f"{project.absent} annotated images are not there any more; their annotations are kept")
        say(f"{len(project)} image{'s' * (len(project) != 1)}, annotations in {project.folder}")
        left_out = project.source.left_out if isinstance(project.source, FolderImages) else ()
        if left_out:
            say(of_unread(left_out))
        if server.assistant is None:
            say("no promptable system (--weights): masks are drawn by hand")
        say(address)
        config = uvicorn.Config(
            server.app, log_level="warning", access_log=False, server_header=False, lifespan="on",
            ws="websockets-sansio", ws_max_size=server.limits.bytes, ws_ping_timeout=60.0, timeout_graceful_shutdown=5,
            timeout_keep_alive=30, h11_max_incomplete_event_size=1 << 16, proxy_headers=False,
        )  # fmt: skip
        runner = uvicorn.Server(config)
        # What is there now stays: looking through all of it for garbage would take longer than a click.
        gc.collect()
        gc.freeze()
        if plan.browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()
        runner.run(sockets=[opened])
    finally:
        gc.unfreeze()
        opened.close()
