"""Suggestions of a trained system, objects followed through clips, and training from the page."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("uvicorn", reason="needs the extra web")
pytest.importorskip("websockets", reason="needs the extra web")

import maskwright as mw
from maskwright.errors import UsageError
from maskwright.inference.predicting import predict
from maskwright.structures import Instances, Masks
from maskwright.systems.kinds.promptable import PromptableSystem
from maskwright.web import learning
from maskwright.web.annotating import AnnotationServer
from maskwright.web.assistant import Assistant
from maskwright.web.datasets import open_source
from maskwright.web.learning import Progress, Trainer, read_log
from maskwright.web.project import Project
from maskwright.web.propagating import Followed, follow_by_matching, frames_between
from maskwright.web.suggesting import Suggester, uncertainty
from tests.systems.tiny import build
from tests.web.photos import SIZE, add, disc, drawn, photos, serving
from tests.web.test_annotating import system


@cache
def detector() -> mw.System:
    return build("solov2", classes=["dog"]).eval()


def project(folder: Path, clip: bool = False) -> Project:
    return Project(open_source(folder, clip=clip), folder / ".maskwright", ("cat", "dog"), "ann")


# ---- suggestions -----------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_uncertainty_counts_expected_mistakes():
    assert uncertainty([], 0.5) == 0
    assert uncertainty([0.9], 0.5) == pytest.approx(0.1 / 2)
    assert uncertainty([0.9, 0.6, 0.4, 0.05], 0.5) == pytest.approx((0.1 + 0.4 + 0.4) / 3, abs=1e-5)
    assert uncertainty([1.3, 0.9], 0.5) == pytest.approx(0.1 / 3, abs=1e-5), "a score above 1 makes up for nothing"


def wait(condition: Any, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_trained_system_suggests_objects_least_certain_images_first(tmp_path, monkeypatch):
    folder, calls = photos(tmp_path / "photos", 3), []
    scores = {0: [0.9, 0.8], 1: [0.55, 0.3], 2: []}

    def found(self: Suggester, index: int) -> Instances:
        calls.append(index)
        own = scores[index]
        masks = Masks.join([round_mask(20, 20, 6), round_mask(40, 20, 6)])[: len(own)]
        return Instances(SIZE, masks.boxes(), torch.zeros(len(own), dtype=torch.int64), masks, torch.tensor(own))

    monkeypatch.setattr(Suggester, "find", found)
    with serving(AnnotationServer(project(folder), suggest=detector())) as page, page.live() as live:
        assert page.get("/api/project")["suggest"]["system"] == "solov2"
        live.socket.send('{"op": "open", "image": 1}')
        wait(lambda: page.get("/api/project")["suggest"]["done"] == 3)
        assert [item["id"] for item in page.get("/api/images?only=uncertain")["items"]] == [1, 0, 2]
        shown = page.get("/api/images/0/objects")["suggestions"]
        assert [(one["label"], one["score"]) for one in shown] == [(1, 0.9), (1, 0.8)]
        assert shown[0]["made"] == [{"by": "solov2", "how": "model", "clicks": 0}]
        assert len(page.get("/api/images/1/objects")["suggestions"]) == 1  # 0.3 is not shown
        first = {name: shown[0][name] for name in ("id", "rle", "made")} | {"label": 1}
        live.edit(0, {"do": "add", "object": first})
        assert [one["id"] for one in page.get("/api/images/0/objects")["suggestions"]] == [shown[1]["id"]]
        live.edit(0, {"do": "dismiss", "ids": [shown[1]["id"]], "value": True})
        assert page.get("/api/images/0/objects")["suggestions"] == []
        live.edit(0, {"do": "dismiss", "ids": [shown[1]["id"]], "value": False})
        over = {**drawn("own"), "rle": {**shown[1]["rle"]}}
        live.edit(0, {"do": "add", "object": over})
        assert page.get("/api/images/0/objects")["suggestions"] == []  # an object is there already
        live.edit(1, {"do": "done", "value": True})
        assert page.get("/api/images/1/objects")["suggestions"] == []
        assert [item["id"] for item in page.get("/api/images?only=uncertain")["items"]] == [0, 2]
    assert sorted(calls) == [0, 1, 2]
    with serving(AnnotationServer(project(folder), suggest=detector())) as page:
        assert page.get("/api/project")["suggest"]["done"] == 3  # of the session before
    assert len(calls) == 3


def test_suggestions_are_what_the_system_predicts(tmp_path):
    folder = photos(tmp_path / "photos", 1)
    with project(folder) as own:
        suggester = Suggester(own, detector(), threshold=0.0, device="cpu")
        suggester.start()
        wait(lambda: suggester.progress == (1, 1))
        objects = suggester.objects(0)
        suggester.stop()
    expected = predict(detector(), folder / "photo-1.png", score_threshold=0.1, device="cpu").found()
    assert expected.masks is not None
    kept = expected[expected.masks.areas() >= 9]
    assert kept.masks is not None
    assert [one.counts.encode() for one in objects] == [code["counts"] for code in kept.masks.rle()]
    assert all(one.label == 1 for one in objects)  # the class of this name


@pytest.mark.fast
def test_a_system_of_boxes_needs_a_promptable_one(tmp_path):
    with project(photos(tmp_path / "photos", 1)) as own, pytest.raises(UsageError, match="finds boxes only"):
        Suggester(own, build("faster-rcnn"))


# ---- clips -----------------------------------------------------------------------------------------------------------


def clip(folder: Path, frames: int = 5) -> Path:
    """A disc that moves to the right by 4 pixels a frame."""
    folder.mkdir()
    for n in range(frames):
        Image.fromarray(disc(SIZE, 20 + 4 * n, 30, 10) * np.uint8(220)).convert("RGB").save(folder / f"{n:03d}.png")
    return folder


@pytest.mark.fast
def test_frames_between_go_both_ways():
    assert list(frames_between(2, 4)) == [3, 4]
    assert list(frames_between(2, 0)) == [1, 0]
    assert list(frames_between(2, 2)) == []


def round_mask(x: float, y: float, radius: float) -> Masks:
    return Masks.from_dense(torch.from_numpy(disc(SIZE, x, y, radius) > 0)[None]).pack()


def found_disc(index: int) -> Instances:
    masks = round_mask(20 + 4 * index, 30, 10)
    return Instances(SIZE, masks.boxes(), torch.zeros(1, dtype=torch.int64), masks, torch.tensor([0.9]))


@pytest.mark.fast
def test_detections_are_matched_by_the_overlap_of_masks():
    start = {7: found_disc(0).masks, 8: round_mask(70, 50, 5)}
    frames: list[Followed] = list(follow_by_matching(found_disc, 0, 3, start, lambda frame: {}))
    assert [frame.frame for frame in frames] == [1, 2, 3]
    assert [set(frame.masks) for frame in frames] == [{7}] * 3
    last = frames[-1].masks[7].boxes()[0].tolist()
    assert last == found_disc(3).masks.boxes()[0].tolist()


def test_objects_are_followed_through_a_clip_and_corrections_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(Suggester, "find", lambda self, index: found_disc(index))
    own = project(clip(tmp_path / "clip"), clip=True)
    with serving(AnnotationServer(own, suggest=detector())) as page, page.live() as live, page.live() as other:
        assert page.get("/api/project")["kind"] == "clip"
        assert page.get("/api/project")["can_propagate"] is True
        code = found_disc(2).masks.rle()[0]["counts"].decode()
        disc_there = {**drawn("d"), "rle": {"size": list(SIZE), "counts": code}}
        live.edit(2, {"do": "add", "object": disc_there})
        live.edit(3, add("hand", 40, track=1))  # a correction of the object that is to be number 1
        finished = live.ask("propagate", image=2, ids=["d"], until=4)
        assert finished["event"] == "finished"
        events = [message for message in live.seen if message["event"] == "propagated"]
        assert [event["image"] for event in events] == [2, 3, 4]
        track = events[0]["objects"][0]["track"]
        assert track == 2  # a number that is free
        assert [one["track"] for one in events[1]["objects"]] == [2]
        assert events[2]["objects"][0]["made"][-1] == {"by": "solov2", "how": "propagated", "clicks": 0}
        assert other.until(lambda message: message["event"] == "changed" and message["image"] == 4)["objects"]
        later = page.get("/api/images/4/objects")["objects"][0]
        fixed = {name: later[name] for name in ("id", "label", "track")}
        fixed |= {"rle": disc_there["rle"], "made": [*later["made"], {"by": "ann", "how": "brush", "clicks": 1}]}
        live.edit(4, {"do": "replace", "id": later["id"], "was": later["revision"], "object": fixed})
        live.ask("propagate", image=2, ids=["d"], until=4)
        assert page.get("/api/images/4/objects")["objects"][0]["rle"] == disc_there["rle"]
        live.ask("propagate", image=2, ids=["d"], until=0)
        assert [len(page.get(f"/api/images/{n}/objects")["objects"]) for n in range(5)] == [1, 1, 1, 2, 1]
        for fields in ({"ids": ["x"], "until": 4}, {"ids": "d", "until": 4}, {"ids": [], "until": 4}, {"ids": ["d"]}):
            assert live.ask("propagate", image=2, **fields)["event"] == "error"


@pytest.mark.parametrize("name", ["sam", "sam2"])
def test_promptable_systems_follow_objects(tmp_path, name):
    torch.manual_seed(0)
    prompts = system() if name == "sam" else build("sam2").eval()
    assert isinstance(prompts, PromptableSystem)
    own = project(clip(tmp_path / "clip", 3), clip=True)
    assistant = Assistant(own.source, prompts, own.folder / "embeddings", "cpu")
    with serving(AnnotationServer(own, assistant)) as page, page.live() as live:
        code = found_disc(1).masks.rle()[0]["counts"].decode()
        live.edit(1, {"do": "add", "object": {**drawn("d"), "rle": {"size": list(SIZE), "counts": code}}})
        for until in (2, 0):
            assert live.ask("propagate", image=1, ids=["d"], until=until)["event"] == "finished"
        events = [message for message in live.seen if message["event"] == "propagated"]
        assert [event["image"] for event in events if event["image"] != 1] == [2, 0]
        for event in events:
            assert all(one["track"] == 1 for one in event["objects"])


def test_what_is_under_way_can_be_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(Suggester, "find", lambda self, index: (time.sleep(0.2), found_disc(index))[1])
    own = project(clip(tmp_path / "clip", 30), clip=True)
    with serving(AnnotationServer(own, suggest=detector())) as page, page.live() as live:
        code = found_disc(0).masks.rle()[0]["counts"].decode()
        live.edit(0, {"do": "add", "object": {**drawn("d"), "rle": {"size": list(SIZE), "counts": code}}})
        request = live.send("propagate", image=0, ids=["d"], until=29)
        live.until(lambda message: message["event"] == "propagated" and message["image"] == 1)
        live.socket.send(json.dumps({"op": "stop", "request": request}))
        assert live.event("finished")["request"] == request
        assert page.get("/api/images/29/objects")["objects"] == []


# ---- training --------------------------------------------------------------------------------------------------------

TRAINEE = """
import json, sys, time
from pathlib import Path
plan = json.loads(Path(sys.argv[1]).read_text())
out = Path(plan["out"]); out.mkdir(parents=True)
with (out / "log.csv").open("w") as log:
    log.write("step,epoch,name,value\\n")
    for step in (5, 10):
        log.write(f"{step},0,train/loss,1.0\\n"); log.flush(); time.sleep(0.3)
    log.write("10,0,val/segm/AP,0.25\\n")
