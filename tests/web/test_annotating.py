"""The annotation server over real connections: images, edits, prompts, other pages, and what it refuses."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

pytest.importorskip("uvicorn", reason="needs the extra web")
pytest.importorskip("websockets", reason="needs the extra web")

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from maskwright.errors import UsageError
from maskwright.structures import Masks, Prompts
from maskwright.structures.rle import encode_counts
from maskwright.systems.kinds.promptable import PromptableSystem
from maskwright.web.annotating import AnnotationServer, Limits
from maskwright.web.assistant import Assistant, encoded
from maskwright.web.datasets import open_source
from maskwright.web.project import Project
from tests.systems.tiny import build
from tests.web.photos import SIZE, Live, Page, add, drawn, photos, serving


@cache
def system() -> PromptableSystem:
    torch.manual_seed(0)
    found = build("sam").eval()
    assert isinstance(found, PromptableSystem)
    return found


def server(folder: Path, *, prompts: bool = False, out: Path | None = None, **options: Any) -> AnnotationServer:
    project = Project(open_source(folder), out or folder / ".maskwright", ("cat", "dog"), "ann")
    assistant = Assistant(project.source, system(), project.folder / "embeddings", "cpu") if prompts else None
    return AnnotationServer(project, assistant, **options)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A server that the tests below share; each has images of its own."""
    folder = photos(tmp_path_factory.mktemp("shared") / "photos", 8)
    Image.fromarray(np.full((40, 30), 40_000, np.uint16)).save(folder / "wide.png")
    (folder / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    turned = Image.fromarray(np.zeros((20, 50, 3), np.uint8))
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(folder / "turned.jpg", exif=exif)
    with serving(server(folder, prompts=True)) as found:
        yield found


@pytest.fixture
def live(page: Page) -> Iterator[Live]:
    with page.live() as found:
        yield found


def number(page: Page, name: str) -> int:
    return next(item["id"] for item in page.get("/api/images")["items"] if item["name"] == name)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_the_project_is_described(page):
    about = page.get("/api/project")
    assert about["name"] == "photos"
    assert (about["kind"], about["count"], about["user"]) == ("images", 11, "ann")
    assert [one["name"] for one in about["classes"]] == ["cat", "dog"]
    assist = about["assist"]
    assert (assist["system"], assist["ready"], assist["where"]) == ("sam", True, "server")
    assert assist["page"] is (assist["why"] is None)
    assert {"coco", "yolo", "labelme"} <= set(about["formats"])
    listed = page.get("/api/images?start=1&count=2")
    assert listed["total"] == 11
    assert [item["name"] for item in listed["items"]] == ["photo-1.png", "photo-2.png"]
    assert page.get("/api/images?only=done")["total"] == 0


def test_images_are_sent_as_a_browser_reads_them(page):
    index = number(page, "photo-1.png")
    status, headers, body = page.ask("GET", f"/api/images/{index}/pixels")
    assert (status, headers["content-type"]) == (200, "image/png")
    assert Image.open(io.BytesIO(body)).size == (80, 60)
    again = page.ask("GET", f"/api/images/{index}/pixels", If_None_Match=headers["etag"])
    assert (again[0], again[2]) == (304, b"")
    small = page.ask("GET", f"/api/images/{index}/pixels?max=40")
    assert Image.open(io.BytesIO(small[2])).size == (40, 30)
    assert small[1]["etag"] != headers["etag"]
    turned = page.ask("GET", f"/api/images/{number(page, 'turned.jpg')}/pixels")
    assert Image.open(io.BytesIO(turned[2])).size == (20, 50)
    wide = page.ask("GET", f"/api/images/{number(page, 'wide.png')}/pixels")
    assert np.unique(np.asarray(Image.open(io.BytesIO(wide[2])))).tolist() == [156]  # 40,000 of 65,535
    status, _, body = page.ask("GET", f"/api/images/{number(page, 'broken.png')}/pixels")
    assert (status, "broken.png" in json.loads(body)["error"]) == (409, True)


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/images/99/pixels", 404),
        ("/api/images/x/pixels", 404),
        ("/api/images/-1/objects", 404),
        ("/api/images/0/pixels?max=-5", 400),
        ("/api/images?start=x", 400),
        ("/api/images?count=99999999999", 400),
        ("/api/images?only=some", 400),
        ("/../../etc/passwd", 404),
        ("/%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404),
        ("/..%5c..%5cwindows", 404),
        ("/api/images/0/../../../etc/passwd", 404),
        ("/__init__.py", 404),
        ("/api/nothing", 404),
    ],
)
def test_what_is_not_there_is_refused(page, path, status):
    found, _, body = page.ask("GET", path)
    assert found == status
    assert json.loads(body)["error"]


