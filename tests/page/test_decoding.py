"""Masks that the page decodes by itself, with the weights that are installed, are those of the server."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
for name in ("starlette", "uvicorn"):
    pytest.importorskip(name, reason="needs the extra web")
for name in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(name, reason="needs the extra export")

from maskwright.structures import Embedding, Masks  # noqa: E402 - only where the server is
from maskwright.systems import System  # noqa: E402
from maskwright.web.assistant import Answer, Assistant, Prompt  # noqa: E402
from maskwright.web.embeddings import half  # noqa: E402
from maskwright.web.sources import Source  # noqa: E402
from maskwright.web.starting import Plan, promptable_system  # noqa: E402
from tests.page.running import FLAGS, Running, chromium, draw_image  # noqa: E402
from tests.systems.tiny import build  # noqa: E402

if chromium() is None:
    pytest.skip("needs chromium", allow_module_level=True)

Mask = np.ndarray[Any, Any]
DISCS = [(100, 90, 45), (280, 100, 60), (120, 230, 50), (300, 240, 35)]
TALL = [(70, 90, 40), (150, 250, 55), (60, 330, 30)]


class Timed(Assistant):
    """A system whose answers take a while longer, and are counted. Embeddings are those that the page receives."""

    def __init__(self, source: Source, folder: Path, system: System | None = None):
        own = system or promptable_system(Plan("images"), False)
        assert own is not None
        super().__init__(source, own, folder, "cpu")
        self.delay = 0.0
        self.asked: list[Prompt] = []

    def embedding(self, index: int) -> Embedding:
        return half(super().embedding(index)).to(dtype=torch.float32)

    def answer(self, index: int, prompt: Prompt) -> Answer:
        self.asked.append(prompt)
        time.sleep(self.delay)
        return super().answer(index, prompt)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("images")
    draw_image(folder / "a_wide.png", (400, 300), DISCS)
    draw_image(folder / "b_tall.png", (211, 377), TALL, holes=True)
    running = Running(folder, ("cell",), make=lambda source: Timed(source, folder / ".maskwright" / "embeddings"))
    running.assistant.page_decoder.graph()
    yield running
    running.stop()


Open = Callable[..., Any]


@pytest.fixture
def open_page(server: Running) -> Iterator[Open]:
    """Opens an image of the server in Chromium, with a choice of where clicks are answered."""
    with opening(server) as make:
        yield make


@contextmanager
def opening(server: Running) -> Iterator[Open]:
    """What opens an image in Chromium.

    Nothing else can be reached: other names are not resolved, and requests that leave the origin fail the test.
    """
    with playwright.sync_playwright() as running:
        offline = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        chrome = running.chromium.launch(executable_path=chromium(), args=[*FLAGS, offline], headless=True)
        errors: list[str] = []
        server.assistant.asked.clear()

        def guard(route: Any) -> None:
            if urlsplit(route.request.url).netloc == urlsplit(server.address).netloc:
                route.continue_()
            else:
                errors.append(f"asks {route.request.url}")
                route.abort()

        def make(image: int, place: str) -> Any:
            page = chrome.new_page(viewport={"width": 900, "height": 600})
            page.set_default_timeout(30_000)
            page.route(lambda url: url.startswith(("http", "ftp")), guard)
            page.on("websocket", lambda socket: errors.extend([socket.url] * (server.address[4:-1] not in socket.url)))
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
            page.add_init_script(f"localStorage.setItem('maskwright-decoder', '{place}')")
            page.goto(f"{server.address}#image={image}")
            page.wait_for_selector("#assist:has-text('ready')")
            return page

        yield make
        chrome.close()
        assert errors == []


def at(page: Any, x: float, y: float) -> tuple[float, float]:
    """Window position of a place of the image."""
    zoom, left, top, box_x, box_y = page.evaluate(
        "() => { const s = document.getElementById('stage'); const b = s.getBoundingClientRect();"
        " return [+s.dataset.zoom, +s.dataset.left, +s.dataset.top, b.left, b.top]; }"
    )
    return box_x + left + x * zoom, box_y + top + y * zoom


def placed(page: Any, x: float, y: float) -> tuple[float, float]:
    """The place of the image that a click there means, as the page computes it."""
    (window_x, window_y), (zero_x, zero_y) = at(page, x, y), at(page, 0, 0)
    zoom = float(page.get_attribute("#stage", "data-zoom"))
    return (round(window_x) - zero_x) / zoom, (round(window_y) - zero_y) / zoom


def click(page: Any, x: float, y: float, **options: Any) -> None:
    window_x, window_y = at(page, x, y)
    page.mouse.click(round(window_x), round(window_y), **options)


def until(page: Any, condition: Callable[[], Any]) -> Any:
    for _ in range(300):
        if value := condition():
            return value
        page.wait_for_timeout(40)
    raise AssertionError(f"not reached; the page says {page.inner_text('#say')!r}")


def of_counts(counts: str, size: tuple[int, int]) -> Mask:
    return Masks("rle", [counts.encode()], size).dense().numpy()[0]


def iou(a: Mask, b: Mask) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_page_decodes_what_the_server_decodes(server: Running, open_page: Open):
    asked: list[str] = []
    page = open_page(0, "page")
    page.on("request", lambda request: asked.append(urlsplit(request.url).path))
    page.reload()
    page.wait_for_selector("#assist[data-place=page]")
    assert {"/decoder.js", "/ort-wasm-simd-threaded.wasm", "/api/decoder", "/api/images/0/embedding"} <= set(asked)
    page.uncheck("#hover")
    for number, (x, y, r) in enumerate(DISCS[:2]):
        click(page, x + 5, y)
        [first] = until(page, lambda n=number: server.masks(0)[n : n + 1])
        click(page, x - r - 15, y, button="right")
        [second] = until(page, lambda n=number, m=first: [s for s in server.masks(0)[n : n + 1] if (s != m).any()])
        assert server.assistant.asked == [], "the server answers nothing"
        prompt = Prompt(((*placed(page, x + 5, y), 1),))
        own = Assistant.answer(server.assistant, 0, prompt)
        assert iou(first, of_counts(own.counts, (300, 400))) >= 0.99
        assert first.sum() > 100
        further = Prompt((*prompt.points, (*placed(page, x - r - 15, y), 0)), None, own.counts)
        assert iou(second, of_counts(Assistant.answer(server.assistant, 0, further).counts, (300, 400))) >= 0.99
        page.keyboard.press("Enter")

    page.keyboard.press(".")
    page.wait_for_selector("#stage[aria-label*='211 by 377']")
    page.wait_for_selector("#assist[data-place=page]")
    page.keyboard.press("x")
    x, y, r = TALL[1]
    page.mouse.move(*map(round, at(page, x - r, y - r)))
    page.mouse.down()
    page.mouse.move(*map(round, at(page, x + r, y + r)), steps=3)
    page.mouse.up()
    [boxed] = until(page, lambda: server.masks(1))
    box = (*placed(page, x - r, y - r), *placed(page, x + r, y + r))
    own = Assistant.answer(server.assistant, 1, Prompt((), box))
    assert server.assistant.asked == []
    assert iou(boxed, of_counts(own.counts, (377, 211))) >= 0.99

    # A mask that was painted by hand has no logits here: the server improves it.
    page.keyboard.press("b")
    page.mouse.move(*at(page, x, y))
    page.mouse.down()
    page.mouse.move(*at(page, x + r + 20, y), steps=3)
    page.mouse.up()
    until(page, lambda: (server.masks(1)[0] != boxed).any())
    page.keyboard.press("c")
    click(page, x, y + 10)
    until(page, lambda: server.assistant.asked)
    assert server.assistant.asked[0].counts is not None


# Without a promptable token for masks and with cubic resizing; with finer maps and another choice among the answers;
# and two with the decoder of SAM, of which the weights that are installed are an example already.
@pytest.mark.runtime
@pytest.mark.parametrize("name", ["efficient-sam", "sam2", "mobile-sam", "edge-sam"])
def test_page_decodes_every_kind_of_decoder(name: str, tmp_path: Path):
    draw_image(tmp_path / "a.png", (211, 150), [(60, 70, 40), (150, 80, 30)])
    system = build(name).eval()
    server = Running(tmp_path, ("cell",), make=lambda source: Timed(source, tmp_path / "embeddings", system))
    assistant, size = server.assistant, (150, 211)

    def answer(prompt: Prompt) -> tuple[str, Mask]:
        found = Assistant.answer(assistant, 0, prompt)
        return found.counts, of_counts(found.counts, size)

    try:
        with opening(server) as make:
            page = make(0, "page")
            page.wait_for_selector("#assist[data-place=page]", timeout=300_000)
            page.uncheck("#hover")
            places = [placed(page, x, y) for x in range(20, 200, 30) for y in range(20, 140, 30)]
            areas = [int(answer(Prompt(((x, y, 1),)))[1].sum()) for x, y in places]
            x, y = places[min(range(len(places)), key=lambda n: abs(areas[n] - 150 * 211 / 3))]
            click(page, x, y)
            [first] = until(page, lambda: server.masks(0))
            prompt = Prompt(((*placed(page, x, y), 1),))
            counts, expected = answer(prompt)
            assert 100 < expected.sum() < 150 * 211 - 100, "weights at random give a mask that can be compared"
            assert iou(first, expected) >= 0.99
            out = max(places, key=lambda place: abs(place[0] - x) + abs(place[1] - y))
            click(page, *out, button="right")
            further = Prompt((*prompt.points, (*placed(page, *out), 0)), None, counts)
            _, expected = answer(further)
            if (expected != first).any() and expected.any():
                until(page, lambda: (server.masks(0)[0] != first).any())
                assert iou(server.masks(0)[0], expected) >= 0.99
            page.keyboard.press("Enter")
            page.keyboard.press("x")
            page.mouse.move(*map(round, at(page, 20, 30)))
            page.mouse.down()
            page.mouse.move(*map(round, at(page, 180, 120)), steps=3)
            page.mouse.up()
            box = (*placed(page, 20, 30), *placed(page, 180, 120))
            _, expected = answer(Prompt((), box))
            if expected.any():
                boxed = until(page, lambda: server.masks(0)[1:])
                assert iou(boxed[0], expected) >= 0.99
            assert assistant.asked == [], "the server answers nothing"
    finally:
        server.stop()


def test_page_decodes_by_itself_only_where_the_server_is_far(
    server: Running, open_page: Open, monkeypatch: pytest.MonkeyPatch
):
    asked: list[str] = []
    page = open_page(0, "auto")
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_selector("#assist[data-place=server]")
    state = "#decode-state"
    server.assistant.delay = 0.5
    monkeypatch.setattr("maskwright.web.live.timed", lambda begin: 1.0)  # the rest is time on the way
    try:
        for x in range(20, 80, 10):
            before = len(server.assistant.asked)
            page.mouse.move(*at(page, x, 20))
            until(page, lambda n=before: len(server.assistant.asked) > n)
        page.wait_for_selector("#assist[data-place=page]", timeout=60_000)
        assert page.text_content(state).endswith("Clicks are answered by the page.")
        assert "An answer of the server takes " in page.text_content(state)
        asked_before = len(server.assistant.asked)
        page.mouse.move(*at(page, 280, 100))
        page.wait_for_timeout(300)
        assert len(server.assistant.asked) == asked_before
    finally:
        server.assistant.delay = 0.0
    assert any(url.endswith("/api/decoder") for url in asked)
    page.click("#assist")
    page.check("#decode-server")
    page.wait_for_selector("#assist[data-place=server]")


def test_page_does_not_compete_with_a_busy_server_of_its_machine(server: Running, open_page: Open):
    asked: list[str] = []
    page = open_page(0, "auto")
    page.on("request", lambda request: asked.append(request.url))
    server.assistant.delay = 0.2
    try:
        for x in range(20, 70, 10):
            before = len(server.assistant.asked)
            page.mouse.move(*at(page, x, 20))
            until(page, lambda n=before: len(server.assistant.asked) > n)
        until(page, lambda: "An answer of the server takes" in page.text_content("#decode-state"))
        page.wait_for_timeout(300)
    finally:
        server.assistant.delay = 0.0
    assert page.get_attribute("#assist", "data-place") == "server"
    assert not any("decoder" in url for url in asked)


def test_page_says_why_it_cannot_decode(server: Running, open_page: Open, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("maskwright.web.decoding.NEEDED", ("no_such_package",))
    page = open_page(0, "page")
    assert page.is_disabled("#decode-page")
    assert page.text_content("#decode-state") == (
        "The page cannot decode by itself, because the server has no maskwright[export]. "
        "Clicks are answered by the server."
    )
    click(page, 300, 240)
    until(page, lambda: server.assistant.asked)


def test_graph_of_the_page_is_kept_and_computes_what_torch_computes(server: Running):
    from maskwright.web.decoding import PageDecoder

    decoder = server.assistant.page_decoder
    again = PageDecoder(decoder.system, decoder.folder)
    begin = time.perf_counter()
    assert again.graph() == decoder.graph()
    assert time.perf_counter() - begin < 2, "it is read from the disk"
    assert (decoder.folder / f"{decoder.name}.onnx").read_bytes() == decoder.graph()
    assert torch.is_grad_enabled()