if sys.argv[3] == "hang":
    time.sleep(600)
if sys.argv[3] == "fail":
    sys.exit("the loss is not finite")
(out / "best.safetensors").write_bytes(Path(sys.argv[3]).read_bytes())
"""


def test_training_from_the_page_gives_new_suggestions(tmp_path, monkeypatch):
    folder, weights = photos(tmp_path / "photos", 3), tmp_path / "new.safetensors"
    mw.save(detector(), weights)
    ending = [str(weights)]
    monkeypatch.setattr(Trainer, "command", lambda self, plan: [sys.executable, "-c", TRAINEE, str(plan), "0", *ending])
    monkeypatch.setattr(Trainer, "is_possible", staticmethod(lambda: True))
    with serving(AnnotationServer(project(folder), train="solov2-small")) as page, page.live() as live:
        assert page.get("/api/train") == {"state": "idle", "step": 0, "steps": 0}
        assert page.ask("POST", "/api/train", {})[0] == 400  # nothing is labelled
        live.edit(0, add("a"))
        for value in ({"steps": 0}, {"steps": "many"}, {"steps": 10**9}):
            assert page.ask("POST", "/api/train", value)[0] == 400
        status, _, body = page.ask("POST", "/api/train", {"steps": 10})
        assert (status, json.loads(body)["state"]) == (200, "running")
        assert page.ask("POST", "/api/train", {})[0] == 400  # one at a time
        done = live.until(lambda message: message.get("state") == "done")
        assert done == {"event": "train", "state": "done", "step": 10, "steps": 10, "ap": 0.25}
        plan = json.loads((folder / ".maskwright" / "training" / "run-1" / "plan.json").read_bytes())
        assert (plan["system"], plan["val"], plan["recipe"]["steps"]) == ("solov2-small", False, 10)
        assert mw.data.open_dataset(plan["data"]).targets(0).masks.areas().tolist() == [100]
        wait(lambda: page.get("/api/project")["suggest"] is not None)
        ending[:] = ["fail"]
        page.ask("POST", "/api/train", {"steps": 10})
        failed = live.until(lambda message: message.get("state") == "failed")
        assert failed["message"] == "the loss is not finite"
        ending[:] = ["hang"]
        page.ask("POST", "/api/train", {"steps": 10})
        live.until(lambda message: message.get("state") == "running" and message.get("step") == 10)
        status, _, body = page.ask("DELETE", "/api/train")
        assert json.loads(body)["state"] == "idle"


@pytest.mark.fast
def test_the_log_of_a_training_is_read_while_it_is_written(tmp_path):
    path = tmp_path / "log.csv"
    assert read_log(path) == (0, None)
    path.write_text("step,epoch,name,value\n5,0,train/loss,1.5\n10,0,val/segm/AP,0.5\n15,0,tra")
    assert read_log(path) == (15, 0.5)
    path.write_text("step,epoch,name,value\n5,0,train/loss,1.5\n1x")
    assert read_log(path) == (5, None)
    assert Progress("running", 3, 9, 0.12345).public() == {"state": "running", "step": 3, "steps": 9, "ap": 0.1235}


@pytest.mark.fast
def test_without_the_extra_training_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(learning.importlib.util, "find_spec", lambda name: None)

    async def start() -> None:
        with project(photos(tmp_path / "photos", 1)) as own, pytest.raises(UsageError, match=r"maskwright\[train\]"):
            Trainer(own).start()

    asyncio.run(start())