def test_answers_have_the_headers_that_protect_the_page(page):
    for path in ("/", "/api/project", "/nothing"):
        headers = page.ask("GET", path)[1]
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "server" not in headers


# ---- edits -----------------------------------------------------------------------------------------------------------


def test_edits_are_saved_and_told_to_other_pages(page, live):
    with page.live() as other:
        assert other.event("here")["users"] == 2
        saved = live.edit(1, add("a"), add("b", 40, label=1))
        assert (saved["event"], saved["version"], saved["done"]) == ("saved", 1, False)
        assert [one["revision"] for one in saved["objects"]] == [1, 1]
        told = other.event("changed")
        assert (told["image"], told["version"], told["by"]) == (1, 1, "ann")
        assert told["objects"] == saved["objects"]
        replaced = {"do": "replace", "id": "a", "was": 1, "object": drawn("a", 20)}
        assert other.edit(1, replaced, {"do": "done", "value": True})["done"] is True
        assert live.event("changed")["done"] is True
        conflict = live.edit(1, {"do": "replace", "id": "a", "was": 1, "object": drawn("a", 30)})
        assert (conflict["event"], conflict["version"], conflict["removed"]) == ("conflict", 2, [])
        assert conflict["objects"][0]["rle"] == drawn("a", 20)["rle"]
        assert other.edit(1, {"do": "remove", "id": "b", "was": 1})["removed"] == ["b"]
        assert live.event("changed")["removed"] == ["b"]
    assert live.event("here")["users"] == 1
    objects = page.get("/api/images/1/objects")
    assert (objects["size"], objects["done"], objects["version"]) == (list(SIZE), True, 3)
    assert [one["id"] for one in objects["objects"]] == ["a"]


def test_many_edits_that_are_sent_at_once_are_all_saved_in_order(page, live):
    for n in range(40):
        live.send("edit", image=2, base=0, what="add", edits=[add(f"n{n}", n)])
    versions = [live.event("saved")["version"] for _ in range(40)]
    assert versions == list(range(1, 41))
    with page.live() as one, page.live() as two:
        for n in range(20):
            one.send("edit", image=2, base=0, edits=[add(f"one{n}", n)])
            two.send("edit", image=2, base=0, edits=[add(f"two{n}", n)])
        for _ in range(20):
            one.event("saved")
            two.event("saved")
    assert len(page.get("/api/images/2/objects")["objects"]) == 80


def test_classes_are_added_for_all_pages(page, live):
    status, _, body = page.ask("POST", "/api/classes", {"name": "fox"})
    assert (status, json.loads(body)[2]["name"]) == (200, "fox")
    assert [one["name"] for one in live.event("classes")["classes"]] == ["cat", "dog", "fox"]
    for value, status in (({"name": "fox"}, 400), ({}, 400), ([], 400), (b"{", 400), (b"x" * 70_000, 413)):
        assert page.ask("POST", "/api/classes", value)[0] == status
    assert page.ask("GET", "/api/classes")[0] == 405


