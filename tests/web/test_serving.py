"""The prediction server over a real connection: answers, refusals, limits, overload and stopping."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("uvicorn", reason="needs the extra web")
pytest.importorskip("starlette", reason="needs the extra web")
pytest.importorskip("prometheus_client", reason="needs the extra web")
pytest.importorskip("python_multipart", reason="needs the extra web")

import uvicorn
from starlette.datastructures import URL
from starlette.requests import HTTPConnection, Request

import maskwright as mw
from maskwright.data import Scenes
from maskwright.errors import UsageError
from maskwright.web import serving
from maskwright.web.guard import Rules
from maskwright.web.listening import bound, timed_protocol
from maskwright.web.serving import LOCAL_HOSTS, Limits, PredictionServer, is_loopback
from tests.systems.tiny import build


@pytest.fixture(scope="module")
def system() -> mw.System:
    torch.manual_seed(0)
    return build("solov2").eval()


@contextmanager
def running(system: mw.System, hold: threading.Event | None = None, **options: Any) -> Iterator[Any]:
    """A server on a free port; `hold`, while cleared, keeps the model busy."""
    server = PredictionServer(system, **options)
    compute = server._batcher._compute

    def held(images: Any, chosen: Any) -> Any:
        assert hold is None or hold.wait(20)
        return compute(images, chosen)

    server._batcher._compute = held
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    runner = uvicorn.Server(
        uvicorn.Config(
            server.app, "127.0.0.1", port, log_level="error", timeout_graceful_shutdown=20, ws="none",
            http=timed_protocol(server.limits.timeout),
        )
    )  # fmt: skip
    thread = threading.Thread(target=runner.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not runner.started and time.monotonic() < until:
        time.sleep(0.01)
    assert runner.started
    try:
        yield _Client(port, runner, thread)
    finally:
        if hold is not None:
            hold.set()
        runner.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class _Client:
    def __init__(self, port: int, runner: uvicorn.Server, thread: threading.Thread):
        self.port, self.runner, self.thread = port, runner, thread

    def __call__(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, named)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()


def encoded(size: tuple[int, int] = (64, 96), kind: str = "PNG", seed: int = 0) -> bytes:
    pixels = Scenes(1, size, seed=seed)[0].image.permute(1, 2, 0).numpy()
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


ENDPOINTS = "the endpoints are POST /predict, GET /health and GET /metrics"


def form(name: str, data: bytes, filename: str = "photo.png") -> tuple[bytes, str]:
    head = f'--XX\r\nContent-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
    return (
        head + "Content-Type: image/png\r\n\r\n"
    ).encode() + data + b"\r\n--XX--\r\n", "multipart/form-data; boundary=XX"


def test_the_answers_are_those_of_predict(system: mw.System):
    data = encoded()
    expected = cast(Any, mw.predict(system, data, score_threshold=0.0, detections=5)).instances
    assert len(expected) > 0
    with running(system) as client:
        path = "/predict?score_threshold=0&detections=5"
        status, headers, body = client("POST", path, data)
        assert (status, headers["content-type"]) == (200, "application/json")
        document = json.loads(body)
        assert document["images"] == [{"id": 1, "file_name": "image", "height": 64, "width": 96}]
        assert [c["name"] for c in document["categories"]] == list(system.classes)
        scores = [a["score"] for a in document["annotations"]]
        assert scores == pytest.approx(expected.scores.tolist(), abs=1e-5)
        codes = [a["segmentation"]["counts"] for a in document["annotations"]]
        assert codes == [code["counts"].decode() for code in expected.masks.rle()]
        content, kind = form("image", data)
        named = json.loads(client("POST", path, content, Content_Type=kind)[2])
        assert named["annotations"] == document["annotations"]
        assert named["images"][0]["file_name"] == "photo.png"

        status, headers, body = client("POST", path + "&format=png", data)
        plane = np.asarray(Image.open(io.BytesIO(body)))
        assert (status, headers["content-type"], plane.shape) == (200, "image/png", (64, 96))
        covered = expected.masks.dense().any(0).numpy()
        assert np.array_equal(plane > 0, covered)
        status, headers, body = client("POST", path, data, Accept="image/jpeg")
        assert (status, headers["content-type"]) == (200, "image/jpeg")
        assert Image.open(io.BytesIO(body)).size == (96, 64)

        status, _, body = client("GET", "/health")
        assert (status, json.loads(body)["status"], json.loads(body)["system"]) == (200, "ok", system.name)
        text = client("GET", "/metrics")[2].decode()
        assert 'maskwright_requests_total{path="/predict",status="200"} 4.0' in text
        assert "maskwright_batch_images_count 4.0" in text
        assert "maskwright_requests_in_progress 0.0" in text


@pytest.mark.parametrize(
    ("path", "body", "headers", "status", "words"),
    [
        ("/predict", b"", {}, 400, "the body is empty"),
        (
            "/predict",
            b"no image at all",
            {},
            400,
            "(it starts with 'no image at '); send an intact",
        ),
        ("/predict", encoded()[:200], {}, 400, "; send an intact image in a format such as PNG, JPEG or TIFF"),
        ("/predict?format=gif", encoded(), {}, 400, "format must be json, png or overlay, got 'gif'"),
        ("/predict?score_threshold=much", encoded(), {}, 400, "score_threshold must be a number, got 'much'"),
        ("/predict?limit=3", encoded(), {}, 400, "unknown option 'limit'"),
        ("/predict?classes=unicorn", encoded(), {}, 400, "unicorn"),
        ("/predict?detections=-1", encoded(), {}, 400, "detections"),
        ("/predict", b"x" * 30_001, {}, 413, "larger than 30000 bytes"),
        ("/predict", encoded((300, 400), "JPEG"), {}, 400, "more than the limit of 50000; send a smaller image"),
        ("/predict", b"--XX--\r\n", {"Content_Type": "multipart/form-data; boundary=XX"}, 400, "no files; send one"),
        ("/predict", b"rubbish", {"Content_Type": "multipart/form-data"}, 400, "boundary"),
        ("/predict", b"--XX\r\nrubbish\r\n", {"Content_Type": "multipart/form-data; boundary=XX"}, 400, "multipart"),
        ("/nothing", b"", {}, 404, f"Not Found; {ENDPOINTS}"),
        ("/predict/", encoded(), {}, 404, "Not Found"),
        ("/health", b"", {}, 405, f"Method Not Allowed; {ENDPOINTS}"),
        ("/predict", encoded(), {"Host": "evil.example"}, 421, "does not answer for host 'evil.example'"),
        ("/predict", encoded(), {"Origin": "https://evil.example"}, 403, "are refused"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_a_sentence(
    client: Any, path: str, body: bytes, headers: dict[str, str], status: int, words: str
):
    got, _, answer = client("POST", path, body, **headers)
    assert got == status, answer
    assert words in json.loads(answer)["error"]
    assert client("POST", "/predict", encoded())[0] == 200, "the server still answers"


@pytest.fixture(scope="module")
def client(system: mw.System) -> Iterator[Any]:
    with running(system, limits=Limits(bytes=30_000, pixels=50_000)) as served:
        yield served


def test_a_body_without_a_length_is_limited_too(client: Any):
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as raw:
        raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(4):
            raw.sendall(b"2710\r\n" + b"x" * 10_000 + b"\r\n")
        assert b" 413 " in raw.recv(65536)


def test_an_exposed_server_needs_its_token(system: mw.System):
    with running(system, token="secret", hosts=None) as client:
        data = encoded()
        assert client("POST", "/predict", data)[0] == 401
        assert client("POST", "/predict", data, Authorization="Bearer wrong")[0] == 401
        assert client("GET", "/metrics")[0] == 401
        assert client("POST", "/predict", data, Authorization="Bearer secret", Host="any.example")[0] == 200
        assert client("GET", "/health")[0] == 200


def test_overload_is_refused_and_clears(system: mw.System):
    hold = threading.Event()
    with running(system, hold, limits=Limits(requests=3, batch=1)) as client:
        data = encoded()
        answers: list[int] = []
        threads = [
            threading.Thread(target=lambda: answers.append(client("POST", "/predict", data)[0])) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until = time.monotonic() + 10
        while b"in_progress 3.0" not in client("GET", "/metrics")[2] and time.monotonic() < until:
            time.sleep(0.02)
        status, headers, body = client("POST", "/predict", data)
        assert (status, headers["retry-after"]) == (503, "1")
        assert "3 requests are in progress" in json.loads(body)["error"]
        hold.set()
        for thread in threads:
            thread.join(20)
        assert answers == [200, 200, 200]
        assert client("POST", "/predict", data)[0] == 200


def test_slow_bodies_and_slow_models_time_out(system: mw.System):
    hold = threading.Event()
    with running(system, hold, limits=Limits(timeout=0.3)) as client:
        status, _, body = client("POST", "/predict", encoded())
        assert (status, json.loads(body)["error"]) == (504, "the model did not answer within 0.3 s")
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as raw:
            raw.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nonly this")
            assert b" 408 " in raw.recv(65536)


def test_connections_whose_headers_do_not_arrive_are_closed(system: mw.System):
    with running(system, limits=Limits(timeout=0.3)) as client:
        whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
        for begun in (b"", whole[:30]):
            with socket.create_connection(("127.0.0.1", client.port), timeout=20) as raw:
                raw.sendall(begun)
                with contextlib.suppress(ConnectionResetError):
                    assert raw.recv(65536) == b""
        with socket.create_connection(("127.0.0.1", client.port), timeout=20) as raw:
            for _ in range(2):
                raw.sendall(whole)
                answer = b""
                while not answer.endswith(b"}"):  # header and body may arrive apart
                    answer += raw.recv(65536)
                assert b" 200 " in answer
                time.sleep(0.5)  # between requests a connection may rest longer
            raw.sendall(whole[:30])
            with contextlib.suppress(ConnectionResetError):
                assert raw.recv(65536) == b""


@pytest.mark.fast
def test_an_address_that_is_not_available_is_named():
    with pytest.raises(UsageError, match=r"cannot listen on 127\.0\.0\.1:70000"):
        bound("127.0.0.1", 70000)
    with pytest.raises(UsageError, match="cannot listen on no such host:80"):
        bound("no such host", 80)
    with bound("127.0.0.1", 0) as first:
        assert first.proto == socket.IPPROTO_TCP, "otherwise asyncio leaves Nagle's algorithm on, which delays answers"
        taken = first.getsockname()[1]
        with pytest.raises(UsageError, match=rf"cannot listen on 127\.0\.0\.1:{taken} .*--port"):
            bound("127.0.0.1", taken)
        with bound("127.0.0.1", taken, 0) as second:
            assert second.getsockname()[1] != taken


def test_requests_of_clients_that_leave_are_dropped(system: mw.System):
    hold = threading.Event()
    with running(system, hold, limits=Limits(batch=1)) as client:
        data = encoded()
        head = f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        left = [socket.create_connection(("127.0.0.1", client.port)) for _ in range(4)]
        for raw in left:
            raw.sendall(head + data)
        until = time.monotonic() + 10
        while b"in_progress 4.0" not in client("GET", "/metrics")[2] and time.monotonic() < until:
            time.sleep(0.02)
        for raw in left:
            raw.close()
        while b"in_progress 0.0" not in client("GET", "/metrics")[2] and time.monotonic() < until:
            time.sleep(0.02)
        hold.set()
        assert client("POST", "/predict", data)[0] == 200
        text = client("GET", "/metrics")[2].decode()
        computed = next(line for line in text.splitlines() if line.startswith("maskwright_batch_images_count"))
        assert float(computed.split()[1]) <= 2, "the one that had begun, and the last"


def test_requests_in_progress_are_answered_before_the_server_ends(system: mw.System):
    hold = threading.Event()
    with running(system, hold) as client:
        answers: list[int] = []
        thread = threading.Thread(target=lambda: answers.append(client("POST", "/predict", encoded())[0]))
        thread.start()
        until = time.monotonic() + 10
        while b"in_progress 1.0" not in client("GET", "/metrics")[2] and time.monotonic() < until:
            time.sleep(0.02)
        client.runner.should_exit = True
        time.sleep(0.2)
        hold.set()
        thread.join(20)
        assert answers == [200]
        client.thread.join(20)
        with pytest.raises(OSError, match="refused"):
            client("GET", "/health")


def test_limits_and_addresses_are_checked():
    with pytest.raises(UsageError, match="batch must be at least 1"):
        Limits(batch=0)
    for wrong in (0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="timeout must be positive"):
            Limits(timeout=wrong)
    assert is_loopback("127.0.0.1")
    assert is_loopback("::1")
    assert is_loopback("localhost")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("::")
    assert "localhost" in LOCAL_HOSTS


def test_a_form_has_one_file_alone(client: Any):
    content, kind = form("photo", encoded())
    status, _, answer = client("POST", "/predict", content, Content_Type=kind)
    assert status == 200, "its name does not matter"
    content, kind = form("image", encoded())
    option = b'--XX\r\nContent-Disposition: form-data; name="detections"\r\n\r\n3\r\n'
    status, _, answer = client("POST", "/predict", option + content, Content_Type=kind)
    assert status == 400
    assert "the field 'detections'" in json.loads(answer)["error"]
    assert "options are sent in the query" in json.loads(answer)["error"]
    status, _, answer = client("POST", "/predict", content.removesuffix(b"--XX--\r\n") + content, Content_Type=kind)
    assert status == 400
    assert "the form has 2 files; send one, named 'image'" in json.loads(answer)["error"]


@pytest.mark.parametrize(
    ("message", "answer"),
    [
        ("the image: is damaged (a; b); replace or remove it", "the image: is damaged (a; b); send an intact image"),
        ("the image: is too large; resize it, or predict with `tile` (...)", "the image: is too large; send a smaller"),
        ("the image: mode LAB is not supported; convert it to RGB", "mode LAB is not supported; convert it to RGB"),
    ],
)
def test_advice_is_for_clients(message: str, answer: str):
    assert answer in serving._for_a_client(message)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
def test_a_signal_is_answered_with_what_the_server_waits_for(system: mw.System, capsys: pytest.CaptureFixture[str]):
    seen: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: seen.append(number))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    try:
        serving.run_server(PredictionServer(system), bound("127.0.0.1", 0, listen=False))()
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    assert seen == [signal.SIGTERM], "the process ends by the signal"
    assert capsys.readouterr().err == "SIGTERM: finishing the open requests\n"


def test_a_form_in_a_code_that_fails_is_refused(client: Any):
    body = b'--XX\r\nContent-Disposition: form-data; name="a-!!"\r\n\r\nx\r\n--XX--\r\n'
    status, _, answer = client(
        "POST", "/predict", body, Content_Type="multipart/form-data; boundary=XX; charset=punycode"
    )
    assert status == 400, answer


def test_a_drawing_that_jpeg_does_not_hold_is_refused(client: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(serving, "_JPEG", 95)
    status, _, answer = client("POST", "/predict?format=overlay", encoded())
    assert (status, json.loads(answer)["error"]) == (
        400, "JPEG has at most 95 pixels a side; use another format than overlay"
    )  # fmt: skip
    assert client("POST", "/predict?format=png", encoded())[0] == 200


def test_a_mistake_of_the_server_is_answered_as_json(client: Any, monkeypatch: pytest.MonkeyPatch):
    def fail(*values: Any) -> Any:
        raise ZeroDivisionError("of a system")

    monkeypatch.setattr(serving, "_encoded", fail)
    status, headers, answer = client("POST", "/predict", encoded())
    assert (status, headers["content-type"]) == (500, "application/json")
    assert "the server could not answer (ZeroDivisionError)" in json.loads(answer)["error"]
    monkeypatch.undo()
    assert client("POST", "/predict", encoded())[0] == 200


def test_a_client_that_does_not_take_its_answer_is_given_up(system: mw.System, monkeypatch: pytest.MonkeyPatch):
    """Until then its request is in progress: answers that wait cannot fill the memory."""
    large = 16 << 20
    monkeypatch.setattr(serving, "_encoded", lambda *values: (bytes(large), "image/png"))
    with running(system, limits=Limits(timeout=3.0)) as client:
        status, headers, body = client("POST", "/predict", encoded())
        assert (status, headers["content-length"], len(body)) == (200, str(large), large)
        data = encoded()
        with socket.socket() as raw:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
            raw.connect(("127.0.0.1", client.port))
            raw.sendall(
                f"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data
            )
            assert raw.recv(16)
            assert b"in_progress 1.0" in client("GET", "/metrics")[2]
            until = time.monotonic() + 10
            while b"in_progress 0.0" not in client("GET", "/metrics")[2] and time.monotonic() < until:
                time.sleep(0.05)
            raw.settimeout(20)
            received = 0
            with contextlib.suppress(ConnectionResetError):
                while part := raw.recv(1 << 20):
                    received += len(part)
            assert received < large


def test_a_system_without_masks_has_no_label_image():
    """It would be an image without objects."""
    with running(build("fcos").eval()) as client:
        status, _, answer = client("POST", "/predict?format=png", encoded())
        assert status == 400
        assert "fcos predicts no masks" in json.loads(answer)["error"]
        assert client("POST", "/predict?format=overlay", encoded())[0] == 200


@pytest.mark.fast
def test_the_options_of_a_request(system: mw.System):
    def options(server: PredictionServer, query: bytes) -> dict[str, Any]:
        return dict(server._wanted_options(Request({"type": "http", "query_string": query, "headers": []})))

    server = PredictionServer(build("solov2", classes=("a, b", "c", "d")))
    assert options(server, b"") == {"score_threshold": 0.5}
    assert options(server, b"classes=a%2C%20b&classes=c,d") == {"score_threshold": 0.5, "classes": ("a, b", "c", "d")}
    assert options(server, b"classes=c,%20d&score_threshold=0.1")["classes"] == ("c", "d")
    prompted = PredictionServer(build("sam"))
    assert options(prompted, b"") == {}, "scores of another kind: its own threshold"


class _Earlier(HTTPConnection):
    """As in versions of Starlette that put the header Host into the address as it is."""

    @property
    def url(self) -> URL:
        return URL(f"http://{self.headers['host']}{self.scope['path']}")


def _connection(path: str, **headers: bytes) -> HTTPConnection:
    pairs = [(name.encode(), value) for name, value in headers.items()]
    return _Earlier({"type": "http", "path": path, "query_string": b"", "headers": pairs})


@pytest.mark.fast
def test_a_host_header_does_not_replace_the_token():
    rules = Rules("secret", None, frozenset({"/health"}))
    refused = rules.refusal(_connection("/predict", host=b"x/health?"))
    assert refused is not None
    assert refused.status_code == 401
    assert rules.refusal(_connection("/health", host=b"x")) is None


@pytest.mark.fast
def test_tokens_are_compared_as_bytes_and_their_scheme_in_any_case():
    rules = Rules("schl\u00fcssel", None)
    given = "schl\u00fcssel".encode()
    for scheme in (b"Bearer ", b"bearer ", b"BEARER  "):
        assert rules.refusal(_connection("/predict", host=b"x", authorization=scheme + given)) is None
    for wrong in (b"Bearer", b"Basic " + given, given, b"Bearer schl\xfcssel", b"Bearer " + given + b"x"):
        assert rules.refusal(_connection("/predict", host=b"x", authorization=wrong)) is not None
