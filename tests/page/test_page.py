"""The page in a browser, against the real server with an assistant that knows the shapes of the images."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
pytest.importorskip("starlette", reason="needs the extra web")
pytest.importorskip("uvicorn", reason="needs the extra web")
annotating = pytest.importorskip("maskwright.web.annotating", reason="needs the annotation server")

from tests.page.running import FLAGS, Running, chromium, draw_image  # noqa: E402 - only where the server is

if chromium() is None:
    pytest.skip("needs chromium", allow_module_level=True)

SIZE = (240, 160)
DISCS = [(40, 40, 20), (120, 40, 24), (200, 40, 16), (40, 120, 18), (120, 120, 26), (200, 120, 22)]
RING = (120, 80, 45)
CLASSES = ("cell", "<img src=x onerror=alert(1)>", "other")
HOSTILE = "</script><img src=x onerror=alert(1)>.png"
RINGS, HOSTILE_IMAGE = 1, 0  # places of images in the sorted folder


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as running:
        chrome = running.chromium.launch(executable_path=chromium(), args=list(FLAGS), headless=True)
        yield chrome
        chrome.close()


# Stricter than what the server sends: no inline code, and no text may become HTML anywhere in the page.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "require-trusted-types-for 'script'"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("images")
    draw_image(folder / "b_rings.png", SIZE, [RING], holes=True)
    for name in "cdefghijk":
        draw_image(folder / f"{name}_discs.png", SIZE, DISCS)
    hostile = folder / HOSTILE.replace("/", "\u2215")
    draw_image(hostile, SIZE, DISCS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(annotating.HEADERS, "Content-Security-Policy", POLICY)
        running = Running(folder, CLASSES)
        yield running
        running.stop()


# The colour that the lower canvas has at a place of the window.
PIXEL = """([x, y]) => {
  const canvas = document.getElementById('base'), box = canvas.getBoundingClientRect();
  return [...canvas.getContext('2d').getImageData(x - box.left, y - box.top, 1, 1).data].slice(0, 3);
}"""


class Tab:
    """One tab that shows an image."""

    def __init__(self, browser: Any, server: Running, image: int, prepare: Callable[[Any], None] | None = None):
        self.server, self.image = server, image
        self.context = browser.new_context(viewport={"width": 900, "height": 600}, service_workers="block")
        self.page = self.context.new_page()
        self.page.set_default_timeout(15_000)
        self.errors: list[str] = []
        self.tolerated: tuple[str, ...] = ()
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(f"dialog: {dialog.message}") or dialog.dismiss())
        self.page.on("console", lambda line: self.errors.append(line.text) if line.type == "error" else None)
        if prepare is not None:
            prepare(self.page)
        self.page.goto(f"{server.address}#image={image}")
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector(f"#stage[aria-label*='{SIZE[0]} by {SIZE[1]}']")
        self.page.wait_for_selector("#assist:has-text('ready')")

    def close(self) -> None:
        self.context.close()
        assert [line for line in self.errors if not any(one in line for one in self.tolerated)] == []

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Window position of a place of the image."""
        zoom, left, top, box_x, box_y = self.page.evaluate(
            "() => { const s = document.getElementById('stage'); const b = s.getBoundingClientRect();"
            " return [+s.dataset.zoom, +s.dataset.left, +s.dataset.top, b.left, b.top]; }"
        )
        return box_x + left + x * zoom, box_y + top + y * zoom

    def click(self, x: float, y: float, **options: Any) -> None:
        self.page.mouse.click(*self.place(x, y), **options)

    def drag(self, *points: tuple[float, float]) -> None:
        places = [self.place(*point) for point in points]
        self.page.mouse.move(*places[0])
        self.page.mouse.down()
        for place in places[1:]:
            self.page.mouse.move(*place, steps=3)
        self.page.mouse.up()

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def drawn(self, x: float, y: float, canvas: str = "top") -> bool:
        """Whether something is drawn above the image at a place."""
        client_x, client_y = self.place(x, y)
        return self.page.evaluate(
            "([id, x, y]) => { const c = document.getElementById(id), b = c.getBoundingClientRect();"
            " return c.getContext('2d').getImageData(x - b.left, y - b.top, 1, 1).data[3] > 20; }",
            [canvas, client_x, client_y],
        )

    def until(self, condition: Callable[[], Any]) -> Any:
        for _ in range(300):
            if value := condition():
                return value
            self.page.wait_for_timeout(30)
        raise AssertionError(f"not reached; the page says {self.page.inner_text('#say')!r}, {self.errors}")

    def when(self, condition: Callable[[list[np.ndarray[Any, Any]]], Any]) -> list[np.ndarray[Any, Any]]:
        """The saved masks of the image, once they fulfil a condition."""
        masks: list[list[np.ndarray[Any, Any]]] = []

        def found() -> bool:
            masks[:] = [self.server.masks(self.image)]
            return bool(masks[0]) and bool(condition(masks[0]))

        self.until(found)
        return masks[0]

    def saved(self, count: int) -> list[np.ndarray[Any, Any]]:
        """The saved masks of the image, once the page says that all are saved and there are `count`."""

        def found() -> bool:
            state = self.page.get_attribute("#status", "data-state")
            return state == "saved" and len(self.server.project.state(self.image).objects) == count

        self.until(found)
        return self.server.masks(self.image)

    def count(self, count: int) -> None:
        """Wait until the page shows so many objects."""
        self.until(lambda: self.page.inner_text("#object-count") == str(count))