BAD = {
    "no JSON": "{nope",
    "no object": "[1, 2]",
    "NaN": '{"op": "prompt", "image": 0, "points": [[NaN, 1, 1]]}',
    "deep": "[" * 5000,
    "no op": "{}",
    "unknown": '{"op": "format-disk"}',
    "no image": '{"op": "edit", "edits": []}',
    "image": '{"op": "open", "image": 1e9}',
    "request": '{"op": "open", "image": 0, "request": {"a": 1}}',
    "large number": '{"op": "open", "image": 0, "request": 1' + "0" * 400 + "}",
    "large place": '{"op": "prompt", "image": 0, "points": [[1' + "0" * 400 + ", 5, 1]]}",
    "long number": '{"op": "open", "image": ' + "9" * 5000 + "}",
    "no prompt": '{"op": "prompt", "image": 0}',
    "outside": '{"op": "prompt", "image": 0, "points": [[500, 5, 1]]}',
    "label": '{"op": "prompt", "image": 0, "points": [[5, 5, 2]]}',
    "infinite": '{"op": "prompt", "image": 0, "points": [[1e999, 5, 1]]}',
    "many points": json.dumps({"op": "prompt", "image": 0, "points": [[5, 5, 1]] * 300}),
    "box": '{"op": "prompt", "image": 0, "box": [1, 2, 3]}',
    "mask": '{"op": "prompt", "image": 0, "rle": {"size": [9, 9], "counts": "x"}}',
    "no objects": '{"op": "similar", "image": 0, "id": "nothing"}',
    "no clip": '{"op": "propagate", "image": 0, "ids": ["a"], "until": 1}',
}


def test_messages_that_cannot_be_done_are_answered_with_a_sentence(page, live):
    live.event("here")
    for text in BAD.values():
        live.socket.send(text)
        answer = live.until(lambda message: message["event"] not in ("embedded", "here"))
        assert (answer["event"], len(answer["error"]) > 10) == ("error", True)
    live.socket.send(b"binary")
    assert live.event("error")["error"] == "a message must be a JSON object in a text frame"
    assert live.edit(3, add("after"))["event"] == "saved"


def test_mistake_of_the_server_is_answered_and_the_connection_goes_on(page, live, monkeypatch):
    def fails(*_: Any) -> None:
        raise ZeroDivisionError("division by zero")

    with monkeypatch.context() as patch:
        patch.setattr(Project, "edit", fails)
        answer = live.edit(3, add("never"))
        assert (answer["event"], answer["error"]) == ("error", "the server failed: division by zero")
    assert live.edit(3, add("later"))["event"] == "saved"


def test_a_message_that_is_too_long_ends_its_connection_only(page, live):
    with page.live() as other:
        other.event("here")
        other.socket.send("x" * (1 << 21))
        with pytest.raises(ConnectionClosed):
            other.event("nothing")
    assert live.edit(4, add("a"))["event"] == "saved"


# ---- prompts ---------------------------------------------------------------------------------------------------------


def expected(index: int, prompts: Prompts, folder: Path) -> str:
    pixels = torch.from_numpy(np.array(Image.open(folder / f"photo-{index}.png"))).permute(2, 0, 1)
    found = system().segment(encoded(system(), pixels), prompts).best()
    assert found.masks is not None
    return found.masks.rle()[0]["counts"].decode()


def iou(one: str, other: str) -> float:
    a, b = (Masks.from_rle([text], SIZE) for text in (one, other))
    return float(a.iou(b)[0, 0])


