"""The command that serves predictions: `serve`."""

from __future__ import annotations

import os
import secrets
from typing import Annotated

from tyro.conf import arg

from maskwright.cli.arguments import Device, Dtype, Integer, Name, device_named
from maskwright.errors import UsageError
from maskwright.terminal import print_line

TOKEN = "MASKWRIGHT_TOKEN"  # the environment variable


def serve(
    weights: Annotated[str, arg(metavar="WEIGHTS")],
    /,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_host: tuple[str, ...] = (),
    batch: int = 4,
    wait: float = 0.005,
    requests: int = 32,
    max_bytes: int = 20_000_000,
    max_pixels: int = 50_000_000,
    timeout: float = 30.0,
    threads: Integer = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    compile: bool = False,
    variant: Name = None,
    commercial_ok: bool = False,
) -> int:
    """Serve predictions over HTTP: POST /predict with an image, GET /health, GET /metrics.

    The answer to POST /predict is COCO JSON, a 16-bit label image (?format=png) or the drawn image (?format=overlay).
    Further options of the query: score_threshold (default 0.5; 0.25 if classes have no meaning; the system's own if it
    reads prompts), nms_threshold, detections, classes=a,b.

    Only this machine can reach the server unless --host is given. Then requests need the header "Authorization: Bearer
    TOKEN" with the value of the environment variable MASKWRIGHT_TOKEN, or, where that is not set, with a random token
    that is printed at the start. Encrypt the connection with a reverse proxy.

    Examples:
      maskwright serve runs/first/best.safetensors
      curl --data-binary @photo.jpg 'http://127.0.0.1:8000/predict?score_threshold=0.3'
      curl -F image=@photo.jpg 'http://127.0.0.1:8000/predict?format=overlay' -o drawn.jpg
      MASKWRIGHT_TOKEN=... maskwright serve best.safetensors --host 0.0.0.0 --port 8080

    Args:
        weights: A checkpoint of maskwright, an official file, or a name of the catalogue (`maskwright checkpoints`).
        host: Address to listen on.
        port: Its port; 0: a free one.
        allow_host: Further host names under which clients reach a server that only this machine can reach, as behind a
            reverse proxy.
        batch: Most images per forward pass.
        wait: Seconds that an image waits for others to share its forward pass.
        requests: Most requests in progress; more are answered with 503.
        max_bytes: Largest size of a request.
        max_pixels: Most pixels of an image.
        timeout: Seconds within which a request has to arrive, the model has to answer, and the client has to take the
            answer.
        threads: Threads of the network on a CPU; default: PyTorch's.
        device: Where to compute; auto takes a GPU if there is one.
        dtype: Precision of the network.
        compile: Compile the network first.
        variant: The published variant, if an official file's keys fit more than one.
        commercial_ok: Use only catalogue weights whose licence allows commercial use.
    """
    import torch

    from maskwright.checkpoints import load
    from maskwright.web.listening import bound
    from maskwright.web.serving import LOCAL_HOSTS, Limits, PredictionServer, is_loopback, run_server

    limits = Limits(max_bytes, max_pixels, requests, timeout, batch, wait)
    if threads is not None:
        if threads < 1:
            raise UsageError(f"--threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)
    opened = bound(host, port, listen=False)  # before the system is loaded, which may take long
    system = load(weights, commercial_ok=commercial_ok, variant=variant)
    local = is_loopback(host)
    token = os.environ.get(TOKEN) or (None if local else secrets.token_urlsafe(24))
    server = PredictionServer(
        system,
        limits,
        token,
        LOCAL_HOSTS | {name.lower() for name in allow_host} if local else None,
        device_named(device),
        dtype,
        compile,
    )
    place = f"[{host}]" if ":" in host else host
    print_line(f"{system.name} at http://{place}:{opened.getsockname()[1]}/predict")
    if not local and not os.environ.get(TOKEN):
        print_line(f"token: {token}")
    run_server(server, opened, limits.timeout)()
    return 0
