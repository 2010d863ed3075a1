"""Panoptic and semantic segmentation: predict, evaluate, files, commands."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import maskwright as mw
from maskwright.data import Scenes, open_dataset, read_panoptic
from maskwright.errors import UsageError
from maskwright.inference import evaluate, predict
from maskwright.structures import Instances, Panoptic
from maskwright.structures.panoptic import colours_to_ids
from maskwright.systems import PanopticSystem
from tests.inference.painted import AsItIs, Dense, Painted


class Divider(PanopticSystem):
    """Recognises images of a data set and predicts their annotations."""

    name, card = "divider", Painted.card
    sees_padding = True

    def __init__(self, classes: tuple[str, ...], stuff: tuple[str, ...] = ()):
        super().__init__()
        self.classes = tuple(classes)
        self.stuff = self.checked_stuff(stuff)
        self.preprocess = AsItIs(multiple=16)
        self.dense = Dense()
        self.scenes: list = []
        self.sizes: list = []

    def forward(self, images, valid=None):
        self.sizes.append(None if valid is None else valid.tolist())
        return self.dense(images)

    def losses(self, raw, targets):
        return {"none": raw.images.sum() * 0}

    def _known(self, raw, placements) -> list[Panoptic]:
        out = []
        for padded, place in zip(raw.images, placements, strict=True):
            image = padded[:, : place.size[0], : place.size[1]].round().to(torch.uint8)
            index = next(i for i, s in enumerate(self.scenes) if torch.equal(s.image, image))
            target = self.scenes[index].target
            things = self.thing_classes()[target.labels]
            out.append(Panoptic(replace(target, crowd=None, scores=torch.linspace(1, 0.5, len(target))), things))
        return out

    def decode(self, raw, placements, *, score_threshold: float = 0.05, detections: int = 100) -> list[Instances]:
        return [p.instances()[:detections] for p in self._known(raw, placements)]

    def decode_panoptic(self, raw, placements, *, score_threshold: float = 0.0, overlap_threshold: float = 0.8):
        return [p[p.segments.scores >= score_threshold] for p in self._known(raw, placements)]

    def decode_semantic(self, raw, placements):
        return [p.semantic() for p in self._known(raw, placements)]


def scenes() -> Scenes:
    return Scenes(3, (48, 64), stuff=True, difficulty=0.2)


def divider() -> Divider:
    dataset = scenes()
    system = Divider(dataset.classes, dataset.stuff)
    system.scenes = [dataset[i] for i in range(3)]
    return system


def test_perfect_predictions_have_full_quality():
    dataset, system = scenes(), divider()
    result = evaluate(system, dataset, task="panoptic")
    assert result["panoptic/PQ"] == result["panoptic/PQth"] == result["panoptic/PQst"] == 1.0
    assert result.protocol.threshold == 0.0
    assert result.speed.milliseconds is not None
    assert evaluate(system, dataset, task="semantic")["semantic/mIoU"] == 1.0
    objects = evaluate(system, dataset)
    assert objects["segm/AP"] == 1.0
    assert objects.classes == dataset.classes[:6], "AP is of things alone"
    fewer = evaluate(system, dataset, task="panoptic", score_threshold=0.8)
    assert fewer["panoptic/PQ"] < 1


def test_systems_receive_the_sizes_without_padding():
    dataset, system = scenes(), divider()
    system.sizes = seen = []
    predict(system, dataset[0].image, task="panoptic")
    batch = torch.stack([dataset[0].image, dataset[1].image])
    list(predict(system, batch, batch=2))
    ready = mw.inference.prepare(system)
    predict(ready, dataset[0].image)
    assert ready.sizes[-1] == [[48, 64]]
    assert seen == [] or seen[0] == [[48, 64]], "the copy that predicts was asked, not the original"


def test_a_prediction_holds_both_and_can_be_saved(tmp_path):
    dataset, system = scenes(), divider()
    path = tmp_path / "a.png"
    Image.fromarray(dataset[0].image.permute(1, 2, 0).numpy()).save(path)
    prediction = predict(system, path, task="panoptic")
    assert prediction.panoptic is not None
    assert torch.equal(prediction.panoptic.semantic(), dataset.panoptic(0).semantic())
    assert len(prediction.found()) == int(dataset.panoptic(0).things.sum())
    prediction.save(tmp_path / "drawn.jpg")
    with pytest.raises(UsageError, match=r"its map, .*a\.png, would replace the image"):
        prediction.save(tmp_path / "a.json")
    saved = json.loads(prediction.save(tmp_path / "found" / "a.json").read_text())
    assert saved["images"][0]["file_name"] == "a.png"
    assert {c["name"] for c in saved["categories"] if not c["isthing"]} == set(dataset.stuff)
    ids = colours_to_ids(np.asarray(Image.open(tmp_path / "found" / "a.png")))
    again = read_panoptic(tmp_path / "found" / "a.json", tmp_path, tmp_path / "found")
    assert torch.equal(again.panoptic(0).semantic(), dataset.panoptic(0).semantic())
    assert {s["id"] for s in saved["annotations"][0]["segments_info"]} == set(np.unique(ids).tolist())
    regions = predict(system, dataset[0].image, task="semantic")
    assert torch.equal(regions.panoptic.semantic(), dataset.panoptic(0).semantic())
    assert not regions.panoptic.things.any()


def test_tasks_that_a_system_lacks_are_refused():
    image = scenes()[0].image
    with pytest.raises(UsageError, match="does not support task 'panoptic'; it supports instances"):
        predict(Painted(), image, task="panoptic")
    with pytest.raises(UsageError, match="omit `tile` with task 'panoptic'"):
        predict(divider(), image, task="panoptic", tile=64)
    with pytest.raises(UsageError, match=r"has no option 'nms_threshold'.*score_threshold, overlap_threshold"):
        predict(divider(), image, task="panoptic", nms_threshold=0.5)
    with pytest.raises(UsageError, match="needs a data set with things and stuff"):
        evaluate(divider(), Scenes(1, (48, 48)), task="panoptic")
    with pytest.raises(UsageError, match="stuff has 'lava'"):
        Divider(("a",), ("lava",))


def test_the_commands(tmp_path, monkeypatch, capsys):
    from maskwright import checkpoints
    from maskwright.cli import main

    scenes().write(tmp_path / "set", "val")
    monkeypatch.setattr(checkpoints, "load", lambda *a, **k: divider())
    code = main(["evaluate", "w", "--data", str(tmp_path / "set"), "--task", "panoptic", "-o", str(tmp_path / "run")])
    assert code == 0
    assert "things" in capsys.readouterr().out
    assert (tmp_path / "run" / "report.html").exists()
    folder = tmp_path / "found"
    source = [str(tmp_path / "set" / "val"), "-w", "w", "-o", str(folder), "--device", "cpu"]
    assert main(["predict", *source, "--task", "panoptic", "--format", "drawn", "coco", "masks"]) == 0
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    assert names[:3] == [f"drawn/00000{k}.jpg" for k in (1, 2, 3)]
    assert "panoptic.json" in names
    assert "results.json" not in names
    # What was written is a panoptic set like any other: its maps stand beside it.
    records = json.loads((folder / "panoptic.json").read_text())
    (folder / "annotations").mkdir()
    records["images"] = [{**i, "file_name": i["file_name"].split("/")[-1]} for i in records["images"]]
    (folder / "panoptic.json").write_text(json.dumps(records))
    read = mw.data.read_panoptic(folder / "panoptic.json", tmp_path / "set" / "val", folder / "panoptic", strict=True)
    assert torch.equal(read.panoptic(0).semantic(), open_dataset(tmp_path / "set", "val").panoptic(0).semantic())
    assert main(["predict", *source, "--task", "semantic", "--format", "masks"]) == 0
    plane = np.asarray(Image.open(folder / "masks" / "000001.png")).astype(int)
    assert np.array_equal(plane - 1, scenes().panoptic(0).semantic().numpy())