def test_prompts_are_answered_as_the_system_does(page, live, tmp_path):
    folder, index = photos(tmp_path, 8), number(page, "photo-5.png")
    opened = {"op": "open", "image": index}
    live.socket.send(json.dumps(opened))
    assert live.event("embedded")["image"] == index
    click = live.ask("prompt", image=index, points=[[25, 25, 1]], box=None, rle=None, hover=False)
    assert (click["event"], click["image"], click["rle"]["size"]) == ("mask", index, list(SIZE))
    assert iou(click["rle"]["counts"], expected(5, Prompts.from_points(SIZE, [[[25.0, 25]]]), folder)) > 0.98
    box = live.ask("prompt", image=index, points=[], box=[38, 37, 12, 13], rle=None, hover=False)
    assert iou(box["rle"]["counts"], expected(5, Prompts.from_boxes([[12.0, 13, 38, 37]], SIZE), folder)) > 0.98
    mask = drawn("x", 20)["rle"]
    improved = live.ask("prompt", image=index, points=[[30, 10, 0]], box=None, rle=mask, hover=False)
    wanted = Prompts(
        SIZE, torch.tensor([[[30.0, 10]]]), torch.tensor([[0]]), None, Masks.from_rle([mask], SIZE)
    )  # fmt: skip
    assert iou(improved["rle"]["counts"], expected(5, wanted, folder)) > 0.98
    nothing = {"size": list(SIZE), "counts": encode_counts(np.array([SIZE[0] * SIZE[1]])).decode()}
    assert live.ask("prompt", image=index, points=[[25, 25, 1]], rle=nothing, hover=False)["rle"] == click["rle"]
    assert "must have points" in live.ask("prompt", image=index, points=[], rle=nothing)["error"]
    assert live.ask("prompt", image=index, points=[[80.5, 60, 1]], hover=False)["event"] == "mask"  # on the border


def test_a_newer_hover_replaces_an_older_one(page, live):
    index = number(page, "photo-6.png")
    early = live.ask("prompt", image=number(page, "photo-1.png"), points=[[5, 5, 1]], hover=True)
    assert early["event"] == "dropped"  # not encoded yet
    live.socket.send(json.dumps({"op": "open", "image": index}))
    live.event("embedded")
    requests = [live.send("prompt", image=index, points=[[n, 20, 1]], hover=True) for n in range(1, 60)]
    answers = {}
    while len(answers) < len(requests):
        message = live.until(lambda message: message["event"] in ("mask", "dropped"))
        answers[message["request"]] = message["event"]
    assert answers[requests[-1]] == "mask"
    assert "dropped" in answers.values()
    clicks = [live.send("prompt", image=index, points=[[20, 20, 1]], hover=False) for _ in range(60)]
    events = [live.until(lambda message: message["event"] in ("mask", "error")) for _ in clicks]
    refused = [event["error"] for event in events if event["event"] == "error"]
    assert refused
    assert all("prompts are waiting already" in text for text in refused)
    assert live.ask("prompt", image=index, points=[[20, 20, 1]], hover=False)["event"] == "mask"


def test_everything_and_similar_objects_become_suggestions(page, live):
    index = number(page, "photo-7.png")
    live.edit(index, add("mine", 20))
    with page.live() as other:
        other.socket.send(json.dumps({"op": "open", "image": index}))
        other.event("embedded")
        found = live.ask("everything", image=index)
        assert found["event"] == "suggestions"
        similar = live.ask("similar", image=index, id="mine")
        assert similar["event"] == "suggestions"
        assert other.event("suggestions")["image"] == index
    listed = page.get(f"/api/images/{index}/objects")["suggestions"]
    assert {one["id"] for one in listed} == {one["id"] for one in similar["objects"]}
    assert all(one["made"] == [{"by": "sam", "how": "suggestion", "clicks": 0}] for one in listed)
    if listed:
        first, *rest = listed
        taken = {name: first[name] for name in ("id", "rle", "made")} | {"label": 0}
        live.edit(index, {"do": "add", "object": taken})
        if rest:
            live.edit(index, {"do": "dismiss", "ids": [rest[0]["id"]], "value": True})
        left = page.get(f"/api/images/{index}/objects")["suggestions"]
        assert not {first["id"], *(one["id"] for one in rest[:1])} & {one["id"] for one in left}


def test_embeddings_are_computed_once(tmp_path, monkeypatch):
    folder, calls = photos(tmp_path / "photos", 2), []
    original = PromptableSystem.embed
    monkeypatch.setattr(PromptableSystem, "embed", lambda *args: (calls.append(1), original(*args))[1])
    answers = []
    for _ in range(2):
        project = Project(open_source(folder), folder / ".maskwright")
        assistant = Assistant(project.source, system(), project.folder / "embeddings", "cpu")
        with serving(AnnotationServer(project, assistant)) as page, page.live() as live:
            live.socket.send('{"op": "open", "image": 0}')
            live.event("embedded")
            answers.append(live.ask("prompt", image=0, points=[[25, 25, 1]])["rle"]["counts"])
            assistant.embedding(1)  # computed ahead
    assert len(calls) == 2
    assert iou(*answers) > 0.98  # stored with 16 bits