@pytest.fixture
def tab(browser: Any, server: Running) -> Iterator[Callable[..., Tab]]:
    tabs: list[Tab] = []

    def make(image: int, prepare: Callable[[Any], None] | None = None) -> Tab:
        tabs.append(Tab(browser, server, image, prepare))
        return tabs[-1]

    yield make
    for one in tabs:
        one.close()


def disc(x: float, y: float, r: float) -> np.ndarray[Any, Any]:
    """The pixels that Pillow fills for an ellipse of this radius, almost."""
    rows, columns = np.mgrid[: SIZE[1], : SIZE[0]]
    return (columns - x) ** 2 + (rows - y) ** 2 <= (r + 0.4) ** 2


def iou(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> float:
    return float((a & b).sum() / (a | b).sum())


def test_hover_shows_the_mask_that_a_click_takes_and_hand_work_changes_it(server: Running, tab: Callable[..., Tab]):
    page = tab(RINGS)
    x, y, r = RING
    server.assistant.asked.clear()
    page.page.mouse.move(*page.place(x + 30, y))
    page.until(lambda: page.drawn(x - 30, y))
    assert not page.drawn(x, y)  # the hole
    assert server.project.state(RINGS).objects == {}
    page.click(x + 30, y)
    [ring] = page.saved(1)
    assert iou(ring, disc(x, y, r) & ~disc(x, y, r / 3)) > 0.97
    assert not ring[y, x]
    assert len(server.assistant.asked) == 1, "the mask that was shown is taken, without another prompt"

    page.press("b")
    page.drag((x + 40, y - 60), (x + 60, y - 60))
    [added] = page.when(lambda masks: masks[0][y - 60, x + 50])
    assert not added[y, x], "the hole is kept"
    assert (added & ring).sum() == ring.sum()
    page.press("e")
    page.drag((x - 30, y), (x - 60, y))
    [erased] = page.when(lambda masks: not masks[0][y, x - 32])
    assert erased[y - 60, x + 50]
    # A click for the background, which the assistant answers for the whole image, keeps what was painted elsewhere.
    page.press("c")
    page.click(x + 30, y, button="right")
    [clicked] = page.when(lambda masks: not masks[0][y, x + 30])
    assert clicked[y - 60, x + 50]
    made = [step["how"] for step in next(iter(server.project.state(RINGS).objects.values())).made]
    assert made == ["click", "brush", "eraser", "click"]

    page.press("Control+z", "Control+z", "Control+z")
    page.when(lambda masks: np.array_equal(masks[0], ring))
    page.press("Control+z")
    page.saved(0)
    page.press("Control+Shift+z", "Control+y")
    page.when(lambda masks: np.array_equal(masks[0], added))
    page.saved(1)
    page.page.reload()
    page.ready()
    page.count(1)
    assert page.page.get_attribute("#undo", "disabled") is not None


def test_box_polygon_split_merge_delete_and_classes(server: Running, tab: Callable[..., Tab]):
    page = tab(2)
    page.press("x")
    page.drag((94, 14), (146, 66))
    [box] = page.saved(1)
    assert iou(box, disc(120, 40, 24)) > 0.97
    page.press("Escape", "p")
    for corner in ((10, 90), (70, 90), (70, 150), (10, 150)):
        page.click(*corner)
    page.press("Enter")
    _, polygon = page.saved(2)
    assert polygon.sum() == 60 * 60
    assert polygon[90:150, 10:70].all()
    # A polygon with Alt makes a hole in the same object.
    page.page.keyboard.down("Alt")
    for corner in ((30, 110), (50, 110), (50, 130), (30, 130)):
        page.click(*corner)
    page.page.keyboard.up("Alt")
    page.press("Enter")
    page.when(lambda masks: masks[1].sum() == 60 * 60 - 20 * 20)
    page.press("k")
    page.drag((40, 85), (40, 155))
    masks = page.saved(3)
    assert masks[1].sum() + masks[2].sum() == 60 * 60 - 20 * 20, "no pixel is lost"
    assert not (masks[1] & masks[2]).any()
    page.press("2")
    page.until(lambda: [o.label for o in server.project.state(2).objects.values()] == [0, 1, 1])
    page.press("m")
    masks = page.saved(2)
    assert masks[1].sum() == 60 * 60 - 20 * 20
    page.press("Delete")
    page.saved(1)
    page.press("Control+z")
    page.saved(2)


def test_quick_clicks_do_not_wait_for_the_assistant(server: Running, tab: Callable[..., Tab]):
    page = tab(8)
    page.page.uncheck("#hover")
    server.assistant.delay = 0.25
    try:
        for x, y, _ in DISCS[:3]:
            page.click(x, y)
            page.press("Enter")
        page.drag((14, 96), (66, 144))  # around the fourth
        masks = page.saved(4)
        assert all(iou(mask, disc(*place)) > 0.97 for mask, place in zip(masks, DISCS, strict=False))
        # A second object joins the fourth while the assistant works, and a background click takes it away again.
        page.click(120, 120)
        page.click(122, 120, button="right")
        page.page.wait_for_timeout(600)
        assert iou(page.saved(4)[3], disc(*DISCS[3])) > 0.97
        made = list(server.project.state(8).objects.values())[3].made
        assert [(step["how"], step["clicks"]) for step in made] == [("box", 1), ("click", 2)]
    finally:
        server.assistant.delay = 0.0


def test_everything_works_from_the_keyboard(server: Running, tab: Callable[..., Tab]):
    page = tab(3)
    page.page.focus("#stage")
    page.press("ArrowLeft")  # the cross appears in the middle
    zoom = float(page.page.get_attribute("#stage", "data-zoom"))
    for _ in range(round(40 * zoom / 12)):
        page.press("ArrowDown")
    page.press("Space")
    [mask] = page.saved(1)
    assert iou(mask, disc(120, 120, 26)) > 0.97
    page.press("3", "Shift+Enter")
    page.until(lambda: server.project.state(3).done)
    assert next(iter(server.project.state(3).objects.values())).label == 2
    page.until(lambda: page.page.url.endswith("#image=4"))
    page.press("?")
    assert page.page.is_visible("#help-keys")
    page.press("Escape", ",")
    page.until(lambda: page.page.url.endswith("#image=3"))
    page.count(1)
    page.press("w")
    page.page.wait_for_selector("#objects [aria-selected=true]")
    assert "other" in page.page.inner_text("#objects [aria-selected=true]")
    page.page.keyboard.press("Tab")
    assert page.page.evaluate("document.activeElement.id") != "stage"


def test_two_tabs_see_each_other_and_nobodys_work_is_overwritten(server: Running, tab: Callable[..., Tab]):
    held: list[Any] = []

    def deaf(page: Any) -> None:
        """The page does not hear what others change, as if both changed it at the same moment."""

        def route(socket: Any) -> None:
            upstream = socket.connect_to_server()
            upstream.on_message(lambda text: held.append(text) if '"changed"' in text else socket.send(text))

        page.route_web_socket("**/api/live", route)

    first, second = tab(4, deaf), tab(4)
    first.click(40, 40)
    [before] = first.saved(1)
    second.count(1)
    second.click(200, 40)
    second.saved(2)
    assert len(server.masks(4)) == 2, "different objects do not conflict"
    second.press("Escape")
    second.click(40, 40)  # selects the object of the other tab
    second.press("b")
    second.drag((40, 70), (60, 70))
    theirs = second.when(lambda masks: masks[0][70, 50])[0]
    first.press("e")
    first.drag((30, 40), (50, 40))
    first.page.wait_for_selector("#conflicts:not([hidden])")
    assert np.array_equal(server.masks(4)[0], theirs), "the change of the other tab is kept"
    assert first.page.get_attribute("#status", "data-state") == "conflict"
    first.page.click("#conflict-both")
    masks = first.saved(3)
    assert np.array_equal(masks[0], theirs)
    assert before[40, 40]
    assert not masks[2][40, 40]
    second.count(3)


def test_undo_leaves_alone_what_another_tab_has_changed_since(server: Running, tab: Callable[..., Tab]):
    first, second = tab(5), tab(5)
    before = len(server.masks(5))
    first.press("b")
    first.drag((40, 78), (60, 78))
    drawn = first.saved(before + 1)[-1]
    second.count(before + 1)
    second.click(50, 78)  # selects it
    second.press("b")
    second.drag((80, 78), (90, 78))
    theirs = second.when(lambda masks: masks[-1][78, 85])[-1]
    first.until(lambda: "changed an object" in first.page.inner_text("#say"))
    first.press("Control+z")
    first.page.wait_for_selector("#warnings:has-text('someone else has changed the object since')")
    assert np.array_equal(first.saved(before + 1)[-1], theirs)
    second.press("Control+z")
    second.when(lambda masks: np.array_equal(masks[-1], drawn))
    second.press("Control+Shift+z", "Delete")
    second.saved(before)
    first.count(before)
    first.press("Control+z", "Control+y")  # there is nothing to undo, and the object does not come back
    assert len(first.saved(before)) == before


def test_edit_that_a_full_disk_refuses_is_taken_back_and_can_be_made_again(
    server: Running, tab: Callable[..., Tab], monkeypatch: pytest.MonkeyPatch
):
    def full(_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    page = tab(6)
    before = len(server.masks(6))
    page.press("b")
    with monkeypatch.context() as patch:
        patch.setattr("maskwright.web.journal.sync_file", full)
        page.drag((40, 80), (60, 80))
        page.page.wait_for_selector("#warnings:has-text('Not saved')")
        assert "the disk is full" in page.page.inner_text("#warnings")
        page.count(before)
        assert len(server.masks(6)) == before
        assert page.page.get_attribute("#status", "data-state") == "saved", "nothing waits to be saved"
    page.press("Control+z")
    assert "Nothing to undo" in page.page.inner_text("#say")
    page.drag((40, 80), (60, 80))
    page.saved(before + 1)
    page.press("Control+z")
    page.saved(before)


def test_an_edit_that_was_not_answered_is_sent_again(server: Running, tab: Callable[..., Tab]):
    sockets: list[Any] = []

    def route(socket: Any) -> None:
        upstream = socket.connect_to_server()
        sockets.append(socket)
        first = len(sockets) == 1

        def from_page(text: str) -> None:
            upstream.send(text)
            if first and json.loads(text)["op"] == "edit":
                sockets.append("broken")

        def from_server(text: str) -> None:
            if "broken" in sockets and first:
                socket.close(code=1011, reason="broken")
            else:
                socket.send(text)

        socket.on_message(from_page)
        upstream.on_message(from_server)

    page = tab(5, lambda page: page.route_web_socket("**/api/live", route))
    page.click(120, 40)
    page.until(lambda: "broken" in sockets)
    page.press("b")
    page.drag((120, 80), (140, 80))  # offline
    page.saved(1)
    assert page.when(lambda masks: masks[0][80, 130])[0][40, 120]
    assert len(sockets) >= 3
    page.count(1)


def test_nothing_is_sent_to_other_images_of_a_server_that_was_started_anew(server: Running, tab: Callable[..., Tab]):
    sockets: list[Any] = []

    def route(socket: Any) -> None:
        socket.connect_to_server()
        sockets.append(socket)

    page = tab(9, lambda page: page.route_web_socket("**/api/live", route))
    item = {"id": 9, "name": "other.png", "width": 9, "height": 9, "objects": 0, "done": False, "version": 0}
    page.page.route("**/api/images?**", lambda route: route.fulfill(json={"total": 12, "items": [item]}))
    sockets[0].close(code=1012, reason="restarted")
    page.press("b")
    page.drag((120, 80), (140, 80))
    page.page.wait_for_selector("#status:has-text('Other images')")
    assert "1 change not saved" in page.page.inner_text("#status")
    assert "other images" in page.page.inner_text("#warnings")
    assert server.project.state(9).objects == {}


def test_names_are_text(server: Running, tab: Callable[..., Tab]):
    place = next(i for i in range(len(server.project)) if "onerror" in server.project.about(i)["name"])
    page = tab(place)
    assert "onerror=alert(1)>" in page.page.inner_text("#image-name")
    page.press("2")
    page.click(40, 40)
    page.saved(1)
    page.until(lambda: "<img src=x" in page.page.inner_text("#objects"))
    assert page.page.locator("img[onerror], #panel img").count() == 0
    page.page.fill("#class-search", "<b>new</b>")
    page.page.keyboard.press("Enter")
    page.until(lambda: "<b>new</b>" in server.project.classes)
    assert page.page.locator("b").count() == 0


def test_a_list_of_60000_images_has_few_rows(tab: Callable[..., Tab]):
    asked: list[int] = []

    def many(page: Any) -> None:
        def answer(route: Any) -> None:
            start = int(parse_qs(urlsplit(route.request.url).query)["start"][0])
            asked.append(start)
            items = [
                {"id": i, "name": f"frame {i}", "width": 9, "height": 9, "objects": 0, "done": False, "version": 0}
                for i in range(start, min(start + 200, 60_000))
            ]
            route.fulfill(json={"total": 60_000, "items": items})

        page.route("**/api/images?**", answer)

    page = tab(6, many)
    page.tolerated = ("404",)  # pixels of images that do not exist
    page.page.click("#toggle-images")
    page.page.focus("#images")
    page.press("End")
    page.page.wait_for_selector("#images .row:has-text('frame 59999')")
    assert page.page.locator("#images .row").count() < 60
    assert asked == [0, 59_800]
    # Scrolling through everything makes no further elements and asks only for what is looked at.
    rows = page.page.evaluate("""async () => {
      const list = document.getElementById('images'), most = [];
      for (let i = 0; i <= 60; i++) {
        list.scrollTop = (list.scrollHeight - list.clientHeight) * i / 60;
        await new Promise(requestAnimationFrame);
        most.push(document.querySelectorAll('#images .row').length);
      }
      return Math.max(...most);
    }""")
    assert rows < 60
    page.page.wait_for_timeout(200)
    assert len(asked) <= 4, "what is passed by is not asked for"


def test_pictures_of_the_list_are_asked_for_once_also_those_that_are_refused(tab: Callable[..., Tab]):
    asked: list[str] = []

    def refuse(page: Any) -> None:
        def answer(route: Any) -> None:
            place = urlsplit(route.request.url).path.split("/")[3]
            asked.append(place)
            if place == "0":
                route.fulfill(status=409, json={"error": "the image is damaged"})
            elif place == "1":
                route.fulfill(status=200, content_type="image/png", body=b"no image")
            else:
                route.continue_()

        page.route("**/pixels?max=96", answer)

    page = tab(7, refuse)
    page.tolerated = ("409",)
    page.page.click("#toggle-images")
    page.until(lambda: page.page.locator("#images .row.broken").count() == 2)
    page.until(lambda: page.page.locator("#images .row:not([hidden]) img[src]").count() >= 8)
    page.press("b")
    for x in (110, 130):  # the list is drawn again after each edit
        page.drag((x, 80), (x + 10, 80))
        page.saved(1)
        page.page.wait_for_timeout(200)
    page.page.evaluate("() => { document.getElementById('images').scrollTop = 200; }")
    page.page.wait_for_timeout(250)
    page.page.evaluate("() => { document.getElementById('images').scrollTop = 0; }")
    page.page.wait_for_timeout(250)
    broken = page.page.locator("#images .row.broken")
    assert sorted(broken.nth(n).get_attribute("data-image") for n in range(2)) == ["0", "1"]
    assert asked.count("0") == asked.count("1") == 1
    page.press("Control+z", "Control+z")
    page.saved(0)  # another test uses the image


def test_image_that_cannot_be_decoded_is_named_and_read_again_later(server: Running, tab: Callable[..., Tab]):
    damaged, disc_colour = [True], [90, 120, 100]

    def damage(page: Any) -> None:
        def answer(route: Any) -> None:
            if damaged[0]:
                route.fulfill(status=200, content_type="image/png", body=b"\x89PNG\r\n\x1a\n broken")
            else:
                route.continue_()

        page.route("**/api/images/10/pixels?max=2048", answer)

    page = tab(10, damage)
    page.page.wait_for_selector("#warnings:has-text('The image cannot be shown; its file may be damaged')")
    assert not page.page.is_visible("#busy")
    # Its objects can be changed all the same, and it is shown once its file is whole again.
    page.press("b")
    page.drag((110, 80), (130, 80))
    page.saved(1)
    assert page.page.evaluate(PIXEL, page.place(40, 40)) != disc_colour
    damaged[0] = False
    page.page.reload()
    page.ready()
    page.until(lambda: page.page.evaluate(PIXEL, page.place(40, 40)) == disc_colour)
    page.count(1)


def test_suggestions_export_and_training(server: Running, tab: Callable[..., Tab]):
    first = server.assistant
    from maskwright.web.assistant import Prompt

    first.embedding(7)
    rles = [first.answer(7, Prompt(((x, y, 1),))).counts for x, y, _ in DISCS[:3]]
    size = [SIZE[1], SIZE[0]]
    made = [{"by": "solo", "how": "suggestion", "clicks": 0}]
    exported: list[dict[str, Any]] = []

    def prepare(page: Any) -> None:
        def objects(route: Any) -> None:
            value = route.fetch().json()
            value["suggestions"] = [
                {"id": f"s{i}", "label": 0, "rle": {"size": size, "counts": counts}, "made": made, "score": 0.5}
                for i, counts in enumerate(rles)
            ]
            route.fulfill(json=value)

        def export(route: Any) -> None:
            exported.append(route.request.post_data_json)
            if exported[-1]["allow_loss"]:
                route.fulfill(json={"path": "out/x", "images": 1, "objects": 3, "losses": ["holes of 1 object"]})
            else:
                route.fulfill(json={"error": "cannot hold", "losses": ["<i>holes</i> of 1 object"]}, status=409)

        def train(route: Any) -> None:
            states = {"GET": "idle", "POST": "running", "DELETE": "idle"}
            route.fulfill(json={"state": states[route.request.method], "step": 5, "steps": 20})

        def project(route: Any) -> None:
            route.fulfill(json={**route.fetch().json(), "can_train": True})

        page.route("**/api/images/7/objects", objects)
        page.route("**/api/export", export)
        page.route("**/api/train", train)
        page.route("**/api/project", project)

    page = tab(7, prepare)
    page.tolerated = ("409",)  # the refusal of the export
    page.page.wait_for_selector("#suggestion-buttons:not([hidden])")
    page.click(40, 40)  # takes the suggestion under it
    page.saved(1)
    page.press("Escape", "a")
    masks = page.saved(3)
    assert all(iou(mask, disc(*place)) > 0.97 for mask, place in zip(masks, DISCS, strict=False))
    steps = [step["by"] for step in next(iter(server.project.state(7).objects.values())).made]
    assert steps == ["solo", "ann"]
    page.press("Control+z")
    page.saved(1)

    # The page shows what is lost before anything is written.
    page.page.click("#export")
    page.page.click("#export-start")
    page.page.wait_for_selector("#export-losses:not([hidden])")
    assert "<i>holes</i> of 1 object" in page.page.inner_text("#export-losses")
    page.page.click("#export-anyway")
    page.until(lambda: "out/x" in page.page.inner_text("#export-state"))
    assert [one["allow_loss"] for one in exported] == [False, True]
    page.press("Escape")
    page.page.click("#train")
    page.page.click("#train-start")
    page.page.wait_for_selector("#train-stop:not([hidden])")
    assert "5 of 20 steps" in page.page.inner_text("#train-state")
    page.page.click("#train-stop")
    page.page.wait_for_selector("#train-start:not([hidden])")
    page.press("Escape")