# ---- who may talk to it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = photos(tmp_path_factory.mktemp("guarded") / "photos", 1)
    with serving(server(folder, token="secret", port=77, limits=Limits(pages=1))) as found:
        yield found


def test_a_token_opens_the_page_and_becomes_a_cookie(guarded):
    assert guarded.ask("GET", "/")[0] == 401
    assert guarded.ask("GET", "/api/project")[0] == 401
    assert guarded.ask("GET", "/?token=wrong")[0] == 403
    status, headers, _ = guarded.ask("GET", "/?token=secret")
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert cookie.startswith("maskwright-77=secret;")
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    pair = cookie.split(";")[0]
    assert guarded.ask("GET", "/api/project", Cookie=f"other=1; {pair}")[0] == 200
    assert guarded.ask("GET", "/api/project", Cookie="maskwright-77=wrong")[0] == 401
    assert guarded.ask("GET", "/api/project", Cookie="maskwright-78=secret")[0] == 401
    assert guarded.ask("GET", "/api/project", Authorization="Bearer secret")[0] == 200
    assert guarded.ask("GET", "/api/project?token=secret")[0] == 401
    assert guarded.ask("GET", "/health")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:80"}, 421),
        ({"Host": ""}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "no-cors"}, 403),
        ({"Sec_Fetch_Site": "same-site", "Sec_Fetch_Mode": "no-cors"}, 403),
        ({"Sec_Fetch_Site": "cross-site", "Sec_Fetch_Mode": "navigate"}, 200),
        ({"Sec_Fetch_Site": "same-origin", "Sec_Fetch_Mode": "cors"}, 200),
    ],
)
def test_requests_from_elsewhere_are_refused(page, headers, status):
    assert page.ask("GET", "/api/project", **headers)[0] == status


def test_the_own_origin_is_allowed(page):
    own = f"http://127.0.0.1:{page.port}"
    assert page.ask("POST", "/api/classes", {"name": "cat"}, Origin=own)[0] == 400  # known already
    assert page.ask("POST", "/api/classes", {"name": "cat"}, Origin="http://127.0.0.1:1")[0] == 403
    with page.live(origin=own) as live:
        assert live.event("here")["users"] >= 1


@pytest.mark.parametrize("origin", ["http://evil.example", "http://127.0.0.1:1", "null"])
def test_sockets_of_other_pages_are_refused(page, origin):
    with pytest.raises(InvalidStatus) as refused:
        connect(f"ws://127.0.0.1:{page.port}/api/live", origin=origin).close()
    assert refused.value.response.status_code == 403


def test_sockets_need_the_token_too(guarded):
    address = f"ws://127.0.0.1:{guarded.port}/api/live"
    with pytest.raises(InvalidStatus):
        connect(address).close()
    with connect(address, additional_headers={"Cookie": "maskwright-77=secret"}) as first:
        assert json.loads(first.recv(timeout=30))["users"] == 1
        with connect(address, additional_headers={"Cookie": "maskwright-77=secret"}) as second:
            with pytest.raises(ConnectionClosed):
                second.recv(timeout=30)
            assert second.close_code == 1013  # one page at a time, as the limits of this server say


# ---- without a system, and bombs -------------------------------------------------------------------------------------


def test_without_a_promptable_system_masks_are_drawn_by_hand(tmp_path):
    with serving(server(photos(tmp_path / "photos"))) as page, page.live() as live:
        about = page.get("/api/project")
        assert (about["assist"], about["suggest"], about["can_similar"]) == (None, None, False)
        live.socket.send('{"op": "open", "image": 0}')
        assert live.event("no-assist")["image"] == 0
        assert "--weights" in live.ask("prompt", image=0, points=[[1, 1, 1]])["error"]
        assert "--weights" in live.ask("everything", image=0)["error"]
        assert live.edit(0, add("a", how="polygon"))["event"] == "saved"


def test_images_with_too_many_pixels_are_not_decoded(tmp_path):
    folder = photos(tmp_path / "photos", 1)
    Image.new("1", (5_000, 1_000)).save(folder / "bomb.png")
    project = Project(open_source(folder, max_pixels=1 << 20), folder / ".maskwright")
    with serving(AnnotationServer(project)) as page:
        status, _, body = page.ask("GET", "/api/images/0/pixels")
        assert status == 409
        assert "more than the limit" in json.loads(body)["error"]
        assert page.ask("GET", "/api/images/0/objects")[0] == 409
        assert page.ask("GET", "/api/images/1/pixels")[0] == 200


def test_what_a_page_needs_to_decode_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    found = server(photos(tmp_path / "photos", 1), prompts=True)
    assert found.assistant is not None
    decoder = found.assistant.page_decoder
    assert decoder is not None
    monkeypatch.setattr("maskwright.web.decoding.exported", lambda system: b"the graph")
    with serving(found) as page:
        status, headers, body = page.ask("GET", "/api/images/0/embedding")
        assert status == 200
        path = tmp_path / "e.safetensors"
        path.write_bytes(body)
        own = found.assistant.embedding(0)
        with safe_open(path, "pt") as file:
            about = file.metadata()
            torch.testing.assert_close(file.get_tensor("image").float(), own.tensors["image"], rtol=1e-3, atol=1e-3)
        assert json.loads(about["placement"])["image_size"] == list(SIZE)
        assert json.loads(about["resizing"]) == {"steps": 2, "cubic": False}
        status, _, body = page.ask("GET", "/api/images/0/embedding", If_None_Match=headers["etag"])
        assert (status, body) == (304, b"")
        assert page.ask("GET", "/api/images/7/embedding")[0] == 404
        monkeypatch.setattr("maskwright.web.decoding.NEEDED", ("json",))
        assert page.get("/api/project")["assist"]["page"] is True
        assert page.ask("GET", "/api/decoder")[::2] == (200, b"the graph")
        assert (found.assistant.store.folder / f"{decoder.name}.onnx").read_bytes() == b"the graph"
        monkeypatch.setattr("maskwright.web.decoding.NEEDED", ("no_such_package",))
        assist = page.get("/api/project")["assist"]
        assert assist["page"] is False
        assert "maskwright[export]" in assist["why"]


def test_decoder_that_cannot_be_exported_is_refused_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def fails(system: PromptableSystem) -> bytes:
        raise UsageError("sam: the decoder cannot be exported")

    monkeypatch.setattr("maskwright.web.decoding.exported", fails)
    monkeypatch.setattr("maskwright.web.decoding.NEEDED", ("json",))
    with serving(server(photos(tmp_path / "photos", 1), prompts=True)) as page:
        for _ in range(2):
            status, _, body = page.ask("GET", "/api/decoder")
            assert status == 400
            assert json.loads(body)["error"] == "the page cannot decode by itself: sam: the decoder cannot be exported"
        assert page.get("/api/project")["assist"]["page"] is False


def test_runtime_of_the_page_is_sent_compressed_where_the_browser_takes_it(page: Page):
    path = "/ort-wasm-simd-threaded.wasm"
    _, headers, packed = page.ask("GET", path, Accept_Encoding="gzip")
    assert headers["content-encoding"] == "gzip"
    assert headers["content-type"] == "application/wasm"
    _, own, plain = page.ask("GET", path, Accept_Encoding="identity")
    assert "content-encoding" not in own
    assert plain[:4] == b"\0asm"
    assert gzip.decompress(packed) == plain
    status, _, body = page.ask("GET", path, If_None_Match=headers["etag"])
    assert (status, body) == (304, b"")
